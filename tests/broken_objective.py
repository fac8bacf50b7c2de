"""An objective from outside bigmed, named by its module: SimCLR with a NaN in batch 5."""

import jax
import jax.numpy as jnp

from bigmed.objectives import simclr
from bigmed.state import stream

BAD_BATCH = 5


class Objective(simclr.Objective):
    def loss(self, params, batch_stats, extra, batch, key, train):
        bad_key = stream(jax.random.key(0), "train", BAD_BATCH)
        is_bad = jnp.all(jax.random.key_data(key) == jax.random.key_data(bad_key))
        factor = jnp.where(is_bad, jnp.nan, 1.0)
        head = jax.tree.map(lambda leaf: leaf * factor, params["head"])
        return super().loss({**params, "head": head}, batch_stats, extra, batch, key, train)
