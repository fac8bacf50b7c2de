"""Vision Transformer (arXiv 2010.11929) in the forms that public weights come in.

AugReg and big_vision (arXiv 2106.10270, 2106.04560, 2205.01580), DeiT and DeiT III (arXiv
2012.12877, 2204.07118), DINOv2 (arXiv 2304.07193) and its registers (arXiv 2309.16588).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigmed.errors import UserError, did_you_mean
from bigmed.models.positions import sincos2d
from bigmed.models.transformer import Attention, Dense, DenseGeneral, Mlp


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
    "g": Size(1408, 40, 6144, 16),  # of arXiv 2106.04560
    "g2": Size(1536, 40, 6144, 24),  # DINOv2's
}
POOLS = ("cls", "gap")
POSITIONS = ("learned", "sincos2d")
MLPS = ("gelu", "swiglu")


def _named() -> dict[str, dict[str, Any]]:
    """Published name -> `config.model`; patch sizes follow the size's letter."""
    dinov2 = {"layer_scale": 1e-5}
    families = {
        "vit_{}": ("Ti/16 S/32 S/16 S/8 B/32 B/16 B/8 L/32 L/16 H/14 g/14", {}),
        "deit_{}": ("Ti/16 S/16 B/16", {}),
        "deit_{}_distilled": ("Ti/16 S/16 B/16", {"distillation": True}),
        "deit3_{}": ("S/16 B/16 L/16 H/14", {"layer_scale": 1e-6, "cls_position": False}),
        "dinov2_vit{}": ("S/14 B/14 L/14 g2/14", dinov2),
        "dinov2_vit{}_reg": ("S/14 B/14 L/14 g2/14", {**dinov2, "registers": 4}),
    }
    named = {}
    for name, (variants, settings) in families.items():
        for variant in variants.split(" "):
            model = {"name": "vit", "variant": variant, **settings}
            if variant.startswith("g2"):
                model["mlp"] = "swiglu"
            # DINOv2 calls its own size g
            short = variant.replace("g2", "g").replace("/", "").lower()
            named[name.format(short)] = model
    return named


NAMED = _named()

SHARDING = (
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # D, 3, heads, head_dim
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # heads, head_dim, D
    (r"mlp/up/kernel", ("fsdp", "tensor")),
    (r"mlp/up/bias", ("tensor",)),
    (r"mlp/up/kernel", ("fsdp", None, "tensor")),  # of SwiGLU: D, 2, hidden
    (r"mlp/up/bias", (None, "tensor")),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
)

xavier = nn.initializers.xavier_uniform()
mlp_bias = nn.initializers.normal(1e-6)


def side_by_side(count: int) -> Any:
    """Xavier uniform for `count` matrices [I, count * O], each with its own fan-out."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        limit = np.sqrt(6 / (shape[0] + shape[1] // count))
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class SwiGlu(nn.Module):
    """An MLP of a dense layer, silu of its one half times the other, and another dense layer.

    arXiv 2002.05202.
    """

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        d = x.shape[-1]
        settings = {"dtype": self.dtype, "bias_init": mlp_bias}
        # the gate beside the values, not before them, so that a split of `hidden` over devices
        # gives each its share of both
        up = DenseGeneral((2, self.hidden), kernel_init=side_by_side(2), **settings, name="up")
        x = up(x)
        x = nn.silu(x[:, :, 0]) * x[:, :, 1]
        return Dense(d, kernel_init=xavier, **settings, name="down")(x)


def swiglu_hidden(mlp_dim: int) -> int:
    """DINOv2's width within SwiGLU: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (mlp_dim * 2 // 3 + 7) // 8 * 8


class LayerScale(nn.Module):
    """A learned factor `gamma` for each channel of a residual branch (arXiv 2103.17239)."""

    initial: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        init = nn.initializers.constant(self.initial)
        gamma = self.param("gamma", init, (x.shape[-1],), jnp.float32)
        return x * gamma.astype(self.dtype)[None, None]


