"""The device mesh ('data', 'fsdp', 'tensor') and which leaf lives where on it."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigmed import tree
from bigmed.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
MIN_FSDP_SIZE = 2**14  # smaller leaves cost more to gather than to keep whole

# (pattern of the end of a leaf's path, mesh axis or None for each dimension)
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` asks for, over all devices of all processes.

    Args:
      sizes: a size for each of `AXES`; one may be -1, for "the rest".
      devices: defaults to `jax.devices()`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    bad = shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape)
    if not bad and -1 in shape:
        shape[shape.index(-1)] = len(devices) // known
    if bad or math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh ({shown}) does not fit {len(devices)} devices; sizes are positive, "
            "multiply to the number of devices, and at most one is -1"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raises `UserError` unless the rows of each part of a batch divide evenly over the mesh."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % (shards * micro_batches):
        parts = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise UserError(
            f"config.data.batch_size={batch_size}{parts} does not divide over the mesh "
            f"({', '.join(f'{a}={mesh.shape[a]}' for a in AXES)}); use a multiple of "
            f"{shards * micro_batches}"
        )


def host_block(mesh: Mesh) -> tuple[int, int]:
    """Which rows of a batch this process makes: block `index` of `count` equal blocks in order.

    Usually one block a process. Processes that hold the same rows, because the tensor axis spans
    them, make the same block.

    Raises:
      UserError: the rows of this or another process do not lie together.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    here = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    rows = sorted({row for (index,) in here for row in range(shards)[index]})
    index, rest = divmod(rows[0], len(rows))
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    if not everywhere(together and not rest and not shards % len(rows)):
        raise UserError(
            f"config.mesh: not every process would hold a block of rows (this one: {rows} of "
            f"{shards}); let the devices of a process be a multiple of mesh.tensor, or divide it"
        )
    return index, shards // len(rows)


def everywhere(here: bool) -> bool:
    """Whether it holds on every process, so that all take the same way."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays, sharded by row."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds -> a global one."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def leaf_spec(name: str, shape: Sequence[int], mesh: Mesh, rules: Rules) -> PartitionSpec:
    """Where one leaf lives: the first rule that matches the end of its path, else the fsdp rule.

    A rule's axis is dropped where it does not divide the dimension. Without a matching rule, a leaf
    of at least `MIN_FSDP_SIZE` elements is split over 'fsdp' along its largest divisible dimension.
    """
    for pattern, axes in rules:
        if re.search(f"(?:^|/){pattern}$", name) and len(axes) == len(shape):
            fits = [
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            return PartitionSpec(*fits)
    fsdp = mesh.shape["fsdp"]
    dims = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < MIN_FSDP_SIZE or not dims:
        return PartitionSpec()
    split = max(dims, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == split else None for i in range(len(shape))))


def tree_shardings(abstract: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """`NamedSharding` of every leaf of a tree of shapes.

    The rules look at the end of a path, so they place a parameter, its momentum, its moving average
    and its teacher alike.
    """
    return tree.map_with_name(
        lambda name, leaf: NamedSharding(mesh, leaf_spec(name, leaf.shape, mesh, rules)), abstract
    )


def preemption_watch(requested: Callable[[], bool]) -> Callable[[], bool]:
    """Whether to save and stop: a local flag, or what all hosts agree on.

    One watch serves a whole run, for the hosts agree on the number of the question at which they
    stop; all must ask equally often.
    """
    if jax.process_count() == 1:
        return requested
    questions = itertools.count()
    return lambda: multihost_utils.reached_preemption_sync_point(next(questions))
