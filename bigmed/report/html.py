"""The report of a workdir: one HTML file that needs no network, no script and no other file.

It holds no patient or image identifiers, and no folders: paths are cut to their last part.
"""

import base64
import html
import itertools
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed import metrics, statistics
from bigmed.report import svg, table

log = logging.getLogger("bigmed")

# Curves shown at once, by the name in metrics.jsonl; the others are folded away.
MAIN_CURVES = {
    "loss": "loss",
    "val_loss": "validation loss",
    "contrast_accuracy": "contrastive accuracy",
    "lr": "learning rate",
}
CHANCE = {"auc_macro": 0.5}
OPEN_LINES = 9  # a longer table of differences is folded away
SAME_TEST_SET = ("labels", "image_ids", "class_names")  # arrays of predictions to be compared

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2229; --soft: #616b78; --rule: #d9dee5;
  --panel: #f5f7f9; --notice: #fff3d6; --notice-ink: #5c4300;
  --c0: #5b6572; --c1: #0b6bb8; --c2: #b8500b; --c3: #0f7b5f; --c4: #a03a86; --c5: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6eaef; --soft: #9aa5b3;
  --rule: #343c46; --panel: #1c2229; --notice: #3d3010; --notice-ink: #f5dfa6;
  --c0: #a7b1be; --c1: #62b0f0; --c2: #f09a5b; --c3: #52c9a6; --c4: #e08ac9; --c5: #d9bd4f; } }
body { margin: 0 auto; padding: 24px 20px 64px; max-width: 1080px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
h3 { font-size: 16px; margin: 28px 0 2px; }
p { margin: 4px 0 10px; max-width: 78ch; } .soft { color: var(--soft); }
.notice { background: var(--notice); color: var(--notice-ink); padding: 10px 14px;
  border-radius: 6px; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 12px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; }
td small { display: block; color: var(--soft); font-size: 12.5px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--panel); padding: 12px; border-radius: 6px; overflow-x: auto;
  font-size: 12.5px; }
