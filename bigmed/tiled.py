"""Contrastive losses over all pairs of a batch without a matrix of all pairs.

The similarities of N rows with N columns are computed in tiles, twice: once for the sums that the
loss needs, with a running maximum (an online log-sum-exp), and once for the gradient, which those
sums determine; once for both with sigmoids, which need no sums. So memory is that of the rows and
one tile, in both passes. Over a mesh each device keeps its rows while the columns travel round a
ring, with what is summed up for them, so that N^2 products are made once and shared by both
directions of a loss.

The gradients are written by hand (`jax.custom_vjp`) around `shard_map`, never through it. Accuracy
and entropy come from the same sums and carry no gradient. Everything is float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bigmed.tiles import Items, Place, absent, fresh, items, on_mesh, sweep

HIGHEST = lax.Precision.HIGHEST
NORM_EPS = 1e-12
NEVER = -1e30  # a logit that takes no part; finite, so that no infinity is subtracted from another

Ids = tuple[jax.Array, jax.Array]  # int32 [N], of the rows and of the columns


class Plan(NamedTuple):
    """How pairs are related, and where they are computed; hashable.

    Attributes:
      tile: rows and columns of a tile.
      duplicates: what equal ids make of two different rows: 'none', 'mask' or 'multi', see
        `bigmed.losses.infonce`.
      mesh: the mesh over whose `BATCH_AXES` the rows are split, or None.
      normalise: whether vectors are divided by their norms.
    """

    tile: int
    duplicates: str = "none"
    mesh: Any = None
    normalise: bool = True


class Sums(NamedTuple):
    """What is summed up for each row or column of logits, float32 [B].

    Attributes:
      highest, total: of the logits, and the sum of exp(logit - highest).
      weighted: the sum of exp(logit - highest) * (logit - highest).
      own: the logit of the item's own pair.
      best_other: the highest of all others.
      positives, count: sum and number of the positives' logits.
    """

    highest: jax.Array
    total: jax.Array
    weighted: jax.Array
    own: jax.Array
    best_other: jax.Array
    positives: jax.Array
    count: jax.Array

    @property
    def log_sum(self) -> jax.Array:
        return self.highest + jnp.log(self.total)

    @property
    def entropy(self) -> jax.Array:
        return jnp.log(self.total) - self.weighted / self.total

    @property
    def right(self) -> jax.Array:
        """1 where the own pair is the highest, alone; float32."""
        return (self.best_other < self.own).astype(jnp.float32)


def _no_sums(rows: int) -> Sums:
    zero, never = jnp.zeros(rows), jnp.full(rows, NEVER)
    return Sums(never, zero, zero, zero, never, zero, zero)


def _add(sums: Sums, logits: jax.Array, own: jax.Array, positive: jax.Array, axis: int) -> Sums:
    """The sums after one more tile, along an axis of it."""
    highest = jnp.maximum(sums.highest, logits.max(axis))
    rise = sums.highest - highest  # at most 0
    shrink = jnp.exp(rise)
    below = logits - jnp.expand_dims(highest, axis)
    weights = jnp.exp(below)
    return Sums(
        highest=highest,
        total=sums.total * shrink + weights.sum(axis),
        weighted=(sums.weighted + sums.total * rise) * shrink + (weights * below).sum(axis),
        own=sums.own + jnp.where(own, logits, 0.0).sum(axis),
        best_other=jnp.maximum(sums.best_other, jnp.where(own, NEVER, logits).max(axis)),
        positives=sums.positives + jnp.where(positive, logits, 0.0).sum(axis),
        count=sums.count + positive.sum(axis),
    )


def _relations(row: Items, col: Items, duplicates: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[t, t] booleans of a tile: own pair, positive, left out."""
    missing = absent(row, col)
    own = (row.index[:, None] == col.index[None, :]) & ~missing
    equal = (row.ids[:, None] == col.ids[None, :]) & ~missing
    positive = own | equal if duplicates == "multi" else own
    left_out = missing | (equal & ~own) if duplicates == "mask" else missing
    return own, positive, left_out


def _dots(row: Items, col: Items) -> jax.Array:
    return jnp.einsum("id,jd->ij", row.vectors, col.vectors, precision=HIGHEST)  # ID,JD->IJ


def _factor(x: jax.Array, plan: Plan) -> jax.Array:
    """[N], what each row is multiplied by."""
    if not plan.normalise:
        return jnp.ones(len(x))
    return lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=1), NORM_EPS))


def _through_norm(x: jax.Array, gradient: jax.Array, plan: Plan) -> jax.Array:
    """The gradient by x [N, D] of the one by the vectors that `_factor` makes of it."""
    factor = _factor(x, plan)[:, None]
    if not plan.normalise:
        return gradient
    along = jnp.sum(x * gradient, axis=1, keepdims=True) * factor**2
    long = (factor < NORM_EPS**-0.5).astype(jnp.float32)  # a shorter one is only scaled
    return factor * (gradient - long * along * x)


def _sums_of_pairs(
    v: jax.Array, u: jax.Array, ids: Ids, scale: Any, plan: Plan
) -> tuple[Sums, Sums]:
    """The sums of all rows and columns of scale <v_i, u_j>."""

    def local(place: Place, arrays: Any, scalars: Any) -> tuple[Sums, Sums]:
        v, u, ids, *factors = arrays
        (scale,) = scalars

        def visit(row: Items, col: Items, of_row: Sums, of_col: Sums) -> tuple[Sums, Sums]:
            own, positive, left_out = _relations(row, col, plan.duplicates)
            logits = jnp.where(left_out, NEVER, scale * _dots(row, col))
            return _add(of_row, logits, own, positive, 1), _add(of_col, logits, own, positive, 0)

        row, col = items(v, factors[0], ids[0], place), items(u, factors[1], ids[1], place)
        states = fresh((_no_sums(len(v)), _no_sums(len(u))), place)
        return sweep(visit, row, col, *states, place)

    factors = _factor(v, plan), _factor(u, plan)
    return on_mesh(local, plan, v, u, ids, *factors, scalars=(scale,))


class Side(NamedTuple):
    """What the gradient needs of a direction, float32 [B]: the log-sum, the number of positives,
    and the gradient of the loss with respect to this item's own term."""

    log_sum: jax.Array
    count: jax.Array
    gradient: jax.Array


def _gradients_of_pairs(
    v: jax.Array, u: jax.Array, ids: Ids, of_row: Side, of_col: Side, scale: Any, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dv, du, dscale [N], to be summed) of sum_i g_i (r_i - p_i) + sum_j g_j (c_j - p_j).

    r and c are log-sums of rows and columns, p means of the positives' logits; r and c may also
    cover other logits than these. The gradients are by the normalised vectors times the scale.
    """

    def local(place: Place, arrays: Any, scalars: Any) -> Any:
        v, u, ids, of_row, of_col, *factors = arrays
        (scale,) = scalars

        def visit(row: Any, col: Any, row_state: Any, du: jax.Array) -> tuple[Any, jax.Array]:
            (row, of_row), (col, of_col), (dv, dscale) = row, col, row_state
            _, positive, left_out = _relations(row, col, plan.duplicates)
            dots = _dots(row, col)
            logits = jnp.where(left_out, NEVER, scale * dots)
            g = of_row.gradient[:, None] * (
                jnp.exp(logits - of_row.log_sum[:, None]) - positive / of_row.count[:, None]
            ) + of_col.gradient[None, :] * (
                jnp.exp(logits - of_col.log_sum[None, :]) - positive / of_col.count[None, :]
            )
            return _accumulate(g, dots, row, col, dv, dscale, du)

        row, col = items(v, factors[0], ids[0], place), items(u, factors[1], ids[1], place)
        states = fresh(((jnp.zeros(v.shape), jnp.zeros(len(v))), jnp.zeros(u.shape)), place)
        (dv, dscale), du = sweep(
            visit, (row, of_row), (col, of_col), *states, place
        )
        return dv, du, dscale

    factors = _factor(v, plan), _factor(u, plan)
    return on_mesh(local, plan, v, u, ids, of_row, of_col, *factors, scalars=(scale,))


def _accumulate(
    g: jax.Array, dots: jax.Array, row: Items, col: Items, dv: Any, dscale: Any, du: Any
) -> tuple[Any, Any]:
    dv = dv + jnp.einsum("ij,jd->id", g, col.vectors, precision=HIGHEST)  # IJ,JD->ID
    du = du + jnp.einsum("ij,id->jd", g, row.vectors, precision=HIGHEST)  # IJ,ID->JD
    return (dv, dscale + jnp.sum(g * dots, axis=1)), du


# -------------------------------------------------------------------------------------- the losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def infonce(
    v: jax.Array, u: jax.Array, ids: Ids, scale: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(loss of each row [N], of each column [N], accuracy, entropy) of v, u [N, D]."""
    return _infonce_forward(v, u, ids, scale, plan)[0]


def _infonce_forward(v: Any, u: Any, ids: Any, scale: Any, plan: Plan) -> tuple[Any, Any]:
    row, col = _sums_of_pairs(v, u, ids, scale, plan)
    losses = [side.log_sum - side.positives / side.count for side in (row, col)]
    found = (*losses, jnp.mean(row.right), jnp.mean(row.entropy))
    return found, (v, u, ids, scale, row.log_sum, row.count, col.log_sum, col.count)


def _infonce_backward(plan: Plan, kept: Any, cotangents: Any) -> Any:
    v, u, ids, scale, r, n, c, m = kept
    sides = Side(r, n, cotangents[0]), Side(c, m, cotangents[1])
    dv, du, dscale = _gradients_of_pairs(v, u, ids, *sides, scale, plan)
    dv, du = (_through_norm(x, scale * dx, plan) for x, dx in ((v, dv), (u, du)))
    return dv, du, None, jnp.sum(dscale)


infonce.defvjp(_infonce_forward, _infonce_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def sigmoid(
    v: jax.Array, u: jax.Array, ids: Ids, scale: jax.Array, bias: jax.Array, plan: Plan
) -> tuple[jax.Array, ...]:
    """(loss, that of each row [N], of each column [N], accuracy, entropy) of v, u [N, D].

    Only the first has a gradient, which is made beside it: unlike a softmax, a sigmoid's slope
    needs nothing but its own logit.
    """
    return _sigmoid_sweep(v, u, ids, scale, bias, plan, sloped=False)[0]


def _sigmoid_sweep(
    v: Any, u: Any, ids: Any, scale: Any, bias: Any, plan: Plan, sloped: bool = True
) -> tuple[tuple[jax.Array, ...], Any]:
    """What `sigmoid` returns, and, if `sloped`, its gradients by all of v, u, scale and bias."""
    n = len(v)

    def local(place: Place, arrays: Any, scalars: Any) -> Any:
        v, u, ids, *factors = arrays
        scale, bias = scalars

        def visit(row: Items, col: Items, of_row: Any, of_col: Any) -> tuple[Any, Any]:
            (sums, row_terms, of_row), (col_terms, du) = of_row, of_col
            own, positive, left_out = _relations(row, col, plan.duplicates)
            dots = _dots(row, col)
            logits = jnp.where(left_out, NEVER, scale * dots + bias)
            terms = jax.nn.softplus(jnp.where(positive, -logits, logits))  # 0 where left out
            if sloped:
                dv, dscale, dbias = of_row
                g = (jax.nn.sigmoid(logits) - positive) / n
                (dv, dscale), du = _accumulate(g, dots, row, col, dv, dscale, du)
                of_row = dv, dscale, dbias + g.sum(1)
            sums = _add(sums, logits, own, positive, 1)
            return (sums, row_terms + terms.sum(1), of_row), (col_terms + terms.sum(0), du)

        row, col = items(v, factors[0], ids[0], place), items(u, factors[1], ids[1], place)
        zero = jnp.zeros(len(v))
        slopes = ((jnp.zeros(v.shape), zero, zero), jnp.zeros(u.shape)) if sloped else ((), ())
        states = fresh(((_no_sums(len(v)), zero, slopes[0]), (zero, slopes[1])), place)
        return sweep(visit, row, col, *states, place)

    arrays = v, u, ids, _factor(v, plan), _factor(u, plan)
    found = on_mesh(local, plan, *arrays, scalars=(scale, bias))
    (sums, of_rows, slopes), (of_columns, du) = found
    found = jnp.mean(of_rows), of_rows, of_columns, jnp.mean(sums.right), jnp.mean(sums.entropy)
    if not sloped:
        return found, None
    dv, dscale, dbias = slopes
    dv, du = (_through_norm(x, scale * dx, plan) for x, dx in ((v, dv), (u, du)))
    return found, (dv, du, jnp.sum(dscale), jnp.sum(dbias))


def _sigmoid_backward(plan: Plan, slopes: Any, cotangents: Any) -> Any:
    dv, du, dscale, dbias = (slope * cotangents[0] for slope in slopes)
    return dv, du, None, dscale, dbias


sigmoid.defvjp(_sigmoid_sweep, _sigmoid_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ntxent(
    a: jax.Array, b: jax.Array, groups: jax.Array, scale: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(loss of each a [N], of each b [N], accuracy, entropy) of NT-Xent, of vectors [N, D].

    With `plan.duplicates` 'mask', items of one group are no negatives of each other. `scale` gets
    no gradient.
    """
    return _ntxent_forward(a, b, groups, scale, plan)[0]


def _ntxent_forward(a: Any, b: Any, groups: Any, scale: Any, plan: Plan) -> tuple[Any, Any]:
    row, col = _sums_of_pairs(a, b, (groups, groups), scale, plan)
    within_a = _log_sums_within(a, row.total, groups, scale, plan)
    within_b = _log_sums_within(b, within_a, groups, scale, plan)
    r_a, r_b = jnp.logaddexp(row.log_sum, within_a), jnp.logaddexp(col.log_sum, within_b)
    found = (r_a - row.own, r_b - col.own, jnp.mean(row.right), jnp.mean(row.entropy))
    return found, (a, b, groups, scale, r_a, r_b)


def _ntxent_backward(plan: Plan, kept: Any, cotangents: Any) -> Any:
    a, b, groups, scale, r_a, r_b = kept
    one = jnp.ones_like(r_a)
    sides = Side(r_a, one, cotangents[0]), Side(r_b, one, cotangents[1])
    da, db, _ = _gradients_of_pairs(a, b, (groups, groups), *sides, scale, plan)
    da = _gradient_within(a, db[:, 0], groups, sides[0], da, scale, plan)
    db = _gradient_within(b, da[:, 0], groups, sides[1], db, scale, plan)
    da, db = (_through_norm(x, scale * dx, plan) for x, dx in ((a, da), (b, db)))
    return da, db, None, jnp.zeros_like(scale)


ntxent.defvjp(_ntxent_forward, _ntxent_backward)


def _after(x: jax.Array, done: jax.Array) -> jax.Array:
    """`x` [N, D], but only once `done` [N] is there.

    Sweeps side by side would need the memory of all of them; compilers drop barriers too early to
    prevent that, but not what x may depend on. (A row that is NaN there is lost anyway.)
    """
    return jnp.where(jnp.isnan(done)[:, None], jnp.nan, x)


def _within(row: Items, col: Items, scale: Any, plan: Plan) -> jax.Array:
    """Logits of one view's items with each other, without an item's own and its group's."""
    left_out = (row.index[:, None] == col.index[None, :]) | absent(row, col)
    if plan.duplicates == "mask":
        left_out |= row.ids[:, None] == col.ids[None, :]
    return jnp.where(left_out, NEVER, scale * _dots(row, col))


def _log_sums_within(
    x: jax.Array, done: jax.Array, groups: jax.Array, scale: Any, plan: Plan
) -> jax.Array:
    """[N], of each item's logits in `_within`, made after `done` [N]."""

    def local(place: Place, arrays: Any, scalars: Any) -> jax.Array:
        x, later, groups, factor = arrays

        def visit(row: Items, col: Items, state: Any, _: Any) -> tuple[Any, tuple]:
            logits = _within(row, col, scalars[0], plan)
            highest = jnp.maximum(state[0], logits.max(1))
            added = jnp.exp(logits - highest[:, None]).sum(1)
            return (highest, state[1] * jnp.exp(state[0] - highest) + added), ()

        row, col = items(x, factor, groups, place), items(later, factor, groups, place)
        start = fresh((jnp.full(len(x), NEVER), jnp.zeros(len(x))), place)
        (highest, total), _ = sweep(visit, row, col, start, (), place)
        return highest + jnp.log(total)

    arrays = x, _after(x, done), groups, _factor(x, plan)
    return on_mesh(local, plan, *arrays, scalars=(scale,))


def _gradient_within(
    x: jax.Array, done: jax.Array, groups: jax.Array, side: Side, dx: jax.Array, scale: Any,
    plan: Plan,
) -> jax.Array:  # fmt: skip
    """Adds to `dx` both parts of an item, as anchor and as candidate, after `done` [N].

    The logits of `_within` are symmetric, so both are sums over a row.
    """

    def local(place: Place, arrays: Any, scalars: Any) -> jax.Array:
        x, later, groups, side, dx, factor = arrays

        def visit(row: Any, col: Any, dx: jax.Array, _: Any) -> tuple[jax.Array, tuple]:
            (row, of_row), (col, of_col) = row, col
            logits = _within(row, col, scalars[0], plan)
            g = of_row.gradient[:, None] * jnp.exp(logits - of_row.log_sum[:, None])
            g = g + of_col.gradient[None, :] * jnp.exp(logits - of_col.log_sum[None, :])
            return dx + jnp.einsum("ij,jd->id", g, col.vectors, precision=HIGHEST), ()  # IJ,JD->ID

        row = items(x, factor, groups, place), side
        col = items(later, factor, groups, place), side
        return sweep(visit, row, col, dx, (), place)[0]

    arrays = x, _after(x, done), groups, side, dx, _factor(x, plan)
    return on_mesh(local, plan, *arrays, scalars=(scale,))
