"""Encoders from outside bigmed that are smooth and small: `objective_oracle` has them in NumPy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmed.models.layers import BatchNorm


class Model(nn.Module):
    """tanh of a linear map of an image, with or without a batch norm before it."""

    norm: bool = True
    feature_dim: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = 4 * x.reshape(len(x), -1) - 2
        x = nn.Dense(self.feature_dim, dtype=self.dtype, name="dense")(x)
        if self.norm:
            x = BatchNorm(dtype=self.dtype, name="norm")(x, train=train)
        return jnp.tanh(x), {}


class Text(nn.Module):
    """tanh of the mean of a text's rows of a table."""

    vocab_size: int
    max_length: int = 16
    feature_dim: int = 8
    train_after_layer: int = -1
    dtype: Any = jnp.float32

    def check(self) -> None:
        pass

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        shape = (self.vocab_size, self.feature_dim)
        words = self.param("words", nn.initializers.normal(1.0), shape)[tokens]
        total = jnp.sum(jnp.where(mask[..., None], words, 0.0), axis=1)
        return jnp.tanh(total / jnp.sum(mask, axis=1, keepdims=True)), {}
