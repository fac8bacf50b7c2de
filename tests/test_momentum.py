"""The teacher and its queue, in C2L: what they become in a step, on any mesh, at what cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exactness import NoOptimiser, assert_same_everywhere, mesh_of
from test_c2l import fresh_state, make
from test_objectives import make_batch

from bigmed import sharding, tree
from bigmed.objectives import momentum
from bigmed.state import make_init
from bigmed.step import MicroBatches, loss_and_grads, make_train_step
from configs import common


def trained(objective, batch, steps=1, sizes=(1, 1, 1)):
    mesh = mesh_of(*sizes)
    init = make_init(objective, optax.sgd(0.1), batch, seed=0)
    before = jax.device_get(jax.jit(init)())
    shardings = sharding.tree_shardings(jax.eval_shape(init), mesh, objective.SHARDING)
    with jax.set_mesh(mesh):
        state = jax.device_put(before, shardings)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        step = make_train_step(objective, optax.sgd(0.1), None, mesh, shapes, MicroBatches())
        batch = sharding.put_batch(batch, sharding.batch_sharding(mesh))
        for number in range(steps):
            state, _ = step(state, batch, np.int32(number), np.bool_(False))
    return before, jax.device_get(state)


@pytest.fixture(autouse=True)
def _no_schedule(monkeypatch):
    monkeypatch.setattr("bigmed.optim.learning_rate", lambda *_: jnp.zeros(()))


def test_the_teacher_follows_the_updated_student_and_keeps_its_own_statistics():
    """And all that a resumed run needs is in the state."""
    before, after = trained(make(momentum=0.9), make_batch(1))
    assert set(after.extra) == {"teacher", "queue", "log_z"}
    assert int(after.extra["queue"]["place"]) == 3 * 16 and after.extra["log_z"] > 0
    assert not np.array_equal(after.extra["queue"]["keys"], before.extra["queue"]["keys"])
    old, new = tree.flatten(before.extra["teacher"]), tree.flatten(after.extra["teacher"])
    for name, leaf in tree.flatten(after.params).items():
        if name.startswith("probe"):
            continue
        want = 0.9 * old[f"teacher_{name}"] + 0.1 * leaf
        np.testing.assert_allclose(new[f"teacher_{name}"], want, rtol=1e-5, atol=1e-7)
    stats = after.batch_stats
    mine, its = (tree.flatten(stats[n]) for n in ("backbone", "teacher_backbone"))
    start = tree.flatten(before.batch_stats["backbone"])
    assert all(not np.array_equal(its[n], start[n]) for n in start)
    assert any(not np.array_equal(its[n], mine[n]) for n in start)


def test_loss_and_gradients_are_those_of_one_device():
    assert_same_everywhere(make(), make_batch(1))


@pytest.mark.parametrize(
    ("mode", "queue", "meshes"), [("infonce", "snapshot", ((2, 2, 2),)), ("nce", "sequential", ())]
)
def test_of_a_transformer_also_in_parts(mode, queue, meshes):
    objective = make(model=common.vit("mu/16"), mode=mode, queue=queue)
    assert_same_everywhere(objective, make_batch(1), meshes=meshes, parts=(4,))


def test_queue_and_teacher_after_a_step_are_those_of_one_device():
    """Also with statistics in groups. Keys in another order would differ by about 1."""
    objective = make(bn_groups=4, momentum=0.5, losses=("plain",))
    batch = make_batch(1)
    _, want = trained(objective, batch)
    _, got = trained(objective, batch, sizes=(2, 2, 2))
    for name, leaf in tree.flatten(want.extra).items():
        np.testing.assert_allclose(
            tree.flatten(got.extra)[name], leaf, rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_no_gradient_reaches_the_teacher():
    objective, batch = make(model=common.vit("mu/16")), make_batch(1)
    state = fresh_state(objective, batch)

    @jax.jit
    def grads(params, teacher):
        extra = {**state.extra, "teacher": teacher}
        return jax.grad(
            lambda p, t: objective.loss(
                p, state.batch_stats, {**extra, "teacher": t}, batch, jax.random.key(0), True
            )[0],
            (0, 1),
        )(params, teacher)

    of_student, of_teacher = grads(state.params, state.extra["teacher"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    assert np.any(of_student["backbone"]["patches"]["kernel"])


def test_the_teachers_features_are_a_representation():
    objective, batch = make(model=common.vit("mu/16")), make_batch(1)
    state = fresh_state(objective, batch)
    fns = objective.predict_fns()
    student, teacher = fns["encoder"](state, batch), fns["teacher"](state, batch)
    np.testing.assert_array_equal(student, teacher)  # it begins as its student
    moved = jax.tree.map(lambda x: x + 0.1, state.params["backbone"])
    state = state.replace(params={**state.params, "backbone": moved})
    np.testing.assert_array_equal(fns["teacher"](state, batch), teacher)
    assert np.any(fns["encoder"](state, batch) != student)


def count_collectives(text):
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    lines = text.splitlines()
    return {name: sum(f" {name}(" in line or f" {name}-start(" in line for line in lines)
            for name in names}  # fmt: skip


@pytest.mark.parametrize(
    ("queue", "active", "pushes"),
    [("snapshot", ("plain",), 1), ("sequential", ("plain", "feature_mix"), 2)],
)
def test_pushing_the_keys_costs_one_gather_each(monkeypatch, queue, active, pushes):
    """A step's collectives with the pushes and without them."""
    mesh, batch = mesh_of(8, 1, 1), make_batch(1)
    settings = {"losses": active, "queue": queue, "mode": "infonce"}
    objective = make(model=common.vit("mu/16"), **settings)
    init = make_init(objective, NoOptimiser, batch, seed=0)
    shardings = sharding.tree_shardings(jax.eval_shape(init), mesh, objective.SHARDING)

    def step(state, batch):
        (loss, aux), grads = loss_and_grads(objective, state, batch, MicroBatches())
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
        extra = objective.after_update(params, state.extra, aux["carry"], state.step)
        return loss, state.replace(params=params, batch_stats=aux["batch_stats"], extra=extra)

    def counted():
        with jax.set_mesh(mesh):
            out = (sharding.replicated(mesh), shardings)
            state = jax.device_put(jax.device_get(jax.jit(init)()), shardings)
            placed = sharding.put_batch(batch, sharding.batch_sharding(mesh))
            compiled = jax.jit(lambda *a: step(*a), out_shardings=out).lower(state, placed)
            return count_collectives(compiled.compile().as_text())

    pushing = counted()
    monkeypatch.setattr(momentum, "push", lambda queue, keys: queue)
    without = counted()
    assert pushing == {**without, "all-gather": without["all-gather"] + pushes}, (pushing, without)
