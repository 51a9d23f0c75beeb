"""Checks that the settings of many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lift.common.errors import UserError


def given(value: Path | None, name: str) -> Path:
    """The path of an option that may be left out only where nothing needs it. Raises UserError when it was not given."""
    if value is None:
        raise UserError(f"--{name} is required: a path.")
    return value


def at_least(settings: Any, least: int, *names: str, prefix: str = "") -> None:
    """Raises ValueError for the first of the named settings that is given and below `least`.

    Args:
        prefix: of the names in the message, as `--probe.`.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{prefix}{name}: expected at least {least}, found {value}")


def share(settings: Any, name: str) -> None:
    """Raises ValueError unless the named setting is a share between 0 and 1, or not given."""
    value = getattr(settings, name)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share between 0 and 1, found {value}")
