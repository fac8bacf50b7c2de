"""The training state: everything that a checkpoint holds, and nothing else."""

import zlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from bigmed import sharding


@flax.struct.dataclass
class TrainState:
    """A pytree of arrays.

    Attributes:
      step: int32 scalar, updates done; with the seed it determines the next batch and every draw.
      params: trained parameters, float32.
      batch_stats: running statistics, float32.
      opt_state: the optimiser's.
      extra: what the objective owns beside them (teacher, queue, moving averages).
      key: uint32 [2], the run's random key; it never advances.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    extra: Any
    key: jax.Array


def stream(key: jax.Array, name: str, step: jax.Array | int) -> jax.Array:
    """The key of one named stream at one step: a pure function of (run's key, name, step)."""
    named = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(named, step)


def make_init(objective: Any, tx: Any, batch_spec: Mapping[str, Any], seed: int) -> Any:
    """A function of no arguments that makes the fresh state; for `jax.eval_shape` and `jit`."""

    def init() -> TrainState:
        key = jax.random.key(seed)
        params, batch_stats, extra = objective.init(stream(key, "init", 0), batch_spec)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx.init(params),
            extra=extra,
            key=jax.random.key_data(key),
        )

    return init


def abstract_state(init: Any, mesh: Any, rules: sharding.Rules) -> Any:
    """Shapes, dtypes and shardings of the state, without making it."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.tree_shardings(shapes, mesh, rules),
    )


def shardings(abstract: Any) -> Any:
    """The shardings that `abstract_state` gave its leaves."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
