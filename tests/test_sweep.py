"""Few-label sweeps through the whole job: cells, their order, what is skipped and what is shown."""

import json

import pytest

from bigmed import curriculum, sweep
from bigmed.errors import Preempted, UserError
from bigmed.record import Record
from configs import few_label

pytestmark = pytest.mark.usefixtures("one_device")


def config_of(fractions=(0.5, 1.0), seeds=(0, 1), evaluate=("knn",), **settings):
    config = few_label.get_config("smoke")
    config.model = {"name": "tiny_model:Model"}
    config.augment.size = 24
    config.update(stages=("untrained",), evaluate=evaluate)
    config.sweep.update(fractions=fractions, seeds=seeds)
    config.evaluator.knn.update(num_resamples=20, **settings)
    config.evaluator.linear.update(num_resamples=20)
    return config.lock()


def results(workdir):
    rows = json.loads((workdir / "results.json").read_text())
    return {row["cell"]: row for row in rows if row["metric"] == "auc_macro"}


def test_cells_are_every_evaluator_at_every_draw():
    names = [cell.name for cell in sweep.cells(config_of((1.0, 0.5, 0.1, 0.5), (3, 0, 3)))]
    assert names == ["knn@0.1/3", "knn@0.1/0", "knn@0.5/3", "knn@0.5/0", "knn@1.0"]
    cells = sweep.cells(config_of(evaluate=("linear", "knn")))
    assert [cell.subset for cell in cells] == [(0.5, 0), (0.5, 1), (1.0, 0)] * 2
    assert len({cell.digest() for cell in cells}) == len(cells)
    assert cells[1].settings.seed == 1 and cells[1].settings.fraction == 0.5
    assert cells[0].digest() != sweep.cells(config_of(k_grid=(3,), evaluate=("knn",)))[0].digest()
    (alone,) = sweep.cells(config_of(fractions=()))
    assert (alone.name, alone.subset) == ("knn", None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fractions": (0.5, 1.5)}, "sweep.fractions has 1.5; valid: numbers above 0, at most 1"),
        ({"seeds": (-1,)}, "sweep.seeds has -1"),
        ({"seeds": ()}, "sweep.seeds is empty"),
        ({"evaluate": ("knnn",)}, "did you mean 'knn'"),
    ],
)
def test_what_no_cell_can_be_made_of_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        sweep.cells(config_of(**settings))


def test_an_evaluator_without_labels_to_draw_is_refused():
    config = config_of()
    with config.unlocked():
        del config.evaluator.knn["fraction"]
    with pytest.raises(UserError, match="config.evaluator.knn has no fraction"):
        sweep.cells(config)


def test_rows_of_a_killed_sweep_are_there_at_the_next_start(tmp_path):
    entry = {"name": "untrained", "seed": 0, "directory": "00_untrained"}
    one, other, _ = sweep.cells(config_of())
    killed = Record(tmp_path, [entry])
    killed.add_rows(entry, one, [{"metric": "auc_macro", "value": float("nan")}])
    killed.add_rows(entry, one, [{"metric": "auc_macro", "value": 0.5}])  # of other settings
    killed.add_rows(entry, other, [{"metric": "auc_macro", "value": 0.25}])
    assert not (tmp_path / "results.json").exists()
    (journal,) = tmp_path.glob("results.*")
    with journal.open("a") as file:
        file.write('{"origin": {"sta')  # killed while it was written
    found = Record(tmp_path, [entry])
    assert [row["value"] for row in found.rows] == [0.5, 0.25]
    assert [cell.name for cell in found.not_evaluated(entry, sweep.cells(config_of()))] == [
        "knn@1.0"
    ]
    found.write_results()
    assert {cell: row["value"] for cell, row in results(tmp_path).items()} == {
        "knn@0.5/0": 0.5, "knn@0.5/1": 0.25,
    }  # fmt: skip
    assert not journal.exists() and Record(tmp_path, [entry]).rows == found.rows


def test_a_sweep_is_continued_cell_by_cell_and_grows(tmp_path, capfd):
    questions = iter(range(100))
    with pytest.raises(Preempted, match="before 'knn@0.5/1'"):
        curriculum.run(config_of(), tmp_path, stop=lambda: next(questions) == 1)
    assert set(results(tmp_path)) == {"knn@0.5/0"}
    first = results(tmp_path)["knn@0.5/0"]
    table = curriculum.run(config_of(), tmp_path, stop=lambda: False)
    found = results(tmp_path)
    assert set(found) == {"knn@0.5/0", "knn@0.5/1", "knn@1.0"}
    assert found["knn@0.5/0"] == first  # was not computed again
    assert "evaluations: step 2/2" in capfd.readouterr().err
    # other fractions in the same folder compute what is missing
    before = (tmp_path / "predictions" / first["predictions"]).stat().st_mtime_ns
    curriculum.run(config_of((0.25, 0.5, 1.0)), tmp_path, stop=lambda: False)
    assert set(results(tmp_path)) == {*found, "knn@0.25/0", "knn@0.25/1"}
    assert (tmp_path / "predictions" / first["predictions"]).stat().st_mtime_ns == before
    assert "5/5" not in capfd.readouterr().err
    table = curriculum.run(config_of((0.25, 0.5, 1.0)), tmp_path, stop=lambda: False)
    lines = table.splitlines()
    assert lines[0].startswith("auc_macro of knn: ")
    shares = [line.split()[0] + " " + line.split()[1] for line in lines if " %" in line[:9]]
    assert shares == ["25 %", "50 %", "100 %"]
    assert f"{found['knn@1.0']['value']:.3f}" in table
    assert "patients" in lines[3]
    # smaller draws are parts of larger ones of the same seed
    manifests = {
        name: set(json.loads(path.read_text())["records"])
        for name, row in results(tmp_path).items()
        for path in [tmp_path / "predictions" / f"subset-{row['subset_sha256']}.json"]
    }
    assert manifests["knn@0.25/0"] < manifests["knn@0.5/0"] < manifests["knn@1.0"]
    assert manifests["knn@0.5/0"] != manifests["knn@0.5/1"]
    assert (tmp_path / "report.html").stat().st_size > 0
