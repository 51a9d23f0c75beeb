"""The `lift` command."""

from __future__ import annotations

import sys

from lift.common.cli import Command, run_command
from lift.settings import (
    CheckDataSettings,
    EmbedSettings,
    ExportSettings,
    ImportEmbeddingsSettings,
    PretrainSettings,
    TransformSettings,
)

COMMANDS = {
    "check-data": Command(CheckDataSettings, "lift.check_data:check_data"),
    "embed": Command(EmbedSettings, "lift.embed:embed"),
    "import-embeddings": Command(ImportEmbeddingsSettings, "lift.import_embeddings:import_embeddings"),
    "transform": Command(TransformSettings, "lift.transforms:fit_transform", positional=True),
    "pretrain": Command(PretrainSettings, "lift.train:pretrain"),
    "export": Command(ExportSettings, "lift.export:export"),
}


def main() -> int:
    return run_command("lift", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
