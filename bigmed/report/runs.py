"""What a workdir, or several side by side, holds for a report."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed import statistics
from bigmed.errors import UserError
from bigmed.report import table

log = logging.getLogger("bigmed")

# of a row of results
NEEDED = (
    *table.COMMON,
    *("stage", "seed", "metric", "value", "ci_low", "ci_high"),
    *("n_images", "n_patients", "split_sha256"),
)
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
Predictions = Mapping[str, np.ndarray]  # see `evaluators.predictions.write`


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir; any of its files may be missing.

    Attributes:
      workdir: its folder.
      config: config.json.
      stages: those of curriculum.json.
      rows: results.json.
      data: data.json.
      pictures: what the files pictures/*.json tell.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    stages: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    data: Sequence[Mapping[str, Any]]
    pictures: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.workdir.name or "bigmed"

    @property
    def synthetic(self) -> bool:
        return table.is_synthetic(self.rows) or bool(self.config.get("config", {}).get("phantom"))


def read_run(workdir: str | os.PathLike) -> Run:
    """Reads a workdir.

    Raises:
      UserError: there is no such folder, or one of its files is not what a run writes.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no folder {workdir}; give the --workdir of a run")
    rows = _read_json(workdir / "results.json", [])
    for number, row in enumerate(rows):
        missing = [key for key in NEEDED if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(
                f"{workdir / 'results.json'}: row {number} has no {missing[0]}; it is written by a "
                "run"
            )
    return Run(
        workdir=workdir,
        config=_read_json(workdir / "config.json", {}),
        stages=_read_json(workdir / "curriculum.json", {}).get("stages", []),
        rows=rows,
        data=_read_json(workdir / "data.json", []),
        pictures=[
            _read_json(path, {}) for path in sorted((workdir / "pictures").glob("*.json"))
        ],
    )


def _read_json(path: pathlib.Path, default: Any) -> Any:
    """What the file holds, of the type of `default`, which stands for a missing file."""
    if not path.exists():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, type(default)):
            raise ValueError(f"it holds {found!r:.20}")
    except ValueError as error:
        raise UserError(f"{path} is no JSON of a run ({error})") from error
    return found


def joined_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The result rows of all runs; predictions are whole paths.

    Of several runs the stages are called '<run>: <stage>'.
    """
    joined = []
    for run, name in zip(runs, names(runs), strict=True):
        for row in run.rows:
            row = dict(row)
            if row.get("predictions"):
                row["predictions"] = str(run.workdir / "predictions" / row["predictions"])
            if len(runs) > 1:
                row["stage"] = f"{name}: {row['stage']}"
            joined.append(row)
    return joined


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run, unlike the others'."""
    taken = [run.name for run in runs]
    return [f"{n} ({i})" if taken.count(n) > 1 else n for i, n in enumerate(taken, start=1)]


class Tested:
    """A block of results with the predictions that they are computed from, each read once.

    Args:
      block: of `table.blocks`, of rows whose predictions are whole paths.
    """

    def __init__(self, block: table.Block):
        self.block = block
        self._files: dict[str, dict[tuple, str]] = {stage: {} for stage in block.stages}
        self._untrained: dict[tuple, Sequence[str]] = {}
        for row in block.rows:
            if row.get("predictions"):
                key = (row["seed"], row.get("subset_seed"), row.get("run", 0))
                self._files[row["stage"]][key] = row["predictions"]
                self._untrained[row["stage"], key] = row.get("untrained_classes", ())
        shared = set.intersection(*(set(of_stage) for of_stage in self._files.values()))
        # (training seed, draw of labels, run) of what all stages have
        self.repeats = sorted(shared, key=lambda k: tuple(-1 if p is None else p for p in k))

    @functools.cached_property
    def predictions(self) -> dict[str, list[Predictions]]:
        """Of each stage, one for each of `repeats`; {} if any cannot be used."""
        if not self.repeats:
            return {}
        try:
            loaded = {
                stage: [_load(of_stage[key]) for key in self.repeats]
                for stage, of_stage in self._files.items()
            }
            first = loaded[self.block.stages[0]][0]
            if all(_same_test_set(first, other) for other in itertools.chain(*loaded.values())):
                return loaded
        except UNREADABLE as error:
            log.warning("report: predictions left out, as they cannot be read (%s)", error)
        return {}

    @property
    def class_names(self) -> list[str]:
        """Of the predictions."""
        first = next(iter(self.predictions.values()))[0]
        return [str(name) for name in first["class_names"]]

    @functools.cached_property
    def resampled(self) -> dict[str, list[statistics.Resampled]]:
        """The metrics of each stage and repeat, on the same resamples of the test patients."""
        return {
            stage: [
                statistics.resample(
                    [one["scores"]],
                    one["labels"],
                    _first_seen(one["patients"]),
                    self.class_names,
                    self.block.task,
                    untrained=self._untrained[stage, key],
                )
                for key, one in zip(self.repeats, each, strict=True)
            ]
            for stage, each in self.predictions.items()
        }

    def by_seed(self) -> list[np.ndarray]:
        """The numbers of the repeats of each training seed; of one seed, each repeat by itself."""
        of_seed = [key[0] for key in self.repeats]
        if len(set(of_seed)) == 1:
            return [np.array([i]) for i in range(len(of_seed))]
        return [np.flatnonzero(np.equal(of_seed, seed)) for seed in dict.fromkeys(of_seed)]


def tested(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Tested, ...]]:
    """Every block of results; those that differ in the fraction alone together, smallest first."""
    return [tuple(map(Tested, group)) for group in table.sweeps(table.blocks(rows))]


def _load(path: str) -> Predictions:
    with np.load(path, allow_pickle=False) as file:
        loaded = dict(file)
    shapes = {loaded[key].shape[:1] for key in ("scores", "labels", "patients", "image_ids")}
    if len(shapes) > 1 or loaded["scores"].shape != loaded["labels"].shape:
        raise ValueError(f"{pathlib.Path(path).name}: arrays of different lengths")
    if len(loaded["class_names"]) != loaded["scores"].shape[1]:
        raise ValueError(f"{pathlib.Path(path).name}: scores are not of its classes")
    if not np.isfinite(loaded["scores"]).all():
        raise ValueError(f"{pathlib.Path(path).name}: scores that are not finite")
    return loaded


def _same_test_set(a: Predictions, b: Predictions) -> bool:
    """Whether both are of the same images in the same order.

    Ids are hashed with a key of the workdir, so that those of two runs cannot be compared: labels,
    who shares a patient with whom, and the hash of the split then tell.
    """
    alike = ["labels", "class_names"]
    if np.array_equal(np.unique(a["patients"]), np.unique(b["patients"])):
        alike += ["image_ids", "patients"]
    elif "split_sha256" in a:
        alike.append("split_sha256")
    if any(not np.array_equal(a[key], b[key]) for key in alike):
        return False
    return np.array_equal(_first_seen(a["patients"]), _first_seen(b["patients"]))


def _first_seen(patients: np.ndarray) -> np.ndarray:
    """For each image, the first image of the same patient."""
    _, first, codes = np.unique(patients, return_index=True, return_inverse=True)
    return first[codes]
