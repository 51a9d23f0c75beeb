"""Answer files of every form: the same answers give the same scores, and what cannot be understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from eval.__main__ import main
from eval.answers.read import read_answers
from eval.answers.rules import exact_match, static_hits, yes_or_no
from eval.answers.score import scores_of
from eval.lmm.tasks import LMM_TASKS
from eval.records import Likelihood, Record, write_records
from lift.common.errors import UserError

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "mmbench" / "mmbench_dev_20230712_llava-v1.5-13b.xlsx"
Rows = list[dict[str, Any]]


def answered(mmbench: SimpleNamespace) -> Rows:
    """Questions with answers: group 1 wrong in one rotation, group 3 unparsed in its first pass, the others right."""
    rows: Rows = [row | {"prediction": row["answer"]} for row in mmbench.rows()]
    for row in rows:
        if row["index"] == 2_000_001:
            row["prediction"] = "A" if row["answer"] == "B" else "B"
        if row["index"] == 3:
            row["prediction"] = "It is hard to say."
    return rows


def scores_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    status = main(["score", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def without_images(rows: Rows) -> Rows:
    return [{name: cell for name, cell in row.items() if name != "image"} for row in rows]


def as_xlsx(rows: Rows, questions: Path, path: Path) -> list[object]:
    pd.DataFrame(without_images(rows)).to_excel(path, index=False)
    return [path]


def as_tsv(rows: Rows, questions: Path, path: Path) -> list[object]:
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return [path]


def as_bare_xlsx(rows: Rows, questions: Path, path: Path) -> list[object]:
    """The form that LLaVA submits: no hint, no category."""
    kept = ["index", "question", *"ABCD", "prediction", "answer", "split"]
    pd.DataFrame(rows)[kept].to_excel(path, index=False)
    return [path, "--questions", questions]


def as_llava(rows: Rows, questions: Path, path: Path) -> list[object]:
    return [write_jsonl(path, [_llava(row, 0, [*"ABCD"]) for row in rows]), "--questions", questions]


def _llava(row: dict[str, Any], round_id: int, letters: list[str]) -> dict[str, Any]:
    filled = [letter for letter in letters if row[letter]]
    shown = {"options": [row[letter] for letter in filled], "option_char": filled}
    answer = {"question_id": row["index"], "round_id": round_id, "prompt": row["question"], "text": row["prediction"]}
    return answer | shown | {"answer_id": "x", "model_id": "m", "metadata": {}}


def as_llava_texts(rows: Rows, questions: Path, path: Path) -> list[object]:
    kept = [{"question_id": row["index"], "prompt": "?", "text": row["prediction"], "metadata": {}} for row in rows]
    return [write_jsonl(path, kept), "--questions", questions]


def as_samples(rows: Rows, questions: Path, path: Path) -> list[object]:
    return [write_jsonl(path, _samples(rows))]


def _samples(rows: Rows) -> Rows:
    samples = []
    for number, row in enumerate(rows):
        names = ("index", "question", "answer", "prediction", "hint", "source", "split", "category")
        metric = {name: row[name] or None for name in names} | {"L2-category": row["l2-category"]}
        metric |= {letter: row[letter] or None for letter in "ABCD"} | {"E": "nan"}
        values = {"doc_id": number, "target": row["answer"], "resps": row["prediction"], "filtered_resps": row["prediction"]}
        samples.append(values | {"doc_hash": "same", "gpt_eval_score": metric, "submission": metric, "input": row["question"]})
    return samples


def as_records(rows: Rows, questions: Path, path: Path) -> list[object]:
    docs = [row | {"L2-category": row["l2-category"]} for row in rows]
    (path / "mmbench").mkdir(parents=True)
    records = [LMM_TASKS["mmbench"].record(doc, doc["prediction"], []) for doc in docs]
    write_records(path / "mmbench" / "records.jsonl", records)
    return [path]


FORMS = [as_xlsx, as_tsv, as_bare_xlsx, as_llava, as_llava_texts, as_samples, as_records]


@pytest.mark.parametrize("write", FORMS, ids=lambda each: each.__name__)
def test_every_form_gives_the_same_scores(
    mmbench: SimpleNamespace,
    questions_tsv: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Rows, Path, Path], list[object]],
) -> None:
    """The file's name says nothing about its form."""
    path = tmp_path / {as_records: "answers", as_xlsx: "a.xlsx", as_bare_xlsx: "a.xlsx"}.get(write, "answers.bin")
    scores = scores_json(capsys, *write(answered(mmbench), questions_tsv, path))
    overall = scores["overall"]
    assert (overall["n"], overall["rows"], overall["circular"], overall["vanilla"]) == (4, 12, 0.5, 0.75)
    assert (overall["parse_failures"], overall["parse_failure_rate"], overall["lmms_eval_static"]) == (1, 1 / 12, 0.5)
    assert {name: (each["n"], each["circular"]) for name, each in scores["l2"].items()} == {
        "finegrained_perception (instance-level)": (2, 0.5),
        "finegrained_perception (cross-instance)": (2, 0.5),
    }
    assert list(scores["l1"]) == ["perception"] and scores["l3"]["spatial_relationship"]["parse_failures"] == 1


