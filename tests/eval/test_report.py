"""The report's numbers, the paper's reading on cases worked out by hand, which flips are embedded, training runs, refusals."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from report_runs import CATEGORIES, answered, circular_question, thumbnail, write_run, yes_no_question
from toy_encoder import ToyEncoder, solid

from eval.__main__ import main
from eval.encoder import chosen_tasks, evaluate
from eval.report.command import json_block
from eval.report.flips import LONGEST_RESPONSE, Thumbnails, gallery, in_turn
from eval.report.reading import paper_reading
from eval.report.tables import ahead, amount, headline
from eval.report.training import CURVE_POINTS, read_training
from eval.settings import EncoderSettings, HardNegativeData
from lift.common.errors import UserError
from lift.common.files import read_json, write_json, write_jsonl

INSTANCE, RELATION, COARSE = "finegrained_perception (instance-level)", "relation_reasoning", "coarse_perception"


def _pair(folder: Path, thumbnails: bool = True) -> tuple[Path, Path]:
    """24 MMBench groups and 12 POPE rows: A misses groups 0 to 2 and row 0, B misses groups 2 to 8 and rows 1 and 2."""
    pictures = dict(thumbnail(seed) for seed in range(4))
    images = list(pictures)
    runs: dict[str, list] = {"a": [], "b": []}
    misses = {"a": ({0, 1, 2}, {0}), "b": ({2, 3, 4, 5, 6, 7, 8}, {1, 2})}
    for side, records in runs.items():
        for number in range(24):
            rows = circular_question(number, CATEGORIES[number % 8], [images[number % 4]], f"Which word fits {number}?")
            missed = number in misses[side][0]
            records += [answered(row, not (missed and row.rotation % 2)) for row in rows]
        for number in range(12):
            row = yes_no_question(number, [images[number % 4]], f"Is it there, {number}?")
            records.append(answered(row, number not in misses[side][1]))
    shown = pictures if thumbnails else None
    a, b = (write_run(folder / side, records, shown) for side, records in runs.items())
    return a, b


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with report.html, .json and .csv of the pair above, with encoders beside it."""
    folder = tmp_path_factory.mktemp("report")
    a, b = _pair(folder)
    for name in ("ea", "eb"):
        _measure_encoder(folder, name)
    stages = folder / "stages.json"
    write_json(stages, [{"stage": "world <b>", "seconds": 12.5, "peak_gb": 1.5, "reused": True}])
    arguments = [str(a), str(b), "--out", str(folder / "report.html"), "--resamples", "500", "--stages", str(stages)]
    assert main(["report", *arguments, "--encoder_a", str(folder / "ea"), "--encoder_b", str(folder / "eb")]) == 0
    return folder


def _measure_encoder(folder: Path, name: str) -> None:
    images = folder / "images"
    items = {str(i): {"filename": f"{c}.png", "caption": f"a {c} thing", "negative_caption": "a red blue thing"}
             for i, c in enumerate(("red", "green", "blue"))}  # fmt: skip
    for colour in ("red", "green", "blue"):
        solid(images / f"{colour}.png", colour)
    for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        write_json(folder / "items" / f"{kind}.json", items)
    data = HardNegativeData(path=folder / "items", images=images)
    settings = EncoderSettings(encoder=Path(name), tasks="sugarcrepe", out=folder / name, sugarcrepe=data)
    tasks = chosen_tasks(settings.tasks)
    found = {each: task.read(getattr(settings, task.settings), False) for each, task in tasks.items()}
    evaluate(ToyEncoder(name), settings, tasks, found, folder / name)  # type: ignore[arg-type]


