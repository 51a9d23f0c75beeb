"""One table of commands per room; this module parses the settings of the chosen one and runs it.

Modules are imported only when their command runs, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import dataclass

from lift.common.errors import UserError
from lift.common.settings import nearest, parse_settings


@dataclass(frozen=True)
class Command:
    settings: type
    """Dataclass with the settings; its docstring is the command's help."""
    target: str
    """`module:function`; the function takes the settings."""
    positional: bool = False
    """Required settings are given by position."""


def run_command(prog: str, commands: dict[str, Command], arguments: list[str] | None = None) -> int:
    """Runs `prog COMMAND ...`. Returns the exit status: 0, or 2 after a UserError, which is printed as one message."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(prog, commands))
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise UserError(f"{prog}: unknown command '{arguments[0]}'. {nearest(arguments[0], list(commands))}")
        command = commands[arguments[0]]
        settings = parse_settings(
            command.settings, arguments[1:], f"{prog} {arguments[0]}", command.settings.__doc__ or "", command.positional
        )
        module, function = command.target.split(":")
        getattr(importlib.import_module(module), function)(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        print("This looks like a fault of the toolkit, not of your input. Please report it with the lines above.", file=sys.stderr)
        return 1
    return 0


def _overview(prog: str, commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {(command.settings.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    return "\n".join([f"usage: {prog} COMMAND [--config FILE] [--key value ...]", "", *lines, "", f"{prog} COMMAND --help lists its settings."])
