"""Command line of the `lmm` room: from an encoder and a language model to a trained LLaVA folder."""

from __future__ import annotations

import sys

from lift.common.cli import Command, run_command
from lmm.quiet import quiet
from lmm.settings import (
    BuildSettings,
    ChatSettings,
    CheckDataSettings,
    ExportSettings,
    FinetuneSettings,
    GenerateSettings,
    ImportSettings,
    InspectMaskSettings,
    MergeSettings,
    ServeSettings,
    TrainSettings,
)

COMMANDS = {
    "build": Command(BuildSettings, "lmm.build:build"),
    "train": Command(TrainSettings, "lmm.train:train"),
    "merge": Command(MergeSettings, "lmm.merge:merge", positional=True),
    "finetune": Command(FinetuneSettings, "lmm.finetune:finetune"),
    "check-data": Command(CheckDataSettings, "lmm.check_data:check_data"),
    "inspect-mask": Command(InspectMaskSettings, "lmm.inspect_mask:inspect_mask"),
    "export": Command(ExportSettings, "lmm.llava_export:export_llava", positional=True),
    "import": Command(ImportSettings, "lmm.llava_import:import_llava", positional=True),
    "generate": Command(GenerateSettings, "lmm.generate:generate", positional=True),
    "chat": Command(ChatSettings, "lmm.chat:chat", positional=True),
    "serve": Command(ServeSettings, "lmm.serve:serve", positional=True),
}


def main() -> int:
    quiet()
    return run_command("lmm", COMMANDS, _second_folder(sys.argv[1:]))


def _second_folder(arguments: list[str]) -> list[str]:
    """`lmm serve DIR DIR2` as `lmm serve DIR --against DIR2`: the settings parser takes required ones by position only."""
    if arguments[:1] == ["serve"] and len(arguments) > 2 and not any(word.startswith("-") for word in arguments[1:3]):
        return [*arguments[:2], "--against", *arguments[2:]]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
