"""Writes the report of one run anew, or one of several runs side by side.

    python tools/report.py DIR
    python tools/report.py DIR DIR2 ... --out FOLDER

Into DIR, or FOLDER: report.html, one file that needs no network; results.csv with every number;
results.tex with the main tables. Runs on the same test images are compared patient by patient. The
data sets need not be there.
"""

import sys

from absl import app, flags

from bigmed import errors
from bigmed.report import html

OUT = flags.DEFINE_string("out", None, "Where to write; needed for several runs.")


def main(argv: list[str]) -> int:
    """Parses the flags, writes the report and returns the exit code."""
    try:
        try:
            _, *workdirs = flags.FLAGS(argv)
        except flags.Error as error:
            raise errors.UserError(str(error)) from error
        if not workdirs:
            raise errors.UserError("give the --workdir of one run or several")
        if len(workdirs) > 1 and not OUT.value:
            raise errors.UserError("several runs: say with --out where their report goes")
        print(html.write_report(workdirs, OUT.value))
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_USER_ERROR
    return errors.EXIT_OK


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(main(sys.argv))
