"""The networks of a checkpoint: the student, which is trained, and the teacher that follows it.

An objective with a teacher (`bigmed.objectives.momentum`: C2L, MoCo, BYOL, MoCo v3) keeps the
teacher's parameters, a moving average of the student's, in `extra`, and its running statistics
among the batch statistics. Whoever takes a network's weights from a checkpoint takes them here,
under the student's names.
"""

import os
import pathlib

import numpy as np

from bigmed import checkpoint, tree
from bigmed.errors import UserError, did_you_mean

STUDENT, TEACHER = "student", "teacher"
NETWORKS = (STUDENT, TEACHER)
_PREFIX = "teacher_"
# where a teacher's module has what -> where the student's has it
_PLACES = {
    f"extra/teacher/{_PREFIX}": "params/",
    f"batch_stats/{_PREFIX}": "batch_stats/",
}


def teacher(module: str) -> str:
    """The name of a module's teacher."""
    return _PREFIX + module


def student(module: str) -> str:
    """Undoes `teacher`."""
    return module.removeprefix(_PREFIX)


def check(network: str, option: str) -> None:
    """Raises `UserError`, naming the option that gave it, unless `network` is one of `NETWORKS`."""
    if network not in NETWORKS:
        raise UserError(f"{option}={network!r}: {did_you_mean(network, NETWORKS)}")


def load(
    folder: str | os.PathLike,
    network: str = STUDENT,
    *,
    step: int | None = None,
    patterns: tuple[str, ...] = ("(params|batch_stats)/.*",),
) -> tuple[dict[str, np.ndarray], int]:
    """A network's parameters and batch statistics, from the newest whole checkpoint.

    Args:
      folder: a stage's folder of checkpoints, or one of its steps; see `checkpoint.load_flat`.
      network: one of `NETWORKS`.
      step: that the newest has to be.
      patterns: of the paths that are wanted.

    Returns:
      ({path in a student's state: array}, step).

    Raises:
      UserError: what `checkpoint.load_flat` raises, the newest is of another step, or it has no
        such network.
    """
    folder = pathlib.Path(folder)
    flat, meta = checkpoint.load_flat(folder)
    if step not in (None, meta["step"]):
        raise UserError(
            f"the last checkpoint of '{folder.parent.name}' is torn and has been set aside; "
            "run the same command again to train its end anew"
        )
    if network == TEACHER:
        flat = _teachers(flat)
    if not flat:
        raise UserError(
            f"network='{network}': {folder.parent.name}/{meta['step']} has none, as its objective "
            f"keeps no moving average; valid: {STUDENT}"
        )
    return {name: leaf for name, leaf in flat.items() if tree.matches(patterns, name)}, meta["step"]


def _teachers(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The teacher's leaves under the student's names; none of a state without a teacher."""
    return {
        ours + name.removeprefix(theirs): leaf
        for name, leaf in flat.items()
        for theirs, ours in _PLACES.items()
        if name.startswith(theirs)
    }
