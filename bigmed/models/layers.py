"""Convolution, batch normalisation and pooling, as every convolutional backbone here uses them."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bigmed.errors import UserError
from bigmed.models import conv_cpu

# Variance scaling with scale 1, fan-in (SimCLR's released code; not He's scale of 2).
conv_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """Convolution with (k-1)//2 zeros on every side, whatever the stride (as PyTorch pads).

    On a CPU the products of `conv_cpu` stand in for XLA's slower ones; elsewhere it is XLA's.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(conv_cpu.forward, strides=strides),
        default=partial(conv_cpu.conv, strides=strides),
    )


def _conv2d_forward(x: jax.Array, kernel: jax.Array, strides: int) -> tuple[jax.Array, tuple]:
    return conv2d(x, kernel, strides), (x, kernel)


def _conv2d_backward(strides: int, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.platform_dependent(
        *saved,
        g,
        cpu=partial(conv_cpu.grads, strides=strides),
        default=partial(conv_cpu.conv_grads, strides=strides),
    )


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum with stride 2 and TensorFlow's SAME padding: [B, H, W, C] -> [B, H/2, W/2, C]."""
    # SAME pads an even size at its end alone
    return _max_pool(x, (x.shape[1] % 2, x.shape[2] % 2), -jnp.inf)


def max_pool_symmetric(x: jax.Array) -> jax.Array:
    """`max_pool` with a row or column of padding on every side, as PyTorch's padding=1."""
    return _max_pool(x, (1, 1), -jnp.inf)


def max_pool_zeros(x: jax.Array) -> jax.Array:
    """`max_pool_symmetric` whose padding is of zeros that take part in the maximum, as in BiT."""
    return _max_pool(x, (1, 1), 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: jax.Array, low: tuple[int, int], value: float) -> jax.Array:
    return conv_cpu.max_pool(x, low, value)


def _max_pool_forward(x: jax.Array, low: tuple[int, int], value: float) -> tuple[jax.Array, tuple]:
    y = conv_cpu.max_pool(x, low, value)
    return y, (x, y)


def _max_pool_backward(
    low: tuple[int, int], value: float, saved: tuple, g: jax.Array
) -> tuple[jax.Array]:
    grad = lax.platform_dependent(
        *saved,
        g,
        cpu=partial(conv_cpu.max_pool_grad, low=low, value=value),
        default=partial(conv_cpu.max_pool_grad_default, low=low, value=value),
    )
    return (grad,)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_vjp
def norm_add_relu(
    x: jax.Array, gain: jax.Array, shift: jax.Array, residual: jax.Array
) -> jax.Array:
    """relu(x * gain + shift + residual), the end of a residual block.

    x and residual [..., C] in the block's dtype, gain and shift [C] float32; the product and the
    shift are float32, the sum is of the block's dtype.
    """
    return lax.platform_dependent(
        x,
        gain,
        shift,
        residual,
        cpu=partial(conv_cpu.once, conv_cpu.norm_add_relu),
        default=conv_cpu.norm_add_relu,
    )


def _norm_add_relu_forward(*args: jax.Array) -> tuple[jax.Array, tuple]:
    y = norm_add_relu(*args)
    return y, (y, args[0], args[1])


def _norm_add_relu_backward(saved: tuple, g: jax.Array) -> tuple[jax.Array, ...]:
    y, x, gain = saved
    g = jnp.where(y > 0, g, jnp.zeros_like(g))
    g32 = g.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    by_x = (g32 * conv_cpu.along_channels(gain, x)).astype(x.dtype)
    return by_x, jnp.sum(g32 * x.astype(jnp.float32), axes), jnp.sum(g32, axes), g


norm_add_relu.defvjp(_norm_add_relu_forward, _norm_add_relu_backward)


def join(*parts: jax.Array) -> jax.Array:
    """Joins channels: [..., C_i] of every part -> [..., sum of C_i]."""
    if len(parts) == 1:
        return parts[0]
    ends = itertools.accumulate(part.shape[-1] for part in parts)
    return _join(tuple(ends), *parts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _join(ends: tuple[int, ...], *parts: jax.Array) -> jax.Array:
    """`join`; ends: where each part ends in the result."""
    del ends
    return lax.platform_dependent(
        *parts, cpu=partial(conv_cpu.once, conv_cpu.join), default=conv_cpu.join
    )


def _join_forward(ends: tuple[int, ...], *parts: jax.Array) -> tuple[jax.Array, None]:
    return _join(ends, *parts), None


def _join_backward(ends: tuple[int, ...], _: None, g: jax.Array) -> tuple[jax.Array, ...]:
    g = lax.platform_dependent(
        g, cpu=partial(conv_cpu.once, jnp.positive), default=jnp.positive
    )
    return tuple(jnp.split(g, ends[:-1], axis=-1))


_join.defvjp(_join_forward, _join_backward)


def avg_pool(x: jax.Array, strides: int) -> jax.Array:
    """2x2 mean for ResNet-D's shortcut (arXiv 1812.01187), as SimCLR v2's code pads it.

    With stride 2 an odd size gets a row and a column of zeros at the end; with stride 1 the windows
    at the end are smaller.
    """
    if strides == 1:
        return nn.avg_pool(x, (2, 2), (1, 1), "SAME", count_include_pad=False)
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return nn.avg_pool(x, (2, 2), (strides, strides), "VALID")


class Conv(nn.Module):
    """A square convolution without bias; parameter `kernel` [k, k, I, O] float32."""

    features: int
    size: int
    strides: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, I] -> [B, H/strides, W/strides, O] in `dtype`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", conv_init, shape, jnp.float32)
        return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.strides)


