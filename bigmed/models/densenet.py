"""DenseNet (arXiv 1608.06993) as torchvision has it: bottlenecks, half compression, no dropout."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmed.errors import UserError, did_you_mean
from bigmed.models.layers import BatchNorm, Conv, join, max_pool_symmetric, moments_of
from bigmed.models.resnet import ConvNorm

# depth -> (growth rate, layers in each block)
VARIANTS = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}
STEMS = ("imagenet", "small")
BOTTLENECK = 4  # width of a layer's 1x1 convolution over the growth rate

# As in a ResNet: 'fsdp' along the largest dimension, nothing over 'tensor'.
SHARDING = ()

NAMED = {f"densenet{depth}": {"name": "densenet", "depth": depth} for depth in VARIANTS}


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution over all features so far."""

    growth: int
    dtype: Any

    @nn.compact
    def __call__(
        self, parts: tuple[jax.Array, ...], moments: tuple[jax.Array, ...], train: bool
    ) -> jax.Array:
        """Maps [B, H, W, C_i] of every layer before, and their moments, -> [B, H, W, growth]."""
        # Joined here, inside, so that with remat what is kept for the backward pass grows with the
        # number of layers and not with its square (arXiv 1707.06990).
        x, known = join(*parts), join(*moments)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm1")(x, train=train, moments=known))
        x = Conv(BOTTLENECK * self.growth, 1, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm2")(x, train=train))
        return Conv(self.growth, 3, dtype=self.dtype, name="conv2")(x)


class DenseBlock(nn.Module):
    """Layers of which each reads the outputs of all before it."""

    layers: int
    growth: int
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C + layers * growth]."""
        layer_class = nn.remat(DenseLayer, static_argnums=(3,)) if self.remat else DenseLayer
        # Every layer normalises the same features anew, but their moments stay what they are.
        parts, moments = (x,), (moments_of(x),)
        for i in range(1, self.layers + 1):
            layer = layer_class(self.growth, self.dtype, name=f"layer{i}")
            new = layer(parts, moments, train)
            parts, moments = (*parts, new), (*moments, moments_of(new))
            # With remat every layer joins them anew, to keep no more than its own output; without,
            # each adds its own to what is joined, as sums of many gradients are slow on a CPU.
            parts = parts if self.remat else (join(*parts),)
        return join(*parts)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to half the channels, 2x2 mean with stride 2."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H // 2, W // 2, C // 2]."""
        half = x.shape[-1] // 2
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train=train))
        # The mean before the convolution: a 1x1 convolution commutes with it, on a quarter of the
        # positions.
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return Conv(half, 1, dtype=self.dtype, name="conv")(x)


class Model(nn.Module):
    """A DenseNet without a classifier.

    Attributes:
      depth: 121, 161, 169 or 201.
      stem: 'imagenet' (7x7 convolution with stride 2, then max-pooling) or 'small' (3x3 with stride
        1, no pooling; for images of about 32 px).
      remat: recompute each layer's activations in the backward pass, to save memory.
      dtype: of the arithmetic; parameters and batch statistics are float32.
    """

    depth: int = 121
    stem: str = "imagenet"
    remat: bool = False
    dtype: Any = jnp.float32

    def _variant(self) -> tuple[int, tuple[int, ...]]:
        if self.depth not in VARIANTS:
            raise UserError(
                f"config.model.depth={self.depth}: valid: {', '.join(map(str, VARIANTS))}"
            )
        if self.stem not in STEMS:
            raise UserError(f"config.model.stem='{self.stem}': {did_you_mean(self.stem, STEMS)}")
        return VARIANTS[self.depth]

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vector."""
        growth, blocks = self._variant()
        channels = 2 * growth
        for i, layers in enumerate(blocks):
            channels = channels // (2 if i else 1) + layers * growth
        return channels

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          x: [B, H, W, C] float in [0, 1], any C; no mean or deviation is subtracted. At least
            29 px, or 8 px with the small stem.
          train: use and update the statistics of the batch.

        Returns:
          The mean over positions [B, D] float32, and `feature_map` [B, h, w, D] in `dtype`, after
          the last norm and ReLU; h and w are H/4 and W/4 (H and W with the small stem), rounded up,
          divided by 8, rounded down.

        Raises:
          UserError: the images are too small.
        """
        growth, blocks = self._variant()
        height, width = x.shape[1:3]
        small = self.stem == "small"
        smallest = 8 if small else 29
        if min(height, width) < smallest:
            raise UserError(
                f"images of {height}x{width} are too small for config.model.stem='{self.stem}' of "
                f"a DenseNet; use at least {smallest}x{smallest}"
                + ("" if small else ", or stem='small' from 8x8")
            )
        size, strides = (3, 1) if small else (7, 2)
        x = ConvNorm(2 * growth, size, strides, dtype=self.dtype, name="stem")(x, train)
        x = x if small else max_pool_symmetric(x)
        for i, layers in enumerate(blocks, start=1):
            if i > 1:
                x = Transition(self.dtype, name=f"transition{i - 1}")(x, train)
            x = DenseBlock(layers, growth, self.remat, self.dtype, name=f"block{i}")(x, train)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train=train))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), {"feature_map": x}
