"""Block-scaled int8: bounded error, outlier dimensions, any dimension and any range."""

from __future__ import annotations

import numpy as np
import pytest

from lift.quantise import BLOCK, blocks, dequantise, quantise

DIMENSION = 4096


def outliers(kind: str, seed: int = 0) -> np.ndarray:
    """200 rows of LLM-like embeddings; a few dimensions are larger, the same in all rows or others in each."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(200, DIMENSION)).astype(np.float32)
    count, factor = {"none": (0, 1), "1 %": (DIMENSION // 100, 6), "4": (4, 50)}[kind.removesuffix(" random")]
    places = rng.permuted(np.tile(np.arange(DIMENSION), (len(values), 1)), axis=1)[:, :count]
    places = places if kind.endswith("random") else np.broadcast_to(places[:1], places.shape)
    values[np.arange(len(values))[:, None], places] *= factor
    return values


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first.astype(np.float64), second.astype(np.float64)
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.mark.parametrize("kind", ["none", "1 %", "1 % random", "4", "4 random"])
def test_cosine_stays_with_outlier_dimensions(kind: str) -> None:
    values = outliers(kind)
    assert cosine(values, dequantise(quantise(values))).mean() > 0.9999
    # what a scale per row would have cost
    scale = np.abs(values).max(1, keepdims=True) / 127
    per_row = 1 - cosine(values, np.rint(values / scale) * scale).mean()
    assert 1 - cosine(values, dequantise(quantise(values))).mean() < per_row / 1.5


@pytest.mark.parametrize("dimension", [1, 31, 32, 33, 100, 384])
def test_every_value_is_within_half_a_step_of_its_block(dimension: int) -> None:
    values = np.random.default_rng(dimension).standard_t(2, size=(300, dimension)).astype(np.float32)
    quantised = quantise(values)
    assert quantised.codes_ND.shape == values.shape and quantised.block_scale_NK.shape == (300, blocks(dimension))
    back = dequantise(quantised)
    for start in range(0, dimension, BLOCK):
        block = values[:, start : start + BLOCK]
        step = np.abs(block).max(1, keepdims=True) / 127 * 2 ** (1 / 8)
        assert (np.abs(back[:, start : start + BLOCK] - block) <= step / 2 * (1 + 1e-4)).all()


def test_codes_use_their_range_and_are_stable() -> None:
    values = outliers("1 %")
    quantised = quantise(values)
    largest = np.maximum.reduceat(np.abs(quantised.codes_ND.astype(int)), np.arange(0, DIMENSION, BLOCK), axis=1)
    assert largest.max() == 127 and largest.min() >= 116  # 127 / 2^(1/8), rounded
    again = quantise(values[3:5])
    for part, whole in zip(again, quantised, strict=True):
        assert np.array_equal(part, whole[3:5])


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_range_does_not_matter(factor: float) -> None:
    values = outliers("none")[:20] * np.float32(factor)
    assert cosine(values, dequantise(quantise(values))).min() > 0.9999


def test_zero_rows_and_blocks_stay_zero() -> None:
    values = np.zeros((2, 3 * BLOCK), np.float32)
    values[1, 40] = -3
    back = dequantise(quantise(values))
    assert np.array_equal(back == 0, values == 0) and back[1, 40] == pytest.approx(-3)


def test_float16_is_the_rounded_float32() -> None:
    for dimension in (DIMENSION, 100):
        quantised = quantise(outliers("none")[:5, :dimension])
        assert np.array_equal(dequantise(quantised, np.float16), dequantise(quantised).astype(np.float16))
