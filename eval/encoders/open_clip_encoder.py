"""A model of the package open_clip: an architecture with a published tag or a weights file, or one that describes itself.

The preprocessing is the one that the weights were published with, the tokenizer the architecture's.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from eval.encoders.dual import LOADING_ERRORS, DualEncoder, default_device, hash_tensors, is_text_weight, reason
from lift.common.errors import UserError
from lift.common.settings import nearest

DESCRIBED = ("hf-hub:", "local-dir:")
"""Begin names of models that bring their own description (open_clip_config.json), on the hub or in a folder."""
VISION = ("visual.",)


class OpenClipEncoder(DualEncoder):
    """Features as `encode_image` and `encode_text` give them, in float32.

    Args:
        name: ARCHITECTURE:TAG_OR_FILE, hf-hub:OWNER/NAME or local-dir:FOLDER.
    Raises:
        UserError: see `open_encoder`.
    """

    def __init__(self, name: str) -> None:
        try:
            import open_clip
            from open_clip.transform import PreprocessCfg, image_transform_v2
        except ImportError as error:
            raise UserError(
                f"open_clip:{name}: needs the package open_clip_torch ({reason(error)}). "
                'Install it with pip install "lift-toolkit[eval]" or pip install "open_clip_torch>=3".'
            ) from error
        self.device = default_device()
        architecture, pretrained = (name, None) if name.startswith(DESCRIBED) else _parts(open_clip, name)
        quick_gelu = pretrained is not None and _quick_gelu(open_clip, architecture, pretrained)
        try:
            self.architecture = _description(open_clip, architecture) | {"quick_gelu_forced": quick_gelu}
            self.model: Any = open_clip.create_model(
                architecture,
                pretrained,
                precision="fp32",
                device=self.device,
                force_quick_gelu=quick_gelu,
                weights_only=True,
                require_pretrained=True,
            ).eval()
            self.tokenizer: Any = open_clip.get_tokenizer(architecture)
            self.preprocessing = dict(self.model.visual.preprocess_cfg)
            self.transform = image_transform_v2(PreprocessCfg(**self.preprocessing), is_train=False)
            self.name = _label(architecture, pretrained)
            size = self.model.visual.image_size
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            self.image_size = int(height) if height == width else None
            self._check_vocabulary()
            self._check_dimensions()
        except LOADING_ERRORS as error:
            raise UserError(f"open_clip:{name}: cannot be opened: {reason(error)}") from error

    @cached_property
    def content_hash(self) -> str:  # type: ignore[override]
        return hash_tensors(self.model.state_dict(), {**self._described, "preprocessing": self.preprocessing})

    @cached_property
    def text_hash(self) -> str:  # type: ignore[override]
        text = {name: tensor for name, tensor in self.model.state_dict().items() if is_text_weight(name, VISION)}
        return hash_tensors(text, self._described)

    @property
    def _described(self) -> dict[str, Any]:
        backend = getattr(getattr(self.tokenizer, "tokenizer", None), "backend_tokenizer", None)
        return {
            "architecture": self.architecture,
            "tokenizer": type(self.tokenizer).__name__,
            "context_length": self.tokenizer.context_length,
            "vocabulary": backend.to_str() if backend is not None else None,
        }

    def _check_vocabulary(self) -> None:
        """Here and not in the forward pass, where a GPU would end the process with a bare assertion."""
        rows = getattr(self.model, "vocab_size", None) or getattr(getattr(self.model, "text", None), "vocab_size", None)
        highest = int(self.tokenizer(["a"]).max())
        if rows is not None and highest >= rows:
            raise UserError(
                f"open_clip:{self.name}: its tokenizer gives the token {highest}, its text tower has {rows}. Mend text_cfg "
                "(vocab_size, hf_tokenizer_name) of the architecture."
            )

    def _own_pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def _embed_images(self, pixel_values_B3HW: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values_B3HW)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def _parts(open_clip: Any, name: str) -> tuple[str, str]:
    """Architecture, and tag or file."""
    given, _, pretrained = name.partition(":")
    architecture = given.replace("/", "-")
    known = open_clip.list_models()
    if architecture not in known:
        raise UserError(
            f"open_clip:{name}: open_clip has no architecture '{given}'. {nearest(architecture, known)} Others are opened by "
            "open_clip:hf-hub:OWNER/NAME or open_clip:local-dir:FOLDER."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained and (Path(pretrained).is_file() or open_clip.is_pretrained_cfg(architecture, pretrained)):
        return architecture, pretrained
    hint = nearest(pretrained, tags) if tags and pretrained else f"It has the tags {', '.join(tags) or '(none)'}."
    found = f"found '{pretrained}', which is neither" if pretrained else "found none"
    raise UserError(
        f"open_clip:{name}: expected a tag of {architecture} or a file with weights after the second colon, {found}. {hint}"
    )


def _quick_gelu(open_clip: Any, architecture: str, pretrained: str) -> bool:
    """Whether the published weights need QuickGELU forced on the architecture; open_clip itself only warns and is off.

    Raises:
        UserError: the architecture has QuickGELU, and the weights were trained without.
    """
    published = open_clip.get_pretrained_cfg(architecture, pretrained) if not Path(pretrained).is_file() else {}
    if not published:
        return False
    wanted, has = bool(published.get("quick_gelu")), bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    if has and not wanted:
        plain = architecture.removesuffix("-quickgelu")
        raise UserError(
            f"open_clip:{architecture}:{pretrained}: these weights were trained without QuickGELU, which the architecture has. "
            f"Give open_clip:{plain}:{pretrained}."
        )
    return wanted and not has


def _description(open_clip: Any, architecture: str) -> dict[str, Any]:
    """What the model says of its towers.

    Raises:
        ValueError: it asks for code of its own to be run.
    """
    described: dict[str, Any] = open_clip.get_model_config(architecture)
    if "trust_remote_code" in json.dumps(described):
        raise ValueError("its description asks for trust_remote_code, which is never given")
    return described


def _label(architecture: str, pretrained: str | None) -> str:
    if pretrained is None:
        return Path(architecture.partition(":")[2]).name
    return f"{architecture} {Path(pretrained).stem if Path(pretrained).is_file() else pretrained}"
