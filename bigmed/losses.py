"""Contrastive losses and the diagnostics of an embedding, as pure functions of global arrays.

Everything here is float32. The arrays are global: under a mesh the anchors of a similarity matrix
stay sharded by row while XLA gathers the candidates, with gradients through both sides of every dot
product, so the value and the gradient are those of one device. Where that matrix would be large,
the same numbers are computed in tiles (`bigmed.tiled`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigmed import tiled
from bigmed.sharding import BATCH_AXES

# From so many logits a device on they are made in tiles. On two CPU cores (tools/bench_loss.py,
# 2,048 and 4,096 rows of 128) tiles of 1,024 then take .54 to .84 of the time.
TILED_FROM = 2**22
TILE = 1024
NORM_EPS = 1e-12
HIGHEST = jax.lax.Precision.HIGHEST


class Contrast(NamedTuple):
    """A contrastive loss and what is worth plotting beside it; scalars, float32."""

    loss: jax.Array
    accuracy: jax.Array
    entropy: jax.Array
    rows: jax.Array  # [2, N], the loss of each anchor


def l2_normalize(x: jax.Array) -> jax.Array:
    """`x` in float32 divided by its Euclidean norm along the last axis."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), NORM_EPS))


def ntxent(
    z_a: jax.Array,
    z_b: jax.Array,
    *,
    temperature: float,
    hidden_norm: bool = True,
    reduction: str = "mean",
    groups: jax.Array | None = None,
    tile: int | None = None,
) -> Contrast:
    """NT-Xent with all 2(N-1) negatives (SimCLR, arXiv 2002.05709, equation 1 and algorithm 1).

    Args:
      z_a, z_b: [N, D] embeddings of the two views of N items, any float dtype.
      temperature: divides the similarities; a number, so it gets no gradient.
      hidden_norm: whether the embeddings are divided by their norm first.
      reduction: 'mean' is the paper's loss, the mean over 2N anchors; 'sum' is the released code's,
        the sum of the two directional means, which is twice that.
      groups: optional [N] integers; items of one group other than the pair itself are no negatives
        of each other (several cases of one patient).
      tile: rows and columns of a tile, at most; 0: the whole matrix at once; None: as its size
        suggests.

    Returns:
      `Contrast`; accuracy and entropy look at the a -> b block alone (N candidates), as the
      released code logs them.

    Raises:
      ValueError: shapes that differ, an unknown reduction or a negative tile.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is neither 'mean' nor 'sum'")
    z_a, z_b = _pairs(z_a, z_b)
    n, factor, temperature = len(z_a), {"mean": 1.0, "sum": 2.0}[reduction], float(temperature)
    plan = _plan(n, tile, "none" if groups is None else "mask", hidden_norm)
    if plan:
        scale = _float(1 / temperature)
        *rows, accuracy, entropy = tiled.ntxent(z_a, z_b, _ids(z_a, groups), scale, plan)
        rows = jnp.stack(rows)
        return Contrast(jnp.mean(rows) * factor, accuracy, entropy, rows)
    if hidden_norm:
        z_a, z_b = l2_normalize(z_a), l2_normalize(z_b)

    def similarity(x: jax.Array, y: jax.Array) -> jax.Array:
        # ND,MD->NM
        return jnp.einsum("nd,md->nm", x, y, precision=HIGHEST) / temperature

    itself = jnp.eye(n, dtype=bool)
    not_same_view = itself
    not_other_view = jnp.zeros_like(itself)
    if groups is not None:
        related = groups[:, None] == groups[None, :]
        not_same_view, not_other_view = related, related & ~itself

    def mask(logits: jax.Array, excluded: jax.Array) -> jax.Array:
        return jnp.where(excluded, -jnp.inf, logits)

    logits_ab = mask(similarity(z_a, z_b), not_other_view)
    logits_ba = mask(similarity(z_b, z_a), not_other_view)
    logits_aa = mask(similarity(z_a, z_a), not_same_view)
    logits_bb = mask(similarity(z_b, z_b), not_same_view)

    def row_losses(cross: jax.Array, same: jax.Array) -> jax.Array:
        every = jax.nn.logsumexp(jnp.concatenate([cross, same], axis=1), axis=1)  # [N, 2N] -> [N]
        return every - jnp.diagonal(cross)

    rows = jnp.stack([row_losses(logits_ab, logits_aa), row_losses(logits_ba, logits_bb)])
    return Contrast(jnp.mean(rows) * factor, *_diagnostics(logits_ab), rows)


def infonce(
    v: jax.Array,
    u: jax.Array,
    *,
    scale: jax.Array | float,
    weight: float = 0.5,
    ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    duplicates: str = "none",
    tile: int | None = None,
) -> Contrast:
    """InfoNCE in both directions between N pairs (ConVIRT, arXiv 2010.00747, equations 2 to 4).

    Args:
      v, u: [N, D] of two kinds; row i of one belongs to row i of the other.
      scale: 1 / temperature, of the cosine similarities.
      weight: of the direction v -> u, in which v picks its u; 1 - weight is that of the other.
      ids: [N] int32, equal for pairs that say the same (a hash of their text); or two of them, of
        v and of u, where both are texts.
      duplicates: what equal ids make of two different pairs: 'none', negatives of each other;
        'mask', neither negatives nor positives; 'multi', positives, whose log-probabilities are
        averaged.
      tile: see `ntxent`.

    Returns:
      `Contrast`: the mean over the pairs; accuracy and entropy are those of v -> u.

    Raises:
      ValueError: shapes that differ, an unknown `duplicates` or one without ids, a negative tile.
    """
    v, u = _pairs(v, u)
    plan = _plan(len(v), tile, _known(duplicates, ids))
    if plan:
        *rows, accuracy, entropy = tiled.infonce(v, u, _both(v, ids), _float(scale), plan)
        rows = jnp.stack(rows)
        loss = weight * jnp.mean(rows[0]) + (1 - weight) * jnp.mean(rows[1])
        return Contrast(loss, accuracy, entropy, rows)
    v, u = l2_normalize(v), l2_normalize(u)
    logits = _mask(_cosines(v, u) * scale, ids, duplicates)
    positive = _positives(len(v), ids, duplicates)

    def direction(logits: jax.Array, positive: jax.Array) -> jax.Array:
        own = jnp.sum(jnp.where(positive, logits, 0.0), axis=1) / jnp.sum(positive, axis=1)
        return jax.nn.logsumexp(logits, axis=1) - own

    rows = jnp.stack([direction(logits, positive), direction(logits.T, positive.T)])
    loss = weight * jnp.mean(rows[0]) + (1 - weight) * jnp.mean(rows[1])
    return Contrast(loss, *_diagnostics(logits), rows)


def sigmoid(
    v: jax.Array,
    u: jax.Array,
    *,
    scale: jax.Array | float,
    bias: jax.Array | float,
    ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    duplicates: str = "none",
    tile: int | None = None,
) -> Contrast:
    """The sigmoid loss of SigLIP (arXiv 2303.15343, equation 1): every pair is a binary question.

    Args:
      bias: added to the scaled similarities.
      The others: see `infonce`; 'mask' leaves pairs with equal ids out, 'multi' makes them
        positives.

    Returns:
      `Contrast`: the sum over all combinations, divided by N; `rows` are those of v and of u,
      without a gradient.

    Raises:
      ValueError: see `infonce`.
    """
    v, u = _pairs(v, u)
    plan = _plan(len(v), tile, _known(duplicates, ids))
    if plan:
        loss, *rows, accuracy, entropy = tiled.sigmoid(
            v, u, _both(v, ids), _float(scale), _float(bias), plan
        )
        return Contrast(loss, accuracy, entropy, jnp.stack(rows))
    v, u = l2_normalize(v), l2_normalize(u)
    logits = _cosines(v, u) * scale + bias
    sign = jnp.where(_positives(len(v), ids, duplicates), 1.0, -1.0)
    terms = jax.nn.softplus(-sign * logits)
    if duplicates == "mask":
        terms = jnp.where(_repeated(ids), 0.0, terms)
    rows = jax.lax.stop_gradient(jnp.stack([jnp.sum(terms, axis=1), jnp.sum(terms, axis=0)]))
    return Contrast(jnp.sum(terms) / len(v), *_diagnostics(_mask(logits, ids, duplicates)), rows)


def _plan(
    n: int, tile: int | None, duplicates: str, normalise: bool = True
) -> tiled.Plan | None:
    """How to compute N x N pairs in tiles; None to compute them at once.

    Tiles are as equal as can be: the rows of a device are padded by less than one for each tile.
    Rows that do not divide over the mesh, as no batch in training, are computed at once.
    """
    if tile is not None and tile < 0:
        raise ValueError(f"tile={tile} is negative")
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    rows, rest = divmod(n, shards)
    if tile is None:
        tile = TILE if rows * n >= TILED_FROM else 0
    if rest or not tile:
        return None
    tile = math.ceil(rows / math.ceil(rows / tile))
    return tiled.Plan(tile, duplicates, mesh if shards > 1 else None, normalise)


def _pairs(v: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in float32."""
    if v.shape != u.shape or v.ndim != 2:
        raise ValueError(f"rows of {v.shape} and {u.shape} are no pairs; both are to be [N, D]")
    return v.astype(jnp.float32), u.astype(jnp.float32)


