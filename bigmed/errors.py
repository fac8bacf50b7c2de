"""What a user did wrong, said in one line; and the exit codes of the command."""

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75


class UserError(Exception):
    """A mistake of the user's: the message names the key, file or record and what would be valid.

    Command-line entry points print the message alone, without a traceback, and exit with 2.
    """


class Preempted(Exception):
    """The run was asked to stop (SIGTERM), saved its state and may be run again; exit code 75."""


class NonFiniteError(Exception):
    """A loss, gradient or parameter stopped being finite; the last good state is kept."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`name` against the valid names, as the end of an error line: a guess, then the choices."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), valid, n=1)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}valid: {', '.join(valid) if valid else '(none)'}"
