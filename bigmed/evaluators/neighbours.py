"""Nearest neighbours in features, and what people look at: a few images with their neighbours."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bigmed import sharding
from bigmed.data.sources import Source

QUERIES, SHOWN = 8, 6  # images that are shown, and neighbours of each
CHUNK_ELEMENTS = 2**26  # similarities held at once on the devices: 256 MiB


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """A few images, and what lies nearest to each.

    Attributes:
      title: of what and how, for people.
      queries, found: the sources of both.
      query_rows: int [Q], record numbers of the images.
      found_rows: int [Q, K], record numbers, the nearest first; -1 for none.
      query_labels, found_labels: [Q, L] and [Q, K, L]; 1 for a class that an image has.
      class_names: L names.
    """

    title: str
    queries: Source
    found: Source
    query_rows: np.ndarray
    found_rows: np.ndarray
    query_labels: np.ndarray
    found_labels: np.ndarray
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Features:
    """All images of a test set as a network sees them.

    Attributes:
      title: of what, for people.
      x: float32 [n, D].
      labels: [n, L]; 1 for a class that an image has.
      class_names: L names.
    """

    title: str
    x: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


def spread(labels: np.ndarray, count: int = QUERIES) -> np.ndarray:
    """At most `count` row numbers of labels [N, L], the classes in turn; always the same ones."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    waiting = [[row for row in shuffled if labels[row, c] == 1] for c in range(labels.shape[1])]
    chosen: dict[int, None] = {}
    while len(chosen) < count and any(waiting):
        for of_class in waiting:
            while of_class and of_class[0] in chosen:
                of_class.pop(0)
            if of_class and len(chosen) < count:
                chosen[of_class.pop(0)] = None
    return np.array(list(chosen), int)


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
    known = sharding.place(x, everywhere)
    lengths = jax.jit(_length, out_shardings=everywhere)(known)
    own_codes = [sharding.place(of_x, everywhere) for of_x, _ in left_out]
    parts = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        missing = chunk - len(part)
        padded = np.pad(part, ((0, missing), (0, 0)))
        codes = [
            (of_x, sharding.place(np.pad(of_query[start : start + chunk], (0, missing)), rows))
            for of_x, (_, of_query) in zip(own_codes, left_out, strict=True)
        ]
        found = search(known, lengths, k, sharding.place(padded, rows), codes)
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
