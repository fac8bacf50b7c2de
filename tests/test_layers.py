"""Convolution, batch norm and pooling against NumPy, SciPy and XLA's own operations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from scipy import signal

from bigmed import sharding, tree
from bigmed.errors import UserError
from bigmed.models import densenet, layers, resnet

# kernel size, strides, height, width, channels in, channels out: every branch of conv_cpu
CONVOLUTIONS = [
    (1, 1, 6, 5, 4, 8),
    (1, 1, 6, 5, 8, 4),
    (1, 2, 7, 6, 8, 16),
    (3, 1, 6, 7, 16, 8),
    (3, 2, 9, 8, 16, 16),
    (3, 1, 6, 7, 24, 8),
    (3, 2, 9, 8, 24, 8),
    (5, 1, 4, 6, 16, 4),
    (3, 1, 2, 5, 16, 16),
    (3, 2, 4, 3, 16, 16),
    (3, 1, 5, 6, 3, 8),
    (7, 2, 12, 11, 3, 16),
]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def xla_conv(x, kernel, strides):
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


def scipy_conv(x, kernel, strides):
    """The definition in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    pad = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    channels = range(x.shape[3])
    out = [
        sum(signal.correlate2d(image[..., i], kernel[..., i, o], "valid") for i in channels)
        for image in x
        for o in range(kernel.shape[3])
    ]
    out = np.stack(out).reshape(len(x), kernel.shape[3], *out[0].shape)
    return out.transpose(0, 2, 3, 1)[:, ::strides, ::strides]


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize(("k", "s", "h", "w", "i", "o"), CONVOLUTIONS)
def test_conv_equals_its_definition_and_xla_gradients(k, s, h, w, i, o):
    x, kernel = random(2, h, w, i), random(k, k, i, o, seed=1)
    y, vjp = jax.vjp(lambda x, kernel: layers.conv2d(x, kernel, s), x, kernel)
    assert relative_error(y, scipy_conv(x, kernel, s)) < 1e-5
    g = random(*y.shape, seed=2)
    expected = jax.vjp(lambda x, kernel: xla_conv(x, kernel, s), x, kernel)[1](g)
    for found, wanted in zip(vjp(g), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_conv_to_far_fewer_channels_is_rounded_once():
    x, kernel = (
        jnp.asarray(random(*shape), jnp.bfloat16) for shape in ((2, 8, 9, 48), (3, 3, 48, 8))
    )
    found = np.asarray(jax.jit(lambda x, k: layers.conv2d(x, k, 1))(x, kernel), np.float64)
    exact = scipy_conv(np.asarray(x, np.float32), np.asarray(kernel, np.float32), 1)
    assert (np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 1e-5).all()


@pytest.mark.parametrize(("k", "s"), [(1, 1), (3, 2)])
def test_conv_under_jit_vmap_and_remat(k, s):
    x, kernel = random(2, 3, 8, 8, 16), random(k, k, 16, 8, seed=1)

    def loss(conv):
        one = jax.checkpoint(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel, s))))
        return lambda x, kernel: jnp.sum(jax.vmap(one, in_axes=(0, None))(x, kernel))

    found = jax.jit(jax.grad(loss(layers.conv2d), (0, 1)))(x, kernel)
    expected = jax.jit(jax.grad(loss(xla_conv), (0, 1)))(x, kernel)
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-5


@pytest.mark.parametrize(("k", "s", "i"), [(1, 2, 16), (3, 1, 16), (3, 1, 24), (7, 2, 3)])
def test_conv_over_a_mesh_equals_one_device(k, s, i):
    mesh = sharding.make_mesh({"data": 8})
    x, kernel = random(16, 8, 8, i), random(k, k, i, 8, seed=1)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(layers.conv2d(x, kernel, s)))

    expected = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss, (0, 1)))(rows, kernel)
    assert found[0].sharding.spec[0] == "data"
    for f, e in zip(found, expected, strict=True):
        assert relative_error(f, e) < 1e-5


def test_an_accelerator_gets_plain_convolutions():
    x, kernel = random(2, 8, 8, 16), random(1, 1, 16, 16)
    grads = jax.jit(jax.grad(lambda x, k: jnp.sum(layers.conv2d(x, k, 1) ** 2), (0, 1)))

    def count(platform, operation):
        lowered = grads.trace(x, kernel).lower(lowering_platforms=(platform,))
        return lowered.as_text().count(f"stablehlo.{operation}")

    assert count("cpu", "convolution") == 0 and count("cpu", "dot_general") == 3
    assert count("cuda", "dot_general") == 0 and count("cuda", "convolution") >= 3


