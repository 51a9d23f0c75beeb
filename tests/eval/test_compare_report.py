"""Paired statistics on hand-worked cases, refusals of unlike runs, and a report with the numbers of its JSON."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eval.__main__ import main
from eval.compare import compare_records
from eval.mmbench import record
from eval.mmbench_data import read_questions
from eval.output import percent
from eval.paired import holm, paired_result
from eval.report import headline
from lift.common.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_paired_result_by_hand() -> None:
    a = np.array([True] * 6 + [False] * 1 + [True] * 3)
    b = np.array([False] * 6 + [True] * 1 + [True] * 3)
    result = paired_result(a, b, resamples=2000, seed=0)
    assert (result.n, result.difference, result.only_a, result.only_b) == (10, 0.5, 6, 1)
    assert result.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # binomial(7, 1/2): two-sided P(X <= 1)
    assert result.interval is not None and result.interval[0] < 0.5 < result.interval[1]
    assert result == paired_result(a, b, resamples=2000, seed=0)


def test_interval_covers_a_known_difference() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        a, b = rng.random(150) < 0.7, rng.random(150) < 0.6
        low, high = paired_result(a, b, resamples=400, seed=1).interval or (0, 0)
        inside += low <= 0.1 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_one_group_has_no_interval_and_equal_models_no_difference() -> None:
    assert paired_result(np.array([True]), np.array([False]), 100, 0).interval is None
    equal = paired_result(np.array([True, False]), np.array([True, False]), 100, 0)
    assert (equal.difference, equal.p_value, equal.interval) == (0.0, 1.0, (0.0, 0.0))


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def _write_run(folder: Path, data: Path, right: set[int], rows: list[dict] | None = None) -> Path:
    """A run that answers the groups in `right` correctly in every rotation and the others with the next letter."""
    folder.mkdir()
    records = []
    for row in rows or read_questions(data):
        wrong = next(letter for letter in row["options"] if letter != row["answer"])
        records.append(record(row, row["answer"] if row["index"] % 1_000_000 in right else wrong, "mmbench_en_dev_static"))
    write_jsonl(folder / "records.jsonl", records)
    write_json(folder / "run.json", {"model": "m", "data": str(data), "data_hash": sha256_file(data), "scores": {}})
    return folder


@pytest.fixture
def comparison(mmbench: SimpleNamespace, tmp_path: Path) -> Path:
    rows = mmbench.rows()
    for row in rows:
        row["question"] = f"{row['question']} {HOSTILE}"
        row["category"] = f"{row['category']}{HOSTILE if row['index'] == 1 or row['answer'] else ''}"
    data = mmbench.write(rows, tmp_path / "questions.tsv")
    a, b = _write_run(tmp_path / "a", data, {1, 2, 3}), _write_run(tmp_path / "b", data, {3, 4})
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "comparison")]) == 0
    return tmp_path / "comparison"


def test_comparison_numbers(comparison: Path) -> None:
    rows = read_json(comparison / "comparison.json")["rows"]
    overall = rows[0]
    assert (overall["n"], overall["circular_a"], overall["circular_b"]) == (4, 0.75, 0.5)
    assert (overall["difference"], overall["only_a"], overall["only_b"], overall["p_holm"]) == (0.25, 2, 1, None)
    by_l2 = {row["name"]: row for row in rows if row["level"] == "l2"}
    assert by_l2["finegrained_perception (cross-instance)"]["difference"] == 0.5
    assert by_l2["finegrained_perception (instance-level)"]["difference"] == 0.0
    assert sum(row["n"] for row in rows if row["level"] == "l3") == 4
    with (comparison / "comparison.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["difference"]) for row in table] == [row["difference"] for row in rows]
    assert [(flip["group"], flip["right"]) for flip in read_jsonl(comparison / "flips.jsonl")] == [(1, "a"), (2, "a"), (4, "b")]


def test_swapping_the_runs_turns_every_sign(comparison: Path) -> None:
    a, b = (read_jsonl(comparison.parent / name / "records.jsonl") for name in "ab")
    forward, backward = compare_records(a, b, 500, 0), compare_records(b, a, 500, 0)
    assert [row["difference"] for row in forward] == [-row["difference"] for row in backward]
    assert [row["p_value"] for row in forward] == [row["p_value"] for row in backward]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(question="another"), "index 1 has another question"),
        (lambda rows: rows[0]["options"].update(A="another"), "index 1 has another options"),
        (lambda rows: rows[0].update(image_sha256="0"), "index 1 has another image_sha256"),
        (lambda rows: rows.pop(), "1 are in one run only, first mmbench_en_dev_static index 1000004"),
    ],
)
def test_unlike_runs_are_refused(
    tmp_path: Path, questions_tsv: Path, capsys: pytest.CaptureFixture[str], change, message: str
) -> None:
    rows = read_questions(questions_tsv)
    a = _write_run(tmp_path / "a", questions_tsv, {1})
    change(rows)
    b = _write_run(tmp_path / "b", questions_tsv, {1}, rows)
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_report_is_self_contained_and_escaped(comparison: Path) -> None:
    out = comparison.parent / "report.html"
    stages = comparison.parent / "stages.json"
    stages.write_text(json.dumps([{"stage": HOSTILE, "seconds": 12.5, "peak_gb": 1.5, "reused": True}]))
    for name, value in (("ea", 0.5), ("eb", 0.75)):
        metric = {"value": value, "n": 4, "ties": 0, "interval": [0.1, 0.9], "statistic": "accuracy"}
        (comparison.parent / name).mkdir()
        write_json(
            comparison.parent / name / "results.json",
            {"encoder": name, "encoder_hash": "0", "data_hash": {"s": "1"}, "metrics": {"sugarcrepe/swap_att": metric}},
        )
    encoders = ["--encoder_a", str(comparison.parent / "ea"), "--encoder_b", str(comparison.parent / "eb")]
    assert main(["report", str(comparison), "--out", str(out), "--stages", str(stages), *encoders]) == 0
    page = out.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page and "<img src=x" not in page
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"']?(?!data:)[a-z/]", page)
    assert page.count("data:image/jpeg;base64,") == 3
    for row in read_json(comparison / "comparison.json")["rows"]:
        assert percent(row["circular_a"]) in page and percent(row["difference"], signed=True) in page
    assert "-25.00" in page and "12.5" in page  # the encoders' difference, the stage's time


def test_report_without_the_data_says_so(comparison: Path) -> None:
    (comparison.parent / "questions.tsv").unlink()
    out = comparison.parent / "report.html"
    assert main(["report", str(comparison), "--out", str(out)]) == 0
    assert "The image is not shown" in out.read_text(encoding="utf-8")


def test_headline_says_what_the_exact_test_allows() -> None:
    row = {"circular_a": 0.5, "circular_b": 0.4, "n": 100, "difference": 0.1, "interval": [0.01, 0.2], "p_holm": None}
    names = {"name_a": "LIFT", "name_b": "CLIP"}
    assert "do not tell which" in headline(names | {"rows": [row | {"p_value": 0.06}]}), "the interval alone does not decide"
    assert "LIFT is ahead" in headline(names | {"rows": [row | {"p_value": 0.04}]})
    assert "CLIP is ahead" in headline(names | {"rows": [row | {"difference": -0.1, "p_value": 0.04}]})
