"""What weights have seen of patients, across stages and runs, and what is refused for it."""

import dataclasses
import json
import logging
import shutil

import jax
import pytest
from ml_collections import ConfigDict

from bigmed import curriculum, evaluation, lineage, sharding, train
from bigmed.data import sources
from bigmed.errors import UserError
from bigmed.report import table
from bigmed.sweep import Cell
from configs import common, quickstart

pytestmark = pytest.mark.usefixtures("one_device")

PHANTOM = "{workdir}/data/phantom"


def tiny(split="train", **overrides):
    """One stage, `simclr`, of two steps, on a split of the synthetic data; k-NN on its splits."""
    config = quickstart.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.stages, config.evaluate = ("simclr",), ("knn",)
    config.data.source.phantom.split = split
    config.data.batch_size = 8
    config.stage.simclr.steps = 2
    config.phantom.update(num_patients=40, size=32)
    config.data.canvas = 32
    config.evaluator.knn.num_resamples = 20
    config.update(overrides)
    return config


def copy_of(run, split="train"):
    """A run that evaluates the weights of another one, and has the data of that."""
    config = tiny(split, stages=("given",))
    here = str(run / "data" / "phantom")
    config.stage.given = common.stage(
        steps=0, init_from=common.init_from(checkpoints=str(run / "00_simclr" / "checkpoints"))
    )
    config.data.source.phantom.dir = here
    for key in ("train", "val", "test"):
        config.evaluator.knn[key].dir = here
    del config.phantom
    return config


def built(config, workdir, name):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = curriculum.prepare_stage(config.lock(), name, 0, workdir)
        return train.build_stage(name, made, workdir / name, mesh)


def checked(config, workdir, name="given"):
    """(lineage, what rows say) of the evaluator of a stage."""
    stage = built(config, workdir, name)
    seen = lineage.trace(config, name, stage, workdir)
    return seen, evaluation.check_held_out("knn", config, stage, seen, workdir)


@pytest.fixture(scope="module")
def on_test(on_one_device, tmp_path_factory):
    """A finished run that was trained on the split 'test', and not evaluated."""
    workdir = tmp_path_factory.mktemp("runs") / "HOSPITAL"
    workdir.mkdir()
    with on_one_device():
        curriculum.run(tiny("test", evaluate=()).lock(), workdir, stop=lambda: False)
    return workdir


