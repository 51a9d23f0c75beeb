"""Command line `lift-eval`: the table of its commands."""

from __future__ import annotations

import sys

from eval import settings
from lift.common.cli import Command, run_command

COMMANDS = {
    "encoder": Command(settings.EncoderSettings, "eval.encoder:encoder", positional=True),
    "data": Command(settings.DataSettings, "eval.lmm.tasks.data:data", positional=True),
    "lmm": Command(settings.LmmSettings, "eval.lmm.command:lmm", positional=True),
    "stock": Command(settings.StockSettings, "eval.lmm.stock:stock", positional=True),
    "score": Command(settings.ScoreSettings, "eval.answers.score:score", positional=True),
    "compare": Command(settings.CompareSettings, "eval.comparison.command:compare", positional=True),
    "report": Command(settings.ReportSettings, "eval.report.command:report", positional=True),
    "cost": Command(settings.CostSettings, "eval.cost.command:cost"),
    "text": Command(settings.TextSettings, "eval.text.analysis:text", positional=True),
}


def main(arguments: list[str] | None = None) -> int:
    return run_command("lift-eval", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
