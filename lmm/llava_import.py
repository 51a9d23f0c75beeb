"""`lmm import`: a checkpoint of the original LLaVA becomes a folder that transformers loads; weights are renamed, not changed.

In: a folder with `mm_*` keys in its config.json, or a pretraining stage's `mm_projector.bin` and a LLaVA folder to put it in.
Out: a LLaVA folder with processor, the vicuna_v1 chat template and `build.json`. One file of weights is in memory at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CLIPVisionConfig, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lift.common.files import atomic_folder, read_json, require_file, sha256_file, sha256_text, write_json
from lmm.build import CLIP_TEXT_SIDE
from lmm.conversation import IMAGE_MARKER
from lmm.llava_format import (
    BUFFERS,
    PROJECTOR,
    TOWER,
    check_original,
    config_to_transformers,
    on_disk,
    projector_kind,
    projector_to_transformers,
    to_transformers,
)
from lmm.processor import (
    add_image_token,
    choose_chat_template,
    ensure_pad_token,
    load_tokenizer,
    make_processor,
    set_aspect_ratio,
)
from lmm.sentencepiece_model import llama_tokenizer_of
from lmm.settings import ImportSettings
from lmm.tensor_files import ShardWriter, Tensors, read_all, read_tensors, weight_files

PROJECTOR_FILE = "mm_projector.bin"
RECORD = "build.json"  # as `lmm build` writes it: training reads the vision tower's hash there


def import_llava(settings: ImportSettings) -> Path:
    """Writes the folder `settings.out` and returns it. Raises UserError for what cannot be imported, or when `out` exists."""
    source, out = settings.source, settings.out
    assert out is not None
    if out.exists():
        raise UserError(f"{out}: exists already. Remove it or choose another --out.")
    if not source.exists():
        raise UserError(f"{source}: expected a checkpoint folder of the original LLaVA or its mm_projector.bin, found nothing.")
    file = source if source.is_file() else source / PROJECTOR_FILE
    if source.is_dir() and (weight_files(source) or not file.is_file()):
        if settings.model_base is not None:
            raise UserError(f"{source}: is a whole checkpoint; --model_base is for a projector alone. Leave it out.")
        _import_checkpoint(settings)
    else:
        _import_projector(file, settings)
    print(f"wrote {out}")
    return out


def _import_checkpoint(settings: ImportSettings) -> None:
    source = settings.source
    original = read_json(require_file(source / "config.json", "an original LLaVA checkpoint's config.json"))
    check_original(original, source / "config.json")
    if not weight_files(source):
        raise UserError(f"{source}: expected model.safetensors or pytorch_model.bin, single or with an index, found neither.")
    tower = find_tower(settings.vision_tower, original.get("mm_vision_tower"), source)
    vision: Any = CLIPVisionConfig.from_pretrained(tower)
    tokenizer, image_id, note = _tokenizer(source, original["vocab_size"])
    config = config_to_transformers(original, vision, image_id)
    template = choose_chat_template(tokenizer, source, settings.chat_template)
    notes = [note, ensure_pad_token(tokenizer)]
    processor: Any = make_processor(tower, tokenizer, template, vision.patch_size, vision.image_size)
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    padded = original.get("image_aspect_ratio") == "pad"
    set_aspect_ratio(processor, "pad" if padded else "crop" if processor.image_processor.do_center_crop else "resize")
    assert settings.out is not None
    with atomic_folder(settings.out) as folder:
        writer = ShardWriter(folder)
        notes += _write_weights(writer, original, source, tower)
        _check_whole(writer, config, source)
        config.dtype = writer.dtypes["language_model.model.embed_tokens.weight"]
        config.architectures = ["LlavaForConditionalGeneration"]
        config.save_pretrained(folder)
        _generation(original, tokenizer.pad_token_id).save_pretrained(folder)
        processor.save_pretrained(folder)
        if (source / "tokenizer.model").is_file():  # for the way back: the original reads no other tokenizer
            shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
        record = {
            "vision_tower": str(tower),
            "vision_tower_hash": _hash(tower),
            "llm": str(source),
            "llm_hash": _hash(source),
            "image_token_id": image_id,
            "notes": notes,
        }
        write_json(folder / RECORD, record)
    print("\n".join(notes))


def find_tower(given: Path | None, named: Any, source: Path) -> Path:
    """The vision tower's folder: `given`, or what the checkpoint names, in its folder, in this one or in the hub's cache.

    Raises:
        UserError: it is not on this machine.
    """
    if given is not None:
        require_file(given / "config.json", "a vision tower's config.json")
        return given
    places = [source / str(named), Path(str(named)), source / Path(str(named)).name] if named else []
    for place in places:
        if (place / "config.json").is_file() and weight_files(place):
            return place
    try:
        return Path(snapshot_download(str(named), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        raise UserError(
            f"{source}/config.json: the vision tower mm_vision_tower '{named}' is not at hand: neither a folder from there nor "
            "in the hub's cache. Give its folder: --vision_tower DIR."
        ) from None


def tower_tensors(folder: Path) -> Tensors:
    """The vision side of a CLIPVisionModel or CLIPModel folder, named `vision_tower.X`."""
    if not weight_files(folder):
        raise UserError(f"{folder}: expected the vision tower's model.safetensors or pytorch_model.bin, found neither.")
    found: Tensors = {}
    for tensors in read_all(folder):
        for key, value in tensors.items():
            if not key.startswith(CLIP_TEXT_SIDE) and not BUFFERS.search(key):
                found[TOWER + key.removeprefix("vision_model.")] = value
    return found


def _write_weights(writer: ShardWriter, original: dict[str, Any], source: Path, tower: Path) -> list[str]:
    """Every shard under its new names, then the tower. The original takes the tower from its own folder, unless it was trained.

    Returns sentences on what a user should know.
    """
    trained = bool(original.get("unfreeze_mm_vision_tower"))
    own_tower: Tensors = {}
    projector: Tensors = {}
    for tensors in read_all(source):
        renamed: Tensors = {}
        for key, value in tensors.items():
            name = to_transformers(key)
            if "mm_projector." in key:
                projector[key] = value
            elif BUFFERS.search(key):
                continue
            elif name is None:
                raise UserError(f"{source}: expected the weights of a LLaVA-Llama model, found also {key}.")
            elif name.startswith(TOWER):
                own_tower[name] = value
            else:
                renamed[name] = value
        writer.add(renamed)
    kind = original.get("mm_projector_type", "linear")
    separate = tower_tensors(tower)
    chosen = own_tower if trained and own_tower else separate
    writer.add(projector_to_transformers(projector, kind, source) | chosen)
    writer.close()
    differs = any(key not in own_tower or not torch.equal(own_tower[key], value) for key, value in separate.items())
    if own_tower and differs:
        used = "the checkpoint's own" if trained else f"those of {tower}, as the original's loader does"
        return [f"vision tower: the checkpoint and {tower} have different weights; taken are {used}"]
    return [f"vision tower: {tower}"]


def _check_whole(writer: ShardWriter, config: LlavaConfig, source: Path) -> None:
    """Raises UserError unless the weights written are those of the model that `config` describes, by name and shape."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    expected = {on_disk(key): value.shape for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight")
        writer.shapes.pop("language_model.lm_head.weight", None)
    for key in sorted(expected.keys() | writer.shapes.keys()):
        if expected.get(key) != writer.shapes.get(key):
            found, wanted = (None if shape is None else list(shape) for shape in (writer.shapes.get(key), expected.get(key)))
            raise UserError(
                f"{source}: {key}: expected shape {wanted or 'none'}, as config.json and the vision tower say, found "
                f"{found or 'no such weight'}. The checkpoint is not whole, or its vision tower is another one."
            )


