"""Paired statistics and comparisons on cases worked by hand, by their coverage, and on what they must refuse."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from eval.__main__ import main
from eval.comparison.flips import find_flips
from eval.comparison.lmms import compare_records, compare_runs
from eval.comparison.seeds import hierarchical_result
from eval.comparison.statistics import (
    Terms,
    adjusted,
    detectable_difference,
    exact_power,
    paired_result,
    sign_flip_p_value,
)
from eval.records import Likelihood, Record, read_records, write_records
from lift.common.files import read_json, read_jsonl, write_json

OPTIONS = {"A": "red", "B": "blue"}


def terms(values: Sequence[float]) -> Terms:
    top = np.array(values, dtype=float)[:, None]
    return Terms(top, np.ones_like(top))


def mmbench(group: int, rotation: int, right: bool, l2: str = "attribute_reasoning", **changes: object) -> Record:
    answer = "AB"[rotation]
    said = answer if right else "BA"[rotation]
    categories = {"l1": "reasoning", "l2": l2, "l3": f"{l2}/{group % 2}"}
    key = str(group + rotation * 1_000_000)
    record = Record(
        "mmbench",
        key,
        str(group),
        rotation,
        categories,
        f"q{group}",
        OPTIONS,
        [answer],
        said,
        said,
        float(right),
        [f"i{group}"],
    )
    return replace(record, **changes)


def groups(right: Sequence[tuple[bool, bool]], **changes: object) -> list[Record]:
    return [mmbench(group, rotation, hit, **changes) for group, hits in enumerate(right) for rotation, hit in enumerate(hits)]


def by_place(comparison: dict, measure: str = "circular") -> dict[tuple[str, str], dict]:
    return {(row["level"], row["name"]): row for row in comparison["rows"] if row["measure"] == measure}


def test_paired_result_by_hand() -> None:
    a, b = [1.0] * 6 + [0.0] + [1.0] * 3, [0.0] * 6 + [1.0] + [1.0] * 3
    result = paired_result([terms(a)], [terms(b)], np.arange(10), 2000, 0)
    assert result.difference == pytest.approx(0.5)
    assert result.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # binomial(7, 1/2): two-sided P(X <= 1)
    assert result.interval is not None and result.interval[0] < 0.5 < result.interval[1]
    assert result == paired_result([terms(a)], [terms(b)], np.arange(10), 2000, 0)


def test_bootstrap_of_patterns_has_the_variance_of_the_bootstrap() -> None:
    """Difference 1, 0, -1 in 30, 50, 20 of 100 units: mean 0.1, standard error sqrt((0.5 - 0.01) / 100) = 0.07."""
    a = terms([1.0] * 30 + [0.0] * 70)
    b = terms([0.0] * 80 + [1.0] * 20)
    low, high = paired_result([a], [b], np.arange(100), 20_000, 0).interval or (0, 0)
    assert (low, high) == pytest.approx((0.1 - 1.994 * 0.07, 0.1 + 1.994 * 0.07), abs=0.006)


def test_units_without_spread_have_no_interval() -> None:
    assert paired_result([terms([1])], [terms([0])], np.zeros(1, int), 100, 0).p_value is None
    same = paired_result([terms([1, 0])], [terms([1, 0])], np.arange(2), 100, 0)
    assert (same.difference, same.p_value, same.interval) == (0.0, 1.0, None)
    with pytest.raises(ValueError, match="equally long"):
        paired_result([terms([1])], [terms([1, 0])], np.zeros(1, int), 100, 0)


def test_sign_flip_by_hand() -> None:
    assert sign_flip_p_value(np.array([1.0, 1, 1, -1, 0])) == pytest.approx(float(binomtest(1, 4).pvalue))
    # sums of +-3 and +-1: 4, 2, -2, -4; of the four, two are as far out as 4 and all as far as 2
    assert [sign_flip_p_value(np.array(each)) for each in ([3.0, 1.0], [3.0, -1.0])] == pytest.approx([0.5, 1.0])
    assert sign_flip_p_value(np.array([0.3, 0.1])) == pytest.approx(0.5)  # annotators' scores come in tenths
    assert sign_flip_p_value(np.zeros(3)) == 1.0
    drawn = sign_flip_p_value(np.array([0.37, 0.113, 0.0719]), resamples=20_000)  # 2 of 8 signs
    assert drawn == pytest.approx(0.25, abs=0.02)


def test_adjustments_by_hand() -> None:
    assert adjusted([0.04, 0.01, 0.03], "holm") == pytest.approx([0.06, 0.03, 0.06])
    assert adjusted([0.04, None, 0.01, 0.03], "bh") == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    assert adjusted([None], "holm") == [None]
    drawn = np.random.default_rng(0).random(50) ** 3
    for method, theirs in (("holm", "holm"), ("bh", "fdr_bh")):
        assert adjusted(list(drawn), method) == pytest.approx(list(multipletests(drawn, method=theirs)[1]))


def test_power_by_hand_and_by_drawing() -> None:
    # all of n = 6 discordant for one side is the first that McNemar's test finds
    assert exact_power(6, 1.0, 1.0) == pytest.approx(1.0) and exact_power(5, 1.0, 1.0) == 0.0
    assert exact_power(6, 0.5, 0.5) == pytest.approx(0.5**6)
    assert detectable_difference(np.zeros(5), 5) is None
    rng = np.random.default_rng(0)
    difference = np.repeat([1.0, -1.0, 0.0], [40, 30, 230])
    found = detectable_difference(difference, 300)
    assert found is not None
    share, hits = 70 / 300, 0
    for _ in range(1000):
        drawn = rng.choice([1.0, -1.0, 0.0], 300, p=[(share + found) / 2, (share - found) / 2, 1 - share])
        hits += sign_flip_p_value(drawn) <= 0.05
    assert 0.76 <= hits / 1000 <= 0.84


def test_clusters_widen_the_interval_and_the_p_value() -> None:
    """Each image six times the same outcome: the evidence of one question an image."""
    a, b = np.repeat([1.0] * 9 + [0.0] * 11, 6), np.repeat([0.0] * 9 + [1.0] * 2 + [0.0] * 9, 6)
    clusters = np.repeat(np.arange(20), 6)
    clustered = paired_result([terms(a)], [terms(b)], clusters, 2000, 0)
    alone = paired_result([terms(a[::6])], [terms(b[::6])], np.arange(20), 2000, 0)
    assert clustered.p_value == pytest.approx(alone.p_value) == pytest.approx(float(binomtest(2, 11).pvalue))
    assert clustered.interval == pytest.approx(alone.interval, abs=1e-9)


def test_circular_and_vanilla_by_hand() -> None:
    a = groups([(True, True), (True, False), (True, True), (False, True)])
    b = groups([(True, False), (True, True), (False, True), (False, False)])
    comparison = compare_records(a, b, resamples=500)
    circular, vanilla = by_place(comparison), by_place(comparison, "vanilla")
    row = circular["overall", "overall"]
    assert (row["n"], row["clusters"], row["value_a"], row["value_b"], row["difference"]) == (4, 4, 0.5, 0.25, 0.25)
    assert (row["only_a"], row["only_b"], row["p_value"], row["p_adjusted"]) == (2, 1, 1.0, None)
    row = vanilla["overall", "overall"]
    assert (row["value_a"], row["value_b"], row["only_a"], row["only_b"], row["primary"]) == (0.75, 0.5, 1, 0, False)
    even = circular["l3", "attribute_reasoning/0"]
    assert (even["n"], even["difference"], even["p_adjusted"]) == (2, 1.0, 1.0)
    flips = find_flips(a, b)
    assert [(flip["group"], flip["right"], len(flip["passes"])) for flip in flips] == [
        ("0", "a", 2),
        ("1", "b", 2),
        ("2", "a", 2),
    ]
    assert [each["correct_b"] for each in flips[0]["passes"]] == [True, False]
    backward = by_place(compare_records(b, a, resamples=500))
    assert {place: -row["difference"] for place, row in circular.items()} == {p: r["difference"] for p, r in backward.items()}
    assert [row["p_value"] for row in circular.values()] == [row["p_value"] for row in backward.values()]


def test_unparsed_and_likelihood_have_their_columns() -> None:
    a = groups([(True, False), (False, False)])
    a[1] = replace(a[1], prediction=None)
    likely = [replace(record, likelihood=Likelihood("A", 1.0, {"A": -0.1, "B": -2.0})) for record in a]
    comparison = compare_records(a, groups([(True, True), (True, True)]), resamples=100)
    assert by_place(comparison)["overall", "overall"]["unparsed_a"] == 0.25
    assert {row["measure"] for row in comparison["rows"]} == {"circular", "vanilla"}
    assert by_place(compare_records(likely, likely, resamples=100), "likelihood")["overall", "overall"]["value_a"] == 1.0
    likely[0] = replace(likely[0], likelihood=Likelihood("B", 0.0, {"A": -2.0, "B": -0.1}))
    row = by_place(compare_records(likely, likely, resamples=100), "likelihood")["overall", "overall"]
    assert (row["value_a"], row["n"]) == (0.5, 2), "a question is right by likelihood when all its passes are"


def _yes_no(task: str, number: int, answer: str, said: str | None, image: str, category: str) -> Record:
    levels = {"type": "perception", "subtask": category} if task == "mme" else {"split": category}
    key, score = f"{category}/{number}", float(said == answer)
    return Record(task, key, image, 0, levels, f"q{number}", {}, [answer], said or "", said, score, [image])


def test_pope_measures_by_hand() -> None:
    truth = ["yes", "yes", "yes", "no", "no", "no"]
    said_a = ["yes", "yes", "no", "yes", "no", None]
    a, b = (
        [
            _yes_no("pope", i, answer, word, str(i // 2), "random")
            for i, (answer, word) in enumerate(zip(truth, said, strict=True))
        ]
        for said in (said_a, ["no"] * 6)
    )
    rows = {row["measure"]: row for row in compare_records(a, b, resamples=500)["rows"] if row["level"] == "overall"}
    values = {name: row["value_a"] for name, row in rows.items()}
    assert values == pytest.approx({"accuracy": 3 / 6, "f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "yes_ratio": 0.5})
    assert (rows["accuracy"]["value_b"], rows["f1"]["value_b"], rows["recall"]["n"]) == (0.5, 0.0, 3)
    assert rows["precision"]["value_b"] is None and rows["precision"]["interval"] is None, "B never says yes"
    assert rows["accuracy"]["clusters"] == 3 and rows["f1"]["only_a"] is None


def test_mme_score_by_hand() -> None:
    """Two images of a subtask, one with both right: accuracy 75 %, accuracy plus 50 %, score 125; and one of another."""
    places = [
        ("ocr/1", "ocr"),
        ("ocr/1", "ocr"),
        ("ocr/2", "ocr"),
        ("ocr/2", "ocr"),
        ("scene/1", "scene"),
        ("scene/1", "scene"),
    ]
    words = ["yes", "no", "yes", "yes", "yes", "no"]
    a = [
        _yes_no("mme", i, ("yes", "no")[i % 2], word, image, name)
        for i, ((image, name), word) in enumerate(zip(places, words, strict=True))
    ]
    rows = {(row["measure"], row["name"]): row for row in compare_records(a, a, resamples=100)["rows"]}
    assert rows["score", "ocr"]["value_a"] == pytest.approx(125) and rows["score", "scene"]["value_a"] == pytest.approx(200)
    assert rows["score", "overall"]["value_a"] == rows["score", "perception"]["value_a"] == pytest.approx(325)
    assert rows["accuracy_plus", "overall"]["value_a"] == pytest.approx(2 / 3) and rows["accuracy_plus", "overall"]["n"] == 3
    assert {row["measure"] for row in compare_records(a[:5], a[:5], resamples=100)["rows"]} == {"accuracy"}


def test_few_clusters_have_a_test_but_no_interval() -> None:
    five = paired_result([terms([1, 1, 1, 1, 0])], [terms([0] * 5)], np.arange(5), 100, 0)
    assert (five.interval, five.p_value) == (None, 2 * 0.5**4)
    assert paired_result([terms([1, 1, 1, 1, 0, 0])], [terms([0] * 6)], np.arange(6), 100, 0).interval is not None


def test_exclusions_are_stated() -> None:
    a = groups([(True, True), (False, True), (True, True)])
    a[0:2] = [replace(record, categories={"l1": "reasoning", "l2": "alone"}) for record in a[0:2]]
    comparison = compare_records(a, a, resamples=100)
    said = {each["reason"].partition(":")[0]: (each["n"], each["first"]) for each in comparison["tasks"]["mmbench"]["excluded"]}
    assert said["no l3 category"] == (2, "0") and said["one question or image in l2 alone"] == (2, "0")
    alone = by_place(comparison)["l2", "alone"]
    assert (alone["n"], alone["interval"], alone["p_value"], alone["p_adjusted"]) == (1, None, None, None)


def test_seeds_by_hand() -> None:
    """Values 0.5, 0.7 and 0.3, 0.3 over ten questions; the seeds' part of the variance is 0.02 / 2 + 0."""
    columns = [np.arange(10) < count for count in (5, 7, 3, 3)]
    a, b = ([terms(column) for column in columns[place : place + 2]] for place in (0, 2))
    result, detectable = hierarchical_result(a, b, np.arange(10))
    mean = (columns[0] + columns[1].astype(float)) / 2 - columns[2]
    question = np.var(mean, ddof=1) / 10
    freedom = (0.01 + question) ** 2 / (0.01**2 / 1 + question**2 / 9)
    assert result.difference == pytest.approx(0.3) and result.interval is not None and detectable is not None
    from scipy.stats import t

    reach = t.isf(0.025, freedom) * np.sqrt(0.01 + question)
    assert result.interval == pytest.approx((0.3 - reach, 0.3 + reach))
    assert result.p_value == pytest.approx(2 * t.sf(0.3 / np.sqrt(0.01 + question), freedom))


