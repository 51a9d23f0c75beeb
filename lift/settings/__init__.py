"""Settings of the `lift` commands as typed dataclasses; a value that cannot be right is refused before anything is loaded.

Nothing heavy is imported here, so that `--help` and a mistyped key answer at once.
"""

from lift.settings.embedding import (
    CheckDataSettings,
    EmbedSettings,
    ImportEmbeddingsSettings,
    SourceSettings,
    TextEncoderSettings,
)
from lift.settings.encoders import EncodeSettings, ExportSettings, ImportSettings, PushSettings
from lift.settings.pretraining import (
    ClipTextSettings,
    NegativeSettings,
    PretrainSettings,
    TextTransformSettings,
    TransformSettings,
    ValidationSettings,
    VisionSettings,
)

__all__ = [
    "CheckDataSettings",
    "ClipTextSettings",
    "EmbedSettings",
    "EncodeSettings",
    "ExportSettings",
    "ImportEmbeddingsSettings",
    "ImportSettings",
    "NegativeSettings",
    "PretrainSettings",
    "PushSettings",
    "SourceSettings",
    "TextEncoderSettings",
    "TextTransformSettings",
    "TransformSettings",
    "ValidationSettings",
    "VisionSettings",
]
