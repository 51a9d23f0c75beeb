"""One table of commands per room; this module parses the settings of the chosen one and runs it.

Modules are imported only when their command runs, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import errno
import importlib
import logging
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

from lift.common.errors import PREEMPTED_STATUS, Preempted, UserError
from lift.common.settings import nearest, parse_settings

FAULTS_OF_THE_MACHINE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})


@dataclass(frozen=True)
class Command:
    settings: type
    """Dataclass with the settings; its docstring is the command's help."""
    target: str
    """`module:function`; the function takes the settings."""
    positional: bool = False
    """Required settings are given by position."""


def run_command(prog: str, commands: dict[str, Command], arguments: list[str] | None = None) -> int:
    """Runs `prog COMMAND ...`. Returns the exit status: 0; 2 after a UserError, printed as one message; 75 to be requeued."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(prog, commands))
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise UserError(f"{prog}: unknown command '{arguments[0]}'. {nearest(arguments[0], list(commands))}")
        command = commands[arguments[0]]
        settings: Any = parse_settings(
            command.settings, arguments[1:], f"{prog} {arguments[0]}", command.settings.__doc__ or "", command.positional
        )
        module, function = command.target.split(":")
        run = getattr(importlib.import_module(module), function)
        _quiet_libraries()
        run(settings)
    except UserError as error:
        # raised in a data loader's worker it arrives with that process's traceback before it
        print(f"error: {_printable(str(error).rpartition('UserError: ')[2].strip())}", file=sys.stderr)
        return 2
    except Preempted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return PREEMPTED_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FAULTS_OF_THE_MACHINE:
            print(f"error: {error}. Free room or mend the permissions, then run the same command again.", file=sys.stderr)
            return 2
        traceback.print_exc()
        print("This is a fault of the toolkit, not of your input. Please report it with the lines above.", file=sys.stderr)
        return 1
    return 0


def _printable(text: str) -> str:
    """What comes from data does not steer the terminal: control characters are shown by their codes."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _quiet_libraries() -> None:
    """Leaves the terminal to our own progress bars; what transformers would only warn of, the rooms check themselves."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that it does without
    warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries will rename is our matter, not the user's
    if "transformers" in sys.modules:
        of_transformers = importlib.import_module("transformers.utils.logging")
        of_transformers.set_verbosity_error()
        of_transformers.disable_progress_bar()


def _overview(prog: str, commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    first_lines = {name: (command.settings.__doc__ or "").splitlines()[0] for name, command in commands.items()}
    lines = [f"  {name:<{width}}  {line}" for name, line in first_lines.items()]
    usage = f"usage: {prog} COMMAND [--config FILE] [--key value ...]"
    return "\n".join([usage, "", *lines, "", f"{prog} COMMAND --help lists its settings."])