def test_runs_of_several_seeds() -> None:
    rng = np.random.default_rng(0)
    runs = [groups(list(rng.random((40, 2)) < accuracy)) for accuracy in (0.9, 0.8, 0.7)]
    three = compare_runs([("a", runs[0]), ("a1", runs[1])], [("b", runs[2])], resamples=200)
    assert three["seeds"]["covers"] == "questions only" and "B has one run" in three["seeds"]["warning"]
    row = by_place(three)["overall", "overall"]
    single = [by_place(compare_records(run, runs[2], resamples=200))["overall", "overall"]["value_a"] for run in runs[:2]]
    assert row["seeds"]["values_a"] == single and row["value_a"] == pytest.approx(np.mean(single))
    assert row["seeds"]["deviation_a"] == pytest.approx(np.std(single, ddof=1)) and row["seeds"]["deviation_b"] is None
    both = compare_runs([("a", runs[0]), ("a1", runs[1])], [("b", runs[2]), ("b1", runs[1])], resamples=200)
    assert both["seeds"]["covers"] == "seeds and questions" and "2 and 2 runs" in both["seeds"]["warning"]


def test_intervals_cover_and_p_values_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A light version of benchmarks/coverage_study.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    study_clusters, study_seeds = (
        getattr(importlib.import_module("coverage_study"), name) for name in ("study_clusters", "study_seeds")
    )

    for clusters, size, difference in ((40, 1, 0.0), (200, 1, 0.1), (50, 4, 0.0), (50, 4, 0.1)):
        found = study_clusters(clusters, size, difference, repeats=250, resamples=300)
        assert 0.90 <= found["coverage"] <= 0.995, (clusters, size, difference)
        if not difference:
            assert found["rejected"] <= 0.09 and found["p_below_half"] <= 0.58
    naive = study_clusters(50, 4, 0.0, repeats=250, resamples=300, ignore_clusters=True)
    assert naive["rejected"] > 0.10, "the simulation can tell a p-value that takes the rows of an image for independent"
    found = study_seeds(3, 200, 0.05, 0.0, repeats=250)
    assert found["coverage"] >= 0.90 and found["rejected"] <= 0.09


