"""Classification metrics with 95 % confidence intervals by patient bootstrap, in NumPy float64.

Every metric takes multiplicities, so that all resamples of a chunk are computed at once on scores
that were sorted once. Images of one patient are not independent; therefore patients, not images,
are drawn with replacement (the cluster bootstrap: Field and Welsh, JRSS-B 2007). A metric that is
not defined, such as the AUC of a class without positives, is NaN and counted, never 0.5.

Labels are 1 (present) and 0 (absent); anything else (uncertain, missing) leaves the image out of
that class's metrics.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.errors import UserError, did_you_mean

UNCERTAIN = -1
TRAINING_POLICIES = ("smooth", "three_class")  # of training alone: `parts.training_targets`
UNCERTAIN_POLICIES = ("ignore", "zeros", "ones", *TRAINING_POLICIES)
# What an uncertain label counts as under 'smooth': the middle of the range that Pham et al.
# (arXiv 1911.06475) draw from (U).
SMOOTH_TARGET = 0.7
TASKS = ("single_label", "multi_label")
CHUNK_ELEMENTS = 2**22  # images x resamples held at once: 32 MiB an array
# Share of resamples that must be defined for an interval to be given. A class seen in one patient
# alone is drawn in 63 % of them, in two patients in 86 %; one patient says nothing of the spread.
MIN_DEFINED = 0.8

# multiplicities [N, R] -> {metric: values [R]}
Metrics = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric on one test set.

    Attributes:
      value: NaN where undefined.
      low, high: limits of the 95 % percentile interval, or None where it cannot be given.
      n_images, n_patients: those with a label that the metric uses.
      undefined_resamples: how many resamples the interval leaves out.
    """

    value: float
    low: float | None
    high: float | None
    n_images: int
    n_patients: int
    undefined_resamples: int


def apply_label_policy(labels: np.ndarray, uncertain: str) -> np.ndarray:
    """Labels with the uncertain ones (-1) made 0 ('zeros') or 1 ('ones'), or left as they are.

    Missing labels (-2) are never turned into negatives.

    Raises:
      UserError: a policy that is not one of `UNCERTAIN_POLICIES`.
    """
    if uncertain not in UNCERTAIN_POLICIES:
        raise UserError(f"uncertain='{uncertain}': {did_you_mean(uncertain, UNCERTAIN_POLICIES)}")
    if uncertain not in ("zeros", "ones"):
        return labels
    return np.where(labels == UNCERTAIN, uncertain == "ones", labels).astype(labels.dtype)


def usable(labels: np.ndarray, task: str) -> np.ndarray:
    """bool [N]: the images of `labels` [N, L] that can be scored.

    'multi_label': at least one class is 0 or 1. 'single_label': exactly one class is 1.

    Raises:
      UserError: 'single_label' data with an image of two classes, or another task.
    """
    if task not in TASKS:
        raise UserError(f"task '{task}' cannot be scored: {did_you_mean(task, TASKS)}")
    if task == "multi_label":
        return ((labels == 0) | (labels == 1)).any(axis=1)
    num_present = (labels == 1).sum(axis=1)
    if (num_present > 1).any():
        raise UserError(
            f"row {int(np.argmax(num_present > 1))} has {num_present.max()} classes although the "
            "data set's task is single_label; valid: one, or task multi_label"
        )
    return num_present == 1


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
    function = _auc_function(scores, labels)
    if weights is None:
        return float(function(np.ones((len(labels), 1)))[0])
    return function(weights)


def _auc_function(scores: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    positives = positives[np.argsort(scores[positives], kind="stable")]
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    below = np.searchsorted(scores[negatives], scores[positives], side="left")
    up_to = np.searchsorted(scores[negatives], scores[positives], side="right")

    def function(weights: np.ndarray) -> np.ndarray:
        w_positive = weights[positives].astype(np.float64)  # [P, R]
        cumulative = np.zeros((len(negatives) + 1, weights.shape[1]))
        np.cumsum(weights[negatives], axis=0, out=cumulative[1:])
        wins = 0.5 * np.einsum("pr,pr->r", w_positive, cumulative[below] + cumulative[up_to])
        pairs = w_positive.sum(axis=0) * cumulative[-1]
        return np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)

    return function


