"""Losses in tiles: float64's numbers, on any mesh, and the dense ones', in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pair_oracle
import pytest
from exactness import mesh_of, relative_difference
from processes import run_two

from bigmed import losses, sharding

N, D = 24, 8
GROUPS = np.arange(N, dtype=np.int32) * 5 % 7  # of 3 or 4 items each, on several devices
OF_U = np.arange(N, dtype=np.int32) * 3 % 8  # where v and u have ids of their own


def encoder(seed=0, n=N):
    """Inputs [N, 6] of two kinds and the weights that make vectors of them."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, 6)).astype(np.float32)
    weights = {
        "v": rng.normal(size=(6, D)).astype(np.float32),
        "u": rng.normal(size=(6, D)).astype(np.float32),
        "log_scale": np.float32(1.2),
        "bias": np.float32(-2.0),
    }
    return x, y + 0.5 * x, weights


CASES = {
    "ntxent": lambda v, u, w, ids, **k: losses.ntxent(v, u, temperature=0.2, **k),
    "ntxent_groups": lambda v, u, w, ids, **k: losses.ntxent(
        v, u, temperature=0.2, groups=ids, **k
    ),
    "ntxent_raw": lambda v, u, w, ids, **k: losses.ntxent(
        v, u, temperature=9.0, hidden_norm=False, reduction="sum", **k
    ),
    **{
        f"infonce_{d}": lambda v, u, w, ids, d=d, **k: losses.infonce(
            v, u, scale=jnp.exp(w["log_scale"]), weight=0.75, ids=ids, duplicates=d, **k
        )
        for d in ("none", "mask", "multi")
    },
    **{
        f"infonce_{d}_each": lambda v, u, w, ids, d=d, **k: losses.infonce(
            v, u, scale=jnp.exp(w["log_scale"]), weight=0.75, ids=(ids, OF_U), duplicates=d, **k
        )
        for d in ("mask", "multi")
    },
    **{
        f"sigmoid_{d}": lambda v, u, w, ids, d=d, **k: losses.sigmoid(
            v, u, scale=jnp.exp(w["log_scale"]), bias=w["bias"], ids=ids, duplicates=d, **k
        )
        for d in ("none", "mask", "multi")
    },
}


def run(name, data, tile, mesh=None):
    """(loss, accuracy, entropy, gradients by the encoder's weights); the rows are placed here."""
    x, y, weights = data

    def loss(weights, x, y):
        ids = jnp.asarray(GROUPS)
        found = CASES[name](x @ weights["v"], y @ weights["u"], weights, ids, tile=tile)
        return found.loss, (found.accuracy, found.entropy)

    if mesh is None:
        (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights, x, y)
        return jax.device_get((value, *aux, grads))
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    mine = slice(None)
    if jax.process_count() > 1:
        share = N // jax.process_count()
        mine = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    x, y = (jax.make_array_from_process_local_data(rows, a[mine]) for a in (x, y))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=everywhere)
        (value, aux), grads = step(weights, x, y)
    return jax.device_get((value, *aux, grads))


def oracle(name, data):
    """(loss, gradients by the encoder's weights) in float64."""
    x, y, weights = data
    kind, _, option = name.removesuffix("_each").partition("_")
    ids = (GROUPS, OF_U) if name.endswith("_each") else GROUPS

    def loss(w):
        v, u = x.astype(np.float64) @ w["v"], y.astype(np.float64) @ w["u"]
        scale = np.exp(w["log_scale"])
        if kind == "infonce":
            return pair_oracle.infonce(v, u, scale, 0.75, ids, option)
        if kind == "sigmoid":
            return pair_oracle.sigmoid(v, u, scale, w["bias"], GROUPS, option)
        if option == "raw":
            return 2 * pair_oracle.ntxent(v, u, 9.0, np.arange(N), normalise=False)
        return pair_oracle.ntxent(v, u, 0.2, GROUPS if option == "groups" else np.arange(N))

    return pair_oracle.value_and_grad(loss, weights)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_float64_at_once_and_in_tiles_on_any_mesh(name):
    """To 1e-6: losses, gradients and the largest entry of each weight.

    The gradients by scale and bias sum slopes of both signs over all pairs, and are right to some
    2^-24 of the sum of their magnitudes. That is at most 2 for a softmax less one positive, and the
    loss itself for sigmoids, as 1 - sigmoid(z) <= -log sigmoid(z).
    """
    data = encoder()
    loss, gradients = oracle(name, data)
    of_sums = 4 * 2**-24 * max(2, loss)
    dense = run(name, data, tile=0)
    # also in tiles that do not divide the 24 or 3 rows of a device: of 5 and 2
    places = ((8, None), (5, None), (2, mesh_of(8, 1, 1)), (3, mesh_of(2, 2, 2)))
    for got in (dense, *(run(name, data, *place) for place in places)):
        np.testing.assert_allclose(got[0], loss, rtol=1e-6)
        assert relative_difference(got[3], gradients) < 1e-6
        for leaf, want in gradients.items():
            allowed = 1e-6 * np.abs(want).max() if want.ndim else of_sums
            np.testing.assert_allclose(got[3][leaf], want, atol=allowed)
        np.testing.assert_allclose(got[1:3], dense[1:3], rtol=1e-6)


