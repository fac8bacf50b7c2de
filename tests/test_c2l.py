"""C2L and MoCo: the published algorithm's numbers, its queue and teacher, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exactness import NoOptimiser, assert_same, evaluate, mesh_of
from ml_collections import ConfigDict
from test_objectives import DATA, make_batch

from bigmed import checkpoint, curriculum, losses, tree
from bigmed.errors import UserError
from bigmed.objectives import base, c2l, momentum
from bigmed.state import make_init
from bigmed.step import MicroBatches, make_train_step
from configs import common, quickstart

SPEC = base.DataSpec(DATA.class_names, DATA.task, num_examples=1000)


def stage_config(model=None, batch=16, **overrides):
    config = common.base()
    config.model = model or ConfigDict({"name": "tiny_model:Model", "variant": "mu/16"})
    config.augment = common.augmentation("natural", 16)
    config.data.channels = 3
    config.data.batch_size = batch
    config.objective = common.c2l_objective(**{"queue_size": 64, "head_dim": 32, **overrides})
    return config


def make(**overrides):
    return c2l.Objective(stage_config(**overrides).lock(), SPEC)


def fresh_state(objective, batch):
    return jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()


# ------------------------------------------------------------- the reference's numbers (A7)

K, D, T, N = 16384, 128, 0.07, 700_000


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_losses_of_a_fresh_queue_are_the_references():
    queue = momentum.new_queue(jax.random.key(0), K, D)["keys"]
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1).mean(), 1.0, atol=0.01)
    rng = np.random.default_rng(0)
    q, k = unit(rng, 64, D), unit(rng, 64, D)

    def both(q, k):
        s = momentum.scores(q, k, queue)
        z = jnp.mean(jnp.exp(s / T)) * N
        return float(momentum.infonce(s, T)), float(momentum.nce(s, T, z, N))

    infonce, nce = both(q, k)
    assert infonce == pytest.approx(10.50, abs=0.4) and nce == pytest.approx(11.55, abs=0.4)
    infonce, nce = both(q, q)
    assert infonce == pytest.approx(0.022, abs=0.004) and nce == pytest.approx(0.797, abs=0.08)


def test_the_mixture_is_one_folded_uniform_share_and_one_permutation_a_step():
    shares = []
    for step in range(400):
        share, order = c2l.mixture(jax.random.key(step), 8)
        shares.append(float(share))
        assert sorted(order.tolist()) == list(range(8))
    assert min(shares) >= 0.5 and max(shares) <= 1
    assert np.mean(shares) == pytest.approx(0.75, abs=4 * np.sqrt(1 / 48 / 400))
    assert np.var(shares) == pytest.approx(1 / 48, rel=0.2)


# --------------------------------------------------------- the loss against float64


def oracle(queries, keys, queue, mode, sequential, num_data):
    """Row by row from the released code, in float64: (mean loss, queue after)."""
    queue, place, z, total = queue.astype(np.float64).copy(), 0, None, 0.0
    for q, k in zip(queries, keys, strict=True):
        q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
        s = np.concatenate([np.sum(q * k, 1, keepdims=True), q @ queue.T], 1) / T
        if mode == "infonce":
            total += np.mean(np.log(np.exp(s).sum(1)) - s[:, 0])
        else:
            z = np.exp(s).mean() * num_data if z is None else z
            o, m_p = np.exp(s) / z, len(queue) / num_data
            total -= np.mean(
                np.log(o[:, 0] / (o[:, 0] + m_p + 1e-7))
                + np.log(m_p / (o[:, 1:] + m_p + 1e-7)).sum(1)
            )
        if sequential:
            queue[place : place + len(k)] = k
            place = (place + len(k)) % len(queue)
    return total / len(queries), queue


@pytest.mark.parametrize("mode", c2l.MODES)
@pytest.mark.parametrize("queue", c2l.QUEUES)
@pytest.mark.parametrize("active", [c2l.NAMES, ("plain",), ("plain", "feature_mix")])
def test_the_loss_is_the_definition(mode, queue, active):
    objective, batch = make(mode=mode, queue=queue, losses=active), make_batch(1)
    state, key, rng = fresh_state(objective, batch), jax.random.key(5), np.random.default_rng(1)
    features = [rng.normal(size=(16, 64)).astype(np.float32) for _ in range(4)]
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params["head"]["dense2"])
    query, plain, mixed_query, mixed_key = (
        f.astype(np.float64) @ head["kernel"] + head["bias"] for f in features
    )
    share, order = c2l.mixture(key, 16)
    share, order = float(share), np.asarray(order)
    pairs = {
        "plain": (query, plain),
        "image_mix": (mixed_query, mixed_key),
        "feature_mix": (mixed_query, share * plain + (1 - share) * plain[order]),
    }
    queries, keys = zip(*(pairs[name] for name in active), strict=True)
    want, queue_after = oracle(
        queries, keys, np.asarray(state.extra["queue"]["keys"]), mode, queue == "sequential", 1000
    )
    _, aux = objective.compare(
        state.params, state.batch_stats, state.extra, c2l.Features(*features), batch, key, True
    )
    # sums of at most 80 float32 terms of magnitude below 15
    np.testing.assert_allclose(aux["metrics"]["contrast_loss"], want, rtol=3e-6)
    if queue == "snapshot":
        queue_after[:16] = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(aux["carry"]["queue"]["keys"], queue_after, atol=1e-6)
    pushes = len(active) if queue == "sequential" else 1
    assert int(aux["carry"]["queue"]["place"]) == 16 * pushes % 64


def test_the_normaliser_is_fixed_at_the_first_step():
    objective, batch = make(), make_batch(1)
    state = fresh_state(objective, batch)
    assert float(state.extra["z"]) == 0

    @jax.jit
    def loss(s, key):
        return objective.loss(s.params, s.batch_stats, s.extra, batch, key, True)

    first = loss(state, jax.random.key(0))[1]["carry"]
    assert float(first["z"]) > 0
    later = state.replace(extra={**state.extra, **first})
    assert float(loss(later, jax.random.key(1))[1]["carry"]["z"]) == float(first["z"])


def test_the_released_queue_turns_over_in_43_steps():
    queue = momentum.new_queue(jax.random.key(0), K, 4)
    start, steps = queue["keys"], 0

    @jax.jit
    def step(queue):
        for _ in range(3):
            queue = momentum.push(queue, jnp.ones((128, 4)))
        return queue

    while (queue["keys"] == start).all(1).any():
        queue, steps = step(queue), steps + 1
    assert steps == 43 and int(queue["place"]) == 43 * 384 % K


# ------------------------------------------------------------------------- the teacher


def trained(objective, batch, steps=1, micro=None):
    mesh = mesh_of(1, 1, 1)
    init = make_init(objective, optax.sgd(0.1), batch, seed=0)
    with jax.set_mesh(mesh):
        state = jax.jit(init)()
        before = jax.device_get(state)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        step = make_train_step(
            objective, optax.sgd(0.1), None, mesh, shapes, micro or MicroBatches()
        )
        for number in range(steps):
            state, _ = step(state, batch, np.int32(number), np.bool_(False))
    return before, jax.device_get(state)


@pytest.fixture(autouse=True)
def _no_schedule(monkeypatch):
    monkeypatch.setattr("bigmed.optim.learning_rate", lambda *_: jnp.zeros(()))


def test_the_teacher_follows_the_updated_student_and_keeps_its_own_statistics():
    before, after = trained(make(momentum=0.9), make_batch(1))
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


def test_the_teacher_begins_as_the_student_that_was_handed_over(tmp_path):
    config = quickstart.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.evaluate = ()
    config.stages = ("simclr", "c2l")
    config.stage.c2l = common.stage(
        steps=2, objective=common.c2l_objective(queue_size=64, momentum=1.0),
        init_from=common.init_from(stage="simclr"),
    )  # fmt: skip
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    given, _ = checkpoint.load_flat(tmp_path / "00_simclr" / "checkpoints")
    found, _ = checkpoint.load_flat(tmp_path / "01_c2l" / "checkpoints")
    kernels = [n for n in given if n.startswith("params/backbone") and n.endswith("kernel")]
    for name in kernels:  # with a momentum of 1 it stays where it began
        teacher = name.replace("params/backbone", "extra/teacher/teacher_backbone")
        np.testing.assert_array_equal(found[teacher], given[name], err_msg=name)
    assert kernels


def test_what_a_resumed_run_needs_is_in_the_state():
    before, after = trained(make(), make_batch(1), steps=2)
    assert set(after.extra) == {"teacher", "queue", "z"}
    assert int(after.extra["queue"]["place"]) == 2 * 3 * 16 % 64 and after.extra["z"] > 0
    assert not np.array_equal(after.extra["queue"]["keys"], before.extra["queue"]["keys"])


def test_shuffled_groups_are_put_back_in_order():
    """A backbone that returns the rows' numbers: whatever the shuffle, key i is of row i."""
    objective, batch = make(bn_groups=4), make_batch(1)
    state = fresh_state(objective, batch)
    objective._encode = lambda name, params, stats, images, train: (images[:, 0, 0, :1], stats)
    inputs = jnp.broadcast_to(jnp.arange(16.0)[:, None, None, None, None], (16, 4, 2, 2, 3))
    for seed in range(3):
        outputs, _ = objective.embed(
            state.params, state.batch_stats, state.extra, inputs, jax.random.key(seed), True
        )
        for features in outputs:
            np.testing.assert_array_equal(features[:, 0], np.arange(16))