.panels { display: flex; flex-wrap: wrap; gap: 8px 16px; }
.panels svg { flex: 0 1 340px; }
figure { margin: 12px 0; } figure img { max-width: 100%; border-radius: 4px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12.5px; }
svg .soft { fill: var(--soft); font-size: 11px; } svg .title { font-weight: 600; }
svg .value { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.chance { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
.whisker { stroke: var(--c); stroke-width: 2.5; stroke-linecap: round; opacity: .55; }
.dot { fill: var(--c); stroke: var(--page); stroke-width: 1.5; }
.ring { fill: none; stroke: var(--c); stroke-width: 1.2; }
.curve { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.key { display: inline-block; width: 14px; height: 3px; margin: 0 6px 4px 0; background: var(--c);
  vertical-align: middle; }
""" + "\n".join(f".s{i} {{ --c: var(--c{i}); }}" for i in range(svg.NUM_COLOURS))


def write_report(
    workdir: str | os.PathLike, gallery: Sequence[tuple[str, bytes]] = ()
) -> pathlib.Path:
    """Writes `workdir`/report.html from what the run left there.

    Args:
      workdir: of a run; any of its files may be missing.
      gallery: (caption, PNG) pairs to show.

    Returns:
      The path of the report.
    """
    workdir = pathlib.Path(workdir)
    config = _read_json(workdir / "config.json", {})
    stages = _read_json(workdir / "curriculum.json", {}).get("stages", [])
    rows = _read_json(workdir / "results.json", [])
    synthetic = table.is_synthetic(rows) or bool(config.get("config", {}).get("phantom"))
    body = [
        f"<h1>{_e(workdir.name or 'bigmed')}</h1>",
        f'<p class="soft">{_e(_made_with(config))}</p>',
        f'<p class="notice">{_e(table.NOTE_SYNTHETIC.capitalize())}.</p>' if synthetic else "",
        _results(rows, workdir / "predictions"),
        _training(stages, workdir),
        _gallery(gallery),
        _config(config),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(workdir.name)}: bigmed report</title><style>{STYLE}</style></head>\n"
        f"<body>{chr(10).join(filter(None, body))}</body></html>\n"
    )
    path = workdir / "report.html"
    metrics.replace_text(path, page)
    return path


def _e(value: Any) -> str:
    return html.escape(str(value))


def _read_json(path: pathlib.Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def _made_with(config: Mapping[str, Any]) -> str:
    versions = config.get("versions", {})
    parts = [f"{name} {versions[name]}" for name in ("bigmed", "jax", "flax") if name in versions]
    if config.get("git_commit"):
        parts.append(f"commit {config['git_commit'][:12]}")
    return ", ".join(parts)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each line is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in lines
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


# ----------------------------------------------------------------------------------------- results


def _results(rows: Sequence[Mapping[str, Any]], predictions: pathlib.Path) -> str:
    if not rows:
        return "<h2>Results</h2><p>No evaluator has run.</p>"
    explained = (
        "Each number is followed by its 95 % percentile interval from a bootstrap that draws "
        "patients, not images, with replacement. An AUC of a class that the test set lacks is "
        "undefined and enters no mean. With several seeds: the mean, the mean limits, and the "
        "range over the seeds."
    )
    parts = [f"<h2>Results</h2><p>{explained}</p>"]
    for block in table.blocks(rows):
        parts += [
            f"<h3>{_e(block.title())}</h3>",
            f'<p class="soft">{_e("; ".join([block.size(), *_fine_print(block)]))}</p>',
            _metrics_table(block, block.main_metrics()),
            *(_chart(block, metric) for metric in block.main_metrics()),
            _differences(block, predictions),
        ]
        per_class = [metric for metric in block.cells if "/" in metric]
        if per_class:
            inner = _metrics_table(block, per_class)
            parts.append(f"<details><summary>Each class</summary>{inner}</details>")
    return "\n".join(parts)


def _fine_print(block: table.Block) -> list[str]:
    """What the numbers of a block rest on, in a few phrases."""
    row = block.rows[0]
    notes = [f"split {row['split_sha256'][:12]}"]
    if "label_policy" in row:
        notes.append(f"labels: {row['label_policy']}")
    for key, said in (
        ("undefined_classes", "undefined in the test set"),
        ("untrained_classes", "without training labels of both kinds"),
    ):
        names = dict.fromkeys(name for r in block.rows for name in r.get(key, ()))
        if names:
            notes.append(f"{said}: {', '.join(names)}")
    for stage in block.stages:
        of_stage = [r.get("chosen", {}) for r in block.rows if r["stage"] == stage]
        chosen = dict.fromkeys(", ".join(f"{k}={v:.3g}" for k, v in c.items()) for c in of_stage)
        if any(chosen):
            notes.append(f"{stage} chose {' / '.join(chosen)}")
    return notes


def _metrics_table(block: table.Block, names: Sequence[str]) -> str:
    lines = []
    for metric in names:
        texts = [table.describe_cell(block.cells[metric].get(stage)) for stage in block.stages]
        cells = [f"{_e(t)}{f'<small>{_e(s)}</small>' if s else ''}" for t, s in texts]
        lines.append([_e(metric), *cells])
    return _table(["metric", *map(_e, block.stages)], lines)


def _chart(block: table.Block, metric: str) -> str:
    found = [(stage, block.cells[metric].get(stage)) for stage in block.stages]
    drawn = [
        (stage, c.mean, c.low, c.high, c.values, table.describe_cell(c)[0])
        for stage, c in found
        if c is not None
    ]
    chart = svg.dots(f"{metric} of {block.title()}", drawn, CHANCE.get(metric))
    return f'<figure><figcaption class="soft">{_e(metric)}</figcaption>{chart}</figure>'


def _differences(block: table.Block, predictions: pathlib.Path) -> str:
    """Each stage against every one before it, on the same resamples of the same test images."""
    resampled = _resampled(block, predictions)
    lines = []
    for before, after in itertools.combinations(resampled, 2):
        found = statistics.paired_difference(resampled[after], resampled[before])
        for metric in block.main_metrics():
            d = found[metric]
            interval = "" if d.low is None else f" [{d.low:+.3f}, {d.high:+.3f}]"
            value = f"{d.value:+.3f}{interval}" if np.isfinite(d.value) else table.UNDEFINED
            lines.append([f"{_e(after)} - {_e(before)}", _e(metric), value])
    if not lines:
        return ""
    note = (
        '<p class="soft">Differences between stages, paired by patient. The interval covers the '
        "choice of test patients, not what other training seeds would do.</p>"
    )
    made = note + _table(["stages", "metric", "difference"], lines)
    if len(lines) <= OPEN_LINES:
        return made
    return f"<details><summary>Differences between stages</summary>{made}</details>"


def _resampled(block: table.Block, predictions: pathlib.Path) -> dict[str, statistics.Resampled]:
    """The metrics of each stage on resamples, from its predictions; {} if any cannot be used."""
    files: dict[str, dict[int, str]] = {stage: {} for stage in block.stages}
    for row in block.rows:
        if row.get("predictions"):
            files[row["stage"]][row["seed"]] = row["predictions"]
    seeds = sorted(set.intersection(*(set(of_stage) for of_stage in files.values())))
    if len(block.stages) < 2 or not seeds:
        return {}
    try:
        loaded = {
            stage: [_load_predictions(predictions / of_stage[seed]) for seed in seeds]
            for stage, of_stage in files.items()
        }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("report: predictions cannot be read, differences are left out (%s)", error)
        return {}
    first = loaded[block.stages[0]][0]
    for other in itertools.chain(*loaded.values()):
        if any(not np.array_equal(other[key], first[key]) for key in SAME_TEST_SET):
            return {}
    names = [str(name) for name in first["class_names"]]
    return {
        stage: statistics.resample(
            [one["scores"] for one in of_seeds],
            first["labels"],
            first["patients"],
            names,
            block.task,
        )
        for stage, of_seeds in loaded.items()
    }


def _load_predictions(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ---------------------------------------------------------------------------------------- training


def _training(stages: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> str:
    if not stages:
        return ""
    lines, parts = [], []
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        by_name.setdefault(stage["name"], []).append(stage)
        timing = metrics.read_jsonl(workdir / stage["directory"] / "timing.jsonl")
        source = stage.get("init_from") or {}
        lines.append(
            [
                _e(stage["directory"]),
                _e(stage.get("state", "pending")),
                _e(stage.get("steps", "-")),
                _e(source.get("checkpoint", "scratch")),
                *map(_e, _timing(timing)),
            ]
        )
    head = ["stage", "state", "steps", "weights from", "images/s", "s/step", "data wait"]
    head += ["compile", "peak memory", "restarts"]
    parts += ["<h2>Training</h2>", _table(head, lines)]
    for name, group in by_name.items():
        parts.append(_stage_curves(name, group, workdir))
    return "\n".join(filter(None, parts))


def _timing(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Medians over the readings of a stage, and what it was held up by."""

    def median(key: str, form: str) -> str:
        values = [line[key] for line in lines if line.get(key) is not None]
        return form.format(np.median(values)) if values else "-"

    def events(name: str) -> list[Mapping[str, Any]]:
        return [line for line in lines if line.get("event") == name]

    peaks = [line["device_peak_gib"] for line in lines if line.get("device_peak_gib") is not None]
    compiled = [line["seconds"] for line in events("compiled")]
    return [
        median("images_per_second", "{:.1f}"),
        median("step_seconds", "{:.3f}"),
        median("data_wait_fraction", "{:.1%}"),
        f"{compiled[-1]:.0f} s" if compiled else "-",
        f"{max(peaks):.1f} GiB" if peaks else "-",
        str(len(events("restarted"))),
    ]


def _stage_curves(name: str, group: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> str:
    """Curves of a stage, one line a seed."""
    logs = {
        f"seed {stage['seed']}": metrics.read_jsonl(workdir / stage["directory"] / "metrics.jsonl")
        for stage in group
    }
    names = sorted({key for lines in logs.values() for line in lines for key in line} - {"step"})
    if not names:
        return ""

    def chart(metric: str) -> str:
        series = {}
        for i, (seed, lines) in enumerate(logs.items()):
            points = [(li["step"], li[metric]) for li in lines if li.get(metric) is not None]
            if points:
                steps, values = map(np.array, zip(*points, strict=True))
                series[seed] = (steps, values, i + 1)
        return svg.curves(MAIN_CURVES.get(metric, metric), series)

    shown = [metric for metric in MAIN_CURVES if metric in names]
    folded = [metric for metric in names if metric not in MAIN_CURVES]
    key = ""
    if len(logs) > 1:
        marks = (
            f'<span class="key {svg.colour_class(i + 1)}"></span>{_e(seed)}'
            for i, seed in enumerate(logs)
        )
        key = f'<p class="soft">{" &nbsp; ".join(marks)}</p>'
    parts = [f"<h3>{_e(name)}</h3>", key, f'<div class="panels">{"".join(map(chart, shown))}</div>']
    if folded:
        inner = "".join(map(chart, folded))
        parts.append(
            f'<details><summary>{len(folded)} more</summary><div class="panels">{inner}</div>'
            "</details>"
        )
    return "".join(parts)


# ------------------------------------------------------------------------------- gallery and config


def _gallery(gallery: Sequence[tuple[str, bytes]]) -> str:
    if not gallery:
        return ""
    figures = "".join(
        f'<figure><img alt="{html.escape(caption, quote=True)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f'<figcaption class="soft">{_e(caption)}</figcaption></figure>'
        for caption, png in gallery
    )
    return f"<h2>Pictures</h2>{figures}"


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = json.dumps(_without_folders(config), indent=1, sort_keys=True)
    return f"<h2>Config</h2><details><summary>All keys</summary><pre>{_e(text)}</pre></details>"


def _without_folders(value: Any) -> Any:
    """A copy in which absolute paths are cut to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "\\\\")) or value[1:3] == ":\\"):
        return ".../" + value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value
