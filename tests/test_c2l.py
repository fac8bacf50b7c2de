"""C2L and MoCo: the published algorithm's numbers, groups of a batch, presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactness import NoOptimiser
from ml_collections import ConfigDict
from test_objectives import DATA, make_batch

from bigmed import augment, checkpoint, curriculum, losses, optim, tree
from bigmed.errors import UserError
from bigmed.objectives import base, c2l, momentum
from bigmed.state import make_init
from configs import c2l as c2l_config
from configs import common, quickstart
from configs import moco as moco_config

SPEC = base.DataSpec(DATA.class_names, DATA.task, num_examples=1000)


def stage_config(model=None, batch=16, **overrides):
    config = common.base()
    config.model = model or ConfigDict({"name": "tiny_model:Model", "variant": "mu/16"})
    config.augment = common.augmentation("natural", 16)
    config.augment.color_prob = 0.0  # compiles sooner
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
        log_z = jnp.log(jnp.mean(jnp.exp(s / T)) * N)
        return float(momentum.infonce(s, T)), float(momentum.nce(s, T, log_z, N))

    infonce, nce = both(q, k)
    assert infonce == pytest.approx(10.50, abs=0.4) and nce == pytest.approx(11.55, abs=0.4)
    infonce, nce = both(q, q)
    assert infonce == pytest.approx(0.022, abs=0.004) and nce == pytest.approx(0.797, abs=0.08)


def test_nce_keeps_its_digits_where_thousands_of_quotients_are_near_one():
    rng = np.random.default_rng(0)
    s = rng.normal(scale=D**-0.5, size=(4, 1 + K)).astype(np.float32)
    o = np.exp(s.astype(np.float64) / T)
    log_z = np.float32(np.log(o.mean() * N))
    o, m_p = o / np.exp(np.float64(log_z)), K / N
    want = np.log(o[:, 0] / (o[:, 0] + m_p + 1e-7)) + np.log(m_p / (o[:, 1:] + m_p + 1e-7)).sum(1)
    # logarithms of about 14 round each o by 14 * 2**-24, up or down
    np.testing.assert_allclose(momentum.nce(s, T, log_z, N), -want.mean(), rtol=5e-7)


def test_nce_at_a_temperature_whose_exponentials_overflow():
    objective = make(temperature=0.01)
    s = np.array([[1.0, 0.5, -1.0], [0.9, 1.0, 0.2]], np.float32)
    log_z = float(objective._log_normaliser(s, np.float32(c2l.UNSET)))
    o = np.exp(s.astype(np.float64) / 0.01)
    np.testing.assert_allclose(log_z, np.log(o.mean() * 1000), rtol=1e-6)
    o, m_p = o / np.exp(log_z), 2 / 1000
    want = np.log(o[:, 0] / (o[:, 0] + m_p + 1e-7)) + np.log(m_p / (o[:, 1:] + m_p + 1e-7)).sum(1)
    np.testing.assert_allclose(momentum.nce(s, 0.01, log_z, 1000), -want.mean(), rtol=1e-6)
    value, slope = jax.value_and_grad(lambda s: momentum.nce(s, 0.01, log_z, 1000))(s)
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_a_collapsed_encoder_is_never_right():
    objective, batch = make(losses=("plain",)), make_batch(1)
    state = fresh_state(objective, batch)
    same = np.ones((16, 64), np.float32)
    queue = {**state.extra["queue"]}
    head = jax.device_get(state.params["head"]["dense1"])
    key = same @ head["kernel"] + head["bias"]
    queue["keys"] = np.resize(key / np.linalg.norm(key, axis=1, keepdims=True), (64, 32))
    _, aux = objective.compare(
        state.params, state.batch_stats, {**state.extra, "queue": queue},
        c2l.Features(same, same, None, None), batch, jax.random.key(0), True,
    )  # fmt: skip
    assert float(aux["metrics"]["contrast_accuracy"]) == 0


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
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params["head"]["dense1"])
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
    np.testing.assert_allclose(aux["metrics"]["contrast_loss"], want, rtol=1e-6)
    if queue == "snapshot":
        queue_after[:16] = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(aux["carry"]["queue"]["keys"], queue_after, atol=1e-6)
    pushes = len(active) if queue == "sequential" else 1
    assert int(aux["carry"]["queue"]["place"]) == 16 * pushes % 64


def test_the_normaliser_is_fixed_at_the_first_step():
    objective, batch = make(), make_batch(1)
    state = fresh_state(objective, batch)
    assert state.extra["log_z"] == np.float32(c2l.UNSET)

    @jax.jit
    def loss(s, key):
        return objective.loss(s.params, s.batch_stats, s.extra, batch, key, True)

    first = loss(state, jax.random.key(0))[1]["carry"]
    assert abs(float(first["log_z"])) < 100
    later = state.replace(extra={**state.extra, **first})
    assert float(loss(later, jax.random.key(1))[1]["carry"]["log_z"]) == float(first["log_z"])


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


# ---------------------------------------------------------------------- networks, mistakes, presets


@pytest.mark.parametrize(
    "model",
    [
        common.resnet(18),
        common.resnet(50),
        ConfigDict({"name": "densenet", "depth": 121, "stem": "small"}),
        common.vit("S/16"),
    ],
    ids=["resnet18", "resnet50", "densenet121", "vit"],
)
def test_the_papers_networks_give_128_dimensional_keys(model):
    objective = make(model=model, head_dim=128)
    params, _, extra = jax.eval_shape(lambda: objective.init(jax.random.key(0), make_batch(1)))
    assert params["head"]["dense1"]["kernel"].shape == (objective.width, 128)
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
        ({"momentum_schedule": "step"}, "config.objective.momentum_schedule='step'"),
        ({"head_dim": 0}, "config.objective.head_dim=0: valid: 1 and more"),
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


@pytest.mark.parametrize(("arg", "epochs"), [("120", 120), ("240", 240), ("recommended", 120)])
def test_c2ls_presets_and_their_rates(arg, epochs):
    """A3 of the reference: the first epoch at a lower rate is the one after half of them."""
    config = c2l_config.get_config(arg)
    own, tune = config.objective, config.optim
    assert config.stage.c2l.epochs == epochs and config.data.batch_size == 128
    assert (own.queue_size, own.temperature, own.momentum) == (16384, 0.07, 0.999)
    released = ("nce", "sequential", "linear", 128)
    wanted = ("infonce", "snapshot", "linear", 128) if arg == "recommended" else released
    assert (own.mode, own["queue"], own["head"], own.head_dim) == wanted
    assert (tune.name, tune.momentum, tune.nesterov, tune.weight_decay) == ("sgd", 0.9, False, 1e-4)
    rate = optim.make_schedule(tune, batch_size=128, total_steps=epochs * 10)
    trace = [float(rate(epoch * 10)) for epoch in range(epochs)]
    half, third, sixth = epochs // 2, epochs // 3, epochs // 6
    want = [0.03] * half + [0.003] * sixth + [3e-4] * sixth + [3e-5] * sixth
    assert half + 3 * sixth == epochs and third == 2 * sixth
    np.testing.assert_allclose(trace, want, rtol=1e-6)


def test_mocos_presets():
    """arXiv 1911.05722, section 3.3 and 4; arXiv 2003.04297, table 1."""
    for arg, head, temperature, schedule in (
        ("v1", "linear", 0.07, "steps"), ("v2", "mlp", 0.2, "cosine")
    ):  # fmt: skip
        config = moco_config.get_config(arg)
        own = config.objective
        assert (own["losses"], own.mode, own.queue_size) == (("plain",), "infonce", 65536)
        assert (own.momentum, own.temperature, own["head"]) == (0.999, temperature, head)
        assert (config.optim.schedule, config.optim.lr) == (schedule, 0.03)
        recipe = augment.from_config(config.augment)
        assert (recipe.blur_prob, recipe.color_prob) == ((0.0, 1.0) if arg == "v1" else (0.5, 0.8))
        assert recipe.cutout_prob == recipe.affine_degrees == 0
