"""Peak memory of a training step, measured on a CUDA device: a recipe comes in, bytes go out. Nothing is estimated."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.cost.count import ClipRecipe, LiftRecipe
from lift.common.errors import UserError
from lift.losses import clip_loss, contrastive_loss, start_gather
from lift.model import ClipModel, LiftModel, parameter_groups

DEFINITION = (
    "Peak memory that PyTorch's allocator hands out in the second training step (optimiser states are there): weights, "
    "gradients and AdamW states in float32, activations, the contrastive loss over the batch; precision and gradient "
    "checkpointing as in the recipe; one process."
)
STEPS = 2
"""The first makes the optimiser's states, the second is measured."""


def peak_memory(recipe: LiftRecipe | ClipRecipe, tokens: int, batch_size: int) -> int:
    """Bytes at the peak of a training step on the current CUDA device.

    Raises:
        UserError: the step does not fit.
    """
    device = torch.device("cuda")
    try:
        model = recipe.build(tokens).to(device)
        if recipe.checkpointing:
            for tower in (module for module in model.children() if isinstance(module, PreTrainedModel)):
                tower.gradient_checkpointing_enable({"use_reentrant": False})
        optimiser = torch.optim.AdamW(parameter_groups(model, 0.2), lr=1e-3)
        for _ in range(STEPS):
            torch.cuda.reset_peak_memory_stats(device)
            training_step(model, optimiser, *random_batch(model, recipe, tokens, batch_size, device), recipe.precision)
        return torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--memory_batch_size {batch_size}: a training step with captions of {tokens} tokens does not fit on "
            f"{torch.cuda.get_device_name(device)}. Give a smaller one."
        ) from error
    finally:
        model = optimiser = None  # type: ignore[assignment]
        torch.cuda.empty_cache()


def random_batch(
    model: LiftModel | ClipModel, recipe: LiftRecipe | ClipRecipe, tokens: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pixels, float32 [B, 3, H, W], and the text side: float16 embeddings [B, D] for LIFT, token ids [B, L] for CLIP."""
    size = recipe.vision.image_size
    pixels_B3HW = torch.randn(batch_size, 3, size, size, device=device)
    if isinstance(model, LiftModel):
        dimension = model.text_transform.dimension
        return pixels_B3HW, torch.randn(batch_size, dimension, device=device, dtype=torch.float16)
    vocabulary = model.text_tower.config.vocab_size
    ids_BL = torch.randint(0, vocabulary - 2, (batch_size, tokens), device=device)
    ids_BL[:, -1] = vocabulary - 1  # the end token, where the feature is taken
    return pixels_B3HW, ids_BL


def training_step(
    model: LiftModel | ClipModel, optimiser: torch.optim.Optimizer, pixels_B3HW: Tensor, text: Tensor, precision: str
) -> float:
    """One optimiser step with the contrastive loss over the batch, as `lift pretrain` does it. Returns the loss."""
    device = pixels_B3HW.device
    valid_B = torch.ones(len(pixels_B3HW), dtype=torch.bool, device=device)
    model.train()
    optimiser.zero_grad(set_to_none=True)
    tokens = None if isinstance(model, LiftModel) else {"input_ids": text, "attention_mask": torch.ones_like(text)}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features = model(pixels_B3HW, tokens)
    if isinstance(model, LiftModel):
        gathered = start_gather(model.text_features(text), valid_B, rows=len(valid_B)).wait()
        loss = contrastive_loss(features.image_BD, gathered, features.log_scale_1)
    else:
        loss = clip_loss(features.image_BD, features.text_BD, features.log_scale_1, valid_B, rows=len(valid_B))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())
