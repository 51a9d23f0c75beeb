"""Settings that cannot work together, or not on this machine, refused with the reason before anything is loaded."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import torch

from lift.common.errors import UserError
from lmm.settings import StageSettings


def check_combinations(settings: StageSettings, config: dict[str, Any]) -> None:
    """Raises UserError for the first combination that cannot work.

    Args:
        config: the DeepSpeed configuration of the stage; its ZeRO stage and offloading count, not the settings'.
    """
    for refused, reason in (*_of_settings(settings), *_with_deepspeed(settings, config), *_on_this_machine(settings)):
        if refused:
            raise UserError(reason)


def is_offloaded(config: dict[str, Any]) -> bool:
    zero = config.get("zero_optimization", {})
    return any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_param", "offload_optimizer"))


def _of_settings(settings: StageSettings) -> list[tuple[bool, str]]:
    return [
        (
            settings.lora is not None and settings.trainable == "projector",
            "lora: adapters train the language model, but trainable is 'projector'. "
            "Set trainable to projector_and_llm or all, or leave lora out.",
        ),
        (
            settings.quantise != "none" and settings.lora is None,
            f"quantise {settings.quantise}: weights of so few bits have no gradient, and cannot be written as a plain model. "
            "Set lora, so that adapters are trained and merged into the full-precision model.",
        ),
        (
            settings.tower_learning_rate is not None and settings.trainable != "all",
            f"tower_learning_rate: the vision tower is frozen, because trainable is '{settings.trainable}'. "
            "Set trainable to all, or leave tower_learning_rate out.",
        ),
        (
            settings.cache_features is not None and settings.trainable == "all",
            "cache_features: the vision tower learns (trainable 'all'), so that its features change. "
            "Leave cache_features out, or freeze the tower.",
        ),
        (
            settings.compile and settings.packing,
            "compile: packed rows have other lengths in each step and would be compiled anew each time. "
            "Leave compile or packing out.",
        ),
        (
            settings.compile and settings.use_liger_kernel,
            "compile: Liger's kernels are compiled already and break the graph. Choose compile or use_liger_kernel.",
        ),
        (
            settings.compile and settings.quantise != "none",
            "compile: bitsandbytes' layers run outside the compiled graph, which only costs time. "
            "Leave compile or quantise out.",
        ),
    ]


def _with_deepspeed(settings: StageSettings, config: dict[str, Any]) -> list[tuple[bool, str]]:
    stage, offloaded = config.get("zero_optimization", {}).get("stage"), is_offloaded(config)
    return [
        (
            settings.offload and settings.deepspeed is not None,
            f"offload: {settings.deepspeed} decides about offloading. Leave offload or deepspeed out.",
        ),
        (
            settings.quantise != "none" and offloaded,
            f"quantise {settings.quantise}: bitsandbytes keeps the scales of a weight outside the parameter, where offloading "
            "does not find them: weights would lie on the CPU and scales on the GPU. Leave offload or quantise out.",
        ),
        (
            settings.compile and stage == 3,
            "compile: ZeRO-3 gathers each layer's weights in hooks, at which the graph breaks. Set zero_stage to 2.",
        ),
    ]


def _on_this_machine(settings: StageSettings) -> list[tuple[bool, str]]:
    needs_bitsandbytes = settings.quantise != "none" or settings.optimizer == "adamw_8bit"
    liger = settings.use_liger_kernel
    return [
        (settings.lora is not None and not _installed("peft"), "lora: peft is not installed. Install it: pip install peft."),
        (
            needs_bitsandbytes and not _installed("bitsandbytes"),
            "quantise and adamw_8bit: bitsandbytes is not installed. Install it: pip install bitsandbytes.",
        ),
        (
            liger and not torch.cuda.is_available(),
            "use_liger_kernel: Liger's kernels are written in Triton and run on a GPU only; this machine shows none.",
        ),
        (
            liger and not _installed("liger_kernel"),
            "use_liger_kernel: liger-kernel is not installed. Install it: pip install liger-kernel.",
        ),
        (
            settings.compile and not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))),
            "compile: torch.compile needs a C++ compiler on a CPU, and finds none. Install g++, or leave compile out.",
        ),
    ]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
