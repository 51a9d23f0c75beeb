"""SugarCrepe complete by `lift-eval encoder` against the published script's loop, which takes one item after the other.

    python benchmarks/sugarcrepe.py --items SUGAR_CREPE [--images VAL2017] [--encoder FOLDER] [--loop-items 300]

SUGAR_CREPE holds the seven files. Photos of COCO's common size are made where none are given, and without `--encoder` a LIFT
encoder with random weights, aligned to a causal LM: of the demo's shapes, or with `--scale medium` larger ones.
Like the script, the loop opens the item's image, prepares it with torchvision and encodes it alone, and embeds each of the two
captions in a call of its own; it is timed on a sample of the items and scaled to all of them. Ours is timed whole, from reading
the files to the written result, with an empty cache. Both sides use the same weights, number of threads and text precision.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from image_pipeline import make_photos
from loss_memory import machine
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.encoder import chosen_tasks, evaluate
from eval.encoders import open_encoder
from eval.settings import EncoderSettings, HardNegativeData
from eval.tasks.hard_negatives import SUBTASKS
from lift.common.files import read_json
from lift.encoder import Encoder, load_encoder
from lift.export import write_encoder_folder
from lift.model import LiftModel, vision_config
from lift.official import IMAGENET_MEAN, IMAGENET_STD
from lift.settings import TextEncoderSettings, VisionSettings
from lift.text_encoders import describe_text_encoder
from lift.transforms import TextTransform

PHOTO_SIZE = (640, 480)
SCALES = {
    "demo": (VisionSettings(image_size=64, patch_size=8, width=128, layers=4, heads=4), 128, 3),
    "medium": (VisionSettings(image_size=224, patch_size=16, width=192, layers=6, heads=3), 256, 6),
}
"""The image encoder, and width and layers of the LM."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="demo")
    parser.add_argument("--loop-items", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    items = [item for name in SUBTASKS for item in read_json(options.items / f"{name}.json").values()]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["LIFT_CACHE"] = str(work / "cache")
        images = options.images or make_images(work / "images", sorted({item["filename"] for item in items}))
        folder = options.encoder or make_encoder(work, [item["caption"] for item in items], options.scale)
        sample = random.Random(0).sample(items, min(options.loop_items, len(items)))
        loop = loop_seconds(load_encoder(folder), sample, images) * len(items) / len(sample)
        ours = our_seconds(folder, options.items, images, work / "out", options.workers)
    unique = (
        len({item["filename"] for item in items}),
        len({item[key] for item in items for key in ("caption", "negative_caption")}),
    )
    print(f"{machine()}; {len(items):,} items, {unique[0]:,} images, {unique[1]:,} captions")
    print(f"one item after the other  {loop:8.1f} s  ({len(sample)} items timed)")
    print(f"lift-eval encoder         {ours:8.1f} s  {loop / ours:.1f} times faster")


def script_pixels(path: Path, side: int) -> torch.Tensor:
    """The published script's torchvision steps, cropped to what the encoder sees."""
    resized = transforms.resize(Image.open(path).convert("RGB"), [round(side * 256 / 224)], InterpolationMode.BICUBIC)
    pixels = transforms.to_tensor(transforms.center_crop(resized, [side, side]))
    return transforms.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))


def loop_seconds(encoder: Encoder, items: list[dict[str, Any]], images: Path) -> float:
    """Of the published script's loop over `items`; loading is not counted, a first item warms up."""
    start = 0.0
    for number, item in enumerate([items[0], *items]):
        if number == 1:
            start = time.perf_counter()
        texts = [
            torch.from_numpy(encoder.align(encoder.text_embeddings([item[key]]))) for key in ("caption", "negative_caption")
        ]
        pixels = script_pixels(images / item["filename"], encoder.vision.config.image_size)
        image = F.normalize(encoder.image_embeddings(pixels[None]), dim=-1).cpu()
        _ = [float((text @ image.T).item()) for text in texts]
    return time.perf_counter() - start


def our_seconds(folder: Path, items: Path, images: Path, out: Path, workers: int) -> float:
    """Of everything but starting Python."""
    start = time.perf_counter()
    data = HardNegativeData(path=items, images=images)
    settings = EncoderSettings(encoder=str(folder), sugarcrepe=data, workers=workers)
    tasks = chosen_tasks(settings.tasks)
    read = {name: task.read(data, False) for name, task in tasks.items()}
    evaluate(open_encoder(settings.encoder), settings, tasks, read, out)
    return time.perf_counter() - start


def make_images(folder: Path, names: list[str]) -> Path:
    """JPEGs of 640 x 480 pixels under the names given; a few photos over and over, each file with bytes of its own."""
    photos = []
    folder.mkdir()
    for photo in make_photos(folder, 16):
        path = Path(photo.path)
        with Image.open(path) as image:
            photos.append(image.resize(PHOTO_SIZE, Image.Resampling.BICUBIC))
        path.unlink()
    for number, name in enumerate(names):
        photos[number % 16].save(folder / name, quality=90, comment=name.encode())
    return folder


def make_encoder(work: Path, captions: list[str], scale: str) -> Path:
    """A LIFT encoder folder with random weights, and the causal LM that it is aligned to."""
    torch.manual_seed(0)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=8000, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    vision, width, layers = SCALES[scale]
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=8000, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape))
    llm.save_pretrained(work / "llm")
    tokenizer.save_pretrained(work / "llm")
    text = TextEncoderSettings(kind="causal_lm", path=str(work / "llm"), max_length=77, precision="fp32")
    config = vision_config(vision)
    model = LiftModel(config, TextTransform("none", width))
    description = {"objective": "contrastive", "text_transform": "none", "text": describe_text_encoder(text)}
    write_encoder_folder(work / "encoder", model.state_dict(), config, None, description)
    return work / "encoder"


if __name__ == "__main__":
    main()
