"""Two runs side by side: the records of both come in, the same rows in the same order go out, or an error says what differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eval.records import Record
from lift.common.errors import UserError

HINT = "Run both on the same data; answer files get questions and categories with --questions."
ASKED = ("question", "options", "answer", "rotation", "categories")
"""What `Record.text_hash` is of, and the pass."""


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record)
    return tasks


def same_questions(records_a: Sequence[Record], records_b: Sequence[Record], name_a: str, name_b: str) -> list[Record]:
    """`records_b` in the order of `records_a`, and under its groups; both of one task.

    Groups may differ where only one run has images: some benchmarks' groups are the rows of an image.

    Raises:
        UserError: a row that one run lacks or has twice, another question, options, answer, category, rotation or image.
    """
    where = f"{name_a} and {name_b}"
    of_a, of_b = _by_key(records_a, name_a), _by_key(records_b, name_b)
    if only := [key for key in (*of_a, *of_b) if (key in of_a) != (key in of_b)]:
        side, record = (name_a, of_a[only[0]]) if only[0] in of_a else (name_b, of_b[only[0]])
        raise UserError(
            f"{where}: expected the same questions; {len(only)} are in one run only, first {record.task} {record.key} "
            f"(only in {side}). {HINT}"
        )
    for key, a in of_a.items():
        b = of_b[key]
        regrouped = a.group != b.group and bool(a.images) == bool(b.images)
        if any(getattr(a, name) != getattr(b, name) for name in ASKED) or regrouped:
            name = next(name for name in (*ASKED, "group") if getattr(a, name) != getattr(b, name) or name == "group")
            raise UserError(
                f"{where}: {a.task} {key} has another {name}: {getattr(a, name)!r} and {getattr(b, name)!r}. {HINT}"
            )
        if a.images and b.images and a.images != b.images:
            raise UserError(f"{where}: {a.task} {key} has another image: {a.images[0]:.12} and {b.images[0]:.12}. {HINT}")
    return [b if b.group == a.group else replace(b, group=a.group) for a, b in ((a, of_b[key]) for key, a in of_a.items())]


def _by_key(records: Sequence[Record], name: str) -> dict[str, Record]:
    of: dict[str, Record] = {}
    for record in records:
        if record.key in of:
            raise UserError(f"{name}: {record.task} {record.key} occurs twice. Give every row its own key.")
        of[record.key] = record
    return of
