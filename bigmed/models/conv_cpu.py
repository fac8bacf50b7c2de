"""Convolution, pooling and residual sums on a CPU, where XLA's own are slow.

XLA's CPU backend multiplies matrices and convolves forwards at 75 to 95 % of oneDNN's speed, but
takes 2 to 30 times as long for the gradient by a kernel (jax 0.10, AVX2). So, by measurement of
every shape in a ResNet-50:

  1x1            forwards and both gradients are one matrix product each
  larger         forwards and the gradient by the input: XLA's convolution, or a product of patches
                 and kernel where the output is smaller than the kernel (XLA then takes 10 to 100
                 times as long)
                 the gradient by the kernel: one matrix product for each position of the kernel, or
                 one with patches where the input has few channels
                 to far fewer channels: forwards one product for all positions of the kernel, then
                 the sum of its shifted parts; both gradients are one product each with patches of
                 the output's gradient
  max-pooling    forwards: XLA's; the gradient: sums of shifted windows, not a scatter
  residual sum   computed once (`once`)

Letters: B images, H and W height and width (h and w after striding), I and O channels in and out,
k the kernel's size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FEW_CHANNELS = 16
FEWER = 3  # times fewer channels out than in


def conv(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """XLA's convolution with (k-1)//2 zeros on every side: BHWI,kkIO->BhwO."""
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def conv_grads(
    x: jax.Array, kernel: jax.Array, g: jax.Array, strides: int
) -> tuple[jax.Array, jax.Array]:
    """XLA's gradients of `conv` by x and kernel, given the one by its output."""
    return jax.vjp(lambda x, kernel: conv(x, kernel, strides), x, kernel)[1](g)


