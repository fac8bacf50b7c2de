"""ConVIRT and its successors: directions, options, frozen layers, any mesh, mistakes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exactness import (
    ROUNDINGS,
    NoOptimiser,
    assert_same_everywhere,
    evaluate,
    mesh_of,
    nudged,
    relative_difference,
)
from test_objectives import DATA, make_batch

from bigmed import losses, optim, tree
from bigmed.data import tokenise
from bigmed.errors import UserError
from bigmed.objectives import base, convirt
from bigmed.state import make_init, stream
from bigmed.step import MicroBatches, loss_and_grads
from configs import common
from configs import convirt as preset

LENGTH, VOCABULARY = 12, 70


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return spec_of(tmp_path_factory.mktemp("text"))


def spec_of(folder):
    words = [f"word{i}" for i in range(VOCABULARY - len(tokenise.SPECIAL))]
    path = folder / "vocab.txt"
    path.write_text("\n".join([*tokenise.SPECIAL, *words]) + "\n")
    return dataclasses.replace(DATA, num_examples=100, tokeniser=tokenise.load(path))


def stage_config(texts=1, text=None, tower=None, **overrides):
    config = common.base()
    config.model = common.vit("mu/16")
    config.augment = common.augmentation("convirt", 16)
    config.data.channels = 3
    config.data.text = common.text("vocab.txt", length=LENGTH, texts=texts, **(text or {}))
    config.text_model = common.bert(
        width=32, depth=2, heads=2, mlp_dim=48, max_length=16, train_after_layer=1
    )
    config.text_model.update(tower or {})
    config.objective = common.convirt_objective(**{"head_dim": 16, **overrides})
    return config.lock()


def batch_of(images=1, texts=1, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    batch = make_batch(images, seed=seed)
    count = len(batch["image"])
    lengths = rng.integers(3, LENGTH + 1, (count, texts))
    tokens = rng.integers(5, VOCABULARY, (count, texts, length)).astype(np.int32)
    mask = np.arange(length) < lengths[..., None]
    ids = rng.integers(0, 6, (count, texts)).astype(np.int32)  # some are equal
    return {**batch, "tokens": np.where(mask, tokens, 0), "token_mask": mask, "text_id": ids}


def features_of(texts=1, views=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((16, views, 32), (16, texts, 32))
    return convirt.Features(*(rng.normal(size=s).astype(np.float32) for s in shapes))


# ------------------------------------------------------------------------------ the loss, by hand

S = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, -0.5], [0.0, 0.4, 0.6]])


def vectors_with_cosines(cosines):
    """Unit vectors v, u [N, 2 N] whose cosines are these times a factor, and the factor."""
    n = len(cosines)
    left = np.linalg.cholesky(np.eye(n) - 0.2 * cosines @ cosines.T + 1e-9)
    scale = math.sqrt(0.2)
    v = np.concatenate([scale * cosines, left], 1)
    u = np.concatenate([np.eye(n), np.zeros((n, n))], 1)
    return v, u, scale


def test_three_pairs_by_hand_and_lambda_weighs_image_to_text():
    v, u, shrink = vectors_with_cosines(S)
    np.testing.assert_allclose(v @ u.T, shrink * S, atol=1e-12)

    def cross_entropy(x):
        return np.mean(np.log(np.exp(x).sum(1)) - np.diag(x))

    x = 10 * shrink * S
    want = 0.75 * cross_entropy(x) + 0.25 * cross_entropy(x.T)
    got = losses.infonce(v, u, scale=10.0, weight=0.75)
    np.testing.assert_allclose(got.loss, want, rtol=1e-6)
    other = losses.infonce(v, u, scale=10.0, weight=0.25)
    assert abs(float(other.loss) - want) > 0.01  # the matrix is not symmetric
    same = losses.infonce(np.ones((8, 4)), np.ones((8, 4)), scale=10.0, weight=0.75)
    np.testing.assert_allclose(same.loss, math.log(8), rtol=1e-6)


def test_rows_whose_text_another_has_are_counted():
    share = convirt._share_of_duplicates(np.array([3, 1, 3, 2, 1, 3, 0, 5], np.int32))
    np.testing.assert_allclose(share, 5 / 8)


def test_a_learned_scale_starts_at_the_temperature_and_is_clamped(spec):
    objective = convirt.Objective(stage_config(learn_temperature=True, temperature=0.07), spec)
    batch, features = batch_of(), features_of()
    params, stats, extra = objective.init(jax.random.key(0), batch)

    @jax.jit
    def loss(params):
        return objective.compare(params, stats, extra, features, batch, jax.random.key(0), True)

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(aux["metrics"]["similarity_scale"], 1 / 0.07, rtol=1e-5)
    assert abs(float(grads["logit_scale"])) > 0
    for value, want in ((9.0, 100.0), (-3.0, 1.0)):
        found = loss({**params, "logit_scale": jnp.float32(value)})[1]["metrics"]
        np.testing.assert_allclose(found["similarity_scale"], want, rtol=1e-5)


@pytest.mark.parametrize(("start", "outward"), [(4.7, 1), (-0.1, -1)])
def test_a_learned_scale_comes_back_from_a_limit_and_goes_no_further(spec, start, outward):
    """A plain clip has no gradient outside, so a scale past a limit would be lost."""
    objective = convirt.Objective(stage_config(learn_temperature=True), spec)
    batch, features = batch_of(), features_of()
    params, stats, extra = objective.init(jax.random.key(0), batch)

    @jax.jit
    @jax.grad
    def slope(value, sign):
        given = {**params, "logit_scale": value}
        return sign * objective.compare(given, stats, extra, features, batch, None, True)[0]

    # the loss of features that say nothing rises with the scale; its negative falls
    inside = float(slope(jnp.float32(start - 0.2 * outward), 1.0))
    assert inside > 0
    back, further = (float(slope(jnp.float32(start), float(sign * outward))) for sign in (1, -1))
    assert further == 0 and outward * back > 0


# ------------------------------------------------------------------------------------- the towers


def test_frozen_layers_get_no_gradient_and_do_not_move_and_all_else_does(spec):
    objective, batch = convirt.Objective(stage_config(), spec), batch_of()
    _, _, _, grads = evaluate(objective, batch, mesh_of(1, 1, 1))
    config = common.optimizer("adam", 0.1, lr_scaling="none", weight_decay=0.1, warmup_steps=0)
    params = jax.device_get(jax.jit(make_init(objective, NoOptimiser, batch, seed=0))().params)
    settings = {**config, "freeze": objective.FROZEN}
    tx, _ = optim.make_optimizer(settings, params, batch_size=16, total_steps=10)

    @jax.jit
    def step(params, grads):
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    moved = tree.flatten(step(params, grads))
    for name, gradient in tree.flatten(grads).items():
        frozen = name.startswith(("text/embeddings", "text/layer1/"))
        assert np.any(gradient) != frozen, name
        assert np.array_equal(moved[name], tree.flatten(params)[name]) == frozen, name
    assert {n.split("/")[0] for n in tree.flatten(grads)} == {
        "backbone", "head", "text", "text_head", "probe"
    }  # fmt: skip


def test_padding_to_another_length_changes_nothing(spec):
    objective = convirt.Objective(stage_config(), spec)
    short = batch_of()
    wide = {
        **short,
        "tokens": np.pad(short["tokens"], ((0, 0), (0, 0), (0, 4)), constant_values=3),
        "token_mask": np.pad(short["token_mask"], ((0, 0), (0, 0), (0, 4))),
    }
    one = mesh_of(1, 1, 1)
    np.testing.assert_allclose(
        evaluate(objective, wide, one)[0], evaluate(objective, short, one)[0], rtol=1e-5
    )


def test_several_images_and_views(spec):
    two_views = convirt.Objective(stage_config(image_image=1.0), spec)
    key = jax.random.key(0)
    views = jax.jit(lambda: two_views.prepare(batch_of(1), key, True).views)()
    assert views.shape == (16, 2, 16, 16, 3) and not np.array_equal(views[:, 0], views[:, 1])
    plain = convirt.Objective(stage_config(), spec)
    for images in (1, 2):
        made = jax.eval_shape(lambda n=images: plain.prepare(batch_of(n), key, True).views)
        assert made.shape[1] == images


def test_validation_is_the_same_for_any_key(spec):
    objective, batch = convirt.Objective(stage_config(), spec), batch_of()
    state = jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()
    for train in (False, True):
        loss = jax.jit(
            lambda key, train=train: objective.loss(
                state.params, state.batch_stats, state.extra, batch, key, train
            )[0]
        )
        one, other = (float(loss(jax.random.key(seed))) for seed in (0, 1))
        assert (one == other) != train


def test_embeddings_for_retrieval_are_unit_vectors(spec):
    objective, batch = convirt.Objective(stage_config(), spec), batch_of(texts=2)
    state = jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()
    fns = objective.predict_fns()
    assert set(fns) == {"encoder", "image", "text"}
    for name in ("image", "text"):
        found = jax.jit(fns[name])(state, batch)
        assert found.shape == (16, 16)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)


def test_the_preset_is_the_papers_table_and_decays_all_that_it_trains(spec):
    config = preset.get_config()
    with config.ignore_type():
        config.text_model.vocab_size = None  # the test's tokeniser is smaller than ClinicalBERT's
    objective = convirt.Objective(config.lock(), spec)
    size = config.augment.size
    form = {
        "image": jax.ShapeDtypeStruct((32, 1, size, size, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((32, 1, config.data.text.length), jnp.int32),
        "token_mask": jax.ShapeDtypeStruct((32, 1, config.data.text.length), bool),
    }
    params, stats, _ = jax.eval_shape(lambda: objective.init(jax.random.key(0), form))
    shapes = {name: leaf.shape for name, leaf in tree.flatten(params).items()}
    heads = {name: shape for name, shape in shapes.items() if "head/" in name}
    assert heads == {  # no biases, no norms
        "head/dense1/kernel": (2048, 2048), "head/dense2/kernel": (2048, 512),
        "text_head/dense1/kernel": (768, 768), "text_head/dense2/kernel": (768, 512),
    }  # fmt: skip
    assert set(stats) == {"backbone"}
    assert shapes["text/layer12/mlp/up/kernel"] == (768, 3072)
    assert (objective.text.pool, objective.text.pool_special) == ("max", True)
    roles = tree.flatten(optim.roles({**config.optim, "freeze": objective.FROZEN}, params))
    frozen = {name.split("/")[1] for name, role in roles.items() if role == "frozen"}
    assert frozen == {"embeddings", *(f"layer{i}" for i in range(1, 7))}
    assert {n.split("/")[0] for n, role in roles.items() if role == "plain"} == {"probe"}
    own, plan = objective.config, config.optim
    assert (own.temperature, own.image_weight, own.learn_temperature) == (0.1, 0.75, False)
    assert (plan.name, plan.lr, plan.weight_decay, plan.schedule) == ("adam", 1e-4, 1e-6, "plateau")
    assert (plan.decay, plan.patience, config.validate.every) == (0.5, 5, 5000)


@pytest.mark.parametrize(
    ("arg", "learned"),
    [("clip", {"logit_scale": 1 / 0.07}), ("siglip", {"logit_scale": 10, "logit_bias": -10})],
)
def test_the_successors_start_as_published(spec, arg, learned):
    own = preset.get_config(arg).objective
    objective = convirt.Objective(stage_config(**{**own, "head_dim": 16}), spec)
    params = jax.jit(lambda: objective.init(jax.random.key(0), batch_of())[0])()
    found = {name: float(x) for name, x in params.items() if name.startswith("logit")}
    assert found.keys() == learned.keys()
    np.testing.assert_allclose(np.exp(found["logit_scale"]), learned["logit_scale"], rtol=1e-5)
    assert found.get("logit_bias") == learned.get("logit_bias")
    assert own.image_weight == 0.5 or own.loss == "sigmoid"


# ------------------------------------------- exactness (of the loss: tests/test_exactness.py)


def test_loss_and_gradients_are_those_of_one_device_and_of_parts(spec):
    assert_same_everywhere(convirt.Objective(stage_config(), spec), batch_of(), parts=(4,))


def test_in_parts_dropout_is_drawn_alike_in_both_passes(spec):
    """The gradient through the encoders' parts side by side, each with the key of its number."""
    objective = convirt.Objective(stage_config(tower={"dropout": 0.5}), spec)
    batch, count = batch_of(), 2
    state = jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()
    key = stream(jax.random.wrap_key_data(state.key), "train", state.step)

    def whole(params, first):
        inputs = objective.prepare(batch, key, True)
        found = []
        for i in range(count):
            part = jax.tree.map(lambda x, i=i: x[i::count], inputs)
            part_key = jax.random.fold_in(key, base.EMBED_STREAM + first + i)
            found.append(objective.embed(params, {}, {}, part, part_key, True)[0])
        outputs = jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *found)
        return objective.compare(params, {}, {}, outputs, batch, key, True)[0]

    direct = jax.jit(jax.value_and_grad(whole))
    want, other = direct(state.params, 0), direct(state.params, count)
    (loss, _), grads = jax.jit(
        lambda s: loss_and_grads(objective, s, batch, MicroBatches(count))
    )(state)  # fmt: skip
    np.testing.assert_allclose(loss, want[0], rtol=1e-6)
    moved = relative_difference(direct(nudged(state.params), 0)[1], want[1])
    assert relative_difference(grads, want[1]) < max(1e-6, ROUNDINGS * moved) < 1e-4
    assert relative_difference(grads, other[1]) > 1e-3  # another draw is another number altogether


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": -0.1}, "config.objective.temperature=-0.1"),
        ({"temperature": math.inf}, "config.objective.temperature=inf: valid: a finite number"),
        ({"temperature": 2.0, "learn_temperature": True}, "temperature=2.0 .* valid: 0.01 to 1"),
        ({"loss": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"duplicates": "drop"}, "config.objective.duplicates='drop'"),
        ({"image_weight": 1.5}, "config.objective.image_weight=1.5"),
        ({"text_text": 0.5}, "config.data.text.texts=2"),
        ({"text_text": 0.5, "texts": 2, "text": {"sentences": 0}}, "text with itself.*sentences=0"),
        ({"text_text": 0.5, "texts": 2, "text": {"unit": "report"}}, "itself.*unit='report'"),
        (
            {"text_text": 1, "texts": 2, "text": {"unit": "section", "sections": "either"}},
            "itself.*sections='either'",
        ),
        ({"tower": {"vocab_size": 500}}, "vocab_size=500 does not fit"),
        ({"tower": {"max_length": 8}}, "config.data.text.length=12 is beyond"),
        ({"tower": {"depths": 3}}, "config.text_model of 'bert'"),
        ({"head_layers": 9}, "config.objective.head_layers=9"),
    ],
)
def test_mistakes_are_named(spec, change, said):
    with pytest.raises(UserError, match=said):
        objective = convirt.Objective(stage_config(**change), spec)
        objective.init(jax.random.key(0), batch_of())


def test_without_texts_it_says_what_to_set():
    with pytest.raises(UserError, match="needs texts; set config.data.text.tokeniser"):
        convirt.Objective(stage_config(), DATA)


def test_a_batch_without_texts_is_one_plain_line(spec):
    objective, batch = convirt.Objective(stage_config(), spec), batch_of()
    images = {k: v for k, v in batch.items() if k not in ("tokens", "token_mask", "text_id")}
    state = jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()
    for call in (
        lambda: jax.eval_shape(lambda: objective.init(jax.random.key(0), images)),
        lambda: objective.prepare(images, jax.random.key(0), True),
        lambda: objective.predict_fns()["text"](state, images),
    ):
        with pytest.raises(UserError, match="needs batches with tokens and token_mask") as error:
            call()
        assert "\n" not in str(error.value)
    assert jax.eval_shape(objective.predict_fns()["image"], state, images).shape == (16, 16)
