"""The model card of an encoder folder: what its files say about it comes in, the text of a README.md for the Hub goes out.

Names, labels and paths come from data and users; they are escaped, so that they can neither break the page nor add to it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path, PurePath
from typing import Any

import yaml

from lift.common.errors import UserError
from lift.common.files import read_json

GENERATED = "<!-- written by the lift toolkit; without this line `lift push` leaves the text as it is -->"
NV_EMBED = ("nvidia/NV-Embed-v2", "cc-by-nc-4.0")
MINILM = ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")
KNOWN_TEXT_ENCODERS = {"nv_embed": NV_EMBED, "minilm": MINILM}
"""Name and licence of the text encoder by its kind; by its name on the Hub otherwise."""
LICENCE_OF_NAME = dict(KNOWN_TEXT_ENCODERS.values())

USAGE = """```python
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel

folder = "PATH_OR_REPOSITORY"
processor = CLIPImageProcessor.from_pretrained(folder)
model = CLIPVisionModel.from_pretrained(folder)
pixels = processor(images=Image.open("image.jpg"), return_tensors="pt")
tokens = model(**pixels).last_hidden_state  # class token and patches, before the last layer norm
```"""


def model_card(folder: Path, results: dict[str, Any] | None = None, licence: str | None = None) -> str:
    """Markdown with the Hub's YAML header.

    Args:
        folder: a written encoder folder.
        results: results.json of `lift-eval encoder`.
        licence: of the weights, as the Hub spells it; without one the card says that none was stated.
    """
    config = read_json(folder / "lift_config.json", "the description of an encoder folder (lift export)")
    vision = read_json(folder / "config.json", "the configuration of an encoder folder")
    clip = config["objective"] == "clip"
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["clip" if clip else "lift", "vision", "image-text-alignment"],
    }
    if licence:
        header["license"] = licence
    size = f"{vision['num_hidden_layers']} layers of width {vision['hidden_size']}, {vision['image_size']} px images in "
    size += f"patches of {vision['patch_size']}"
    what = (
        f"The image encoder of a CLIP baseline, trained jointly with its text tower: a ViT of {size}."
        if clip
        else "An image encoder aligned to the fixed embeddings of a frozen text encoder, as in *Language-Image Alignment with "
        f"Fixed Text Encoders* (arXiv 2506.04209): a ViT of {size}, and a head into {config['embedding_dim']} dimensions."
    )
    usage = (
        "`config.json` and `model.safetensors` are a transformers `CLIPVisionModel`; the head that maps into the text space "
    )
    usage += "is in `lift_head.safetensors`, described by `lift_config.json`."
    sections = [
        f"# {'CLIP baseline' if clip else 'LIFT'} image encoder",
        what,
        "## Use",
        f"{usage}\n\n{USAGE}\n\n`lift encode` and `lift-eval encoder` of the toolkit use the head as well.",
        "## Text side",
        _text_side(config),
        "## Training",
        _training(config),
        "## Results",
        _results(results),
        "## Preprocessing",
        "`preprocessor_config.json` has OpenAI CLIP's mean and deviation, as in training. The official LIFT evaluation scripts "
        "use ImageNet's instead (resize 256, crop 224); `lift encode --protocol official` does as they do.",
        "## Licence",
        _licences(config, licence),
        GENERATED,
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(sections) + "\n"


def read_results(path: Path, encoder_hash: str) -> dict[str, Any]:
    """Raises UserError when `path` is not results.json of `lift-eval encoder`, or was measured with another encoder."""
    results = read_json(path, "results.json of lift-eval encoder")
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        raise UserError(f"{path}: expected results.json of lift-eval encoder (metrics), found something else.")
    if results.get("encoder_hash") != encoder_hash:
        raise UserError(f"{path}: was measured with another encoder than the one to be described. Run lift-eval encoder again.")
    return results


def escape(value: Any) -> str:
    """`value` as plain words in one line of Markdown: no markup, HTML, link or table cell can begin in it."""
    line = " ".join("".join(character if character.isprintable() else " " for character in str(value)).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~:@-])", r"\\\1", html.escape(line, quote=False))


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *[tuple(escape(cell) for cell in row) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text_encoder(config: dict[str, Any]) -> tuple[str, str | None]:
    """Name of the text encoder, without the folders that it lay in here, and its licence where it is known."""
    text = config["text"]
    if text["kind"] in KNOWN_TEXT_ENCODERS:
        return KNOWN_TEXT_ENCODERS[text["kind"]]
    path = str(text.get("path"))
    return (path if path in LICENCE_OF_NAME else PurePath(path).name), LICENCE_OF_NAME.get(path)


def _text_side(config: dict[str, Any]) -> str:
    if config["objective"] == "clip":
        return "The text tower that was trained with it lies in `text_tower/`."
    name, _ = _text_encoder(config)
    text = config["text"]
    rows: list[tuple[Any, ...]] = [("Text encoder", name), ("Revision", _or_unknown(text["revision"]))]
    rows += [(key, _or_unknown(text[key]) or "none") for key in ("prompt", "max_length", "pooling") if key in text]
    table = _table(("", ""), [*rows, ("text_transform", config["text_transform"])])
    if text["revision"] is not None:
        return table
    return f"The checkpoint does not name its text encoder; this is the one of the published checkpoints.\n\n{table}"


def _training(config: dict[str, Any]) -> str:
    if imported := config.get("imported"):
        rows = [("Imported from", imported["file"]), ("sha256", imported["sha256"])]
        rows += [("Run", imported["name"] or "not stated"), ("Epoch", _or_unknown(imported["epoch"]))]
        return (
            "Imported from a checkpoint of the official LIFT code; the file does not state its recipe and data.\n\n"
            + _table(("", ""), rows)
        )
    rows = [(key, _or_unknown(config.get(key))) for key in ("objective", "step", "samples", "seed")]
    rows += list(config.get("recipe", {}).items())
    sources = [f"{source['name']} ({source['kind']})" for source in config.get("data", [])]
    return f"Data: {escape(', '.join(sources) or 'not stated')}.\n\n{_table(('Setting', 'Value'), rows)}"


def _or_unknown(value: Any) -> Any:
    return "not stated" if value is None else value


def _results(results: dict[str, Any] | None) -> str:
    if results is None:
        return "Not measured."
    rows = []
    for name, metric in results["metrics"].items():
        scale, digits = (1, "g") if metric["statistic"] == "median_rank" else (100, ".1f")
        value, low, high = (format(scale * number, digits) for number in (metric["value"], *metric["interval"]))
        rows.append((name, metric["n"], value, f"{low} to {high}"))
    return "Measured by `lift-eval encoder`, in percent, ranks counted from 1.\n\n" + _table(
        ("Metric", "Items", "Value", "95 % interval"), rows
    )


def _licences(config: dict[str, Any], licence: str | None) -> str:
    weights = f"Weights: {escape(licence)}." if licence else "Weights: no licence was stated."
    if config["objective"] == "clip":
        return weights
    name, known = _text_encoder(config)
    if known is None:
        return f"{weights} The licence of the text encoder ({escape(name)}) is not known to the toolkit; look it up before use."
    restricted = (
        " It forbids commercial use; whether that binds an encoder aligned to it is for you to judge."
        if "-nc-" in known
        else ""
    )
    return f"{weights} Text encoder ({escape(name)}): {escape(known)}.{restricted}"