def write_run(folder: Path, records: Sequence[Record]) -> Path:
    tasks = list(dict.fromkeys(record.task for record in records))
    for task in tasks:
        (folder / task).mkdir(parents=True)
        write_records(folder / task / "records.jsonl", [record for record in records if record.task == task])
    write_json(folder / "run.json", {"model": "m", "model_hash": "0", "tasks": {task: {"rows": 1} for task in tasks}})
    return folder


def test_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = [(True, True), (True, False), (True, True), (False, True)]
    said = "\x1b[31mno\x00\u2028</script>"
    a, b = groups(right), groups([(False, True)] * 4)
    b[0] = replace(b[0], response=said, prediction=None)
    b[2] = replace(b[2], prediction=None)
    run_a, run_b = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    assert read_records(run_b / "mmbench" / "records.jsonl")[0].response == said
    out = tmp_path / "c"
    assert main(["compare", str(run_a), str(run_b), "--out", str(out), "--resamples", "200", "--adjust", "bh"]) == 0
    printed = capsys.readouterr().out
    assert "p (BH)" in printed and "L2 attribute_reasoning" in printed
    assert "Warning: mmbench: 25.00 % of the answers of CLIP could not be read" in printed and "answers of LIFT" not in printed
    comparison = read_json(out / "comparison.json")
    assert comparison["kind"] == "lmms" and comparison["seeds"] is None and comparison["runs"]["a"]["model"] == "m"
    with (out / "comparison.csv").open(newline="") as file:
        assert [float(row["difference"]) for row in csv.DictReader(file)] == [row["difference"] for row in comparison["rows"]]
    flips = read_jsonl(out / "flips.jsonl")
    assert [flip["group"] for flip in flips] == ["0", "2"] and flips[0]["passes"][0]["response_b"] == said
    more = ["--more_a", json.dumps([str(run_b)]), "--more_b", json.dumps([str(run_a)])]
    assert main(["compare", str(run_a), str(run_b), "--out", str(out), "--resamples", "200", *more]) == 0
    assert "Warning: 2 and 2 runs" in capsys.readouterr().out
    assert read_json(out / "comparison.json")["rows"][0]["difference"] == 0
    assert main(["compare", str(run_a), str(run_b), "--out", str(out), "--more_a", str(run_a), "--more_b", str(run_a)]) == 2
    assert f"{run_a}: given twice for one model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.__setitem__(0, replace(r[0], question="other")), "mmbench 0 has another question: 'q0' and 'other'"),
        (lambda r: r.__setitem__(0, replace(r[0], options={"A": "x", "B": "y"})), "mmbench 0 has another options"),
        (lambda r: r.__setitem__(1, replace(r[1], answer=["A"])), "mmbench 1000000 has another answer"),
        (lambda r: r.__setitem__(0, replace(r[0], images=["other"])), "mmbench 0 has another image"),
        (lambda r: r.__setitem__(0, replace(r[0], categories={})), "mmbench 0 has another categories"),
        (lambda r: r.pop(), "1 are in one run only, first mmbench 1000001"),
        (lambda r: r.pop(0), "mmbench 1000000 is a rotation of 0, which has no answer"),
        (lambda r: r.append(r[0]), "mmbench 0 stands in line 1 already"),
        (lambda r: r.clear(), "expected answers, found none"),
        (lambda r: r.__setitem__(0, replace(r[0], score=float("nan"))), "mmbench 0: expected a score of 0 to 1, found nan"),
        (lambda r: r.__setitem__(0, replace(r[0], score=None)), "mmbench 0: expected a score of 0 to 1, found None"),
        (lambda r: r.__setitem__(0, replace(r[0], answer=[])), "mmbench 0: expected a number as rotation"),
    ],
)
def test_unlike_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[Record]], object], message: str
) -> None:
    a, b = groups([(True, True), (False, True)]), groups([(True, True), (False, True)])
    run_a, run_b = write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    change(b)
    write_records(run_b / "mmbench" / "records.jsonl", b)
    assert main(["compare", str(run_a), str(run_b), "--out", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_runs_without_a_common_task_and_images_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = groups([(True, True), (False, True)])
    other = write_run(tmp_path / "b", [replace(record, task="mmbench_cn") for record in a])
    assert main(["compare", str(write_run(tmp_path / "a", a)), str(other), "--out", str(tmp_path / "c")]) == 2
    assert "expected a task that all have" in capsys.readouterr().err
    rows = [_yes_no("scienceqa", i, "yes", "yes", f"image {i // 2}", "s") for i in range(6)]
    bare = [replace(row, images=[], group=row.key) for row in rows]
    for first, second in ((rows, bare), (bare, rows)):
        assert compare_records(first, second, resamples=100)["rows"][0]["clusters"] == 3
    bare[5] = rows[5]
    runs = [str(write_run(tmp_path / name, records)) for name, records in (("with", rows), ("without", bare))]
    assert main(["compare", *runs, "--out", str(tmp_path / "d"), "--resamples", "100"]) == 0
    assert "scienceqa: the images of 5 of 6 rows are not compared: not all runs name them." in capsys.readouterr().out
