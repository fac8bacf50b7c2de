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

    def part(tree: Any, i: jax.Array) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * tile, tile), tree)

    def put(tree: Any, i: jax.Array, new: Any) -> Any:
        # in place: stacking a scan's outputs would hold every state twice
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_slice_in_dim(x, y, i * tile, 0), tree, new
        )

    rows, columns = (jnp.arange(len(jax.tree.leaves(x)[0]) // tile) for x in (row, col))

    def one_device(carry: Any, _: Any) -> tuple[Any, None]:
        row_state, col, col_state = carry

        def over_columns(states: Any, j: jax.Array) -> tuple[Any, None]:
            row_state, col_state = states
            column = part(col, j)

            def over_rows(states: Any, i: jax.Array) -> tuple[Any, None]:
                row_state, of_column = states
                new, of_column = visit(part(row, i), column, part(row_state, i), of_column)
                return (put(row_state, i, new), of_column), None

            (row_state, new), _ = lax.scan(over_rows, (row_state, part(col_state, j)), rows)
            return (row_state, put(col_state, j, new)), None

        (row_state, col_state), _ = lax.scan(over_columns, (row_state, col_state), columns)
        if shards > 1:
            ring = [(i, (i + 1) % shards) for i in range(shards)]
            col, col_state = jax.tree.map(
                lambda x: lax.ppermute(x, axes, ring), (col, col_state)
            )
        return (row_state, col, col_state), None

    start = (row_state, col, col_state)
    (row_state, _, col_state), _ = lax.scan(one_device, start, None, length=shards)
    return row_state, col_state


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
