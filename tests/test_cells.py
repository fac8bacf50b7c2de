"""Cells of a sweep side by side on several devices."""

import concurrent.futures
import json
import threading
import types

import jax
import memory
import numpy as np
import pytest
from memory import pixels, settings

from bigmed import metrics, sharding
from bigmed.evaluation import run_cells
from bigmed.evaluators import knn, linear

STATE = {"scale": np.ones((1, 1), np.float32)}


@pytest.fixture
def toy(monkeypatch):
    return memory.install(monkeypatch)


def sweep_of(toy, tmp_path, mesh, subset=True):
    toy()
    more = {"predictions_dir": tmp_path / "p", "cache_dir": tmp_path / "f", "num_resamples": 20}
    made = []
    for name, whole in (
        ("linear", linear.Evaluator(pixels, mesh, **settings(l2_grid=(0.1, 0.01), **more))),
        ("knn", knn.Evaluator(pixels, mesh, **settings(**more))),
    ):
        for draw in range(3):
            cell = types.SimpleNamespace(evaluator=name, subset=(0.5, draw) if subset else None)
            made.append((cell, whole.with_subset(0.5, draw), {"leakage": name}))
    return made


def test_probes_run_on_devices_of_their_own_and_find_the_same(toy, tmp_path, monkeypatch):
    mesh8 = sharding.make_mesh({"data": 8})
    cells = sweep_of(toy, tmp_path, mesh8)
    one_by_one = [list(evaluator.run(STATE, "x")) for _, evaluator, _ in cells]
    used, threads, fit = [], set(), linear.fit

    def watched(x, targets, l2, task, mesh, **more):
        used.append(mesh.devices.ravel().tolist())
        threads.add(threading.get_ident())
        return fit(x, targets, l2, task, mesh, **more)

    monkeypatch.setattr(linear, "fit", watched)
    with jax.set_mesh(mesh8):  # as in a run
        found = list(run_cells(cells, STATE, "x", mesh8))
    assert [cell for cell, _ in found] == [cell for cell, _, _ in cells]
    assert [len(devices) for devices in used] == [1, 1, 1] and len({d for (d,) in used}) == 3
    assert threading.get_ident() not in threads
    for (cell, rows), expected in zip(found, one_by_one, strict=True):
        assert {row.pop("leakage") for row in rows} == {cell.evaluator}
        for row, other in zip(rows, expected, strict=True):
            assert row["metric"] == other["metric"] and row["n_images"] == other["n_images"]
            if other["value"] is not None:
                assert row["value"] == pytest.approx(other["value"], abs=1e-5)


def test_without_a_sweep_the_whole_mesh_is_used(toy, tmp_path, monkeypatch):
    used, fit = [], linear.fit

    def watched(x, targets, l2, task, mesh, **more):
        used.append(mesh.size)
        return fit(x, targets, l2, task, mesh, **more)

    monkeypatch.setattr(linear, "fit", watched)
    mesh8 = sharding.make_mesh({"data": 8})
    cells = sweep_of(toy, tmp_path, mesh8, subset=False)
    assert len(list(run_cells(cells[:1], STATE, "x", mesh8))) == 1 and used == [8]


def test_a_stop_begins_no_further_cell(toy, tmp_path, monkeypatch):
    mesh8 = sharding.make_mesh({"data": 8})
    cells = sweep_of(toy, tmp_path, mesh8) * 5
    begun = []
    monkeypatch.setattr(linear, "fit", lambda *_, **__: begun.append(1) or 1 / 0)
    results = run_cells(cells, STATE, "x", mesh8)
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) < 15  # of 15 cells of the linear probe


def test_threads_write_one_file_without_losing_it(tmp_path):
    path = tmp_path / "subset.json"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        written = [pool.submit(metrics.write_json, path, list(range(999))) for _ in range(200)]
        for one in written:
            one.result()
    assert json.loads(path.read_text()) == list(range(999))
    assert [p.name for p in tmp_path.iterdir()] == ["subset.json"]
