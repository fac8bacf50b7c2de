"""What evaluations on frozen features share: the feature pass, and how a setting is chosen.

`linear` and `knn` add how scores come from features.
"""

import abc
import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from bigmed.evaluators import features
from bigmed.evaluators.labelled import Labelled, Learnt
from bigmed.evaluators.neighbours import SHOWN, Features, Neighbours, nearest, spread

log = logging.getLogger("bigmed")


class Probe(Labelled):
    """Base of the evaluators on frozen features.

    Args:
      predict_fn: (state, batch) -> features [B, D]; see `features.extract`.
      mesh: of `bigmed.sharding.make_mesh`.
      canvas, channels: form of the images that `predict_fn` wants.
      preprocessing: what `predict_fn` does to an image; part of the key of kept features.
      cache_dir: where features are kept; None for nowhere.
      batch_size: images a step of the feature pass.
      refit: whether the chosen setting is learnt anew from training and validation together.
      **labelled: see `Labelled`.
    """

    def __init__(
        self,
        predict_fn: features.PredictFn,
        mesh: jax.sharding.Mesh,
        *,
        canvas: int,
        channels: int,
        preprocessing: Mapping[str, Any],
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 256,
        refit: bool = False,
        **labelled: Any,
    ):
        self._predict_fn, self._refit = predict_fn, refit
        self._hashed: dict[str, Any] = {}  # the state, and the hash of its weights; of all copies
        self._form = {"canvas": canvas, "channels": channels, "batch_size": batch_size}
        self._preprocessing, self._cache_dir = dict(preprocessing), cache_dir
        super().__init__(mesh, **labelled)

    @abc.abstractmethod
    def settings(self, num_train: int) -> list[dict[str, Any]]:
        """The settings to choose from, the more cautious first (ties go to the first)."""

    @abc.abstractmethod
    def scores(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        queries: np.ndarray,
    ) -> np.ndarray:
        """Scores [len(settings), M, L] of queries [M, D], learnt from x [N, D], targets [N, L]."""

    def learn(self, state: Any) -> Iterator[Learnt]:
        """The setting that is best on validation (the first of equals), and its scores."""
        cache_key = self._cache_key(state)
        x = {name: self._features(name, state, cache_key) for name in self._parts}
        targets = {name: self._targets(name) for name in ("train", "val")}
        settings = self.settings(len(x["train"]))
        scored = ("val", *self._test_sets)
        scores = self._scores(settings, x["train"], targets["train"], x, scored)
        best = int(np.argmax([self._quality(of_setting) for of_setting in scores["val"]]))
        if best in (0, len(settings) - 1) and len(settings) > 1:
            log.info("%s chose %s, the end of its grid", self.NAME, settings[best])
        chosen = {name: of_settings[best] for name, of_settings in scores.items()}
        if self._refit:
            both, labels = (np.concatenate([v["train"], v["val"]]) for v in (x, targets))
            upto = settings[: best + 1]  # a solver may go from each setting to the next
            again = self._scores(upto, both, labels, x, self._test_sets)
            chosen |= {name: of_settings[-1] for name, of_settings in again.items()}
        yield Learnt(settings[best], chosen)

    def neighbours(self, state: Any) -> Iterator[Neighbours]:
        """A few test images with the training images that lie nearest to them."""
        test, train = self._parts["test"], self._parts["train"]
        picks = spread(test.labels)
        x, queries = (self._of_units(name, state) for name in ("train", "test"))
        if not len(picks):
            return
        _, index = nearest(x, queries[picks], min(SHOWN, len(x)), self._mesh)
        yield Neighbours(
            title=f"{test.source.name} in {train.source.name}",
            queries=test.source,
            found=train.source,
            query_rows=test.rows[test.first][picks],
            found_rows=train.rows[train.first][index],
            query_labels=test.labels[picks],
            found_labels=train.labels[index],
            class_names=self._classes,
        )

    def features(self, state: Any) -> Iterator[Features]:
        """Those of the test images."""
        test = self._parts["test"]
        x = self._of_units("test", state)
        yield Features(test.source.name, x, test.labels, self._classes)

    def _of_units(self, name: str, state: Any) -> np.ndarray:
        x = self._features(name, state, self._cache_key(state))
        return x if self._average == "features" else self._parts[name].average(x)

    def prepare(self, state: Any) -> None:
        """Makes the features that are not kept yet, on the whole mesh."""
        cache_key = self._cache_key(state)
        for name in self._parts:
            self._features(name, state, cache_key)

    def on(self, mesh: jax.sharding.Mesh) -> Self:
        """The same evaluator, learning on other devices."""
        other = copy.copy(self)
        other._mesh = mesh
        return other

    def _cache_key(self, state: Any) -> str:
        if self._hashed.get("state") is not state:  # a sweep asks for each of its cells
            self._hashed.update(state=state, weights=features.weights_fingerprint(state))
        return features.cache_key(self._hashed["weights"], self._preprocessing)

    def _features(self, name: str, state: Any, cache_key: str) -> np.ndarray:
        """float32 [n, D], or [m, D] where they are averaged."""
        part = self._parts[name]
        everything = features.extract(
            self._predict_fn,
            state,
            part.source,
            self._mesh,
            cache_dir=self._cache_dir,
            cache_key=cache_key,
            **self._form,
        )
        x = everything[part.rows]
        return part.average(x) if self._average == "features" else x

    def _scores(
        self,
        settings: Sequence[Mapping[str, Any]],
        x: np.ndarray,
        targets: np.ndarray,
        queries: Mapping[str, np.ndarray],
        names: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """Scores [G, m, L] of the units of these parts."""
        ends = np.cumsum([len(queries[name]) for name in names])
        everything = self.scores(
            settings, x, targets, np.concatenate([queries[name] for name in names])
        )
        split = dict(zip(names, np.split(everything, ends[:-1], axis=1), strict=True))
        if self._average != "scores":
            return split
        return {name: self._parts[name].average(s, axis=1) for name, s in split.items()}

    def _identity(self) -> Any:
        return self._preprocessing
