"""BERT's encoder (arXiv 1810.04805), without its pooler, as a text tower."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bigmed.errors import UserError, did_you_mean
from bigmed.models.transformer import Attention, Mlp

POOLS = ("max", "mean", "cls", "last4")
TOKEN_TYPES = 2  # the first and the second text of a pair

NAMED = {
    "bert_base": {"name": "bert"},
    "bert_large": {"name": "bert", "width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
    "clinicalbert": {"name": "bert", "vocab_size": 28996},  # arXiv 1904.03323, of a cased BERT
    "minilm_l6": {"name": "bert", "width": 384, "depth": 6, "mlp_dim": 1536},
}

SHARDING = (
    (r"attention/qkv/kernel", ("fsdp", None, "tensor", None)),  # D, 3, heads, head_dim
    (r"attention/qkv/bias", (None, "tensor", None)),
    (r"attention/out/kernel", ("tensor", None, "fsdp")),  # heads, head_dim, D
    (r"mlp/up/kernel", ("fsdp", "tensor")),
    (r"mlp/up/bias", ("tensor",)),
    (r"mlp/down/kernel", ("tensor", "fsdp")),
    # by columns, so that a token's row is found without asking the other devices for it
    (r"embeddings/(words|positions)/kernel", (None, "fsdp")),
)

init = nn.initializers.truncated_normal(0.02)


def frozen_patterns(prefix: str, layers: int) -> tuple[str, ...]:
    """`config.optim.freeze` of the embeddings and the first layers.

    Args:
      prefix: path of the tower in the objective's parameters, e.g. 'text'.
      layers: how many; 0: the embeddings alone, -1: nothing. ConVIRT freezes 6 of 12.
    """
    if layers < 0:
        return ()
    parts = ("embeddings", *(f"layer{i}" for i in range(1, layers + 1)))
    return tuple(f"{prefix}/{part}/.*" for part in parts)


class Table(nn.Module):
    """The rows of an embedding, `kernel` [rows, D]; named so as BERT's weight decay reaches it."""

    rows: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        """[rows, D] float32."""
        return self.param("kernel", init, (self.rows, self.width), jnp.float32)


class Embeddings(nn.Module):
    """Sum of the rows of word, position and token type, normalised."""

    vocab_size: int
    max_length: int
    width: int
    norm_eps: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        """[B, T] int32 twice -> [B, T, D] in `dtype`."""
        words = Table(self.vocab_size, self.width, name="words")()
        positions = Table(self.max_length, self.width, name="positions")()
        kinds = Table(TOKEN_TYPES, self.width, name="types")()
        # a token outside the vocabulary becomes NaN, not another word
        x = jnp.take(words, tokens, axis=0) + jnp.take(kinds, types, axis=0)
        x = x + positions[None, : tokens.shape[1]]
        x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
        return nn.Dropout(self.dropout, deterministic=False)(x)


