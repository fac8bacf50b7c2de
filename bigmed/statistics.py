"""Label policies, and metrics with 95 % confidence intervals by patient bootstrap.

Images of one patient are not independent; therefore patients, not images, are drawn with
replacement (the cluster bootstrap: Field and Welsh, JRSS-B 2007). A metric that is not defined,
such as the AUC of a class without positives, is NaN and counted, never 0.5.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.calibration import OperatingPoint
from bigmed.classification import BIASED, Metrics, Sums, classification_metrics
from bigmed.errors import UserError, did_you_mean

UNCERTAIN = -1
SCORING_POLICIES = ("ignore", "zeros", "ones")
TRAINING_POLICIES = ("smooth", "three_class")  # of training alone: `parts.training_targets`
UNCERTAIN_POLICIES = (*SCORING_POLICIES, *TRAINING_POLICIES)
# What an uncertain label counts as under 'smooth': the middle of the range that Pham et al.
# (arXiv 1911.06475) draw from (U).
SMOOTH_TARGET = 0.7
TASKS = ("single_label", "multi_label")
CHUNK_ELEMENTS = 2**21  # patients x resamples held at once: 16 MiB an array
# Share of resamples that must be defined for an interval to be given. A class seen in one patient
# alone is drawn in 63 % of them, in two patients in 86 %; one patient says nothing of the spread.
MIN_DEFINED = 0.8


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


def bootstrap(
    metrics: Metrics, num_patients: int, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Metrics of resampled test sets: patients are drawn with replacement, with all their images.

    Args:
      metrics: function of multiplicities [P, R].
      num_patients: P.
      num_resamples: how many.
      seed: of the draws.

    Returns:
      {metric: float64 [num_resamples]}, NaN in the resamples where it is undefined.
    """
    p, rng = num_patients, np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // p)
    parts = []
    for start in range(0, num_resamples, chunk):
        r = min(chunk, num_resamples - start)
        drawn = rng.integers(p, size=(r, p)) + p * np.arange(r)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=r * p).reshape(r, p)
        parts.append(metrics(np.ascontiguousarray(counts.T, np.float64)))
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
        """Every metric with its interval, but for those of `BIASED`."""
        return {
            name: _estimate(value, self.samples[name], self.patients[name], name not in BIASED)
            for name, value in self.values.items()
        }

    def minus(self, other: "Resampled") -> "Resampled":
        """The differences to another model, of the same images and the same resamples."""
        return Resampled(
            values={name: value - other.values[name] for name, value in self.values.items()},
            samples={name: sample - other.samples[name] for name, sample in self.samples.items()},
            patients=self.patients,
        )


def resample(
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    class_names: Sequence[str],
    task: str,
    *,
    points: Sequence[OperatingPoint | None] = (),
    untrained: Sequence[str] = (),
    num_resamples: int = 1000,
    seed: int = 0,
) -> Resampled:
    """The metrics of one model, a mean over its training seeds, with patients resampled.

    Args:
      scores: [N, L] for each training seed of the model.
      labels: [N, L]; rows that are not `usable` are left out.
      patients: [N].
      class_names, task: see `classification_metrics`.
      points: for each training seed what was chosen on validation; () for the metrics without.
      untrained: see `classification_metrics`.
      num_resamples, seed: see `bootstrap`; the same seed draws the same patients for every model.

    Raises:
      UserError: predictions, labels and patients of different numbers of images; a score that is
        not finite; see also `usable`.
    """
    for one in scores:
        if not len(one) == len(labels) == len(patients):
            raise UserError(
                f"predictions of {len(one)} images, labels of {len(labels)}, patients of "
                f"{len(patients)}: valid: one of each for every image"
            )
        if not np.isfinite(one).all():
            row = int(np.argmin(np.isfinite(one).all(axis=1)))
            raise UserError(f"the prediction of image {row} is not finite")
    keep = usable(labels, task)
    labels, patients = labels[keep], patients[keep]
    unique, codes = np.unique(patients, return_inverse=True)
    functions = [
        classification_metrics(one[keep], labels, class_names, task, point, codes, untrained)
        for one, point in zip(scores, points or [None] * len(scores), strict=True)
    ]

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        results = [function(weights) for function in functions]
        return {name: np.mean([result[name] for result in results], axis=0) for name in results[0]}

    values = metrics(np.ones((len(unique), 1)))
    if len(labels):
        samples = bootstrap(metrics, len(unique), num_resamples=num_resamples, seed=seed)
    else:
        samples = {name: np.full(num_resamples, np.nan) for name in values}
    known = (labels == 0) | (labels == 1)  # [N, L]
    of_class = {name: patients[known[:, c]] for c, name in enumerate(class_names)}
    return Resampled(
        values={name: float(value[0]) for name, value in values.items()},
        samples=samples,
        patients={name: of_class.get(name.partition("/")[2], patients) for name in values},
    )


def estimate(
    scores: np.ndarray, *args: Any, point: OperatingPoint | None = None, **kwargs: Any
) -> dict[str, Estimate]:
    """The metrics of one model [N, L] with intervals; the other arguments are `resample`'s."""
    return resample([scores], *args, points=[point], **kwargs).estimates()


def means(
    values: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Means of per-image values [N], NaN where undefined, with patients [N] resampled."""

    unique, codes = np.unique(patients, return_inverse=True)
    sums = Sums(codes, len(unique))

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name, value in values.items():
            known = np.isfinite(value)
            total, count = sums(np.stack([np.where(known, value, 0.0), known]), weights)
            found[name] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
        return found

    whole = metrics(np.ones((len(unique), 1)))
    return Resampled(
        values={name: float(value[0]) for name, value in whole.items()},
        samples=bootstrap(metrics, len(unique), num_resamples=num_resamples, seed=seed),
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
    return a.minus(b).estimates()


def _estimate(
    value: float, samples: np.ndarray, patients: np.ndarray, with_interval: bool
) -> Estimate:
    n_patients = len(np.unique(patients))
    defined = samples[np.isfinite(samples)]
    low = high = None
    enough = n_patients > 1 and len(defined) >= max(2, MIN_DEFINED * len(samples))
    if with_interval and enough and np.isfinite(value):
        low, high = map(float, np.quantile(defined, [0.025, 0.975]))
    return Estimate(value, low, high, len(patients), n_patients, len(samples) - len(defined))
