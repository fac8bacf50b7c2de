"""Metrics of classifiers as functions of how often each patient is drawn, in NumPy float64.

Every metric takes multiplicities [P, R] of P units (patients, or single images), so that all
resamples of a chunk are computed at once on scores that were sorted once. What a metric needs of
the images is summed by unit beforehand, and the curves' metrics need the images between one
positive score and the next alone; both are products of a sparse matrix with the multiplicities. A
metric that is not defined, such as the AUC of a class without positives, is NaN, never 0.5.

Labels are 1 (present) and 0 (absent); anything else (uncertain, missing) leaves the image out of
that class's metrics.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from bigmed.calibration import OperatingPoint

# Resamples repeat images, which makes any bin look worse calibrated: the percentile interval of
# these lies above the truth, and none is given.
BIASED = ("calibration/ece", "calibration/ece_scaled")
SPECIFICITY = 0.9  # at which sensitivities are stated
NUM_BINS = 15  # of the expected calibration error, of equal width (Guo et al., arXiv 1706.04599)

# multiplicities [P, R] -> {metric: values [R]}
Metrics = Callable[[np.ndarray], dict[str, np.ndarray]]


def auc(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> float | np.ndarray:
    """Area under the ROC curve, as the Mann-Whitney statistic with ties counted half.

    Args:
      scores: [N], finite.
      labels: [N], 1 or 0; others are ignored.
      weights: None, or the multiplicities [N, R] of R resamples.

    Returns:
      A float, or float64 [R] with weights; NaN where a class is absent.
    """
    curve = Curve(scores, labels, np.arange(len(labels)), len(labels))
    if weights is None:
        return float(curve.counts(np.ones((len(labels), 1))).auc()[0])
    return curve.counts(weights).auc()


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is not above 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)


class Curve:
    """The images of one class by falling score, for the metrics of its ROC and PR curves.

    The thresholds that matter are the G distinct scores of positive images.

    Args:
      scores: [N], finite.
      labels: [N], 1 or 0; others are ignored.
      units: int [N], below `num_units`, to which each image belongs.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray, units: np.ndarray, num_units: int):
        if not np.isfinite(scores).all():
            raise ValueError("scores must be finite")
        positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        falling = -np.unique(-scores[positive])  # [G]
        groups = len(falling)
        of_positive = np.searchsorted(-falling, -scores[positive])
        # of a negative: the first threshold at which it is answered yes; the last row if none is
        of_negative = np.searchsorted(-falling, -scores[negative])
        tied = of_negative < groups
        tied[tied] = falling[of_negative[tied]] == scores[negative][tied]

        def summed(rows: np.ndarray, images: np.ndarray, height: int) -> sparse.csr_array:
            ones = np.ones(len(rows))
            return sparse.csr_array((ones, (rows, units[images])), shape=(height, num_units))

        self._positive = summed(of_positive, positive, groups)
        self._negative = summed(of_negative, negative, groups + 1)
        self._tied = summed(of_negative[tied], negative[tied], groups)

    def counts(self, weights: np.ndarray) -> "Counts":
        """What the metrics take, of multiplicities [P, R]."""
        weights = np.ascontiguousarray(weights, np.float64)
        positive, negative = self._positive @ weights, self._negative @ weights
        false = np.cumsum(negative, axis=0)
        true = np.cumsum(positive, axis=0)
        return Counts(positive, true, false[:-1], self._tied @ weights, false[-1])


class Counts(NamedTuple):
    """What the metrics of a curve take of R resamples.

    Attributes:
      positive: float64 [G, R], the positives at each threshold, the highest first.
      true, false: [G, R], the true and the false positives down to it.
      tied: [G, R], the negatives that have its very score.
      negatives: [R], all of them.
    """

    positive: np.ndarray
    true: np.ndarray
    false: np.ndarray
    tied: np.ndarray
    negatives: np.ndarray

    def auc(self) -> np.ndarray:
        """Area under the ROC curve [R]."""
        above = self.negatives - self.false + 0.5 * self.tied
        wins = np.einsum("gr,gr->r", self.positive, above)
        return _ratio(wins, (self.true[-1] if len(self.true) else 0) * self.negatives)

    def average_precision(self) -> np.ndarray:
        """Precision averaged over the steps of recall, without interpolation [R].

        Of positives alone it would be 1, whatever the scores, and is undefined.
        """
        if not len(self.true):
            return np.full(self.true.shape[1], np.nan)
        found = self.true + self.false
        precision = np.divide(self.true, found, out=np.zeros_like(found), where=found > 0)
        mean = _ratio(np.einsum("gr,gr->r", self.positive, precision), self.true[-1])
        return np.where(self.negatives > 0, mean, np.nan)

    def sensitivity(self) -> np.ndarray:
        """The largest sensitivity of a threshold with a specificity of `SPECIFICITY` and more [R].

        No threshold lies between images of equal score.
        """
        if not len(self.true):
            return np.full(self.true.shape[1], np.nan)
        limit = (1 - SPECIFICITY) * self.negatives + 1e-9
        allowed = (self.false <= limit).sum(axis=0)  # of the first thresholds
        reached = np.take_along_axis(self.true, np.maximum(allowed - 1, 0)[None], axis=0)[0]
        found = _ratio(np.where(allowed > 0, reached, 0.0), self.true[-1])
        return np.where(self.negatives > 0, found, np.nan)