def test_page_json_and_csv_hold_the_same_numbers(written: Path) -> None:
    page, numbers = (written / "report.html").read_text(encoding="utf-8"), read_json(written / "report.json")
    rows = numbers["comparison"]["rows"]
    with (written / "report.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lmm, encoder = ([row for row in table if row["part"] == part] for part in ("lmm", "encoder"))
    assert [float(row["difference"]) for row in lmm] == [row["difference"] for row in rows]
    assert [(row["task"], row["measure"], row["level"], row["name"]) for row in lmm] == [
        (row["task"], row["measure"], row["level"], row["name"]) for row in rows
    ]
    assert [float(row["low"]) if row["low"] else None for row in lmm] == [
        row["interval"] and row["interval"][0] for row in rows
    ]
    assert [row["measure"] for row in encoder] == [row["metric"].partition("/")[2] for row in numbers["encoders"]["rows"]]
    body = re.sub(r"<[^>]*>", " ", page.partition('id="overall"')[2].partition('id="flips"')[0])
    shown = set(re.findall(r"[−+]?[\d.]+", body))
    for row in rows:
        wanted = [amount(row[key], row["scale"]) for key in ("value_a", "value_b")]
        wanted.append(amount(row["difference"], row["scale"], signed=True))
        assert set(wanted) <= shown, row
    assert numbers["headline"] in page.replace("&#39;", "'")


def test_numbers_by_hand(written: Path) -> None:
    numbers = read_json(written / "report.json")
    overall = {row["task"]: row for row in numbers["comparison"]["rows"] if row["primary"] and row["level"] == "overall"}
    assert (overall["mmbench"]["value_a"], overall["mmbench"]["value_b"]) == (21 / 24, 17 / 24)
    assert (overall["mmbench"]["only_a"], overall["mmbench"]["only_b"]) == (6, 2)
    assert overall["pope"]["difference"] == pytest.approx(1 / 12)
    assert numbers["flips"] == {
        "total": 11, "embedded": 11, "left_out": 0, "total_a": 8, "total_b": 3, "without_image": 0
    }  # fmt: skip
    page = (written / "report.html").read_text(encoding="utf-8")
    assert "world &lt;b&gt;" in page and "12.5" in page


def test_several_runs_a_side_are_shown_one_by_one(written: Path, tmp_path: Path) -> None:
    a, b, out = str(written / "a"), str(written / "b"), tmp_path / "r.html"
    seeds = ["--more_a", str(b), "--more_b", str(a)]
    assert main(["report", a, b, "--out", str(out), "--resamples", "100", *seeds]) == 0
    page = out.read_text(encoding="utf-8")
    assert page.count("tell little about the spread between seeds") == 1 and "Welch&#39;s t over seeds" in page
    assert "87.50, 70.83" in page and "± 11.79" in page  # 21 and 17 of 24 groups; their standard deviation


def test_page_names_no_address_and_allows_none(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "unsafe-eval" not in page
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=", page.partition("<script>")[0])


def test_flips_without_thumbnails_and_a_smaller_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _pair(tmp_path, thumbnails=False)
    out = tmp_path / "r.html"
    assert main(["report", str(a), str(b), "--out", str(out), "--resamples", "100", "--flips", "4"]) == 0
    assert read_json(tmp_path / "r.json")["flips"] == {
        "total": 11, "embedded": 4, "left_out": 7, "total_a": 8, "total_b": 3, "without_image": 4
    }  # fmt: skip
    page = out.read_text(encoding="utf-8")
    assert "4 of 11 are on this page, 7 were left out" in page and "Of 4 questions the image is not available" in page
    arguments = ["report", str(a), str(b), "--out", str(out), "--resamples", "100", "--max_megabytes"]
    assert main([*arguments, "0.5"]) == 2
    assert "without any flips the page has" in capsys.readouterr().err
    size = out.stat().st_size / 1e6
    assert main([*arguments, f"{size + 0.002:.4f}"]) == 0
    assert out.stat().st_size <= (size + 0.002) * 1e6 and 0 < read_json(tmp_path / "r.json")["flips"]["left_out"] < 11


def test_flips_come_in_turn_from_every_category_and_direction() -> None:
    kinds = [("a", "x")] * 50 + [("b", "x")] * 3 + [("a", "y")] * 2
    flips = [
        {"task": "mmbench", "key": str(n), "right": right, "categories": {"l2": name}} for n, (right, name) in enumerate(kinds)
    ]
    order = [(flip["right"], flip["categories"]["l2"]) for flip in in_turn(flips)]
    assert order[:6] == [("a", "x"), ("b", "x"), ("a", "y")] * 2
    assert len(order) == len(flips) and order[-1] == ("a", "x")


def test_room_is_that_of_escaped_text(tmp_path: Path) -> None:
    flip = {"task": "gqa", "right": "a", "categories": {}, "question": "<" * 500, "options": {}, "answer": [], "images": []}
    flips = [flip | {"key": str(number), "passes": []} for number in range(20)]
    with Thumbnails([tmp_path], ["gqa"]) as thumbnails:
        shown = gallery(flips, thumbnails, None, 20_000)
    assert 0 < len(json_block(shown.flips)) <= 20_000 and len(shown.flips) < 20


def test_each_image_is_embedded_once_and_long_answers_are_cut(tmp_path: Path) -> None:
    pictures = dict(thumbnail(seed) for seed in range(2))
    images = list(pictures)
    (tmp_path / "mmbench").mkdir()
    with zipfile.ZipFile(tmp_path / "mmbench" / "thumbnails.zip", "w") as archive:
        archive.writestr(f"{images[0]}.jpg", pictures[images[0]])
    answers = {f"{name}_{side}": value for side in "ab" for name, value in (("prediction", None), ("correct", side == "a"))}
    single = {"options": {}, "answer": ["yes"], "response_a": "yes", "response_b": "x" * (LONGEST_RESPONSE + 7)} | answers
    flip = {
        "task": "mmbench",
        "right": "a",
        "categories": {},
        "question": "?",
        "options": {},
        "answer": ["yes"],
        "passes": [single],
    }
    flips = [flip | {"key": str(n), "images": [images[n % 2]]} for n in range(4)]
    with Thumbnails([tmp_path], ["mmbench"]) as thumbnails:
        shown = gallery(flips, thumbnails, None, 10**6)
    assert len(shown.images) == 1 and [card["images"] for card in shown.flips] == [[0], [None], [0], [None]]
    assert shown.counts["without_image"] == 2
    assert shown.flips[0]["passes"][0]["b"]["response"].endswith("x… [7 more characters]")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no zip", "found no readable zip"), ("text", "is no JPEG"), ("x" * (2 << 20), "expected a thumbnail")],
)
def test_damaged_thumbnails_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | str, message: str
) -> None:
    a, b = _pair(tmp_path)
    path = a / "mmbench" / "thumbnails.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        names = zipfile.ZipFile(path).namelist()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, content)
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "r.html"), "--resamples", "100"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def _comparison(counts: dict[str, tuple[int, int, int]], p_values: dict[str, float], seeds: Any = None) -> dict[str, Any]:
    rows = [
        {
            "task": "mmbench", "primary": True, "level": "l2", "name": name, "n": n, "difference": (a - b) / n,
            "interval": [(a - b) / n - 0.02, (a - b) / n + 0.02], "only_a": a, "only_b": b, "p_value": p_values.get(name, 1.0),
            "detectable": 0.05,
        }
        for name, (n, a, b) in counts.items()
    ]  # fmt: skip
    bootstrap = {"resamples": 4000, "seed": 0}
    return {"name_a": "LIFT", "tasks": {"mmbench": {}}, "rows": rows, "bootstrap": bootstrap, "seeds": seeds}


