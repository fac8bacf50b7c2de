"""Visits all pairs of a batch's rows in tiles; over a mesh the columns travel round a ring.

Where tiles do not divide the rows of a device, these are padded with copies of their last one, that
have the number `ABSENT`. What is made of them is cut off again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from bigmed.sharding import BATCH_AXES

ABSENT = -1  # the number of a row that only fills a tile


class Place(NamedTuple):
    """Where rows are compared.

    Attributes:
      axes: of the mesh, over which the rows are split; none on one device.
      shards: how many parts they are split into.
      rows: of a device, without padding.
      tile: rows and columns of a tile.
    """

    axes: tuple[str, ...]
    shards: int
    rows: int
    tile: int


class Items(NamedTuple):
    """Rows of a batch.

    Attributes:
      x: [B, D], as they came.
      factor: [B], by which a row is multiplied where it is used: 1, or 1 / its norm. A normalised
        copy of all rows would cost as much memory as the rest of a loss.
      index: int32 [B], another number for every row of the batch, or `ABSENT`.
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
    place: Place,
) -> tuple[Any, Any]:
    """`visit(row, col, row_state, col_state)` -> both states, for every tile of rows and columns.

    All arguments are trees of arrays whose first axis is that of a device's rows or columns; states
    that are made for it are `fresh`.
    """

    tile = place.tile

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
        if place.shards > 1:
            ring = [(i, (i + 1) % place.shards) for i in range(place.shards)]
            col, col_state = jax.tree.map(
                lambda x: lax.ppermute(x, place.axes, ring), (col, col_state)
            )
        return (row_state, col, col_state), None

    start = (row_state, col, col_state)
    (row_state, _, col_state), _ = lax.scan(one_device, start, None, length=place.shards)
    return row_state, col_state


def fresh(state: Any, place: Place) -> Any:
    """A state that is made on the devices, as one that will differ among them."""
    if not place.axes:
        return state
    return jax.tree.map(lambda x: lax.pcast(x, place.axes, to="varying"), state)


def on_mesh(local: Callable[..., Any], plan: Any, *arrays: Any, scalars: Sequence[Any]) -> Any:
    """`local(place, arrays, scalars)` on each device's rows of the arrays, in whole tiles.

    `plan` has the mesh and the tile; without a mesh there is one device, and no axes. All that
    `local` returns has a row for each row.
    """
    mesh, tile = plan.mesh, plan.tile
    axes = () if mesh is None else BATCH_AXES
    shards = math.prod(mesh.shape[axis] for axis in axes)

    def on_device(arrays: Any, scalars: Any) -> Any:
        rows = len(jax.tree.leaves(arrays)[0])
        place, missing = Place(axes, shards, rows, tile), -rows % tile
        if not missing:
            return local(place, arrays, scalars)
        # copies of a true row, whose numbers divide nothing by 0 before they are left out
        arrays = jax.tree.map(
            lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge"), arrays
        )
        return jax.tree.map(lambda x: x[:rows], local(place, arrays, scalars))

    if mesh is None:
        return on_device(arrays, tuple(scalars))
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
    )(arrays, tuple(scalars))


def items(x: jax.Array, factor: jax.Array, ids: jax.Array, place: Place) -> Items:
    """A device's rows with their numbers."""
    first = lax.axis_index(place.axes) * len(x) if place.axes else 0
    here = jnp.arange(len(x), dtype=jnp.int32)
    return Items(x, factor, jnp.where(here < place.rows, first + here, ABSENT), ids)


def absent(row: Items, col: Items) -> jax.Array:
    """[t, t] booleans of a tile, where the row or the column only fills it."""
    return (row.index == ABSENT)[:, None] | (col.index == ABSENT)[None, :]