AT_SCALE = {
    "infonce": (
        lambda v, u, s, **k: losses.infonce(v, u, scale=s, **k).loss,
        lambda v, u, s: pair_oracle.infonce(v, u, s, 0.5, np.arange(32), "none"),
    ),
    "sigmoid": (
        lambda v, u, s, **k: losses.sigmoid(v, u, scale=s, bias=-5.0, **k).loss,
        lambda v, u, s: pair_oracle.sigmoid(v, u, s, -5.0, np.arange(32), "none"),
    ),
    "ntxent": (
        lambda v, u, s, **k: losses.ntxent(v, u, temperature=1 / s, **k).loss,
        lambda v, u, s: pair_oracle.ntxent(v, u, 1 / s, np.arange(32)),
    ),
}


@pytest.mark.parametrize("name", AT_SCALE)
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_scales_stay_finite_and_accurate(name, scale):
    """A cosine is off by some 2^-24, a logit by scale times as much, and so is, relatively, a
    softmax: 6e-6 of the gradient at 100, 6e-5 at 1000, at once as in tiles."""
    v, u = np.random.default_rng(0).normal(size=(2, 32, 8)).astype(np.float32)
    ours, definition = AT_SCALE[name]
    loss, gradients = pair_oracle.value_and_grad(
        lambda w: definition(w["v"], w["u"], scale), {"v": v, "u": u}
    )
    for tile in (0, 8):
        got = jax.jit(
            jax.value_and_grad(lambda w, tile=tile: ours(w["v"], w["u"], scale, tile=tile))
        )({"v": v, "u": u})
        np.testing.assert_allclose(got[0], loss, rtol=1e-6)
        assert relative_difference(got[1], gradients) < scale * 2**-24


def test_rows_too_short_to_normalise_and_rows_of_zeros():
    v, u = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)
    v[3], v[5] = 0, v[5] * 1e-7

    def loss(v, tile):
        return losses.infonce(v, u, scale=5.0, tile=tile).loss

    got, want = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(v, t) for t in (4, 0))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for of_one, of_row in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(of_one, of_row, atol=2e-6 * np.abs(of_row).max())


@pytest.mark.parametrize("name", ["infonce_mask", "ntxent_groups"])
def test_items_of_one_group_have_nothing_to_tell_apart(name):
    v, u = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)

    def loss(v, tile):
        weights, one_group = {"log_scale": 0.0}, jnp.zeros(16, jnp.int32)
        return CASES[name](v, u, weights, one_group, tile=tile).loss

    for tile in (0, 4):
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(v, tile)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_collapsed_embeddings_are_never_right():
    ones = np.ones((16, 4), np.float32)
    for tile in (0, 4):
        found = losses.infonce(ones, ones, scale=10.0, tile=tile)
        np.testing.assert_allclose(found.loss, np.log(16), rtol=1e-6)
        assert float(found.accuracy) == 0


def test_the_size_decides_and_any_number_of_rows_makes_tiles():
    assert losses._plan(1024, None, "none") is None
    assert losses._plan(4096, None, "none").tile == losses.TILE
    assert losses._plan(4099, None, "none").tile == 820  # a prime: 5 tiles with a row of padding
    assert losses._plan(4099, 0, "none") is None
    with jax.set_mesh(mesh_of(8, 1, 1)):
        assert losses._plan(4096, None, "none") is None  # 512 rows a device
        plan = losses._plan(16384, None, "none")
        assert plan.tile == losses.TILE and plan.mesh is not None
        assert losses._plan(8 * 2053, None, "none").tile == 685
        assert losses._plan(16384 + 4, 4, "none") is None  # not over 8 devices


def peak_mib(name, n, d, tile=None):
    mesh = mesh_of(8, 1, 1)
    shape = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=sharding.batch_sharding(mesh))
    ids = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def loss(v, u, ids):
        return CASES[name](v, u, {"log_scale": 2.3, "bias": -9.0}, ids, tile=tile).loss

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(shape, shape, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.parametrize("name", ["ntxent_groups", "infonce_multi", "sigmoid_mask"])
def test_memory_is_small_and_linear_in_the_batch(name):
    small, large = peak_mib(name, 16384, 128), peak_mib(name, 65536, 128)
    assert large < 32 and large < 4.2 * small
    assert peak_mib(name, 65536, 512) < 72
    assert peak_mib(name, 8 * 8209, 128) < 32  # a prime number of rows a device
    assert peak_mib(name, 4096, 128, tile=0) > peak_mib(name, 4096, 128, tile=128)


IN_TWO_PROCESSES = ("ntxent_groups", "infonce_multi", "sigmoid_mask")
CHILD = """
import numpy, test_tiled
mesh = test_tiled.sharding.make_mesh({"data": 2})
for name in test_tiled.IN_TWO_PROCESSES:
    *values, gradients = test_tiled.run(name, test_tiled.encoder(), 8, mesh)
    numpy.savez(f"{sys.argv[1]}/{name}_{jax.process_index()}.npz", values=values, **gradients)
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    run_two(CHILD, tmp_path)
    for name in IN_TWO_PROCESSES:
        *values, gradients = run(name, encoder(), tile=8)
        for i in range(2):
            got = dict(np.load(tmp_path / f"{name}_{i}.npz"))
            np.testing.assert_allclose(got.pop("values"), values, rtol=1e-6)
            assert got.keys() == gradients.keys()
            for leaf, want in gradients.items():
                np.testing.assert_allclose(got[leaf], want, atol=1e-6 * np.abs(want).max())
