"""What evaluations with labels share: splits, checks, other test sets, result rows, predictions.

`probe.Probe` learns from frozen features, `finetune` trains the encoder too. Either is chosen among
settings on the validation split alone; the test splits are scored once.
"""

import abc
import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from bigmed import comparison, statistics
from bigmed.calibration import operating_point
from bigmed.classification import classification_metrics
from bigmed.data.sources import (
    Source,
    check_disjoint,
    drawn_patients,
    learnable_rows,
    open_source,
)
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators import predictions
from bigmed.evaluators.parts import Part, learnable, make_part, map_labels, training_targets

SPLITS = ("train", "val", "test")
CRITERIA = ("auc_macro", "accuracy", "balanced_accuracy")
AVERAGES = ("features", "scores")
INTERVALS = ("bootstrap", "delong")


class Learnt(NamedTuple):
    """What a run of an evaluation found.

    Attributes:
      chosen: the setting, as the rows tell it.
      scores: of 'val' and of every test set, float [m, L], larger for more likely; those of 'val'
        come from a model that has not learnt from it.
    """

    chosen: dict[str, Any]
    scores: dict[str, np.ndarray]


class Labelled(abc.ABC):
    """Base of the evaluators that learn from labels.

    Args:
      mesh: of `bigmed.sharding.make_mesh`.
      train, val, test: sources as `bigmed.data.sources.open_source` takes them.
      shift: other test sets, to which what was learnt is applied unchanged:
        {name: {'source': as `test`, 'label_map': see `parts.map_labels`}}.
      predictions_dir: where predictions are kept; None for nowhere.
      hash_key: secret of at most 64 bytes under which image and patient ids are hashed.
      classes: names of the classes to use; () for all.
      fraction: share of the training patients whose labels may be used. Smaller ones are subsets of
        larger ones of the same seed. Validation and test are always whole.
      uncertain: what label -1 counts as: 'ignore', or 'zeros' or 'ones' in all splits; in training
        alone, 'smooth' (`statistics.SMOOTH_TARGET`) or 'three_class' (a class of its own, left out
        of the scores).
      average: None to score image by image; 'features' (learning, too) or 'scores' to average those
        of the images of a case, which is then what is scored. A case is what its source's `case`
        says.
      select_by: the metric on the validation split by which the setting is chosen.
      details: whether to give what needs thresholds and temperatures, too, chosen on validation;
        see `classification.classification_metrics`.
      interval: 'bootstrap', or 'delong' for the AUC of each class (`comparison.delong`).
      num_resamples: of the bootstrap.
      seed: of the bootstrap and of the fraction.

    Raises:
      UserError: a value that is none of these, no labels, other classes in one of the splits, or
        patients that are in more than one split.
    """

    NAME = ""  # how result rows and files call the evaluator
    AVERAGES = AVERAGES  # what it can average

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        *,
        train: Mapping[str, Any],
        val: Mapping[str, Any],
        test: Mapping[str, Any],
        shift: Mapping[str, Mapping[str, Any]] | None = None,
        predictions_dir: str | os.PathLike | None = None,
        hash_key: bytes = b"",
        classes: Sequence[str] = (),
        fraction: float = 1.0,
        uncertain: str = "ignore",
        average: str | None = None,
        select_by: str = "auc_macro",
        details: bool = True,
        interval: str = "bootstrap",
        num_resamples: int = 1000,
        seed: int = 0,
    ):
        if num_resamples < 1:
            raise UserError(f"num_resamples={num_resamples}: valid: 1 and more")
        if average and average not in self.AVERAGES:
            raise UserError(f"average='{average}': {did_you_mean(average, self.AVERAGES)}")
        if interval not in INTERVALS:
            raise UserError(f"interval='{interval}': {did_you_mean(interval, INTERVALS)}")
        self._mesh, self._num_resamples = mesh, num_resamples
        self._details, self._interval = details, interval
        self._predictions_dir, self._hash_key = predictions_dir, hash_key
        self._uncertain, self._average, self._select_by = uncertain, average, select_by
        extra = {"classes": tuple(classes)} if classes else {}
        configs = {"train": train, "val": val, "test": test}
        opened = {name: open_source({**dict(config), **extra}) for name, config in configs.items()}
        self._task, self._classes = opened["train"].task, tuple(opened["train"].class_names)
        others = {name: open_source(dict(other["source"])) for name, other in (shift or {}).items()}
        self._check(opened, others)
        self._train_source = opened["train"]
        self._parts = {name: self._part(name, opened[name]) for name in ("val", "test")}
        for name, source in others.items():
            label_map = shift[name].get("label_map")
            labels = map_labels(source, label_map, self._classes, f"shift.{name}")
            self._parts[name] = self._part(name, source, labels)
        self._test_sets = ("test", *others)
        self._quality(np.zeros(self._labels("val").shape))  # can it choose at all?
        self._unlearnable = self._draw_subset(fraction, seed)
        if self._unlearnable:
            raise UserError(self._unlearnable)

    def with_subset(self, fraction: float, seed: int) -> Self:
        """The same evaluator with the labels of other training patients, on the opened data sets.

        A draw that leaves nothing to learn from gives rows without values that say so.

        Raises:
          UserError: a fraction outside (0, 1].
        """
        other = copy.copy(self)
        other._unlearnable = other._draw_subset(fraction, seed)
        return other

    def sources(self) -> dict[str, Source]:
        """Of the splits and the other test sets, by name."""
        return {"train": self._train_source} | {n: p.source for n, p in self._parts.items()}

    def _draw_subset(self, fraction: float, seed: int) -> str | None:
        """Takes the fraction's patients for training; what is wrong with them, if anything is."""
        if not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction}: valid: above 0, at most 1")
        self._fraction, self._seed = fraction, seed
        source = self._train_source
        drawing = f" at fraction={fraction}, seed={seed}" if fraction < 1 else ""
        keep = learnable_rows(source.labels, self._task, self._uncertain)
        if fraction < 1:
            keep &= drawn_patients(source.patient_keys, fraction, seed)[source.patients]
        if not keep.any():
            return f"train source '{source.name}' has no labelled image{drawing}"
        by_case = self._average == "features"
        part = make_part("train", source, source.labels, keep, self._task, by_case)
        self._parts = {**self._parts, "train": part}
        if not learnable(self._targets("train")).any():
            return (
                f"train source '{source.name}'{drawing} has no class with both positive and "
                "negative images" + ("; use a larger fraction" if drawing else "")
            )
        return None

    def _check(self, opened: Mapping[str, Source], others: Mapping[str, Source]) -> None:
        train = opened["train"]
        for name, source in opened.items():
            if not len(source.class_names) or source.task not in statistics.TASKS:
                raise UserError(
                    f"{name} source '{source.name}' has no labels; {self.NAME} needs a data set "
                    f"of task {' or '.join(statistics.TASKS)}"
                )
            if tuple(source.class_names) != tuple(train.class_names) or source.task != train.task:
                raise UserError(
                    f"{name} source '{source.name}' has {len(source.class_names)} classes "
                    f"({source.task}: {', '.join(source.class_names)}) but train source "
                    f"'{train.name}' has {len(train.class_names)} ({train.task}: "
                    f"{', '.join(train.class_names)}); choose shared ones with classes=(...)"
                )
        for name in others:
            if name in SPLITS:
                raise UserError(f"shift has a set called '{name}'; choose another name for it")
        valid = CRITERIA if train.task == "single_label" else CRITERIA[:1]
        if self._select_by not in valid:
            raise UserError(
                f"select_by='{self._select_by}' for task {train.task}: "
                f"{did_you_mean(self._select_by, valid)}"
            )
        if self._uncertain == "three_class" and train.task != "multi_label":
            raise UserError(f"uncertain='three_class' is of task multi_label, not {train.task}")
        check_disjoint(*opened.values())
        for source in others.values():
            check_disjoint(train, source)
            check_disjoint(opened["val"], source)

    def _part(self, name: str, source: Source, labels: np.ndarray | None = None) -> Part:
        labels = source.labels if labels is None else labels
        known = statistics.apply_label_policy(labels, self._uncertain)
        keep = statistics.usable(known, self._task)
        if not keep.any():
            raise UserError(f"{name} source '{source.name}' has no labelled image")
        return make_part(name, source, labels, keep, self._task, bool(self._average))

    def _targets(self, name: str) -> np.ndarray:
        """What is learnt from a part, from its units where features are averaged: [n or m, L]."""
        part = self._parts[name]
        labels = part.labels if self._average == "features" else part.image_labels
        return training_targets(labels, self._uncertain)

    def _labels(self, name: str) -> np.ndarray:
        """What the scores of a part are held against: int8 [m, L]."""
        return statistics.apply_label_policy(self._parts[name].labels, self._uncertain)

    @abc.abstractmethod
    def learn(self, state: Any) -> Iterator[Learnt]:
        """Learns from the training part, chooses on validation, and scores the test sets.

        Yields:
          One for each run of the chosen setting.
        """

    def run(self, state: Any, checkpoint: str) -> Iterator[dict[str, Any]]:
        """Result rows of one state, one a metric and test set.

        Args:
          state: of a stage.
          checkpoint: its name in the rows.

        Yields:
          {task, train_set, test_set, shift (its name, of another test set), fraction, subset_seed
          (None: no patients were drawn), subset_sha256 (`predictions.subset_sha256`), metric,
          value, ci_low, ci_high, n_images (of units), unit ('image', 'patient' or 'study'),
          averaged, n_patients, split_sha256 (of the test split), checkpoint, label_policy, chosen
          (the setting), run (its number), interval, n_train_images, n_train_patients,
          undefined_classes (not in a mean), untrained_classes (scored alike everywhere, for want
          of training labels of both kinds), undefined_resamples, resample_unit ('patient', or
          'image' where the data set names no patients), synthetic, predictions (file), reason (of
          missing values)}; undefined values are None.
        """
        if self._unlearnable:
            yield from self._missing_rows(checkpoint)
            return
        if self._predictions_dir is not None:
            predictions.write_subset(self._predictions_dir, self._hash_key, self._parts["train"])
        for run, learnt in enumerate(self.learn(state)):
            for name in self._test_sets:
                file = self._write_predictions(name, learnt.scores[name], checkpoint, run)
                yield from self._result_rows(name, learnt, checkpoint, file, run)

    def _quality(self, scores: np.ndarray) -> float:
        """`select_by` of the scores [m, L] of validation.

        Raises:
          UserError: it is not defined there.
        """
        labels = self._labels("val")
        function = classification_metrics(scores, labels, self._classes, self._task)
        value = float(function(np.ones((len(labels), 1)))[self._select_by][0])
        if not np.isfinite(value):
            raise UserError(
                f"val source '{self._parts['val'].source.name}' has no class with both positive "
                f"and negative images, so {self._select_by} cannot choose a setting"
            )
        return value

    def _result_rows(
        self, name: str, learnt: Learnt, checkpoint: str, file: str | None, run: int
    ) -> Iterator[dict[str, Any]]:
        part, labels, point = self._parts[name], self._labels(name), None
        if self._details:
            point = operating_point(learnt.scores["val"], self._labels("val"), self._task)
        estimates = statistics.estimate(
            learnt.scores[name],
            labels,
            part.patients,
            self._classes,
            self._task,
            point=point,
            num_resamples=self._num_resamples,
            seed=self._seed,
        )
        if self._interval == "delong":
            scored = (learnt.scores[name], labels, part.patients)
            estimates |= _delong(estimates, *scored, self._classes)
        undefined = [c for c in self._classes if np.isnan(estimates[f"auc/{c}"].value)]
        known = learnable(self._targets("train"))
        common = {
            **self._common(name, checkpoint),
            "chosen": dict(learnt.chosen),
            "run": run,
            "interval": self._interval,
            "undefined_classes": undefined,
            "untrained_classes": [
                c for c, learnt_from in zip(self._classes, known, strict=True) if not learnt_from
            ],
            "predictions": file,
        }
        yield from statistics.rows(estimates, common)

    def _common(self, name: str, checkpoint: str) -> dict[str, Any]:
        """What all rows of one test set have in common."""
        part, train = self._parts[name], self._parts["train"]
        kind = part.source.case_key if self._average else "image_id"
        return {
            "task": self._task,
            "train_set": self._train_source.name,
            "test_set": part.source.name,
            "shift": None if name == "test" else name,
            "fraction": self._fraction,
            "subset_seed": self._seed if self._fraction < 1 else None,
            "subset_sha256": predictions.subset_sha256(train),
            "split_sha256": part.source.split_sha256,
            "checkpoint": checkpoint,
            "label_policy": f"uncertain={self._uncertain}, missing=ignore",
            "unit": kind.removesuffix("_id"),
            "averaged": self._average,
            "n_train_images": len(train.rows),
            "n_train_patients": len(np.unique(train.source.patients[train.rows])),
            "resample_unit": "patient" if part.source.has_patients else "image",
            "synthetic": part.source.synthetic,
        }

    def _missing_rows(self, checkpoint: str) -> Iterator[dict[str, Any]]:
        """Rows without values, of a draw that leaves nothing to learn from."""
        for name in self._test_sets:
            labels = self._labels(name)
            function = classification_metrics(
                np.zeros(labels.shape), labels, self._classes, self._task
            )
            common = {**self._common(name, checkpoint), "reason": self._unlearnable}
            empty = statistics.Estimate(np.nan, None, None, 0, 0, 0)
            metrics_of_task = function(np.ones((len(labels), 1)))
            yield from statistics.rows(dict.fromkeys(metrics_of_task, empty), common)

    def _write_predictions(
        self, name: str, scores: np.ndarray, checkpoint: str, run: int
    ) -> str | None:
        """The name of the file of what the rows are computed from."""
        if self._predictions_dir is None:
            return None
        part = self._parts[name]
        identity = [checkpoint, part.source.fingerprint, self._train_source.fingerprint]
        identity += [self._fraction, self._seed, self._uncertain, self._average, run]
        identity += [self._identity(), part.labels.tolist() if name != "test" else None]
        stem = predictions.file_stem([checkpoint, self.NAME, part.source.name], identity)
        labels, about = self._labels(name), (self._classes, self._task)
        return predictions.write(
            self._predictions_dir, stem, self._hash_key, part, scores, labels, *about
        )

    def _identity(self) -> Any:
        """What else tells predictions of this evaluator apart; JSON can hold it."""
        return None


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
        known = estimates[f"auc/{name}"]
        try:
            low, high = comparison.delong([scores[:, c]], labels[:, c], patients).interval()
        except UserError:  # too few patients
            low = high = None
        found[f"auc/{name}"] = dataclasses.replace(known, low=low, high=high, undefined_resamples=0)
    return found
