"""Block-scaled int8 for embeddings: one byte per value, one byte per 32 values for their scale, one float32 per row.

Float rows come in, codes come out and back. A scale per block keeps a few large dimensions, as LLM embeddings have them,
from costing the others their precision; scales are logarithmic and relative to the row's own, so no range is too wide.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 32
"""Dimensions that share a scale; the last block of a row may be shorter."""
STEPS_PER_OCTAVE = 8
"""Resolution of a block's scale: it is at most 2^(1/8), 9 %, above the smallest that holds the block."""
LARGEST = 127
CHUNK = 256
"""Rows at a time, so that the temporaries stay in the cache."""

_RELATIVE_SCALE = np.exp2(-np.arange(256) / STEPS_PER_OCTAVE).astype(np.float32)


class QuantisedRows(NamedTuple):
    """value = code * row_scale * 2^(-block_scale / 8)."""

    codes_ND: np.ndarray
    """int8."""
    row_scale_N: np.ndarray
    """float32; the row's largest magnitude / 127."""
    block_scale_NK: np.ndarray
    """uint8 [N, ceil(D / 32)]: eighths of an octave below the row's scale."""


def blocks(dimension: int) -> int:
    return -(-dimension // BLOCK)


def quantise(values_ND: np.ndarray) -> QuantisedRows:
    """`values_ND`: finite, any float type. A block more than 31.9 octaves below its row's largest value becomes zero."""
    rows, dimension = values_ND.shape
    quantised = QuantisedRows(
        np.empty((rows, dimension), np.int8), np.empty(rows, np.float32), np.empty((rows, blocks(dimension)), np.uint8)
    )
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        x_ND = values_ND[part].astype(np.float32)
        largest_NK = np.maximum.reduceat(np.abs(x_ND), np.arange(0, dimension, BLOCK), axis=1)
        row_scale_N = largest_NK.max(axis=1) / np.float32(LARGEST)
        with np.errstate(divide="ignore", invalid="ignore"):  # the logarithm of zero blocks, whose scale does not matter
            octaves_NK = np.log2(largest_NK.max(axis=1, keepdims=True)) - np.log2(largest_NK)
        steps_NK = np.nan_to_num(np.floor(octaves_NK * STEPS_PER_OCTAVE), nan=255, posinf=255)
        quantised.block_scale_NK[part] = np.clip(steps_NK, 0, 255)
        quantised.row_scale_N[part] = row_scale_N
        scale_ND = _scale(row_scale_N, quantised.block_scale_NK[part], dimension)
        x_ND = np.divide(x_ND, scale_ND, out=np.zeros_like(x_ND), where=scale_ND > 0)
        quantised.codes_ND[part] = np.clip(np.rint(x_ND), -LARGEST, LARGEST)
    return quantised


def dequantise(quantised: QuantisedRows, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """[N, D] of `dtype`. Rows with values beyond 65504 do not fit into float16; the caller looks at `row_scale_N`."""
    rows, dimension = quantised.codes_ND.shape
    values_ND = np.empty((rows, dimension), dtype)
    for start in range(0, rows, CHUNK):
        part = slice(start, start + CHUNK)
        codes_ND = quantised.codes_ND[part]
        scale_NK = quantised.row_scale_N[part, None] * _RELATIVE_SCALE[quantised.block_scale_NK[part]]
        if dimension % BLOCK == 0:
            codes_NKB = codes_ND.reshape(len(codes_ND), -1, BLOCK)
            out_NKB = values_ND[part].reshape(codes_NKB.shape)
            np.multiply(codes_NKB, scale_NK[..., None], out=out_NKB, casting="same_kind")
        else:
            scale_ND = np.repeat(scale_NK, BLOCK, axis=1)[:, :dimension]
            np.multiply(codes_ND, scale_ND, out=values_ND[part], casting="same_kind")
    return values_ND


def _scale(row_scale_N: np.ndarray, block_scale_NK: np.ndarray, dimension: int) -> np.ndarray:
    return np.repeat(row_scale_N[:, None] * _RELATIVE_SCALE[block_scale_NK], BLOCK, axis=1)[:, :dimension]
