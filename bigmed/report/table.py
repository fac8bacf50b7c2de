"""Result rows put together over seeds, and the table that a run ends with."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOTE_SYNTHETIC = "synthetic images made by a program: these numbers say nothing about patients"
NOTE_TRANSDUCTIVE = "transductive: pretraining may have seen its held-out images, without labels"
CLEAN = "none found"  # `leakage` of rows without anything to tell
UNDEFINED = "undefined"
COMMON = ("evaluator", "task", "train_set", "test_set", "fraction")
MARKS = ("shift", "split_sha256", "averaged", "label_policy", "prompts")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One metric of one stage over its seeds.

    Attributes:
      mean: of the seeds where the metric is defined; None if it never is.
      low, high: means of the seeds' 95 % limits; None if any seed lacks them.
      values: of the seeds where it is defined.
      n_seeds: of training, times those that drew the labelled patients, times runs.
      n_images, n_patients: of one seed's test set.
      n_labelled: mean number of training patients whose labels were used, where the metric is
        defined; None if it is not known.
    """

    mean: float | None
    low: float | None
    high: float | None
    values: tuple[float, ...]
    n_seeds: int
    n_images: int
    n_patients: int
    n_labelled: float | None


@dataclasses.dataclass(frozen=True)
class Block:
    """The results of one evaluator on one test set.

    Attributes:
      evaluator, task, train_set, test_set, fraction: what the rows have in common.
      mark: what else tells them from the rows of another block of that title; '' if nothing does.
      stages: in the order of the run.
      cells: {metric: {stage: Cell}}.
      rows: the rows themselves.
    """

    evaluator: str
    task: str
    train_set: str
    test_set: str
    fraction: float
    mark: str
    stages: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]
    rows: tuple[Mapping[str, Any], ...]

    def main_metrics(self) -> list[str]:
        """The metrics that are not of a single class."""
        return [metric for metric in self.cells if "/" not in metric]

    def title(self) -> str:
        """'linear: a/train -> a/test, 10 % of the labels'."""
        share = "" if self.fraction == 1 else f", {self.share()} of the labels"
        return f"{self.data_title()}{share}"

    def data_title(self) -> str:
        """'linear: a/train -> a/test'."""
        mark = f" ({self.mark})" if self.mark else ""
        return f"{self.evaluator}: {self.train_set} -> {self.test_set}{mark}"

    def share(self) -> str:
        """'10 %'."""
        return f"{100 * self.fraction:g} %"

    def size(self) -> str:
        """'150 images of 103 patients, 3 seeds'."""
        cells = self.cells[next(iter(self.cells))].values()
        known = [c for c in cells if c.values] or list(cells)
        n_images, n_patients = (
            span(getattr(c, name) for c in known) for name in ("n_images", "n_patients")
        )
        n_seeds = span(cell.n_seeds for cell in cells)
        seeds = "" if n_seeds == "1" else f", {n_seeds} seeds"
        unit = "patients" if self.resample_unit() == "patient" else "separate images"
        return f"{n_images} images of {n_patients} {unit}{seeds}"

    def resample_unit(self) -> str:
        """'patient', or 'image' where the data set names no patients."""
        return str(self.rows[0].get("resample_unit", "patient"))


def sweeps(made: Sequence[Block]) -> list[tuple[Block, ...]]:
    """Blocks that differ in the fraction alone put together, the smallest fraction first."""
    grouped: dict[tuple, list[Block]] = {}
    for block in made:
        grouped.setdefault((block.task, block.data_title()), []).append(block)
    return [tuple(sorted(g, key=lambda block: block.fraction)) for g in grouped.values()]


def span(values: Iterable[Any]) -> str:
    """'3', or '2-5' of numbers that differ."""
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def blocks(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Result rows, grouped by evaluator and data, seeds put together; orders are the rows' own.

    Rows that differ in what is measured (`MARKS`) are never put together, nor are those of a stage
    that were made with different settings of its evaluator.
    """
    grouped: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(tuple(row.get(key) for key in (*COMMON, *MARKS)), []).append(row)
    titles: dict[tuple, list[tuple]] = {}
    for key in grouped:
        titles.setdefault(key[: len(COMMON)], []).append(key)
    made = []
    for key, group in grouped.items():
        common, alike = key[: len(COMMON)], titles[key[: len(COMMON)]]
        differing = [
            f"{name} {str(value)[:12] if name.endswith('sha256') else value}"
            for i, (name, value) in enumerate(zip(MARKS, key[len(COMMON) :], strict=True))
            if len({other[len(COMMON) + i] for other in alike}) > 1
        ]
        for settings, part in _by_settings(group).items():
            mark = ", ".join([*differing, *([f"settings {settings[:6]}"] if settings else [])])
            made.append(_block((*common, mark), part))
    return made


def _by_settings(rows: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Apart by the settings of their evaluator, if a stage has rows of several; else all as ''."""
    of_stage: dict[str, set] = {}
    for row in rows:
        of_stage.setdefault(row["stage"], set()).add(row.get("settings"))
    if all(len(settings) == 1 for settings in of_stage.values()):
        return {"": rows}
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row.get("settings") or "older", []).append(row)
    return parts


def _block(key: tuple, rows: list[Mapping[str, Any]]) -> Block:
    stages = tuple(dict.fromkeys(row["stage"] for row in rows))
    cells: dict[str, dict[str, Cell]] = {}
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells[metric] = {}
        for stage in stages:
            found = [row for row in rows if row["metric"] == metric and row["stage"] == stage]
            if found:
                cells[metric][stage] = _cell(found)
    return Block(*key, stages=stages, cells=cells, rows=tuple(rows))