@pytest.mark.parametrize(("h", "w"), [(8, 8), (9, 8), (7, 7), (8, 5), (2, 2), (1, 1)])
def test_max_pool(h, w):
    # small integers, so that windows have ties
    x = np.random.default_rng(0).integers(-2, 3, (2, h, w, 3)).astype(np.float32)
    found, vjp = jax.vjp(layers.max_pool, x)
    expected, xla_vjp = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"), x)
    np.testing.assert_array_equal(found, expected)
    lo = (h % 2, w % 2)  # an even size is padded at its end alone
    padded = np.pad(x, ((0, 0), (lo[0], 2), (lo[1], 2), (0, 0)), constant_values=-np.inf)
    for a in range(found.shape[1]):
        for b in range(found.shape[2]):
            window = padded[:, 2 * a : 2 * a + 3, 2 * b : 2 * b + 3]
            np.testing.assert_array_equal(found[:, a, b], window.max((1, 2)))
    g = random(*found.shape)
    np.testing.assert_allclose(vjp(g)[0], xla_vjp(g)[0], rtol=1e-5, atol=1e-6)


def test_avg_pool():
    x = random(1, 3, 4, 1)
    same = np.asarray(layers.avg_pool(x, 1))[0, :, :, 0]
    assert same.shape == (3, 4)
    np.testing.assert_allclose(same[0, 0], x[0, :2, :2, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(same[2, 0], x[0, 2, :2, 0].mean(), rtol=1e-5)  # no padding counted
    half = np.asarray(layers.avg_pool(x, 2))[0, :, :, 0]
    assert half.shape == (2, 2)
    np.testing.assert_allclose(half[1, 0], x[0, 2, :2, 0].sum() / 4, rtol=1e-5)  # zeros counted


def batch_norm_oracle(x, scale, bias, g):
    """Output, moments and gradients by x, scale and bias, in float64."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(var + 1e-5)
    normal = (x - mean) * inverse
    by_x = scale * inverse * (g - g.mean(axes) - normal * (g * normal).mean(axes))
    return normal * scale + bias, mean, var, by_x, (g * normal).sum(axes), g.sum(axes)


@pytest.mark.parametrize("shape", [(16, 5), (4, 3, 2, 5)])
def test_batch_norm_in_training(shape):
    x, g = 3 * random(*shape) + 1, random(*shape, seed=1)
    scale, bias = random(5, seed=2), random(5, seed=3)
    module = layers.BatchNorm()
    stats = {"mean": jnp.full(5, 2.0), "var": jnp.full(5, 3.0)}

    def apply(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    y, vjp, mutated = jax.vjp(apply, x, scale, bias, has_aux=True)
    expected, mean, var, *grads = batch_norm_oracle(x, scale, bias, g)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mutated["batch_stats"]["mean"], 1.8 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(mutated["batch_stats"]["var"], 2.7 + 0.1 * var, rtol=1e-5)
    for found, wanted in zip(vjp(g), grads, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_batch_norm_in_evaluation_uses_the_running_statistics():
    x = random(4, 5)
    module = layers.BatchNorm(use_bias=False)
    variables = module.init(jax.random.key(0), x, train=True)
    assert set(variables["params"]) == {"scale"}
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)  # init takes no statistics
    stats = {"mean": jnp.arange(5.0), "var": jnp.arange(1.0, 6.0)}
    y = module.apply({**variables, "batch_stats": stats}, x, train=False)
    expected = (x - np.arange(5.0)) / np.sqrt(np.arange(1.0, 6.0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_a_mesh_does_not_change_whose_moments_a_batch_norm_takes(groups):
    """Of the whole batch, or of groups larger or smaller than a device's part."""
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    x = random(32, 3, 3, 4) * np.arange(1, 33, dtype=np.float32)[:, None, None, None]
    module = layers.BatchNorm()
    variables = module.init(jax.random.key(0), x, train=False)

    def apply(x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"], groups=groups)

    expected = jax.jit(apply)(x)
    found = jax.jit(apply)(jax.device_put(x, sharding.batch_sharding(mesh)))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True], ids=["", "remat"])
@pytest.mark.parametrize(
    "module",
    [resnet.Model(8, stem="small"), densenet.Model(14, stem="small")],
    ids=["residual", "dense"],
)
def test_batch_norm_in_groups_is_that_of_each_group_by_itself(module, remat, monkeypatch):
    """Statistics and gradients, of which there is one for each kernel, not one a group."""
    monkeypatch.setitem(resnet.VARIANTS, 8, ((1, 0, 0, 1), True))
    monkeypatch.setitem(densenet.VARIANTS, 14, (4, (2, 1)))
    module, groups, x = module.clone(remat=remat), 4, jnp.asarray(random(8, 16, 16, 3))
    variables = module.init(jax.random.key(0), x, train=True)
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * random(*leaf.shape), variables)
    stats = {"batch_stats": variables["batch_stats"]}

    def network(params, x):
        (y, _), mutated = module.apply({"params": params, **stats}, x, train=True, mutable=stats)
        return y, mutated

    def by_themselves(params):
        ys, mutated = jax.vmap(network, (None, 0))(params, x.reshape(groups, 2, 16, 16, 3))
        return jnp.sum(ys * weights), jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), mutated)

    def in_groups(params):
        with layers.batch_norm_in_groups(groups):
            y, mutated = network(params, x)
        return jnp.sum(y.reshape(weights.shape) * weights), mutated

    weights = random(groups, 2, module.feature_dim, seed=1)
    ways = [jax.value_and_grad(f, has_aux=True) for f in (by_themselves, in_groups)]
    expected, found = (tree.flatten(jax.jit(way)(variables["params"])) for way in ways)
    for name, leaf in expected.items():
        scale = np.max(np.abs(leaf))
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-4 * scale, err_msg=name)
    programs = [str(jax.make_jaxpr(way)(variables["params"])) for way in ways]
    assert [bool(re.search("group_count=[^1]", program)) for program in programs] == [True, False]


