"""The loss and gradient of an objective on a mesh, and when two of them are the same number.

Two ways to compute one gradient differ by how they round. How much that may be is not chosen but
measured: it is what becomes of the gradient when every parameter moves by one unit in its last
place, which no implementation can tell from its own rounding. Activations and sums are rounded in
more places than parameters, so a small multiple of it is allowed.
"""

import jax
import numpy as np

from bigmed import sharding
from bigmed.state import make_init
from bigmed.step import MicroBatches, loss_and_grads

ROUNDINGS = 4


class NoOptimiser:
    @staticmethod
    def init(params):
        del params
        return ()


def mesh_of(*sizes):
    count = int(np.prod(sizes))
    return sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[:count]
    )


def evaluate(objective, batch, mesh, **micro):
    """(loss, metrics, statistics, gradients) of a fresh state, computed on the mesh."""
    return evaluator(objective, batch, mesh, **micro)()


def evaluator(objective, batch, mesh, fresh=None, **micro):
    """A function that does what `evaluate` does, to be compiled once; `fresh` is another state.

    With `nudge` every parameter is first moved by one unit in its last place, up or down.
    """
    init = make_init(objective, NoOptimiser, batch, seed=0)
    fresh = fresh or jax.device_get(jax.jit(init)())
    shardings = sharding.tree_shardings(jax.eval_shape(init), mesh, objective.SHARDING)
    block, num_blocks = sharding.host_block(mesh)
    mine = {name: np.split(rows, num_blocks)[block] for name, rows in batch.items()}

    def place(leaf, where):
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    def found(state, batch):
        (loss, aux), grads = loss_and_grads(objective, state, batch, MicroBatches(**micro))
        return loss, aux["metrics"], aux["batch_stats"], grads

    found = jax.jit(found, out_shardings=sharding.replicated(mesh))

    def run(nudge=False):
        state = fresh.replace(params=nudged(fresh.params)) if nudge else fresh
        with jax.set_mesh(mesh):
            state = jax.tree.map(place, state, shardings)
            placed = sharding.put_batch(mine, sharding.batch_sharding(mesh))
            return jax.device_get(found(state, placed))

    return run


def nudged(params):
    """Every parameter moved by one unit in its last place, up or down."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(x * (1 + rng.choice([-1, 1], x.shape) * 2.0**-23)), params
    )


def relative_difference(got, want):
    """Norm of the difference of two trees, of the norm of the second; float64."""
    got, want = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])
        for t in (got, want)
    )
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def assert_same(got, want, nudged):
    """Losses to 1e-6, statistics and gradients to rounding, by what `nudged` makes of them."""
    np.testing.assert_allclose(got[0], want[0], rtol=max(1e-6, ROUNDINGS * _relative(nudged, want)))
    for part in (2, 3):
        if jax.tree.leaves(want[part]):
            allowed = max(1e-6, ROUNDINGS * relative_difference(nudged[part], want[part]))
            assert relative_difference(got[part], want[part]) <= allowed


def assert_same_everywhere(objective, batch, meshes=((2, 2, 2),), parts=()):
    """On other meshes and in so many parts all is as on one device at once; returns the latter."""
    one = mesh_of(1, 1, 1)
    at_once = evaluator(objective, batch, one)
    want, nudged = at_once(), at_once(nudge=True)
    ways = [(mesh_of(*sizes), 1) for sizes in meshes] + [(one, count) for count in parts]
    for mesh, count in ways:
        got = evaluate(objective, batch, mesh, count=count)
        assert_same(got, want, nudged)
        for name, value in want[1].items():
            np.testing.assert_allclose(got[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    return want


def _relative(got, want):
    return abs(float(got[0]) - float(want[0])) / abs(float(want[0]))
