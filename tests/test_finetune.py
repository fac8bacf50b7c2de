"""Fine-tuning through the whole job: what is trained on what, chosen how, stopped and continued."""

import json

import numpy as np
import pytest

from bigmed import curriculum, metrics, networks, sharding, train
from bigmed.data.sources import open_source
from bigmed.errors import Preempted, UserError
from configs import common, finetune

pytestmark = pytest.mark.usefixtures("one_device")


def config_of(**settings):
    config = finetune.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.update(stages=("untrained",), evaluate=("finetune",))
    fast = {"learning_rates": (0.05,), "head_only_steps": 0, "runs": 1, "num_resamples": 20}
    fast["augment"] = {"recipe": "none"}
    with config.ignore_type():
        config.evaluator.finetune.update({**fast, **settings})
    return config.lock()


def run(config, workdir, stop=lambda: False):
    workdir.mkdir(exist_ok=True)
    table = curriculum.run(config, workdir, stop=stop)
    rows = json.loads((workdir / "results.json").read_text())
    return table, rows


def folder_of(workdir):
    (folder,) = (workdir / "00_untrained").glob("finetune-*")
    return folder


def weights(folder):
    return networks.load(folder, patterns=("params/.*",))[0]


GRID = {"learning_rates": (0.03, 0.05), "steps": 4, "evaluate_every": 2, "runs": 2}


@pytest.fixture(scope="module")
def whole(on_one_device, tmp_path_factory):
    """A run of a grid of two, never stopped: its folder, table and rows."""
    folder = tmp_path_factory.mktemp("whole")
    with on_one_device():
        return folder, *run(config_of(**GRID), folder)


def test_the_grid_is_chosen_on_validation_and_the_winner_run_again(whole):
    folder, table, rows = whole
    main = [row for row in rows if row["metric"] == "auc_macro"]
    assert [row["run"] for row in main] == [0, 1] and "2 seeds" in table
    assert len({row["predictions"] for row in main}) == 2
    runs = {
        path.parent.name: json.loads(path.read_text())["value"]
        for path in folder_of(folder).glob("*/*/outcome.json")
    }
    assert set(runs) == {"lr0.03_wd0_run0", "lr0.05_wd0_run0"}
    best = max(runs, key=runs.get)
    assert main[0]["chosen"]["lr"] == float(best.split("_")[0][2:])
    # the weights of the winner stay, for those who want them, and no others
    (kept,) = folder_of(folder).glob("*/*/best")
    assert kept.parent.name == best
    # the outcome is the best look at validation, and its weights are those that are used
    lines = metrics.read_jsonl(kept.parent / "metrics.jsonl")
    looks = [line["val_auc_macro"] for line in lines if "val_auc_macro" in line]
    assert len(looks) == 2 and runs[best] == max(looks)
    # all of the network was trained
    before, after = weights(folder / "00_untrained" / "checkpoints"), weights(kept)
    name = "params/backbone/stem/conv/kernel"
    assert np.abs(after[name] - before[name]).max() > 0


def test_a_stopped_run_continues_and_ends_bit_equal(whole, tmp_path):
    folder, _, expected = whole
    questions = iter(range(100))
    with pytest.raises(Preempted):  # in the second setting of the grid
        run(config_of(**GRID), tmp_path, stop=lambda: next(questions) == 6)
    assert len(list(folder_of(tmp_path).glob("*/*/outcome.json"))) == 1
    _, rows = run(config_of(**GRID), tmp_path)
    assert [row["value"] for row in rows] == [row["value"] for row in expected]
    best = [next(folder_of(place).glob("*/*/best")) for place in (folder, tmp_path)]
    assert best[0].parent.name == best[1].parent.name
    for name, leaf in weights(best[0]).items():
        np.testing.assert_array_equal(weights(best[1])[name], leaf)


def test_a_rate_that_diverges_is_out_of_the_choice(tmp_path, caplog):
    settings = {"learning_rates": (0.05, 1e30), "steps": 2, "evaluate_every": 2}
    _, rows = run(config_of(**settings), tmp_path)
    assert {row["chosen"]["lr"] for row in rows} == {0.05}
    assert "is out of the choice" in caplog.text
    (noted,) = folder_of(tmp_path).glob("*/lr1e+30*/outcome.json")
    assert json.loads(noted.read_text()) == {"value": None}
    with pytest.raises(UserError, match="every run of learning_rates"):
        run(config_of(**{**settings, "learning_rates": (1e30, 1e31)}), tmp_path / "all")


