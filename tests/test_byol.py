"""BYOL and MoCo v3: the teacher's schedule, two unlike views, any mesh, parts.

(Their losses: tests/test_exactness.py.)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exactness import assert_same_everywhere
from ml_collections import ConfigDict
from test_objectives import DATA, make_batch

from bigmed import augment, optim, tree
from bigmed.errors import UserError
from bigmed.objectives import byol, moco_v3
from configs import byol as byol_config
from configs import common
from configs import moco_v3 as moco_v3_config

SMALL = {"head_hidden": 32, "head_dim": 16}
KINDS = {
    "byol": (byol, common.byol_objective),
    "moco_v3": (moco_v3, common.moco_v3_objective),
}


def make(kind, model=None, **overrides):
    module, objective = KINDS[kind]
    config = common.base()
    config.model = model or ConfigDict({"name": "tiny_model:Model", "variant": "mu/16"})
    config.augment = common.augmentation("natural", 16)
    config.augment.color_prob = 0.0  # compiles in half the time
    config.data.channels = 3
    config.objective = objective(**{**SMALL, **overrides})
    return module.Objective(config.lock(), dataclasses.replace(DATA, total_steps=100))


def test_the_teachers_momentum_rises_to_one_as_a_cosine():
    objective = make("byol")
    for step, want in ((0, 0.996), (50, 0.998), (100, 1.0), (200, 1.0)):
        np.testing.assert_allclose(objective.momentum(jnp.asarray(step)), want, rtol=1e-6)
    constant = make("byol", momentum_schedule="constant")
    assert constant.momentum(jnp.asarray(70)) == 0.996


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_device_and_of_parts_and_none_is_the_teachers(kind):
    """Of a transformer: batch norm is in the heads alone, which see the whole batch."""
    objective = make(kind, model=common.vit("mu/16"))
    _, _, stats, grads = assert_same_everywhere(objective, make_batch(1), parts=(4,))
    assert set(grads) == {"backbone", "head", "predictor", "probe"}
    assert all(np.any(leaf) for n, leaf in tree.flatten(grads).items() if n.endswith("kernel"))
    assert set(stats) == {"head", "predictor", "teacher_head"}


def test_the_second_view_has_an_augmentation_of_its_own():
    batch, key = make_batch(1), jax.random.key(3)
    same = make("byol").prepare(batch, key, True)
    solarized = make("byol", second_view={"solarize_prob": 1.0}).prepare(batch, key, True)
    np.testing.assert_array_equal(solarized[:, 0], same[:, 0])
    first = np.asarray(same[:, 1])
    want = np.where(first < 0.5, first, 1 - first)
    np.testing.assert_allclose(solarized[:, 1], want, atol=1e-6)
    with pytest.raises(UserError, match="did you mean 'solarize_prob'"):
        make("byol", second_view={"solarise_prob": 1.0})


def test_mistakes_are_named():
    with pytest.raises(UserError, match="config.objective.temperature=-1.0"):
        make("moco_v3", temperature=-1.0)
    with pytest.raises(UserError, match="config.objective.head_hidden=0: valid: 1 and more"):
        make("byol", head_hidden=0)
    with pytest.raises(UserError, match="config.objective.head_layers=0"):
        make("moco_v3", head_layers=0)


def test_moco_v3_trains_neither_the_last_norms_nor_the_patch_projection():
    config = moco_v3_config.get_config("smoke")
    objective = moco_v3.Objective(config, DATA)
    batch = {"image": np.zeros((2, 1, 48, 48, 1), np.uint8)}
    params, _, _ = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))
    freeze = (*config.optim.freeze, *objective.FROZEN)
    roles = tree.flatten(optim.roles({**config.optim, "freeze": freeze}, params))
    assert {name for name, role in roles.items() if role == "frozen"} == {
        "backbone/patches/bias", "backbone/patches/kernel", "head/norm3/scale",
        "predictor/norm2/scale",
    }  # fmt: skip


def test_presets_are_the_papers():
    """Appendix B and sections 3.2, 3.3 of BYOL; section 4 and the commands of MoCo v3's code."""
    config = byol_config.get_config()
    own = config.objective
    assert (own.momentum, own.momentum_schedule) == (0.996, "cosine")
    assert (own.head_hidden, own.head_dim) == (4096, 256)
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("lars", 0.2, 1.5e-6)
    first = augment.from_config(config.augment)
    assert (first.blur_prob, first.solarize_prob, first.crop_area_min) == (1.0, 0.0, 0.08)
    assert dict(own.second_view) == {"blur_prob": 0.1, "solarize_prob": 0.2}
    for arg, (temperature, layers, lr) in (("", (0.2, 3, 1.5e-4)), ("resnet50", (1.0, 2, 0.3))):
        config = moco_v3_config.get_config(arg)
        own = config.objective
        assert (own.temperature, own.head_layers, config.optim.lr) == (temperature, layers, lr)
        assert (own.momentum, own.momentum_schedule, own.head_dim) == (0.99, "cosine", 256)
