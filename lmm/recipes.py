"""The data and the encoder that a command looks at: those of a recipe of `lmm train` or `lmm finetune`, or of a file.

In: a DataChoice. Out: rows, the encoder that training would use, and the longest sample it would take. No model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import CLIPVisionConfig, LlavaConfig

from lift.common.errors import UserError
from lift.common.files import read_json, require_file, require_folder
from lift.common.settings import parse_settings
from lmm.conversation import IMAGE_MARKER, ConversationEncoder, load_template
from lmm.images import ImageStore, NamedImages
from lmm.original_tokenizer import PiecewiseEncoder, is_llama_tokenizer, load_llama_tokenizer
from lmm.processor import add_image_token, choose_chat_template, ensure_pad_token, load_tokenizer, make_processor
from lmm.rows import Rows, read_sources
from lmm.settings import ConversationSource, DataChoice, FinetuneSettings, StageSettings, TrainSettings

NO_LIMIT = 2**62


@dataclass(frozen=True)
class Choice:
    rows: Rows
    encoder: ConversationEncoder | None
    """None when no tokenizer is known."""
    max_length: int
    max_drop_fraction: float
    """Share of unusable samples from which on training would refuse to start."""


def open_choice(choice: DataChoice, tokens_per_image: int | None, read_images: bool, max_length: int = NO_LIMIT) -> Choice:
    """Raises UserError for an unusable recipe, model, tokenizer or source.

    Args:
        max_length: of a file for which none is given.
        tokens_per_image: None for those of the model, or 576 as in LLaVA-1.5; a recipe's model decides for itself.
        read_images: False when the images need not be there.
    """
    if choice.recipe is not None:
        stage, encoder = _of_recipe(choice)
        encoder.max_length = stage.max_length if choice.max_length is None else choice.max_length
        return Choice(read_sources(stage.data), encoder, encoder.max_length, stage.max_drop_fraction)
    assert choice.data is not None  # the settings see to it
    rows = read_sources([ConversationSource(annotations=choice.data, images=choice.images, split=choice.split or "train")])
    if not read_images and choice.images is None:
        store: ImageStore = NamedImages()
        rows = Rows([(file, store) for file, _ in rows.parts])
    limit = max_length if choice.max_length is None else choice.max_length
    if choice.tokenizer is None:
        return Choice(rows, None, limit, StageSettings.max_drop_fraction)
    tokens_per_image = tokens_per_image or _tokens_per_image(choice.tokenizer)
    return Choice(
        rows,
        encoder_of_folder(choice.tokenizer, choice.template or "vicuna_v1", tokens_per_image, limit),
        limit,
        StageSettings.max_drop_fraction,
    )


def encoder_of_folder(folder: Path, template: str, tokens_per_image: int, max_length: int) -> ConversationEncoder:
    """The encoder of a tokenizer's folder.

    A tokenizer that knows `<image>` is used as training uses it. Another is used as the original LLaVA does, piece by piece,
    with the placeholder -200 for an image.

    Raises:
        UserError: the folder has no tokenizer, or no chat template though `template` is `chat`.
    """
    require_folder(folder, "a tokenizer's folder")
    if _knows_image(folder):
        tokenizer, space_first = load_tokenizer(folder), None
    elif is_llama_tokenizer(folder):
        tokenizer, space_first = load_llama_tokenizer(folder)
    else:
        tokenizer, space_first = load_tokenizer(folder), False
    text = choose_chat_template(tokenizer, folder, None) if template == "chat" else load_template(template)
    if space_first is None:
        return ConversationEncoder(tokenizer, text, template, IMAGE_MARKER, tokens_per_image, max_length)
    return PiecewiseEncoder(tokenizer, text, template, tokens_per_image, max_length, space_first)


def _knows_image(folder: Path) -> bool:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    value = read_json(path, "a tokenizer")
    added = value.get("added_tokens", []) if isinstance(value, dict) else []
    return any(isinstance(token, dict) and token.get("content") == IMAGE_MARKER for token in added)


def _tokens_per_image(folder: Path) -> int:
    """Of a LLaVA model's folder; else LLaVA-1.5's."""
    path = folder / "config.json"
    config = read_json(path, "a model's config") if path.is_file() else {}
    vision = config.get("vision_config", {})
    if "image_size" in vision and "patch_size" in vision:
        return (vision["image_size"] // vision["patch_size"]) ** 2
    return 576


def _of_recipe(choice: DataChoice) -> tuple[StageSettings, ConversationEncoder]:
    from lmm.train import load_processor, make_encoder  # torch's distributed parts are needed by nothing else here

    settings = _read_recipe(choice)
    if isinstance(settings, TrainSettings):
        require_folder(settings.model, "a LLaVA model's folder, as `lmm build` writes it")
        processor, llava = load_processor(settings.model)
        return settings, make_encoder(processor, llava, settings, settings.model)
    processor, llava = _future_processor(settings)
    if settings.stage2 is None and choice.stage == "stage2":
        raise UserError(f"{choice.recipe}: has no stage2. Leave out --stage.")
    stage = settings.stage1 if choice.stage == "stage1" or settings.stage2 is None else settings.stage2
    return stage, make_encoder(processor, llava, stage, settings.llm)


def _read_recipe(choice: DataChoice) -> TrainSettings | FinetuneSettings:
    path = require_file(Path(choice.recipe or ""), "a recipe of `lmm train` or `lmm finetune`")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    keys = keys if isinstance(keys, dict) else {}
    # where to write is often left to the command line; nothing is written here
    arguments = ["--config", str(path)] + ([] if "out" in keys else ["--out", "unused"])
    if keys.keys() & {"stage1", "stage2", "vision_tower", "llm"}:
        return parse_settings(FinetuneSettings, arguments, str(path), "")
    if choice.tokenizer is not None:
        arguments += ["--model", str(choice.tokenizer)]
    return parse_settings(TrainSettings, arguments, str(path), "")


def _future_processor(settings: FinetuneSettings) -> tuple[Any, LlavaConfig]:
    """Processor and configuration of the model that `lmm build` would make of the recipe's two folders."""
    from lmm.build import load_llm_config  # needs torch

    tokenizer = load_tokenizer(require_folder(settings.llm, "a language model's folder"))
    template = choose_chat_template(tokenizer, settings.llm, settings.chat_template)
    ensure_pad_token(tokenizer)
    add_image_token(tokenizer, load_llm_config(settings.llm).get_text_config().vocab_size)
    require_file(settings.vision_tower / "config.json", "a vision tower's config.json")
    vision: Any = CLIPVisionConfig.from_pretrained(settings.vision_tower)
    processor = make_processor(settings.vision_tower, tokenizer, template, vision.patch_size, vision.image_size)
    return processor, LlavaConfig(vision_config=vision)