def test_groups_take_their_own_batch_statistics():
    batch = make_batch(1)
    whole, groups = make(), make(bn_groups=4)
    state = fresh_state(whole, batch)
    images = jnp.asarray(np.random.default_rng(0).random((16, 16, 16, 3)), jnp.float32)
    got, stats = groups._encode("backbone", state.params, state.batch_stats, images, True)
    parts = [
        whole._encode("backbone", state.params, state.batch_stats, part, True)
        for part in images.reshape(4, 4, 16, 16, 3)
    ]
    np.testing.assert_allclose(got, np.concatenate([p[0] for p in parts]), rtol=1e-4, atol=1e-5)
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *[p[1]["backbone"] for p in parts])
    grouped = tree.flatten(stats["backbone"])
    for name, leaf in tree.flatten(mean).items():
        np.testing.assert_allclose(grouped[name], leaf, rtol=1e-4, atol=1e-6)
    one, _ = whole._encode("backbone", state.params, state.batch_stats, images, True)
    assert np.abs(np.asarray(one) - np.asarray(got)).max() > 1e-3


# -------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("mode", c2l.MODES)
def test_loss_and_gradients_are_those_of_one_device(mode):
    objective, batch, one = make(mode=mode), make_batch(1), mesh_of(1, 1, 1)
    want, nudged = evaluate(objective, batch, one), evaluate(objective, batch, one, nudge=True)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        assert_same(evaluate(objective, batch, mesh_of(*sizes)), want, nudged)


