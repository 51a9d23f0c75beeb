"""The `lift` command."""

from __future__ import annotations

import sys

from lift.common.cli import Command, run_command
from lift.settings import EmbedSettings, EncodeSettings, ExportSettings, ImportSettings, PretrainSettings, PushSettings

COMMANDS = {
    "embed": Command(EmbedSettings, "lift.embed:embed"),
    "pretrain": Command(PretrainSettings, "lift.train:pretrain"),
    "export": Command(ExportSettings, "lift.export:export", positional=True),
    "import": Command(ImportSettings, "lift.import_official:import_official", positional=True),
    "encode": Command(EncodeSettings, "lift.encode:encode", positional=True),
    "push": Command(PushSettings, "lift.push:push", positional=True),
}


def main() -> int:
    return run_command("lift", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
