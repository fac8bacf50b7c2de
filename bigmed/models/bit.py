"""BiT's ResNet-v2 (arXiv 1912.11370): pre-activation, group norm, weight standardisation.

No batch statistics: nothing passes between the images of a batch. The stride of a block sits on its
3x3 convolution; details follow the released code.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bigmed.errors import UserError
from bigmed.models.layers import conv2d, conv_init, max_pool_zeros

# depth -> blocks in each stage
VARIANTS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4  # of a block's output over its inner width
GROUPS = 32
NORM_EPSILON = 1e-5
WEIGHT_EPSILON = 1e-10  # as the weights were trained; timm and transformers have 1e-8

# As in a ResNet: 'fsdp' along the largest dimension, nothing over 'tensor'.
SHARDING = ()

NAMED = {
    f"bit_r{depth}x{width}": {"name": "bit", "depth": depth, "width": width}
    for depth, width in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4))
}


@jax.custom_vjp
def standardise(kernel: jax.Array) -> jax.Array:
    """Each filter of [k, k, I, O] with mean 0 and variance 1 over its fan-in (arXiv 1903.10520)."""
    return _standardise_forward(kernel)[0]


def _standardise_forward(kernel: jax.Array) -> tuple[jax.Array, tuple]:
    centred = kernel - _over_fan_in(kernel)
    inverse = lax.rsqrt(_over_fan_in(jnp.square(centred)) + WEIGHT_EPSILON)
    y = centred * inverse
    return y, (y, inverse)


def _standardise_backward(saved: tuple, g: jax.Array) -> tuple[jax.Array]:
    y, inverse = saved
    # Without the barrier XLA's CPU backend folds the product that g comes from into all three of
    # its users and computes it three times.
    g = lax.optimization_barrier(g)
    return (inverse * (g - _over_fan_in(g) - y * _over_fan_in(y * g)),)


def _over_fan_in(x: jax.Array) -> jax.Array:
    return jnp.mean(x, (0, 1, 2), keepdims=True)


standardise.defvjp(_standardise_forward, _standardise_backward)


class StandardisedConv(nn.Module):
    """A square convolution with standardised weights; parameter `kernel` [k, k, I, O] float32."""

    features: int
    size: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, I] -> [B, H/strides, W/strides, O] in `dtype`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = standardise(self.param("kernel", conv_init, shape, jnp.float32))
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.strides)


class GroupNormRelu(nn.Module):
    """Group normalisation over positions and the channels of a group, then ReLU."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C] in `dtype`; 32 divides C."""
        b, _, _, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)

        def over_groups(moment: jax.Array) -> jax.Array:
            """[B, C] -> [B, C], the mean over each channel's group."""
            grouped = jnp.mean(moment.reshape(b, GROUPS, c // GROUPS), -1)
            return jnp.repeat(grouped, c // GROUPS, axis=-1)

        x32 = x.astype(jnp.float32)
        mean = over_groups(jnp.mean(x32, (1, 2)))
        var = jnp.maximum(over_groups(jnp.mean(jnp.square(x32), (1, 2))) - jnp.square(mean), 0.0)
        gain = scale[None] * lax.rsqrt(var + NORM_EPSILON)
        shift = bias[None] - mean * gain
        y = x32 * gain[:, None, None] + shift[:, None, None]
        return nn.relu(y).astype(self.dtype)


class Block(nn.Module):
    """A pre-activation bottleneck; the first of a stage projects its normed input."""

    features: int
    strides: int
    project: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, I] -> [B, H/strides, W/strides, 4 * features]."""
        c, dtype = self.features, self.dtype
        y = GroupNormRelu(dtype, name="norm1")(x)
        residual = x
        if self.project:
            shortcut = StandardisedConv(EXPANSION * c, 1, self.strides, dtype, name="shortcut")
            residual = shortcut(y)
        y = StandardisedConv(c, 1, 1, dtype, name="conv1")(y)
        y = GroupNormRelu(dtype, name="norm2")(y)
        y = StandardisedConv(c, 3, self.strides, dtype, name="conv2")(y)
        y = GroupNormRelu(dtype, name="norm3")(y)
        return residual + StandardisedConv(EXPANSION * c, 1, 1, dtype, name="conv3")(y)


class Stage(nn.Module):
    """Blocks of one width; the first of them may halve the resolution."""

    features: int
    blocks: int
    strides: int
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block_class = nn.remat(Block) if self.remat else Block
        for j in range(1, self.blocks + 1):
            strides = self.strides if j == 1 else 1
            x = block_class(self.features, strides, j == 1, self.dtype, name=f"block{j}")(x)
        return x


class Model(nn.Module):
    """A BiT ResNet without a classifier.

    The stem of a grey image is that of a colour image: standardisation over one channel's weights
    would not be the one over three, so a stem could not be folded. A grey image is taken as three
    equal channels.

    Attributes:
      depth: 50, 101 or 152.
      width: multiplies every width; 1 to 4 in the paper.
      remat: recompute each block's activations in the backward pass, to save memory.
      dtype: of the arithmetic; parameters, statistics of norms and of kernels are float32.
    """

    depth: int = 50
    width: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def _variant(self) -> tuple[int, ...]:
        if self.depth not in VARIANTS:
            raise UserError(
                f"config.model.depth={self.depth}: valid: {', '.join(map(str, VARIANTS))}"
            )
        if self.width < 1 or self.width != int(self.width):
            raise UserError(f"config.model.width={self.width}: must be a whole number from 1 up")
        return VARIANTS[self.depth]

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vector."""
        self._variant()
        return 2048 * self.width

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          x: [B, H, W, C] float in [0, 1], any C; mapped here to BiT's [-1, 1].
          train: nothing here differs between training and evaluation.

        Returns:
          The mean over positions [B, D] float32, and `feature_map` [B, H/32, W/32, D] in `dtype`,
          both after the last norm and ReLU.
        """
        del train
        blocks = self._variant()
        if x.shape[-1] == 1:
            x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        x = StandardisedConv(64 * self.width, 7, 2, self.dtype, name="stem")(2 * x - 1)
        x = max_pool_zeros(x)
        for i, n in enumerate(blocks, start=1):
            features, strides = 64 * self.width * 2 ** (i - 1), 1 if i == 1 else 2
            x = Stage(features, n, strides, self.remat, self.dtype, name=f"stage{i}")(x)
        x = GroupNormRelu(self.dtype, name="norm")(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), {"feature_map": x}
