"""Label-efficiency curves of few-label sweeps, and how many labels a model saves."""

from collections.abc import Sequence

import numpy as np

from bigmed import efficiency
from bigmed.report import page, runs, svg, table


def section(groups: Sequence[Sequence[runs.Tested]]) -> str:
    """Every sweep's curves with bands, and savings against its first stage; '' without sweeps.

    Args:
      groups: see `runs.tested`.
    """
    sweeps = [group for group in groups if len(group) > 1]
    if not sweeps:
        return ""
    explained = (
        "The metric over the number of labelled patients; bands are mean limits of the 95 % "
        "intervals over test patients. A saving is the share of the labelled patients that a "
        "model does not need to reach what the first model reaches with all of them, read off its "
        "curve between the fractions on a logarithmic scale; its interval covers test patients, "
        "and other training seeds or draws of labels where every point has several."
    )
    parts = [f"<h2>Label efficiency</h2><p>{explained}</p>"]
    return "\n".join([*parts, *map(_sweep, sweeps)])


def _sweep(sweep: Sequence[runs.Tested]) -> str:
    group = [tested.block for tested in sweep]
    metric = group[-1].main_metrics()[0]
    stages = table.stages_of(group)
    series = {}
    for i, stage in enumerate(stages):
        cells = [block.cells.get(metric, {}).get(stage) for block in group]
        known = [c for c in cells if c is not None and c.mean is not None and c.n_labelled]
        if known:
            x = np.array([c.n_labelled for c in known], np.float64)
            series[stage] = (x, np.array([c.mean for c in known]), i, _band(known))
    shown = sorted({round(x) for line in series.values() for x in line[0]})
    chart = svg.curves(
        metric, series, logarithmic=True, x_ticks=shown, axes=("labelled patients", ""), large=True
    )
    head = ["labels", *map(page.escape, stages)]
    lines = [
        [_stacked(cell) for cell in line] for line in table.sweep_lines(group, metric)
    ]
    return "".join(
        [
            f"<h3>{page.escape(group[0].data_title())}</h3>",
            page.soft(page.escape(group[0].size())),
            page.legend(stages),
            f"<figure>{chart}</figure>",
            page.table(head, lines),
            _savings_table(sweep, metric),
        ]
    )


def _stacked(cell: tuple[str, str]) -> str:
    shown, small = map(page.escape, cell)
    return f"{shown}<small>{small}</small>" if small else shown


def _band(cells: Sequence[table.Cell]) -> tuple[np.ndarray, np.ndarray] | None:
    if any(c.low is None for c in cells):
        return None
    return np.array([c.low for c in cells]), np.array([c.high for c in cells])


def savings(sweep: Sequence[runs.Tested], metric: str) -> dict[str, efficiency.Crossing]:
    """Of every stage but the first, against the first with all labels; {} without predictions.

    Args:
      sweep: the smallest fraction first.
      metric: which.
    """
    blocks = [tested.block for tested in sweep]
    if blocks[-1].fraction < 1 or not all(tested.resampled for tested in sweep):
        return {}
    reference = blocks[-1].stages[0]
    shared = set.intersection(*(set(block.stages) for block in blocks))
    patients, of_point = [], []
    for tested in sweep:
        labelled = _labelled(tested.block, metric)
        found = {stage: _metric_of(tested, stage, metric) for stage in shared}
        defined = all(np.isfinite(values).all() for values, _ in found.values())
        # draws of hardly any more patients are no further point
        if defined and np.isfinite(labelled) and labelled > max([0, *patients]):
            patients.append(labelled)
            of_point.append(found)
    whole = _labelled(blocks[-1], metric)
    if reference not in shared or len(patients) < 2 or patients[-1] != whole:
        return {}
    return {
        stage: efficiency.crossing(
            patients,
            [point[stage][0] for point in of_point],
            [point[stage][1] for point in of_point],
            *of_point[-1][reference],
        )
        for stage in blocks[-1].stages
        if stage in shared and stage != reference
    }


def _labelled(block: table.Block, metric: str) -> float:
    """Mean number of labelled patients of the stages; NaN if that of one is not known."""
    return float(np.mean([c.n_labelled or np.nan for c in block.cells[metric].values()]))


def _metric_of(tested: runs.Tested, stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(values [S], samples [S, R]), a repeat being a training seed where there are several."""
    resampled = tested.resampled[stage]
    values = np.array([one.values[metric] for one in resampled])
    samples = np.stack([one.samples[metric] for one in resampled])
    groups = tested.by_seed()
    return (
        np.array([values[own].mean() for own in groups]),
        np.stack([samples[own].mean(axis=0) for own in groups]),
    )


def _savings_table(sweep: Sequence[runs.Tested], metric: str) -> str:
    found = savings(sweep, metric)
    if not found:
        return ""
    reference = sweep[-1].block.stages[0]
    head = ["stage", f"reaches {page.escape(reference)} at 100 % with", "saving"]
    head.append("resamples that reach it")
    lines = []
    for stage, crossing in found.items():
        needed, saving = "not reached", "-"
        if crossing.patients is not None:
            most = "at most " if crossing.at_most else ""
            needed = f"{most}{crossing.patients:.0f} patients"
            least = "at least " if crossing.at_most else ""
            saving = f"{least}{crossing.saving:.0%}"
        saving += f" [{crossing.low:.0%}, {crossing.high:.0%}]"
        lines.append([page.escape(stage), needed, saving, f"{crossing.reached:.0%}"])
    return page.table(head, lines)
