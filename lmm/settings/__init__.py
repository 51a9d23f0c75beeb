"""Settings of the `lmm` commands as typed dataclasses; a value that cannot be right is refused before anything is loaded.

Nothing heavy is imported here, so that `--help` and a mistyped key answer at once.
"""

from lmm.settings.data import CheckDataSettings, ConversationSource, DataChoice, InspectMaskSettings
from lmm.settings.models import BuildSettings, ExportSettings, ImportSettings, LlavaParts
from lmm.settings.training import (
    FinetuneSettings,
    InstructionTuningSettings,
    LoraSettings,
    MergeSettings,
    StageSettings,
    TrainSettings,
)
from lmm.settings.use import ChatSettings, GenerateSettings, ServeSettings

__all__ = [
    "BuildSettings",
    "ChatSettings",
    "CheckDataSettings",
    "ConversationSource",
    "DataChoice",
    "ExportSettings",
    "FinetuneSettings",
    "GenerateSettings",
    "ImportSettings",
    "InspectMaskSettings",
    "InstructionTuningSettings",
    "LlavaParts",
    "LoraSettings",
    "MergeSettings",
    "ServeSettings",
    "StageSettings",
    "TrainSettings",
]
