"""Measures from records: hand-worked values, intervals that cover, medians under weights."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from eval.measures import Measure, Record, mean_interval, measured, median_interval, outcomes, records_table


def _record(subtask: str, name: str, correct: float, cluster: str = "", rank: int | None = None) -> Record:
    return Record(subtask, name, [0.5, 0.25], correct, cluster, rank, tie=correct == 0.5)


def test_mean_over_items_and_over_subtasks_by_hand() -> None:
    records = [_record("a", str(i), correct) for i, correct in enumerate((1, 1, 0.5, 0))]
    records += [_record("b", "0", 0.0), _record("c", "0", 1.0)]
    table = records_table("t", records)
    assert table["scores"].to_pylist()[0] == [0.5, 0.25]
    assert measured(table, Measure("a", ("a",)))["value"] == 2.5 / 4
    items, subtasks = measured(table, Measure("all")), measured(table, Measure("mean", ("a", "b"), macro=True))
    assert (items["value"], items["n"], items["ties"]) == (pytest.approx(3.5 / 6), 6, 1)
    assert (subtasks["value"], subtasks["n"]) == (pytest.approx((2.5 / 4 + 0) / 2), 5)
    with pytest.raises(ValueError, match="no records of"):
        measured(table, Measure("d", ("d",)))


def test_recall_and_median_rank_by_hand() -> None:
    records = [_record("q", str(i), float(rank == 0), rank=rank) for i, rank in enumerate((0, 4, 0, 9, 30, 5))]
    table = records_table("t", records)
    values = [measured(table, Measure("r", ("q",), "recall", k))["value"] for k in (1, 5, 10)]
    assert values == pytest.approx([2 / 6, 3 / 6, 5 / 6])
    assert measured(table, Measure("m", ("q",), "median_rank"))["value"] == 5.5  # ranks 1, 1, 5, 6, 10, 31
    with pytest.raises(ValueError, match="without a rank"):
        measured(records_table("t", [_record("q", "0", 1.0)]), Measure("r", (), "recall", 1))


def test_interval_of_independent_items_is_wilsons() -> None:
    table = records_table("t", [_record("a", str(i), float(i < 7)) for i in range(10)])
    assert measured(table, Measure("a"))["interval"] == pytest.approx(proportion_confint(7, 10, method="wilson"))
    certain = measured(records_table("t", [_record("a", str(i), 1.0) for i in range(10)]), Measure("a"))
    assert certain["interval"] == pytest.approx(proportion_confint(10, 10, method="wilson"))


def test_items_that_are_right_together_widen_the_interval() -> None:
    """Five items an image, all right or all wrong: as much evidence as one item an image."""
    together = [_record("a", f"{image}#{i}", float(image < 14), str(image)) for image in range(20) for i in range(5)]
    interval = measured(records_table("t", together), Measure("a"))["interval"]
    assert interval == pytest.approx(proportion_confint(14, 20, method="wilson"))


def test_interval_of_few_clusters_is_wide() -> None:
    """Ten items of one image are one item, a thousand of two images two; subtasks of one item count in a macro mean."""
    one = [_record("a", str(i), float(i < 5), "same") for i in range(10)]
    assert measured(records_table("t", one), Measure("a"))["interval"] == pytest.approx(
        proportion_confint(0.5, 1, method="wilson")
    )
    two = [_record("a", str(i), 0.0, str(i % 2)) for i in range(1000)]
    assert measured(records_table("t", two), Measure("a"))["interval"] == pytest.approx(
        proportion_confint(0, 2, method="wilson")
    )
    mixed = [_record("large", str(i), float(i % 2)) for i in range(1000)]
    mixed += [_record(f"small {i}", "0", float(i < 4)) for i in range(9)]
    result = measured(records_table("t", mixed), Measure("m", macro=True))
    expected = proportion_confint(0.45 / 0.0901, 1 / 0.0901, method="wilson")
    assert result["value"] == pytest.approx(0.45) and result["interval"] == pytest.approx(expected, abs=0.005)


def test_small_subtasks_without_a_miss_do_not_make_a_macro_mean_sure() -> None:
    """Fourteen items half right, three subtasks of two that are all right or wrong: no more than 1 / sum of w^2 items."""
    rows = [_record("large", str(i), float(i % 2)) for i in range(14)]
    rows += [_record(f"small {k}", str(i), float(k < 1)) for k in range(3) for i in range(2)]
    result = measured(records_table("t", rows), Measure("m", macro=True))
    effective = 16 / (1 / 14 + 3 / 2)
    assert result["value"] == pytest.approx(1.5 / 4)
    assert result["interval"] == pytest.approx(proportion_confint(0.375 * effective, effective, method="wilson"))


@pytest.mark.parametrize("macro", [False, True])
def test_interval_covers(macro: bool) -> None:
    """Images of three items each with a difficulty of their own, and two subtasks of unequal size and accuracy."""
    rng, inside = np.random.default_rng(0), 0
    truth = (0.6 + 0.8) / 2 if macro else 0.6 * 2 / 3 + 0.8 / 3
    for _ in range(300):
        shift = rng.choice([-0.15, 0.15], 60)
        rows = [
            _record(
                "b" if i == 2 else "a",
                f"{image}#{i}",
                float(rng.random() < (0.8 if i == 2 else 0.6) + shift[image]),
                str(image),
            )
            for image in range(60)
            for i in range(3)
        ]
        low, high = mean_interval(outcomes(records_table("t", rows), Measure("m", ("a", "b"), macro=macro)))
        inside += low <= truth <= high
    assert 0.91 <= inside / 300 <= 0.985


def test_median_interval_brackets_the_median_and_is_numpys_for_one_draw() -> None:
    values = np.random.default_rng(1).geometric(0.05, 501).astype(float)
    low, high = median_interval(values, np.arange(501))
    assert low <= np.median(values) <= high and high - low < 10
    assert median_interval(np.full(9, 3.0), np.arange(9)) == (3.0, 3.0)