class Sums:
    """Sums over the images of each unit, to be multiplied with the units' multiplicities.

    Args:
      units: int [N], below `num_units`, to which each image belongs.
    """

    def __init__(self, units: np.ndarray, num_units: int):
        self._units, self._num_units = units, num_units

    def __call__(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Values [C, N] summed over the drawn images, under multiplicities [P, R]: [C, R]."""
        by_unit = [np.bincount(self._units, row, self._num_units) for row in values]
        return np.stack(by_unit) @ weights  # CP.PR = CR


def thresholded(
    predicted: np.ndarray, labels: np.ndarray, sums: Sums, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """F1, MCC, sensitivity and specificity of yes-or-no answers: float64 [R] each.

    Args:
      predicted: bool [N].
      labels: [N], 1 or 0; others are ignored.
      sums, weights: see `Sums`.
    """
    cells = [
        (predicted == yes) & (labels == label) for yes, label in ((1, 1), (1, 0), (0, 1), (0, 0))
    ]
    tp, fp, fn, tn = sums(np.stack(cells), weights)
    return {
        "f1": np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan),
        "mcc": _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
    }


def top_k(scores: np.ndarray, actual: np.ndarray, k: int) -> np.ndarray:
    """bool [N]: whether the class [N] is among the k highest of [N, L], ties against it."""
    own = np.take_along_axis(scores, actual[:, None], axis=1)
    return (scores >= own).sum(axis=1) <= k


def balanced_accuracy(
    predicted: np.ndarray, actual: np.ndarray, sums: Sums, weights: np.ndarray
) -> np.ndarray:
    """Recall averaged over the classes that are present: float64 [R]."""
    member = np.unique(actual)[:, None] == actual[None, :]  # [C, N]
    hits = sums(member & (predicted == actual), weights)
    return mean_of_defined(_ratio(hits, sums(member, weights)))


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    defined = np.isfinite(values)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return _ratio(total, defined.sum(axis=0))


def calibration_error(
    confidence: np.ndarray, correct: np.ndarray, sums: Sums, weights: np.ndarray
) -> np.ndarray:
    """Expected calibration error over `NUM_BINS` bins: float64 [R].

    Args:
      confidence: [N], probabilities; NaN leaves an image out.
      correct: [N], whether what is as probable as that came true.
      sums, weights: see `Sums`.
    """
    known = np.isfinite(confidence)
    p = np.where(known, confidence, 0.0)
    bins = np.minimum((p * NUM_BINS).astype(int), NUM_BINS - 1)
    member = ((np.arange(NUM_BINS)[:, None] == bins[None]) & known).astype(np.float64)  # [K, N]
    gap = sums(member * (correct - p), weights)
    return _ratio(np.abs(gap).sum(axis=0), sums(known[None], weights)[0])


def classification_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    task: str,
    point: OperatingPoint | None = None,
    units: np.ndarray | None = None,
    untrained: Sequence[str] = (),
) -> Metrics:
    """The metrics of a task, as a function of multiplicities.

    'auc_macro' and 'ap_macro', unweighted means over the defined classes of 'auc/<class>' and
    'ap/<class>' (one-vs-rest); 'single_label' has 'accuracy', 'balanced_accuracy' and, of more than
    three classes, 'top3_accuracy'. With an operating point also, one '<name>/<class>' each and
    their mean '<name>/macro': 'sensitivity@spec0.9', on the test ROC; 'f1', 'mcc', 'sensitivity'
    and 'specificity' at the point's thresholds; and 'calibration/brier', 'calibration/ece' and
    'calibration/ece_scaled', the latter after the point's temperature scaling.

    Args:
      scores: [N, L], larger for more likely; probabilities where there is a point.
      labels: [N, L], all rows usable (`statistics.usable`).
      class_names: L names.
      task: 'single_label' or 'multi_label'.
      point: chosen on validation.
      units: int [N] from 0 to P - 1, to which each image belongs; None: each to one of its own.
      untrained: names of classes that nothing was learnt of: they are scored alike everywhere,
        which says nothing, so that their own metrics are undefined.

    Returns:
      A function of multiplicities [P, R] that gives {metric: float64 [R]}, NaN where undefined.
    """
    classes = range(len(class_names))
    units = np.arange(len(labels)) if units is None else units
    num_units = int(units.max()) + 1 if len(units) else 0
    sums = Sums(units, num_units)
    curves = [Curve(scores[:, c], labels[:, c], units, num_units) for c in classes]

    def function(weights: np.ndarray) -> dict[str, np.ndarray]:
        by_class: dict[str, list[np.ndarray]] = {"auc": [], "ap": []}
        for c in classes:
            counts = curves[c].counts(weights)
            found = {"auc": counts.auc(), "ap": counts.average_precision()}
            if point is not None:
                found[f"sensitivity@spec{SPECIFICITY}"] = counts.sensitivity()
                yes = scores[:, c] >= point.thresholds[c]
                known = 1.0 if np.isfinite(point.thresholds[c]) else np.nan
                found |= thresholded(yes, labels[:, c], sums, weights * known)
            for name, value in found.items():
                told = value if class_names[c] not in untrained else np.full_like(value, np.nan)
                by_class.setdefault(name, []).append(told)
        macro = {name: mean_of_defined(np.stack(values)) for name, values in by_class.items()}
        result = {"auc_macro": macro.pop("auc"), "ap_macro": macro.pop("ap")}
        if task == "single_label":
            predicted, actual = scores.argmax(axis=1), labels.argmax(axis=1)
            right = [np.ones(len(labels)), predicted == actual, top_k(scores, actual, 3)]
            total, *hits = sums(np.stack(right), weights)
            result["accuracy"] = _ratio(hits[0], total)
            result["balanced_accuracy"] = balanced_accuracy(predicted, actual, sums, weights)
            if len(class_names) > 3:
                result["top3_accuracy"] = _ratio(hits[1], total)
        for name, values in by_class.items():
            result |= {f"{name}/{class_names[c]}": values[c] for c in classes}
        result |= {f"{name}/macro": value for name, value in macro.items()}
        if point is None:
            return result
        learnt = np.array([name not in untrained for name in class_names])
        return result | _calibration(scores, labels, task, point, sums, weights, learnt)

    return function


def _calibration(
    scores: np.ndarray,
    labels: np.ndarray,
    task: str,
    point: OperatingPoint,
    sums: Sums,
    weights: np.ndarray,
    learnt: np.ndarray,
) -> dict[str, np.ndarray]:
    scaled = point.scaled(scores, task)
    if task == "single_label":
        actual = labels.argmax(axis=1)
        square = ((scores - (labels == 1)) ** 2).sum(axis=1)
        total, squares = sums(np.stack([np.ones(len(labels)), square]), weights)
        brier = _ratio(squares, total)
        ece, ece_scaled = (
            calibration_error(p.max(axis=1), p.argmax(axis=1) == actual, sums, weights)
            for p in (scores, scaled)
        )
    else:
        found: list[list[np.ndarray]] = [[], [], []]
        for y, p, q, own in zip(labels.T, scores.T, scaled.T, learnt, strict=True):
            known = own & ((y == 0) | (y == 1))
            total, squares = sums(np.stack([known, known * (p - y) ** 2]), weights)
            found[0].append(_ratio(squares, total))
            for values, probability in zip(found[1:], (p, q), strict=True):
                given = np.where(known, probability, np.nan)
                values.append(calibration_error(given, y, sums, weights))
        brier, ece, ece_scaled = (mean_of_defined(np.stack(values)) for values in found)
    if not np.isfinite(point.temperatures).any():
        ece_scaled = np.full_like(ece, np.nan)
    return {
        "calibration/brier": brier,
        "calibration/ece": ece,
        "calibration/ece_scaled": ece_scaled,
    }
