"""Losses in tiles: the dense numbers, gradients and diagnostics, on any mesh, in less memory."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactness import mesh_of, relative_difference

from bigmed import losses, sharding

N, D = 48, 16
GROUPS = np.arange(N, dtype=np.int32) // 3


def encoder(seed=0, n=N):
    """Inputs [N, 12] of two kinds and the weights that make vectors of them."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, 12)).astype(np.float32)
    weights = {
        "v": rng.normal(size=(12, D)).astype(np.float32),
        "u": rng.normal(size=(12, D)).astype(np.float32),
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


def digest(found):
    """A few numbers that tell whether a loss and its gradients are the same."""
    waves = [
        float(np.sum(g * np.cos(np.arange(g.size)).reshape(g.shape))) for g in found[3].values()
    ]
    return [float(found[0]), *waves]


def assert_close(got, want):
    np.testing.assert_allclose(got[:3], want[:3], rtol=2e-6, atol=1e-6)
    # float32 sums of 48 terms in another order: some ulps of the largest
    assert relative_difference(got[3], want[3]) < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_tiles_give_the_dense_numbers_on_any_mesh(name):
    data = encoder()
    want = run(name, data, tile=0)
    for tile, mesh in ((48, None), (16, None), (6, mesh_of(8, 1, 1)), (4, mesh_of(2, 2, 2))):
        assert_close(run(name, data, tile, mesh), want)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_scales_stay_finite_and_exact(scale):
    """The reference's bounds: 1e-5 of the gradient at 100, 2e-5 at 1000."""
    rng = np.random.default_rng(0)
    v, u = rng.normal(size=(2, 32, 8)).astype(np.float32)

    def loss(v, tile):
        return losses.infonce(v, u, scale=scale, tile=tile).loss

    got, want = (jax.value_and_grad(loss)(v, tile) for tile in (8, 0))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert np.isfinite(got[1]).all()
    assert relative_difference(got[1], want[1]) < (1e-5 if scale == 100 else 2e-5)


def test_infonce_and_its_gradient_equal_float64():
    x, y, weights = encoder()
    got = run("infonce_none", (x, y, weights), tile=16)

    def oracle(w):
        v, u = x.astype(np.float64) @ w["v"], y.astype(np.float64) @ w["u"]
        v, u = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (v, u))
        s = np.exp(w["log_scale"]) * v @ u.T
        rows = np.log(np.exp(s).sum(1)) - np.diag(s)
        columns = np.log(np.exp(s).sum(0)) - np.diag(s)
        return 0.75 * rows.mean() + 0.25 * columns.mean()

    doubles = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    np.testing.assert_allclose(got[0], oracle(doubles), rtol=1e-6)
    for name, index in (("v", (3, 5)), ("u", (7, 0)), ("log_scale", ())):
        moved = []
        for step in (1e-6, -1e-6):
            changed = {k: np.array(w) for k, w in doubles.items()}
            changed[name][index] += step
            moved.append(oracle(changed))
        slope = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(got[3][name][index], slope, rtol=1e-4, atol=1e-7)


def test_collapsed_embeddings_are_never_right():
    ones = np.ones((16, 4), np.float32)
    for tile in (0, 4):
        found = losses.infonce(ones, ones, scale=10.0, tile=tile)
        np.testing.assert_allclose(found.loss, np.log(16), rtol=1e-6)
        assert float(found.accuracy) == 0


def test_the_size_decides_and_odd_sizes_are_computed_at_once():
    mesh = mesh_of(8, 1, 1)
    assert losses._plan(1024, None, "none") is None
    assert losses._plan(4096, None, "none").tile == losses.TILE
    assert losses._plan(4099, None, "none") is None  # a prime: no tile fits
    with jax.set_mesh(mesh):
        assert losses._plan(4096, None, "none") is None  # 512 rows a device
        plan = losses._plan(16384, None, "none")
        assert plan.tile == losses.TILE and plan.mesh is not None
        assert losses._plan(16384 + 4, 4, "none") is None  # not over 8 devices


def peak_mib(n, d, tile=None):
    mesh = mesh_of(8, 1, 1)
    shape = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def loss(v, u):
        return losses.infonce(v, u, scale=10.0, weight=0.75, tile=tile).loss

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def test_memory_is_small_and_linear_in_the_batch():
    small, large = peak_mib(16384, 128), peak_mib(65536, 128)
    assert large < 32 and large < 4.5 * small
    assert peak_mib(4096, 128, tile=0) > peak_mib(4096, 128, tile=128)


CHILD = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
import test_tiled
mesh = test_tiled.sharding.make_mesh({"data": 2})
for name in test_tiled.IN_TWO_PROCESSES:
    print(name, *map(repr, test_tiled.digest(test_tiled.run(name, test_tiled.encoder(), 8, mesh))))
"""
IN_TWO_PROCESSES = ("ntxent_groups", "infonce_multi", "sigmoid_mask")


def test_two_processes_give_the_numbers_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = pathlib.Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "JAX_NUM_CPU_DEVICES": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(port), str(i)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [child.communicate(timeout=180) for child in children]
    assert all(child.returncode == 0 for child in children), said[0][1][-2000:]
    lines = [line for line in said[0][0].splitlines() if not line.startswith("[")]  # Gloo's
    assert [line.split()[0] for line in lines] == list(IN_TWO_PROCESSES)
    for line in lines:
        name, *numbers = line.split()
        want = digest(run(name, encoder(), tile=0))
        np.testing.assert_allclose([float(x) for x in numbers], want, rtol=2e-5)
