"""`lmm merge`: adapters into their base, so that no reader of the result needs PEFT.

In: an adapter folder of `lmm train` and the LLaVA folder it was trained on, in full precision also where the training held it
in 4 or 8 bits. Out: a plain LLaVA folder with the same logits as base and adapters together.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor

from lift.common.errors import UserError, first_line
from lift.common.files import atomic_folder, read_json, require_folder, sha256_file, write_json
from lmm.adapters import BASE
from lmm.build import DTYPES
from lmm.folders import check_loads, content_hash
from lmm.settings import MergeSettings
from lmm.train import load_llava, write_model

RECORDS = ("metrics.jsonl", "config.yaml", "dropped.jsonl")


def merge(settings: MergeSettings) -> Path:
    """Writes the merged folder and returns it.

    Merging into the quantised weights instead would add an error as large as the update itself.

    Raises:
        UserError: a whole model or no adapter folder, a base other than the one trained on, or `out` exists.
    """
    adapter = require_folder(settings.adapter, "an adapter folder of `lmm train`")
    if not (adapter / BASE).is_file() and (adapter / "config.json").is_file():
        raise UserError(
            f"{adapter}: holds a whole model, not adapters: there is nothing to merge. "
            "Use the folder as it is, or give that of a training with lora."
        )
    out = settings.out or adapter.with_name(adapter.name + "-merged")
    if out.exists():
        raise UserError(f"{out}: exists already. Remove it or choose another --out.")
    record = read_json(adapter / BASE, "the record of the base model, as `lmm train` writes it with lora")
    base = require_folder(settings.base or Path(record["model"]), "the model the adapters were trained on (--base)")
    if content_hash(base) != record["model_hash"]:
        raise UserError(
            f"{base}: is not the model that {adapter} was trained on, or has changed since. Give that model as --base."
        )
    trained = read_json(adapter / "train.json", "the record of the training")
    precision = settings.precision or trained["settings"]["precision"]
    merged = merged_model(base, adapter).to(dtype=DTYPES[precision])
    with atomic_folder(out) as folder:
        write_model(merged, merged.state_dict(), folder)
        AutoProcessor.from_pretrained(adapter, backend="pil", trust_remote_code=False).save_pretrained(folder)
        check_loads(folder)
        for name in RECORDS:
            if (adapter / name).is_file():
                shutil.copy(adapter / name, folder)
        origin = {
            "adapter": str(adapter),
            "adapter_sha256": sha256_file(adapter / "adapter_model.safetensors"),
            "base": str(base),
        }
        write_json(folder / "train.json", {**trained, "merged": origin})
    print(f"wrote {out}")
    return out


def merged_model(base: Path, adapter: Path) -> torch.nn.Module:
    """The sum in float32, as a plain LlavaForConditionalGeneration on the CPU. Raises UserError for unfit adapters."""
    from peft import PeftModel, get_peft_model_state_dict

    llava = load_llava(base, "fp32")
    expected = read_json(adapter / "adapter_config.json", "the adapters' configuration")
    try:
        model = PeftModel.from_pretrained(llava, str(adapter), torch_device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{adapter}: expected adapters of rank {expected.get('r')} for {base}: {first_line(error)}") from error
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        differing = set(file.keys()) ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if differing:  # PEFT only warns, and leaves what it does not find at random
        raise UserError(f"{adapter}: expected a weight for every adapter; missing or unknown is {min(differing)}. Train again.")
    return model.merge_and_unload()  # type: ignore[operator,no-any-return]
