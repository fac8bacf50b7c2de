"""ROC, precision-recall and reliability curves and confusion matrices, from predictions."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bigmed.report import page, runs, svg

GRID = np.linspace(0, 1, 101)  # of false positive rate or recall, where curves are averaged
BINS = 10  # of a reliability diagram
OPEN_CLASSES = 3  # the curves of more are folded away


def section(task: str, predictions: Mapping[str, Sequence[runs.Predictions]]) -> str:
    """All curves of a test set, a line for each stage; '' without predictions.

    ROC and precision-recall curves are means over the repeats; reliability and confusion put their
    predictions together.
    """
    if not predictions:
        return ""
    first = next(iter(predictions.values()))[0]
    names = [str(name) for name in first["class_names"]]
    by_class = [_of_class(c, name, predictions) for c, name in enumerate(names)]
    drawn = page.panels(list(filter(None, by_class)))
    probabilities = all(_are_probabilities(one) for each in predictions.values() for one in each)
    more = []
    if probabilities:
        more.append(_reliability(task, predictions))
    if task == "single_label":
        more += [_confusion(stage, each, names) for stage, each in predictions.items()]
    if not drawn and not any(more):
        return ""
    key = page.legend(list(predictions))
    if len(names) <= OPEN_CLASSES:
        return key + drawn + page.panels(more)
    return key + page.panels(more) + page.folded("ROC and precision-recall curves", key + drawn)


def _of_class(c: int, name: str, predictions: Mapping[str, Sequence[runs.Predictions]]) -> str:
    roc, precision = {}, {}
    for i, (stage, each) in enumerate(predictions.items()):
        found = [roc_and_precision(one, c) for one in each]
        found = [curve for curve in found if curve is not None]
        if found:
            roc[stage] = (GRID, np.mean([tpr for tpr, _ in found], axis=0), i)
            precision[stage] = (GRID, np.mean([p for _, p in found], axis=0), i)
    if not roc:
        return ""
    labels = next(iter(predictions.values()))[0]["labels"][:, c]
    share = (labels == 1).sum() / ((labels == 1) | (labels == 0)).sum()
    diagonal, level = (np.array([0.0, 1.0]),) * 2, (np.array([0.0, 1.0]), np.array([share] * 2))
    return svg.curves(
        f"{name}: ROC", roc, chance=diagonal, unit=True, axes=("false positive rate", "sensitivity")
    ) + svg.curves(
        f"{name}: precision", precision, chance=level, unit=True, axes=("recall", "precision")
    )


def roc_and_precision(one: runs.Predictions, c: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(sensitivity at false positive rates `GRID`, precision at recalls `GRID`) of a class.

    Ties are one step. Between its points the ROC is straight; precision is that of the lowest
    threshold that reaches the recall. None for a class without both kinds of images.
    """
    labels, scores = one["labels"][:, c], one["scores"][:, c]
    known = (labels == 0) | (labels == 1)
    y, score = labels[known] == 1, scores[known]
    if not y.any() or y.all():
        return None
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(score[order]) != 0, True])
    true = np.cumsum(y[order])[ends]
    false = ends + 1 - true
    tpr, fpr = np.r_[0, true / y.sum()], np.r_[0, false / (~y).sum()]
    at = np.minimum(np.searchsorted(true / y.sum(), GRID - 1e-12), len(ends) - 1)
    return np.interp(GRID, fpr, tpr), (true / (true + false))[at]


def _are_probabilities(one: runs.Predictions) -> bool:
    scores = one["scores"]
    return bool(np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1)


def _reliability(task: str, predictions: Mapping[str, Sequence[runs.Predictions]]) -> str:
    lines = {
        stage: (*reliability(each, task), i)
        for i, (stage, each) in enumerate(predictions.items())
    }
    lines = {stage: line for stage, line in lines.items() if len(line[0])}
    diagonal = np.array([0.0, 1.0])
    return svg.curves(
        "reliability",
        lines,
        chance=(diagonal, diagonal),
        unit=True,
        axes=("probability", "share that is so"),
    )


def reliability(each: Sequence[runs.Predictions], task: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean probability, share that came true) of each bin of probabilities that has any.

    'single_label': of the most probable class; 'multi_label': of every class with a label.
    """
    p, came_true = (np.concatenate(part) for part in zip(*_claims(each, task), strict=True))
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    some = count > 0
    return tuple(
        np.bincount(bins, weights=values, minlength=BINS)[some] / count[some]
        for values in (p, came_true)
    )


def _claims(
    each: Sequence[runs.Predictions], task: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for one in each:
        scores, labels = one["scores"].astype(np.float64), one["labels"]
        if task == "single_label":
            known = (labels == 1).any(axis=1)
            right = scores.argmax(axis=1) == labels.argmax(axis=1)
            yield scores.max(axis=1)[known], right[known]
        else:
            known = (labels == 0) | (labels == 1)
            yield scores[known], labels[known] == 1


def _confusion(stage: str, each: Sequence[runs.Predictions], names: Sequence[str]) -> str:
    counts = sum(confusion(one) for one in each)
    return svg.matrix(f"{stage}: confusion", counts, names, ("said", "is"))


def confusion(one: runs.Predictions) -> np.ndarray:
    """int [L, L]: images of each class (row) that each class (column) is said of."""
    labels, size = one["labels"], one["labels"].shape[1]
    known = (labels == 1).any(axis=1)
    actual, said = labels[known].argmax(axis=1), one["scores"][known].argmax(axis=1)
    return np.bincount(actual * size + said, minlength=size**2).reshape(size, size)
