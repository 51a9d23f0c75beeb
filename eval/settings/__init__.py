"""Settings of the commands of `lift-eval`: paths and choices come in from the command line or YAML, checked values go out.

Nothing heavy is imported here, so that `--help` and a mistyped key answer at once.
"""

from eval.settings.comparison import CompareSettings, ReportSettings, ScoreSettings
from eval.settings.encoder import ClassificationData, EncoderSettings, HardNegativeData, ProbeData, RetrievalData
from eval.settings.lmm import DataSettings, LmmSettings, StockSettings
from eval.settings.study import CostSettings, TextSettings

__all__ = [
    "ClassificationData",
    "CompareSettings",
    "CostSettings",
    "DataSettings",
    "EncoderSettings",
    "HardNegativeData",
    "LmmSettings",
    "ProbeData",
    "ReportSettings",
    "RetrievalData",
    "ScoreSettings",
    "StockSettings",
    "TextSettings",
]
