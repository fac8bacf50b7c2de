"""Writes the report of one run anew, or one of several runs side by side.

    python tools/report.py DIR
    python tools/report.py DIR DIR2 ... --out FOLDER

Into DIR, or FOLDER: report.html, one file that needs no network; results.csv with every number;
results.tex with the main tables. Runs on the same test images are compared patient by patient. The
data sets need not be there.
"""

import sys

import command  # beside this file
from absl import app, flags

from bigmed.errors import UserError
from bigmed.report import html

OUT = flags.DEFINE_string("out", None, "Where to write; needed for several runs.")


def _write(*workdirs: str) -> None:
    if not workdirs:
        raise UserError("give the --workdir of one run or several")
    if len(workdirs) > 1 and not OUT.value:
        raise UserError("several runs: say with --out where their report goes")
    print(html.write_report(workdirs, OUT.value))


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(command.run(sys.argv, (), _write, takes_arguments=True))
