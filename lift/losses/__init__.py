"""Objectives over the batch of all processes: contrastive and sigmoid for fixed text, cosine, and CLIP with both sides trained.

Features and validity of this process's rows come in, a scalar goes out. Each process returns the loss of its own rows,
scaled so that the mean over processes (what DDP does to gradients) is the loss of the whole batch; so is every gradient.
Processes may hold different numbers of rows, none included. Rows whose validity is False are neither queries nor negatives,
whatever their features hold, NaN included. The features are assumed L2-normalised.

All functions work on detached leaf features too: a batch too large for the encoder's memory is encoded piece by piece without
gradients, the loss is taken of the concatenation, and the pieces are encoded again with their features' gradients
(GradCache, arXiv 2101.06983).

Shapes: B rows of this process, G rows of all processes (each padded to the longest), D the joint dimension,
K hard negatives of an image, M x N one tile of the B x G logits.
"""

from lift.losses.contrastive import clip_loss, contrastive_loss
from lift.losses.cosine import cosine_loss
from lift.losses.gather import GatheredText, TextGather, start_gather
from lift.losses.sigmoid import sigmoid_loss
from lift.losses.tiles import Negatives

__all__ = [
    "GatheredText",
    "Negatives",
    "TextGather",
    "clip_loss",
    "contrastive_loss",
    "cosine_loss",
    "sigmoid_loss",
    "start_gather",
]
