"""What tools share: flags that are needed, one line for a mistake, exit codes."""

import sys
from collections.abc import Callable

from absl import flags

from bigmed.errors import EXIT_OK, EXIT_USER_ERROR, UserError


def run(
    argv: list[str],
    needed: tuple[flags.FlagHolder, ...],
    work: Callable[..., int | None],
    *,
    takes_arguments: bool = False,
) -> int:
    """Parses the flags, does the work and returns the exit code, the work's own if it has one.

    What is no flag is handed to `work` if it takes that, and else refused.
    """
    try:
        _, *rest = flags.FLAGS(argv)
        if rest and not takes_arguments:
            raise UserError(f"'{rest[0]}' is no flag; flags begin with --")
        for flag in needed:
            if flag.value is None:
                raise UserError(f"--{flag.name} is needed")
        return work(*rest) or EXIT_OK
    except (UserError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
