"""The exceptions that commands end with in an orderly way: faults a user can mend, and being asked to stop."""


class UserError(Exception):
    """A fault in what the user gave.

    The message is one sentence or two: the file or key, what was expected, what was found, what to do. Commands print it
    without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's error says, as part of a message: its first line without the full stop, or its type when it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


class Preempted(Exception):
    """The process was asked to end (SIGTERM) and has saved its work; the same command goes on. The exit status is 75."""


PREEMPTED_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: a temporary failure, try again."""