def test_the_papers_reading_by_hand() -> None:
    p = {INSTANCE: 0.001, RELATION: 0.04}
    clear = paper_reading(_comparison({INSTANCE: (300, 40, 5), RELATION: (100, 20, 4), COARSE: (300, 10, 10)}, p), "mmbench")
    assert clear["verdict"] == "supported"
    both, others = clear["rows"][2], clear["rows"][3]
    assert (both["n"], both["difference"], others["difference"]) == (400, 51 / 400, 0.0)
    assert clear["contrast"]["difference"] == 51 / 400
    # of independent groups: variance of the mean of -1, 0, 1, added over the two sides
    inside = (300 * (45 / 300 - (35 / 300) ** 2) + 100 * (24 / 100 - 0.16**2)) / 400**2
    deviation = (inside + 300 * (20 / 300) / 300**2) ** 0.5
    low, high = clear["contrast"]["interval"]
    assert (high - low) / 3.92 == pytest.approx(deviation, rel=0.05)
    assert clear["contrast"]["detectable"] == pytest.approx(2.8 * deviation, rel=0.05)
    assert [row["p_adjusted"] for row in clear["rows"][:2]] == pytest.approx([0.002, 0.04])

    everywhere = {INSTANCE: (300, 40, 5), RELATION: (100, 20, 4), COARSE: (300, 45, 5)}
    assert paper_reading(_comparison(everywhere, p), "mmbench")["verdict"] == "undecided"
    elsewhere = {INSTANCE: (300, 10, 10), RELATION: (100, 4, 4), COARSE: (300, 60, 5)}
    assert paper_reading(_comparison(elsewhere, {}), "mmbench")["verdict"] == "not supported"
    one_behind = {INSTANCE: (300, 60, 5), RELATION: (100, 2, 20), COARSE: (300, 10, 10)}
    assert paper_reading(_comparison(one_behind, p), "mmbench")["verdict"] == "not supported"
    unsure = paper_reading(_comparison({INSTANCE: (30, 3, 1), RELATION: (10, 2, 1), COARSE: (30, 1, 1)}, {}), "mmbench")
    assert unsure["verdict"] == "undecided" and "80 % power" in unsure["sentence"]
    nothing = paper_reading(_comparison({INSTANCE: (30, 3, 1), COARSE: (30, 1, 1)}, {}), "mmbench")
    assert (nothing["verdict"], nothing["sentence"]) == ("not testable", "These questions have no relation reasoning.")
    # few groups without a flip are no evidence of no gain, and equal runs no evidence of equality
    few = paper_reading(_comparison({INSTANCE: (2, 0, 0), RELATION: (2, 0, 0), COARSE: (20, 8, 0)}, {}), "mmbench")
    assert few["verdict"] == "undecided" and few["contrast"]["interval"][0] < -0.5 < 0 < few["contrast"]["interval"][1]
    equal = paper_reading(_comparison({INSTANCE: (30, 0, 0), RELATION: (30, 0, 0), COARSE: (30, 0, 0)}, {}), "mmbench")
    assert equal["contrast"]["interval"][0] < 0 < equal["contrast"]["interval"][1] and "80 % power" in equal["sentence"]
    several = _comparison({INSTANCE: (300, 40, 5), RELATION: (100, 20, 4), COARSE: (300, 10, 10)}, p, seeds={"runs_a": 3})
    found = paper_reading(several, "mmbench")
    assert found["rows"][2]["name"] == "both together" and found["rows"][2]["interval"] is None
    low, high = found["contrast"]["interval"]
    half = 0.02 * ((0.75**2 + 0.25**2) + 1) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_headline_and_ahead_say_what_the_test_allows() -> None:
    row = {"task": "gqa", "measure": "accuracy", "primary": True, "level": "overall", "name": "overall", "scale": "fraction"}
    row |= {"n": 1000, "value_a": 0.5, "value_b": 0.4, "difference": 0.1, "interval": [0.01, 0.2], "p_adjusted": None}
    names = {"name_a": "LIFT", "name_b": "CLIP"}
    assert "do not tell which" in headline(names | {"rows": [row | {"p_value": 0.06}]}), "the interval alone does not decide"
    assert "LIFT is ahead" in headline(names | {"rows": [row | {"p_value": 0.04}]})
    behind = row | {"task": "pope", "difference": -0.1, "interval": [-0.2, -0.01], "p_value": 0.04}
    text = headline(names | {"rows": [row | {"p_value": 0.5}, behind]})
    told = "LIFT is ahead on none of 2 benchmarks, CLIP on 1 (POPE); GQA does not tell."
    assert text == f"{told} Each is tested by itself at 5 %."
    unsure = [row | {"p_value": 0.5}, behind | {"p_value": 0.5}]
    told = "These questions do not tell LIFT and CLIP apart on any of 2 benchmarks (GQA, POPE)"
    assert headline(names | {"rows": unsure}) == f"{told}, each tested by itself at 5 %."
    assert ahead(row | {"p_value": None}) == "a" and ahead(row | {"p_value": 0.01, "p_adjusted": 0.2}) == "neither"