def forward(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """`conv`, faster on a CPU."""
    if _to_far_fewer(kernel, strides):
        return _by_shifted_outputs(x, kernel)
    if kernel.shape[0] > 1:
        return _by_patches(x, kernel, strides)
    return lax.dot_general(_strided(x, strides), kernel[0, 0], (((3,), (0,)), ((), ())))


def grads(
    x: jax.Array, kernel: jax.Array, g: jax.Array, strides: int
) -> tuple[jax.Array, jax.Array]:
    """`conv_grads`, faster on a CPU."""
    if _to_far_fewer(kernel, strides):
        return _by_patches_of_output(x, kernel, g)
    if kernel.shape[0] > 1:
        by_x = jax.linear_transpose(lambda x: _by_patches(x, kernel, strides), x)(g)[0]
        by_kernel = _by_position if x.shape[-1] >= FEW_CHANNELS else _by_all_positions
        return by_x, by_kernel(x, g, kernel.shape[0], strides)
    by_x = lax.dot_general(g, kernel[0, 0], (((3,), (1,)), ((), ())))  # BhwO,IO->BhwI
    if strides > 1:
        by_x = jax.linear_transpose(lambda x: _strided(x, strides), x)(by_x)[0]
    return by_x, _outer(_rows(_strided(x, strides)), _rows(g))[None, None]


def _by_patches(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    """`conv`; a product of patches and kernel where the output is smaller than the kernel."""
    c, k = x.shape[-1], kernel.shape[0]
    h, w = (-(-size // strides) for size in x.shape[1:3])
    if min(h, w) >= k:
        return conv(x, kernel, strides)
    patches = _patches(x, k, h, w, strides)
    # BhwP,PO->BhwO
    return lax.dot_general(patches, kernel.reshape(k * k * c, -1), (((3,), (0,)), ((), ())))


def _patches(x: jax.Array, k: int, h: int, w: int, strides: int) -> jax.Array:
    """What each position of an output [B, h, w, O] is made of: [B, h, w, P], P = k * k * I."""
    x = _padded(x, k)
    x = jnp.concatenate([x[:, :, _window(j, w, strides)] for j in range(k)], axis=-1)
    x = lax.optimization_barrier(x)  # else each row of the kernel joins its columns anew
    x = jnp.concatenate([x[:, _window(i, h, strides)] for i in range(k)], axis=-1)
    return lax.optimization_barrier(x)


def _strided(x: jax.Array, strides: int) -> jax.Array:
    return x[:, ::strides, ::strides] if strides > 1 else x


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _outer(x: jax.Array, g: jax.Array) -> jax.Array:
    return lax.dot_general(x, g, (((0,), (0,)), ((), ())))  # NI,NO->IO


def _padded(x: jax.Array, k: int) -> jax.Array:
    p = (k - 1) // 2
    return jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))


def _window(start: int, count: int, strides: int) -> slice:
    return slice(start, start + (count - 1) * strides + 1, strides)


def _by_position(x: jax.Array, g: jax.Array, k: int, strides: int) -> jax.Array:
    """The gradient by the kernel, [k, k, I, O], one product for each of the kernel's positions."""
    h, w = g.shape[1:3]
    x = once(partial(_padded, k=k), x)  # else each position normalises it anew
    # The barriers keep XLA from folding these transpositions into the products, or the second one
    # into an optimiser's update, where they cost more than on their own.
    g = lax.optimization_barrier(_rows(g).T)  # ON
    positions = [
        g @ _rows(x[:, _window(i, h, strides), _window(j, w, strides)])  # ON,NI->OI
        for i in range(k)
        for j in range(k)
    ]
    turned = [lax.optimization_barrier(lax.optimization_barrier(p).T) for p in positions]
    return jnp.stack(turned).reshape(k, k, *turned[0].shape)


def _by_all_positions(x: jax.Array, g: jax.Array, k: int, strides: int) -> jax.Array:
    """As `_by_position`, one product for all of the kernel's positions."""
    h, w = g.shape[1:3]
    by_kernel = _outer(_rows(_patches(x, k, h, w, strides)), _rows(g))  # NP,NO->PO
    return by_kernel.reshape(k, k, x.shape[-1], -1)


def _to_far_fewer(kernel: jax.Array, strides: int) -> bool:
    """What is shifted takes k * k * O / I times the memory of x: little in a DenseNet, k = 3."""
    k, _, c, o = kernel.shape
    return k > 1 and strides == 1 and FEWER * o <= c


def _by_shifted_outputs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`conv` with stride 1: what each position of the kernel gives, [B, H, W, k, k, O], summed."""
    k, _, c, o = kernel.shape
    h, w = x.shape[1:3]
    by_input = kernel.transpose(2, 0, 1, 3).reshape(c, -1)
    # BHWI,IP->BHWP, P = k * k * O; to be summed in no less than float32
    parts = lax.dot_general(
        _padded(x, k),
        by_input,
        (((3,), (0,)), ((), ())),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    parts = lax.optimization_barrier(parts)  # else each shift computes its product anew
    shifted = [
        parts[:, i : i + h, j : j + w, start : start + o]
        for start, (i, j) in zip(range(0, k * k * o, o), np.ndindex(k, k), strict=True)
    ]
    return sum(shifted[1:], start=shifted[0]).astype(x.dtype)


def _by_patches_of_output(
    x: jax.Array, kernel: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`grads` with stride 1, from patches [B, H, W, k, k, O] of the output's gradient g.

    Patches of x, or x shifted to each position of the kernel, would be I/O times as large. In a
    DenseNet's step they took half of all temporary memory.
    """
    k, _, c, o = kernel.shape
    h, w = x.shape[1:3]
    patches = _patches(g, k, h, w, 1)  # P = k * k * O, from the kernel's last position to its first
    turned = kernel[::-1, ::-1].swapaxes(2, 3).reshape(-1, c)
    by_x = lax.dot_general(patches, turned, (((3,), (0,)), ((), ())))  # BHWP,PI->BHWI
    by_kernel = _outer(_rows(x), _rows(patches))  # NI,NP->IP
    return by_x, by_kernel.reshape(c, k, k, o)[:, ::-1, ::-1].transpose(1, 2, 0, 3)


def join(*parts: jax.Array) -> jax.Array:
    """[..., C_i] of every part -> [..., sum of C_i]."""
    return jnp.concatenate(parts, axis=-1)


def along_channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[C] -> [1, ..., 1, C], of x's rank."""
    return vector.reshape(*(1,) * (x.ndim - 1), -1)


def normalise(x: jax.Array, gain: jax.Array, shift: jax.Array) -> jax.Array:
    """x * gain + shift in float32: [..., C], [C], [C] -> [..., C]."""
    return x.astype(jnp.float32) * along_channels(gain, x) + along_channels(shift, x)


def norm_add_relu(
    x: jax.Array, gain: jax.Array, shift: jax.Array, residual: jax.Array
) -> jax.Array:
    """relu(x * gain + shift + residual); see `layers.norm_add_relu`."""
    return jax.nn.relu(normalise(x, gain, shift).astype(x.dtype) + residual)


def once(function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """function(*args), written to memory once and read from there by all that use it.

    XLA's CPU backend computes a chain of cheap operations anew inside every user of its result. A
    residual sum then reads the convolutions of all blocks before it, and so does its gradient;
    that was 8 % of a ResNet-50 step. A conditional is never taken apart in this way.
    """
    true = lax.optimization_barrier(jnp.array(True))  # a constant would be resolved
    return lax.cond(true, function, lambda *args: jnp.zeros_like(function(*args)), *args)


def _pool_pads(shape: tuple[int, ...], low: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """What `max_pool` adds before and after each dimension: windows for half the size, rounded up.

    low: the rows and columns added before the first.
    """
    high = (-(-size // 2) * 2 + 1 - size - lo for size, lo in zip(shape[1:3], low, strict=True))
    return ((0, 0), *zip(low, high, strict=True), (0, 0))


def max_pool(x: jax.Array, low: tuple[int, int], value: float) -> jax.Array:
    """3x3 maximum with stride 2: BHWC->BhwC, h and w half of H and W, rounded up.

    low: the rows and columns of padding before the first, 0 or 1; value: of the padding.
    """
    pads = _pool_pads(x.shape, low)
    if value != -jnp.inf:  # which `reduce_window` pads with by itself
        x, pads = jnp.pad(x, pads, constant_values=value), ((0, 0),) * 4
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


def max_pool_grad_default(
    x: jax.Array, y: jax.Array, g: jax.Array, low: tuple[int, int], value: float
) -> jax.Array:
    """XLA's gradient of `max_pool`, whose output is y: to the first maximum of each window."""
    del y
    return jax.vjp(lambda x: max_pool(x, low, value), x)[1](g)[0]


def max_pool_grad(
    x: jax.Array, y: jax.Array, g: jax.Array, low: tuple[int, int], value: float
) -> jax.Array:
    """`max_pool_grad_default`, faster on a CPU."""
    b, height, width, c = x.shape
    h, w = y.shape[1:3]
    top, left = low
    x = jnp.pad(x, _pool_pads(x.shape, low), constant_values=value)
    offsets = [(i, j) for i in range(3) for j in range(3)]
    first = jnp.full(y.shape, len(offsets), jnp.int8)
    for n, (i, j) in reversed(list(enumerate(offsets))):
        first = jnp.where(x[:, _window(i, h, 2), _window(j, w, 2)] == y, jnp.int8(n), first)

    def share(i: int, j: int) -> jax.Array:
        """What position (i, j) of each window gets, at its place among rows and columns like it.

        Position 2 of a window is position 0 of the next. [B, h + 1 - top, w + 1 - left, C].
        """
        part = jnp.where(first == 3 * i + j, g, jnp.zeros_like(g))
        pads = [(0, 0, 0)]
        for k, lo in ((i, top), (j, left)):
            place = 0 if k == 1 else k // 2 - lo
            pads.append((place, 1 - lo - place, 0))
        return lax.pad(part, jnp.zeros((), g.dtype), (*pads, (0, 0, 0)))

    # by whether the row and the column of the padded image are odd
    parts = {
        (0, 0): share(0, 0) + share(0, 2) + share(2, 0) + share(2, 2),
        (0, 1): share(0, 1) + share(2, 1),
        (1, 0): share(1, 0) + share(1, 2),
        (1, 1): share(1, 1),
    }
    rows = [jnp.stack([parts[i ^ top, j ^ left] for j in (0, 1)], 3) for i in (0, 1)]
    grad = jnp.stack(rows, axis=2)  # [B, h + 1 - top, 2, w + 1 - left, 2, C]
    return grad.reshape(b, 2 * (h + 1 - top), 2 * (w + 1 - left), c)[:, :height, :width]