def test_the_head_alone_is_trained_first(tmp_path):
    settings = {"steps": 1, "evaluate_every": 1, "head_only_steps": 2, "learning_rates": (1e-12,)}
    run(config_of(**settings), tmp_path)
    before = weights(tmp_path / "00_untrained" / "checkpoints")
    (alone,) = folder_of(tmp_path).glob("*/*_run0/head/checkpoints")
    (best,) = folder_of(tmp_path).glob("*/*_run0/best")
    alone, after = weights(alone), weights(best)
    for name in after:
        if name.startswith("params/backbone/"):
            np.testing.assert_array_equal(alone[name], before[name])
    kernel = "params/classifier/kernel"
    assert np.abs(alone[kernel]).max() > 1e-5
    np.testing.assert_allclose(after[kernel], alone[kernel], atol=1e-10)


def test_only_the_drawn_patients_labelled_images_are_trained_on(tmp_path):
    config = config_of(fraction=0.5, seed=3, batch_size=64, steps=1, evaluate_every=1)
    _, rows = run(config, tmp_path)
    row = rows[0]
    source = {"dir": str(tmp_path / "data" / "phantom"), "split": "train"}
    some = open_source({**source, "labelled": "ignore", "fraction": 0.5, "fraction_seed": 3})
    whole = open_source(source)
    assert row["n_train_patients"] == len(some.patient_keys) < len(whole.patient_keys)
    assert row["n_train_images"] == len(some)
    described = json.loads(next((tmp_path / "predictions").glob("subset-*.json")).read_text())
    assert described["n_patients"] == len(some.patient_keys)
    texts = [some.records.read("image", [i])[0] for i in range(3)]
    at = described["records"][:3]
    assert texts == [whole.records.read("image", [i])[0] for i in at]


def test_a_run_ends_when_patience_does(tmp_path):
    # the rate is so small that no look at validation is better than the first
    config = config_of(learning_rates=(1e-12,), steps=50, evaluate_every=2, patience=2)
    run(config, tmp_path)
    (path,) = folder_of(tmp_path).glob("*/*/metrics.jsonl")
    looks = [line["step"] for line in metrics.read_jsonl(path) if "val_auc_macro" in line]
    assert looks == [2, 4, 6]
    table, _ = run(config, tmp_path)  # finished
    assert "auc_macro" in table


def test_layers_of_a_projection_head_are_carried(tmp_path):
    config = config_of(from_layer=1, steps=1, evaluate_every=1, learning_rates=(1e-12,))
    run(config, tmp_path)
    before = weights(tmp_path / "00_untrained" / "checkpoints")
    after = weights(next(folder_of(tmp_path).glob("*/*/best")))
    name = "params/head/dense1/kernel"
    np.testing.assert_allclose(after[name], before[name], atol=1e-9)
    assert not any(leaf.startswith("params/head/dense2") for leaf in after)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rates": ()}, "rates above 0"),
        ({"class_weights": "sqrt"}, "valid: none, balanced"),
        ({"epochs": 1.0}, "one of steps and epochs"),
        ({"from_layer": 3}, "projection head has 2 layers"),
        ({"average": "features"}, "valid: scores"),
        ({"patience": -1}, "patience=-1"),
        ({"augment": {"recipe": "crop_flp"}}, "did you mean 'crop_flip'"),
        ({"optim": {"name": "sdg"}}, "did you mean 'sgd'"),
        ({"learning_rate": (0.1,)}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        run(config_of(**settings), tmp_path)
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize("protocol", list(finetune.PROTOCOLS))
def test_every_protocol_builds(tmp_path, protocol):
    given = finetune.get_config(protocol).evaluator.finetune
    config = config_of()
    folder = dict(config.evaluator.finetune)
    with config.unlocked(), config.ignore_type():
        config.evaluator.finetune = given
        for key in ("train", "val", "test"):
            config.evaluator.finetune[key] = folder[key]
        if given.select_by == "accuracy":  # the phantom is multi_label
            config.evaluator.finetune.select_by = "auc_macro"
    made = curriculum.prepare_stage(config.lock(), "untrained", 0, tmp_path)
    mesh = sharding.make_mesh(config.mesh)
    stage = train.build_stage("00_untrained", made, tmp_path / "00_untrained", mesh)
    built = curriculum.make_evaluator("finetune", config, stage, tmp_path, b"", lambda: False)
    assert built.settings() and common.finetune("x").keys() == given.keys()
