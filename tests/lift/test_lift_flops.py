"""FLOPs by formula against what the official models were counted at (fixtures note `official_lift_tiny`)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lift.flops import matrix_peak, training_flops
from lift.model import LiftModel, vision_config
from lift.settings import ClipTextSettings, VisionSettings
from lift.transforms import TextTransform


def test_official_models() -> None:
    assert training_flops(VisionSettings(), 4096, None) / 1e9 == pytest.approx(105.27, abs=0.01)
    for tokens, expected in ((77, 123.03), (128, 135.35), (323, 186.00)):
        assert training_flops(VisionSettings(), 512, ClipTextSettings(), tokens) / 1e9 == pytest.approx(expected, abs=0.01)


def test_formula_counts_what_pytorch_counts() -> None:
    vision = VisionSettings(image_size=32, patch_size=8, width=48, layers=2, heads=3)
    model = LiftModel(vision_config(vision), TextTransform("none", 24), 0.0)
    # the counter sees attention only where it is computed as matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 32, 32)).image_BD.sum().backward()
    assert training_flops(vision, 24, None) * 2 == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_peak_is_positive() -> None:
    assert matrix_peak(torch.device("cpu"), torch.float32) > 0
