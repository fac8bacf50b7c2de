"""Heads on top of an encoder's feature vector."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmed.errors import UserError
from bigmed.models.layers import BatchNorm

dense_init = nn.initializers.normal(0.01)


class ProjectionHead(nn.Module):
    """SimCLR's projection head: dense layers without bias, each followed by batch norm.

    ReLU follows every layer but the last, whose norm has a scale and no shift; so the released code
    has it (the papers do not mention the norm). SimCLR v1 has two layers, v2 three.

    Attributes:
      num_layers: 0 to 4; 0 is no head, 1 a linear one.
      hidden_dim: width of the hidden layers; None: that of the input.
      out_dim: of the last layer.
      dtype: of the matrix products; outputs, parameters and statistics are float32.
    """

    num_layers: int = 2
    hidden_dim: int | None = None
    out_dim: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """[B, D] -> (z [B, out_dim] float32, layers).

        `layers[0]` is the input and `layers[k]` the output of the k-th layer with its norm and
        ReLU, all float32; the last of them is z. Without layers z is the input.
        """
        if not 0 <= self.num_layers <= 4:
            raise UserError(f"config.objective.head_layers={self.num_layers}: valid: 0 to 4")
        hidden = self.hidden_dim or x.shape[-1]
        layers = [x.astype(jnp.float32)]
        for k in range(1, self.num_layers + 1):
            last = k == self.num_layers
            x = nn.Dense(
                self.out_dim if last else hidden,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=dense_init,
                name=f"dense{k}",
            )(x)
            x = BatchNorm(use_bias=not last, name=f"norm{k}")(x, train=train)
            x = x if last else nn.relu(x)
            layers.append(x)
        return layers[-1], layers


class BiasedHead(nn.Module):
    """MoCo's projection: one dense layer with a bias (v1, and C2L), or two with ReLU (v2).

    Attributes:
      hidden_dim: width of the hidden layer; None: there is none.
      out_dim: of the last layer.
      dtype: of the matrix products; outputs and parameters are float32.
    """

    hidden_dim: int | None = None
    out_dim: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """[B, D] -> (z [B, out_dim] float32, layers), as `ProjectionHead`."""
        del train
        layers = [x.astype(jnp.float32)]
        if self.hidden_dim:
            x = nn.relu(nn.Dense(self.hidden_dim, dtype=self.dtype, name="dense1")(x))
            layers.append(x.astype(jnp.float32))
        x = nn.Dense(self.out_dim, dtype=self.dtype, name="dense2")(x)
        return x.astype(jnp.float32), [*layers, x.astype(jnp.float32)]


class NormedHead(nn.Module):
    """BYOL's projector and predictor: dense, batch norm, ReLU, dense (arXiv 2006.07733, 3.3).

    Attributes:
      hidden_dim, out_dim: widths of the two layers.
      dtype: of the matrix products; outputs, parameters and statistics are float32.
    """

    hidden_dim: int = 4096
    out_dim: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """[B, D] -> (z [B, out_dim] float32, layers), as `ProjectionHead`."""
        layers = [x.astype(jnp.float32)]
        x = nn.Dense(self.hidden_dim, dtype=self.dtype, name="dense1")(x)
        x = nn.relu(BatchNorm(name="norm1")(x, train=train))
        layers.append(x.astype(jnp.float32))
        x = nn.Dense(self.out_dim, use_bias=False, dtype=self.dtype, name="dense2")(x)
        return x.astype(jnp.float32), [*layers, x.astype(jnp.float32)]


class PlainHead(nn.Module):
    """A projection of dense layers with ReLU between them, without biases or norms.

    ConVIRT's g_v and g_u (arXiv 2010.00747, section 2.1) have two layers.

    Attributes:
      num_layers: 1 to 4.
      hidden_dim: width of the hidden layers; None: that of the input.
      out_dim: of the last layer.
      dtype: of the matrix products; outputs and parameters are float32.
    """

    num_layers: int = 2
    hidden_dim: int | None = None
    out_dim: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """[B, D] -> (z [B, out_dim] float32, layers), as `ProjectionHead`."""
        del train
        if not 1 <= self.num_layers <= 4:
            raise UserError(f"config.objective.head_layers={self.num_layers}: valid: 1 to 4")
        layers = [x.astype(jnp.float32)]
        for k in range(1, self.num_layers + 1):
            last = k == self.num_layers
            width = self.out_dim if last else self.hidden_dim or x.shape[-1]
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name=f"dense{k}")(x)
            x = x if last else nn.relu(x)
            layers.append(x.astype(jnp.float32))
        return layers[-1], layers


def select_layer(layers: Sequence[jax.Array], selector: int) -> jax.Array:
    """What to fine-tune from (SimCLR v2's `ft_proj_selector`).

    Args:
      layers: as `ProjectionHead` returns them.
      selector: 0 the encoder's output, k the output of the k-th layer, -1 the last layer's.

    Raises:
      UserError: the head has no such layer.
    """
    if not -1 <= selector < len(layers):
        raise UserError(
            f"head layer {selector} does not exist; valid: 0 (the encoder's output) to "
            f"{len(layers) - 1}, or -1 for the last"
        )
    return layers[selector]


class LinearHead(nn.Module):
    """A linear classifier in float32; `kernel` starts at normal(0.01), or at zero."""

    num_classes: int
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, D] -> logits [B, num_classes] float32."""
        init = nn.initializers.zeros if self.zero_init else dense_init
        kernel = self.param("kernel", init, (x.shape[-1], self.num_classes), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,), jnp.float32)
        return x.astype(jnp.float32) @ kernel + bias[None]  # BD,DL->BL
