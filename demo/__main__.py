"""Command line of the demo: the whole chain, or one of the parts that only the demo has."""

from __future__ import annotations

import sys

from demo.settings import LanguageModelSettings, RunSettings, TextEncodersSettings, WorldSettings
from lift.common.cli import Command, run_command

COMMANDS = {
    "run": Command(RunSettings, "demo.chain:run"),
    "world": Command(WorldSettings, "demo.world:write_world"),
    "language_model": Command(LanguageModelSettings, "demo.language_model:train_language_model"),
    "text_encoders": Command(TextEncodersSettings, "demo.text_encoders:compare_text_encoders"),
}


def main() -> int:
    return run_command("python -m demo", COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
