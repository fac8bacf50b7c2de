"""Dense layers, MLP and multi-head self-attention, as every transformer here uses them."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, n: int) -> jax.Array:
    """Over the last n axes of x and the first n of the kernel: [..., *I], [*I, *O] -> [..., *O]."""
    axes = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
    return lax.dot_general(x, kernel, (axes, ((), ())))


def _product_forward(x: jax.Array, kernel: jax.Array, n: int) -> tuple[jax.Array, tuple]:
    return _product(x, kernel, n), (x, kernel)


def _product_backward(n: int, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.platform_dependent(
        *saved, g, cpu=partial(_gradients_cpu, n=n), default=partial(_gradients, n=n)
    )


_product.defvjp(_product_forward, _product_backward)


def _gradients(x: jax.Array, kernel: jax.Array, g: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """Of x, [..., *I], and of the kernel, [*I, *O], by that of the product, [..., *O]."""
    rows = tuple(range(x.ndim - n))
    outs = tuple(range(x.ndim - n, g.ndim)), tuple(range(n, kernel.ndim))
    by_x = lax.dot_general(g, kernel, (outs, ((), ())))
    return by_x, lax.dot_general(x, g, ((rows, rows), ((), ())))


def _gradients_cpu(x: jax.Array, kernel: jax.Array, g: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """`_gradients` with a copy of the smaller array transposed; XLA copies the larger one."""
    ins, outs = math.prod(kernel.shape[:n]), math.prod(kernel.shape[n:])
    rows, g = x.reshape(-1, ins), g.reshape(-1, outs)  # NI, NO
    by_x = lax.dot_general(g, kernel.reshape(ins, outs), (((1,), (1,)), ((), ())))  # NO,IO->NI
    # the barriers keep XLA from merging transposition and product again
    if ins <= outs:
        by_kernel = lax.optimization_barrier(rows.T) @ g  # IN,NO->IO
    else:
        by_kernel = lax.optimization_barrier(g.T) @ rows  # ON,NI->OI
        by_kernel = lax.optimization_barrier(lax.optimization_barrier(by_kernel).T)
    return by_x.reshape(x.shape), by_kernel.reshape(kernel.shape)


def dot_general(
    x: jax.Array, kernel: jax.Array, dimensions: tuple, precision: None = None
) -> jax.Array:
    """A Flax layer's `jax.lax.dot_general` over the last axes of x, with the gradient above."""
    if precision is not None:
        raise ValueError(f"precision={precision}: valid here: None, JAX's default")
    return _product(x, kernel, len(dimensions[0][0]))


Dense = partial(nn.Dense, dot_general=dot_general)
DenseGeneral = partial(nn.DenseGeneral, dot_general=dot_general)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * P(Z <= x) of a standard normal Z (arXiv 1606.08415), exact; keeps x alone.

    Any shape; the arithmetic is float32, the result of x's dtype.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * lax.erf(x * np.float32(np.sqrt(0.5)))


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    # computed anew: XLA would keep what the forward has of it
    x32 = lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(x32)) * np.float32(1 / np.sqrt(2 * np.pi))
    return ((g.astype(jnp.float32) * (_normal_cdf(x32) + x32 * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_jvp
def _on_all_cores(product: jax.Array) -> jax.Array:
    """The product as it is, but for a NaN, which becomes its whole row.

    XLA makes a batched product on one core of a CPU, and on all if it is fused with a reduction.
    """
    return lax.platform_dependent(
        product,
        cpu=lambda x: jnp.minimum(x, jnp.max(x, axis=-1, keepdims=True)),
        default=lambda x: x,
    )


# for second derivatives, which the minimum would split among equal numbers
_on_all_cores.defjvps(lambda tangent, result, product: tangent)


@jax.custom_vjp
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, factor: jax.Array | None
) -> jax.Array:
    """Softmax attention whose weights are divided by their sum after their product with v.

    The division is of N x K numbers so, not of N x M. Products are of q's dtype, also those of the
    gradient; logits, softmax and sums are float32.

    Args:
      q: [B, H, N, K], scaled.
      k, v: [B, H, M, K].
      mask: [B, M] bool, what is attended to; None: everything. A row without any gets the mean.
      factor: [B, H, N, M], of the softmax's result (dropout); None: 1. It has no gradient.

    Returns:
      [B, H, N, K] in q's dtype.
    """
    return _attend_forward(q, k, v, mask, factor)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, factor: jax.Array | None
) -> tuple[jax.Array, tuple]:
    # B: input, H: head, N: query, M: key, K: dimension of a head
    logits = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        # finite, so that a row without any gives no NaN
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    unnormalised = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)).astype(q.dtype)
    # of what is multiplied with v, so that the weights sum to 1 whatever the dtype
    total = jnp.sum(unnormalised, axis=-1, keepdims=True, dtype=jnp.float32)
    dropped = unnormalised if factor is None else unnormalised * factor.astype(q.dtype)
    out = jnp.einsum("bhnm,bhmk->bhnk", dropped, v, preferred_element_type=jnp.float32)
    out = (_on_all_cores(out) / total).astype(q.dtype)
    return out, (q, k, v, mask, factor, unnormalised, total)


