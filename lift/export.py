"""`lift export`: a run's checkpoint in, an encoder folder out, or a checkpoint that the official LIFT code loads.

The folder is a transformers CLIPVisionModel with its image processor, in a form that transformers 4.37 reads as well, since
the original LLaVA needs that; beside it lie the head, the description of the text side, which only evaluation needs, and a
model card.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerBase

from lift.common.checks import given
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, require_file, write_json, write_text
from lift.common.settings import parse_settings, to_plain
from lift.encoder import CARD
from lift.images import image_processor
from lift.model import clip_text_config, vision_config
from lift.model_card import model_card
from lift.official import PREPROCESSING, to_official, write_checkpoint
from lift.run_folder import FREE_TO_CHANGE, TEXT_ENCODER, TOKENIZER, best_checkpoints, checkpoints
from lift.settings import ExportSettings, PretrainSettings

FORMAT = 1


def export(settings: ExportSettings) -> None:
    """Command `lift export`."""
    out = given(settings.out, "out")
    is_folder = (settings.run / "lift_config.json").is_file()
    if settings.format == "folder":
        if is_folder:
            raise UserError(f"{settings.run}: is an encoder folder already. Give a run folder, or --format official.")
        export_encoder(settings.run, out, settings.step)
    elif is_folder:
        if settings.step is not None:
            raise UserError(f"{settings.run}: an encoder folder has one state only. Leave --step out, or give the run folder.")
        export_official(settings.run, out)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            encoder = Path(temporary) / "encoder"
            export_encoder(settings.run, encoder, settings.step)
            export_official(encoder, out, settings.run)
    print(f"{out}: encoder of {settings.run}")


def export_encoder(run: Path, out: Path, step: int | Literal["best"] | None = None) -> None:
    """Writes the encoder folder of checkpoint `step` (the newest by default, or the one with the best validation).

    Raises:
        UserError: not a run folder, or no such checkpoint.
    """
    file = require_file(run / "config.yaml", "the settings of a run folder (lift pretrain)")
    settings = parse_settings(PretrainSettings, ["--config", str(file)], "lift export", "")
    chosen, checkpoint = _checkpoint(run, step)
    state = load_file(checkpoint / "model.safetensors")
    text_tower: tuple[CLIPTextConfig, PreTrainedTokenizerBase | None] | None = None
    text: dict[str, Any] = {"kind": "clip_text_tower"}
    if settings.objective == "clip":
        tokenizer = AutoTokenizer.from_pretrained(run / TOKENIZER)
        text_tower = (clip_text_config(settings.clip_text, tokenizer), tokenizer)
    else:
        text = read_json(run / TEXT_ENCODER, "the description of the run's text encoder")
    description = {
        "objective": settings.objective,
        "text_transform": settings.text_transform.kind,
        "text": text,
        "step": chosen,
        "seed": settings.seed,
        "data": [{"name": source.name, "kind": source.kind} for source in settings.data],
        "samples": read_json(run / "data.json", "the description of the run's data")["samples"],
        "recipe": _recipe(settings),
    }
    write_encoder_folder(out, state, vision_config(settings.vision), text_tower, description)


def _checkpoint(run: Path, step: int | Literal["best"] | None) -> tuple[int, Path]:
    """Number and folder of a checkpoint."""
    if step == "best":
        best = best_checkpoints(run)
        if not best:
            raise UserError(f"{run}: no best checkpoint; it had no validation (validation.data).")
        return read_json(best[-1] / "state.json")["step"], best[-1]
    found = {int(path.name.removeprefix("step_")): path for path in checkpoints(run)}
    chosen = max(found, default=None) if step is None else step
    if chosen is None or chosen not in found:
        raise UserError(f"{run}: no checkpoint {'' if step is None else step}; it has {sorted(found) or 'none'}.")
    return chosen, found[chosen]


def _recipe(settings: PretrainSettings) -> dict[str, Any]:
    """The plain settings that change the weights; no paths, which say nothing elsewhere."""
    elsewhere = FREE_TO_CHANGE | {"objective", "text_transform", "seed"}
    plain = {name: value for name, value in vars(settings).items() if name not in elsewhere}
    return {name: to_plain(value) for name, value in plain.items() if isinstance(value, (bool, int, float, str, tuple))}


def write_encoder_folder(
    out: Path,
    state: dict[str, Tensor],
    vision: CLIPVisionConfig,
    text_tower: tuple[CLIPTextConfig, PreTrainedTokenizerBase | None] | None,
    description: dict[str, Any],
) -> None:
    """Writes an encoder folder whole or not at all.

    Args:
        state: tensors named `vision.*`, `text_tower.*` (CLIP), and everything else (head, temperature, text transform).
        text_tower: CLIP only; without a tokenizer the folder embeds images only.
        description: what `lift_config.json` says beside the dimension and the preprocessing.
    Raises:
        UserError: `out` holds something other than an encoder folder.
    """
    check_output_folder(out, "lift_config.json")
    head = {name: tensor for name, tensor in state.items() if not name.startswith(("vision.", "text_tower."))}
    dimension = int(head["head.weight" if "head.weight" in head else "head.2.weight"].shape[0])
    config = {"format": FORMAT, "embedding_dim": dimension, **description, "preprocessing": PREPROCESSING}
    with atomic_folder(out) as folder:
        _save_vision(vision, state, folder)
        save_file(head, folder / "lift_head.safetensors", metadata={"format": "pt"})
        if text_tower is not None:
            _save_text_tower(*text_tower, state, folder / "text_tower")
        write_json(folder / "lift_config.json", config)
        write_text(folder / CARD, model_card(folder))


def _save_vision(config: CLIPVisionConfig, state: dict[str, Tensor], folder: Path) -> None:
    image_size = config.image_size
    assert isinstance(image_size, int)  # the images are square
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
    # transformers 4 finds its weights only under this prefix, and would run on random ones with a mere warning; 5 reads both.
    vision = {f"vision_model.{name.removeprefix('vision.')}": t for name, t in state.items() if name.startswith("vision.")}
    save_file(vision, folder / "model.safetensors", metadata={"format": "pt"})
    # by itself: older readers do not look into a processor_config.json
    image_processor(image_size).save_pretrained(folder)


def _save_text_tower(
    config: CLIPTextConfig, tokenizer: PreTrainedTokenizerBase | None, state: dict[str, Tensor], folder: Path
) -> None:
    config.architectures = ["CLIPTextModelWithProjection"]
    config.save_pretrained(folder)
    tower = {name.removeprefix("text_tower."): t for name, t in state.items() if name.startswith("text_tower.")}
    save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def export_official(folder: Path, out: Path, run: Path | None = None) -> None:
    """Writes an encoder folder as a checkpoint of the official LIFT code (or of its CLIP baseline).

    Args:
        run: where the folder was exported from, for names and messages.
    Raises:
        UserError: the official model cannot hold what the folder has (text transform, the sigmoid objective's bias), or would
            read it differently (a CLIP text tower whose end token is not the largest id, where the official code pools).
    """
    named = run or folder
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --format official writes one file. Give --out a file name (epoch_1.pt).")
    config = read_json(folder / "lift_config.json", "the description of an encoder folder (lift export)")
    clip = config["objective"] == "clip"
    if config["text_transform"] != "none":
        raise UserError(
            f"{named}: was aligned to text embeddings under the transform '{config['text_transform']}', which the official "
            "code does not apply. Export it with --format folder."
        )
    if config["objective"] == "sigmoid":
        raise UserError(f"{named}: trained by the sigmoid objective, whose bias the official model does not have.")
    weights = load_file(require_file(folder / "model.safetensors", "the weights of an encoder folder"))
    state = {f"vision.{key.removeprefix('vision_model.')}": tensor for key, tensor in weights.items()}
    head = load_file(require_file(folder / "lift_head.safetensors", "the head of an encoder folder"))
    if config["objective"] == "cosine":
        head.pop("log_scale", None)  # the official model of the cosine loss has no temperature
    state |= head
    if clip:
        text = read_json(folder / "text_tower" / "config.json", "the text tower of a CLIP encoder folder")
        if text["eos_token_id"] != text["vocab_size"] - 1:
            raise UserError(
                f"{named}: its text feature is taken at token {text['eos_token_id']}, the official code takes it at the "
                f"largest id ({text['vocab_size'] - 1}). Only a CLIP trained with CLIP's own tokenizer can be exported."
            )
        state |= {f"text_tower.{key}": t for key, t in load_file(folder / "text_tower" / "model.safetensors").items()}
    imported = config.get("imported", {})
    label = imported.get("name") or named.resolve().name
    write_checkpoint(out, to_official(state, clip, folder), label, imported.get("epoch") or 0)
