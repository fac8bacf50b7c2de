"""Every objective's loss and gradient are those of float64, wherever and however computed.

The encoders are small and smooth (`smooth_model`) and stand in NumPy beside the papers' formulas
(`objective_oracle`). That a mesh changes nothing with real ones is in the tests of each objective.

C2L and BYOL have nothing to compute in tiles: they compare a row with a queue, or with its own.
"""

import dataclasses

import jax
import numpy as np
import objective_oracle as oracles
import pair_oracle
import pytest
from exactness import NoOptimiser, evaluate, mesh_of, nudged, relative_difference
from ml_collections import ConfigDict
from test_convirt import LENGTH, batch_of, spec_of
from test_objectives import BATCH, make_batch

from bigmed import augment, losses, tree
from bigmed.objectives import byol, c2l, convirt, micle, moco_v3, simclr
from bigmed.state import make_init, stream
from configs import common

SIZE = 3  # of an image, which is its view
MLP = {"head_hidden": 16, "head_dim": 8}
QUEUE = {"head_dim": 8, "queue_size": 64}
TERMS = {"learn_temperature": True, "image_image": 1.0, "text_text": 0.5}
CLIP = {**MLP, **TERMS, "image_weight": 0.5, "duplicates": "mask"}
SIGLIP = {**MLP, **TERMS, "loss": "sigmoid", "duplicates": "multi"}
SNAPSHOT = {**QUEUE, "mode": "infonce", "queue": "snapshot"}
RESNETS = {**MLP, "head_layers": 2, "predictor_norm": False, "temperature": 1.0}
# objective, its config, its definition
CASES = {
    "simclr": (simclr, common.simclr_objective(**MLP), oracles.simclr),
    "micle": (micle, common.simclr_objective("micle", **MLP), oracles.simclr),
    "c2l": (c2l, common.c2l_objective(**QUEUE), oracles.c2l("nce", sequential=True)),
    "convirt": (convirt, common.convirt_objective(**MLP), oracles.convirt()),
    "clip": (convirt, common.convirt_objective(**CLIP), oracles.convirt(0.5, "mask", 1.0, 0.5)),
    "siglip": (
        convirt, common.convirt_objective(**SIGLIP), oracles.convirt(None, "multi", 1.0, 0.5)
    ),
    "byol": (byol, common.byol_objective(**MLP), oracles.byol),
    "moco_v3": (moco_v3, common.moco_v3_objective(**MLP), oracles.moco_v3(0.2, 3, True)),
    "simclr_norm": (simclr, common.simclr_objective(**MLP), oracles.simclr),
    "c2l_norm": (c2l, common.c2l_objective(**SNAPSHOT), oracles.c2l("infonce", sequential=False)),
    "moco_v3_norm": (
        moco_v3, common.moco_v3_objective(**RESNETS), oracles.moco_v3(1.0, 2, False)
    ),
}  # fmt: skip
KNOWN = {"logit_scale": 2.3, "logit_bias": -5.0, "log_z": c2l.UNSET}


def normed(name):
    """Whether the image encoder has a batch norm, which micro-batches change."""
    return name.endswith("_norm")


