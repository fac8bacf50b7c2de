"""Optimisers against the published golden step and a NumPy oracle; schedules, roles, freezing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigmed import optim, tree
from bigmed.errors import UserError

BASE = {
    "name": "lars",
    "lr": 4.8,
    "lr_scaling": "none",
    "warmup_steps": 0,
    "schedule": "constant",
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "b1": 0.9,
    "b2": 0.999,
    "grad_clip_norm": 0.0,
    "rules": (),
    "freeze": (),
}
PARAMS = {
    "backbone": {
        "conv": {"kernel": jnp.array([3.0, 4.0])},
        "norm": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5, -0.5])},
    },
    "probe": {"kernel": jnp.array([0.1, 0.2]), "bias": jnp.array([0.3])},
}
GRADS = jax.tree.map(lambda p: 0.3 * jnp.cos(7 * p), PARAMS)


def make(params=PARAMS, **overrides):
    return optim.make_optimizer({**BASE, **overrides}, params, batch_size=256, total_steps=100)


def run(steps=5, params=PARAMS, **overrides):
    tx, _ = make(params, **overrides)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda g, i=i: g * (1 + 0.1 * i), GRADS)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_lars_golden_step():
    """The reference's step: w=(3,4), g=(.6,.8), wd 1e-4, lr 4.8, m .9, v0=(.1,-.1)."""
    params = {"backbone": {"kernel": jnp.array([3.0, 4.0])}}
    tx, _ = make(params)
    state = tx.init(params)
    # optax keeps the buffer with the opposite sign of "w <- w - v".
    state = jax.tree.map(
        lambda leaf: jnp.array([-0.1, 0.1]) if getattr(leaf, "shape", None) == (2,) else leaf, state
    )
    updates, _ = tx.update({"backbone": {"kernel": jnp.array([0.6, 0.8])}}, state, params)
    new = optax.apply_updates(params, updates)["backbone"]["kernel"]
    np.testing.assert_allclose(new, [2.8956, 4.0708], atol=2e-5)
    np.testing.assert_allclose(-updates["backbone"]["kernel"], [0.1044, -0.0708], atol=2e-5)


def lars_oracle(steps):
    """The released SimCLR LARS in float64, excluded variables as plain momentum SGD."""
    weights = {k: np.asarray(v, np.float64) for k, v in tree.flatten(PARAMS).items()}
    buffers = {k: np.zeros_like(v) for k, v in weights.items()}
    for i in range(steps):
        for name, grad in tree.flatten(GRADS).items():
            w, g = weights[name], np.asarray(grad, np.float64) * (1 + 0.1 * i)
            trust = 1.0
            if name == "backbone/conv/kernel":
                g = g + 1e-4 * w
                trust = 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
            buffers[name] = 0.9 * buffers[name] + 4.8 * trust * g
            weights[name] = w - buffers[name]
    return weights


def test_lars_equals_oracle_over_steps():
    got = tree.flatten(run()[0])
    for name, want in lars_oracle(5).items():
        np.testing.assert_allclose(got[name], want, rtol=3e-5, err_msg=name)


def test_adamw_sgd_lamb_equal_oracles():
    """One step of each by hand: Adam's first step is g/(|g|+eps)."""
    flat, grads = tree.flatten(PARAMS), tree.flatten(GRADS)
    for name, lr, decay in (("adamw", 0.01, 0.1), ("sgd", 0.01, 0.1), ("lamb", 0.01, 0.1)):
        got = tree.flatten(run(1, name=name, lr=lr, weight_decay=decay)[0])
        for path in flat:
            w, g = np.asarray(flat[path], np.float64), np.asarray(grads[path], np.float64)
            wd = decay * (path == "backbone/conv/kernel")
            eps = {"adamw": 1e-8, "lamb": 1e-6, "sgd": 0}[name]
            if name == "sgd":  # Nesterov's first step with momentum .9
                update = 1.9 * (g + wd * w)
            else:
                update = g / (np.abs(g) + eps) + wd * w
            if name == "lamb" and wd:
                update *= np.linalg.norm(w) / np.linalg.norm(update)
            np.testing.assert_allclose(
                got[path], w - lr * update, rtol=2e-5, err_msg=f"{name} {path}"
            )


def test_simclr_schedule_golden():
    """n=1281167, B=4096, 100 epochs, linear .3: the checked points of the reference."""
    schedule = optim.make_schedule(
        {"lr": 0.3, "lr_scaling": "linear", "warmup_steps": 3127, "schedule": "cosine"},
        batch_size=4096,
        total_steps=31279,
    )
    for step, want in ((0, 0.0), (1, 0.001535), (3127, 4.8), (15639, 2.816756), (31279, 0.0)):
        np.testing.assert_allclose(schedule(step), want, atol=2e-6)


def test_lr_scaling_rules():
    for scaling, want in (("none", 0.1), ("linear", 1.6), ("sqrt", 6.4)):
        config = {**BASE, "lr": 0.1, "lr_scaling": scaling}
        schedule = optim.make_schedule(config, batch_size=4096, total_steps=10)
        np.testing.assert_allclose(schedule(0), want, rtol=1e-6)


def test_gradient_clipping_bounds_the_update():
    huge = jax.tree.map(lambda g: g * 1e6, GRADS)
    tx, _ = make(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip_norm=0.5)
    updates, _ = tx.update(huge, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "lamb"])
def test_frozen_parameters_do_not_move_and_hold_no_state(name):
    pattern = "backbone/.*"
    params, state = run(name=name, freeze=(pattern,))
    moved = {
        path: not np.array_equal(leaf, tree.flatten(PARAMS)[path])
        for path, leaf in tree.flatten(params).items()
    }
    assert moved == {path: path.startswith("probe/") for path in moved}
    assert not [path for path in tree.flatten(state) if "backbone" in path]


def test_frozen_gradients_do_not_count_for_clipping():
    tx, _ = make(name="sgd", lr=1.0, momentum=0.0, grad_clip_norm=1.0, freeze=("backbone/.*",))
    grads = {**GRADS, "backbone": jax.tree.map(lambda g: g * 1e6, GRADS["backbone"])}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["probe"]["bias"], -GRADS["probe"]["bias"], rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"name": "larz"}, "did you mean 'lars'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr_scaling": "root"}, "valid: linear, none, sqrt"),
        ({"warmup_steps": 101}, "use 0 to 100"),
        ({"freeze": ("nothing/.*",)}, "matches no parameter"),
        ({"rules": ((".*/kernel", "adapted"),)}, "matches no rule"),
        ({"rules": ((".*", "plain"), (".*/bias", "plain"))}, "exactly one"),
        ({"rules": ((".*", "decayed"),)}, "config.optim.rules role"),
    ],
)
def test_mistakes_are_named(overrides, said):
    with pytest.raises(UserError, match=said):
        make(**overrides)
