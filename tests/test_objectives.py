"""SimCLR and MICLe: the same loss and gradient on every mesh, the right pairs, a frozen probe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bigmed import sharding, tree
from bigmed.errors import UserError
from bigmed.objectives import micle, simclr
from bigmed.state import make_init
from bigmed.step import loss_and_grads
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


class NoOptimiser:
    @staticmethod
    def init(params):
        del params
        return ()


DATA = simclr.DataSpec(("a", "b", "c"), "single_label")


def evaluate(objective, batch, mesh):
    """(loss, metrics, gradients) of a fresh state, computed on the mesh."""
    init = make_init(objective, NoOptimiser, batch, seed=0)
    state = jax.jit(init)()
    rows = sharding.batch_sharding(mesh)
    shardings = sharding.tree_shardings(jax.eval_shape(init), mesh, objective.SHARDING)
    with jax.set_mesh(mesh):
        state = jax.device_put(jax.device_get(state), shardings)
        placed = sharding.put_batch(batch, rows)
        (loss, aux), grads = jax.jit(lambda s, b: loss_and_grads(objective, s, b))(state, placed)
    return jax.device_get((loss, aux["metrics"], aux["batch_stats"], grads))


def mesh_of(*sizes):
    count = int(np.prod(sizes))
    return sharding.make_mesh(
        dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[:count]
    )


@pytest.mark.parametrize(("module", "images"), [(simclr, 1), (micle, 2)])
def test_loss_statistics_and_gradients_are_those_of_one_device(module, images):
    objective, batch = module.Objective(stage_config(), DATA), make_batch(images)
    want = evaluate(objective, batch, mesh_of(1, 1, 1))
    for sizes in ((8, 1, 1), (2, 2, 2)):
        got = evaluate(objective, batch, mesh_of(*sizes))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        wanted, scale = tree.flatten(want[1:]), {}
        for name, leaf in wanted.items():
            scale[name] = max(np.abs(leaf).max(), 1e-3)
        for name, leaf in tree.flatten(got[1:]).items():
            np.testing.assert_allclose(
                leaf / scale[name], wanted[name] / scale[name], atol=2e-3, err_msg=name
            )


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
    objective = simclr.Objective(stage_config(), simclr.DataSpec())
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
