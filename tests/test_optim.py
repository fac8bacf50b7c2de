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
    "milestones": (),
    "decay": 0.1,
    "patience": 5,
    "nesterov": True,
    "weight_decay": 1e-4,
    "momentum": 0.9,
    "b1": 0.9,
    "b2": 0.999,
    "grad_clip_norm": 0.0,
    "layer_decay": 1.0,
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
        {**BASE, "lr": 0.3, "lr_scaling": "linear", "warmup_steps": 3127, "schedule": "cosine"},
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


def test_the_rate_falls_by_steps_after_each_milestone():
    """C2L: 120 epochs, x0.1 after epochs 60, 80 and 100 (here 10 steps an epoch), and warm-up."""
    config = {**BASE, "lr": 0.03, "schedule": "steps", "milestones": (1 / 2, 2 / 3, 5 / 6)}
    schedule = optim.make_schedule(config, batch_size=128, total_steps=1200)
    for step, want in (
        (0, 0.03), (599, 0.03), (600, 0.003), (799, 0.003), (800, 3e-4), (1000, 3e-5), (1199, 3e-5)
    ):  # fmt: skip
        np.testing.assert_allclose(schedule(step), want, rtol=1e-6, err_msg=step)
    warm = optim.make_schedule({**config, "warmup_steps": 100}, batch_size=128, total_steps=1200)
    np.testing.assert_allclose([warm(599), warm(600)], [0.03, 0.003], rtol=1e-6)
    short = optim.make_schedule(config, batch_size=128, total_steps=3)  # two of them meet
    np.testing.assert_allclose(short(2), 3e-5, rtol=1e-6)


def test_plateau_halves_the_rate_after_so_many_validations_without_a_decrease():
    tx, schedule = make(name="sgd", lr=1.0, schedule="plateau", decay=0.5, momentum=0.0)
    state = tx.init(PARAMS)
    config = {**BASE, "decay": 0.5, "patience": 3}
    rates = []
    for loss in (3.0, 2.0, 2.5, 2.0, np.nan, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0):
        state = optim.observe(config, state, jnp.float32(loss))
        rates.append(float(optim.learning_rate(schedule, state)))
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    updates, _ = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["probe"]["bias"], -0.125 * GRADS["probe"]["bias"], rtol=1e-6)


def test_adam_and_plain_sgd_equal_torch():
    import torch

    for name, rate in (("adam", 1e-2), ("sgd", 1e-2)):
        got, _ = run(5, name=name, lr=rate, weight_decay=0.1, nesterov=False)
        weight = torch.tensor([3.0, 4.0], requires_grad=True)
        maker = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
        more = {"momentum": 0.9} if name == "sgd" else {}
        theirs = maker([weight], lr=rate, weight_decay=0.1, **more)
        for i in range(5):
            grad = np.asarray(GRADS["backbone"]["conv"]["kernel"]) * (1 + 0.1 * i)
            weight.grad = torch.tensor(grad)
            theirs.step()
        np.testing.assert_allclose(
            got["backbone"]["conv"]["kernel"], weight.detach().numpy(), rtol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("name", ["lars", "sgd", "adam", "adamw", "lamb"])
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
        ({"milestones": (60, 80)}, "fractions of the stage"),
        ({"decay": 0.0}, "above 0"),
        ({"freeze": ("nothing/.*",)}, "matches no parameter"),
        ({"rules": ((".*/kernel", "adapted"),)}, "matches no rule"),
        ({"rules": ((".*", "plain"), (".*/bias", "plain"))}, "exactly one"),
        ({"rules": ((".*", "decayed"),)}, "config.optim.rules role"),
    ],
)
def test_mistakes_are_named(overrides, said):
    with pytest.raises(UserError, match=said):
        make(**overrides)
