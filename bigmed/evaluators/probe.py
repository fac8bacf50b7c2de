"""What evaluations on frozen features share: splits, checks, selection on validation, result rows.

`linear` and `knn` add how scores come from features. A probe is chosen among settings (an L2
strength, a number of neighbours) on the validation split alone; the test split is scored once.
"""

import abc
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmed import statistics
from bigmed.data import schema
from bigmed.data.sources import check_disjoint, open_source
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators import features

log = logging.getLogger("bigmed")

SPLITS = ("train", "val", "test")
CRITERIA = ("auc_macro", "accuracy", "balanced_accuracy")


class Probe(abc.ABC):
    """Base of the evaluators on frozen features.

    Args:
      predict_fn: (state, batch) -> features [B, D]; see `features.extract`.
      mesh: of `bigmed.sharding.make_mesh`.
      train, val, test: sources as `bigmed.data.sources.open_source` takes them.
      canvas, channels: form of the images that `predict_fn` wants.
      preprocessing: what `predict_fn` does to an image; part of the key of kept features.
      cache_dir, predictions_dir: where features and predictions are kept; None for nowhere.
      hash_key: secret of at most 64 bytes under which image and patient ids are hashed.
      batch_size: images a step of the feature pass.
      classes: names of the classes to use; () for all.
      fraction: share of the training patients whose labels may be used. Smaller ones are subsets of
        larger ones of the same seed. Validation and test are always whole.
      uncertain: 'ignore', 'zeros' or 'ones': what label -1 counts as, in all three splits.
      select_by: the metric on the validation split by which the setting is chosen.
      refit: whether the chosen setting is learnt anew from training and validation together.
      num_resamples: of the bootstrap.
      seed: of the bootstrap and of the fraction.

    Raises:
      UserError: a value that is none of these, no labels, other classes in one of the splits, or
        patients that are in more than one split.
    """

    NAME = ""  # how result rows and files call the evaluator
    HELD_OUT = ("test",)  # sources none of whose patients may have been trained on

    def __init__(
        self,
        predict_fn: features.PredictFn,
        mesh: jax.sharding.Mesh,
        *,
        train: Mapping[str, Any],
        val: Mapping[str, Any],
        test: Mapping[str, Any],
        canvas: int,
        channels: int,
        preprocessing: Mapping[str, Any],
        cache_dir: str | os.PathLike | None = None,
        predictions_dir: str | os.PathLike | None = None,
        hash_key: bytes = b"",
        batch_size: int = 256,
        classes: Sequence[str] = (),
        fraction: float = 1.0,
        uncertain: str = "ignore",
        select_by: str = "auc_macro",
        refit: bool = False,
        num_resamples: int = 1000,
        seed: int = 0,
    ):
        if not 0 < fraction <= 1:
            raise UserError(f"fraction={fraction}: valid: above 0, at most 1")
        if num_resamples < 1:
            raise UserError(f"num_resamples={num_resamples}: valid: 1 and more")
        self._predict_fn, self._mesh = predict_fn, mesh
        self._form = {"canvas": canvas, "channels": channels, "batch_size": batch_size}
        self._preprocessing = dict(preprocessing)
        self._cache_dir, self._predictions_dir = cache_dir, predictions_dir
        self._hash_key = hash_key
        self._fraction, self._uncertain = fraction, uncertain
        self._select_by, self._refit = select_by, refit
        self._num_resamples, self._seed = num_resamples, seed
        extra = {"classes": tuple(classes)} if classes else {}
        configs = {"train": train, "val": val, "test": test}
        self._sources = {
            name: open_source({**dict(config), **extra}) for name, config in configs.items()
        }
        self._check()
        self._rows = {name: self._usable_rows(name) for name in SPLITS}
        if not learnable(self._labels("train")[self._rows["train"]]).any():
            raise UserError(
                f"train source '{self._sources['train'].name}' at fraction={fraction} has no class "
                "with both positive and negative images; use a larger fraction"
            )

    def _check(self) -> None:
        train = self._sources["train"]
        for name, source in self._sources.items():
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
        valid = CRITERIA if train.task == "single_label" else CRITERIA[:1]
        if self._select_by not in valid:
            raise UserError(
                f"select_by='{self._select_by}' for task {train.task}: "
                f"{did_you_mean(self._select_by, valid)}"
            )
        check_disjoint(*self._sources.values())

    def _labels(self, split: str) -> np.ndarray:
        return statistics.apply_label_policy(self._sources[split].labels, self._uncertain)

    def _usable_rows(self, split: str) -> np.ndarray:
        """The records whose labels may be used: int [n]."""
        source = self._sources[split]
        keep = statistics.usable(self._labels(split), source.task)
        if split == "train" and self._fraction < 1:
            keep &= self._drawn(source.patient_keys)[source.patients]
        if not keep.any():
            raise UserError(
                f"{split} source '{source.name}' has no labelled image"
                + (f" at fraction={self._fraction}" if split == "train" else "")
            )
        return np.flatnonzero(keep)

    def _drawn(self, patient_keys: Sequence[str]) -> np.ndarray:
        """bool [P]: the patients of the fraction; independent of how the splits were drawn."""
        uniform = [schema.patient_uniform(f"fraction/{key}", self._seed) for key in patient_keys]
        return np.array(uniform) < self._fraction

    def run(self, state: Any, checkpoint: str) -> Iterator[dict[str, Any]]:
        """Result rows of one state, one a metric.

        Args:
          state: what `predict_fn` wants.
          checkpoint: its name in the rows.

        Yields:
          {task, train_set, test_set, fraction, metric, value, ci_low, ci_high, n_images,
          n_patients, split_sha256 (of the test split), checkpoint, label_policy, chosen (the
          setting), n_train_images, n_train_patients, undefined_classes (not in a mean),
          untrained_classes (scored alike everywhere, for want of training labels of both kinds),
          undefined_resamples, resample_unit ('patient', or 'image' where the data set names no
          patients), synthetic, predictions (file)}; undefined values are None.
        """
        cache_key = json.dumps(
            [features.weights_fingerprint(state), self._preprocessing], sort_keys=True
        )
        x, labels = {}, {}
        for name in SPLITS:
            everything = features.extract(
                self._predict_fn,
                state,
                self._sources[name],
                self._mesh,
                cache_dir=self._cache_dir,
                cache_key=cache_key,
                **self._form,
            )
            x[name] = everything[self._rows[name]]
            labels[name] = self._labels(name)[self._rows[name]]
        chosen, scores = self._choose_and_score(x, labels)
        file = self._write_predictions(scores, labels["test"], checkpoint)
        yield from self._result_rows(scores, labels, checkpoint, chosen, file)

    @abc.abstractmethod
    def settings(self, num_train: int) -> list[dict[str, Any]]:
        """The settings to choose from, the more cautious first (ties go to the first)."""

    @abc.abstractmethod
    def scores(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        labels: np.ndarray,
        queries: np.ndarray,
    ) -> np.ndarray:
        """Scores [len(settings), M, L] of queries [M, D], learnt from x [N, D], labels [N, L]."""

    def _choose_and_score(
        self, x: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The setting that is best on validation, and its scores on test."""
        source = self._sources["train"]
        settings = self.settings(len(x["train"]))
        both = np.concatenate([x["val"], x["test"]])
        scores = self.scores(settings, x["train"], labels["train"], both)
        num_val = len(x["val"])
        quality = []
        for of_setting in scores[:, :num_val]:
            function = statistics.classification_metrics(
                of_setting, labels["val"], source.class_names, source.task
            )
            quality.append(function(np.ones((num_val, 1)))[self._select_by][0])
        if not np.isfinite(quality).any():
            raise UserError(
                f"val source '{self._sources['val'].name}' has no class with both positive and "
                f"negative images, so {self._select_by} cannot choose a setting"
            )
        best = int(np.nanargmax(quality))
        if best in (0, len(settings) - 1) and len(settings) > 1:
            log.info("%s chose %s, the end of its grid", self.NAME, settings[best])
        if not self._refit:
            return settings[best], scores[best, num_val:]
        x_both, labels_both = (np.concatenate([v["train"], v["val"]]) for v in (x, labels))
        upto = settings[: best + 1]  # a solver may go from each setting to the next
        return settings[best], self.scores(upto, x_both, labels_both, x["test"])[-1]

    def _result_rows(
        self,
        scores: np.ndarray,
        labels: Mapping[str, np.ndarray],
        checkpoint: str,
        chosen: Mapping[str, Any],
        predictions: str | None,
    ) -> Iterator[dict[str, Any]]:
        train, test = self._sources["train"], self._sources["test"]
        names = test.class_names
        estimates = statistics.estimate(
            scores,
            labels["test"],
            test.patients[self._rows["test"]],
            names,
            test.task,
            num_resamples=self._num_resamples,
            seed=self._seed,
        )
        undefined = [name for name in names if np.isnan(estimates[f"auc/{name}"].value)]
        learnt = learnable(labels["train"])
        common = {
            "task": test.task,
            "train_set": train.name,
            "test_set": test.name,
            "fraction": self._fraction,
            "split_sha256": test.split_sha256,
            "checkpoint": checkpoint,
            "label_policy": f"uncertain={self._uncertain}, missing=ignore",
            "chosen": dict(chosen),
            "n_train_images": len(self._rows["train"]),
            "n_train_patients": len(np.unique(train.patients[self._rows["train"]])),
            "undefined_classes": undefined,
            "untrained_classes": [n for n, known in zip(names, learnt, strict=True) if not known],
            "resample_unit": "patient" if test.has_patients else "image",
            "synthetic": test.synthetic,
            "predictions": predictions,
        }
        yield from statistics.rows(estimates, common)

    def _write_predictions(
        self, scores: np.ndarray, labels: np.ndarray, checkpoint: str
    ) -> str | None:
        """Writes what the rows are computed from, with hashed ids; the file's name."""
        if self._predictions_dir is None:
            return None
        test, rows = self._sources["test"], self._rows["test"]
        identity = [checkpoint, test.fingerprint, self._sources["train"].fingerprint]
        identity += [self._fraction, self._seed, self._uncertain, self._preprocessing]
        digest = hashlib.blake2b(
            json.dumps(identity, sort_keys=True).encode(), digest_size=6
        ).hexdigest()
        readable = re.sub(r"[^\w.-]+", "-", f"{checkpoint}-{self.NAME}-{test.name}")
        name = f"{readable}-{digest}.npz"
        if jax.process_index() == 0:
            patients = np.array([self._hash(key) for key in test.patient_keys])
            features.write_npz(
                pathlib.Path(self._predictions_dir) / name,
                scores=scores.astype(np.float32),
                labels=labels,
                image_ids=np.array([self._hash(key) for key in self._image_keys(rows)]),
                patients=patients[test.patients[rows]],
                class_names=np.array(list(test.class_names)),
                task=np.array(test.task),
                split_sha256=np.array(test.split_sha256),
            )
        return name

    def _image_keys(self, rows: np.ndarray) -> list[str]:
        """Image ids of test records; their record numbers where the data set has no ids."""
        test = self._sources["test"]
        if "image_id" in test.records.keys:
            return test.read_field("image_id", rows)
        return [f"{test.fingerprint}/{row}" for row in rows]

    def _hash(self, key: str) -> str:
        return hashlib.blake2b(key.encode(), key=self._hash_key, digest_size=16).hexdigest()


def learnable(labels: np.ndarray) -> np.ndarray:
    """bool [L]: the classes with both positive and negative training images in labels [N, L]."""
    return (labels == 1).any(axis=0) & (labels == 0).any(axis=0)


def place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds -> a global one."""
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