def _cell(rows: list[Mapping[str, Any]]) -> Cell:
    valued = [row for row in rows if row["value"] is not None]
    values = tuple(row["value"] for row in valued)
    limits = [(row["ci_low"], row["ci_high"]) for row in valued]
    labelled = [row.get("n_train_patients") for row in valued]
    given = bool(limits) and all(low is not None and high is not None for low, high in limits)
    return Cell(
        mean=sum(values) / len(values) if values else None,
        low=sum(low for low, _ in limits) / len(limits) if given else None,
        high=sum(high for _, high in limits) / len(limits) if given else None,
        values=values,
        n_seeds=len({(row["seed"], row.get("subset_seed"), row.get("run")) for row in rows}),
        n_images=max(row["n_images"] for row in rows),
        n_patients=max(row["n_patients"] for row in rows),
        n_labelled=sum(labelled) / len(labelled) if labelled and None not in labelled else None,
    )


def describe_cell(cell: Cell | None) -> tuple[str, str]:
    """('0.812 [0.750, 0.870]', '0.801 to 0.823' of several seeds), as far as they are known."""
    if cell is None:
        return "-", ""
    if cell.mean is None:
        return UNDEFINED, ""
    spread = ""
    if cell.n_seeds > 1:
        spread = f"{min(cell.values):.3f} to {max(cell.values):.3f}"
        if len(cell.values) < cell.n_seeds:
            spread += f", {len(cell.values)} of {cell.n_seeds} seeds"
    return _with_interval(cell.mean, cell.low, cell.high), spread


def describe_row(row: Mapping[str, Any]) -> str:
    """'auc_macro 0.812 [0.750, 0.870]' of a result row."""
    if row["value"] is None:
        return f"{row['metric']} {UNDEFINED}"
    return f"{row['metric']} {_with_interval(row['value'], row['ci_low'], row['ci_high'])}"


def _with_interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def is_synthetic(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any number comes from images that a program made."""
    return any(row.get("synthetic") for row in rows)


def leakage_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What there is to say of patients that were seen in pretraining; [] where all is well.

    Rows without `leakage` are older than the comparison, and say nothing.
    """
    rows = list(rows)
    notes = []
    declared = dict.fromkeys(row["evaluator"] for row in rows if row.get("transductive"))
    if declared:
        notes.append(f"{', '.join(declared)}: {NOTE_TRANSDUCTIVE}")
    told = dict.fromkeys(row.get("leakage", CLEAN) for row in rows)
    phrases = dict.fromkeys(phrase for one in told if one != CLEAN for phrase in one.split("; "))
    return [*notes, *phrases]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The main metrics as text: a block for each evaluator and test set, a column for each stage.

    Args:
      rows: of results.json.
    """
    if not rows:
        return "no results: config.evaluate names no evaluator"
    made = blocks(rows)
    parts = [
        _format_block(group[0]) if len(group) == 1 else _format_sweep(group)
        for group in sweeps(made)
    ]
    units = {f"{block.resample_unit()}s" for block in made}
    notes = [f"in brackets: 95 % interval, {' or '.join(sorted(units))} resampled"]
    if any(
        cell.n_seeds > 1
        for b in made
        for by_stage in b.cells.values()
        for cell in by_stage.values()
    ):
        notes.append("several seeds: mean, mean limits, and below them the range of the seeds")
    notes += leakage_notes(rows)
    if is_synthetic(rows):
        notes.append(NOTE_SYNTHETIC)
    return "\n\n".join([*parts, "\n".join(notes)])


def _format_block(block: Block) -> str:
    lines = [["", *block.stages]]
    for metric in block.main_metrics():
        texts = [describe_cell(block.cells[metric].get(stage)) for stage in block.stages]
        lines.append([metric, *(text for text, _ in texts)])
        if any(spread for _, spread in texts):
            lines.append(["", *(spread for _, spread in texts)])
    return _aligned(f"{block.title()} ({block.size()})", lines)


def sweep_lines(group: Sequence[Block], metric: str) -> list[list[tuple[str, str]]]:
    """A line for each fraction: (share, labelled patients), then a cell for each stage.

    Cells are `describe_cell`'s; stages are those of any of the blocks, see `stages_of`.
    """
    lines = []
    for block in group:
        cells = block.cells.get(metric, {})
        known = [c.n_labelled for c in cells.values() if c.n_labelled is not None]
        labelled = f"{span(round(n) for n in known)} patients" if known else ""
        texts = [describe_cell(cells.get(stage)) for stage in stages_of(group)]
        lines.append([(block.share(), labelled), *texts])
    return lines


def stages_of(group: Sequence[Block]) -> list[str]:
    """The stages of a sweep, in order."""
    return list(dict.fromkeys(stage for block in group for stage in block.stages))


def _format_sweep(group: Sequence[Block]) -> str:
    """The first metric of a sweep: a line for each fraction, a column for each stage."""
    metric = group[0].main_metrics()[0]
    lines = [["labels", *stages_of(group)]]
    for texts in sweep_lines(group, metric):
        lines += [[text for text, _ in texts], [spread for _, spread in texts]]
    return _aligned(f"{metric} of {group[0].data_title()} ({group[0].size()})", lines)


def _aligned(title: str, lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([title, *(f"  {line}" for line in table)])
