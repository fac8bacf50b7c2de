"""Vision Transformer (arXiv 2010.11929; size g: arXiv 2106.04560)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmed.errors import UserError, did_you_mean


class Size(NamedTuple):
    """The shape of a transformer."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


VARIANTS = {
    "mu": Size(32, 1, 128, 2),  # for tests
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
}
POOLS = ("cls", "gap")
POSITIONS = ("learned", "sincos2d")

_RULES = (
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # D, 3, heads, head_dim
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # heads, head_dim, D
    (r"mlp/up/kernel", ("fsdp", "tensor")),
    (r"mlp/up/bias", ("tensor",)),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
)
# With `scan` every leaf of a block has the layers as its first dimension.
SHARDING = _RULES + tuple((pattern, (None, *axes)) for pattern, axes in _RULES)

xavier = nn.initializers.xavier_uniform()


def qkv_init(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Xavier uniform for three matrices side by side [D, 3 D], each with its own fan-out."""
    fans = shape[0] + shape[1] // 3
    limit = np.sqrt(6 / fans)
    return jax.random.uniform(key, shape, dtype, -limit, limit)


class Attention(nn.Module):
    """Multi-head self-attention; the softmax is float32."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        d = x.shape[-1]
        # B: image, N: query, M: key, H: head, K: dimension of a head
        qkv = nn.DenseGeneral(
            (3, self.heads, d // self.heads), dtype=self.dtype, kernel_init=qkv_init, name="qkv"
        )(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # BNHK
        q = q / np.sqrt(d // self.heads).astype(q.dtype)
        logits = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(logits, axis=-1).astype(self.dtype)
        x = jnp.einsum("bhnm,bmhk->bnhk", weights, v)
        out = nn.DenseGeneral(d, (-2, -1), dtype=self.dtype, kernel_init=xavier, name="out")
        return out(x)


class Mlp(nn.Module):
    """Two dense layers with an exact GELU between."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = {"kernel_init": xavier, "bias_init": nn.initializers.normal(1e-6)}
        d = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype, **init, name="up")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(d, dtype=self.dtype, **init, name="down")(x)


def layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Layer norm with float32 statistics."""
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


class Block(nn.Module):
    """A pre-norm transformer block, in the (carry, input) form of `nn.scan`."""

    size: Size
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """[B, N, D] -> [B, N, D]."""
        y = layer_norm(self.dtype, "norm1")(x)
        x = x + Attention(self.size.heads, self.dtype, name="attention")(y)
        y = layer_norm(self.dtype, "norm2")(x)
        return x + Mlp(self.size.mlp_dim, self.dtype, name="mlp")(y), None


def sincos2d(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed position codes [height * width, dim] float32 (arXiv 2205.01580).

    The four quarters of a code are the sine and cosine of x and the sine and cosine of y, at
    frequencies from 1 down to 1/10000.
    """
    y, x = np.mgrid[:height, :width]
    frequencies = 1.0 / 10000 ** np.linspace(0, 1, dim // 4)
    angles_x, angles_y = (np.outer(p.ravel(), frequencies) for p in (x, y))
    parts = [np.sin(angles_x), np.cos(angles_x), np.sin(angles_y), np.cos(angles_y)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Model(nn.Module):
    """A Vision Transformer without a classifier.

    Attributes:
      variant: size and patch, e.g. 'S/16'; sizes Ti, S, B, L, H, g (and mu, for tests), any patch.
      pool: 'cls' (a class token) or 'gap' (mean over the patches, no class token).
      position: 'learned' or 'sincos2d' (fixed, no parameters).
      scan: one `nn.scan` over the blocks, whose parameters then lie stacked under `blocks` with the
        layers as first dimension; compiles faster, for deep networks. Else `block1`, `block2`, ...
      remat: recompute each block's activations in the backward pass, to save memory.
      dtype: of the arithmetic; parameters, statistics of norms and softmax are float32.
    """

    variant: str = "S/16"
    pool: str = "cls"
    position: str = "learned"
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def _variant(self) -> tuple[Size, int]:
        name, _, patch = self.variant.partition("/")
        if name not in VARIANTS:
            raise UserError(
                f"config.model.variant='{self.variant}': {did_you_mean(name, VARIANTS)}, "
                "then '/' and the patch size, e.g. S/16"
            )
        if not patch.isdecimal() or int(patch) < 1:
            raise UserError(
                f"config.model.variant='{self.variant}' lacks a patch size; write e.g. {name}/16"
            )
        for key, value, valid in (
            ("pool", self.pool, POOLS),
            ("position", self.position, POSITIONS),
        ):
            if value not in valid:
                raise UserError(f"config.model.{key}='{value}': {did_you_mean(value, valid)}")
        return VARIANTS[name], int(patch)

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vector."""
        return self._variant()[0].width

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          x: [B, H, W, C] float in [0, 1], any C; the patch divides H and W.
          train: nothing here differs between training and evaluation.

        Returns:
          The class token or the mean over patches, after the last norm, [B, D] float32; and
          `feature_map` [B, H/patch, W/patch, D] in `dtype`, the patches after the last norm.

        Raises:
          UserError: the patch does not divide the image.
        """
        del train
        size, patch = self._variant()
        b, height, width, _ = x.shape
        if height % patch or width % patch:
            raise UserError(
                f"images of {height}x{width} do not divide into the patches of {patch} of "
                f"config.model.variant='{self.variant}'; use a size that is a multiple of {patch}"
            )
        h, w, d = height // patch, width // patch, size.width
        x = self._embed_patches(x, patch, d)  # [B, h * w, D]
        cls = self.pool == "cls"
        if cls:
            token = self.param("cls", nn.initializers.zeros, (1, 1, d), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (b, 1, d))
            x = jnp.concatenate([token, x], axis=1)
        if self.position == "learned":
            codes = self.param(
                "pos_embedding", nn.initializers.normal(0.02), (1, h * w + cls, d), jnp.float32
            )
        else:
            codes = np.pad(sincos2d(h, w, d), ((int(cls), 0), (0, 0)))[None]
        x = x + jnp.asarray(codes, self.dtype)

        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            layers = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=size.depth
            )
            x, _ = layers(size, self.dtype, name="blocks")(x, None)
        else:
            for i in range(1, size.depth + 1):
                x, _ = block(size, self.dtype, name=f"block{i}")(x, None)
        x = layer_norm(self.dtype, "norm")(x)
        patches = x[:, int(cls) :]
        features = x[:, 0] if cls else jnp.mean(patches, axis=1, dtype=jnp.float32)
        return features.astype(jnp.float32), {"feature_map": patches.reshape(b, h, w, d)}

    def _embed_patches(self, x: jax.Array, patch: int, d: int) -> jax.Array:
        """A convolution with stride = size, as one matrix product: [B, H, W, C] -> [B, N, D]."""
        b, height, width, c = x.shape
        h, w = height // patch, width // patch
        x = x.astype(self.dtype).reshape(b, h, patch, w, patch, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, patch * patch * c)
        return nn.Dense(
            d, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal(), name="patches"
        )(x)
