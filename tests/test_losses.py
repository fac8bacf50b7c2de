"""NT-Xent against golden values and a float64 oracle; sharded equality; diagnostics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactness import relative_difference
from jax.sharding import NamedSharding, PartitionSpec

from bigmed import losses, sharding

Z1 = np.array([(1, 0, 0), (0, 2, 0)], np.float32)
Z2 = np.array([(1, 1, 0), (0, 1, 1)], np.float32)
GOLDEN = {
    0.1: ([0.001697, 0.693572, 0.754266, 0.119471], 0.392252, 0.784503),
    0.5: ([0.396245, 0.807866, 0.978649, 0.643945], 0.706676, 1.413353),
    1.0: ([0.686192, 0.913514, 1.034228, 0.835515], 0.867362, 1.734724),
}


@pytest.mark.parametrize("temperature", GOLDEN)
def test_golden_values(temperature):
    rows, paper, code = GOLDEN[temperature]
    got = losses.ntxent(Z1, Z2, temperature=temperature)
    np.testing.assert_allclose(got.rows.ravel(), rows, atol=1e-6)  # they have six digits
    np.testing.assert_allclose(got.loss, paper, atol=1e-6)
    doubled = losses.ntxent(Z1, Z2, temperature=temperature, reduction="sum")
    np.testing.assert_allclose(doubled.loss, code, atol=1e-6)


def oracle(a, b, temperature, groups=None, normalise=True):
    """Row by row in float64, from the definition."""
    z = np.concatenate([a, b]).astype(np.float64)
    if normalise:
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    n = len(a)
    groups = np.arange(n) if groups is None else groups
    total = 0.0
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = [
            k for k in range(2 * n) if k == positive or groups[k % n] != groups[i % n]
        ]
        exps = {k: np.exp(z[i] @ z[k] / temperature) for k in others}
        total -= np.log(exps[positive] / sum(exps.values()))
    return total / (2 * n)


def embeddings(n=16, d=8, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, d)).astype(np.float32)
    return a, (a + 0.7 * rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("hidden_norm", [True, False])
def test_equals_definition(hidden_norm):
    a, b = embeddings()
    got = losses.ntxent(a, b, temperature=0.5, hidden_norm=hidden_norm)
    np.testing.assert_allclose(got.loss, oracle(a, b, 0.5, normalise=hidden_norm), rtol=1e-6)


def test_groups_are_no_negatives_of_each_other():
    a, b = embeddings()
    groups = np.arange(16) // 3
    got = losses.ntxent(a, b, temperature=0.2, groups=jnp.asarray(groups))
    np.testing.assert_allclose(got.loss, oracle(a, b, 0.2, groups), rtol=1e-6)
    gradient = jax.grad(
        lambda a: losses.ntxent(a, b, temperature=0.2, groups=jnp.asarray(groups)).loss
    )(a)
    assert np.isfinite(gradient).all()


def test_equal_embeddings_give_log_of_candidates():
    ones = np.ones((8, 4), np.float32)
    got = losses.ntxent(ones, ones, temperature=0.1)
    np.testing.assert_allclose(got.loss, np.log(15), rtol=1e-6)
    np.testing.assert_allclose(got.entropy, np.log(8), rtol=1e-5)


def test_small_temperature_stays_finite():
    a, b = embeddings()
    value, gradient = jax.value_and_grad(lambda a: losses.ntxent(a, b, temperature=1e-3).loss)(a)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_loss_and_gradient_equal_on_any_mesh(shape):
    a, b = embeddings(n=32, d=16)

    def value_and_grad(a, b):
        return jax.value_and_grad(
            lambda a, b: losses.ntxent(a, b, temperature=0.1).loss, argnums=(0, 1)
        )(a, b)

    want = jax.jit(value_and_grad)(a, b)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        got = jax.jit(value_and_grad)(jax.device_put(a, rows), jax.device_put(b, rows))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert relative_difference(got[1], want[1]) < 1e-6


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (losses.ntxent, {"temperature": 0.1, "reduction": "max"}),
        (losses.ntxent, {"temperature": 0.1, "tile": -1}),
        (losses.infonce, {"scale": 1.0, "duplicates": "positive", "ids": np.arange(16)}),
        (losses.sigmoid, {"scale": 1.0, "bias": 0.0, "duplicates": "multi"}),
    ],
)
def test_settings_that_mean_nothing_are_refused(loss, settings):
    with pytest.raises(ValueError, match="reduction|tile|duplicates"):
        loss(*embeddings(), **settings)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3, 1), (4, 3, 1))])
def test_what_is_no_pairs_is_refused(shapes):
    v, u = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match="no pairs"):
        losses.infonce(v, u, scale=1.0)


def test_embedding_health_tells_collapse_from_spread():
    spread = losses.embedding_health(np.random.default_rng(0).normal(size=(4096, 32)))
    assert 0.95 < spread["feature_std"] < 1.05 and spread["effective_rank"] > 30
    line = losses.embedding_health(np.outer(np.linspace(-1, 1, 64), np.ones(32)))
    assert line["effective_rank"] < 1.01
    assert losses.embedding_health(np.ones((64, 32)))["feature_std"] < 1e-3


def test_classification_leaves_out_missing_labels():
    logits = np.array([[2.0, 0.0], [0.0, 3.0], [9.0, 0.0]], np.float32)
    one_hot = np.array([[1, 0], [1, 0], [-2, -2]])
    loss, accuracy = losses.classification(logits, one_hot, "single_label")
    want = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(3.0))])
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(accuracy, 0.5)
    several = np.array([[1, -1], [0, -2], [1, 0]])
    loss, accuracy = losses.classification(logits, several, "multi_label")
    want = np.mean([np.log1p(np.exp(-2.0)), np.log(2.0), np.log1p(np.exp(-9.0)), np.log(2.0)])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(accuracy, 1.0)
