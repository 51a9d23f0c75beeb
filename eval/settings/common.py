"""Checks that the settings of several commands share."""

from __future__ import annotations

from pathlib import Path

from lift.common.errors import UserError


def given(value: Path | None, name: str) -> Path:
    """The path of a required option. Raises UserError when it was not given."""
    if value is None:
        raise UserError(f"--{name} is required: a path.")
    return value


def at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise ValueError(f"--{name}: expected at least {least}, found {value}.")
