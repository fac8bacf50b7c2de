"""Every config builds, locks, documents itself, and ends in a report in its `:smoke` form."""

import contextlib
import importlib
import json
import pathlib

import pytest

from bigmed import curriculum

REPO = pathlib.Path(__file__).resolve().parent.parent
ON_EIGHT_DEVICES = ("convirt", "few_label", "quickstart")  # programs compile for twice as long
WITH_PICTURES = ("convirt", "quickstart")  # drawing them takes time
NAMES = sorted(p.stem for p in (REPO / "configs").glob("*.py") if p.stem != "common")


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg).lock()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_how_to_run_it_and_what_to_expect(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    for part in (f"--config configs/{name}.py", "Hours: ", "Expected metric: "):
        assert part in text
    config = load(name)
    assert config.stages and set(config.stages) <= set(config.stage)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_named(name):
    with pytest.raises(ValueError, match="argument 'smoky': valid: .*smoke"):
        load(name, "smoky")


@pytest.mark.parametrize("name", NAMES)
def test_every_smoke_form_ends_in_a_report(name, tmp_path, caplog, on_one_device):
    caplog.set_level("INFO", "bigmed")
    config = load(name, "smoke")
    config.pictures = name in WITH_PICTURES
    with contextlib.nullcontext() if name in ON_EIGHT_DEVICES else on_one_device():
        printed = curriculum.run(config, tmp_path, stop=lambda: False)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["stage"] for row in rows} == set(config.stages)
    assert {row["evaluator"] for row in rows} == set(config.evaluate)
    for row in rows:
        assert row["n_images"] > 0 and row["n_patients"] > 0 and row["split_sha256"]
        if row["value"] is not None and row["ci_low"] is not None:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert all(stage in printed for stage in config.stages)
    # a sweep shows its table after every stage
    assert ("auc_macro of " in caplog.text) == bool(config.sweep.fractions)
    report = (tmp_path / "report.html").read_text()
    assert "synthetic" in report.lower()
    # No patient id of the data set may reach anything that the run reports.
    ids = [f"patient{i:05d}" for i in range(3)]
    suffixes = {".json", ".html", ".csv", ".tex"}
    told = [path for path in tmp_path.iterdir() if path.suffix in suffixes]
    assert {path.suffix for path in told} == suffixes
    for path in (*told, *(tmp_path / "pictures").glob("*.json")):
        assert not any(i in path.read_text() for i in ids)
    kinds = {path.stem.split("-")[1] for path in (tmp_path / "pictures").glob("*.json")}
    assert kinds == ({"views", "neighbours", "map"} if config.pictures else set())
    assert ("data:image/jpeg" in report) == config.pictures