def _recalls(correct: np.ndarray, actual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Recall of every class present in `actual` [N], float64 [C, R]; NaN where not drawn."""
    member = (np.unique(actual)[:, None] == actual[None, :]).astype(np.float64)  # [C, N]
    total = member @ weights  # CN.NR = CR
    hits = (member * correct) @ weights
    return np.divide(hits, total, out=np.full_like(total, np.nan), where=total > 0)


def accuracy(predicted: np.ndarray, actual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of images [N] whose predicted class is the actual one, under weights [N, R]: [R]."""
    total = weights.sum(axis=0, dtype=np.float64)
    hits = (predicted == actual).astype(np.float64) @ weights
    return np.divide(hits, total, out=np.full_like(total, np.nan), where=total > 0)


def balanced_accuracy(predicted: np.ndarray, actual: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Recall averaged over the classes that are present, under weights [N, R]: float64 [R]."""
    return _mean_of_defined(_recalls(predicted == actual, actual, weights))


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    defined = np.isfinite(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def classification_metrics(
    scores: np.ndarray, labels: np.ndarray, class_names: Sequence[str], task: str
) -> Metrics:
    """The metrics of a task, as a function of multiplicities.

    'multi_label': 'auc_macro', the unweighted mean of the defined AUCs of the classes (not a pooled
    AUC), and 'auc/<class>'. 'single_label': these one-vs-rest, 'accuracy' and 'balanced_accuracy'.

    Args:
      scores: [N, L], larger for more likely.
      labels: [N, L], all rows `usable`.
      class_names: L names.
      task: 'single_label' or 'multi_label'.

    Returns:
      A function of weights [N, R] that gives {metric: float64 [R]}, NaN where undefined.
    """
    classes = range(len(class_names))
    per_class = [_auc_function(scores[:, c], labels[:, c]) for c in classes]

    def function(weights: np.ndarray) -> dict[str, np.ndarray]:
        aucs = np.stack([class_auc(weights) for class_auc in per_class])  # [L, R]
        values = {"auc_macro": _mean_of_defined(aucs)}
        if task == "single_label":
            predicted, actual = scores.argmax(axis=1), labels.argmax(axis=1)
            values["accuracy"] = accuracy(predicted, actual, weights)
            values["balanced_accuracy"] = balanced_accuracy(predicted, actual, weights)
        return values | {f"auc/{class_names[c]}": aucs[c] for c in classes}

    return function


def bootstrap(
    metrics: Metrics, patients: np.ndarray, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Metrics of resampled test sets: patients are drawn with replacement, with all their images.

    Args:
      metrics: function of multiplicities [N, R].
      patients: [N], whose image each is.
      num_resamples: how many.
      seed: of the draws.

    Returns:
      {metric: float64 [num_resamples]}, NaN in the resamples where it is undefined.
    """
    unique, codes = np.unique(patients, return_inverse=True)
    p = len(unique)
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // max(len(codes), 1))
    parts = []
    for start in range(0, num_resamples, chunk):
        r = min(chunk, num_resamples - start)
        drawn = rng.integers(p, size=(r, p)) + p * np.arange(r)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=r * p).reshape(r, p)
        parts.append(metrics(counts.T[codes].astype(np.float64)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class Resampled:
    """The metrics of a model on a test set and on resamples of it.

    Attributes:
      values: {metric: float}.
      samples: {metric: float64 [R]}.
      patients: {metric: int [n]}, whose image each of the images is that the metric uses.
    """

    values: Mapping[str, float]
    samples: Mapping[str, np.ndarray]
    patients: Mapping[str, np.ndarray]

    def estimates(self) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return {
            name: _estimate(value, self.samples[name], self.patients[name])
            for name, value in self.values.items()
        }


def resample(
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    class_names: Sequence[str],
    task: str,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """The metrics of one model, a mean over its training seeds, with patients resampled.

    Args:
      scores: [N, L] for each training seed of the model.
      labels: [N, L]; rows that are not `usable` are left out.
      patients: [N].
      class_names, task: see `classification_metrics`.
      num_resamples, seed: see `bootstrap`; the same seed draws the same patients for every model.
    """
    keep = usable(labels, task)
    labels, patients = labels[keep], patients[keep]
    functions = [classification_metrics(one[keep], labels, class_names, task) for one in scores]

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        results = [function(weights) for function in functions]
        return {name: np.mean([result[name] for result in results], axis=0) for name in results[0]}

    values = metrics(np.ones((len(labels), 1)))
    if len(labels):
        samples = bootstrap(metrics, patients, num_resamples=num_resamples, seed=seed)
    else:
        samples = {name: np.full(num_resamples, np.nan) for name in values}
    known = (labels == 0) | (labels == 1)  # [N, L]
    of_class = {f"auc/{name}": patients[known[:, c]] for c, name in enumerate(class_names)}
    return Resampled(
        values={name: float(value[0]) for name, value in values.items()},
        samples=samples,
        patients={name: of_class.get(name, patients) for name in values},
    )


def estimate(scores: np.ndarray, *args: Any, **kwargs: Any) -> dict[str, Estimate]:
    """The metrics of one model [N, L] with intervals; the other arguments are `resample`'s."""
    return resample([scores], *args, **kwargs).estimates()


def means(
    values: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Means of per-image values [N], NaN where undefined, with patients [N] resampled."""

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, value in values.items():
            known = np.isfinite(value)
            total = weights[known].sum(axis=0)
            with np.errstate(invalid="ignore"):
                found[name] = value[known] @ weights[known] / np.where(total > 0, total, np.nan)
        return found

    whole = metrics(np.ones((len(patients), 1)))
    return Resampled(
        values={name: float(value[0]) for name, value in whole.items()},
        samples=bootstrap(metrics, patients, num_resamples=num_resamples, seed=seed),
        patients={name: patients[np.isfinite(value)] for name, value in values.items()},
    ).estimates()


def rows(
    estimates: Mapping[str, Estimate], common: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A result row for each metric, with what all have in common; None where undefined."""
    for metric, found in estimates.items():
        yield {
            **common,
            "metric": metric,
            "value": None if np.isnan(found.value) else found.value,
            "ci_low": found.low,
            "ci_high": found.high,
            "n_images": found.n_images,
            "n_patients": found.n_patients,
            "undefined_resamples": found.undefined_resamples,
        }


def paired_difference(a: Resampled, b: Resampled) -> dict[str, Estimate]:
    """The metrics of a minus those of b, both of the same images and the same resamples.

    The interval covers the choice of test patients. It does not cover what other training seeds
    would do.
    """
    return Resampled(
        values={name: value - b.values[name] for name, value in a.values.items()},
        samples={name: samples - b.samples[name] for name, samples in a.samples.items()},
        patients=a.patients,
    ).estimates()


def _estimate(value: float, samples: np.ndarray, patients: np.ndarray) -> Estimate:
    n_patients = len(np.unique(patients))
    defined = samples[np.isfinite(samples)]
    low = high = None
    if n_patients > 1 and np.isfinite(value) and len(defined) >= max(2, MIN_DEFINED * len(samples)):
        low, high = map(float, np.quantile(defined, [0.025, 0.975]))
    return Estimate(value, low, high, len(patients), n_patients, len(samples) - len(defined))
