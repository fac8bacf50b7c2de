"""What is chosen on validation for use on test: thresholds, and temperatures of probabilities."""

import dataclasses
from collections.abc import Callable

import numpy as np

SMALLEST = 1e-7  # probabilities below are taken for it: shares of votes may be 0
GOLDEN = (np.sqrt(5) - 1) / 2
TEMPERATURES = (0.02, 50.0)  # searched


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """Of one classifier.

    Attributes:
      thresholds: float64 [L]; a class is answered yes where its score is at least that. NaN where
        validation has no images of both kinds.
      temperatures: float64 [1] of all classes ('single_label') or [L] of each; NaN likewise.
    """

    thresholds: np.ndarray
    temperatures: np.ndarray

    def scaled(self, probabilities: np.ndarray, task: str) -> np.ndarray:
        """Probabilities [N, L] at the temperatures; as they are where there is none."""
        temperatures = np.where(np.isfinite(self.temperatures), self.temperatures, 1.0)
        return probabilities_of(_logits(probabilities, task), temperatures, task)


def probabilities_of(logits: np.ndarray, temperatures: np.ndarray, task: str) -> np.ndarray:
    """Softmax ('single_label') or sigmoids of logits [N, L] / temperatures [1 or L]: [N, L]."""
    z = logits / temperatures[None]
    if task == "multi_label":
        return 0.5 * (1 + np.tanh(0.5 * z))
    odds = np.exp(z - z.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def operating_point(scores: np.ndarray, labels: np.ndarray, task: str) -> OperatingPoint:
    """Chooses on validation.

    A threshold is the score at which Matthews' correlation is largest (the highest of equals). A
    temperature minimises the cross-entropy (Guo et al., arXiv 1706.04599, section 4.2), within
    `TEMPERATURES`.

    Args:
      scores: probabilities [N, L].
      labels: [N, L], 1 or 0; others are ignored.
      task: 'single_label' or 'multi_label'.
    """
    classes = range(labels.shape[1])
    thresholds = np.array([_threshold(scores[:, c], labels[:, c]) for c in classes])
    logits = _logits(scores, task)
    if task == "single_label":
        known = (labels == 1).any(axis=1)
        both = len(np.unique(labels[known].argmax(axis=1))) > 1
        picked = labels[known].argmax(axis=1)

        def loss(t: float) -> float:
            p = probabilities_of(logits[known], np.array([t]), task)
            return -np.log(np.maximum(p[np.arange(len(p)), picked], 1e-300)).mean()

        return OperatingPoint(thresholds, np.array([_smallest(loss) if both else np.nan]))
    found = []
    for c in classes:
        known = (labels[:, c] == 0) | (labels[:, c] == 1)
        sign = np.where(labels[known, c] == 1, 1.0, -1.0)
        margins = sign * logits[known, c]
        both = len(np.unique(sign)) > 1
        found.append(
            _smallest(lambda t, m=margins: np.logaddexp(0, -m / t).mean()) if both else np.nan
        )
    return OperatingPoint(thresholds, np.array(found))


def _logits(probabilities: np.ndarray, task: str) -> np.ndarray:
    p = np.clip(np.asarray(probabilities, np.float64), SMALLEST, 1 - SMALLEST)
    return np.log(p) if task == "single_label" else np.log(p) - np.log1p(-p)


def _smallest(loss: Callable[[float], float]) -> float:
    """The temperature of the smallest loss, by golden section; losses are convex in 1 / T."""
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    of_a, of_b = loss(1 / a), loss(1 / b)
    for _ in range(80):
        if of_a <= of_b:
            high, b, of_b = b, a, of_a
            a = high - GOLDEN * (high - low)
            of_a = loss(1 / a)
        else:
            low, a, of_a = a, b, of_b
            b = low + GOLDEN * (high - low)
            of_b = loss(1 / b)
    return 1 / (0.5 * (low + high))


def _threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    known = (labels == 0) | (labels == 1)
    y = labels[known] == 1
    if not y.any() or y.all():
        return np.nan
    order = np.argsort(-scores[known], kind="stable")
    falling, y = scores[known][order], y[order]
    ends = np.flatnonzero(np.r_[falling[1:] != falling[:-1], True])
    tp, count = np.cumsum(y)[ends].astype(np.float64), ends + 1.0
    fp, positives, n = count - tp, y.sum(), len(y)
    negatives = n - positives
    below = np.sqrt(count * (n - count) * positives * negatives)
    top = tp * (negatives - fp) - fp * (positives - tp)
    mcc = np.divide(top, below, out=np.zeros_like(top), where=below > 0)
    return float(falling[ends[int(np.argmax(mcc))]])
