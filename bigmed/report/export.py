"""Result rows as CSV, for other programs, and the main tables as LaTeX, for a paper."""

import csv
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bigmed.report import table

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each result row, a column for each of their keys; None is empty.

    What is neither a number nor a text stands as JSON; files go by their last part.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        writer.writerow([_csv_cell(key, row.get(key)) for key in keys])
    return stream.getvalue()


def _csv_cell(key: str, value: Any) -> Any:
    if key == "predictions" and value:
        return pathlib.PurePath(value).name
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def as_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """The tables that a run prints, one `tabular` each; they want the package booktabs."""
    parts = ["% \\usepackage{booktabs}"]
    for group in table.sweeps(table.blocks(rows)):
        if len(group) == 1:
            block, stages = group[0], group[0].stages
            lines = [
                [metric, *(table.describe_cell(block.cells[metric].get(s)) for s in stages)]
                for metric in block.main_metrics()
            ]
            caption, first = f"{block.title()} ({block.size()})", "metric"
        else:
            metric, stages = group[0].main_metrics()[0], table.stages_of(group)
            lines = [[share, *cells] for (share, _), *cells in table.sweep_lines(group, metric)]
            caption = f"{metric} of {group[0].data_title()} ({group[0].size()})"
            first = "labels"
        parts.append(_tabular(caption, [first, *stages], lines))
    return "\n\n".join(parts) + "\n"


def _tabular(caption: str, head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    body = [
        " & ".join([_latex(name), *(_latex(shown) for shown, _ in cells)]) + r" \\"
        for name, *cells in lines
    ]
    return "\n".join(
        [
            f"% {' '.join(caption.split())}",
            rf"\begin{{tabular}}{{l{'l' * (len(head) - 1)}}}",
            r"\toprule",
            " & ".join(map(_latex, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