def _tokenizer(source: Path, rows: int) -> tuple[Any, int, str]:
    """The tokenizer with `<image>` as one token, its id, and a sentence on where that came from.

    Raises:
        UserError: there is none that can be read.
    """
    if not (source / "tokenizer.model").is_file():
        if not (source / "tokenizer.json").is_file():
            raise UserError(f"{source}: expected the tokenizer as tokenizer.model or tokenizer.json, found neither.")
        tokenizer = load_tokenizer(source)
        return (tokenizer, *add_image_token(tokenizer, rows))
    tokenizer = llama_tokenizer_of(source, IMAGE_MARKER)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if image_id >= rows:
        raise UserError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the embedding matrix {rows} rows: they differ.")
    return tokenizer, image_id, f"image token {IMAGE_MARKER}: id {image_id}, of the {rows} rows one that no text uses"


def _hash(folder: Path) -> str:
    return sha256_text("\n".join(f"{file.name} {sha256_file(file)}" for file in weight_files(folder)))


def _generation(original: dict[str, Any], pad_id: int) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=original.get("bos_token_id"), eos_token_id=original.get("eos_token_id"), pad_token_id=pad_id
    )


def _import_projector(file: Path, settings: ImportSettings) -> None:
    """A copy of the folder `model_base` with the projector of `file` in the place of its own."""
    base = settings.model_base
    if base is None:
        raise UserError(
            f"{file}: a projector alone needs a LLaVA folder to go into, as `lmm build` writes it: --model_base DIR."
        )
    require_file(base / "config.json", "a LLaVA folder's config.json")
    config = LlavaConfig.from_pretrained(base, local_files_only=True)
    kind = projector_kind(config, base)
    beside = file.parent / "config.json"
    stated = read_json(beside).get("mm_projector_type", kind) if beside.is_file() else kind
    if stated != kind:
        raise UserError(f"{beside}: mm_projector_type: expected {kind!r}, as in {base}, found {stated!r}.")
    projector = projector_to_transformers(read_tensors(file), kind, file)
    assert settings.out is not None
    with atomic_folder(settings.out) as folder:
        writer = ShardWriter(folder)
        for tensors in read_all(base):
            renamed = {on_disk(key): value for key, value in tensors.items()}
            for key in [key for key in renamed if key.startswith(PROJECTOR)]:
                if renamed[key].shape != projector[key].shape:
                    raise UserError(
                        f"{file}: {key}: expected shape {list(renamed[key].shape)}, as in {base}, found "
                        f"{list(projector[key].shape)}. It was trained with another vision tower or language model."
                    )
                renamed[key] = projector[key].to(renamed[key].dtype)
            writer.add(renamed)
        writer.close()
        for other in base.iterdir():
            if other.is_file() and not other.name.endswith((".safetensors", ".bin", ".index.json")):
                shutil.copyfile(other, folder / other.name)
        record = read_json(base / RECORD) if (base / RECORD).is_file() else {"model_base": str(base)}
        write_json(folder / RECORD, record | {"projector": str(file), "projector_hash": sha256_file(file)})