class Layer(nn.Module):
    """A post-norm transformer layer."""

    heads: int
    mlp_dim: int
    norm_eps: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] bool -> [B, T, D]."""

        def add_and_norm(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            y = nn.Dropout(self.dropout, deterministic=False)(y)
            # statistics are float32
            return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=name)(x + y)

        settings = {"dropout": self.dropout, "dtype": self.dtype}
        (y,) = Attention(self.heads, init, init, **settings, name="attention")(x, mask)
        x = add_and_norm(x, y, "norm1")
        mlp = Mlp(self.mlp_dim, init, nn.initializers.zeros, self.dtype, name="mlp")
        return add_and_norm(x, mlp(x), "norm2")


class Model(nn.Module):
    """BERT's encoder and a pooling of its tokens.

    Attributes:
      vocab_size, max_length: rows of the embeddings of words and of positions.
      width, depth, heads, mlp_dim: of the transformer.
      norm_eps: of all norms.
      pool: 'max' over the tokens (ConVIRT, section 2.2 of arXiv 2010.00747), 'mean' over the
        tokens, 'cls', or 'last4': the sum of the last four layers' outputs, then the mean over the
        tokens (GLoRIA, of word pieces here, not of words). Padding takes part in none of them.
      pool_special: 'max', 'mean' and 'last4' also run over [CLS] and [SEP], the first and the last
        token of a text, as ConVIRT's "all output token vectors" has it.
      train_after_layer: train only what comes after this layer; -1: everything, 0: the embeddings
        are frozen, 6 in ConVIRT. The frozen part has no dropout and gets no gradient, which saves
        its backward pass (freeze it in `config.optim` too, see `frozen_patterns`, against weight
        decay).
      dropout: after the embeddings, on the attention and after each branch, in training, outside
        the frozen part. 0.1 in BERT; 0 here, because ConVIRT does not mention it and a pass without
        it can be repeated exactly.
      remat: recompute each layer's activations in the backward pass, to save memory.
      dtype: of the arithmetic; parameters, statistics of norms and softmax are float32.

    The parameters are `embeddings` and `layer1` to `layer<depth>`, whatever the options.
    """

    vocab_size: int = 30522
    max_length: int = 512
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    norm_eps: float = 1e-12
    pool: str = "max"
    pool_special: bool = True
    train_after_layer: int = -1
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    def check(self) -> None:
        """Raises `UserError` if an attribute has a value that it cannot have."""
        if self.pool not in POOLS:
            raise UserError(
                f"config.text_model.pool='{self.pool}': {did_you_mean(self.pool, POOLS)}"
            )
        if self.width % self.heads:
            raise UserError(
                f"config.text_model.heads={self.heads} does not divide its width={self.width}"
            )
        if self.pool == "last4" and self.depth < 4:
            raise UserError(
                f"config.text_model.pool='last4' needs a depth of 4 or more, not {self.depth}"
            )
        if not -1 <= self.train_after_layer <= self.depth:
            raise UserError(
                f"config.text_model.train_after_layer={self.train_after_layer}: "
                f"valid: -1 (train everything) to {self.depth} (train nothing)"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.text_model.dropout={self.dropout}: valid: 0 to below 1")

    @property
    def feature_dim(self) -> int:
        """D, the length of the feature vector."""
        self.check()
        return self.width

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array, *, train: bool, types: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes texts.

        Args:
          tokens: [B, T] int32, padded on the right; T at most `max_length`.
          mask: [B, T] bool or int, 1 where there is a token and 0 where there is padding.
          train: whether there is dropout; its rng stream is 'dropout'.
          types: [B, T] int32, 1 for the tokens of the second text of a pair; None: all 0.

        Returns:
          The features [B, D] float32, 0 for a text without any token; and `tokens` [B, T, D] in
          `dtype`, which were pooled: the last layer's output, of 'last4' the sum.

        Raises:
          UserError: the texts are longer than `max_length`.
        """
        self.check()
        if tokens.shape[1] > self.max_length:
            raise UserError(
                f"texts of {tokens.shape[1]} tokens are longer than "
                f"config.text_model.max_length={self.max_length}; "
                "use a smaller config.data.text.length"
            )
        mask = mask.astype(bool)
        types = jnp.zeros_like(tokens) if types is None else types
        dropout = self.dropout if train else 0.0
        layer = nn.remat(Layer) if self.remat else Layer
        embeddings = Embeddings(
            self.vocab_size,
            self.max_length,
            self.width,
            self.norm_eps,
            dropout if self.train_after_layer < 0 else 0.0,
            self.dtype,
            name="embeddings",
        )
        x = embeddings(tokens, types)
        outputs = [lax.stop_gradient(x) if self.train_after_layer >= 0 else x]
        for i in range(1, self.depth + 1):
            rate = dropout if i > self.train_after_layer else 0.0
            settings = (self.heads, self.mlp_dim, self.norm_eps, rate, self.dtype)
            x = layer(*settings, name=f"layer{i}")(outputs[-1], mask)
            outputs.append(lax.stop_gradient(x) if i <= self.train_after_layer else x)
        x = sum(outputs[-4:]) if self.pool == "last4" else outputs[-1]
        return self._pooled(x, mask), {"tokens": x}

    def _pooled(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, D], [B, T] bool -> [B, D] float32."""
        any_token = jnp.any(mask, axis=1, keepdims=True)
        x = x.astype(jnp.float32)
        if self.pool == "cls":
            return jnp.where(any_token, x[:, 0], 0.0)
        if not self.pool_special:
            after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))  # whether another token follows
            inner = (mask & after).at[:, 0].set(False)
            # a text of nothing else keeps them
            mask = jnp.where(jnp.any(inner, axis=1, keepdims=True), inner, mask)
        chosen = mask[:, :, None]
        if self.pool == "max":
            # Not jnp.max: its gradient looks for the maximum in x again, and where XLA computed x
            # a second time with another rounding there is none, and 0/0.
            highest = jnp.argmax(jnp.where(chosen, x, -jnp.inf), axis=1, keepdims=True)
            return jnp.where(any_token, jnp.take_along_axis(x, highest, axis=1)[:, 0], 0.0)
        total = jnp.sum(jnp.where(chosen, x, 0.0), axis=1)
        return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
