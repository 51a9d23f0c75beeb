"""`lift-eval encoder`: an encoder folder comes in; hard-negative accuracy, retrieval and every item's scores go out.

Hard negatives: SugarCrepe (arXiv 2306.14610). Retrieval: the first caption of every pair; pairs with the same caption text
count as correct for each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from eval.encoder_data import SUBTASKS, HardNegatives, Pair, decode, read_hard_negatives, read_pairs
from eval.metrics import Metric, hard_negative_accuracy, recall_at, retrieval_ranks
from eval.output import format_table, percent
from eval.settings import EncoderSettings, given
from lift.common.errors import UserError
from lift.common.files import atomic_folder, check_output_folder, read_json, require_folder, write_json, write_jsonl

RECALL_AT = (1, 5, 10)


class Encoder(Protocol):
    """What `lift.encoder.load_encoder` returns: L2-normalised float32 features, [N, D]."""

    @property
    def content_hash(self) -> str: ...

    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> NDArray[np.float32]: ...

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


def encoder(settings: EncoderSettings) -> None:
    """Command `lift-eval encoder`."""
    check_output_folder(given(settings.out, "out"), "results.json")
    from lift.encoder import load_encoder

    evaluate(load_encoder(require_folder(settings.folder, "an encoder folder")), settings)


def evaluate(model: Encoder, settings: EncoderSettings) -> dict[str, Any]:
    """Writes `settings.out` (`results.json`, `records.jsonl`), prints the table and returns the results.

    Results of the same encoder on the same data that are there already are shown again.

    Raises:
        UserError: faulty items (see `encoder_data`), or an encoder whose features are not finite.
    """
    out = given(settings.out, "out")
    negatives = read_hard_negatives(
        given(settings.sugar_crepe, "sugar_crepe"), given(settings.images, "images"), settings.allow_missing
    )
    data_hash = {"sugar_crepe": negatives.data_hash}
    pairs: list[Pair] = []
    if settings.retrieval is not None:
        pairs, data_hash["retrieval"] = read_pairs(settings.retrieval)
    made_from = {"encoder_hash": model.content_hash, "data_hash": data_hash, "missing_images": negatives.missing}
    earlier = read_json(out / "results.json") if (out / "results.json").is_file() else {}
    if earlier.items() >= made_from.items():
        print(f"{out}: reused, results of the same encoder on the same data.")
        results = earlier
    else:
        results, records = _measure(model, negatives, pairs, settings)
        results = made_from | results
        with atomic_folder(out) as work:
            write_jsonl(work / "records.jsonl", records)
            write_json(work / "results.json", results)
    print(metrics_table(results["metrics"]))
    if negatives.missing:
        print(f"{len(negatives.missing)} items left out, their images are missing: {', '.join(negatives.missing[:5])} ...")
    return results


def _measure(
    model: Encoder, negatives: HardNegatives, pairs: list[Pair], settings: EncoderSettings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `results.json` says beside the inputs' hashes, and one record for every item."""
    start = time.monotonic()
    metrics, records = _score_hard_negatives(model, negatives, settings.batch_size)
    if pairs:
        retrieval_metrics, retrieval_records = _score_retrieval(model, pairs, settings.batch_size)
        metrics, records = metrics | retrieval_metrics, records + retrieval_records
    results: dict[str, Any] = {
        "encoder": str(settings.folder.resolve()),
        "data": {name: str(path) for name, path in _data_paths(settings)},
        "metrics": {name: metric.to_dict() for name, metric in metrics.items()},
        "seconds": round(time.monotonic() - start, 1),
    }
    return results, records


def metrics_table(metrics: dict[str, Any]) -> str:
    """`metrics` of results.json as text, in percent."""
    rows = [
        (name, m["n"], percent(m["value"]), f"{percent(m['interval'][0])}–{percent(m['interval'][1])}", m["ties"])
        for name, m in metrics.items()
    ]
    return format_table(["metric", "n", "%", "95 % interval", "ties"], rows)


