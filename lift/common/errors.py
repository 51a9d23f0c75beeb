"""The one exception for faults a user can mend: wrong paths, keys, data, missing tools."""


class UserError(Exception):
    """A fault in what the user gave.

    The message is one sentence or two: the file or key, what was expected, what was found, what to do. Commands print it
    without a traceback and exit with status 2.
    """