def refusal(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    said = str(error.value)
    assert "\n" not in said and "patient0" not in said
    return said


def patients(run, split):
    return len(sources.open_source({"dir": str(run / "data/phantom"), "split": split}).patient_keys)


# ---------------------------------------------------------------------------------------- lineages


def test_weights_of_a_run_that_saw_the_test_patients_are_refused(on_test, tmp_path):
    said = refusal(curriculum.run, copy_of(on_test).lock(), tmp_path, lambda: False)
    count = patients(on_test, "test")
    assert f"knn.test: 'synthetic_phantom/test' shares {count} patients" in said
    assert "which 'HOSPITAL/simclr' was trained on" in said
    assert not list(tmp_path.glob("*/checkpoints"))


def test_checkpoints_that_an_evaluator_averages_with_are_followed_too(on_test, tmp_path):
    config = tiny()
    stage = built(config, tmp_path, "simclr")
    seen = lineage.trace(config, "simclr", stage, tmp_path)
    both = lineage.with_checkpoints(seen, [str(on_test / "00_simclr" / "checkpoints")])
    assert {sight.where for sight in both.sights} == {"simclr", "HOSPITAL/simclr"}
    assert len(seen.sights) == 1
    alone = lineage.with_checkpoints(seen, [str(tmp_path)])
    assert "says what it saw" in alone.unknown[0]
    with config.unlocked():
        config.evaluator.knn.checkpoints = (str(on_test / "00_simclr" / "checkpoints"),)
    with pytest.raises(UserError, match="test' shares .* patients with .*HOSPITAL/simclr"):
        evaluation.check_held_out("knn", config, stage, seen, tmp_path)


def test_what_a_run_saw_is_noted_as_a_hash_of_the_whole_set(on_test):
    (stage,) = json.loads((on_test / "curriculum.json").read_text())["stages"]
    source = sources.open_source({"dir": str(on_test / "data/phantom"), "split": "test"})
    assert stage["saw"] == {"phantom": source.split_sha256}


def test_nothing_is_found_where_patients_are_apart(on_test, tmp_path):
    config = copy_of(on_test)
    config.evaluator.knn.test.split = "val"
    config.evaluator.knn.val.split = "train"
    seen, about = checked(config, tmp_path)
    assert len(seen.sights) == 1 and not seen.unknown
    assert about == {"transductive": False, "leakage": "none found"}
    assert table.leakage_notes([{"evaluator": "knn", **about}]) == []


def test_a_chain_of_runs_and_stages_is_followed_to_its_beginning(on_test, tmp_path):
    middle = tmp_path / "MIDDLE"
    config = copy_of(on_test, "train")
    config.stage.simclr = common.stage(steps=2, init_from=config.stage.given.init_from)
    config.stage.more = common.stage(steps=2, init_from=common.init_from(stage="simclr"))
    config.stages = ("simclr", "more")
    middle.mkdir()
    record = [{"name": n, "seed": 0, "directory": f"0{i}_{n}"} for i, n in enumerate(config.stages)]
    (middle / "curriculum.json").write_text(json.dumps({"stages": record}))
    (middle / "config.json").write_text(
        json.dumps({"config": json.loads(config.to_json_best_effort())})
    )
    last = copy_of(on_test)
    folder = str(middle / "01_more" / "checkpoints")
    last.stage.given = common.stage(steps=2, init_from=common.init_from(checkpoints=folder))
    seen = lineage.trace(last, "given", built(last, tmp_path, "given"), tmp_path)
    found = [(sight.where, sight.source.name) for sight in seen.sights]
    train, test = "synthetic_phantom/train", "synthetic_phantom/test"
    assert found == [
        ("given", train), ("MIDDLE/more", train), ("MIDDLE/simclr", train),
        ("HOSPITAL/simclr", test),
    ]  # fmt: skip
    # the run in the middle is older than the note
    assert seen.unknown == tuple(
        f"'MIDDLE/{name}' did not note whether it saw the patients there are now"
        for name in ("more", "simclr")
    )


def moved(on_test, tmp_path):
    shutil.copytree(on_test, tmp_path / "HOSPITAL")
    config = copy_of(on_test)
    folder = tmp_path / "HOSPITAL" / "00_simclr" / "checkpoints"
    config.stage.given.init_from.checkpoints = str(folder)
    return config, tmp_path / "HOSPITAL"


def test_data_that_cannot_be_opened_are_said_to_be_unchecked(on_test, tmp_path, caplog):
    config, run = moved(on_test, tmp_path)
    shutil.rmtree(run / "data")
    (tmp_path / "here").mkdir()
    with caplog.at_level(logging.WARNING, "bigmed"):
        printed = curriculum.run(config.lock(), tmp_path / "here", lambda: False)
    reason = "'phantom/test', which 'HOSPITAL/simclr' saw, cannot be opened"
    lines = [r.message for r in caplog.records if "leakage" in r.message]
    assert lines == [f"00_given: leakage cannot be checked in full: {reason}"]
    rows = json.loads((tmp_path / "here" / "results.json").read_text())
    assert {row["leakage"] for row in rows} == {f"unchecked: {reason}"}
    assert f"unchecked: {reason}" in printed
    report = (tmp_path / "here" / "report.html").read_text()
    assert "unchecked: &#x27;phantom/test&#x27;, which" in report
    # nothing of it is a secret or a folder
    assert str(tmp_path) not in rows[0]["leakage"]


def test_data_that_were_prepared_anew_are_said_to_be_unchecked(on_test, tmp_path):
    config, run = moved(on_test, tmp_path)
    config.evaluator.knn.test.split = "val"
    config.evaluator.knn.val.split = "train[:40%]"
    record = json.loads((run / "curriculum.json").read_text())
    record["stages"][0]["saw"]["phantom"] = "0" * 64
    (run / "curriculum.json").write_text(json.dumps(record))
    _, about = checked(config, tmp_path)
    reason = "'phantom/test', which 'HOSPITAL/simclr' saw, has other patients now"
    assert about["leakage"] == f"unchecked: {reason}"


def test_what_foreign_weights_and_lone_checkpoints_saw_is_not_known(on_test, tmp_path):
    config = copy_of(on_test)
    shutil.copytree(on_test / "00_simclr", tmp_path / "alone")
    config.stage.given.init_from.checkpoints = str(tmp_path / "alone" / "checkpoints")
    seen, about = checked(config, tmp_path)
    assert not seen.sights and about["leakage"].startswith("unchecked: no run around 'alone'")
    config = copy_of(on_test)
    config.stage.given.init_from = common.init_from(weights="/data/remedis")
    _, about = checked(config, tmp_path)
    assert about["leakage"] == (
        "unchecked: what the weights 'remedis' were trained on is not known"
    )


@pytest.mark.parametrize("changed", [False, True])
def test_a_fine_tuned_network_saw_what_it_was_fine_tuned_on(on_test, tmp_path, changed):
    config, run = moved(on_test, tmp_path)
    kept = json.loads((run / "config.json").read_text())
    section = common.finetune(PHANTOM, epochs=1.0)
    section.train.split, section.val.split = "train", "val"
    kept["config"]["evaluator"] = {"tuned": json.loads(section.to_json_best_effort())}
    digest = Cell("tuned", "tuned", section, None).digest()[:8]
    if changed:
        kept["config"]["evaluator"]["tuned"]["dropout"] = 0.5
    (run / "config.json").write_text(json.dumps(kept))
    folder = run / "00_simclr" / f"tuned-{digest}" / "fraction1_draw0" / "run0" / "checkpoints"
    config.stage.given.init_from.checkpoints = str(folder)
    seen = lineage.trace(config, "given", built(config, tmp_path, "given"), tmp_path)
    more = [(s.where, s.source.name, s.trained, s.objective) for s in seen.sights[1:]]
    if changed:
        assert not more
        assert seen.unknown == ("'HOSPITAL/tuned' has other settings now than when it trained",)
    else:
        assert more == [
            ("HOSPITAL/tuned", "synthetic_phantom/train", True, "supervised"),
            ("HOSPITAL/tuned", "synthetic_phantom/val", False, "supervised"),
        ]


# --------------------------------------------------------------------------------- what is refused


def test_a_split_that_chooses_settings_was_not_trained_on_but_may_have_chosen_weights(tmp_path):
    said = refusal(checked, tiny("val"), tmp_path, "simclr")
    assert "config.evaluator.knn.val: 'synthetic_phantom/val' shares" in said
    config = tiny()
    config.data.source.held_out = common.source(PHANTOM, "val")
    config.data.batch_size = 4
    config.validate.update(sources=("held_out",), every=1)
    seen, about = checked(config, tmp_path, "simclr")
    assert [sight.trained for sight in seen.sights] == [True, False]
    assert about == {"transductive": False, "leakage": "none found"}


def test_shift_sets_and_queries_are_held_out_too(on_test, tmp_path):
    config = copy_of(on_test)
    config.evaluator.knn.test.split = "val"
    config.evaluator.knn.val.split = "train"
    other = common.source(str(on_test / "data" / "phantom"), "test")
    config.evaluator.knn.shift = ConfigDict({"site": {"source": other}})
    assert "config.evaluator.knn.shift.site: " in refusal(checked, config, tmp_path)
    config.unlock()
    config.evaluator.knn = common.retrieval(other)
    assert "config.evaluator.knn.query: " in refusal(checked, config, tmp_path)


def test_transductive_is_declared_in_every_row_table_and_report(on_test, tmp_path):
    config = copy_of(on_test)
    config.evaluator.knn.transductive = True
    printed = curriculum.run(config.lock(), tmp_path, lambda: False)
    rows = json.loads((tmp_path / "results.json").read_text())
    said = (
        f"'synthetic_phantom/test' shares {patients(on_test, 'test')} patients with "
        "'synthetic_phantom/test', which 'HOSPITAL/simclr' was trained on"
    )
    assert {(row["transductive"], row["leakage"]) for row in rows} == {(True, said)}
    note = f"knn: {table.NOTE_TRANSDUCTIVE}"
    assert note in printed and said in printed
    assert note in (tmp_path / "report.html").read_text()


def test_transductive_is_no_excuse_for_labels(tmp_path):
    config = tiny("train+test")
    config.evaluator.knn.transductive = True
    seen, about = checked(config, tmp_path, "simclr")
    assert about["transductive"]
    labels = tuple(dataclasses.replace(sight, objective="supervised") for sight in seen.sights)
    reports = tuple(dataclasses.replace(sight, objective="convirt") for sight in seen.sights)
    stage = built(config, tmp_path, "simclr")
    for sights, what in ((labels, "labels"), (reports, "reports")):
        other = lineage.Lineage(sights, ())
        said = refusal(evaluation.check_held_out, "knn", config, stage, other, tmp_path)
        assert f"learnt from their {what}; transductive=True is for images alone" in said


def test_data_without_patient_ids_are_unchecked_unless_the_records_are_the_same(on_test, tmp_path):
    config = copy_of(on_test)
    stage = built(config, tmp_path, "given")

    def seen(split):
        about = {"dir": str(on_test / "data" / "phantom"), "split": split}
        nameless = dataclasses.replace(sources.open_source(about), has_patients=False)
        return lineage.Lineage((lineage.Sight("other", "simclr", True, nameless),), ())

    about = evaluation.check_held_out("knn", config, stage, seen("train"), tmp_path)
    assert about["leakage"] == "unchecked: 'synthetic_phantom/train' names no patients"
    said = refusal(evaluation.check_held_out, "knn", config, stage, seen("test[50%:]"), tmp_path)
    images = sources.open_source({"dir": str(on_test / "data/phantom"), "split": "test[50%:]"})
    assert f"shares {len(images)} patients with 'synthetic_phantom/test[50%:]'" in said


def test_rows_that_are_older_than_the_comparison_say_nothing():
    assert table.leakage_notes([{"evaluator": "knn"}]) == []
