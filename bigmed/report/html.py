"""The report of one run, or of several side by side: one HTML file.

It holds no patient or image identifiers, no report text, and no folders: paths are cut to their
last part.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bigmed import metrics
from bigmed.report import (
    data_card,
    efficiency,
    export,
    page,
    pictures,
    results,
    runs,
    table,
    training,
)

# an absolute path, after anything that may stand before one: '=', a quote, a bracket, 'file://'
FOLDERS = re.compile(
    r"(?:file://)?(?<![\w.}/)<>])(?:/|~[\w.-]*/|[A-Za-z]:\\|\\\\)[^\s'\",;)\]}]*[^\s'\",;)\]}/]/?"
)


def write_report(
    workdirs: str | os.PathLike | Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Writes report.html from what runs left in their workdirs, and the numbers beside it.

    Args:
      workdirs: of one run, or of several to be compared; any of their files may be missing.
      out: the folder to write to; None for the first workdir.

    Returns:
      The path of the report.

    Raises:
      UserError: see `runs.read_run`.
    """
    if isinstance(workdirs, (str, os.PathLike)):
        workdirs = [workdirs]
    made = [runs.read_run(workdir) for workdir in workdirs]
    rows = runs.joined_rows(made)
    groups = runs.tested(rows)
    names = runs.names(made)
    title = " and ".join(names)
    body = [
        f"<h1>{page.escape(title)}</h1>",
        *(page.soft(page.escape(_made_with(run.config))) for run in made),
        _notice(made),
        efficiency.section(groups),
        results.section(groups),
    ]
    for name, run in zip(names, made, strict=True):
        of_run = f": {page.escape(name)}" if len(made) > 1 else ""
        for heading, inner in (
            ("Pictures", pictures.section(run)),
            ("Training", training.section(run)),
            ("Data", data_card.section(run)),
            ("Command and config", _config(run.config)),
        ):
            body.append(f"<h2>{heading}{of_run}</h2>\n{inner}" if inner else "")
    folder = pathlib.Path(out or made[0].workdir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    metrics.replace_text(path, page.document(title, body))
    if rows:
        metrics.replace_text(folder / "results.csv", export.as_csv(rows))
        metrics.replace_text(folder / "results.tex", export.as_latex(rows))
    return path


def _notice(made: Sequence[runs.Run]) -> str:
    synthetic = any(run.synthetic for run in made)
    text = page.escape(table.NOTE_SYNTHETIC.capitalize())
    return f'<p class="notice">{text}.</p>' if synthetic else ""


def _made_with(config: Mapping[str, Any]) -> str:
    versions = config.get("versions", {})
    parts = [f"{name} {versions[name]}" for name in ("bigmed", "jax", "flax") if name in versions]
    if config.get("git_commit"):
        parts.append(f"commit {config['git_commit'][:12]}")
    return ", ".join(parts)


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    command = ""
    if config.get("command"):
        shown = " ".join(without_folders(config["command"]))
        command = f"<pre>{page.escape(shown)}</pre>"
    rest = {key: value for key, value in config.items() if key != "command"}
    text = json.dumps(without_folders(rest), indent=1, sort_keys=True)
    return command + page.folded("All keys, versions", f"<pre>{page.escape(text)}</pre>")


def without_folders(value: Any) -> Any:
    """A copy in which absolute paths are cut to their last part."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"/|~|[A-Za-z]:\\|\\\\", value):  # with spaces and all
        return _last_part(value)
    return FOLDERS.sub(lambda found: _last_part(found[0]), value)


def _last_part(path: str) -> str:
    return ".../" + path.replace("\\", "/").rstrip("/").rpartition("/")[2]
