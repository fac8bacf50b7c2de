"""Heads on top of an encoder's feature vector."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmed.errors import UserError
from bigmed.models.layers import BatchNorm

dense_init = nn.initializers.normal(0.01)
lecun_init = nn.initializers.lecun_normal()


class ProjectionHead(nn.Module):
    """Dense layers with ReLU between them: every projector and predictor.

    By default SimCLR's, as its released code has it (the papers do not mention the norms): no
    biases, a batch norm after every layer, the last without a shift; v1 has two layers, v2 three.

    Attributes:
      num_layers: 0 to 4; 0 is no head, 1 a linear one.
      hidden_dim: width of the hidden layers; None: that of the input.
      out_dim: of the last layer.
      norms: after which layers there is a batch norm: 'all', 'hidden' (not after the last), 'none'.
      biases: which layers have one, likewise.
      up_to: how many of the layers there are; None: all, 1 and more with a head to cut off.
      kernel_init: of the dense layers.
      dtype: of the matrix products; outputs, parameters and statistics are float32.
    """

    num_layers: int = 2
    hidden_dim: int | None = None
    out_dim: int = 128
    norms: str = "all"
    biases: str = "none"
    up_to: int | None = None
    kernel_init: Any = dense_init
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
        for k in range(1, (self.up_to or self.num_layers) + 1):
            last = k == self.num_layers
            having = ("all",) if last else ("all", "hidden")
            x = nn.Dense(
                self.out_dim if last else hidden,
                use_bias=self.biases in having,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                name=f"dense{k}",
            )(x)
            if self.norms in having:
                x = BatchNorm(use_bias=not last, name=f"norm{k}")(x, train=train)
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