class Block(nn.Module):
    """A pre-norm transformer block; `ends`: where its tokens are split, as in `Attention`."""

    size: Size
    mlp: str
    layer_scale: float
    norm_eps: float
    dtype: Any
    ends: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[B, N, D] -> a [B, N_i, D] of each group of tokens."""
        # statistics are float32
        norms = [
            nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=f"norm{i}") for i in (1, 2)
        ]
        scales = [lambda y: y] * 2
        if self.layer_scale:
            scales = [
                LayerScale(self.layer_scale, self.dtype, name=f"layer_scale{i}") for i in (1, 2)
            ]
        attention = Attention(
            self.size.heads, side_by_side(3), xavier, 0.0, self.ends, self.dtype, name="attention"
        )
        if self.mlp == "swiglu":
            mlp = SwiGlu(swiglu_hidden(self.size.mlp_dim), self.dtype, name="mlp")
        else:
            mlp = Mlp(self.size.mlp_dim, xavier, mlp_bias, self.dtype, name="mlp")
        groups = []
        attended = attention(norms[0](x))
        for group, y in zip(jnp.split(x, self.ends, axis=1), attended, strict=True):
            y = group + scales[0](y)
            groups.append(y + scales[1](mlp(norms[1](y))))
        return groups


class Model(nn.Module):
    """A Vision Transformer without a classifier.

    The tokens are the class token, the distillation token, the registers, then the patches.

    Attributes:
      variant: size and patch, e.g. 'S/16'; sizes Ti, S, B, L, H, g, g2 (DINOv2's) and mu (for
        tests), any patch.
      pool: 'cls' (a class token) or 'gap' (mean over the patches, no class token).
      position: 'learned' or 'sincos2d' (fixed, no parameters).
      cls_position: learned positions have a code for the class and distillation tokens too.
      distillation: DeiT's second token; the features are still those of the class token.
      registers: number of register tokens, which have no position.
      mlp: 'gelu' or 'swiglu'.
      layer_scale: first value of LayerScale; 0: there is none.
      norm_eps: of all norms; 1e-12 in transformers' ViT and DeiT.
      scan: one `lax.scan` over all blocks but the last, which compiles faster, for deep networks;
        costs a copy of the weights a step.
      remat: recompute each block's activations in the backward pass, to save memory.
      dtype: of the arithmetic; parameters, statistics of norms and softmax are float32.

    The parameters are `cls`, `distillation`, `registers`, `pos_embedding`, `patches`, `block1` to
    `block<depth>` and `norm`, with `scan` and `remat` or without: a checkpoint fits all four, and
    each block has its own trust ratio and can be frozen by its name.
    """

    variant: str = "S/16"
    pool: str = "cls"
    position: str = "learned"
    cls_position: bool = True
    distillation: bool = False
    registers: int = 0
    mlp: str = "gelu"
    layer_scale: float = 0.0
    norm_eps: float = 1e-6
    scan: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def shape(self) -> tuple[Size, int]:
        """The size and the patch.

        Raises:
          UserError: an attribute has a value that it cannot have.
        """
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
        for key, valid in (("pool", POOLS), ("position", POSITIONS), ("mlp", MLPS)):
            value = getattr(self, key)
            if value not in valid:
                raise UserError(f"config.model.{key}='{value}': {did_you_mean(value, valid)}")
        if self.distillation and self.pool != "cls":
            raise UserError(
                f"config.model.distillation=True needs a class token, but config.model.pool is "
                f"'{self.pool}'; use 'cls'"
            )
        if self.registers < 0:
            raise UserError(f"config.model.registers={self.registers}: use 0 or more")
        return VARIANTS[name], int(patch)

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vector."""
        return self.shape()[0].width

    @property
    def coded_tokens(self) -> int:
        """How many tokens before the patches have a learned position code."""
        coded = self.position == "learned" and self.cls_position and self.pool == "cls"
        return (1 + self.distillation) * coded

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
        size, patch = self.shape()
        b, height, width, _ = x.shape
        if height % patch or width % patch:
            raise UserError(
                f"images of {height}x{width} do not divide into the patches of {patch} of "
                f"config.model.variant='{self.variant}'; use a size that is a multiple of {patch}"
            )
        h, w, d = height // patch, width // patch, size.width
        x = self._embed_patches(x, patch, d)  # [B, h * w, D]
        coded = self.coded_tokens
        if self.position == "learned":
            shape = (1, coded + h * w, d)
            codes = self.param("pos_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        else:
            codes = jnp.asarray(sincos2d(h, w, d))[None]
        codes = codes.astype(self.dtype)
        tokens = self._tokens(d)  # [1, T, D]
        t = tokens.shape[1]
        if t:
            tokens = tokens.at[:, :coded].add(codes[:, :coded])
            x = jnp.concatenate([jnp.broadcast_to(tokens, (b, t, d)), x + codes[:, coded:]], axis=1)
        else:
            x = x + codes
        norm = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        *first, last = [norm(group) for group in self._encode(x, size)]
        patches = last[:, t - len(first) :]
        features = first[0][:, 0] if first else jnp.mean(patches, axis=1, dtype=jnp.float32)
        return features.astype(jnp.float32), {"feature_map": patches.reshape(b, h, w, d)}

    def _tokens(self, d: int) -> jax.Array:
        """Class token, distillation token and registers, as far as there are any: [1, T, D]."""
        parts = [jnp.zeros((1, 0, d), self.dtype)]
        for name, count, init in (
            ("cls", int(self.pool == "cls"), nn.initializers.zeros),
            ("distillation", int(self.distillation), nn.initializers.normal(0.02)),
            ("registers", self.registers, nn.initializers.normal(1e-6)),
        ):
            if count:
                token = self.param(name, init, (1, count, d), jnp.float32)
                parts.append(token.astype(self.dtype))
        return jnp.concatenate(parts, axis=1)

    def _encode(self, x: jax.Array, size: Size) -> list[jax.Array]:
        """All blocks: [B, N, D] -> [[B, N, D]], or the class token and the others apart.

        In a jitted program that uses the class token alone, the last block of the others ends with
        their queries, keys and values: they are there to be attended to.
        """
        *names, last = (f"block{i}" for i in range(1, size.depth + 1))
        settings = (size, self.mlp, self.layer_scale, self.norm_eps, self.dtype)
        block = nn.remat(Block) if self.remat else Block
        if self.scan and names and not self.is_initializing():
            x = self._scan(x, names, Block(*settings, parent=None))
        else:
            for name in names:
                (x,) = block(*settings, name=name)(x)
        ends = (1,) if self.pool == "cls" else ()
        return block(*settings, ends, name=last)(x)

    def _scan(self, x: jax.Array, names: list[str], block: Block) -> jax.Array:
        """The blocks of these names, one by one in a loop: [B, N, D] -> [B, N, D]."""
        # The parameters are stacked here, not in the checkpoint.
        params = self.variables["params"]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[n] for n in names))

        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return block.apply({"params": params}, x)[0], None

        if self.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(layer, x, stacked)[0]

    def _embed_patches(self, x: jax.Array, patch: int, d: int) -> jax.Array:
        """A convolution with stride = size, as one matrix product: [B, H, W, C] -> [B, N, D]."""
        b, height, width, c = x.shape
        h, w = height // patch, width // patch
        x = x.astype(self.dtype).reshape(b, h, patch, w, patch, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, patch * patch * c)
        return Dense(
            d, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal(), name="patches"
        )(x)
