"""`lift export`: a run's checkpoint in, an encoder folder out.

The folder is a transformers CLIPVisionModel with its image processor; beside it lie the head and the description of the text
side, which only evaluation needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, require_file, write_json
from lift.common.settings import parse_settings
from lift.images import image_processor
from lift.model import clip_text_config, vision_config
from lift.run_folder import TEXT_ENCODER, TOKENIZER, checkpoints
from lift.settings import ExportSettings, PretrainSettings

FORMAT = 1


def export(settings: ExportSettings) -> None:
    export_encoder(settings.run, settings.out, settings.step)
    print(f"{settings.out}: encoder of {settings.run}")


def export_encoder(run: Path, out: Path, step: int | None = None) -> None:
    """Writes the encoder folder of checkpoint `step` (the newest by default).

    Raises:
        UserError: not a run folder, or no such checkpoint.
    """
    config = require_file(run / "config.yaml", "the settings of a run folder (lift pretrain)")
    settings = parse_settings(PretrainSettings, ["--config", str(config)], "lift export", "")
    found = {int(path.name.removeprefix("step_")): path for path in checkpoints(run)}
    chosen = max(found, default=None) if step is None else step
    if chosen not in found:
        raise UserError(f"{run}: no checkpoint {'' if step is None else step}; it has {sorted(found) or 'none'}.")
    state = load_file(found[chosen] / "model.safetensors")
    check_output_folder(out, "lift_config.json")
    with atomic_folder(out) as folder:
        _save_vision(settings, state, folder)
        head = {name: tensor for name, tensor in state.items() if not name.startswith(("vision.", "text_tower."))}
        save_file(head, folder / "lift_head.safetensors", metadata={"format": "pt"})
        text: dict[str, Any] = {"kind": "clip_text_tower"}
        if settings.objective == "clip":
            _save_text_tower(settings, state, run, folder / "text_tower")
        else:
            text = read_json(run / TEXT_ENCODER, "the description of the run's text encoder")
        write_json(
            folder / "lift_config.json",
            {
                "format": FORMAT,
                "objective": settings.objective,
                "embedding_dim": int(state["head.weight" if settings.objective == "clip" else "head.2.weight"].shape[0]),
                "text_transform": settings.text_transform.kind,
                "text": text,
                "step": chosen,
                "seed": settings.seed,
            },
        )


def _save_vision(settings: PretrainSettings, state: dict[str, Tensor], folder: Path) -> None:
    config = vision_config(settings.vision)
    config.architectures = ["CLIPVisionModel"]
    config.save_pretrained(folder)
    # transformers 4 finds its weights only under this prefix, and would run on random ones with a mere warning; 5 reads both.
    vision = {f"vision_model.{name.removeprefix('vision.')}": t for name, t in state.items() if name.startswith("vision.")}
    save_file(vision, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor(settings.vision.image_size).save_pretrained(folder)


def _save_text_tower(settings: PretrainSettings, state: dict[str, Tensor], run: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / TOKENIZER)
    config = clip_text_config(settings.clip_text, tokenizer)
    config.architectures = ["CLIPTextModelWithProjection"]
    config.save_pretrained(folder)
    tower = {name.removeprefix("text_tower."): t for name, t in state.items() if name.startswith("text_tower.")}
    save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