def _data_paths(settings: EncoderSettings) -> list[tuple[str, Path]]:
    named = [("sugar_crepe", settings.sugar_crepe), ("images", settings.images), ("retrieval", settings.retrieval)]
    return [(name, path.resolve()) for name, path in named if path is not None]


def _score_hard_negatives(
    model: Encoder, negatives: HardNegatives, batch_size: int
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    items = negatives.items
    paths = sorted({item.image for item in items})
    captions = sorted({text for item in items for text in (item.caption, item.negative_caption)})
    image_PD = _encode_images(model, [(path, str(path)) for path in paths], batch_size, "images of hard negatives")
    text_CD = _encode_texts(model, captions, batch_size, "captions of hard negatives")
    row_of_image = {path: row for row, path in enumerate(paths)}
    row_of_caption = {caption: row for row, caption in enumerate(captions)}
    image_ND = image_PD[[row_of_image[item.image] for item in items]]
    positive_N = np.sum(image_ND * text_CD[[row_of_caption[item.caption] for item in items]], axis=1)
    negative_N = np.sum(image_ND * text_CD[[row_of_caption[item.negative_caption] for item in items]], axis=1)
    subtask_N = np.array([item.subtask for item in items])
    metrics = {
        f"sugar_crepe/{name}": hard_negative_accuracy(positive_N[subtask_N == name], negative_N[subtask_N == name])
        for name in SUBTASKS
        if (subtask_N == name).any()
    }
    metrics["sugar_crepe/all"] = hard_negative_accuracy(positive_N, negative_N)
    records = [
        {
            "metric": f"sugar_crepe/{item.subtask}",
            "id": item.id,
            "image": item.image.name,
            "score_positive": float(positive),
            "score_negative": float(negative),
            "correct": 0.5 if positive == negative else float(positive > negative),
        }
        for item, positive, negative in zip(items, positive_N, negative_N, strict=True)
    ]
    return metrics, records


def _score_retrieval(model: Encoder, pairs: list[Pair], batch_size: int) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    captions = sorted({pair.caption for pair in pairs})
    label_of_caption = {caption: label for label, caption in enumerate(captions)}
    label_N = np.array([label_of_caption[pair.caption] for pair in pairs], dtype=np.int64)
    image_ND = _encode_images(model, [(pair.image, pair.key) for pair in pairs], batch_size, "images of pairs")
    text_ND = _encode_texts(model, captions, batch_size, "captions of pairs")[label_N]
    metrics: dict[str, Metric] = {}
    records: list[dict[str, Any]] = []
    for name, query_ND, gallery_ND in (("image_to_text", image_ND, text_ND), ("text_to_image", text_ND, image_ND)):
        ranks, ties = retrieval_ranks(query_ND, gallery_ND, label_N, label_N)
        metrics |= {f"retrieval/{name}_r{k}": recall_at(ranks, ties, k) for k in RECALL_AT}
        records += [
            {"metric": f"retrieval/{name}", "id": pair.key, "rank": int(rank)} for pair, rank in zip(pairs, ranks, strict=True)
        ]
    return metrics, records


def _encode_images(model: Encoder, sources: list[tuple[Path | bytes, str]], batch_size: int, label: str) -> NDArray[np.float32]:
    features = [
        model.encode_images([decode(source, name) for source, name in batch], batch_size=batch_size)
        for batch in _batches(sources, batch_size, label)
    ]
    return _finite(np.concatenate(features), label)


def _encode_texts(model: Encoder, texts: list[str], batch_size: int, label: str) -> NDArray[np.float32]:
    return _finite(np.concatenate([model.encode_texts(batch) for batch in _batches(texts, batch_size, label)]), label)


def _batches(items: list[Any], size: int, label: str) -> Iterator[list[Any]]:
    with tqdm(total=len(items), desc=label) as progress:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            progress.update(len(batch))


def _finite(features_ND: NDArray[np.float32], label: str) -> NDArray[np.float32]:
    if not np.isfinite(features_ND).all():
        raise UserError(f"The encoder gives features that are not finite for the {label}. Check its training.")
    return features_ND
