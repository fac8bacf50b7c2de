"""BYOL: its loss, its teacher's schedule, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from exactness import NoOptimiser, assert_same, evaluate, mesh_of
from ml_collections import ConfigDict
from test_objectives import DATA, make_batch

from bigmed import tree
from bigmed.objectives import byol
from bigmed.state import make_init
from configs import common


def make(model=None, **overrides):
    config = common.base()
    config.model = model or ConfigDict({"name": "tiny_model:Model", "variant": "mu/16"})
    config.augment = common.augmentation("natural", 16)
    config.data.channels = 3
    settings = {"head_hidden": 32, "head_dim": 16, "momentum_steps": 100, **overrides}
    config.objective = common.byol_objective(**settings)
    return byol.Objective(config.lock(), DATA)


def test_the_loss_is_the_definition_in_float64():
    objective, batch = make(), make_batch(1)
    state = jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()
    rng = np.random.default_rng(0)
    features = byol.Features(*rng.normal(size=(2, 16, 2, 64)).astype(np.float32))
    _, aux = objective.compare(
        state.params, state.batch_stats, state.extra, features, batch, jax.random.key(0), True
    )

    def head(weights, x):
        w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
        x = x @ w["dense1"]["kernel"] + w["dense1"]["bias"]
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = np.maximum(x * w["norm1"]["scale"] + w["norm1"]["bias"], 0)
        return x @ w["dense2"]["kernel"]

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    total = 0.0
    for view in range(2):
        z = head(state.params["head"], features.student[:, view].astype(np.float64))
        p = unit(head(state.params["predictor"], z))
        other = features.teacher[:, 1 - view].astype(np.float64)
        t = unit(head(state.extra["teacher"]["teacher_head"], other))
        total += np.mean(np.sum((p - t) ** 2, axis=1))
    np.testing.assert_allclose(aux["metrics"]["prediction_loss"], total, rtol=1e-5)


def test_the_teachers_momentum_rises_to_one_as_a_cosine():
    objective = make()
    for step, want in ((0, 0.996), (50, 0.998), (100, 1.0), (200, 1.0)):
        np.testing.assert_allclose(objective.momentum(jnp.asarray(step)), want, rtol=1e-6)
    constant = make(momentum_schedule="constant")
    assert constant.momentum(jnp.asarray(70)) == 0.996


def test_the_teacher_gets_no_gradient_and_all_else_does():
    _, _, stats, grads = evaluate(make(), make_batch(1), mesh_of(1, 1, 1))
    assert set(grads) == {"backbone", "head", "predictor", "probe"}
    kernels = {n: g for n, g in tree.flatten(grads).items() if n.endswith("kernel")}
    for name, gradient in kernels.items():  # a residual branch's last scale starts at zero
        assert np.any(gradient) != (name.startswith("backbone/block/conv")), name
    assert set(stats) == {
        "backbone", "head", "predictor", "teacher_backbone", "teacher_head"
    }  # fmt: skip


def test_loss_and_gradients_are_those_of_one_device():
    objective, batch, one = make(), make_batch(1), mesh_of(1, 1, 1)
    want, nudged = evaluate(objective, batch, one), evaluate(objective, batch, one, nudge=True)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        assert_same(evaluate(objective, batch, mesh_of(*sizes)), want, nudged)


def test_in_parts_is_the_whole_batch():
    """The heads' batch norms see the whole batch; the backbone has none."""
    objective, batch, one = make(model=common.vit("mu/16")), make_batch(1), mesh_of(1, 1, 1)
    want, nudged = evaluate(objective, batch, one), evaluate(objective, batch, one, nudge=True)
    assert_same(evaluate(objective, batch, one, count=4), want, nudged)
