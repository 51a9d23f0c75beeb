"""Do fixed transforms of the text side pull true and false captions apart? A measurement on text alone, without training.

SugarCrepe items (a caption and a hard negative of it) and the human captions of the same images come in; out come, per
subtask and transform, two figures. *Separation*: mean cosine distance of caption and negative over that of two random
captions. *Margin*: how often another human caption of the image is nearer to the caption than to the negative; 50 % is
chance. Transforms are fitted on captions of other images: on one half of the images for the items of the other half.

    python benchmarks/text_transforms.py --items sugar_crepe --coco_captions captions_val2017.json
    python benchmarks/text_transforms.py --items runs/demo/world/sugar_crepe --pairs runs/demo/world/pairs/train

With --pairs (webdataset tars of another split) there are no human captions of the items' images, and so no margins. --long puts
further captions of the image after both texts, so that one sentence of several is false.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from eval.output import format_table
from eval.tasks.hard_negatives import SUBTASKS
from lift.common.files import read_json
from lift.common.ledger import DropLedger
from lift.settings import SourceSettings, TextEncoderSettings
from lift.sources import read_sources
from lift.text_encoders import load_text_encoder
from lift.transforms import TextTransform, TransformKind

NEAR_COPY = 0.7
"""Share of common words from which a human caption counts as the one that the item was made from."""
LONG_CAPTIONS = 3
DIMENSIONS = (64, 128, 256)
SHRINKAGES = (0.001, 0.01, 0.1, 1.0)


@dataclass
class Items:
    """Pairs of one subtask; rows of an embedding table."""

    positive: list[int] = field(default_factory=list)
    negative: list[int] = field(default_factory=list)
    references: list[list[int]] = field(default_factory=list)
    """Human captions of the same image that are not the positive itself."""
    fold: list[int] = field(default_factory=list)
    """Half of the images that the item belongs to."""


class Texts:
    """Numbers distinct texts in the order met."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def row(self, text: str) -> int:
        return self.rows.setdefault(text, len(self.rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path, required=True, help="folder with SugarCrepe's seven files")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--coco_captions", type=Path, help="COCO captions JSON with the items' images")
    group.add_argument("--pairs", type=Path, help="webdataset tars whose captions the transforms are fitted on")
    parser.add_argument("--long", action="store_true", help="needs --coco_captions")
    parser.add_argument("--limit", type=int, help="items of each subtask at most")
    parser.add_argument("--kind", choices=["minilm", "sentence_transformer", "causal_lm"], default="minilm")
    parser.add_argument("--model", help="folder or hub name of the text encoder")
    parser.add_argument("--pooling", choices=["mean", "last"], default="mean")
    arguments = parser.parse_args()
    if arguments.long and not arguments.coco_captions:
        parser.error("--long needs --coco_captions")
    texts = Texts()
    human = read_human_captions(arguments.coco_captions) if arguments.coco_captions else {}
    items = {name: read_items(arguments.items / f"{name}.json", arguments, human, texts) for name in SUBTASKS}
    fit_rows = fit_sets(human, arguments, texts)
    encoder = load_text_encoder(
        TextEncoderSettings(kind=arguments.kind, path=arguments.model, pooling=arguments.pooling, max_length=323)
    )
    started = time.perf_counter()
    embeddings = encoder.encode(list(texts.rows), progress="embed")
    seconds = time.perf_counter() - started
    fitted = " and ".join(str(len(rows)) for rows in fit_rows)
    model = f"{arguments.kind} {arguments.model or ''}".strip()
    print(f"{model}: {len(embeddings)} texts of {embeddings.shape[1]} dimensions embedded in {seconds:.0f} s")
    print(f"{'long' if arguments.long else 'short'} captions; transforms fitted on {fitted} captions")
    separations, margins = [], []
    for kind, dimensions, shrinkage in choices(embeddings.shape[1]):
        features = [transformed(embeddings, rows, kind, dimensions, shrinkage) for rows in fit_rows]
        label = " ".join([kind, *([str(dimensions)] if dimensions else []), *([f"{shrinkage:g}"] if kind == "whiten" else [])])
        separations.append([label, *(f"{separation(part, features):.3f}" for part in items.values())])
        margins.append([label, *(f"{100 * margin(part, features):.1f}" for part in items.values())])
    header = [f"{name} ({len(part.positive)})" for name, part in items.items()]
    print("\n" + format_table(["separation", *header], separations))
    if human:
        print("\n" + format_table(["margin, %", *header], margins))


def read_human_captions(path: Path) -> dict[str, list[str]]:
    """File name of the image -> its captions."""
    content = read_json(path, "COCO captions")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(names[annotation["image_id"]], []).append(" ".join(annotation["caption"].split()))
    return captions


def read_items(path: Path, arguments: argparse.Namespace, human: dict[str, list[str]], texts: Texts) -> Items:
    items = Items()
    for record in list(read_json(path, "SugarCrepe items").values())[: arguments.limit]:
        image, positive, negative = record["filename"], record["caption"].strip(), record["negative_caption"].strip()
        others = [caption for caption in human.get(image, []) if not near_copy(caption, positive)]
        if arguments.long:
            added, others = " ".join(others[:LONG_CAPTIONS]), others[LONG_CAPTIONS:]
            positive, negative = f"{positive} {added}", f"{negative} {added}"
        items.positive.append(texts.row(positive))
        items.negative.append(texts.row(negative))
        items.references.append([texts.row(caption) for caption in others])
        items.fold.append(fold_of(image) if human else 0)
    return items


def near_copy(first: str, second: str) -> bool:
    one, two = (set(re.findall(r"\w+", text.lower())) for text in (first, second))
    return len(one & two) >= NEAR_COPY * len(one | two)


def fold_of(image: str) -> int:
    return int(Path(image).stem[-6:]) % 2


def fit_sets(human: dict[str, list[str]], arguments: argparse.Namespace, texts: Texts) -> list[list[int]]:
    """Rows to fit on for the items of each fold: captions of the images of the other fold, or of other images altogether."""
    if arguments.pairs is not None:
        shards = read_sources([SourceSettings(kind="webdataset", path=str(arguments.pairs))], DropLedger())
        captions = [next(iter(sample.captions.values())) for shard in shards for sample in shard]
        return [[texts.row(caption) for caption in captions]]
    if arguments.long:
        human = {image: [" ".join(captions[: 1 + LONG_CAPTIONS])] for image, captions in human.items()}
    return [
        [texts.row(caption) for image, captions in human.items() if fold_of(image) != fold for caption in captions]
        for fold in range(2)
    ]


def choices(dimension: int) -> list[tuple[TransformKind, int | None, float]]:
    smaller = [d for d in DIMENSIONS if d < dimension]
    return [
        ("none", None, 0.0),
        ("centre", None, 0.0),
        *(("pca", d, 0.0) for d in smaller),
        *(("whiten", None, shrinkage) for shrinkage in SHRINKAGES),
        *(("whiten", d, 0.01) for d in smaller),
    ]  # type: ignore[return-value]


def transformed(
    embeddings: np.ndarray, rows: list[int], kind: TransformKind, dimensions: int | None, shrinkage: float
) -> np.ndarray:
    transform = TextTransform(kind, embeddings.shape[1], dimensions)
    transform.fit(embeddings[rows], shrinkage)
    return transform(torch.from_numpy(embeddings)).numpy()


def separation(items: Items, features: list[np.ndarray]) -> float:
    """Distance of caption and negative over that of captions of two items; features of length one, one table a fold."""
    pair, random = [], []
    for fold, table in enumerate(features):
        chosen = np.flatnonzero(np.array(items.fold) == fold)
        positive, negative = (table[np.array(rows)[chosen]] for rows in (items.positive, items.negative))
        pair.append(1 - (positive * negative).sum(1))
        random.append(1 - (positive * np.roll(positive, len(chosen) // 2, axis=0)).sum(1))
    return float(np.concatenate(pair).mean() / np.concatenate(random).mean())


def margin(items: Items, features: list[np.ndarray]) -> float:
    """Share of (item, reference) that put the reference nearer to the caption; every item counts the same."""
    shares = []
    for positive, negative, references, fold in zip(items.positive, items.negative, items.references, items.fold, strict=True):
        if references:
            table = features[fold]
            shares.append(np.mean(table[references] @ (table[positive] - table[negative]) > 0))
    return float(np.mean(shares)) if shares else float("nan")


if __name__ == "__main__":
    main()
