"""The one exception that users see."""


class InputError(Exception):
    """Bad usage or bad input, as one line: what, found, expected, what to do. The command line exits with 2 on it."""
