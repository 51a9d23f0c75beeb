"""Linear layers of a frozen model on a CPU by oneDNN, with weights in its blocked layout: in float32 10 to 40 % faster than
PyTorch's own path through MKL (`benchmarks/embedding.py`, `sugarcrepe.py`), the same to rounding. Not to be saved."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """`nn.Linear` whose weight is blocked. Without gradients."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> None:
    """Changes the float32 linear layers of `model` in place, where it is on a CPU and this PyTorch has the operations."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            blocked = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach())
            module.weight = nn.Parameter(blocked, requires_grad=False)
            module.__class__ = OneDnnLinear
