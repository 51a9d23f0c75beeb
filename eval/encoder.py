"""`lift-eval encoder`: an image-text encoder comes in; the measures of the chosen benchmarks and every item's scores go out."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval.features import Features
from eval.measures import measured, records_table
from eval.output import format_table, percent
from eval.settings import EncoderSettings
from eval.tasks import TASKS, Task, TaskData, load_task
from lift.common.environment import describe_environment
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, write_json
from lift.common.settings import nearest, to_plain

if TYPE_CHECKING:
    from eval.encoders import ImageTextEncoder

RESULTS, RECORDS_FILE = "results.json", "records.parquet"


def encoder(settings: EncoderSettings) -> None:
    """Command `lift-eval encoder`."""
    tasks = chosen_tasks(settings.tasks)
    out = settings.out or default_out(settings)
    check_output_folder(out, RESULTS)
    data = {name: task.read(getattr(settings, task.settings), settings.allow_missing) for name, task in tasks.items()}
    from eval.encoders import open_encoder  # after the data: a mistyped path is answered before a model is loaded

    model = open_encoder(settings.encoder)
    results = evaluate(model, settings, tasks, data, out)
    print(results_table(results))
    for name, found in data.items():
        if found.missing:
            shown = ", ".join(found.missing[:3]) + (", ..." if len(found.missing) > 3 else "")
            print(f"{name}: {len(found.missing)} left out, their images are missing: {shown}. The table is over the rest.")
    print(f"{out}: {RESULTS}, {RECORDS_FILE}")


def chosen_tasks(names: str) -> dict[str, Task]:
    """The tasks by their names."""
    return {name: load_task(name) for name in chosen_names(names)}


def chosen_names(names: str) -> list[str]:
    """Raises UserError naming the nearest task for an unknown name, and for none or one given twice."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"--tasks: expected different names separated by commas, found '{names}'.")
    for name in chosen:
        if name not in TASKS:
            raise UserError(f"--tasks: unknown task '{name}'. {nearest(name, list(TASKS))}")
    return chosen


def default_out(settings: EncoderSettings) -> Path:
    """runs/eval, a name made of the last two parts of the encoder's, so that `RUN/encoder` says which run, and the tasks."""
    parts = re.split(r"[/:]+", settings.encoder.strip("/"))[-2:]
    name = re.sub(r"[^\w.-]+", "_", "-".join(parts)).strip(".-_") or "encoder"
    name = name if settings.protocol == "standard" else f"{name}-{settings.protocol}"
    return Path("runs/eval") / name / "+".join(chosen_names(settings.tasks))


def evaluate(
    model: ImageTextEncoder, settings: EncoderSettings, tasks: dict[str, Task], data: dict[str, TaskData], out: Path
) -> dict[str, Any]:
    """Writes `out` (`results.json`, `records.parquet`) and returns the results.

    Features are kept on disk (see `eval.features`), so that an interrupted run goes on. Results of the same encoder, data and
    settings that are there already are returned as they are.

    Raises:
        UserError: an image that cannot be decoded, or an encoder whose features are not finite.
    """
    made_from = {
        "encoder": model.name,
        "encoder_hash": model.content_hash,
        "protocol": settings.protocol,
        "data_hash": {name: data[name].data_hash for name in tasks},
        "settings": {name: to_plain(getattr(settings, task.settings)) for name, task in tasks.items()},
    }
    earlier = earlier_results(out)
    if earlier.items() >= made_from.items():
        print(f"{out}: reused, results of the same encoder on the same data.")
        return earlier
    if settings.out is None and earlier.get("encoder_hash", model.content_hash) != model.content_hash:
        raise UserError(f"{out}: holds results of another encoder of that name. Give --out.")
    features = Features(model, settings.protocol, settings.batch_size, settings.workers)
    tables: list[pa.Table] = []
    metrics: dict[str, Any] = {}
    of_tasks: dict[str, Any] = {}
    for name, task in tasks.items():
        start = time.monotonic()
        scored = task.score(data[name], features)
        table = records_table(name, scored.records)
        metrics |= {f"{name}/{measure.name}": measured(table, measure) for measure in scored.measures}
        of_tasks[name] = {"missing": data[name].missing, "notes": data[name].notes, "details": scored.details}
        of_tasks[name] |= {"seconds": round(time.monotonic() - start, 1)}
        tables.append(table)
    results = made_from | {"metrics": metrics, "tasks": of_tasks, "environment": describe_environment()}
    with atomic_folder(out) as work:
        pq.write_table(pa.concat_tables(tables), work / RECORDS_FILE)
        write_json(work / RESULTS, results)
    return results


def earlier_results(out: Path) -> dict[str, Any]:
    """What an earlier run left in `out`; nothing when it is damaged, since it is then made again."""
    if not (out / RECORDS_FILE).is_file():
        return {}
    try:
        earlier = read_json(out / RESULTS)
    except UserError:
        return {}
    return earlier if isinstance(earlier, dict) else {}


def results_table(results: dict[str, Any]) -> str:
    """`metrics` of results.json as text: percent, and plain numbers for median ranks."""
    rows = []
    for name, metric in results["metrics"].items():
        show = (lambda rank: f"{rank:g}") if metric["statistic"] == "median_rank" else percent
        low, high = map(show, metric["interval"])
        rows.append((name, metric["n"], show(metric["value"]), f"{low}–{high}", metric["ties"]))
    return format_table([f"{results['encoder']} ({results['protocol']})", "n", "%", "95 % interval", "ties"], rows)
