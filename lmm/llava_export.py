"""`lmm export`: a LLaVA folder becomes a checkpoint of the original LLaVA, or its pretraining stage's mm_projector.bin.

In: a folder that `lmm build`, `lmm train` or `lmm import` wrote. Out: config.json with `mm_*` keys, renamed weights, the
tokenizer in a form that transformers 4.37 reads, and the vision tower both among the weights and as `vision_tower/`, because
the original loads it from a folder of its own. One file of weights is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from lift.common.errors import UserError, first_line
from lift.common.files import atomic_folder, read_json, require_file, require_folder, write_json
from lmm.llava_format import (
    PROJECTOR,
    TOWER,
    config_to_original,
    on_disk,
    projector_kind,
    projector_to_original,
    to_original,
)
from lmm.llava_import import PROJECTOR_FILE
from lmm.settings import ExportSettings
from lmm.tensor_files import SAFETENSORS, ShardWriter, Tensors, read_all, weight_files

TOWER_FOLDER = "vision_tower"


def export_llava(settings: ExportSettings) -> Path:
    """Writes the folder `settings.out` and returns it.

    Raises:
        UserError: `out` exists, the folder is no LLaVA folder with all its weights, or the original has no such model.
    """
    source, out = settings.folder, settings.out
    assert out is not None
    if out.exists():
        raise UserError(f"{out}: exists already. Remove it or choose another --out.")
    require_file(require_folder(source, "a LLaVA folder") / "config.json", "a LLaVA folder's config.json")
    if read_json(source / "config.json").get("model_type") != "llava" or not weight_files(source):
        raise UserError(f"{source}: expected a LLaVA folder with weights, as `lmm build` writes it, found another folder.")
    config = LlavaConfig.from_pretrained(source, local_files_only=True)
    processor: Any = _processor(source)
    tower_name = settings.mm_vision_tower or str(out.resolve() / TOWER_FOLDER)
    pads = bool(getattr(processor.image_processor, "do_pad", False))
    text: Any = config.text_config
    max_length = min(processor.tokenizer.model_max_length, text.max_position_embeddings)
    original = config_to_original(config, tower_name, pads, max_length, source)
    with atomic_folder(out) as folder:
        if settings.part == "projector":
            _write_projector(folder, source, projector_kind(config, source))
            original["tune_mm_mlp_adapter"] = True
        else:
            original["torch_dtype"], tower_dtype = _write_weights(folder, source, config, original["mm_projector_type"])
            _write_tokenizer(folder, source, processor.tokenizer, max_length)
            _write_tower_description(folder / TOWER_FOLDER, config, processor.image_processor, tower_dtype)
            ids = {name: original[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(folder / "generation_config.json", ids)
        write_json(folder / "config.json", dict(sorted(original.items())))
    print(f"wrote {out}")
    return out


def _processor(source: Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(source, local_files_only=True, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}: expected a LLaVA folder with its processor: {first_line(error)}") from error


def _projector(source: Path) -> Tensors:
    """Named as on disk. Raises UserError when one of its four weights is missing."""
    found: Tensors = {}
    for tensors in read_all(source):
        found |= {on_disk(key): value for key, value in tensors.items() if on_disk(key).startswith(PROJECTOR)}
    names = {f"{PROJECTOR}linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")}
    if found.keys() != names:
        missing = sorted(names ^ found.keys())[0]
        raise UserError(
            f"{source}: expected the projector's four weights linear_1 and linear_2; missing or unknown is {missing}."
        )
    return found


def _write_projector(folder: Path, source: Path, kind: str) -> None:
    projector = projector_to_original(_projector(source), kind)
    torch.save({key: value.clone() for key, value in projector.items()}, folder / PROJECTOR_FILE)


def _write_weights(folder: Path, source: Path, config: LlavaConfig, kind: str) -> tuple[str, str]:
    """The checkpoint's shards and the vision tower's own folder. Returns the dtypes of language model and vision tower."""
    projector = _projector(source)
    writer = ShardWriter(folder)
    tower: Tensors = {}
    names: set[str] = set()
    for tensors in read_all(source):
        renamed: Tensors = {}
        for key, value in tensors.items():
            name = on_disk(key)
            if name.startswith(PROJECTOR):
                continue
            target = to_original(name)
            if target is None:
                raise UserError(f"{source}: expected the weights of a LLaVA model, found also {key}. Merge adapters first.")
            if name.startswith(TOWER):
                tower["vision_model." + name.removeprefix(TOWER)] = value.contiguous()
            renamed[target] = value
        writer.add(renamed)
        names.update(map(on_disk, tensors))
    if not tower or "model.embed_tokens.weight" not in writer.dtypes:
        raise UserError(f"{source}: expected the weights of a vision tower and of a language model, found not both.")
    if missing := sorted(_expected(config) - names):  # the original would run on random weights in their place
        raise UserError(
            f"{source}: expected the weights of a whole LLaVA model; {len(missing)} are missing, such as {missing[0]}. "
            "Write the model folder again."
        )
    writer.add(projector_to_original(projector, kind))
    writer.close()
    (folder / TOWER_FOLDER).mkdir()
    save_file(tower, folder / TOWER_FOLDER / SAFETENSORS, metadata={"format": "pt"})
    dtypes = (writer.dtypes["model.embed_tokens.weight"], next(iter(tower.values())).dtype)
    return str(dtypes[0]).removeprefix("torch."), str(dtypes[1]).removeprefix("torch.")


def _expected(config: LlavaConfig) -> set[str]:
    """Names on disk of the weights of the model that `config` describes."""
    with torch.device("meta"):
        names = {on_disk(key) for key in LlavaForConditionalGeneration(config).state_dict()}
    return names - {"language_model.lm_head.weight"} if config.tie_word_embeddings else names


def _write_tower_description(folder: Path, config: LlavaConfig, image_processor: Any, dtype: str) -> None:
    """The tower's config.json and preprocessor_config.json with the keys that transformers 4.37 reads."""
    vision: Any = config.vision_config
    keys = (
        "attention_dropout", "hidden_act", "hidden_size", "image_size", "initializer_factor", "initializer_range",
        "intermediate_size", "layer_norm_eps", "num_attention_heads", "num_channels", "num_hidden_layers", "patch_size",
        "projection_dim",
    )  # fmt: skip
    described = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "torch_dtype": dtype}
    write_json(folder / "config.json", described | {key: getattr(vision, key) for key in keys})
    values = json.loads(image_processor.to_json_string())
    names = (
        "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std",
        "resample", "rescale_factor", "size",
    )  # fmt: skip
    preprocessing = {"image_processor_type": "CLIPImageProcessor", **{name: values[name] for name in names}}
    write_json(folder / "preprocessor_config.json", preprocessing)


def _write_tokenizer(folder: Path, source: Path, tokenizer: Any, max_length: int) -> None:
    """`tokenizer.model` where the folder still has it, as a LlamaTokenizer; else tokenizer.json for the fast class."""
    options: dict[str, Any] = {
        name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }  # fmt: skip
    options |= {"model_max_length": max_length, "padding_side": "right", "clean_up_tokenization_spaces": False}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if (source / "tokenizer.model").is_file():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
        legacy = "Regex" not in json.dumps(backend["normalizer"])
        options |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    else:
        # The list of pairs came with tokenizers 0.20; the original has 0.15.
        merges = backend["model"].get("merges")
        if merges and not isinstance(merges[0], str):
            backend["model"]["merges"] = [" ".join(pair) for pair in merges]
        (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
        options |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", {key: value for key, value in options.items() if value is not None})
