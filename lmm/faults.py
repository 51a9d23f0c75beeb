"""Why one sample cannot be used; the caller counts it in the drop ledger and goes on."""

from __future__ import annotations


class SampleFault(Exception):
    """`cause` is counted, `detail` is for the reader of the ledger."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail
