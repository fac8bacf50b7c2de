"""Visits all pairs of a batch's rows in tiles; over a mesh the columns travel round a ring."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from bigmed.sharding import BATCH_AXES


class Items(NamedTuple):
    """Rows of a batch.

    Attributes:
      x: [B, D], as they came.
      factor: [B], by which a row is multiplied where it is used: 1, or 1 / its norm. A normalised
        copy of all rows would cost as much memory as the rest of a loss.
      index: int32 [B], row numbers in the whole batch.
      ids: int32 [B].
    """

    x: jax.Array
    factor: jax.Array
    index: jax.Array
    ids: jax.Array

    @property
    def vectors(self) -> jax.Array:
        return self.x * self.factor[:, None]


def sweep(
    visit: Callable[..., tuple[Any, Any]],
    row: Any,
    col: Any,
    row_state: Any,
    col_state: Any,
    tile: int,
    axes: Sequence[str],
    shards: int,
) -> tuple[Any, Any]:
    """`visit(row, col, row_state, col_state)` -> both states, for every tile of rows and columns.

    All arguments are trees of arrays whose first axis is that of a device's rows or columns; states
    that are made for it are `fresh`.
    """

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), tree)

    def join(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    rows = split(row)

    def over_columns(row_state: Any, column: Any) -> tuple[Any, Any]:
        col, col_state = column

        def over_rows(col_state: Any, own: Any) -> tuple[Any, Any]:
            row_state, col_state = visit(own[0], col, own[1], col_state)
            return col_state, row_state

        col_state, row_state = lax.scan(over_rows, col_state, (rows, row_state))
        return row_state, col_state

    def one_device(carry: Any, _: Any) -> tuple[Any, None]:
        row_state, (col, col_state) = carry
        row_state, col_state = lax.scan(over_columns, row_state, (split(col), split(col_state)))
        travelling = (col, join(col_state))
        if shards > 1:
            ring = [(i, (i + 1) % shards) for i in range(shards)]
            travelling = jax.tree.map(lambda x: lax.ppermute(x, axes, ring), travelling)
        return (row_state, travelling), None

    start = (split(row_state), (col, col_state))
    (row_state, (_, col_state)), _ = lax.scan(one_device, start, None, length=shards)
    return join(row_state), col_state


def fresh(state: Any, axes: Sequence[str]) -> Any:
    """A state that is made on the devices, as one that will differ among them."""
    if not axes:
        return state
    return jax.tree.map(lambda x: lax.pcast(x, tuple(axes), to="varying"), state)


def on_mesh(
    local: Callable[..., Any], mesh: Any, *arrays: Any, scalars: Sequence[Any]
) -> Any:
    """`local(axes, shards, arrays, scalars)` on each device's rows of the arrays.

    Without a mesh there is one device, and no axes.
    """
    if mesh is None:
        return local((), 1, arrays, scalars)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        lambda arrays, scalars: local(BATCH_AXES, shards, arrays, scalars),
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
    )(arrays, tuple(scalars))


def items(x: jax.Array, factor: jax.Array, ids: jax.Array, axes: Sequence[str]) -> Items:
    """A device's rows with their numbers in the whole batch."""
    first = lax.axis_index(tuple(axes)) * len(x) if axes else 0
    return Items(x, factor, first + jnp.arange(len(x), dtype=jnp.int32), ids)
