"""`lmm build`: a LlavaForConditionalGeneration from an encoder folder and a language-model folder.

In: a CLIPVisionModel folder and a causal language model's folder. Out: a folder that plain transformers loads and runs,
with the two-layer GELU projector of LLaVA-1.5 (arXiv 2310.03744) new, and `build.json` saying what it was made from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from lift.common.errors import UserError, first_line
from lift.common.files import atomic_folder, require_file, require_folder, sha256_file, write_json
from lmm.folders import content_hash
from lmm.processor import add_image_token, choose_chat_template, ensure_pad_token, load_tokenizer, make_processor
from lmm.settings import BuildSettings

FEATURE_LAYER = -2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Weights of a whole CLIP model beside its vision side; a CLIP folder as published serves as tower too.
CLIP_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def build(settings: BuildSettings) -> Path:
    """Writes the model folder `settings.out` and returns it. Raises UserError for unusable folders, or when `out` exists."""
    if settings.out.exists():
        raise UserError(f"{settings.out}: exists already. Remove it or choose another --out.")
    tower = load_tower(settings.vision_tower)
    tokenizer = load_tokenizer(require_folder(settings.llm, "a language model's folder"))
    template = choose_chat_template(tokenizer, settings.llm, settings.chat_template)
    llm = load_llm(settings.llm)
    pad_note = ensure_pad_token(tokenizer)
    image_id, image_note = add_image_token(tokenizer, llm.get_input_embeddings().num_embeddings)
    vision: Any = tower.config
    processor = make_processor(settings.vision_tower, tokenizer, template, vision.patch_size, vision.image_size)
    model = assemble(tower, llm, image_id, tokenizer.pad_token_id, settings.seed).to(dtype=DTYPES[settings.precision])
    for note in (image_note, pad_note):
        print(note)
    with atomic_folder(settings.out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        record = {
            "vision_tower": str(settings.vision_tower),
            "vision_tower_hash": content_hash(settings.vision_tower),
            "llm": str(settings.llm),
            "llm_hash": content_hash(settings.llm),
            "image_token_id": image_id,
            "notes": [image_note, pad_note],
            "choices": choices(settings),
        }
        write_json(folder / "build.json", record)
    print(f"wrote {settings.out}")
    return settings.out


def choices(settings: BuildSettings) -> dict[str, Any]:
    """The settings that decide the result beside the two folders; a template file counts by its content."""
    template = settings.chat_template
    if template is not None and Path(template).is_file():
        template = sha256_file(Path(template))
    return {"chat_template": template, "precision": settings.precision, "seed": settings.seed}


def load_tower(folder: Path) -> CLIPVisionModel:
    """A CLIPVisionModel in float32, every weight from `folder`. Raises UserError if one is missing, left over or misshapen."""
    require_file(folder / "config.json", "a vision tower's config.json")
    try:
        loaded: Any = CLIPVisionModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: expected a transformers CLIPVisionModel in safetensors: {first_line(error)}") from error
    tower, info = loaded
    left_over = [key for key in info["unexpected_keys"] if not key.startswith(CLIP_TEXT_SIDE)]
    for problem, keys in (
        ("lacks", info["missing_keys"]),
        ("has unknown", left_over),
        ("has misshapen", info["mismatched_keys"]),
    ):
        if keys:
            example = sorted(map(str, keys))[0]
            raise UserError(
                f"{folder}: the vision tower {problem} weights ({len(keys)}, such as {example}), and would run on random ones. "
                "Export the encoder again; expected are exactly the weights of transformers' CLIPVisionModel."
            )
    return tower


def load_llm_config(folder: Path) -> Any:
    """Raises UserError when transformers does not know the model; code in the folder is never run."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: expected a causal language model's config.json: {first_line(error)}") from error


def load_llm(folder: Path) -> Any:
    """A causal language model in float32. Raises UserError when it cannot be loaded whole."""
    config = load_llm_config(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: expected a causal language model in safetensors: {first_line(error)}") from error
    llm, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{folder}: the language model lacks weights, such as {sorted(info['missing_keys'])[0]}.")
    return llm


def assemble(tower: CLIPVisionModel, llm: Any, image_id: int, pad_id: int, seed: int) -> Any:
    """Joins tower and language model by a projector whose weights come from `seed` (normal with std 0.02, biases 0)."""
    vision: Any = tower.config
    config = LlavaConfig(
        vision_config=vision,
        text_config=llm.config,
        image_token_index=image_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.get_decoder().state_dict())
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict())
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=0.02, generator=generator)
        torch.nn.init.zeros_(layer.bias)
    model.tie_weights()
    model.generation_config = GenerationConfig(**{**llm.generation_config.to_diff_dict(), "pad_token_id": pad_id})
    return model
