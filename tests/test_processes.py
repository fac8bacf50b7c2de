"""Objectives in two processes: the numbers of one device (of SimCLR: tests/test_run.py)."""

import pathlib

import jax
import numpy as np
import test_byol
import test_c2l
import test_convirt
from exactness import assert_same, evaluator, mesh_of
from processes import run_two
from test_objectives import DATA, make_batch, stage_config

from bigmed.objectives import micle
from configs import common

IN_TWO_PROCESSES = """
import numpy, test_processes
for name, run in test_processes.evaluators(sys.argv[1], (2, 2, 1)):
    numpy.savez(f"{sys.argv[1]}/{name}-{jax.process_index()}.npz", *jax.tree.leaves(run()))
"""


def evaluators(folder, sizes):
    """(name, `evaluator`) of each objective."""
    spec = test_convirt.spec_of(pathlib.Path(folder))
    cases = {
        "micle": (micle.Objective(stage_config(), DATA), make_batch(2)),
        "c2l": (test_c2l.make(), make_batch(1)),
        "byol": (test_byol.make("byol", model=common.vit("mu/16")), make_batch(1)),
        **{name: test_convirt.option(name, spec) for name in ("convirt", "siglip")},
    }
    for name, (objective, batch) in cases.items():
        yield name, evaluator(objective, batch, mesh_of(*sizes))


def test_two_processes_give_the_numbers_of_one_device(tmp_path):
    run_two(IN_TWO_PROCESSES, tmp_path, devices=2)
    for name, at_once in evaluators(tmp_path, (1, 1, 1)):
        want, nudged = at_once(), at_once(nudge=True)
        for number in range(2):
            with np.load(tmp_path / f"{name}-{number}.npz") as file:
                leaves = list(file.values())
            assert_same(jax.tree.unflatten(jax.tree.structure(want), leaves), want, nudged)