def moments_of(x: jax.Array) -> jax.Array:
    """Mean and variance of every channel over all other axes: [..., C] -> [2, C] float32."""
    axes = tuple(range(x.ndim - 1))
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axes)
    return jnp.stack([mean, jnp.maximum(jnp.mean(jnp.square(x32), axes) - jnp.square(mean), 0.0)])


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, momentum 0.9, epsilon 1e-5.

    The mean runs over the global batch, also where a mesh splits it: under `jax.jit` the reduction
    is of the whole array. That is SimCLR's global BN (section 2.2 of arXiv 2002.05709).

    Attributes:
      use_bias: whether there is a shift `bias`; the last layer of a SimCLR head has none.
      zero_scale: start `scale` at 0, for the last norm of a residual branch.
      dtype: of the output; parameters, moments and their arithmetic are float32.
    """

    use_bias: bool = True
    zero_scale: bool = False
    dtype: Any = jnp.float32

    MOMENTUM = 0.9
    EPSILON = 1e-5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool,
        residual: jax.Array | None = None,
        moments: jax.Array | None = None,
        groups: int = 1,
    ) -> jax.Array:
        """[..., C] -> [..., C]; updates the collection `batch_stats` (`mean`, `var`) if `train`.

        With a `residual` of x's shape the result is relu(normalised x + residual). `moments` are
        x's, [2, C] float32, where they are known already (see `moments_of`). In training each of
        `groups` consecutive parts of the batch is normalised by itself, whatever `moments` are, and
        what is kept is the mean over them (see `batch_norm_in_groups`).
        """
        c = x.shape[-1]
        init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", init, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32) if self.use_bias else 0
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)

        def normalised(
            x: jax.Array, residual: jax.Array | None, mean: jax.Array, var: jax.Array
        ) -> jax.Array:
            gain = scale * lax.rsqrt(var + self.EPSILON)
            shift = bias - mean * gain
            if residual is not None:
                return norm_add_relu(x.astype(self.dtype), gain, shift, residual.astype(self.dtype))
            return conv_cpu.normalise(x, gain, shift).astype(self.dtype)

        if not train:
            return normalised(x, residual, running_mean.value, running_var.value)
        if groups == 1:
            mean, var = moments_of(x) if moments is None else moments
            y = normalised(x, residual, mean, var)
        else:
            parts = jax.tree.map(lambda a: a.reshape(groups, -1, *a.shape[1:]), (x, residual))
            means, variances = jax.vmap(moments_of, out_axes=1)(parts[0])  # GC
            y = jax.vmap(normalised)(*parts, means, variances).reshape(x.shape)
            mean, var = jnp.mean(means, axis=0), jnp.mean(variances, axis=0)
        if not self.is_initializing():
            keep = self.MOMENTUM
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var
        return y


def batch_norm_in_groups(groups: int) -> AbstractContextManager[None]:
    """Within it every `BatchNorm` takes its moments in so many groups of the batch.

    As if each group passed through the network by itself; but `jax.vmap` over the groups would make
    the gradient of every kernel once for each of them. On a mesh groups that are a multiple of its
    devices, or divide them, need no communication of activations.

    Raises:
      UserError: with several groups, when a batch norm of Flax is called, which cannot have them.
    """

    def give_groups(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            return call(*args, **kwargs, groups=groups)
        if isinstance(context.module, nn.BatchNorm) and groups > 1:
            raise UserError(
                f"config.objective.bn_groups={groups}: '{context.module.name}' is a batch norm of "
                "Flax, which has no groups; valid: 1, or bigmed.models.layers.BatchNorm for it"
            )
        return call(*args, **kwargs)

    return nn.intercept_methods(give_groups)
