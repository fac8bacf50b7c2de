"""Loss on held-out data: the same every time, heeded by the schedule, resumed, and best kept."""

import json

import jax
import numpy as np
import pytest

from bigmed import checkpoint, curriculum, metrics, optim, sharding, train
from bigmed.errors import Preempted, UserError
from configs import common, quickstart


def config_of(keep="last", split="val", **optimiser):
    config = quickstart.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.phantom.num_patients = 100
    config.evaluate = ()
    config.stages = ("simclr",)
    config.stage.simclr.steps = 8
    folder = "{workdir}/data/phantom"
    config.data.source.held_out = common.source(folder, split)
    config.validate.update(sources=("held_out",), every=2, keep=keep)
    # a rate at which the loss also rises
    config.optim = common.adamw(lr=0.03, warmup_steps=0)
    config.optim.update(optimiser)
    return config.lock()


def run(config, workdir, stop=lambda: False):
    workdir.mkdir(exist_ok=True)
    curriculum.run(config, workdir, stop=stop)
    stage = workdir / "00_simclr"
    lines = metrics.read_jsonl(stage / "metrics.jsonl")
    return stage, {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def test_validation_is_the_objectives_loss_on_all_held_out_images(tmp_path):
    config = config_of(keep="best")
    stage_folder, found = run(config, tmp_path)
    assert list(found) == [2, 4, 6, 8]
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = curriculum.prepare_stage(config, "simclr", 0, tmp_path)
        stage = train.build_stage("00_simclr", made, stage_folder, mesh)
        state = train.restore(stage)
        again = [stage.validation.run(jax.tree.map(lambda x: x.copy(), state))[1] for _ in "ab"]
        assert again[0] == again[1] and "val_contrast_accuracy" in again[0]
        np.testing.assert_allclose(again[0]["val_loss"], found[8], rtol=1e-5)
        trained = stage.pipeline.host_batch(0)
        other = stage.objective.loss(
            state.params, state.batch_stats, state.extra, trained, jax.random.key(0), False
        )[0]
        for loss in (-1.0, -2.0):  # a resumed run may find another rounding at a step it has kept
            stage.validation.keep_if_best(state, {"val_loss": loss}, stage_folder, {})
    assert checkpoint.load_flat(stage_folder / "best")[1]["val_loss"] == -1.0
    pipeline = stage.validation.pipeline
    batches = [pipeline.host_batch(n)["image"] for n in range(-(-pipeline.units_per_epoch // 16))]
    images = {image.tobytes() for batch in batches for image in batch}
    assert len(images) == pipeline.units_per_epoch and pipeline.units_per_epoch % 16
    assert abs(float(other) - again[0]["val_loss"]) > 1e-4  # other images


@pytest.mark.usefixtures("one_device")
def test_the_best_weights_stand_for_the_stage(tmp_path):
    config = config_of(keep="best")
    with config.unlocked():
        config.stages = ("simclr", "copy")
        config.stage.copy = common.stage(steps=0, init_from=common.init_from(stage="simclr"))
        config.evaluate = ("knn",)
    stage, found = run(config, tmp_path)
    best = min(found, key=found.get)
    assert best < 8, "the test needs a loss that rises again"
    kept, meta = checkpoint.load_flat(stage / "best")
    assert meta["step"] == best and meta["val_loss"] == found[best]
    copied, _ = checkpoint.load_flat(tmp_path / "01_copy" / "checkpoints")
    last, _ = checkpoint.load_flat(stage / "checkpoints")
    name = next(n for n in kept if n.startswith("params/backbone") and n.endswith("kernel"))
    np.testing.assert_array_equal(copied[name], kept[name])
    assert not np.array_equal(last[name], kept[name])
    rows = json.loads((tmp_path / "results.json").read_text())
    rows = [row for row in rows if row["stage"] == "simclr"]
    assert {row["checkpoint"] for row in rows} == {f"00_simclr/best/{best}"}


@pytest.mark.usefixtures("one_device")
def test_a_plateau_halves_the_rate_and_goes_on_bit_equal_after_a_stop(tmp_path):
    config = config_of(schedule="plateau", patience=1, decay=0.5)
    stage, found = run(config, tmp_path / "whole")
    lines = metrics.read_jsonl(stage / "metrics.jsonl")
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    want, state = {}, optim.scale_by_plateau().init(None)
    for step in range(1, 9):
        want[step] = 0.03 * float(state.scale)
        if step in found:
            state = optim.observe(config.optim, state, np.float32(found[step]))
    np.testing.assert_allclose([rates[s] for s in want], list(want.values()), rtol=1e-6)
    assert state.scale < 1, "the test needs a loss that rises"

    asked = iter(range(100))
    with pytest.raises(Preempted):
        run(config, tmp_path / "stopped", stop=lambda: next(asked) == 4)
    resumed, _ = run(config, tmp_path / "stopped")
    assert (resumed / "metrics.jsonl").read_bytes() == (stage / "metrics.jsonl").read_bytes()
    got, want = (checkpoint.load_flat(folder / "checkpoints")[0] for folder in (resumed, stage))
    assert any("waited" in name for name in want)
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"validate": {"keep": "first"}}, "valid: last, best"),
        ({"validate": {"every": 0}}, "give both"),
        ({"validate": {"sources": (), "every": 0, "keep": "best"}}, "give both"),
        ({"validate": {"sources": ("held_up",)}}, "did you mean 'held_out'"),
        ({"validate": {"sources": (), "every": 0}, "optim": {"schedule": "plateau"}}, "follows"),
        ({"data": {"batch_size": 400}}, "which has"),
    ],
)
def test_mistakes_are_named(tmp_path, change, said):
    config = config_of()
    with config.unlocked():
        config.update(change)
    with pytest.raises(UserError, match=said):
        run(config, tmp_path)


@pytest.mark.usefixtures("one_device")
def test_held_out_data_of_other_classes_will_do_and_labels_are_not_looked_at(tmp_path):
    config = config_of()
    with config.unlocked():
        config.data.source.held_out.classes = ("effusion",)
    _, found = run(config, tmp_path)
    (tmp_path / "same").mkdir()
    _, same = run(config_of(), tmp_path / "same")
    assert found == same


def test_patients_of_the_training_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="disjoint"):
        run(config_of(split="train"), tmp_path)


def test_patients_that_choose_the_weights_are_no_test_patients(tmp_path):
    config = config_of(split="test")
    with config.unlocked():
        config.evaluate = ("knn",)
    with pytest.raises(UserError, match="disjoint"):
        run(config, tmp_path)
