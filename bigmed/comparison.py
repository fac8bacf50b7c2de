"""Tests between models on the same test patients, DeLong's intervals, several training seeds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bigmed.errors import UserError

CHUNK_ELEMENTS = 2**22
Z = 1.959963984540054  # two-sided 95 % of a normal


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A difference of AUCs.

    Attributes:
      value: the difference.
      low, high: of its 95 % interval; None where the errors have no variance.
      p: two-sided, that it is 0; None likewise.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None


@dataclasses.dataclass(frozen=True)
class Delong:
    """AUCs of models on one test set, and the covariance of their errors.

    Attributes:
      aucs: float64 [M].
      covariance: float64 [M, M].
    """

    aucs: np.ndarray
    covariance: np.ndarray

    def interval(self, model: int = 0) -> tuple[float, float] | None:
        """The 95 % interval of a model's AUC, within [0, 1].

        None where the errors have no variance, as of a model that ranks all images rightly: that
        says nothing of other patients.
        """
        reach = Z * np.sqrt(self.covariance[model, model])
        if not reach > 0:
            return None
        return max(self.aucs[model] - reach, 0.0), min(self.aucs[model] + reach, 1.0)

    def contrast(self, weights: np.ndarray) -> Contrast:
        """Of the sum of the AUCs with these weights [M], such as 1 and -1 for a difference."""
        value = float(weights @ self.aucs)
        spread = math.sqrt(max(float(weights @ self.covariance @ weights), 0.0))
        if not spread > 0:
            return Contrast(value, None, None, None)
        p = math.erfc(abs(value) / spread / math.sqrt(2))
        return Contrast(value, value - Z * spread, value + Z * spread, p)


def delong(scores: Sequence[np.ndarray], labels: np.ndarray, patients: np.ndarray) -> Delong:
    """AUCs and their covariance, images of one patient not being independent.

    DeLong et al. (Biometrics 1988) for patients of one image each; Obuchowski's (Biometrics 1997)
    for clusters.

    Args:
      scores: [N] of each of M models.
      labels: [N], 1 or 0; others are ignored.
      patients: [N].

    Raises:
      UserError: numbers of scores, labels and patients that differ, a score that is not finite,
        fewer than two patients with positive or with negative images.
    """
    for one in scores:
        _check_same_images(one, labels, patients)
    known = (labels == 0) | (labels == 1)
    positive, negative = known & (labels == 1), known & (labels == 0)
    cluster = np.unique(patients[known], return_inverse=True)[1]
    where = np.full(len(labels), -1)
    where[known] = cluster
    count = cluster.max() + 1 if len(cluster) else 0
    m, n = positive.sum(), negative.sum()
    with_positive = len(np.unique(where[positive]))
    with_negative = len(np.unique(where[negative]))
    if with_positive < 2 or with_negative < 2:
        raise UserError(
            f"DeLong's variance needs two patients with positive and two with negative images; "
            f"there are {with_positive} and {with_negative}"
        )
    aucs, x, y = [], [], []
    for own in scores:
        own = np.asarray(own, np.float64)
        of_positive = _placements(own[positive], own[negative])
        of_negative = 1 - _placements(own[negative], own[positive])
        aucs.append(of_positive.mean())
        x.append(np.bincount(where[positive], of_positive - aucs[-1], count))
        y.append(np.bincount(where[negative], of_negative - aucs[-1], count))
    x, y = np.stack(x), np.stack(y)  # [M, patients]
    s10 = with_positive / ((with_positive - 1) * m) * (x @ x.T)
    s01 = with_negative / ((with_negative - 1) * n) * (y @ y.T)
    s11 = count / (count - 1) * (x @ y.T)
    return Delong(np.array(aucs), s10 / m + s01 / n + (s11 + s11.T) / (m * n))


def _check_same_images(values: np.ndarray, others: np.ndarray, patients: np.ndarray) -> None:
    if not len(values) == len(others) == len(patients):
        raise UserError(
            f"{len(values)} and {len(others)} values, of patients of {len(patients)} images, "
            "cannot be compared; they must be of the same test set"
        )
    if not np.isfinite(np.asarray(values, np.float64)).all():
        raise UserError("a score that is not finite cannot be compared")


def _placements(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each of a the share of b below it, ties counted half."""
    ordered = np.sort(b)
    below, up_to = (np.searchsorted(ordered, a, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(b))


def permutation_test(
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    *,
    num_permutations: int = 100_000,
    seed: int = 0,
) -> float:
    """Two-sided p of the mean of a minus that of b, both models' answers exchanged by patient.

    SimCLR's test of accuracies (arXiv 2002.05709, B.8), with all images of a patient exchanged
    together. It does not cover what other training seeds would do.

    Args:
      a, b: [N], what each model is worth on each image, such as whether it is right.
      patients: [N].
    """
    _check_same_images(a, b, patients)
    _check_same_images(b, a, patients)
    codes = np.unique(patients, return_inverse=True)[1]
    of_patient = np.bincount(codes, np.asarray(a, np.float64) - np.asarray(b, np.float64))
    of_patient = of_patient[of_patient != 0]  # the others change nothing
    observed, at_least = abs(of_patient.sum()) - 1e-9, 0
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // max(len(of_patient), 1))
    for start in range(0, num_permutations, chunk):
        count = min(chunk, num_permutations - start)
        signs = rng.integers(0, 2, (count, len(of_patient)), np.int8).astype(np.float64) * 2 - 1
        at_least += int((np.abs(signs @ of_patient) >= observed).sum())
    return (1 + at_least) / (1 + num_permutations)


def bootstrap_p(samples: np.ndarray) -> float | None:
    """Two-sided p that a difference is 0, of its bootstrap samples [R]: the inverted interval.

    At least 2 / (R + 1), and None where no sample is defined.
    """
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None
    tail = min((samples <= 0).sum(), (samples >= 0).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(samples))))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (Scand. J. Stat. 1979) of a table's p-values; None stays None."""
    tested = [i for i, p in enumerate(p_values) if p is not None]
    ordered = sorted(tested, key=lambda i: p_values[i])
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """A metric of several training seeds of one model on the same test patients.

    Attributes:
      mean: over the seeds.
      patient_low, patient_high: 95 % interval of the mean under other test patients.
      seed_sd: standard deviation over the seeds; None of one seed.
      low, high: 95 % interval under other patients and other seeds: the variances are added, that
        of the mean over seeds being seed_sd^2 / S, with a t quantile of Satterthwaite's degrees of
        freedom (Biometrics 1946), as S is small. None of one seed.
    """

    mean: float
    patient_low: float
    patient_high: float
    seed_sd: float | None
    low: float | None
    high: float | None


def over_seeds(values: Sequence[float], samples: np.ndarray) -> OverSeeds:
    """Keeps the spread over seeds and over patients apart, and adds them up.

    Args:
      values: of S seeds.
      samples: [S, R], their bootstrap samples on the same resampled patients.
    """
    values = np.asarray(values, np.float64)
    of_mean = samples.mean(axis=0)
    of_mean = of_mean[np.isfinite(of_mean)]
    mean, (low, high) = float(values.mean()), np.quantile(of_mean, [0.025, 0.975])
    if len(values) < 2:
        return OverSeeds(mean, float(low), float(high), None, None, None)
    sd = float(values.std(ddof=1))
    of_seeds = sd**2 / len(values)
    variance = of_mean.var(ddof=1) + of_seeds
    # patients' variance comes of many resamples, as if of infinitely many degrees of freedom
    freedom = (len(values) - 1) * (variance / of_seeds) ** 2 if of_seeds > 0 else np.inf
    reach = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance))
    return OverSeeds(mean, float(low), float(high), sd, mean - reach, mean + reach)