def case(name, folder):
    """(objective, batch, state).

    Every weight is random, so that none hides another: a teacher that is its student cannot be told
    from it, nor a norm's shift of 0 from none.
    """
    module, section, _ = CASES[name]
    config = common.base()
    config.model = ConfigDict({"name": "smooth_model:Model", "norm": normed(name)})
    config.text_model = ConfigDict({"name": "smooth_model:Text", "train_after_layer": -1})
    config.augment = common.augmentation("none", SIZE)
    config.data.update(channels=3, batch_size=BATCH)
    texts = 2 if section.get("text_text") else 1
    config.data.text = common.text("vocab.txt", length=LENGTH, texts=texts)
    config.objective = section
    objective = module.Objective(
        config.lock(), dataclasses.replace(spec_of(folder), num_examples=1000)
    )
    images = make_batch(objective.IMAGES_PER_EXAMPLE[0], size=SIZE)
    batch = {**batch_of(texts=texts), **images} if module is convirt else images
    rng = np.random.default_rng(0)

    def drawn(name, leaf):
        last = name.rpartition("/")[2]
        noise = rng.normal(size=leaf.shape)
        if last in KNOWN:
            return np.float32(KNOWN[last])
        if last in ("kernel", "keys", "words"):
            return np.float32(noise / np.sqrt(leaf.shape[0 if last == "kernel" else 1]))
        if last in ("scale", "bias"):
            return np.float32((last == "scale") + 0.3 * noise)
        return np.zeros(leaf.shape, leaf.dtype)  # not of the loss: counters, running statistics

    shapes = jax.eval_shape(make_init(objective, NoOptimiser, batch, seed=0))
    return objective, batch, tree.map_with_name(drawn, shapes)


def expected(name, objective, batch, state):
    """(loss, gradients by name, how far each may be off relatively), in float64.

    To 1e-6, or to twice what it makes of the exact number that every parameter, layer and moment
    of a batch norm is off by one unit in its last place, as in float32 each of them is.
    """
    key = stream(jax.random.wrap_key_data(state.key), "train", state.step)
    inputs = jax.jit(lambda: objective.prepare(batch, key, True))()
    given = {**batch, "views": np.float64(getattr(inputs, "views", inputs))}
    given |= {name: jax.tree.map(np.float64, own) for name, own in state.extra.items()}
    if "queue" in given:
        share, order = c2l.mixture(key, BATCH)
        given |= {"share": float(share), "order": np.asarray(order), "num_data": 1000}
        given |= {"queue": given["queue"]["keys"], "temperature": objective.config["temperature"]}

    def found(params):
        return pair_oracle.value_and_grad(
            lambda flat: CASES[name][2](tree.unflatten(flat), given), tree.flatten(params)
        )

    loss, gradients = found(state.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracles, "ULP", 2.0**-23)
        moved, others = found(nudged(state.params))
    off = np.array([abs(moved - loss) / abs(loss), relative_difference(others, gradients)])
    return loss, gradients, np.maximum(1e-6, 2 * off)


def quick_views(patch):
    """Augmentation that compiles in a tenth of the time."""

    def noisy(config, key, images, boxes):
        del config, boxes
        return (images.astype(np.float32) / 255 + jax.random.uniform(key, images.shape)) / 2

    patch.setattr(augment, "augment", noisy)


def in_tiles(patch):
    """Tiles of a few rows for losses that would be computed at once."""
    patch.setattr(losses, "TILED_FROM", 1)
    patch.setattr(losses, "TILE", 5)


def compared(found):
    """(loss, gradients by name) of what `exactness.evaluate` found."""
    loss, *_, gradients = found
    return loss, tree.flatten(gradients)


def assert_exact(got, want):
    """(loss, gradients by name) against `expected`."""
    (loss, gradients), (right, slopes, (of_loss, of_gradients)) = got, want
    assert gradients.keys() == slopes.keys()
    np.testing.assert_allclose(loss, right, rtol=of_loss)
    assert relative_difference(gradients, slopes) <= of_gradients


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_float64s_on_every_mesh_in_tiles_and_in_parts(
    name, tmp_path, monkeypatch
):
    quick_views(monkeypatch)
    objective, batch, state = case(name, tmp_path)
    want = expected(name, objective, batch, state)
    one, eight, cube = (mesh_of(*sizes) for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)))
    for mesh, count, tiles in ((one, 1, False), (eight, 1, True), (cube, 1, False), (one, 4, True)):
        if count > 1 and normed(name):
            continue
        with monkeypatch.context() as patch:
            if tiles:
                in_tiles(patch)
            got = evaluate(objective, batch, mesh, fresh=state, count=count)
        assert_exact(compared(got), want)
