"""Low-rank adapters on the language model by PEFT, on plain or quantised weights (LoRA, QLoRA).

In: a LLaVA model. Out: the same wrapped, with adapters on its language model's linear layers and the projector (and the vision
tower, where it learns) trained in full; on disk a folder that `PeftModel.from_pretrained` puts on the base model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lift.common.files import write_json
from lmm.settings import LoraSettings

LANGUAGE_MODEL = "model.language_model."
NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""Full names: bitsandbytes' integration silently ignores the last component alone."""
BASE = "base.json"
"""Record of the model an adapter folder belongs to: `model` (path) and `model_hash`."""


def quantisation(kind: str, compute: torch.dtype) -> BitsAndBytesConfig:
    """What holds the language model in 4 bits (NF4 with double quantisation, as QLoRA has it) or 8, and nothing else."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTISED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=list(NOT_QUANTISED),
    )


def add_adapters(model: LlavaForConditionalGeneration, base: Path, lora: LoraSettings, tower: bool, seed: int) -> Any:
    """A PeftModel around `model` whose new weights come from `seed`, alike on every process.

    Args:
        base: the folder of `model`, entered in the adapters' configuration.
        tower: the vision tower learns too, and is saved in full like the projector.
    Raises:
        UserError: lora.targets names no linear layer of the language model.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a factor; PEFT only divides it
        lora_dropout=lora.dropout,
        target_modules=_target_pattern(model, base, lora.targets),
        modules_to_save=["multi_modal_projector"] + (["vision_tower"] if tower else []),
        base_model_name_or_path=str(base),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # in the base's number format: ZeRO-3 gathers parameters of one format only, and its optimizer keeps float32 itself
        return get_peft_model(model, config, autocast_adapter_dtype=False)


def _target_pattern(model: nn.Module, base: Path, wanted: list[str] | None) -> str:
    """A regular expression for the adapted layers: names alone would also fit those of the vision tower."""
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE_MODEL) and isinstance(module, nn.Linear)
    }
    unknown = sorted(set(wanted or ()) - there)
    if unknown:
        raise UserError(
            f"lora.targets: {base} has no linear layer '{unknown[0]}' in its language model. It has {', '.join(sorted(there))}."
        )
    names = sorted(set(wanted) if wanted else there)
    return re.escape(LANGUAGE_MODEL) + r".*\.(?:" + "|".join(map(re.escape, names)) + ")"


def write_adapters(model: Any, state: dict[str, torch.Tensor], folder: Path, base: Path, base_hash: str) -> None:
    """Writes `adapter_model.safetensors`, `adapter_config.json` and `base.json`.

    Args:
        state: the trained weights, keyed as in `model`; those of ZeRO-3 gathered.
    Raises:
        RuntimeError: a trained weight is not among those written.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    written = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    if written.keys() != expected.keys() or len(written) < trained:
        raise RuntimeError(f"{folder}: {len(written)} weights written, expected {len(expected)} with {trained} trained ones")
    write_json(folder / BASE, {"model": str(base), "model_hash": base_hash})
