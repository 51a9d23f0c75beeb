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
    return run_command("lmm", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
