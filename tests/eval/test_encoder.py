"""`lift-eval encoder` and `lift-eval compare` from end to end on features that can be worked out by hand."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_official import WIDTH, lift_state, run_import, save
from torch.nn import functional as F
from toy_encoder import ToyEncoder, solid

from eval.__main__ import main
from eval.encoder import chosen_tasks, default_out, evaluate
from eval.encoders import open_encoder
from eval.features import Features
from eval.images import image_item
from eval.settings import EncoderSettings, HardNegativeData, RetrievalData
from lift.common.errors import UserError
from lift.common.files import read_json
from lift.encoder import load_encoder
from lift.settings import TextEncoderSettings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three SugarCrepe items (right, wrong, tie) and four captioned images, two of which are the same picture."""
    for name, colour in (("red", "red"), ("green", "green"), ("blue", "blue"), ("again", "blue")):
        solid(tmp_path / "images" / f"{name}.png", colour)
    items = {
        "0": {"filename": "red.png", "caption": "a red thing", "negative_caption": "a green thing"},
        "1": {"filename": "green.png", "caption": "a blue thing", "negative_caption": "a green thing"},
        "2": {"filename": "blue.png", "caption": "a red thing", "negative_caption": "a green thing"},
    }
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "swap_att.json").write_text(json.dumps(items))
    captions = {"red": ["red", "very red"], "green": ["blue", "green"], "blue": ["blue"], "again": ["so blue"]}
    rows = [
        {"imgid": name, "filename": f"{name}.png", "split": "test", "sentences": [{"raw": text} for text in texts]}
        for name, texts in captions.items()
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": rows}))
    return tmp_path


def settings(data: Path, **changes: Any) -> EncoderSettings:
    values: dict[str, Any] = {
        "encoder": "toy",
        "tasks": "sugarcrepe,retrieval",
        "out": data / "out",
        "sugarcrepe": HardNegativeData(path=data / "items", images=data / "images"),
        "retrieval": RetrievalData(path=data / "captions.json", images=data / "images"),
    }
    return EncoderSettings(**values | changes)


def measure(data: Path, model: ToyEncoder, **changes: Any) -> dict[str, Any]:
    chosen = settings(data, **changes)
    tasks = chosen_tasks(chosen.tasks)
    found = {name: task.read(getattr(chosen, task.settings), chosen.allow_missing) for name, task in tasks.items()}
    assert chosen.out is not None
    return evaluate(model, chosen, tasks, found, chosen.out)  # type: ignore[arg-type]


def test_results_and_records_by_hand(data: Path) -> None:
    results = measure(data, ToyEncoder())
    metrics = results["metrics"]
    assert (metrics["sugarcrepe/swap_att"]["value"], metrics["sugarcrepe/swap_att"]["ties"]) == (0.5, 1)
    values = {name.removeprefix("retrieval/"): metric["value"] for name, metric in metrics.items() if "retrieval" in name}
    # "blue" belongs to the green picture and to the blue one, and the two blue pictures are one: nothing of that is wrong
    assert values["image_to_text_r1"] == 1.0 and values["image_to_text_median_rank"] == 1.0
    # of six captions only "blue" of the green picture, one text with that of the blue picture, could go astray; it does not
    assert values["text_to_image_r1"] == 1.0 and metrics["retrieval/text_to_image_r1"]["n"] == 6
    # first captions by position: red-red; green has "blue"; the two blue pictures have equal captions, which are ties
    assert (values["image_to_text_first_r1"], values["text_to_image_first_r1"]) == (0.25, 0.25)
    assert read_json(data / "out" / "results.json") == results
    assert results["tasks"]["retrieval"]["notes"]["repeated_images"] == 1
    assert {"encoder", "encoder_hash", "protocol", "data_hash", "environment"} <= results.keys()
    records = pq.read_table(data / "out" / "records.parquet").to_pylist()
    first = next(row for row in records if row["task"] == "sugarcrepe" and row["id"] == "0")
    assert (first["scores"], first["correct"], first["tie"]) == ([1.0, 0.0], 1.0, False)
    assert [row["correct"] for row in records if row["task"] == "sugarcrepe"] == [1.0, 0.0, 0.5]


def test_official_protocol_sees_first_captions_only_and_ties_are_wrong(data: Path) -> None:
    solid(data / "images" / "red.png", "red", mode="L")  # the official SugarCrepe script fails on grey images
    model = ToyEncoder(has_frozen_text=True)
    metrics = measure(data, model, protocol="official")["metrics"]
    assert metrics["sugarcrepe/swap_att"]["value"] == 0.0
    assert {name for name in metrics if "retrieval" in name} == {
        "retrieval/image_to_text_first_r1",
        "retrieval/text_to_image_first_r1",
    }


def test_every_distinct_image_and_text_is_encoded_once_and_never_again(data: Path) -> None:
    model = ToyEncoder()
    measure(data, model)
    assert model.seen.pop("images") == 3
    assert set(model.seen.values()) == {1} and "a red thing" in model.seen
    again, results = ToyEncoder(), read_json(data / "out" / "results.json")
    assert measure(data, again, out=data / "again")["metrics"] == results["metrics"] and not again.seen
    written = (data / "out" / "results.json").stat().st_mtime_ns
    assert measure(data, again) == results and (data / "out" / "results.json").stat().st_mtime_ns == written
    # another image encoder aligned to the same text encoder shares its texts
    sibling = ToyEncoder("sibling")
    sibling.text_hash = model.text_hash
    measure(data, sibling, out=data / "sibling")
    assert set(sibling.seen) == {"images"}


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    items = [image_item(solid(tmp_path / f"{i}.png", (20 * i, 0, 99))) for i in range(12)]

    class Stops(ToyEncoder):
        def image_embeddings(self, pixel_values_B3HW: torch.Tensor) -> torch.Tensor:
            if self.seen["images"] == 8:
                raise KeyboardInterrupt
            return super().image_embeddings(pixel_values_B3HW)

    with pytest.raises(KeyboardInterrupt):
        Features(Stops(), batch_size=2).images(items)  # type: ignore[arg-type]
    rest, whole = ToyEncoder(), ToyEncoder("other")
    resumed_ND = Features(rest, batch_size=2).images(items)  # type: ignore[arg-type]
    assert rest.seen["images"] == 4
    assert np.array_equal(resumed_ND, Features(whole, batch_size=5).images(items))  # type: ignore[arg-type]


def test_damaged_cache_file_is_made_again(data: Path, cache: Path) -> None:
    measure(data, ToyEncoder())
    for file in (cache / "features").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    again = ToyEncoder()
    measure(data, again, out=data / "again")
    assert again.seen["images"] == 3


def test_killed_run_loses_what_was_not_yet_written(tmp_path: Path, cache: Path) -> None:
    """A process that kills itself in the middle, which runs no cleaning up; writing is due after every batch."""
    script = f"""
import os, signal
import eval.features as features
from toy_encoder import ToyEncoder, solid
from pathlib import Path
from eval.images import image_item
features.WRITE_SECONDS = 0
class Dies(ToyEncoder):
    def image_embeddings(self, pixels):
        if self.seen["images"] == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image_embeddings(pixels)
items = [image_item(solid(Path({str(tmp_path)!r}) / f"{{i}}.png", (20 * i, 0, 99))) for i in range(12)]
features.Features(Dies(), batch_size=2).images(items)
"""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == -signal.SIGKILL
    rest = ToyEncoder()
    Features(rest, batch_size=2).images([image_item(tmp_path / f"{i}.png") for i in range(12)])  # type: ignore[arg-type]
    assert rest.seen["images"] == 4


def test_features_that_are_not_finite_are_an_error(data: Path) -> None:
    with pytest.raises(UserError, match="toy: gives features that are not finite for the captions"):
        measure(data, ToyEncoder(scale=float("nan")))
    assert not (data / "out").exists()


def test_text_features_of_another_dimension_are_an_error(data: Path) -> None:
    class Wide(ToyEncoder):
        embedding_dim = 5

    with pytest.raises(UserError, match="toy: expected texts of 5 dimensions, as its images have, found 3"):
        measure(data, Wide())


def test_missing_images_are_an_error_or_counted(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("eval.encoders.open_encoder", lambda name: ToyEncoder(name))
    (data / "images" / "green.png").unlink()
    arguments = ["encoder", "toy", "--tasks", "sugarcrepe", "--out", str(data / "out")]
    arguments += ["--sugarcrepe.path", str(data / "items"), "--sugarcrepe.images", str(data / "images")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "green.png: expected the image of swap_att/1" in error and "--allow_missing" in error
    assert main([*arguments, "--allow_missing"]) == 0
    printed = capsys.readouterr().out
    assert "sugarcrepe: 1 left out, their images are missing: swap_att/1. The table is over the rest." in printed
    assert next(line for line in printed.splitlines() if line.startswith("sugarcrepe/all")).split()[1:3] == ["2", "75.00"]
    assert read_json(data / "out" / "results.json")["tasks"]["sugarcrepe"]["missing"] == ["swap_att/1"]


def test_unknown_tasks_and_other_folders_are_refused(data: Path, capsys: Any) -> None:
    assert main(["encoder", "toy", "--tasks", "sugarcrep"]) == 2
    assert "unknown task 'sugarcrep'. Did you mean 'sugarcrepe'?" in capsys.readouterr().err
    assert main(["encoder", "toy", "--tasks", "coco,coco"]) == 2
    assert main(["encoder", "toy", "--out", str(data / "images")]) == 2
    assert "expected a new folder or an earlier result" in capsys.readouterr().err
    assert main(["encoder", "toy"]) == 2
    assert "--sugarcrepe.path is required" in capsys.readouterr().err


def test_default_out_names_the_run() -> None:
    names = {
        "runs/demo/lift/encoder": "lift-encoder",
        "openai/clip-vit-base-patch16": "openai-clip-vit-base-patch16",
        "open_clip:ViT-B-16:datacomp_xl": "ViT-B-16-datacomp_xl",
        "/": "encoder",
    }
    for encoder, name in names.items():
        assert default_out(EncoderSettings(encoder=encoder)) == Path("runs/eval") / name / "sugarcrepe"
    settings = EncoderSettings(encoder="a/b", protocol="official", tasks="knn, coco")
    assert default_out(settings) == Path("runs/eval/a-b-official/knn+coco")


class Backwards(ToyEncoder):
    """Takes red for blue and blue for red."""

    def image_embeddings(self, pixel_values_B3HW: torch.Tensor) -> torch.Tensor:
        return super().image_embeddings(pixel_values_B3HW).flip(1)


def test_two_encoders_compare_in_pairs(data: Path, capsys: Any) -> None:
    measure(data, ToyEncoder("a"), out=data / "a")
    measure(data, Backwards("b"), out=data / "b")
    assert main(["compare", str(data / "a"), str(data / "b"), "--out", str(data / "c"), "--resamples", "2000"]) == 0
    assert "retrieval/image_to_text_r1" in capsys.readouterr().out
    rows = {row["metric"]: row for row in read_json(data / "c" / "comparison.json")["rows"]}
    row = rows["sugarcrepe/swap_att"]
    # A is right, wrong, tied; B sees the red picture as blue and the blue one as red: tied, wrong, right
    assert (row["value_a"], row["value_b"], row["difference"]) == (0.5, 0.5, 0.0)
    assert (row["only_a"], row["only_b"], row["p_value"]) == (1, 1, 1.0)
    row = rows["retrieval/image_to_text_r1"]
    assert (row["value_a"], row["value_b"], row["only_a"], row["only_b"]) == (1.0, 0.25, 3, 0)
    assert row["p_value"] == pytest.approx(2 * 0.5**3) and row["p_holm"] >= row["p_value"]
    assert row["interval"] is None, "four items are too few"
    median = rows["retrieval/image_to_text_median_rank"]
    assert median["p_value"] is None and median["difference"] < 0
    with (data / "c" / "comparison.csv").open(newline="") as file:
        assert [float(row["difference"]) for row in csv.DictReader(file)] == [row["difference"] for row in rows.values()]


def test_interval_of_a_paired_difference_covers() -> None:
    from eval.compare_encoders import paired_difference
    from eval.measures import Measure, Record, outcomes, records_table

    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        hard = rng.uniform(-0.2, 0.2, 50)
        sides = []
        for accuracy in (0.7, 0.6):
            right = rng.random((50, 3)) < accuracy + hard[:, None]
            rows = [Record("s", f"{i}#{j}", [], float(right[i, j]), str(i)) for i in range(50) for j in range(3)]
            sides.append(outcomes(records_table("t", rows), Measure("all")))
        low, high = paired_difference(*sides, False, 400, 1)["interval"]
        inside += low <= 0.1 <= high
    assert 0.9 <= inside / 200 <= 0.99


def test_unlike_results_are_refused(data: Path, capsys: Any) -> None:
    measure(data, ToyEncoder("a"), out=data / "a")
    measure(data, ToyEncoder("b"), out=data / "official", protocol="official")
    (data / "images" / "red.png").write_bytes((data / "images" / "green.png").read_bytes())
    measure(data, ToyEncoder("b"), out=data / "b")
    measure(data, ToyEncoder("b"), out=data / "other", tasks="retrieval")
    for other, message in (("b", "sugarcrepe was measured on other data"), ("official", "expected one protocol")):
        assert main(["compare", str(data / "a"), str(data / other), "--out", str(data / "c")]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(data / "a"), str(data / "nowhere"), "--out", str(data / "c")]) == 2
    assert "nowhere: expected a folder of lift-eval encoder or lift-eval lmm" in capsys.readouterr().err
    changed = read_json(data / "b" / "results.json")
    changed["settings"]["sugarcrepe"]["strength"] = 2
    (data / "set").mkdir()
    for name, value in (("set", changed), ("bad", [])):
        (data / name).mkdir(exist_ok=True)
        (data / name / "results.json").write_text(json.dumps(value))
    for other, message in (
        ("set", "sugarcrepe was measured with strength 2 and None"),
        ("bad", "expected results of lift-eval"),
    ):
        assert main(["compare", str(data / other), str(data / "b"), "--out", str(data / "c")]) == 2
        assert message in capsys.readouterr().err
    (data / "lmm").mkdir()
    assert main(["compare", str(data / "a"), str(data / "lmm"), "--out", str(data / "c")]) == 2
    assert "found one of each" in capsys.readouterr().err
    (data / "b" / "records.parquet").write_bytes(b"no")
    assert main(["compare", str(data / "b"), str(data / "b"), "--out", str(data / "c")]) == 2
    assert "expected the records" in capsys.readouterr().err and not (data / "c").exists()


def test_official_features_are_those_of_the_published_code(shared: Path, tmp_path: Path) -> None:
    """From image files through decoding, preprocessing, encoder and cache."""
    official = shared / "fixtures" / "official_lift_tiny"
    folder = run_import(official / "epoch_1.pt", tmp_path / "encoder", model_config=official / "LIFT-tiny.json")
    names = json.loads((official / "images" / "order.json").read_text())
    items = [image_item(official / "images" / f"{name}.png") for name in names]
    found_ND = Features(open_encoder(str(folder)), "official").images(items)
    np.testing.assert_allclose(found_ND, np.load(official / "emb_norm.npy"), atol=1e-5, rtol=0)


def test_official_sugarcrepe_is_the_scripts_loop(tiny_llm: Path, data: Path) -> None:
    """An imported LIFT checkpoint aligned to a causal LM: each item as the published script takes it, one after the other."""
    torch.manual_seed(0)
    text = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm), max_length=77, precision="fp32")
    state = lift_state()
    state["visual.conv1.weight"], state["visual.positional_embedding"] = (
        torch.randn(WIDTH, 3, 32, 32) * 0.1,
        torch.randn(50, WIDTH),
    )
    for layer, columns in (("0", WIDTH), ("2", 32)):
        state[f"mlp_projector.projector.{layer}.weight"] = torch.randn(32, columns)
        state[f"mlp_projector.projector.{layer}.bias"] = torch.randn(32)
    folder = run_import(save(data / "c.pt", state), data / "encoder", text_encoder=text)
    encoder = load_encoder(folder)
    rng = np.random.default_rng(0)
    words = ["dog", "cat", "red", "bench", "two", "under", "a", "the"]
    items = {}
    for number in range(60):
        name = f"{number % 20}.png"
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if number % 20 == 3 else "RGB").save(data / "images" / name)
        first, second = (" ".join(rng.choice(words, 6)) for _ in range(2))
        items[str(number)] = {"filename": name, "caption": first, "negative_caption": second}
    (data / "items" / "swap_att.json").write_text(json.dumps(items))

    def script_is_right(item: dict[str, str]) -> bool:
        image = Image.open(data / "images" / item["filename"])
        if image.mode != "RGB":
            return False  # normalising one channel by three means fails there, and what fails is counted as wrong
        pixels = encoder.pixel_values(image, "official")[None]
        feature_D = F.normalize(encoder.image_embeddings(pixels), dim=-1)[0].half()
        scores = [
            torch.from_numpy(encoder.text_embeddings([item[key]]))[0].half() @ feature_D
            for key in ("caption", "negative_caption")
        ]
        return scores[0].item() > scores[1].item()

    expected = {number: script_is_right(item) for number, item in items.items()}
    settings = EncoderSettings(
        encoder=str(folder),
        protocol="official",
        sugarcrepe=HardNegativeData(path=data / "items", images=data / "images"),
        out=data / "out",
    )
    tasks = chosen_tasks("sugarcrepe")
    found = {"sugarcrepe": tasks["sugarcrepe"].read(settings.sugarcrepe, False)}
    results = evaluate(open_encoder(str(folder)), settings, tasks, found, data / "out")
    records = pq.read_table(data / "out" / "records.parquet").to_pylist()
    assert {row["id"]: bool(row["correct"]) for row in records} == expected
    assert results["metrics"]["sugarcrepe/all"]["value"] == pytest.approx(np.mean(list(expected.values())))
    assert 0.2 < np.mean(list(expected.values())) < 0.8
