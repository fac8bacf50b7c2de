"""Stages: their overrides, their order, their hand-over, and what a used workdir refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from bigmed import checkpoint, curriculum
from bigmed.errors import UserError
from configs import common, quickstart


def tiny(**overrides):
    config = quickstart.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.evaluate = ()
    config.update(overrides)
    return config


def test_stages_do_not_see_one_anothers_overrides(tmp_path):
    config = tiny().lock()
    alone = curriculum.prepare_stage(config, "simclr", 0, tmp_path)
    pairs = curriculum.prepare_stage(config, "micle", 0, tmp_path)
    after = curriculum.prepare_stage(config, "simclr", 0, tmp_path)
    assert pairs.data.pairs == "case" and pairs.objective.name == "micle"
    assert alone == after and after.data.pairs is None and after.objective.name == "simclr"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimm": {"lr": 1.0}}, "did you mean 'optim'"),
        ({"optim": {"lrr": 1.0}}, "did you mean 'lr'"),
        ({"init_from": {"stagee": "simclr"}}, "did you mean 'stage'"),
    ],
)
def test_an_override_of_an_unknown_key_is_named(tmp_path, change, said):
    config = tiny()
    config.stage.simclr.update(change)
    with pytest.raises(UserError, match=said):
        curriculum.prepare_stage(config.lock(), "simclr", 0, tmp_path)


def test_a_section_with_another_name_replaces_the_whole_section(tmp_path):
    config = tiny()
    config.stage.simclr.model = common.vit("Ti/8")
    stage = curriculum.prepare_stage(config.lock(), "simclr", 0, tmp_path)
    assert stage.model.to_dict() == {"name": "vit", "variant": "Ti/8", "remat": False}


def test_weights_are_handed_over_exactly_and_the_optimiser_starts_fresh(tmp_path):
    config = tiny(stages=("simclr", "copy"))
    config.stage.copy = common.stage(steps=0, init_from=common.init_from(stage="simclr"))
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    source, _ = checkpoint.load_flat(tmp_path / "00_simclr" / "checkpoints")
    copied, meta = checkpoint.load_flat(tmp_path / "01_copy" / "checkpoints")
    assert meta["step"] == 0
    for name, leaf in source.items():
        carried = name.startswith(("params/backbone", "params/head", "batch_stats"))
        if carried:
            np.testing.assert_array_equal(copied[name], leaf, err_msg=name)
        if name.startswith("opt_state") and leaf.dtype == np.float32:
            assert not copied[name].any(), name
    record = json.loads((tmp_path / "curriculum.json").read_text())["stages"][1]
    assert record["init_from"]["checkpoint"] == "00_simclr/6" and record["state"] == "done"


@pytest.mark.parametrize(
    ("load", "said"),
    [(("params/tail/.*",), "matches nothing"), (("params/probe/.*",), "weights do not fit")],
)
def test_a_hand_over_that_does_not_fit_fails_loudly(tmp_path, load, said):
    config = tiny(stages=("simclr", "copy"))
    config.stage.copy = common.stage(
        steps=0, init_from=common.init_from(stage="simclr", load=load)
    )
    if "probe" in load[0]:  # another number of classes: the probe has another shape
        config.stage.copy.data = {
            "source": {"phantom": common.source("{workdir}/data/phantom", "train", classes=CLASSES)}
        }
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)


CLASSES = ("effusion", "cardiomegaly")


def test_training_on_test_patients_is_refused_before_anything_is_trained(tmp_path):
    config = tiny(evaluate=("linear",))
    config.data.source.phantom.split = "test"
    with pytest.raises(UserError, match="patients"):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    assert not list(tmp_path.glob("*/checkpoints"))


def test_seeds_give_their_own_stages_and_other_weights(tmp_path):
    config = tiny(seeds=(0, 1), stages=("untrained",))
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    flat = [
        checkpoint.load_flat(tmp_path / f"0{i}_untrained_seed{i}" / "checkpoints")[0]
        for i in range(2)
    ]
    kernel = "params/backbone/stem/conv/kernel"
    assert not np.array_equal(flat[0][kernel], flat[1][kernel])
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), *flat)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"stage": "micle"}, "'micle' is no earlier stage"),
        ({"checkpoints": "/no/such/folder"}, "no folder /no/such/folder"),
    ],
)
def test_weights_that_cannot_be_had_are_refused_before_anything_is_trained(tmp_path, source, said):
    config = tiny()
    config.stage.simclr.init_from = common.init_from(**source)
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    assert not list(tmp_path.glob("*/checkpoints"))


def test_a_torn_last_checkpoint_is_trained_again_and_not_handed_over(tmp_path):
    config = tiny(stages=("simclr", "copy"))
    config.stage.copy = common.stage(steps=0, init_from=common.init_from(stage="simclr"))
    config.lock()
    curriculum.run(config, tmp_path, stop=lambda: False)
    want, _ = checkpoint.load_flat(tmp_path / "01_copy" / "checkpoints")
    shutil.rmtree(tmp_path / "01_copy")
    last = tmp_path / "00_simclr" / "checkpoints" / "6" / "state"
    biggest = max(last.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:100])
    with pytest.raises(UserError, match="run the same command again"):
        curriculum.run(config, tmp_path, stop=lambda: False)
    curriculum.run(config, tmp_path, stop=lambda: False)
    got, _ = checkpoint.load_flat(tmp_path / "01_copy" / "checkpoints")
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


def test_other_settings_of_an_evaluator_are_evaluated_anew(tmp_path):
    config = tiny(stages=("untrained",), evaluate=("knn",)).lock()
    curriculum.run(config, tmp_path, stop=lambda: False)
    first = json.loads((tmp_path / "results.json").read_text())
    config.evaluator.knn.classes = CLASSES
    curriculum.run(config, tmp_path, stop=lambda: False)
    second = json.loads((tmp_path / "results.json").read_text())
    assert {row["metric"] for row in first} > {row["metric"] for row in second}
    assert {row["metric"] for row in second} == {"auc_macro", *(f"auc/{c}" for c in CLASSES)}
