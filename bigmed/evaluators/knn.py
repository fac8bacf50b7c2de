"""k nearest neighbours by cosine similarity on frozen features, in chunks of queries."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmed import sharding
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators.probe import Probe, place

WEIGHTINGS = ("softmax", "uniform")
CHUNK_ELEMENTS = 2**26  # similarities held at once on the devices: 256 MiB


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
        if not k_grid or min(k_grid) < 1 or temperature <= 0:
            raise UserError(
                f"k_grid={tuple(k_grid)}, temperature={temperature}: valid: positive values"
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
        similarities, indices = nearest(x, queries, max(ks), self._mesh)
        return votes(similarities, targets[indices], ks, prevalence(targets), self._temperature)


def nearest(
    x: np.ndarray,
    queries: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh,
    left_out: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of x [N, D] to each of queries [M, D], the most similar first.

    Memory on the devices is linear in N: the queries go in chunks, divided over the mesh.

    Args:
      left_out: pairs of codes, int32 [N] of the rows and [M] of the queries: rows of a query's own
        code are not for it. No negative code is anyone's own.

    Returns:
      Cosine similarities float32 [M, k] and row numbers int32 [M, k]; where a query has fewer than
      k rows the similarities of the others are -inf.
    """
    shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    chunk = max(1, min(CHUNK_ELEMENTS // len(x), len(queries)) // shards) * shards
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    search = jax.jit(_search, static_argnums=2, out_shardings=everywhere)
    known = place(x, everywhere)
    lengths = jax.jit(_length, out_shardings=everywhere)(known)
    own_codes = [place(of_x, everywhere) for of_x, _ in left_out]
    parts = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        missing = chunk - len(part)
        padded = np.pad(part, ((0, missing), (0, 0)))
        codes = [
            (of_x, place(np.pad(of_query[start : start + chunk], (0, missing)), rows))
            for of_x, (_, of_query) in zip(own_codes, left_out, strict=True)
        ]
        found = search(known, lengths, k, place(padded, rows), codes)
        parts.append([np.asarray(array)[: len(part)] for array in found])
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _search(
    x: jax.Array,
    lengths: jax.Array,
    k: int,
    queries: jax.Array,
    left_out: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    queries = queries / _length(queries)[:, None]
    similarity = jnp.einsum("md,nd->mn", queries, x, precision="highest")
    similarity = similarity / lengths[None]  # rather than x, of which this would be a copy
    for of_x, of_query in left_out:
        own = (of_query[:, None] == of_x[None]) & (of_query[:, None] >= 0)
        similarity = jnp.where(own, -jnp.inf, similarity)
    return jax.lax.top_k(similarity, k)


def _length(x: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.linalg.norm(x, axis=1), 1e-12)


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