def _known(duplicates: str, ids: Any) -> str:
    if duplicates not in ("none", "mask", "multi"):
        raise ValueError(f"duplicates={duplicates!r} is none of 'none', 'mask' and 'multi'")
    if duplicates != "none" and ids is None:
        raise ValueError(f"duplicates={duplicates!r} needs ids")
    return duplicates


def _ids(v: jax.Array, ids: jax.Array | None) -> jax.Array:
    return jnp.arange(len(v), dtype=jnp.int32) if ids is None else ids.astype(jnp.int32)


def _both(v: jax.Array, ids: Any) -> tuple[jax.Array, jax.Array]:
    """The ids of v and of u."""
    return tuple(_ids(v, x) for x in (ids if isinstance(ids, tuple) else (ids, ids)))


def _float(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


def _cosines(v: jax.Array, u: jax.Array) -> jax.Array:
    return jnp.einsum("nd,md->nm", v, u, precision=HIGHEST)  # ND,MD->NM


def _repeated(ids: Any) -> jax.Array:
    """[N, N], where two different pairs have equal ids."""
    of_v, of_u = ids if isinstance(ids, tuple) else (ids, ids)
    return (of_v[:, None] == of_u[None, :]) & ~jnp.eye(len(of_v), dtype=bool)


def _positives(n: int, ids: Any, duplicates: str) -> jax.Array:
    own = jnp.eye(n, dtype=bool)
    return own | _repeated(ids) if duplicates == "multi" else own


def _mask(logits: jax.Array, ids: Any, duplicates: str) -> jax.Array:
    if duplicates == "mask":
        return jnp.where(_repeated(ids), -jnp.inf, logits)
    return logits


def _diagnostics(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accuracy and mean entropy of the rows' softmax over [N, N], without a gradient.

    A row counts as right where its own logit is above all others.
    """
    logits = jax.lax.stop_gradient(logits)
    log_p = jax.nn.log_softmax(logits, axis=1)
    entropy = -jnp.sum(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p, 0.0), axis=1)
    others = jnp.where(jnp.eye(len(logits), dtype=bool), -jnp.inf, logits)
    right = jnp.max(others, axis=1) < jnp.diagonal(logits)
    return jnp.mean(right), jnp.mean(entropy)


def embedding_health(z: jax.Array) -> dict[str, jax.Array]:
    """Two alarms for collapse of the normalised embeddings `z` [N, D].

    Returns:
      feature_std: the mean over dimensions of the standard deviation times sqrt(D): about 1 for
        embeddings spread over the sphere, 0 when all are equal.
      effective_rank: (sum of eigenvalues)^2 / sum of squared eigenvalues of the covariance, the
        participation ratio: D when isotropic, 1 when everything lies on a line. It needs no
        eigendecomposition, so it is cheap enough for every step.
    """
    n, d = z.shape
    z = l2_normalize(z)
    centred = z - jnp.mean(z, axis=0, keepdims=True)
    covariance = jnp.einsum("nd,ne->de", centred, centred, precision=HIGHEST) / n
    trace = jnp.trace(covariance)
    return {
        "feature_std": jnp.mean(jnp.sqrt(jnp.diagonal(covariance))) * jnp.sqrt(float(d)),
        "effective_rank": trace**2 / jnp.maximum(jnp.sum(covariance**2), NORM_EPS),
    }


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask` is true; 0 where nothing is."""
    weights = mask.astype(jnp.float32)
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def classification(logits: jax.Array, labels: jax.Array, task: str) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and accuracy of a classifier whose labels may be missing.

    Args:
      logits: [N, L] float.
      labels: [N, L] integers: 1 present, 0 absent, anything negative uncertain or missing (left
        out). With task 'single_label' a row is one-hot.
      task: 'single_label' (softmax) or 'multi_label' (independent sigmoids).

    Returns:
      The mean loss and the mean accuracy over what is labelled; scalars, float32.
    """
    logits = logits.astype(jnp.float32)
    if task == "single_label":
        known = jnp.max(labels, axis=1) == 1  # [N]
        target = jnp.argmax(labels, axis=1)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0]
        return masked_mean(losses, known), masked_mean(jnp.argmax(logits, 1) == target, known)
    known = labels >= 0  # [N, L]
    target = (labels == 1).astype(jnp.float32)
    losses = jax.nn.softplus(logits) - target * logits
    return masked_mean(losses, known), masked_mean((logits > 0) == (labels == 1), known)