def test_published_llava_answers_give_the_published_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is not there")
    scores = scores_json(capsys, PUBLISHED)
    overall = scores["overall"]
    assert (overall["n"], overall["rows"]) == (1176, 4377)
    assert [round(100 * overall[name], 2) for name in ("circular", "vanilla", "lmms_eval_static")] == [67.69, 75.43, 67.69]
    assert scores["l1"] == scores["l2"] == scores["l3"] == {}
    assert "names no category" in scores["notes"][0] and "53 of 1176 groups have fewer passes" in scores["notes"][1]
    questions = PUBLISHED.parent / "mmbench_sample_en.tsv"
    joined = scores_json(capsys, PUBLISHED, "--questions", questions)
    assert joined["overall"]["circular"] == overall["circular"]
    # the sample has the first pass of 11 questions that the file answers, each of another L3 category
    assert len(joined["l3"]) == sum(each["n"] for each in joined["l3"].values()) == sum(e["n"] for e in joined["l2"].values())
    assert joined["l3"]["social_relation"]["rows"] > 1 and f"of 4377 rows are from {questions}" in joined["notes"][0]


def test_llava_rounds_are_read_under_the_letters_that_were_shown(
    mmbench: SimpleNamespace, questions_tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round 1 shows B, C, D, A of the file as A, B, C, D: the right A of group 1 is then D."""
    row = mmbench.rows()[0]
    rounds = [_llava(row | {"prediction": said}, place, [*"ABCDABCD"][place : place + 4]) for place, said in enumerate("ADCB")]
    answers = read_answers(write_jsonl(tmp_path / "a.jsonl", rounds), questions=questions_tsv)
    assert [record.answer for record in answers.records] == [["A"], ["D"], ["C"], ["B"]]
    assert [record.key for record in answers.records] == ["1", "1000001", "2000001", "3000001"]
    assert answers.records[1].options == {"A": "square", "B": "triangle", "C": "star", "D": "circle"}
    assert scores_of("mmbench", answers.records)["overall"]["circular"] == 1.0


def test_a_right_option_that_llava_took_for_an_empty_cell_counts_as_wrong(mmbench: SimpleNamespace, tmp_path: Path) -> None:
    row = mmbench.rows()[0] | {"C": "None", "D": "", "answer": "C", "prediction": "A"}
    questions = mmbench.write([row], tmp_path / "q.tsv")
    rounds = [_llava(row, place, letters) for place, letters in enumerate((["A", "B"], ["B", "A"]))]
    answers = read_answers(write_jsonl(tmp_path / "a.jsonl", rounds), questions=questions)
    assert [record.score for record in answers.records] == [0.0, 0.0]
    assert "The right option was not shown in 2 rows, first 1, which count as wrong" in answers.notes[1]
    with pytest.raises(UserError, match="the right option C was not shown, but others under its letter: A, B, D"):
        shifted = [_llava(row | {"D": "x"}, 0, ["A", "B", "D"])]
        read_answers(write_jsonl(tmp_path / "b.jsonl", shifted), questions=mmbench.write([row | {"D": "x"}], questions))


def test_static_rule_is_looser_than_the_exact_one() -> None:
    options = {"A": "red cube", "B": "blue sphere", "C": "green cone"}
    record = Record("mmbench", "1", "1", 0, {}, "q", options, ["B"], "Because of that", None, 0.0)
    none = Record("mmbench", "2", "2", 0, {}, "q", options, ["A"], "neither", None, 0.0)
    assert static_hits([record, none]) == [True, False], "it takes the B of Because; it draws no letter for the other"


def test_likelihood_has_its_column_and_only_first_passes_are_said() -> None:
    record = Record("mmbench", "1", "1", 0, {}, "q", {"A": "a", "B": "b"}, ["A"], "?", None, 0.0)
    likely = Record(**record.__dict__ | {"likelihood": Likelihood("A", 1.0, {"A": -0.1, "B": -2.4})})
    overall = scores_of("mmbench", [likely])["overall"]
    assert (overall["likelihood"], overall["circular"]) == (1.0, 0.0)
    assert "likelihood" not in scores_of("mmbench", [record])["overall"]


def test_other_benchmarks_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"index": 1, "question": "q", "A": "one", "B": "two", "answer": "A", "prediction": "A.", "category": "Counting"},
        {"index": 2, "question": "r", "A": "one", "B": "", "answer": "A", "prediction": "B", "category": "Counting"},
        {"index": 3, "question": "s", "A": "one", "B": "nan", "answer": "A", "prediction": "A", "category": "Scene"},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    assert main(["score", str(tmp_path / "a.csv")]) == 2
    assert "does not say which benchmark it is of. Give --task." in capsys.readouterr().err
    scores = scores_json(capsys, tmp_path / "a.csv", "--task", "seedbench")
    assert scores["overall"] == {"n": 3, "rows": 3, "accuracy": 2 / 3, "parse_failures": 1, "parse_failure_rate": 1 / 3}
    assert scores["category"]["Counting"]["accuracy"] == 0.5
    yes_no = [
        {"index": i, "image_path": f"{i // 2}.jpg", "question": "q", "category": "ocr", "answer": answer, "prediction": said}
        for i, (answer, said) in enumerate([("Yes", "Yes, it is."), ("No", "no"), ("Yes", "yes or no"), ("No", "No")])
    ]
    pd.DataFrame(yes_no).to_excel(tmp_path / "b.xlsx", index=False)
    overall = scores_json(capsys, tmp_path / "b.xlsx", "--task", "mme")["overall"]
    assert (overall["accuracy"], overall["accuracy_plus"], overall["score"], overall["parse_failures"]) == (0.75, 0.5, 125.0, 1)
    assert main(["score", str(tmp_path / "b.xlsx"), "--task", "mme"]) == 0 and " 125.0 " in capsys.readouterr().out
    judged = [{"index": 1, "question": "q", "answer": "4", "prediction": "four", "hit": 1}]
    judged.append({"index": 2, "question": "q", "answer": "5", "prediction": "six", "hit": 0})
    pd.DataFrame(judged).to_csv(tmp_path / "c.tsv", sep="\t", index=False)
    scores = scores_json(capsys, tmp_path / "c.tsv", "--task", "mathvista")
    assert scores["overall"]["accuracy"] == 0.5 and scores["notes"] == ["Open answers: scored by the column 'hit'."]
    scores = scores_json(capsys, tmp_path / "c.tsv", "--task", "mathvista", "--questions", tmp_path)
    assert scores["notes"][1] == "--questions is not used: tables of mathvista are read as they are."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "['coca', 'cola']"}, "row 2: several answers in one cell, .* Add a column 'hit'"),
        ({"g_index": 1, "index": "a1"}, "row 2: expected a number as index beside g_index, found 'a1'"),
    ],
)
def test_tables_that_cannot_be_scored(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    row = {"index": 1, "question": "q", "answer": "coca", "prediction": "coca"} | changes
    pd.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "a.csv", task="textvqa")


def test_categories_have_their_official_names_and_order(mmbench: SimpleNamespace, tmp_path: Path) -> None:
    rows = answered(mmbench)
    for row in rows:
        row["category"] = str(row["category"]).replace("_", " ").title()
    pd.DataFrame(rows).drop(columns="image").to_excel(tmp_path / "a.xlsx", index=False)
    scores = scores_of("mmbench", read_answers(tmp_path / "a.xlsx").records)
    assert list(scores["l3"]) == ["object_localization", "attribute_recognition", "spatial_relationship"]
    assert list(scores["l2"]) == ["finegrained_perception (instance-level)", "finegrained_perception (cross-instance)"]


def test_samples_of_other_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {"resps": [["Yes"]], "filtered_resps": ["Yes"], "doc_hash": "same", "input": "q"}
    pope = []
    for number, target in enumerate(("yes", "yes", "no")):
        metric = {"question_id": number, "score": float(target == "yes"), "prediction": "yes"}
        pope.append(base | {"doc_id": number, "target": target, "pope_accuracy": metric})
    overall = scores_json(capsys, write_jsonl(tmp_path / "pope.jsonl", pope))["overall"]
    assert (overall["accuracy"], overall["f1"], overall["yes_ratio"]) == pytest.approx((2 / 3, 0.8, 1.0))
    gqa = [base | {"doc_id": 0, "target": "yes", "exact_match": 1.0}, base | {"doc_id": 1, "target": "no", "exact_match": 0.0}]
    small = base | {"doc_id": 0, "target": "A", "filtered_resps": ["a"], "seed_all": {"pred": "a", "answer": "A"}}
    assert scores_json(capsys, write_jsonl(tmp_path / "seed.jsonl", [small]))["overall"]["accuracy"] == 1.0
    gqa[1]["some_count"] = 1
    path = write_jsonl(tmp_path / "gqa.jsonl", gqa)
    assert main(["score", str(path)]) == 2 and "Give --task" in capsys.readouterr().err
    scores = scores_json(capsys, path, "--task", "gqa")
    assert scores["overall"]["accuracy"] == 0.5 and "Give --questions" in scores["notes"][0]


def test_samples_take_the_questions_of_a_data_folder(
    mmbench: SimpleNamespace, questions_tsv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(questions_tsv), "--out", str(tmp_path / "data")]) == 0
    samples = [
        {k: v for k, v in row.items() if k in ("doc_id", "target", "filtered_resps")} for row in _samples(answered(mmbench))
    ]
    path = write_jsonl(tmp_path / "s.jsonl", samples)
    scores = scores_json(capsys, path, "--task", "mmbench", "--questions", tmp_path / "data")
    assert scores["overall"]["circular"] == 0.5 and len(scores["l3"]) == 3
    samples[1]["target"] = "C"
    with pytest.raises(UserError, match="target 'C', but 'D' is right in row 1"):
        read_answers(write_jsonl(path, samples), task="mmbench", questions=tmp_path / "data")


def _set(place: int, **values: object) -> Callable[[Rows], object]:
    return lambda rows: rows[place].update(values)


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (as_tsv, _set(1, index=1), "row 3: index 1 occurs twice"),
        (as_tsv, _set(1, index="x"), "row 3: expected a number as index, found 'x'"),
        (as_tsv, _set(0, answer="E"), r"row 2 \(index 1\): answer 'E' names no option"),
        (as_tsv, _set(0, A="nan"), r"row 2 \(index 1\): answer 'A' names no option; filled are B, C, D"),
        (as_tsv, lambda rows: rows.pop(0), "mmbench 1000001 is a rotation of 1, which has no answer"),
        (as_tsv, lambda rows: [row.pop("prediction") for row in rows], "expected the column 'prediction'"),
        (as_bare_xlsx, _set(0, A="cube"), "index 1: A is 'cube', but 'circle'"),
        (as_llava, _set(0, index=99), r"row 1 \(question 99, round 0\): is not in"),
        (as_llava, _set(0, A="cube"), "option A is 'cube', but 'circle'"),
        (as_llava, _set(1, index=1), "mmbench 1 occurs twice|option A is"),
        (as_llava_texts, _set(0, index=99), "row 1: question 99 is not in"),
        (as_llava_texts, _set(0, prediction=None), "row 1: expected the answer as 'text', found None"),
        (as_samples, _set(0, prediction=None), "row 1: expected one text in filtered_resps"),
    ],
)
def test_faulty_files_are_named(
    mmbench: SimpleNamespace,
    questions_tsv: Path,
    tmp_path: Path,
    write: Callable[[Rows, Path, Path], list[object]],
    change: Callable[[Rows], object],
    message: str,
) -> None:
    rows = answered(mmbench)
    change(rows)
    arguments = write(rows, questions_tsv, tmp_path / ("a.xlsx" if write is as_bare_xlsx else "a.tsv"))
    with pytest.raises(UserError, match=message) as error:
        read_answers(Path(str(arguments[0])), questions=questions_tsv if len(arguments) > 1 else None)
    assert str(tmp_path / "a.") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file"),
        ("[]", "expected answers, found none"),
        ("[1]", "row 1: expected an object, found 1"),
        ('{"a": 1}', "the keys a are those of no known answer file"),
        ('{"question_id": 1, "text": "A", "doc_id": 1, "target": "A"}', "may be llava or lmms_eval"),
        ('{"question_id": 1, "text": "A"}', "Give --questions"),
        ('{"question_id": 1', "expected one JSON object a line"),
        ('{"doc_id": 0, "target": "A"}\n{"doc_id": 1}', "row 2: expected 'target' as in every row of the form lmms_eval"),
        ("index\tquestion\tA\tB\tanswer\tprediction\n", "expected an answer file or a table with rows"),
        ("index\tIndex\tprediction\n1\t2\tA\n", "expected each column once, found 'index' twice"),
        ("PK\x03\x04 no archive", "expected an answer file or a table with rows"),
        ("\x00\x01\x02", "expected an answer file or a table with rows"),
    ],
)
def test_what_is_no_answer_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "a").write_text(content)
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "a")
    assert main(["score", str(tmp_path / "a")]) == 2


def test_formats_and_folders_that_do_not_fit(tmp_path: Path, mmbench: SimpleNamespace, questions_tsv: Path) -> None:
    (tmp_path / "a.tsv").write_text("prediction\nA\n")
    with pytest.raises(UserError, match="expected llava answers, found a table"):
        read_answers(tmp_path / "a.tsv", "llava")
    with pytest.raises(UserError, match="no such file"):
        read_answers(tmp_path / "nowhere.tsv")
    with pytest.raises(UserError, match=r"with TASK/records\.jsonl, found none"):
        read_answers(tmp_path)
    as_records(answered(mmbench), questions_tsv, tmp_path / "run")
    with pytest.raises(UserError, match=r"with pope/records\.jsonl, found none\. It has mmbench"):
        read_answers(tmp_path / "run", task="pope")
    with pytest.raises(UserError, match=r"Give the run folder .* with --task mmbench"):
        read_answers(tmp_path / "run" / "mmbench")
    (tmp_path / "stopped" / "mmbench.unfinished").mkdir(parents=True)
    with pytest.raises(UserError, match=r"interrupted \(mmbench\.unfinished\)"):
        read_answers(tmp_path / "stopped")
    table = mmbench.write(answered(mmbench), tmp_path / "answers.tsv")
    with pytest.raises(UserError, match="the answers yes and no of pope"):
        read_answers(table, task="pope")
    assert "with MMBench's rule" in read_answers(table, task="ai2d").notes[0]
    assert len(read_answers(tmp_path / "run" / "mmbench" / "records.jsonl").records) == 12


def test_control_characters_are_kept_and_missing_passes_said(
    mmbench: SimpleNamespace, tmp_path: Path, questions_tsv: Path
) -> None:
    rows = answered(mmbench)[:3]
    rows[1]["prediction"] = "B\x1b[2J\x00\u2028"
    path = write_jsonl(tmp_path / "a.jsonl", _samples(rows))
    answers = read_answers(path)
    assert answers.records[1].response == rows[1]["prediction"] and "1 of 1 groups have fewer passes" in answers.notes[0]
    only_first = read_answers(write_jsonl(path, _samples(rows[:1])))
    assert only_first.notes == ["mmbench: only first passes: circular accuracy is that of one pass, the same as vanilla."]


def test_rules() -> None:
    assert [yes_or_no(text) for text in ("Yes.", "No, none", "yes or no", "yesterday", "")] == ["yes", "no", None, None, None]
    assert (exact_match("Two. ", "two"), exact_match("two cats", "two")) == (1.0, 0.0)