def test_json_block_cannot_be_left() -> None:
    texts = ["</script><script>alert(1)</script>", "<!-- <script>", "line\u2028break\u2029", "a & b", "\u0000\\u003c"]
    block = str(json_block(texts))
    assert json.loads(block) == texts and not re.search("[<>&\u2028\u2029]", block)


def test_training_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    pretraining, llava = tmp_path / "lift", tmp_path / "llava"
    rows = [{"step": s, "loss": 10 / s, "mfu": 0.25} for s in range(1, 2 * CURVE_POINTS + 1)]
    write_jsonl(pretraining / "metrics.jsonl", [*rows, {"step": 800, "validation_loss": 0.5}])
    write_json(pretraining / "finished.json", {"steps": 800, "samples": 1600, "dropped": {}, "seconds": 90.0})
    for name, trainable in (("stage1", "projector"), ("stage2", "projector_and_llm")):
        last = {"step": 4, "train_runtime": 1.0, "total_flos": 3e9}
        write_jsonl(llava / name / "metrics.jsonl", [{"step": 1, "supervised_tokens": 9}, {"step": 4, "loss": 2.5}, last])
        settings = {"trainable": trainable, "batch_size": 8, "gradient_accumulation": 2}
        write_json(llava / name / "train.json", {"settings": settings, "processes": 2, "steps": 4, "seconds": 5.0})
    runs = read_training([pretraining, llava])
    assert [run["stage"] for run in runs] == ["pretraining", "LLaVA stage 1", "LLaVA stage 2"]
    assert len(runs[0]["curve"]["step"]) == CURVE_POINTS and runs[0]["curve"]["loss"][0] == (10 + 5) / 2
    assert (runs[0]["mfu"], runs[0]["validation"]) == (0.25, {"step": [800.0], "loss": [0.5]})
    assert (runs[1]["samples"], runs[1]["flops"], runs[1]["curve"]) == (128, 3e9, {"step": [4.0], "loss": [2.5]})
    with pytest.raises(UserError, match=r"found no metrics\.jsonl"):
        read_training([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "report.txt"], "ends in .html"),
        (["--encoder_a", "x"], "give both or neither"),
        (["--flips", "-1"], "--flips"),
        (["--max_megabytes", "0"], "--max_megabytes"),
        (["--name_a", "CLIP"], "two different names"),
        (["--training_a", "[nowhere]"], "there is no such folder"),
    ],
)
def test_bad_options_are_named(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["--out", str(tmp_path / "r.html"), "--resamples", "100", *options]
    assert main(["report", str(written / "a"), str(written / "b"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_stages_of_another_form_are_refused(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "stages.json", [{"stage": "world"}])
    arguments = ["--out", str(tmp_path / "r.html"), "--resamples", "100", "--stages", str(tmp_path / "stages.json")]
    assert main(["report", str(written / "a"), str(written / "b"), *arguments]) == 2
    assert "expected a list of" in capsys.readouterr().err
