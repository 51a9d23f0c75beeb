"""What is shown of the errors of libraries."""

from __future__ import annotations

import pytest

from lift.common.errors import first_line


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("\n no such key.\nsee the manual"), "no such key"),
        (OSError(2, "No such file", "a.bin"), "[Errno 2] No such file: 'a.bin'"),
        (EOFError(), "EOFError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_first_line(error: Exception, shown: str) -> None:
    assert first_line(error) == shown
