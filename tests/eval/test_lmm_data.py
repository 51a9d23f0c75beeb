"""`lift-eval data`: what is refused in published files, what is left out and said, and what a data folder keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmm_layouts
import pyarrow.parquet
import pytest
from tiny import encoded, noise_image

from eval.__main__ import main
from eval.lmm.tasks import LMM_TASKS, task_source
from eval.lmm.tasks.published import Source
from lift.common.errors import UserError


def edit(path: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(change(values) or values))

    return apply


def put(path: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def drop(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def first(path: str, *, of: str | None = None, **values: Any) -> Callable[[Path], None]:
    """Changes values of the first question."""

    def change(whole: Any) -> None:
        inner = whole[of] if of else whole
        next(iter(inner.values() if isinstance(inner, dict) else inner)).update(values)

    return edit(path, change)


GQA = "testdev_balanced_questions.json"
POPE_LINE = '{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a cup?", "label": "yes"}\n'
SEED = "SEED-Bench.json"
TEXTVQA = "TextVQA_0.5.1_val.json"
AI2D = "questions/0.png.json"


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("gqa", put(GQA, "{}"), "an object of one object a question id, found another form"),
        ("gqa", edit(GQA, lambda values: [1]), "an object of one object a question id, found another form"),
        ("gqa", put(GQA, '{"1": '), "expected GQA's questions in JSON, but it cannot be read"),
        ("gqa", drop(GQA), r"gqa: expected GQA's questions as testdev_balanced_questions\.json or .*, found images\."),
        ("gqa", first(GQA, answer=None), "question 201307251: expected a text under 'answer', found None"),
        ("gqa", first(GQA, answer=float("nan")), "question 201307251: expected a text under 'answer', found nan"),
        ("gqa", first(GQA, types="query"), "question 201307251: expected the question's types under 'types', found 'query'"),
        ("gqa", first(GQA, imageId="../../etc/n1"), "expected the image's name inside its folder"),
        ("gqa", first(GQA, isBalanced="maybe"), "lmms-lab-encoder/GQA: a question has a value of another type"),
        (
            "gqa",
            drop("images/n161313.jpg"),
            r"2 of 3 questions have no image file, the first 201307251: .*n161313\.jpg\. .*--allow",
        ),
        (
            "gqa",
            put("images/n161313.jpg", b"\xff\xd8\xff\xe0 half"),
            r"n161313\.jpg: expected an image, but it cannot be decoded",
        ),
        ("pope", put("coco_pope_popular.json", POPE_LINE + POPE_LINE), "question popular/1 occurs twice"),
        (
            "pope",
            put("coco_pope_popular.json", POPE_LINE.replace("yes", "maybe")),
            "popular.json:1: expected the label yes or no",
        ),
        ("pope", put("coco_pope_popular.json", "[1, 2]\n"), "expected POPE's questions, a list of JSON objects"),
        ("pope", put("coco_pope_popular.json", "\n"), "coco_pope_popular.json: expected POPE's questions, found none"),
        ("pope", drop("coco_pope_popular.json"), r"expected POPE's questions as coco_pope_popular\.json or"),
        ("pope", drop("val2014/000000210789.jpg"), "3 of 9 questions have no image file, the first random/3"),
        ("mme", put("count/0001.txt", "Is it?\tYes\n"), "0001.txt: expected two questions, which MME scores together, found 1"),
        ("mme", put("count/0001.txt", "Is it?\tYes\nIs it?\tYes\n"), "expected two questions, .*, found 1"),
        ("mme", put("count/0001.txt", "Is it?\tYes\nIs it not? No\n"), "0001.txt:2: expected a question, a tab, and Yes or No"),
        ("mme", put("count/0001.txt", b"\xff\xfe\xff"), "0001.txt: expected MME's questions on an image in UTF-8"),
        ("mme", drop("count/0001.txt"), r"count: expected MME's questions as \.txt files, found none"),
        ("mme", drop("count/0001.png"), r"2 of 28 questions have no image file, the first count/0001\.jpg"),
        ("seedbench", edit(SEED, lambda values: {"questions": []}), "expected SEED-Bench's questions, found none"),
        ("seedbench", edit(SEED, lambda values: values["questions"][:1] * 2), "a list of JSON objects, found another form"),
        ("seedbench", edit(SEED, lambda values: {"questions": values["questions"][:1] * 2}), "question 101669 occurs twice"),
        (
            "seedbench",
            edit(SEED, lambda values: {"questions": values["questions"][2:]}),
            "expected questions on images, found none",
        ),
        ("seedbench", first(SEED, of="questions", answer="E"), "question 101669: answer 'E' names no option"),
        ("seedbench", first(SEED, of="questions", choice_c=float("nan")), "question 101669: expected a text under 'choice_c'"),
        (
            "seedbench",
            first(SEED, of="questions", data_type="Single Image"),
            r"expected data_type image or video \(SEED-Bench-1\)",
        ),
        ("seedbench", first(SEED, of="questions", question_type_id=17), "expected a question_type_id from 1 to 12, found 17"),
        ("textvqa", first(TEXTVQA, of="data", answers=None), "question 34602: expected at least 2 texts under 'answers'"),
        ("textvqa", first(TEXTVQA, of="data", question_id=34603), "question 34603 occurs twice"),
        ("textvqa", first(TEXTVQA, of="data", image_width="wide"), "a question has a value of another type"),
        ("textvqa", edit(TEXTVQA, lambda values: {"data": {}}), "expected TextVQA's questions, a list of JSON objects"),
        ("ai2d", drop("ai2d_test_ids.csv"), r"expected ai2d_test_ids\.csv in it or beside it"),
        ("ai2d", put("ai2d_test_ids.csv", "17\n"), "expected questions on the test images, found none in 2 files"),
        (
            "ai2d",
            first(AI2D, of="questions", correctAnswer=4),
            "'What is A in the diagram.': answer 4 names no option; there are 4",
        ),
        (
            "ai2d",
            first(AI2D, of="questions", answerTexts=["a", float("nan")]),
            "expected a text under 'answerTexts', found nan",
        ),
        ("ai2d", first(AI2D, of="questions", questionId="0.png-1"), r"question 0\.png-1 occurs twice"),
        ("ai2d", put("categories.json", "[]"), "expected an object, image name to category"),
        ("gqa", first(GQA, annotations={"answer": 5}), "expected an object under 'answer', found 5"),
        ("ai2d", put(AI2D, "[]"), "expected an object with 'imageName' and 'questions'"),
        ("scienceqa", first("problems.json", answer=2), "problem 4: answer 2 names no option; there are 2"),
        ("scienceqa", first("problems.json", choices=["one"]), "problem 4: expected at least 2 texts under 'choices'"),
        ("scienceqa", put("pid_splits.json", '{"test": ["4", "77"]}'), "expected problem 77, which pid_splits.json lists"),
        ("scienceqa", put("pid_splits.json", '{"test": ["4", "4"]}'), "expected each problem once in 'test', found one twice"),
        ("scienceqa", put("pid_splits.json", '{"test": []}'), "expected problems to ask, found none among 0"),
        ("scienceqa", put("pid_splits.json", "[]"), "a list 'test' in pid_splits.json, found another form"),
        ("scienceqa_img", put("pid_splits.json", '{"test": ["4", "11"]}'), "expected problems to ask, found none among 2"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, fault: Callable[[Path], None], message: str) -> None:
    folder = getattr(lmm_layouts, name.removesuffix("_img"))(tmp_path / name)
    fault(folder)
    with pytest.raises(UserError, match=message):
        LMM_TASKS[name].convert(folder, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.parquet"))


@pytest.mark.parametrize("name", list(LMM_TASKS))
def test_a_wrong_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"nowhere.*: expected .* there is no"):
        LMM_TASKS[name].convert(tmp_path / "nowhere", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*: expected"):
        LMM_TASKS[name].convert(tmp_path / "empty", tmp_path / "data")


def test_questions_without_an_image_are_left_out_when_asked_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lmm_layouts.pope(tmp_path / "pope")
    (folder / "val2014" / "000000210789.jpg").unlink()
    command = ["data", str(folder), "--task", "pope", "--out", str(tmp_path / "data")]
    assert main(command) == 2 and not (tmp_path / "data").exists()
    assert main([*command, "--allow-missing"]) == 0
    told = capsys.readouterr().out
    assert "Left out: 3 of 9 questions have no image file, the first random/3" in told and "6 rows" in told
    (folder / "val2014" / "COCO_val2014_000000310196.jpg").unlink()
    assert main([*command, "--allow_missing"]) == 2  # nothing would be left
    assert "9 of 9 questions" in capsys.readouterr().err


def test_videos_and_other_parts_are_said(tmp_path: Path) -> None:
    read = {
        name: LMM_TASKS[name].read(Source(getattr(lmm_layouts, name.removesuffix("_img"))(tmp_path / name))).left_out
        for name in ("seedbench", "ai2d", "scienceqa", "scienceqa_img")
    }
    assert read == {
        "seedbench": ["Left out: 1 questions on videos, which LLaVA does not take."],
        "ai2d": ["Left out: 1 questions on images that are not in ai2d_test_ids.csv."],
        "scienceqa": [],
        "scienceqa_img": ["Left out: 2 questions without an image; the task scienceqa asks them."],
    }


def test_mme_without_a_subtask_only_when_asked(tmp_path: Path) -> None:
    folder = lmm_layouts.mme(tmp_path / "mme")
    for path in (folder / "OCR").iterdir():
        path.unlink()
    (folder / "OCR").rmdir()
    with pytest.raises(UserError, match="a folder for each of MME's 14 subtasks, found none for OCR"):
        LMM_TASKS["mme"].read(Source(folder))
    assert LMM_TASKS["mme"].read(Source(folder, allow_missing=True)).left_out == [
        "Left out: the subtasks OCR, which have no folder."
    ]


def test_mme_one_folder_deeper(tmp_path: Path) -> None:
    lmm_layouts.mme(tmp_path / "MME_Benchmark_release_version" / "MME_Benchmark")
    assert LMM_TASKS["mme"].convert(tmp_path, tmp_path / "data") == 28


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = lmm_layouts.textvqa(tmp_path / "textvqa")
    (folder / "train_images").rename(tmp_path / "photos")
    task = LMM_TASKS["textvqa"]
    with pytest.raises(UserError, match=r"expected the folder of images as train_images or .* --images"):
        task.read(Source(folder))
    (rows,) = (table.rows for table in task.read(Source(folder / "TextVQA_0.5.1_val.json", tmp_path / "photos")).tables)
    assert {row["image"] for row in rows} == {tmp_path / "photos" / "003a8ae2ef43b901.jpg"}
    for name in ("mmbench", "mme", "ai2d"):
        with pytest.raises(UserError, match="--images"):
            LMM_TASKS[name].read(Source(folder, tmp_path / "photos"))


def test_one_split_of_pope_by_its_file(tmp_path: Path) -> None:
    folder = lmm_layouts.pope(tmp_path / "pope")
    assert LMM_TASKS["pope"].convert(folder / "coco_pope_popular.json", tmp_path / "data") == 3
    (folder / "coco_pope_popular.json").rename(folder / "questions.json")
    with pytest.raises(UserError, match=r"questions\.json: expected a name that ends with random, popular, adversarial"):
        LMM_TASKS["pope"].convert(folder / "questions.json", tmp_path / "data")


def test_a_folder_keeps_other_configs_and_replaces_its_own(tmp_path: Path, mmbench: SimpleNamespace) -> None:
    rows = mmbench.rows()
    tsv, shorter = mmbench.write(rows, tmp_path / "all.tsv"), mmbench.write(rows[:4], tmp_path / "first.tsv")
    for name, file in (("mmbench", tsv), ("mmbench_cn", tsv), ("mmbench", shorter)):
        LMM_TASKS[name].convert(file, tmp_path / "data")
    counts = {}
    for name in ("mmbench", "mmbench_cn"):
        source = task_source(LMM_TASKS[name].lmms_task)
        (file,) = (tmp_path / "data" / source.repository / source.config).iterdir()
        counts[name] = pyarrow.parquet.read_metadata(file).num_rows
    assert counts == {"mmbench": 4, "mmbench_cn": 12}


def test_rotations_take_the_categories_of_their_first_pass(tmp_path: Path, mmbench: SimpleNamespace) -> None:
    rows = [row if row["index"] < 1_000_000 else row | {"category": "", "l2-category": ""} for row in mmbench.rows()]
    LMM_TASKS["mmbench"].convert(mmbench.write(rows, tmp_path / "first.tsv"), tmp_path / "data")
    (file,) = (tmp_path / "data").rglob("*.parquet")
    stored = pyarrow.parquet.read_table(file).to_pylist()
    assert [row["category"] for row in stored] == [row["category"] for row in mmbench.rows()]
    assert [row["L2-category"] for row in stored] == [row["l2-category"] for row in mmbench.rows()]


def test_a_rotation_with_a_gap_before_it_is_named(tmp_path: Path, mmbench: SimpleNamespace) -> None:
    rows = [row for row in mmbench.rows() if row["index"] != 2_000_001]
    with pytest.raises(UserError, match="index 3000001 is a rotation of 1, but 2000001 is not there"):
        LMM_TASKS["mmbench"].convert(mmbench.write(rows, tmp_path / "gap.tsv"), tmp_path / "data")


def test_images_of_the_same_photo_are_stored_once(tmp_path: Path) -> None:
    folder = lmm_layouts.pope(tmp_path / "pope")
    photo = encoded(noise_image(1, (300, 300)))
    (folder / "val2014" / "COCO_val2014_000000310196.jpg").write_bytes(photo)
    LMM_TASKS["pope"].convert(folder, tmp_path / "data")
    (file,) = (tmp_path / "data").rglob("*.parquet")
    stored = pyarrow.parquet.read_table(file).to_pylist()
    assert [row["image"]["bytes"] == photo for row in stored] == [True, True, False] * 3
    assert len(photo) < file.stat().st_size < 2 * len(photo)


def test_other_peoples_folders_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "data" / task_source("pope").repository
    repository.mkdir(parents=True)
    (repository / "README.md").write_text("---\nconfigs: []\n---\n# POPE of the hub")
    folder = lmm_layouts.pope(tmp_path / "pope")
    assert main(["data", str(folder), "--task", "pope", "--out", str(tmp_path / "data")]) == 2
    assert "Choose another --out" in capsys.readouterr().err
    assert [path.name for path in repository.iterdir()] == ["README.md"]


def test_the_task_is_named_or_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(tmp_path), "--out", str(tmp_path / "data")]) == 2
    assert "--task is required" in capsys.readouterr().err


def test_real_pope_questions_and_real_mmbench_rows(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = shared / "data", str(tmp_path / "data")
    photos = str(data / "coco_sugar_crepe")
    command = ["data", str(data / "pope"), "--task", "pope", "--images", photos, "--allow_missing", "--out", out]
    assert main(command) == 0
    assert "Left out: 8874 of 8910 questions have no image file" in capsys.readouterr().out
    (file,) = (tmp_path / "data").rglob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert len({row["image_source"] for row in rows}) == 2 and {row["category"] for row in rows} == {
        "random",
        "popular",
        "adversarial",
    }
    for name, language in (("mmbench", "en"), ("mmbench_cn", "cn")):
        assert LMM_TASKS[name].convert(data / "mmbench" / f"mmbench_sample_{language}.tsv", tmp_path / "data") == 20
        (file,) = (tmp_path / "data" / "lmms-lab-encoder" / "MMBench" / language).iterdir()
        rows = pyarrow.parquet.read_table(file).drop_columns("image").to_pylist()
        records = [LMM_TASKS[name].record(row, row["answer"], []) for row in rows]
        assert len({record.categories["l3"] for record in records}) == 20 and all(record.score for record in records)
        assert {record.categories["l1"] for record in records} == {"perception", "reasoning"}