def test_a_batch_norm_of_flax_is_refused_groups():
    module = nn.Sequential([nn.BatchNorm(use_running_average=False)])
    x = random(4, 5)
    with layers.batch_norm_in_groups(1):
        variables = module.init(jax.random.key(0), x)
    with layers.batch_norm_in_groups(2), pytest.raises(UserError, match="bn_groups=2.*of Flax"):
        module.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_end_of_a_residual_block_equals_its_parts(dtype):
    x, residual = (jnp.asarray(random(3, 4, 4, 6, seed=i), dtype) for i in (0, 1))
    gain, shift, g = random(6, seed=2), random(6, seed=3), jnp.asarray(random(3, 4, 4, 6), dtype)

    def parts(x, gain, shift, residual):
        return nn.relu((x.astype(jnp.float32) * gain + shift).astype(dtype) + residual)

    with jax.numpy_rank_promotion("allow"):
        expected, expected_vjp = jax.vjp(parts, x, gain, shift, residual)
        expected_grads = expected_vjp(g)
    found, vjp = jax.vjp(layers.norm_add_relu, x, gain, shift, residual)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    # the sums over channels may be taken in another order
    for f, e in zip(vjp(g), expected_grads, strict=True):
        assert f.dtype == e.dtype and relative_error(f, e) < 1e-5


def test_a_chain_of_residual_blocks_reads_each_convolution_once_on_a_cpu():
    """Not the memory of every block before it: XLA would compute the sums anew in each user."""
    x = jnp.ones((1, 8, 8, 16))
    norms = [layers.BatchNorm() for _ in range(3)]
    variables = [norm.init(jax.random.key(0), x, train=False) for norm in norms]

    def chain(x, kernels):
        for norm, v, kernel in zip(norms, variables, kernels, strict=True):
            y = layers.conv2d(x, kernel, 1)
            x = norm.apply(v, y, train=False, residual=x)
        return x

    kernels = [random(1, 1, 16, 16, seed=i) for i in range(3)]
    text = jax.jit(chain).lower(x, kernels).compile().as_text()
    assert text.count(" conditional(") == 3


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    x = jnp.asarray(random(4, 6, 6, 16), jnp.bfloat16)
    conv, norm = layers.Conv(8, 3, dtype=jnp.bfloat16), layers.BatchNorm(dtype=jnp.bfloat16)
    kernel = conv.init(jax.random.key(0), x)
    y = conv.apply(kernel, x)
    variables = norm.init(jax.random.key(0), y, train=True)
    z, mutated = norm.apply(variables, y, train=True, mutable=["batch_stats"])
    assert y.dtype == z.dtype == jnp.bfloat16
    leaves = jax.tree.leaves((kernel, variables, mutated))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    expected = layers.Conv(8, 3).apply(kernel, x)
    assert relative_error(y, expected) < 0.02
    grad = jax.grad(lambda k: jnp.sum(conv.apply(k, x).astype(jnp.float32) ** 2))(kernel)
    assert jax.tree.leaves(grad)[0].dtype == jnp.float32


def test_conv_initialisation():
    variables = layers.Conv(256, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))
    kernel = variables["params"]["kernel"]
    # variance scaling 1.0, fan-in (not He's 2.0), truncated at two deviations of the normal
    std = 1 / np.sqrt(9 * 64)
    assert np.std(kernel) == pytest.approx(std, rel=0.02)
    assert np.max(np.abs(kernel)) <= 2 * std / 0.8796 + 1e-6
