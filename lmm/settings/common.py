"""Checks that the settings of several commands share."""

from __future__ import annotations

from typing import Any


def at_least(settings: Any, least: int, *names: str) -> None:
    """Raises ValueError for the first of the named settings that is given and below `least`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")


def share(settings: Any, name: str) -> None:
    """Raises ValueError unless the named setting is a share between 0 and 1, or not given."""
    value = getattr(settings, name)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share between 0 and 1, found {value}")