def test_in_parts_is_the_whole_batch():
    objective, batch, one = make(model=common.vit("mu/16")), make_batch(1), mesh_of(1, 1, 1)
    want, nudged = evaluate(objective, batch, one), evaluate(objective, batch, one, nudge=True)
    assert_same(evaluate(objective, batch, one, count=4), want, nudged)


def test_pushing_the_keys_costs_one_gather():
    mesh = mesh_of(8, 1, 1)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    keys = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=rows)
    queue = jax.eval_shape(lambda: momentum.new_queue(jax.random.key(0), 64, 32))
    queue = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), queue)
    text = jax.jit(momentum.push, out_shardings=whole).lower(queue, keys).compile().as_text()
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    starts = [line for line in text.splitlines() if any(f" {c}(" in line for c in collectives)]
    assert len(starts) == 1 and "all-gather" in starts[0]


@pytest.mark.parametrize(
    "model",
    [
        common.resnet(18, stem="small"),
        ConfigDict({"name": "densenet", "depth": 121, "stem": "small"}),
    ],
    ids=["resnet18", "densenet121"],
)
def test_the_papers_networks_give_128_dimensional_keys(model):
    objective = make(model=model, head_dim=128)
    params, _, extra = jax.eval_shape(lambda: objective.init(jax.random.key(0), make_batch(1)))
    assert params["head"]["dense2"]["kernel"].shape == (objective.width, 128)
    assert extra["queue"]["keys"].shape == (64, 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "config.objective.temperature=0.0"),
        ({"queue_size": 100}, "config.objective.queue_size=100 is no multiple"),
        ({"losses": ()}, "valid: some of plain, image_mix, feature_mix"),
        ({"losses": ("plain", "mixed")}, "valid: some of"),
        ({"mode": "nse"}, "did you mean 'nce'"),
        ({"queue": "ring"}, "config.objective.queue='ring'"),
        ({"bn_groups": 3}, "bn_groups=3 does not divide the 16"),
        ({"momentum": 1.5}, "config.objective.momentum=1.5"),
        ({"momentum_schedule": "cosine"}, "config.objective.momentum_steps=0"),
    ],
)
def test_mistakes_are_named(change, said):
    with pytest.raises(UserError, match=said):
        make(**change)


def test_moco_is_the_first_loss_alone():
    objective, batch = make(losses=("plain",)), make_batch(1)
    state = fresh_state(objective, batch)
    loss, aux = objective.loss(
        state.params, state.batch_stats, state.extra, batch, jax.random.key(0), True
    )
    assert not [name for name in aux["metrics"] if name.endswith("mix_loss")]
    assert aux["activations"]["1_inputs"].shape[1] == 2 and np.isfinite(loss)
    assert losses.embedding_health(aux["activations"]["3_queries"])["feature_std"] > 0
