"""Stages: their overrides, their order, their hand-over, and what a used workdir refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from bigmed import checkpoint, curriculum, networks
from bigmed.convert import weights
from bigmed.data import tokenise
from bigmed.errors import UserError
from bigmed.models.catalogue import build
from configs import common, convirt, quickstart

pytestmark = pytest.mark.usefixtures("one_device")


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
    switches = {"remat": False, "scan": False}
    assert stage.model.to_dict() == {"name": "vit", "variant": "Ti/8", **switches}


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
    found = {row["metric"] for row in second if row["metric"].startswith("auc")}
    assert found == {"auc_macro", *(f"auc/{c}" for c in CLASSES)}


# -------------------------------------------------------------------------------------- two towers


def with_texts(tmp_path, *stages):
    """ConVIRT's smoke form with a tiny image encoder, of untrained stages of these settings."""
    config = convirt.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.update(evaluate=(), stages=tuple(f"stage{i}" for i in range(len(stages))))
    config.validate.update(sources=(), every=0, keep="last")
    config.stage = {
        f"stage{i}": common.stage(steps=0, **settings) for i, settings in enumerate(stages)
    }
    curriculum.prepare_stage(config.lock(), "stage0", 0, tmp_path)  # makes the data set
    return config.unlock()


def foreign_folder(folder, model, seed, channels=1, normalize="none"):
    """A folder as tools/import_weights.py makes it; its leaves by path."""
    rng = np.random.default_rng(seed)
    shapes = weights.abstract_leaves(build(model), 24, channels)
    leaves = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}
    weights.save(weights.Weights(model, 24, channels, normalize, leaves), folder, {})
    return leaves


def tower_of(config, workdir, **changes):
    """The model section of a config's text tower."""
    section = {**config.text_model, **changes}
    vocabulary = tokenise.load(workdir / "data" / "phantom" / "vocab.txt").vocab_size
    return {**section, "vocab_size": vocabulary}


def trained_by(workdir, stage):
    return networks.load(workdir / stage / "checkpoints")[0]


def test_both_towers_come_from_elsewhere_and_go_on_to_the_next_stage(tmp_path):
    sources = {name: str(tmp_path / name) for name in ("weights", "text_weights")}
    config = with_texts(
        tmp_path,
        {"init_from": common.init_from(**sources)},
        {"init_from": common.init_from(stage="stage0")},
    )
    model = {"name": "tiny_model:Model", "variant": "mu/8"}
    # how the tower is used is no matter of its weights
    tower = tower_of(config, tmp_path, pool="mean", train_after_layer=-1)
    normalize = config.augment.normalize
    given = {
        "backbone": foreign_folder(tmp_path / "weights", model, 0, normalize=normalize),
        "text": foreign_folder(tmp_path / "text_weights", tower, 1),
    }
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    for stage in ("00_stage0", "01_stage1"):
        found = trained_by(tmp_path, stage)
        for module, leaves in given.items():
            for name, leaf in leaves.items():
                collection, _, rest = name.partition("/")
                np.testing.assert_array_equal(found[f"{collection}/{module}/{rest}"], leaf)
    said = json.loads((tmp_path / "curriculum.json").read_text())["stages"][0]["init_from"]
    assert said["checkpoint"] == "weights and text_weights"


def test_a_stage_without_texts_hands_over_the_image_encoder_alone(tmp_path):
    images = {"objective": common.simclr_objective(), "optim": common.adamw(1e-3, warmup_steps=0)}
    config = with_texts(
        tmp_path,
        images,
        {"init_from": common.init_from(stage="stage0")},
    )
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    source, found = (trained_by(tmp_path, f"0{i}_stage{i}") for i in range(2))
    shared = [name for name in source if name.split("/")[1] == "backbone"]
    assert shared and not any("/text/" in name for name in source)
    for name in shared:
        np.testing.assert_array_equal(found[name], source[name], err_msg=name)
    said = json.loads((tmp_path / "curriculum.json").read_text())["stages"][1]["init_from"]
    assert not any("text" in pattern for pattern in said["load"])


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ({}, {"width": 16}, "width=16 but config.text_model.width is 32"),
        ({}, {"depth": 1}, "depth=1 but config.text_model.depth is 2"),
        ({"objective": common.simclr_objective()}, {}, "'simclr' has no text tower"),
    ],
)
def test_a_text_tower_that_does_not_fit_is_refused_before_anything_is_trained(
    tmp_path, stage, changes, said
):
    init_from = common.init_from(text_weights=str(tmp_path / "tower"))
    config = with_texts(tmp_path, {**stage, "init_from": init_from})
    foreign_folder(tmp_path / "tower", tower_of(config, tmp_path, **changes), 0)
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    assert not list(tmp_path.glob("*/checkpoints"))


def test_a_text_tower_beside_an_earlier_stage_is_refused(tmp_path):
    both = common.init_from(stage="stage0", text_weights="tower")
    config = with_texts(tmp_path, {}, {"init_from": both}).lock()
    with pytest.raises(UserError, match="init_from has stage and text_weights; give one of"):
        curriculum.run(config, tmp_path, stop=lambda: False)


def test_a_run_of_an_older_version_goes_on_over_keys_that_it_did_not_have(tmp_path):
    config = tiny(stages=("untrained",))
    config.stage.untrained.init_from = common.init_from()
    config = config.lock()
    curriculum.run(config, tmp_path, stop=lambda: False)
    path, stages = tmp_path / "config.json", tmp_path / "curriculum.json"
    kept = json.loads(path.read_text())
    for section, key in (
        ("validate", "keep"), ("micro_batch", "count"), ("data", "text"), ("optim", "nesterov"),
    ):  # fmt: skip
        del kept["config"][section][key]
    for section in (kept["config"], kept["config"]["stage"]["untrained"]):
        for key in ("network", "prefix", "text_naming", "text_prefix", "allow_pickle"):
            del section["init_from"][key]
    del kept["config"]["text_model"]
    path.write_text(json.dumps(kept))
    recorded = json.loads(stages.read_text())
    assert recorded["stages"][0].pop("weights") == "checkpoints/0"
    stages.write_text(json.dumps(recorded))
    curriculum.run(config, tmp_path, stop=lambda: False)
    with config.unlocked():
        config.optim.nesterov = False
    with pytest.raises(UserError, match="config.optim.nesterov was True and is False"):
        curriculum.run(config, tmp_path, stop=lambda: False)
