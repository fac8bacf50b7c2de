"""A backbone from outside bigmed, named by its module: small enough to compile in a second."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmed.models.resnet import Block, ConvNorm


class Model(nn.Module):
    """A stem and one residual block, with global batch norm and every kind of convolution."""

    variant: str = "mu/8"  # as the smoke forms have it; the number is the block's width
    remat: bool = False
    scan: bool = False  # taken, as of the smoke forms' encoder; there is one block
    dtype: Any = jnp.float32

    @property
    def _width(self) -> int:
        return int(self.variant.partition("/")[2])

    @property
    def feature_dim(self) -> int:
        return 4 * self._width

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = ConvNorm(self._width, 7, 4, dtype=self.dtype, name="stem")(x, train)
        block = Block(
            features=self._width, strides=2, bottleneck=True,
            sk_ratio=0.0, resnet_d=False, dtype=self.dtype, name="block",
        )  # fmt: skip
        x = block(x, train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), {"feature_map": x}
