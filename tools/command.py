"""What the tools of weights share: flags that are needed, one line for a mistake, exit codes."""

import sys
from collections.abc import Callable

from absl import flags

from bigmed.errors import EXIT_OK, EXIT_USER_ERROR, UserError


def run(
    argv: list[str], needed: tuple[flags.FlagHolder, ...], work: Callable[[], int | None]
) -> int:
    """Parses the flags, does the work and returns the exit code, the work's own if it has one."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"'{rest[1]}' is no flag; flags begin with --")
        for flag in needed:
            if flag.value is None:
                raise UserError(f"--{flag.name} is needed")
        return work() or EXIT_OK
    except (UserError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
