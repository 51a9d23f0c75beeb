"""Every benchmark's published layout, converted, is what lmms-eval's own task loads; and our scores are that task's scores."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import lmm_layouts
import pytest
from PIL import Image
from tiny import encoded, noise_image

from eval.__main__ import main
from eval.lmm.tasks import LMM_TASKS, image_hash
from eval.records import Record, read_records, write_records
from eval.settings.lmm import LmmTaskName

SCIENCE = {"subject": "natural science", "topic": "physics", "category": "Magnets"}
RESPONSES = (
    "A",
    "B.",
    "b",
    " C. both of them",
    "(D)",
    "D)",
    "The answer is B.",
    "a.",
    "E",
    "Yes",
    "yes.",
    "No, there is not",
    "y",
    "not sure",
    "NO",
    "no!",
    "Girl.",
    "t shirt",
    "T-shirt",
    "Dakota",
    "the dakota",
    "12:30.",
    "2",
    "two",
    "nous les gosses",
    "",
    "  ",
    "None",
    "it is\nB",
)
"""Right, wrong and odd ones for each benchmark; each is given to every row of every task."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, mmbench: SimpleNamespace) -> Path:
    """One data folder with all ten benchmarks, each added by a call of its own."""
    published, folder = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("data") / "data"
    tsv = lmm_layouts.mmbench(published / "mmbench", mmbench.rows())
    sources = {"mmbench": tsv, "mmbench_cn": tsv, "scienceqa_img": lmm_layouts.scienceqa(published / "scienceqa_img")}
    for name in LMM_TASKS.keys() - sources.keys():
        sources[name] = getattr(lmm_layouts, name)(published / name)
    for name, source in sources.items():
        assert main(["data", str(source), "--task", name, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def lmms_tasks(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """lmms-eval's own task objects, loaded from `out` without a network; name of ours -> task."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = tmp_path_factory.mktemp("datasets_cache")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        patch.chdir(out)
        import datasets.config
        import lmms_eval.tasks

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        folder = Path(lmms_eval.tasks.__file__).parent
        names = ("mmbench", "gqa", "pope", "mme", "seedbench", "textvqa", "ai2d", "scienceqa")
        manager = lmms_eval.tasks.TaskManager(
            include_path=[f"{folder}/{name}" for name in names], include_defaults=False, model_name="lift_llava"
        )
        loaded = lmms_eval.tasks.get_task_dict([task.lmms_task for task in LMM_TASKS.values()], manager, "chat")
        yield {name: loaded[task.lmms_task] for name, task in LMM_TASKS.items()}


def rows(task: Any) -> list[tuple[dict[str, Any], list[Any]]]:
    """(row without images, its images) as lmms-eval's task holds them."""
    without = task.eval_docs_no_media
    return [(dict(without[place]), task.doc_to_visual(doc)) for place, doc in enumerate(task.eval_docs)]


def records(name: str, task: Any, response: str) -> list[Record]:
    return [LMM_TASKS[name].record(doc, response, [image_hash(image) for image in images]) for doc, images in rows(task)]


def scores_of_lmms_eval(name: str, task: Any, response: str) -> list[float]:
    """As lmms-eval's evaluator scores: the task's filters on all instances, then `process_results` of each row."""
    from lmms_eval.api.instance import Instance

    docs = [doc for doc, _ in rows(task)]
    task._instances = []
    for place, doc in enumerate(docs):
        metadata = {"task": task.config.task, "doc_id": place, "repeats": 1}
        instance = Instance("generate_until", (), 0, metadata=metadata)
        instance.doc = doc
        instance.resps.append(response)
        task._instances.append(instance)
    task.apply_filters()
    (key,) = task._instances[0].filtered_resps
    results = [
        task.process_results(doc, [instance.filtered_resps[key]]) for doc, instance in zip(docs, task._instances, strict=True)
    ]
    return [score_in(name, result) for result in results]


def score_in(name: str, result: Mapping[str, Any]) -> float:
    if name in ("pope", "mme"):
        return float(next(iter(result.values()))["score"])
    if name == "seedbench":
        return float(result["seed_image"]["pred"].lower().strip() == result["seed_image"]["answer"].lower().strip())
    return float(result["exact_match"])


@pytest.mark.parametrize("name", [name for name in LMM_TASKS if not name.startswith("mmbench")])
def test_scores_are_those_of_lmms_eval(lmms_tasks: dict[str, Any], name: str) -> None:
    task = lmms_tasks[name]
    seen = set()
    for response in RESPONSES:
        ours = [record.score for record in records(name, task, response)]
        assert ours == pytest.approx(scores_of_lmms_eval(name, task, response)), response
        seen |= set(ours)
    assert {0, 1} <= seen


def test_mmbench_is_scored_by_exact_matching(lmms_tasks: dict[str, Any]) -> None:
    for name in ("mmbench", "mmbench_cn"):
        right = {record.key: record for record in records(name, lmms_tasks[name], "The answer is A.")}
        assert {key for key, record in right.items() if record.score} == {"1", "2", "3", "4"}  # the first passes
        assert {record.prediction for record in right.values()} == {"A"}
        assert all(record.prediction is None and not record.score for record in records(name, lmms_tasks[name], "A or B"))


@pytest.mark.parametrize("name", list(LMM_TASKS))
def test_rows_become_questions_with_images_and_records(lmms_tasks: dict[str, Any], tmp_path: Path, name: str) -> None:
    task, table = lmms_tasks[name], records(name, lmms_tasks[name], "A")
    write_records(tmp_path / "records.jsonl", table)
    assert read_records(tmp_path / "records.jsonl") == table  # keys are unique, values are JSON
    for (doc, images), whole, record in zip(rows(task), task.eval_docs, table, strict=True):
        (message,) = task.doc_to_messages(whole)
        asked = message["content"][-1]["text"]
        assert len(images) == len(record.images) == len(message["content"]) - 1
        assert all(option in asked for option in record.options.values())
        assert "nan" not in asked and "None\n" not in asked.replace("A. None\n", "").replace("B. None\n", "")
        assert LMM_TASKS[name].letters(doc) == list(record.options)
        assert record.task == name and (not record.options or record.answer[0] in record.options)


@pytest.mark.parametrize(
    ("name", "place", "key", "group", "categories"),
    [
        (
            "mmbench",
            1,
            "1000001",
            "1",
            {"l1": "perception", "l2": "finegrained_perception (instance-level)", "l3": "attribute_recognition"},
        ),
        ("gqa", 0, "201307251", "n161313", {"structural": "query", "semantic": "attr", "detailed": "weatherVerify"}),
        ("pope", 8, "adversarial/3", "COCO_val2014_000000210789", {"split": "adversarial"}),
        ("mme", 19, "OCR/0001.png 4a3acbf2", "OCR/0001.png", {"type": "Perception", "subtask": "OCR"}),
        ("mme", 27, None, "code_reasoning/0001.png", {"type": "Cognition", "subtask": "code_reasoning"}),
        ("seedbench", 0, "101669", "1454426_101669", {"data_type": "image", "question_type": "Instances Counting"}),
        ("textvqa", 1, "34603", "003a8ae2ef43b901", {}),
        ("ai2d", 1, "0.png-1", "0.png", {"category": "partsOfA"}),
        ("scienceqa", 0, "4", "4", SCIENCE | {"modality": "text", "grade": "G7-12"}),
        ("scienceqa", 1, "5", None, SCIENCE | {"modality": "image and text", "grade": "G1-6"}),
        ("scienceqa", 2, "11", "11", SCIENCE | {"modality": "no context", "grade": "G1-6"}),
        ("scienceqa_img", 1, "13", None, SCIENCE | {"modality": "image", "grade": "G1-6"}),
    ],
)
def test_keys_groups_and_categories(
    lmms_tasks: dict[str, Any], name: str, place: int, key: str | None, group: str | None, categories: dict[str, str]
) -> None:
    record = records(name, lmms_tasks[name], "x")[place]
    assert record.key == (key or record.key) and record.group == (group or record.images[0])
    assert record.categories == categories


@pytest.mark.parametrize(("name", "ours"), [("ai2d", {"question_id", "category"}), ("scienceqa", {"id"})])
def test_rows_of_the_hub_lack_our_columns(lmms_tasks: dict[str, Any], name: str, ours: set[str]) -> None:
    table = []
    for doc, images in rows(lmms_tasks[name]):
        hub = {column: value for column, value in doc.items() if column not in ours}
        table.append(LMM_TASKS[name].record(hub, "A", [image_hash(image) for image in images]))
    assert len({record.key for record in table}) == len(table)
    assert [record.score for record in table] == [record.score for record in records(name, lmms_tasks[name], "A")]


def test_images_of_ai2d_carry_the_letters_that_are_asked_for(lmms_tasks: dict[str, Any]) -> None:
    named, plain = (record.images[0] for record in records("ai2d", lmms_tasks["ai2d"], "A"))
    assert named == image_hash(noise_image(61)) and plain == image_hash(noise_image(60))


def test_image_hash_is_of_the_pixels() -> None:
    picture = noise_image(3)
    assert (
        image_hash(picture)
        == image_hash(Image.open(io.BytesIO(encoded(picture, "bmp"))))
        == image_hash(picture.convert("RGBA"))
    )
    assert image_hash(picture) != image_hash(picture.transpose(Image.Transpose.ROTATE_90))
    assert image_hash(Image.new("RGB", (2, 3))) != image_hash(Image.new("RGB", (3, 2)))


def test_names_of_the_settings_are_those_of_the_table() -> None:
    assert list(get_args(LmmTaskName)) == list(LMM_TASKS)
