"""What evaluations that learn from labels share: the training part, its subsets, how it is chosen.

`probe.Probe` learns from frozen features, `finetune` trains the encoder too. Either is chosen among
settings on the validation split alone; the test splits are scored once.
"""

import abc
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from bigmed import statistics
from bigmed.classification import classification_metrics
from bigmed.data.sources import drawn_patients, learnable_rows
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators import predictions
from bigmed.evaluators.parts import learnable, make_part, training_targets
from bigmed.evaluators.scored import Scored

CRITERIA = ("auc_macro", "accuracy", "balanced_accuracy")


class Learnt(NamedTuple):
    """What a run of an evaluation found.

    Attributes:
      chosen: the setting, as the rows tell it.
      scores: of 'val' and of every test set, float [m, L], larger for more likely; those of 'val'
        come from a model that has not learnt from it.
    """

    chosen: dict[str, Any]
    scores: dict[str, np.ndarray]


class Labelled(Scored, abc.ABC):
    """Base of the evaluators that learn from labels.

    Args:
      mesh: of `bigmed.sharding.make_mesh`.
      train, val, test: sources as `bigmed.data.sources.open_source` takes them.
      fraction: share of the training patients whose labels may be used. Smaller ones are subsets of
        larger ones of the same seed. Validation and test are always whole.
      select_by: the metric on the validation split by which the setting is chosen.
      seed: of the bootstrap and of the fraction.
      **scored: see `Scored`.

    Raises:
      UserError: see `Scored`; a value that is none of these, or nothing to learn from.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        *,
        train: Mapping[str, Any],
        val: Mapping[str, Any],
        test: Mapping[str, Any],
        fraction: float = 1.0,
        select_by: str = "auc_macro",
        seed: int = 0,
        **scored: Any,
    ):
        super().__init__(mesh, {"train": train, "val": val, "test": test}, seed=seed, **scored)
        valid = CRITERIA if self._task == "single_label" else CRITERIA[:1]
        if select_by not in valid:
            raise UserError(
                f"select_by='{select_by}' for task {self._task}: {did_you_mean(select_by, valid)}"
            )
        policy = self._uncertain
        if policy in statistics.TRAINING_POLICIES and self._task != "multi_label":
            raise UserError(f"uncertain='{policy}' is of task multi_label, not {self._task}")
        self._select_by = select_by
        self._train_source = self._opened["train"]
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
        by_case = self._average == "features" and keep.any()
        part = make_part("train", source, source.labels, keep, self._task, by_case)
        self._parts = {**self._parts, "train": part}
        if not keep.any():
            return f"train source '{source.name}' has no labelled image{drawing}"
        if not learnable(self._targets("train")).any():
            return (
                f"train source '{source.name}'{drawing} has no class with both positive and "
                "negative images" + ("; use a larger fraction" if drawing else "")
            )
        return None

    def _targets(self, name: str) -> np.ndarray:
        """What is learnt from a part, from its units where features are averaged: [n or m, L]."""
        part = self._parts[name]
        labels = part.labels if self._average == "features" else part.image_labels
        return training_targets(labels, self._uncertain)

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
          undefined_classes (of the test set) and untrained_classes (for want of training labels of
          both kinds), which are in no mean, undefined_resamples, resample_unit ('patient', or
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
                file = self._write_predictions(
                    name, learnt.scores[name], checkpoint, self._identity_of(run)
                )
                yield from self._result_rows(
                    name,
                    [learnt.scores],
                    {
                        **self._common(name, checkpoint),
                        "chosen": dict(learnt.chosen),
                        "run": run,
                        "untrained_classes": self._untrained(),
                        "predictions": file,
                    },
                )

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

    def _untrained(self) -> list[str]:
        known = learnable(self._targets("train"))
        return [c for c, learnt_from in zip(self._classes, known, strict=True) if not learnt_from]

    def _common(self, name: str, checkpoint: str) -> dict[str, Any]:
        """What all rows of one test set have in common."""
        train = self._parts["train"]
        return {
            **self._of_test_set(name, checkpoint),
            "train_set": self._train_source.name,
            "fraction": self._fraction,
            "subset_seed": self._seed if self._fraction < 1 else None,
            "subset_sha256": predictions.subset_sha256(train),
            "n_train_images": len(train.rows),
            "n_train_patients": len(np.unique(train.source.patients[train.rows])),
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

    def _identity_of(self, run: int) -> list[Any]:
        """What tells predictions of a run apart; JSON can hold it."""
        drawn = [self._train_source.fingerprint, self._fraction, self._seed]
        return [*drawn, self._uncertain, self._average, run, self._identity()]

    def _identity(self) -> Any:
        """What else tells predictions of this evaluator apart; JSON can hold it."""
        return None