def _attend_backward(saved: tuple, g: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, mask, factor, unnormalised, total = saved
    g = (g.astype(jnp.float32) / total).astype(q.dtype)
    by_weights = jnp.einsum("bhnk,bhmk->bhnm", g, v, preferred_element_type=jnp.float32)
    dropped = unnormalised
    if factor is not None:
        by_weights = by_weights * factor
        dropped = unnormalised * factor.astype(q.dtype)
    # Not from g and the output, as FlashAttention has it (arXiv 2205.14135, appendix B.2): what all
    # values share then does not cancel to the last bit where products round their inputs.
    shift = jnp.sum(unnormalised * by_weights, axis=-1, keepdims=True) / total
    by_logits = unnormalised * (by_weights - shift)
    if mask is not None:
        by_logits = jnp.where(mask[:, None, None], by_logits, 0.0)
    by_logits = by_logits.astype(q.dtype)
    by_q = _on_all_cores(jnp.einsum("bhnm,bhmk->bhnk", by_logits, k))
    by_k = jnp.einsum("bhnm,bhnk->bhmk", by_logits, q)
    by_v = jnp.einsum("bhnm,bhnk->bhmk", dropped, g)
    return by_q, by_k, by_v, None, None


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def split_heads(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, N, 3, H, K] -> q, k, v, each [B, H, N, K]."""
    # all three at once: a third of the copies of one by one
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    return q, k, v


def _split_heads_backward(_: None, gs: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    # as one array, where the gradient of slices is a sum of three padded with zeros
    return (jnp.stack([g.transpose(0, 2, 1, 3) for g in gs], axis=2),)


split_heads.defvjp(lambda qkv: (split_heads(qkv), None), _split_heads_backward)


class Attention(nn.Module):
    """Multi-head self-attention; parameters `qkv` [D, 3, H, K] and `out` [H, K, D].

    Attributes:
      heads: H; it divides D.
      qkv_init, out_init: of the kernels.
      dropout: of the softmax's result; its rng stream is 'dropout'.
      ends: where the tokens are split into groups whose outputs are computed each by itself, so
        that one that nobody uses costs its queries alone in a jitted program; all are attended to.
      dtype: of the arithmetic, see `attend`.
    """

    heads: int
    qkv_init: Any
    out_init: Any
    dropout: float = 0.0
    ends: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> list[jax.Array]:
        """[B, N, D], [B, N] bool or None: all -> a [B, N_i, D] of each group."""
        b, n, d = x.shape
        shape = (3, self.heads, d // self.heads)
        dense = DenseGeneral(shape, dtype=self.dtype, kernel_init=self.qkv_init, name="qkv")
        q, k, v = split_heads(dense(x))
        q = q / np.sqrt(shape[-1]).astype(q.dtype)
        factor = None
        if self.dropout:
            ones = jnp.ones((b, self.heads, n, n), self.dtype)
            factor = nn.Dropout(self.dropout, deterministic=False)(ones)
        out = DenseGeneral(d, (-2, -1), dtype=self.dtype, kernel_init=self.out_init, name="out")
        groups = []
        for i, queries in enumerate(jnp.split(q, self.ends, axis=2)):
            rows = None if factor is None else jnp.split(factor, self.ends, axis=2)[i]
            groups.append(out(attend(queries, k, v, mask, rows).transpose(0, 2, 1, 3)))
        return groups


class Mlp(nn.Module):
    """Two dense layers, `up` and `down`, with `gelu` between."""

    hidden: int
    kernel_init: Any
    bias_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        dense = partial(
            Dense, kernel_init=self.kernel_init, bias_init=self.bias_init, dtype=self.dtype
        )
        hidden = gelu(dense(self.hidden, name="up")(x))
        return dense(x.shape[-1], name="down")(hidden)
