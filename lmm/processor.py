"""The processor saved with a LLaVA model: image preprocessing, tokenizer and chat template, such that plain transformers at
inference does exactly what training did. In: the folders of the tower and of the language model; out: a LlavaProcessor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaImageProcessorPil, LlavaProcessor

from lift.common.errors import UserError, first_line
from lift.common.files import require_file
from lmm.conversation import IMAGE_MARKER, load_template
from lmm.sentencepiece_model import llama_tokenizer_of
from lmm.unused_byte import give_unused_byte


def load_tokenizer(llm: Path) -> Any:
    """Raises UserError when the folder has no tokenizer, or one without character offsets.

    A folder with `tokenizer.model` alone, as Vicuna's, is read here: transformers' own way needs a protobuf that this stack's
    other packages do not allow. `<image>` is then a token already, in place of a byte that no text contains where the embedding
    matrix has no spare row.
    """
    if (llm / "tokenizer.model").is_file() and not (llm / "tokenizer.json").is_file():
        return llama_tokenizer_of(llm, IMAGE_MARKER)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            llm, padding_side="left", trust_remote_code=False
        )  # batched generation pads on the left
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{llm}: expected a tokenizer that transformers can load: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{llm}: expected a fast tokenizer (tokenizer.json), found a slow one. Convert it with transformers.")
    return tokenizer


def choose_chat_template(tokenizer: Any, llm: Path, choice: str | None) -> str:
    """Jinja text that takes content both as a string (lmms-eval) and as a list of parts (transformers' processors).

    Args:
        choice: None for the tokenizer's own template, `vicuna_v1`, or a Jinja file.
    Raises:
        UserError: there is no template, or it renders neither form.
    """
    if choice == "vicuna_v1":
        template = load_template("vicuna_v1")
    elif choice is not None:
        template = require_file(Path(choice), "a Jinja chat template").read_text(encoding="utf-8")
    elif isinstance(tokenizer.chat_template, str):
        template = tokenizer.chat_template
    else:
        raise UserError(
            f"{llm}: expected a chat template in the language model's folder, found none. "
            "Give one: --chat_template vicuna_v1, or --chat_template FILE.jinja."
        )
    for candidate in (template, load_template("accept_parts") + template):
        if _renders(tokenizer, candidate, "PROBE") and _renders(tokenizer, candidate, _IMAGE_AND_TEXT):
            return candidate
    raise UserError(
        f"{choice or llm}: the chat template does not show the text of a user's message. Give another with --chat_template."
    )


_IMAGE_AND_TEXT = [{"type": "image"}, {"type": "text", "text": "PROBE"}]


def _renders(tokenizer: Any, template: str, content: Any) -> bool:
    messages = [{"role": "user", "content": content}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):
        return False
    shows_image = isinstance(content, str) or (IMAGE_MARKER in text and "'type'" not in text)
    return "PROBE" in text and shows_image


def add_image_token(tokenizer: Any, rows: int) -> tuple[int, str]:
    """Makes `<image>` one special token of `tokenizer`. Returns its id and one sentence on where it came from.

    The id is that of `<image>` where the vocabulary has it, else of a spare row of the embedding matrix, else of a byte that no
    text contains. The matrix is never enlarged: a new output row takes part in the softmax and changes the loss of every text,
    and nothing in a folder for plain transformers can mask it.

    Args:
        rows: rows of the model's embedding matrix.
    Raises:
        UserError: there is no such id below `rows`.
    """
    vocabulary = tokenizer.get_vocab()
    known = IMAGE_MARKER in vocabulary
    reused = not known and max(vocabulary.values()) + 1 >= rows and give_unused_byte(tokenizer, IMAGE_MARKER)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if tokenizer(IMAGE_MARKER, add_special_tokens=False)["input_ids"] != [image_id]:
        raise UserError(f"{tokenizer.name_or_path}: expected {IMAGE_MARKER} to become one token, found it is split.")
    if image_id >= rows:
        raise UserError(
            f"{tokenizer.name_or_path}: expected an id for {IMAGE_MARKER} among the {rows} rows of the embedding matrix, found "
            f"{f'it at {image_id}' if known else 'no spare row and no token of a byte that no text contains'}. A new row would "
            "change the loss of every text, so none is added here. Take a language model with spare rows, or enlarge this one "
            f"knowingly: model.resize_token_embeddings({image_id + 1}), saved with its tokenizer."
        )
    if known:
        return image_id, f"image token {IMAGE_MARKER}: id {image_id}, a token of this tokenizer"
    if reused:
        return image_id, f"image token {IMAGE_MARKER}: id {image_id}, of a byte that no text contains"
    return image_id, f"image token {IMAGE_MARKER}: id {image_id}, a spare row of the {rows} embedding rows"


def ensure_pad_token(tokenizer: Any) -> str:
    """Gives the tokenizer a padding token if it has none: unk, else eos. Padding is masked by position, never by id."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise UserError(
                f"{tokenizer.name_or_path}: expected a pad, unk or eos token, found none. "
                "Name a pad_token in its tokenizer_config.json."
            )
        return f"padding token: none in the tokenizer, {tokenizer.pad_token} takes its place"
    return f"padding token: {tokenizer.pad_token}"


def make_processor(tower: Path, tokenizer: Any, template: str, patch_size: int, image_size: int) -> LlavaProcessor:
    """Raises UserError when the tower's preprocessing does not give images of the tower's size."""
    require_file(tower / "preprocessor_config.json", "the vision tower's image preprocessing")
    try:
        image_processor = CLIPImageProcessorPil.from_pretrained(tower)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{tower}/preprocessor_config.json: cannot be read: {first_line(error)}") from error
    crop = image_processor.crop_size
    if (crop["height"], crop["width"]) != (image_size, image_size):
        raise UserError(
            f"{tower}/preprocessor_config.json: expected crop_size {image_size}, as the tower's image_size, found "
            f"{crop['height']} x {crop['width']}. Correct it; position embeddings are not interpolated."
        )
    tokenizer.chat_template = template
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token=IMAGE_MARKER,
        num_additional_image_tokens=1,
    )


def set_aspect_ratio(processor: Any, image_aspect_ratio: str) -> None:
    """Records in the processor how images become square.

    Args:
        image_aspect_ratio: `pad` to a square with int(255 * mean), as LLaVA-1.5 does; `crop` the middle after resizing the
            shorter side; `resize` both sides, proportions not kept.

    Resizing is PIL's: pixel for pixel that of the original LLaVA. The torchvision backend, which transformers prefers when it
    loads the saved folder, is up to one grey level off; `backend="pil"` asks for this one.
    """
    values = processor.image_processor.to_dict()
    for key in ("image_processor_type", "processor_class", "do_pad"):
        values.pop(key, None)
    height, width = values["crop_size"]["height"], values["crop_size"]["width"]
    resize = image_aspect_ratio == "resize"
    values["size"] = {"height": height, "width": width} if resize else {"shortest_edge": min(height, width)}
    values["do_center_crop"] = not resize
    processor.image_processor = LlavaImageProcessorPil(**values, do_pad=image_aspect_ratio == "pad")
