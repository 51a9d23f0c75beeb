"""Ranks with ties against brute force, and recall against open_clip's and an independent NumPy implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.tasks.ranking import ranks
from eval.tasks.retrieval import official_top1


def _brute_force(query_ND: np.ndarray, gallery_MD: np.ndarray, right: list[np.ndarray]) -> tuple[list[int], list[bool]]:
    found, ties = [], []
    for query_D, numbers in zip(query_ND, right, strict=True):
        scores = [float(query_D @ item_D) for item_D in gallery_MD]
        best = max(scores[number] for number in numbers)
        wrong = [score for number, score in enumerate(scores) if number not in numbers]
        found.append(sum(score >= best for score in wrong))
        ties.append(best in wrong)
    return found, ties


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_ranks_with_ties_equal_brute_force(chunk: int) -> None:
    """Small integers make exact ties, and the inner products exact in every order of summation."""
    rng = np.random.default_rng(0)
    query_ND, gallery_MD = (rng.integers(-2, 3, (count, 4)).astype(np.float32) for count in (40, 30))
    right = [np.sort(rng.choice(30, rng.integers(1, 6), replace=False)) for _ in range(40)]
    found = ranks(query_ND, gallery_MD, right, chunk_elements=chunk)
    expected, ties = _brute_force(query_ND, gallery_MD, right)
    assert found.rank_N.tolist() == expected and found.tie_N.tolist() == ties
    assert any(ties) and not all(ties)


def test_collapsed_encoder_scores_nothing() -> None:
    same = np.ones((5, 3), np.float32)
    found = ranks(same, same, [np.array([number]) for number in range(5)])
    assert found.rank_N.tolist() == [4] * 5 and found.tie_N.all()


def test_all_right_has_no_wrong_item() -> None:
    found = ranks(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), [np.arange(3)])
    assert found.rank_N.tolist() == [0] and found.wrong_N.tolist() == [-np.inf] and not found.tie_N.any()


def test_bad_input_is_refused() -> None:
    one = np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="finite"):
        ranks(one * np.nan, one, [np.array([0])])
    with pytest.raises(ValueError, match="for every query"):
        ranks(one, one, [np.array([], np.int64)])


def test_recall_equals_open_clips_and_numpys() -> None:
    """open_clip's own validation metric (one caption an image), and R@k with five captions by sorting."""
    open_clip_train = pytest.importorskip("open_clip_train.train", reason="open_clip_torch is not installed")
    rng = np.random.default_rng(2)
    image_ND = rng.standard_normal((60, 8)).astype(np.float32)
    text_ND = (image_ND + 1.5 * rng.standard_normal((60, 8))).astype(np.float32)
    image_ND, text_ND = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image_ND, text_ND))
    theirs = open_clip_train.get_clip_metrics(torch.from_numpy(image_ND), torch.from_numpy(text_ND), torch.tensor(100.0))
    own = [np.array([number]) for number in range(60)]
    for direction, query, gallery in (("image_to_text", image_ND, text_ND), ("text_to_image", text_ND, image_ND)):
        found = ranks(query, gallery, own).rank_N
        for k in (1, 5, 10):
            assert np.mean(found < k) == pytest.approx(theirs[f"{direction}_R@{k}"])
        assert np.floor(np.median(found)) + 1 == theirs[f"{direction}_median_rank"]


def test_recall_with_five_captions_equals_sorting() -> None:
    rng = np.random.default_rng(3)
    image_ND, text_MD = rng.standard_normal((20, 6)).astype(np.float32), rng.standard_normal((100, 6)).astype(np.float32)
    right = [np.arange(5 * number, 5 * number + 5) for number in range(20)]
    order_NM = np.argsort(-(image_ND @ text_MD.T), axis=1)
    right_NM = np.stack([np.isin(order_M, numbers) for order_M, numbers in zip(order_NM, right, strict=True)])
    # before the first right item only wrong ones come
    assert ranks(image_ND, text_MD, right).rank_N.tolist() == right_NM.argmax(axis=1).tolist()


def test_official_top1_is_the_scripts_arithmetic() -> None:
    """Float32: the plain argmax. Float16: nearly equal similarities tie, and the first position wins."""
    rng = np.random.default_rng(4)
    query, key = (torch.from_numpy(rng.standard_normal((1500, 8)).astype(np.float32)) for _ in range(2))
    unit_query, unit_key = (rows / rows.norm(dim=-1, keepdim=True) for rows in (query, key))
    expected = (unit_query @ unit_key.T).argmax(dim=1).numpy() == np.arange(1500)
    assert np.array_equal(official_top1(query, key), expected) and 0 < expected.sum() < 1500
    key = torch.tensor([[1.0, 0.0], [1.0, 1e-4]])
    query = torch.tensor([[1.0, 0.0], [1.0, 1e-4]])
    assert official_top1(query, key.half()).tolist() == [True, False]
