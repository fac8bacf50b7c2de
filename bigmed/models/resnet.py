"""ResNet v1.5 (arXiv 1512.03385) as SimCLR has it, with SimCLR v2's selective kernels.

"v1.5": the stride of a bottleneck sits on its 3x3 convolution. Details follow the released SimCLR
code: explicit padding, batch normalisation over the global batch, the last `scale` of each residual
branch starting at zero.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bigmed.errors import UserError
from bigmed.models.layers import BatchNorm, Conv, avg_pool, max_pool, max_pool_symmetric

# depth -> (blocks in each stage, whether they are bottlenecks)
VARIANTS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
STEMS = ("imagenet", "torchvision", "small")
# Published name -> `config.model`. The torchvision stem, so that PyTorch's weights fit exactly.
TORCHVISION = {
    f"resnet{depth}": {"name": "resnet", "depth": depth, "stem": "torchvision"}
    for depth in (18, 34, 50, 101, 152)
}
# Released by SimCLR: (depth, width, selective kernels); 50 layers 1x, 2x and 4x by v1, all by v2
# but 4x.
_SIMCLR = [(d, w, sk) for d in (50, 101, 152) for w in (1, 2) for sk in (0, 1)]
_SIMCLR += [(50, 4, 0), (152, 3, 1)]
NAMED = TORCHVISION | {
    f"simclr_r{depth}_{width}x_sk{sk}": {
        "name": "resnet",
        "depth": depth,
        "width": width,
        "stem": "imagenet",
        **({"sk_ratio": 0.0625, "resnet_d": True} if sk else {}),
    }
    for depth, width, sk in _SIMCLR
}
EXPANSION = 4  # of a bottleneck's output over its inner width
MIN_SK_DIM = 32

# Every convolution is split over 'fsdp' along its largest dimension, the default of
# `sharding.leaf_spec`; nothing is split over 'tensor'.
SHARDING = ()


class ConvNorm(nn.Module):
    """Convolution, batch norm and, by default, ReLU."""

    features: int
    size: int
    strides: int = 1
    relu: bool = True
    zero_scale: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.features, self.size, self.strides, self.dtype, name="conv")(x)
        x = BatchNorm(zero_scale=self.zero_scale, dtype=self.dtype, name="norm")(x, train=train)
        return nn.relu(x) if self.relu else x


class SelectiveKernel(nn.Module):
    """Two 3x3 streams mixed by channel attention (arXiv 1903.06586, as in SimCLR v2's code)."""

    features: int
    strides: int
    ratio: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = self.features
        x = ConvNorm(2 * c, 3, self.strides, dtype=self.dtype, name="streams")(x, train)
        streams = x.reshape(*x.shape[:3], 2, c)  # [B, H, W, 2, C]
        pooled = jnp.mean(jnp.sum(streams, axis=3), axis=(1, 2), keepdims=True)  # [B, 1, 1, C]
        squeezed = max(int(c * self.ratio), MIN_SK_DIM)
        pooled = ConvNorm(squeezed, 1, dtype=self.dtype, name="squeeze")(pooled, train)
        mixing = Conv(2 * c, 1, dtype=self.dtype, name="mixing")(pooled)
        mixing = nn.softmax(mixing.reshape(-1, 1, 1, 2, c).astype(jnp.float32), axis=3)
        return jnp.sum(streams * mixing.astype(self.dtype), axis=3)


class Block(nn.Module):
    """A residual block, basic or bottleneck; its input is projected where the shape changes."""

    features: int
    strides: int
    bottleneck: bool
    sk_ratio: float
    resnet_d: bool
    dtype: Any
    project: bool = False  # the input even where its shape stays

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, I] -> [B, H/strides, W/strides, O], O = 4 x features for a bottleneck."""
        c, strides, dtype = self.features, self.strides, self.dtype

        def conv_norm(x: jax.Array, k: int, size: int, strides: int = 1) -> jax.Array:
            x = Conv(c, size, strides, dtype, name=f"conv{k}")(x)
            return nn.relu(BatchNorm(dtype=dtype, name=f"norm{k}")(x, train=train))

        out = c * EXPANSION if self.bottleneck else c
        residual = x
        if self.project or strides > 1 or x.shape[-1] != out:
            if self.resnet_d:
                residual, strides_left = avg_pool(x, strides), 1
            else:
                strides_left = strides
            shortcut = ConvNorm(out, 1, strides_left, relu=False, dtype=dtype, name="shortcut")
            residual = shortcut(residual, train)
        if self.bottleneck:
            x = conv_norm(x, 1, 1)
            if self.sk_ratio:
                x = SelectiveKernel(c, strides, self.sk_ratio, dtype, name="sk")(x, train)
            else:
                x = conv_norm(x, 2, 3, strides)
        else:
            x = conv_norm(x, 1, 3, strides)
        last, size = (3, 1) if self.bottleneck else (2, 3)
        x = Conv(out, size, 1, dtype, name=f"conv{last}")(x)
        norm = BatchNorm(zero_scale=True, dtype=dtype, name=f"norm{last}")
        return norm(x, train=train, residual=residual)


class Stage(nn.Module):
    """Blocks of one width; the first of them may halve the resolution."""

    features: int
    blocks: int
    strides: int
    remat: bool
    block: dict[str, Any]  # what every block of the network shares
    project: bool = False  # the input of the first block even where its shape stays

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        block_class = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for j in range(1, self.blocks + 1):
            strides, project = (self.strides, self.project) if j == 1 else (1, False)
            block = {**self.block, "project": project, "name": f"block{j}"}
            x = block_class(self.features, strides, **block)(x, train)
        return x


class Model(nn.Module):
    """A ResNet without a classifier.

    Attributes:
      depth: 18, 34, 50, 101, 152 or 200.
      width: multiplies every width; 1 to 4 in the papers.
      stem: 'imagenet' (7x7 convolution with stride 2, then max-pooling padded at its end, as in
        SimCLR's code), 'torchvision' (the same, padded on every side) or 'small' (3x3 with stride
        1, no pooling; for images of about 32 px).
      sk_ratio: of selective kernels, 0.0625 in SimCLR v2; 0 turns them off.
      resnet_d: three 3x3 convolutions as imagenet stem and average-pooled shortcuts
        (arXiv 1812.01187); SimCLR v2's selective-kernel networks have both.
      project_first: project the input of the first stage even where its shape stays, as SimCLR's
        code does: for its networks of 18 and 34 layers (deeper ones change the shape there).
      train_after_stage: fine-tune only what comes after this stage; -1: everything, 0: the stem is
        frozen, 4: the whole network. The frozen part uses its running statistics and gets no
        gradient (freeze it in `config.optim` too, against weight decay).
      remat: recompute each block's activations in the backward pass, to save memory.
      dtype: of the arithmetic; parameters and batch statistics are float32.
    """

    depth: int = 50
    width: int = 1
    stem: str = "imagenet"
    sk_ratio: float = 0.0
    resnet_d: bool = False
    project_first: bool = False
    train_after_stage: int = -1
    remat: bool = False
    dtype: Any = jnp.float32

    def _variant(self) -> tuple[tuple[int, ...], bool]:
        if self.depth not in VARIANTS:
            raise UserError(
                f"config.model.depth={self.depth}: valid: {', '.join(map(str, VARIANTS))}"
            )
        if self.stem not in STEMS:
            raise UserError(f"config.model.stem='{self.stem}': valid: {', '.join(STEMS)}")
        if self.width < 1 or self.width != int(self.width):
            raise UserError(f"config.model.width={self.width}: must be a whole number from 1 up")
        blocks, bottleneck = VARIANTS[self.depth]
        if self.sk_ratio and not bottleneck:
            raise UserError(
                f"config.model.sk_ratio={self.sk_ratio} needs a bottleneck network; "
                f"depth={self.depth} has none (valid: 50, 101, 152, 200, or sk_ratio=0)"
            )
        if not -1 <= self.train_after_stage <= len(blocks):
            raise UserError(
                f"config.model.train_after_stage={self.train_after_stage}: "
                f"valid: -1 (train everything) to {len(blocks)} (train nothing)"
            )
        return blocks, bottleneck

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vector."""
        _, bottleneck = self._variant()
        return 512 * self.width * (EXPANSION if bottleneck else 1)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          x: [B, H, W, C] float in [0, 1], any C; no mean or deviation is subtracted.
          train: use and update the statistics of the batch.

        Returns:
          The mean over positions [B, D] float32, and `feature_map` [B, H/32, W/32, D] in `dtype`
          (H/8, W/8 with the small stem).
        """
        blocks, bottleneck = self._variant()
        block = {
            "bottleneck": bottleneck,
            "sk_ratio": self.sk_ratio,
            "resnet_d": self.resnet_d,
            "dtype": self.dtype,
        }
        frozen_to = self.train_after_stage
        x = self._stem(x, train and frozen_to < 0)
        if frozen_to == 0:
            x = jax.lax.stop_gradient(x)
        for i, n in enumerate(blocks, start=1):
            features, strides = 64 * self.width * 2 ** (i - 1), 1 if i == 1 else 2
            project = self.project_first and i == 1
            stage = Stage(features, n, strides, self.remat, block, project, name=f"stage{i}")
            x = stage(x, train and frozen_to < i)
            if frozen_to == i:
                x = jax.lax.stop_gradient(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32), {"feature_map": x}

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        c, dtype = 64 * self.width, self.dtype
        if self.stem == "small":
            return ConvNorm(c, 3, dtype=dtype, name="stem")(x, train)
        if self.resnet_d:
            x = ConvNorm(c // 2, 3, 2, dtype=dtype, name="stem1")(x, train)
            x = ConvNorm(c // 2, 3, dtype=dtype, name="stem2")(x, train)
            x = ConvNorm(c, 3, dtype=dtype, name="stem3")(x, train)
        else:
            x = ConvNorm(c, 7, 2, dtype=dtype, name="stem")(x, train)
        return max_pool_symmetric(x) if self.stem == "torchvision" else max_pool(x)
