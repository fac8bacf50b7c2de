"""The training of a report: what each stage cost, and its curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed import metrics
from bigmed.report import page, runs, svg

# Curves shown at once, by the name in metrics.jsonl; the others are folded away.
MAIN_CURVES = {
    "loss": "loss",
    "val_loss": "validation loss",
    "contrast_accuracy": "contrastive accuracy",
    "lr": "learning rate",
}
HEAD = (
    *("stage", "state", "steps", "weights from", "images/s", "s/step", "data wait", "compile"),
    *("peak memory", "restarts"),
)


def section(run: runs.Run) -> str:
    """Timings and curves of every stage of one run; '' of none."""
    if not run.stages:
        return ""
    lines, parts = [], []
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for stage in run.stages:
        by_name.setdefault(stage["name"], []).append(stage)
        timing = metrics.read_jsonl(run.workdir / stage["directory"] / "timing.jsonl")
        source = stage.get("init_from") or {}
        lines.append(
            [
                page.escape(stage["directory"]),
                page.escape(stage.get("state", "pending")),
                page.escape(stage.get("steps", "-")),
                page.escape(source.get("checkpoint", "scratch")),
                *map(page.escape, _timing(timing)),
            ]
        )
    parts += [page.table(HEAD, lines)]
    parts += [_stage_curves(name, group, run) for name, group in by_name.items()]
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


def _stage_curves(name: str, group: Sequence[Mapping[str, Any]], run: runs.Run) -> str:
    """Curves of a stage, one line a seed."""
    logs = {}
    for stage in group:
        path = run.workdir / stage["directory"] / "metrics.jsonl"
        logs[f"seed {stage['seed']}"] = metrics.read_jsonl(path)
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
    rest = [metric for metric in names if metric not in MAIN_CURVES]
    return "".join(
        [
            f"<h3>{page.escape(name)}</h3>",
            page.legend(list(logs), first_colour=1),
            page.panels(list(map(chart, shown))),
            page.folded(f"{len(rest)} more", page.panels(list(map(chart, rest)))),
        ]
    )
