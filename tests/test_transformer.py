"""Pieces of the transformers against NumPy in float64, and what a program leaves out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from bigmed.models import transformer, vit

B, H, N, M, K = 2, 3, 5, 6, 4


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention_oracle(q, k, v, mask, factor, g):
    """The definition and its gradients by q, k and v, in float64, query by query."""
    q, k, v, g = (a.astype(np.float64) for a in (q, k, v, g))
    out, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
    for b, h, n in np.ndindex(*q.shape[:3]):
        some = mask[b] if mask is not None else np.ones(k.shape[2], bool)
        kept = some if some.any() else ~some  # the mean of all
        logits = np.where(kept, k[b, h] @ q[b, h, n], -np.inf) if some.any() else 0 * some
        p = special.softmax(logits)
        f = np.ones_like(p) if factor is None else factor[b, h, n].astype(np.float64)
        out[b, h, n] = (p * f) @ v[b, h]
        dv[b, h] += np.outer(p * f, g[b, h, n])
        by_p = f * (v[b, h] @ g[b, h, n])
        by_logits = p * (by_p - p @ by_p) * some
        dq[b, h, n] = by_logits @ k[b, h]
        dk[b, h] += np.outer(by_logits, q[b, h, n])
    return out, dq, dk, dv


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
def test_attend_and_its_gradients(masked, dropped):
    q, g = random(B, H, N, K), random(B, H, N, K, seed=1)
    k, v = random(B, H, M, K, seed=2), random(B, H, M, K, seed=3)
    mask = np.arange(M)[None] < np.array([[4], [0]]) if masked else None
    factor = None
    if dropped:
        factor = (random(B, H, N, M, seed=4) > -0.5).astype(np.float32) / 0.7
    expected = attention_oracle(q, k, v, mask, factor, g)
    out, pull = jax.vjp(lambda q, k, v: transformer.attend(q, k, v, mask, factor), q, k, v)
    for found, e in zip((out, *pull(g)), expected, strict=True):
        np.testing.assert_allclose(found, e, rtol=1e-5, atol=1e-6)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v, g)]
    expected = attention_oracle(*(np.asarray(a, np.float32) for a in half[:3]), mask, factor, g)
    out, pull = jax.vjp(lambda q, k, v: transformer.attend(q, k, v, mask, factor), *half[:3])
    for found, e in zip((out, *pull(half[3])), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float32), e, rtol=0.05, atol=0.05)


def test_what_all_values_share_cancels_in_the_gradient_of_attention():
    """Also in bfloat16, where a mean of 5 in v is 5 times what the gradient is of."""
    q, k, v, g = (random(1, 4, 48, 32, seed=i) for i in range(4))
    half = [a.astype(jnp.bfloat16) for a in (2 * q, k, v + 5, g)]
    q, k, v, g = (np.asarray(a, np.float32) for a in half)
    expected = attention_oracle(q, k, v, None, None, g)[1:]
    _, pull = jax.vjp(lambda q, k, v: transformer.attend(q, k, v, None, None), *half[:3])
    for found, e in zip(pull(half[3]), expected, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - e) / np.linalg.norm(e)
        assert error < 0.01


def test_attention_of_huge_logits_is_finite():
    q = jnp.full((1, 1, 2, K), 1e4)
    k = jnp.stack([jnp.full(K, 1e4), jnp.full(K, -1e4)])[None, None]
    out, pull = jax.vjp(lambda q: transformer.attend(q, k, k, None, None), q)
    np.testing.assert_array_equal(out, jnp.full((1, 1, 2, K), 1e4))
    np.testing.assert_array_equal(pull(jnp.ones_like(out))[0], jnp.zeros_like(q))


def test_what_attention_keeps_for_its_gradient_is_of_its_dtype():
    """The largest of it, a weight for each query and key, is stored once."""
    q = jnp.zeros((1, 1, 64, K), jnp.bfloat16)
    _, pull = jax.vjp(lambda q: transformer.attend(q, q, q, None, None), q)
    large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size == 64 * 64]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_on_all_cores_changes_neither_product_nor_gradient():
    product = np.array([[3, 3, -np.inf], [np.inf, 0, -1], [0, 0, 0]], np.float32)
    found, pull = jax.vjp(transformer._on_all_cores, product)
    np.testing.assert_array_equal(found, product)
    g = random(3, 3)
    np.testing.assert_array_equal(pull(g)[0], g)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu(dtype):
    x = jnp.linspace(-8, 8, 4001).astype(dtype)
    exact = np.asarray(x, np.float64)
    found, pull = jax.vjp(transformer.gelu, x)
    (slope,) = pull(jnp.ones_like(x))
    assert found.dtype == slope.dtype == dtype
    tolerance = {"rtol": 2**-8, "atol": 1e-4} if dtype == jnp.bfloat16 else {"atol": 1e-6}
    norm = stats.norm
    expected = exact * norm.cdf(exact)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, **tolerance)
    expected = norm.cdf(exact) + exact * norm.pdf(exact)
    np.testing.assert_allclose(np.asarray(slope, np.float64), expected, **tolerance)


# axes of the input that are summed over; more inputs than outputs, and fewer
@pytest.mark.parametrize("ins, outs", [((8,), (3, 2, 4)), ((4, 6), (8,)), ((6,), (6,))])
def test_gradients_of_a_dense_layer(ins, outs):
    x, kernel, g = random(2, 5, *ins), random(*ins, *outs, seed=1), random(2, 5, *outs, seed=2)
    axes = len(ins)
    expected = (
        np.tensordot(g.astype(np.float64), kernel, [range(2, g.ndim), range(axes, kernel.ndim)]),
        np.tensordot(x.astype(np.float64), g, [(0, 1), (0, 1)]),
    )
    layer = transformer.DenseGeneral(outs, axis=tuple(range(-axes, 0)), use_bias=False)
    y, pull = jax.vjp(lambda x, w: layer.apply({"params": {"kernel": w}}, x), x, kernel)
    np.testing.assert_allclose(y, np.tensordot(x, kernel, axes), rtol=1e-5, atol=1e-5)
    ways = (pull(g), transformer._gradients(*map(jnp.asarray, (x, kernel, g)), axes))
    for found in ways:  # of this platform, and of those that are no CPU
        for a, e in zip(found, expected, strict=True):
            assert a.shape == e.shape
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_split_heads_and_its_gradient():
    qkv, g = random(2, 5, 3, H, K), random(3, 2, H, 5, K, seed=1)
    found, pull = jax.vjp(transformer.split_heads, qkv)
    for i, part in enumerate(found):
        np.testing.assert_array_equal(part, qkv[:, :, i].transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(pull(tuple(g))[0], g.transpose(1, 3, 0, 2, 4))


def test_groups_of_queries_are_those_of_all_together():
    """With a mask and dropout too, whose draws are those of all."""
    x, mask = random(2, 7, 12), np.arange(7)[None] < np.array([[7], [3]])
    init = nn.initializers.lecun_normal()
    whole = transformer.Attention(3, init, init, dropout=0.5)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = whole.init(rngs, x)
    (expected,) = whole.apply(variables, x, mask, rngs=rngs)
    groups = whole.clone(ends=(1, 4)).apply(variables, x, mask, rngs=rngs)
    assert [group.shape[1] for group in groups] == [1, 3, 3]
    np.testing.assert_allclose(jnp.concatenate(groups, axis=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ways", [{}, {"scan": True}, {"remat": True}], ids=["", "scan", "remat"])
def test_features_cost_no_work_that_only_the_map_needs(ways, monkeypatch):
    """In the last block the class token alone has attention and MLP, forward and backward."""
    d, tokens, depth = 64, 1 + 25, 3
    monkeypatch.setitem(vit.VARIANTS, "deep", vit.Size(d, depth, 4 * d, 2))
    model = vit.Model("deep/8", **ways)
    x = random(1, 40, 40, 3)
    variables = model.init(jax.random.key(0), x, train=False)

    def flops(of):
        def loss(variables):
            features, aux = model.apply(variables, x, train=True)
            used = (features, aux["feature_map"]) if "map" in of else (features,)
            return sum(jnp.sum(jnp.square(each)) for each in used)

        program = jax.jit(jax.grad(loss) if "grad" in of else loss)
        return program.lower(variables).compile().cost_analysis()["flops"]

    # of the other tokens: output and MLP of 1 + 8 squares of d, attention of two tokens x d
    saved = 2 * (tokens - 1) * (9 * d * d + 2 * tokens * d)
    assert flops("map") - flops("") >= saved
    assert flops("map, grad") - flops("grad") >= 3 * saved
