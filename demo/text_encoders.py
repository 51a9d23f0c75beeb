"""`bash scripts/demo_text_encoders.sh`: LIFT against every text side of the demo, CLIP beside it, in one table.

The text sides are the paper's ablation at this size: a sentence encoder and a causal LM, each as it is, centred and whitened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.chain import Stage, measure_encoder, pretrain, run_stages, stages
from demo.settings import RunSettings, TextEncodersSettings
from eval.output import format_table, percent
from eval.tasks.hard_negatives import SUBTASKS
from lift.common.files import read_json, write_text

ENCODERS = {"minilm": "MiniLM", "causal_lm": "small causal LM, mean-pooled"}
TRANSFORMS = {"none": "as it is", "centre": "centred", "whiten": "whitened"}


@dataclass(frozen=True)
class Row:
    label: str
    name: str
    """Folder of the run; its results lie in encoder_NAME."""
    changes: tuple[str, ...]
    """What differs from the demo's LIFT recipe; empty for the two runs that the demo itself makes."""


def compare_text_encoders(settings: TextEncodersSettings) -> None:
    """Trains what is missing and writes OUT/text_encoders.txt."""
    run_settings = RunSettings(out=settings.out, size=settings.size, seed=settings.seed)
    out = run_settings.folder
    rows = text_sides(out)
    run_stages(stages_of(rows, run_settings), out)
    results = [read_json(out / f"encoder_{row.name}" / "results.json")["metrics"] for row in rows]
    table = results_table([row.label for row in rows], results)
    write_text(out / "text_encoders.txt", table + "\n")
    print(f"\n{table}\n{out / 'text_encoders.txt'}")


def text_sides(out: Path) -> list[Row]:
    rows = [Row("CLIP, trained jointly", "clip", ())]
    for encoder, label in ENCODERS.items():
        for transform, how in TRANSFORMS.items():
            is_the_demos = (encoder, transform) == ("minilm", "none")
            name = "lift" if is_the_demos else f"lift_{encoder}_{transform}"
            changes = ["--out", str(out / name), "--text_transform.kind", transform]
            if encoder == "causal_lm":
                changes += ["--text_encoder.kind", encoder, "--text_encoder.path", str(out / "language_model")]
                changes += ["--embeddings", str(out / "embeddings_causal_lm")]
            rows.append(Row(f"LIFT, {label}, {how}", name, () if is_the_demos else tuple(changes)))
    return rows


def stages_of(rows: list[Row], settings: RunSettings) -> list[Stage]:
    """The demo's own stages up to both encoders' results, then a training and a measurement for every further row."""
    demo = stages(settings)
    last = max(number for number, stage in enumerate(demo) if stage.name.startswith("measure the"))
    chain = demo[: last + 1]
    for row in rows:
        if row.changes:
            chain += [pretrain(row.name, "lift", settings, *row.changes), measure_encoder(row.name, settings.folder)]
    return chain


def results_table(labels: list[str], results: list[dict[str, Any]]) -> str:
    """Accuracy on hard negatives by kind and image-to-text R@1, in percent."""
    header = ["text side", *(name.replace("_", " ") for name in SUBTASKS), "image to text R@1"]
    metrics = [*(f"sugarcrepe/{name}" for name in SUBTASKS), "retrieval/image_to_text_r1"]
    rows = [[label, *(percent(found[name]["value"]) for name in metrics)] for label, found in zip(labels, results, strict=True)]
    return format_table(header, rows)
