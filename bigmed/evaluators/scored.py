"""What evaluations of scores share: test sets, other sites, checks, result rows, predictions.

`labelled.Labelled` adds training labels; `zero_shot` has none.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmed import comparison, statistics
from bigmed.calibration import operating_point
from bigmed.data.sources import Source, check_disjoint, open_source
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators import predictions
from bigmed.evaluators.parts import Part, learnable, make_part, map_labels

SPLITS = ("train", "val", "test")
AVERAGES = ("features", "scores")
INTERVALS = ("bootstrap", "delong")


class Scored:
    """Base of the evaluators whose scores are held against labels.

    Args:
      mesh: of `bigmed.sharding.make_mesh`.
      splits: those of `SPLITS` that there are, 'test' among them, as
        `bigmed.data.sources.open_source` takes them; the first says what the classes are.
      shift: other test sets, to which what was learnt is applied unchanged:
        {name: {'source': as `test`, 'label_map': see `parts.map_labels`}}.
      predictions_dir: where predictions are kept; None for nowhere.
      hash_key: secret of at most 64 bytes under which image and patient ids are hashed.
      classes: names of the classes to use; () for all.
      uncertain: what label -1 counts as: 'ignore', or 'zeros' or 'ones' in all splits; in training
        alone, 'smooth' (`statistics.SMOOTH_TARGET`) or 'three_class' (a class of its own, left out
        of the scores).
      average: None to score image by image; 'features' (learning, too) or 'scores' to average those
        of the images of a case, which is then what is scored. A case is what its source's `case`
        says.
      details: whether to give what needs thresholds and temperatures, too, chosen on validation;
        see `classification.classification_metrics`.
      interval: 'bootstrap', or 'delong' for the AUC of each class (`comparison.delong`).
      num_resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      UserError: a value that is none of these, no labels, other classes in one of the splits, or
        patients that are in more than one split.
    """

    NAME = ""  # how result rows and files call the evaluator
    AVERAGES = AVERAGES  # what it can average
    POLICIES = statistics.UNCERTAIN_POLICIES  # what it can make of uncertain labels

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        splits: Mapping[str, Mapping[str, Any]],
        *,
        shift: Mapping[str, Mapping[str, Any]] | None = None,
        predictions_dir: str | os.PathLike | None = None,
        hash_key: bytes = b"",
        classes: Sequence[str] = (),
        uncertain: str = "ignore",
        average: str | None = None,
        details: bool = True,
        interval: str = "bootstrap",
        num_resamples: int = 1000,
        seed: int = 0,
    ):
        if num_resamples < 1 or seed < 0:
            raise UserError(
                f"num_resamples={num_resamples}, seed={seed}: valid: 1 and more, 0 and more"
            )
        for name, other in (shift or {}).items():
            if not hasattr(other, "keys") or "source" not in other:
                raise UserError(f"shift.{name} has no source; valid: source, label_map")
        if average and average not in self.AVERAGES:
            raise UserError(f"average='{average}': {did_you_mean(average, self.AVERAGES)}")
        if uncertain not in self.POLICIES:
            raise UserError(
                f"uncertain='{uncertain}' of {self.NAME}: {did_you_mean(uncertain, self.POLICIES)}"
            )
        if interval not in INTERVALS:
            raise UserError(f"interval='{interval}': {did_you_mean(interval, INTERVALS)}")
        self._mesh, self._num_resamples, self._seed = mesh, num_resamples, seed
        self._details, self._interval = details and "val" in splits, interval
        self._predictions_dir, self._hash_key = predictions_dir, hash_key
        self._uncertain, self._average = uncertain, average
        extra = {"classes": tuple(classes)} if classes else {}
        opened = {name: open_source({**dict(config), **extra}) for name, config in splits.items()}
        others = {name: open_source(dict(other["source"])) for name, other in (shift or {}).items()}
        self._check(opened, others)
        first = next(iter(opened.values()))
        self._task, self._classes = first.task, tuple(first.class_names)
        self._parts = {name: self._part(name, opened[name]) for name in opened if name != "train"}
        for name, source in others.items():
            label_map = shift[name].get("label_map")
            labels = map_labels(source, label_map, self._classes, f"shift.{name}")
            self._parts[name] = self._part(name, source, labels)
        self._opened, self._test_sets = opened, ("test", *others)

    def sources(self) -> dict[str, Source]:
        """Of the splits and the other test sets, by name."""
        return {name: part.source for name, part in self._parts.items()}

    def _check(self, opened: Mapping[str, Source], others: Mapping[str, Source]) -> None:
        of_first, first = next(iter(opened.items()))
        for name, source in opened.items():
            if not len(source.class_names) or source.task not in statistics.TASKS:
                raise UserError(
                    f"{name} source '{source.name}' has no labels; {self.NAME} needs a data set "
                    f"of task {' or '.join(statistics.TASKS)}"
                )
            if tuple(source.class_names) != tuple(first.class_names) or source.task != first.task:
                raise UserError(
                    f"{name} source '{source.name}' has {len(source.class_names)} classes "
                    f"({source.task}: {', '.join(source.class_names)}) but {of_first} source "
                    f"'{first.name}' has {len(first.class_names)} ({first.task}: "
                    f"{', '.join(first.class_names)}); choose shared ones with classes=(...)"
                )
        for name in others:
            if name in SPLITS:
                raise UserError(f"shift has a set called '{name}'; choose another name for it")
        check_disjoint(*opened.values())
        for source in others.values():
            for name in opened:
                if name != "test":
                    check_disjoint(opened[name], source)

    def _part(self, name: str, source: Source, labels: np.ndarray | None = None) -> Part:
        labels = source.labels if labels is None else labels
        known = statistics.apply_label_policy(labels, self._uncertain)
        keep = statistics.usable(known, self._task)
        if not keep.any():
            raise UserError(f"{name} source '{source.name}' has no labelled image")
        return make_part(name, source, labels, keep, self._task, bool(self._average))

    def _labels(self, name: str) -> np.ndarray:
        """What the scores of a part are held against: int8 [m, L]."""
        return statistics.apply_label_policy(self._parts[name].labels, self._uncertain)

    def _result_rows(
        self, name: str, scores: Sequence[Mapping[str, np.ndarray]], common: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """The rows of one test set.

        Args:
          scores: [m, L] of it, and of 'val' where there are details. Of several models, each with
            its own thresholds, the rows are of the mean of their metrics, by the bootstrap.
          common: what the rows hold beside the metric.
        """
        part, labels = self._parts[name], self._labels(name)
        untrained = common.get("untrained_classes", ())
        by_delong = self._interval == "delong" and len(scores) == 1
        of_val = [one["val"] for one in scores] if self._details else []
        estimates = statistics.resample(
            [one[name] for one in scores],
            labels,
            part.patients,
            self._classes,
            self._task,
            points=[operating_point(s, self._labels("val"), self._task) for s in of_val],
            untrained=untrained,
            num_resamples=self._num_resamples,
            seed=self._seed,
        ).estimates()
        if by_delong:
            estimates |= _delong(estimates, scores[0][name], labels, part.patients, self._classes)
        both = learnable(labels)
        undefined = [c for c, known in zip(self._classes, both, strict=True) if not known]
        for row in statistics.rows(estimates, {**common, "undefined_classes": undefined}):
            of_class = by_delong and row["metric"].startswith("auc/")
            row["interval"] = "delong" if of_class else "bootstrap"
            if row["value"] is None:
                row["reason"] = _reason(row["metric"], untrained, undefined)
            yield row

    def _of_test_set(self, name: str, checkpoint: str) -> dict[str, Any]:
        """What all rows of one test set have in common."""
        part = self._parts[name]
        kind = part.source.case_key if self._average else "image_id"
        return {
            "task": self._task,
            "test_set": part.source.name,
            "shift": None if name == "test" else name,
            "split_sha256": part.source.split_sha256,
            "checkpoint": checkpoint,
            "label_policy": f"uncertain={self._uncertain}, missing=ignore",
            "unit": kind.removesuffix("_id"),
            "averaged": self._average,
            "resample_unit": "patient" if part.source.has_patients else "image",
            "synthetic": part.source.synthetic,
        }

    def _write_predictions(
        self, name: str, scores: np.ndarray, checkpoint: str, more: Sequence[Any]
    ) -> str | None:
        """The name of the file of what the rows are computed from.

        Args:
          scores: [m, L] of the test set.
          more: what else tells these predictions from others; JSON can hold it.
        """
        if self._predictions_dir is None:
            return None
        part = self._parts[name]
        identity = [checkpoint, part.source.fingerprint, *more]
        identity += [part.labels.tolist() if name != "test" else None]
        stem = predictions.file_stem([checkpoint, self.NAME, part.source.name], identity)
        labels, about = self._labels(name), (self._classes, self._task)
        return predictions.write(
            self._predictions_dir, stem, self._hash_key, part, scores, labels, *about
        )


def _reason(metric: str, untrained: Sequence[str], undefined: Sequence[str]) -> str:
    """Why a metric has no value."""
    kind, _, name = metric.partition("/")
    if name in untrained:
        return "the class has no training labels of both kinds"
    if name in undefined:
        return "the test set has no labels of both kinds"
    if not name or kind in ("auc", "ap"):
        return "no class is defined"
    return "validation has no labels of both kinds to choose by"


def _delong(
    estimates: Mapping[str, statistics.Estimate],
    scores: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    classes: Sequence[str],
) -> dict[str, statistics.Estimate]:
    """The AUC of each class with DeLong's interval, or with none where there can be none."""
    found = {}
    for c, name in enumerate(classes):
        known, limits = estimates[f"auc/{name}"], None
        if np.isfinite(known.value):
            with contextlib.suppress(UserError):  # too few patients
                limits = comparison.delong([scores[:, c]], labels[:, c], patients).interval()
        low, high = limits or (None, None)
        found[f"auc/{name}"] = dataclasses.replace(known, low=low, high=high, undefined_resamples=0)
    return found
