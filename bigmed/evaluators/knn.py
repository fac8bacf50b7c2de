"""k nearest neighbours by cosine similarity on frozen features."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmed import statistics
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators.neighbours import nearest
from bigmed.evaluators.probe import Probe

WEIGHTINGS = ("softmax", "uniform")
QUERIES = 16_384  # whose votes are counted at once


class Evaluator(Probe):
    """`Probe` by weighted votes of the nearest training images.

    The score of a class is the share of the votes for it among those of the k neighbours whose
    label of it is known; without any, the share of positives in training.

    Args:
      k_grid: numbers of neighbours to choose from; those above the training images are left out.
      weighting: 'softmax': a vote counts exp(similarity / temperature), as in Wu et al. 2018
        (arXiv 1805.01978) and DINO; 'uniform': 1.
      temperature: of 'softmax'.
      **probe: see `Probe`.
    """

    NAME = "knn"
    POLICIES = (*statistics.SCORING_POLICIES, "smooth")

    def __init__(
        self,
        predict_fn: Any,
        mesh: Any,
        *,
        k_grid: Sequence[int] = (5, 10, 20, 50, 100, 200),
        weighting: str = "softmax",
        temperature: float = 0.07,
        **probe: Any,
    ):
        if weighting not in WEIGHTINGS:
            raise UserError(f"weighting='{weighting}': {did_you_mean(weighting, WEIGHTINGS)}")
        whole = all(isinstance(k, int) and k >= 1 for k in k_grid)
        if not k_grid or not whole or not temperature > 0:
            raise UserError(
                f"k_grid={tuple(k_grid)}, temperature={temperature}: valid: whole numbers from 1, "
                "and a temperature above 0"
            )
        super().__init__(predict_fn, mesh, **probe)
        self._k_grid = tuple(k_grid)
        self._temperature = temperature if weighting == "softmax" else None

    def settings(self, num_train: int) -> list[dict[str, Any]]:
        fits = {k for k in self._k_grid if k <= num_train} or {num_train}
        return [{"k": k} for k in sorted(fits, reverse=True)]

    def scores(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        queries: np.ndarray,
    ) -> np.ndarray:
        """Shares of votes [G, M, L]."""
        ks = [setting["k"] for setting in settings]
        return shares(x, targets, queries, ks, self._temperature, self._mesh)


def shares(
    x: np.ndarray,
    targets: np.ndarray,
    queries: np.ndarray,
    ks: Sequence[int],
    temperature: float | None,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Shares of votes float64 [G, M, L] of queries [M, D], from x [N, D] and targets [N, L].

    Memory beyond these is about that of x on the devices, and linear in N and M.

    Args:
      ks, temperature: see `votes`.
    """
    prior = prevalence(targets)
    found = np.empty((len(ks), len(queries), targets.shape[1]))
    for start in range(0, len(queries), QUERIES):
        part = slice(start, start + QUERIES)
        similarities, indices = nearest(x, queries[part], max(ks), mesh)
        found[:, part] = votes(similarities, targets[indices], ks, prior, temperature)
    return found


def prevalence(targets: np.ndarray) -> np.ndarray:
    """float64 [L]: mean of the known targets [N, L]; 0.5 where none is known."""
    known = (targets >= 0).sum(axis=0)
    total = np.maximum(targets, 0).sum(axis=0, dtype=np.float64)
    return np.where(known > 0, total / np.maximum(known, 1), 0.5)


def votes(
    similarities: np.ndarray,
    targets: np.ndarray,
    ks: Sequence[int],
    prior: np.ndarray,
    temperature: float | None,
) -> np.ndarray:
    """Weighted share of positive votes among the first k neighbours, for every k.

    Args:
      similarities: [M, K], falling along K.
      targets: [M, K, L] of the neighbours, from 0 to 1; negative ones do not vote.
      ks: G numbers of at most K.
      prior: [L], the score where nobody votes.
      temperature: None for votes that count alike.

    Returns:
      float64 [G, M, L].
    """
    weights = np.ones(similarities.shape)
    if temperature is not None:
        weights = np.exp((similarities - similarities[:, :1]).astype(np.float64) / temperature)
    scores = np.empty((len(ks), len(targets), targets.shape[2]))
    for c in range(targets.shape[2]):
        of_class = targets[:, :, c]
        positive = np.cumsum(weights * np.maximum(of_class, 0), axis=1)  # [M, K]
        known = np.cumsum(weights * (of_class >= 0), axis=1)
        for g, k in enumerate(ks):
            p, n = positive[:, k - 1], known[:, k - 1]
            scores[g, :, c] = np.where(n > 0, p / np.where(n > 0, n, 1), prior[c])
    return scores
