"""Objectives in two processes: the numbers of float64, and with real encoders of one device.

(In tiles: tests/test_tiled.py.)
"""

import pathlib

import jax
import numpy as np
import pytest
import test_convirt
import test_exactness
from exactness import assert_same, evaluator, mesh_of
from processes import run_two
from test_objectives import DATA, make_batch, stage_config

from bigmed.objectives import convirt, micle

CASES = ("simclr", "micle", "c2l", "convirt", "siglip", "byol", "moco_v3")
IN_TWO_PROCESSES = """
import numpy, test_processes
for name, run in test_processes.in_this_process(sys.argv[1], (2, 2, 1)):
    numpy.savez(f"{sys.argv[1]}/{name}-{jax.process_index()}.npz", *jax.tree.leaves(run()))
"""


def real(folder, sizes):
    """(name, `evaluator`) of convolutions with batch norms, and of two transformers."""
    spec = test_convirt.spec_of(folder)
    cases = {
        "real_micle": (micle.Objective(stage_config(), DATA), make_batch(2)),
        "real_convirt": (
            convirt.Objective(test_convirt.stage_config(), spec), test_convirt.batch_of()
        ),
    }  # fmt: skip
    for name, (objective, batch) in cases.items():
        yield name, evaluator(objective, batch, mesh_of(*sizes))


def in_this_process(folder, sizes):
    """(name, a function that returns a tree) of all."""
    folder = pathlib.Path(folder) / f"of_{jax.process_index()}"  # its vocabulary is written once
    folder.mkdir()
    yield from real(folder, sizes)
    with pytest.MonkeyPatch.context() as patch:
        test_exactness.quick_views(patch)
        for name in CASES:
            objective, batch, state = test_exactness.case(name, folder)
            run = evaluator(objective, batch, mesh_of(*sizes), fresh=state)
            yield name, lambda run=run: test_exactness.compared(run())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A function of a case's name: the leaves of what each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    run_two(IN_TWO_PROCESSES, folder, devices=2)

    def leaves(name, number):
        with np.load(folder / f"{name}-{number}.npz") as file:
            return list(file.values())

    return lambda name: [leaves(name, number) for number in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_float64s(name, found, tmp_path, monkeypatch):
    test_exactness.quick_views(monkeypatch)
    want = test_exactness.expected(name, *test_exactness.case(name, tmp_path))
    for leaves in found(name):
        test_exactness.assert_exact(jax.tree.unflatten(jax.tree.structure(want[:2]), leaves), want)


def test_with_real_encoders_all_is_as_on_one_device(found, tmp_path):
    for name, at_once in real(tmp_path, (1, 1, 1)):
        want, nudged = at_once(), at_once(nudge=True)
        for leaves in found(name):
            assert_same(jax.tree.unflatten(jax.tree.structure(want), leaves), want, nudged)
