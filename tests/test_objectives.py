"""SimCLR and MICLe: the same loss and gradient on every mesh, the right pairs, a frozen probe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactness import (
    NoOptimiser,
    assert_same,
    assert_same_everywhere,
    evaluate,
    evaluator,
    mesh_of,
)
from ml_collections import ConfigDict

from bigmed import tree
from bigmed.errors import UserError
from bigmed.objectives import base, convirt, micle, moco_v3, simclr
from bigmed.state import make_init
from configs import common

BATCH = 16


def stage_config(**overrides):
    config = common.base()
    config.model = ConfigDict({"name": "tiny_model:Model", "variant": "mu/16"})
    config.augment = common.augmentation("natural", 16)
    config.data.channels = 3
    config.objective.update(overrides)
    return config.lock()


def make_batch(images, seed=0, size=24):
    rng = np.random.default_rng(seed)
    labels = np.eye(3, dtype=np.int32)[rng.integers(0, 3, BATCH)]
    return {
        "image": rng.integers(0, 256, (BATCH, images, size, size, 3), dtype=np.uint8),
        "box": np.tile(np.array([0, 0, size, size - 2], np.int32), (BATCH, images, 1)),
        "labels": labels,
        "patient": np.arange(BATCH, dtype=np.int32) // 2,
        "index": np.arange(BATCH, dtype=np.int32),
    }


DATA = base.DataSpec(("a", "b", "c"), "single_label")


@pytest.mark.parametrize(("module", "images"), [(simclr, 1), (micle, 2)])
def test_loss_statistics_and_gradients_are_those_of_one_device(module, images):
    objective, batch = module.Objective(stage_config(), DATA), make_batch(images)
    assert_same_everywhere(objective, batch)


def test_micle_reads_both_images_and_simclr_one():
    batch = make_batch(2)
    other = {**batch, "image": batch["image"].copy()}
    other["image"][:, 1] = 255 - other["image"][:, 1]
    pairs = micle.Objective(stage_config(), DATA)
    mesh = mesh_of(1, 1, 1)
    assert evaluate(pairs, batch, mesh)[0] != evaluate(pairs, other, mesh)[0]


def test_the_probe_learns_without_touching_the_encoder():
    batch = make_batch(1)
    with_labels = evaluate(simclr.Objective(stage_config(), DATA), batch, mesh_of(1, 1, 1))
    blind = {**batch, "labels": np.full_like(batch["labels"], -2)}
    without = evaluate(simclr.Objective(stage_config(), DATA), blind, mesh_of(1, 1, 1))
    for name, leaf in tree.flatten(with_labels[3]).items():
        same = np.array_equal(leaf, tree.flatten(without[3])[name])
        assert same != name.startswith("probe/"), name


def test_no_labels_means_no_probe():
    objective = simclr.Objective(stage_config(), base.DataSpec())
    loss, found, _, grads = evaluate(objective, make_batch(1), mesh_of(1, 1, 1))
    assert np.isfinite(loss) and "probe" not in grads and "probe_loss" not in found


def test_same_patient_mask_changes_the_loss():
    batch = make_batch(1)
    plain = evaluate(simclr.Objective(stage_config(), DATA), batch, mesh_of(1, 1, 1))[0]
    masked = simclr.Objective(stage_config(mask_same_patient=True), DATA)
    assert evaluate(masked, batch, mesh_of(1, 1, 1))[0] < plain


def test_representations_are_encoder_and_head_layers():
    objective, batch = simclr.Objective(stage_config(), DATA), make_batch(1)
    state = jax.jit(make_init(objective, NoOptimiser, batch, seed=0))()
    fns = objective.predict_fns()
    assert sorted(fns) == ["encoder", "head_1", "head_2"]
    shapes = {name: fn(state, batch).shape for name, fn in fns.items()}
    assert shapes == {"encoder": (16, 64), "head_1": (16, 64), "head_2": (16, 128)}
    assert (fns["head_1"](state, batch) >= 0).all()  # behind the ReLU


def test_bf16_loss_is_close_and_statistics_stay_float32():
    config = ConfigDict(stage_config().to_dict())
    config.precision = "bf16"
    batch = make_batch(1)
    want = evaluate(simclr.Objective(stage_config(), DATA), batch, mesh_of(1, 1, 1))
    got = evaluate(simclr.Objective(config, DATA), batch, mesh_of(1, 1, 1))
    np.testing.assert_allclose(got[0], want[0], rtol=0.03)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[2:])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("module", [simclr, micle, moco_v3, convirt])
def test_a_batch_of_one_has_no_negatives(module):
    config = ConfigDict(stage_config().to_dict())
    own = {"moco_v3": common.moco_v3_objective, "convirt": common.convirt_objective}
    name = module.__name__.rpartition(".")[2]
    config.objective = own[name]() if name in own else common.simclr_objective(name)
    config.data.batch_size = 1
    with pytest.raises(UserError, match=r"data\.batch_size=1 gives .* no negatives.*valid: 2 and"):
        module.Objective(config, DATA)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("objective", "loss_reduction", "total"), ("model", "depth", 19), ("model", "stem", "tiny")],
)
def test_mistakes_are_named(section, key, value):
    config = ConfigDict(stage_config().to_dict())
    config.model = common.resnet(18, stem="small")
    config[section][key] = value
    with pytest.raises(UserError, match=str(value)):
        simclr.Objective(config, DATA)


def test_in_parts_is_the_gradient_of_the_whole_batch():
    config = ConfigDict(stage_config().to_dict())
    config.model = common.vit("mu/16")  # no batch norm; the head's sees the whole batch
    objective, batch = simclr.Objective(config, DATA), make_batch(1)
    at_once = evaluator(objective, batch, mesh_of(1, 1, 1))
    want, nudged = at_once(), at_once(nudge=True)
    for sizes in ((1, 1, 1), (2, 2, 2)):
        assert_same(evaluate(objective, batch, mesh_of(*sizes), count=2), want, nudged)


def test_in_parts_with_batch_norm_frozen_or_of_each_part():
    objective, batch = simclr.Objective(stage_config(), DATA), make_batch(1)
    mesh = mesh_of(1, 1, 1)
    two, four = (evaluator(objective, batch, mesh, count=n, batch_norm="frozen") for n in (2, 4))
    found = two()
    assert_same(four(), found, two(nudge=True))
    fresh = objective.init(jax.random.key(0), batch)[1]
    same = jax.tree.map(np.array_equal, found[2]["backbone"], jax.device_get(fresh["backbone"]))
    assert all(jax.tree.leaves(same))
    micro = evaluate(objective, batch, mesh, count=2)
    assert abs(micro[0] - evaluate(objective, batch, mesh)[0]) > 1e-4  # fewer images to a norm
    updated = jax.tree.map(np.array_equal, micro[2]["backbone"], jax.device_get(fresh["backbone"]))
    assert not any(jax.tree.leaves(updated))
