"""The results of a report: tables, forest plots, differences between models, curves."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bigmed import comparison, statistics
from bigmed.errors import UserError
from bigmed.report import curves, page, runs, svg, table

CHANCE = {"auc_macro": 0.5}
# Drawn as forest plots; the other metrics are in the tables alone.
DRAWN = ("auc_macro", "ap_macro", "accuracy", "balanced_accuracy", "precision@5", "precision@10")
COMPARED = ("auc_macro", "ap_macro", "accuracy", "balanced_accuracy")
PERMUTATIONS = 10_000
OPEN_LINES = 9  # a longer table of differences is folded away


@dataclasses.dataclass(frozen=True)
class Difference:
    """One stage against another, on the same resamples of the same test images.

    Attributes:
      after, before: the stages; the difference is the first's minus the second's.
      metric: of both.
      found: the difference, its interval over test patients.
      seeds: the same over several training seeds; None of one.
      p, p_holm: two-sided, of the bootstrap over patients; adjusted for all pairs of stages. None
        where there is no interval.
      p_permutation: of accuracies, `comparison.permutation_test`; else None.
    """

    after: str
    before: str
    metric: str
    found: statistics.Estimate
    seeds: comparison.OverSeeds | None
    p: float | None
    p_holm: float | None
    p_permutation: float | None


def section(groups: Sequence[Sequence[runs.Tested]]) -> str:
    """All results but the label-efficiency curves; `groups` are those of `runs.tested`."""
    if not groups:
        return "<h2>Results</h2><p>No evaluator has run.</p>"
    explained = (
        "Each number is followed by its 95 % percentile interval from a bootstrap that draws "
        "patients, not images, with replacement. An AUC of a class that the test set lacks is "
        "undefined and enters no mean. With several seeds: the mean, the mean limits, and the "
        "range over the seeds."
    )
    parts = [f"<h2>Results</h2><p>{explained}</p>"]
    for *fewer, whole in groups:
        parts.append(_block(whole))
        parts += [page.folded(tested.block.title(), _block(tested)) for tested in fewer]
    return "\n".join(parts)


def _block(tested: runs.Tested) -> str:
    block, metrics = tested.block, tested.block.main_metrics()
    parts = [
        f"<h3>{page.escape(block.title())}</h3>",
        page.soft(page.escape("; ".join([block.size(), *_fine_print(block)]))),
        _metrics_table(block, metrics),
        *(_forest(block, metric) for metric in metrics if metric in DRAWN),
        _differences_table(differences(tested)),
        delong_table(tested) if len(tested.predictions) > 1 else "",
        curves.section(block.task, tested.predictions),
    ]
    details = [metric for metric in block.cells if "/" in metric]
    parts.append(
        page.folded("Each class, thresholds and calibration", _metrics_table(block, details))
        if details
        else ""
    )
    return "\n".join(filter(None, parts))


def _fine_print(block: table.Block) -> list[str]:
    """What the numbers of a block rest on, in a few phrases."""
    row = block.rows[0]
    notes = [f"split {row['split_sha256'][:12]}"]
    if "label_policy" in row:
        notes.append(f"labels: {row['label_policy']}")
    if "prompts" in row:
        notes.append(f"prompts: {row['prompts']}, file {row['prompts_sha256'][:12]}")
    notes += table.leakage_notes(block.rows)
    if row.get("averaged"):
        notes.append(f"{row['averaged']} averaged by {row['unit']}")
    if any(r.get("interval") == "delong" for r in block.rows):
        notes.append("AUCs of single classes: DeLong's interval, clustered by patient")
    if row.get("shift"):
        notes.append("another site: what was learnt is applied unchanged")
    for key, said in (
        ("undefined_classes", "undefined in the test set"),
        ("untrained_classes", "without training labels of both kinds"),
    ):
        named = dict.fromkeys(name for r in block.rows for name in r.get(key, ()))
        if named:
            notes.append(f"{said}: {', '.join(named)}")
    reasons = dict.fromkeys(r["reason"] for r in block.rows if r.get("reason"))
    notes += [f"missing: {reason}" for reason in reasons]
    for stage in block.stages:
        of_stage = [r.get("chosen", {}) for r in block.rows if r["stage"] == stage]
        chosen = dict.fromkeys(
            ", ".join(f"{k}={_brief(v)}" for k, v in setting.items()) for setting in of_stage
        )
        if any(chosen):
            notes.append(f"{stage} chose {' / '.join(filter(None, chosen))}")
    return notes


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else str(value)


def _metrics_table(block: table.Block, names: Sequence[str]) -> str:
    lines = []
    for metric in names:
        texts = [table.describe_cell(block.cells[metric].get(stage)) for stage in block.stages]
        cells = [
            f"{page.escape(t)}{f'<small>{page.escape(s)}</small>' if s else ''}" for t, s in texts
        ]
        lines.append([page.escape(metric), *cells])
    return page.table(["metric", *map(page.escape, block.stages)], lines)


def _forest(block: table.Block, metric: str) -> str:
    found = [(stage, block.cells[metric].get(stage)) for stage in block.stages]
    drawn = [
        (stage, c.mean, c.low, c.high, c.values, table.describe_cell(c)[0])
        for stage, c in found
        if c is not None
    ]
    chart = svg.dots(f"{metric} of {block.title()}", drawn, CHANCE.get(metric))
    return f'<figure><figcaption class="soft">{page.escape(metric)}</figcaption>{chart}</figure>'


def differences(tested: runs.Tested) -> list[Difference]:
    """Each stage against every one before it; p-values are adjusted within a metric."""
    resampled, seeds = tested.resampled, tested.by_seed()
    apart = {
        (before, after): [
            a.minus(b) for b, a in zip(resampled[before], resampled[after], strict=True)
        ]
        for before, after in itertools.combinations(resampled, 2)
    }
    metrics = [metric for metric in COMPARED if metric in tested.block.cells]
    made = []
    for metric in metrics:
        of_metric = []
        for (before, after), repeats in apart.items():
            values = np.array([one.values[metric] for one in repeats])  # [S]
            samples = np.stack([one.samples[metric] for one in repeats])  # [S, R]
            whole, patients = samples.mean(axis=0), repeats[0].patients
            mean = statistics.Resampled({metric: float(values.mean())}, {metric: whole}, patients)
            found, over, p = mean.estimates()[metric], None, None
            if found.low is not None:
                p = comparison.bootstrap_p(whole)
                if len(seeds) > 1 and np.isfinite(values).all():
                    by_seed = [(values[own].mean(), samples[own].mean(axis=0)) for own in seeds]
                    over = comparison.over_seeds(
                        [value for value, _ in by_seed], np.stack([s for _, s in by_seed])
                    )
            exchanged = _permutation_p(tested, after, before) if metric == "accuracy" else None
            of_metric.append(Difference(after, before, metric, found, over, p, None, exchanged))
        adjusted = comparison.holm([d.p for d in of_metric])
        made += [
            dataclasses.replace(d, p_holm=p) for d, p in zip(of_metric, adjusted, strict=True)
        ]
    return made


def _permutation_p(tested: runs.Tested, after: str, before: str) -> float:
    """Whether the answers of two stages, right on average over the repeats, can be exchanged."""
    right = {}
    for stage in (after, before):
        answers = [one["scores"].argmax(axis=1) for one in tested.predictions[stage]]
        actual = tested.predictions[stage][0]["labels"].argmax(axis=1)
        right[stage] = np.mean([answer == actual for answer in answers], axis=0)
    patients = tested.predictions[after][0]["patients"]
    return comparison.permutation_test(
        right[after], right[before], patients, num_permutations=PERMUTATIONS
    )


def delong_table(tested: runs.Tested) -> str:
    """The AUC of each class, stage against stage by DeLong's test; '' of one stage.

    The AUC of a stage is the mean over its repeats.
    """
    stages, names = list(tested.predictions), []
    contrasts = []
    for c, name in enumerate(tested.class_names):
        each = [one["scores"][:, c] for s in stages for one in tested.predictions[s]]
        first = tested.predictions[stages[0]][0]
        try:
            found = comparison.delong(each, first["labels"][:, c], first["patients"])
        except UserError:  # too few patients
            continue
        repeats = len(tested.repeats)
        for before, after in itertools.combinations(range(len(stages)), 2):
            weights = np.zeros(len(each))
            weights[after * repeats : (after + 1) * repeats] = 1 / repeats
            weights[before * repeats : (before + 1) * repeats] = -1 / repeats
            names.append((name, f"{stages[after]} - {stages[before]}"))
            contrasts.append(found.contrast(weights))
    if not contrasts:
        return ""
    lines = [
        [page.escape(name), page.escape(pair), f"{one.value:+.3f}{_interval(one)}", *map(_p, ps)]
        for (name, pair), one, *ps in zip(
            names, contrasts, [c.p for c in contrasts], comparison.holm([c.p for c in contrasts]),
            strict=True,
        )
    ]  # fmt: skip
    head = ["class", "stages", "difference of AUCs", "p", "p (Holm)"]
    note = page.soft("DeLong's test, clustered by patient; adjusted for all classes and pairs.")
    return page.folded("AUC of each class, by DeLong", note + page.table(head, lines))


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _differences_table(found: Sequence[Difference]) -> str:
    if not found:
        return ""
    several = any(d.seeds is not None for d in found)
    permuted = any(d.p_permutation is not None for d in found)
    note = (
        "Differences between stages, paired by patient; the interval covers the choice of test "
        "patients. p: two-sided, of the same bootstrap; then adjusted by Holm for all pairs of "
        "stages."
    )
    if permuted:
        note += (
            " p (permutation): of accuracies, with the two stages' answers exchanged by patient."
        )
    if several:
        note += (
            " The last columns tell what other training seeds would do: the standard deviation "
            "over the seeds, and an interval over both patients and seeds."
        )
    head = ["stages", "metric", "difference", "p", "p (Holm)"]
    head += ["p (permutation)"] if permuted else []
    head += ["seeds' sd", "over patients and seeds"] if several else []
    lines = [
        [
            page.escape(f"{d.after} - {d.before}"),
            page.escape(d.metric),
            *_cells(d, permuted, several),
        ]
        for d in found
    ]
    made = page.soft(note) + page.table(head, lines)
    return made if len(lines) <= OPEN_LINES else page.folded("Differences between stages", made)


def _cells(d: Difference, permuted: bool, several: bool) -> Iterator[str]:
    value = d.found.value
    yield f"{value:+.3f}{_interval(d.found)}" if np.isfinite(value) else table.UNDEFINED
    yield from map(_p, (d.p, d.p_holm))
    if permuted:
        yield _p(d.p_permutation)
    if several:
        yield "-" if d.seeds is None else f"{d.seeds.seed_sd:.3f}"
        yield "-" if d.seeds is None else _interval(d.seeds).strip()


def _interval(found: Any) -> str:
    return "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
