"""Retrieval: how many of the images that lie nearest to a query share its class.

ConVIRT's zero-shot evaluation (arXiv 2010.00747, section 4.2): candidates are ranked by cosine
similarity with a query image, or with a query text where a text tower was trained with the encoder,
and precision@k is the share of the first k that are of the query's class.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmed import statistics
from bigmed.data import texts
from bigmed.data.sources import Source, joined_patients, open_source
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators import features
from bigmed.evaluators.neighbours import SHOWN, Neighbours, nearest, spread

CHUNK_ELEMENTS = 2**24  # pairs of a query and a candidate whose classes are compared at once


@dataclasses.dataclass(frozen=True)
class Side:
    """The queries or the candidates.

    Attributes:
      source: the records are some of it.
      rows: int [n], their numbers.
      positive: bool [n, L], their classes.
      text_ids: int32 [n], equal for equal texts, -1 without one; None where texts play no part.
    """

    source: Source
    rows: np.ndarray
    positive: np.ndarray
    text_ids: np.ndarray | None


class Evaluator:
    """Precision and recall among the first k candidates, against chance.

    A candidate is relevant where it shares a positive class with the query. Images without one are
    neither queries nor candidates. Candidates of the query's own patient are left out (its own
    image, where the data set names no patients), and with text queries those whose text is equal.

    Args:
      predict_fn: (state, batch) -> features [B, D] of the candidates; see `features.extract`.
      mesh: of `bigmed.sharding.make_mesh`.
      query, candidates: sources as `bigmed.data.sources.open_source` takes them; may be the same.
      query_representation: (name, function like predict_fn) of the queries, where it is another one
        than the candidates'; of one width with it.
      text: as `config.data.text`, where queries are texts. Which ones are drawn never changes.
        Queries are then the records that have a text.
      ks: how many candidates to look at; those above their number are left out.
      canvas, channels, preprocessing, cache_dir, batch_size, classes, uncertain, num_resamples,
        seed: as in `probe.Probe`.
      predictions_dir, hash_key: unused; nothing about single images is kept.

    Raises:
      UserError: a value that is none of these, no positive class, or other classes in one of both.
    """

    HELD_OUT = ("query",)

    def __init__(
        self,
        predict_fn: features.PredictFn,
        mesh: jax.sharding.Mesh,
        *,
        query: Mapping[str, Any],
        candidates: Mapping[str, Any],
        canvas: int,
        channels: int,
        preprocessing: Mapping[str, Any],
        query_representation: tuple[str, features.PredictFn] | None = None,
        text: Mapping[str, Any] | None = None,
        ks: Sequence[int] = (1, 5, 10, 50),
        cache_dir: str | os.PathLike | None = None,
        predictions_dir: str | os.PathLike | None = None,
        hash_key: bytes = b"",
        batch_size: int = 256,
        classes: Sequence[str] = (),
        uncertain: str = "ignore",
        num_resamples: int = 1000,
        seed: int = 0,
    ):
        del predictions_dir, hash_key
        if not ks or min(ks) < 1 or num_resamples < 1:
            raise UserError(f"ks={tuple(ks)}, num_resamples={num_resamples}: valid: 1 and more")
        if uncertain not in statistics.SCORING_POLICIES:
            valid = did_you_mean(uncertain, statistics.SCORING_POLICIES)
            raise UserError(f"uncertain='{uncertain}' of retrieval: {valid}")
        extra = {"classes": tuple(classes)} if classes else {}
        opened = [open_source({**dict(source), **extra}) for source in (query, candidates)]
        if opened[0].class_names != opened[1].class_names:
            names = [f"'{source.name}' has {', '.join(source.class_names)}" for source in opened]
            raise UserError(f"{'; '.join(names)}; name the classes of both in classes")
        self._mesh, self._cache_dir = mesh, cache_dir
        self._predict_fn, self._of_query = predict_fn, query_representation
        self._form = {"canvas": canvas, "channels": channels, "batch_size": batch_size}
        self._preprocessing, self._uncertain = dict(preprocessing), uncertain
        self._num_resamples, self._seed = num_resamples, seed
        self._text = None
        if text is not None:
            self._text = texts.prepare(opened[:1], text)[0][0]
        self._query = self._side(opened[0], "query", self._text)
        of_candidates = None
        if text is not None and "text" in opened[1].records.keys:
            of_candidates = texts.prepare(opened[1:], text)[0][0]
        self._candidates = self._side(opened[1], "candidates", of_candidates)
        self._ks = [k for k in sorted(ks) if k <= len(self._candidates.rows)]
        if not self._ks:
            raise UserError(f"ks={tuple(ks)}: there are {len(self._candidates.rows)} candidates")

    def sources(self) -> dict[str, Source]:
        """Of both sides, by name."""
        return {"queries": self._query.source, "candidates": self._candidates.source}

    def _side(self, source: Source, name: str, text: texts.Texts | None) -> Side:
        positive = statistics.apply_label_policy(source.labels, self._uncertain) == 1
        keep = positive.any(axis=1)
        if text and name == "query":
            keep &= text.has_text
        if not keep.any():
            with_text = "a text and " if text and name == "query" else ""
            raise UserError(
                f"{name} source '{source.name}' has no image with {with_text}a positive class"
            )
        rows = np.flatnonzero(keep)
        ids = None
        if text:
            ids = np.full(len(source), -1, np.int32)
            having = np.flatnonzero(text.has_text)
            ids[having] = text.fixed(having)["text_id"][:, 0]
            ids = ids[rows]
        return Side(source, rows, positive[rows], ids)

    def run(self, state: Any, checkpoint: str) -> Iterator[dict[str, Any]]:
        """Result rows of one state: precision@k, how much that is above chance, and chance.

        With a '/' in the name, as details: recall@k, of the queries that have a relevant
        candidate; and where texts are compared with the images that they belong to, how often one
        of these is among the first k, and how often it would be by chance.

        Args:
          state: what the functions want.
          checkpoint: its name in the rows.

        Yields:
          A row for each metric, as `Probe.run`; `train_set` are the candidates.
        """
        queries, x = self._both(state)
        values = self._precision(queries, x)
        query, candidates = self._query.source, self._candidates.source
        if self._of_query and query.fingerprint == candidates.fingerprint:
            values |= self._own(queries, x)
        estimates = statistics.means(
            values,
            query.patients[self._query.rows],
            num_resamples=self._num_resamples,
            seed=self._seed,
        )
        common = {
            "task": query.task,
            "train_set": candidates.name,
            "test_set": query.name,
            "fraction": 1.0,
            "split_sha256": query.split_sha256,
            "checkpoint": checkpoint,
            "label_policy": f"uncertain={self._uncertain}, missing=ignore",
            "n_candidates": len(x),
            "resample_unit": "patient" if query.has_patients else "image",
            "synthetic": query.synthetic or candidates.synthetic,
            "predictions": None,
        }
        yield from statistics.rows(estimates, common)

    def neighbours(self, state: Any) -> Iterator[Neighbours]:
        """A few queries with the candidates that are found; a text's own image stands for it."""
        queries, x = self._both(state)
        query, candidates = self._query, self._candidates
        picks = spread(query.positive)
        similar, index = nearest(
            x, queries[picks], min(SHOWN, len(x)), self._mesh, self._left_out(picks)
        )
        by = "by the report of the first image" if self._of_query else "by image"
        yield Neighbours(
            title=f"{query.source.name} in {candidates.source.name}, {by}",
            queries=query.source,
            found=candidates.source,
            query_rows=query.rows[picks],
            found_rows=np.where(np.isfinite(similar), candidates.rows[index], -1),
            query_labels=query.positive[picks],
            found_labels=candidates.positive[index],
            class_names=tuple(query.source.class_names),
        )

    def _both(self, state: Any) -> tuple[np.ndarray, np.ndarray]:
        """float32 features [Q, D] of the queries and [N, D] of the candidates."""
        weights = features.weights_fingerprint(state)
        name, predict_fn = self._preprocessing["representation"], self._predict_fn
        x = self._features(name, predict_fn, self._candidates, state, weights, None)
        same = self._query.source.fingerprint == self._candidates.source.fingerprint
        if same and not self._of_query and np.array_equal(self._query.rows, self._candidates.rows):
            return x, x
        name, predict_fn = self._of_query or (name, predict_fn)
        return self._features(name, predict_fn, self._query, state, weights, self._text), x

    def _left_out(self, picks: np.ndarray | slice = slice(None)) -> list[Any]:
        """Which candidates are not for which of the queries; see `neighbours.nearest`."""
        people = joined_patients([self._query.source, self._candidates.source])
        pairs = [(people[1][self._candidates.rows], people[0][self._query.rows][picks])]
        if self._query.text_ids is not None and self._candidates.text_ids is not None:
            pairs.append((self._candidates.text_ids, self._query.text_ids[picks]))
        return pairs

    def _features(
        self, name: str, predict_fn: Any, side: Side, state: Any, weights: str, text: Any
    ) -> np.ndarray:
        """float32 [n, D]."""
        of_text = [text.settings.__dict__, text.ids.tolist()] if text else None
        identity = [weights, {**self._preprocessing, "representation": name}, of_text]
        everything = features.extract(
            predict_fn,
            state,
            side.source,
            self._mesh,
            text=text,
            cache_dir=self._cache_dir,
            cache_key=json.dumps(identity, sort_keys=True),
            **self._form,
        )
        return everything if len(side.rows) == len(everything) else everything[side.rows]

    def _precision(self, queries: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: float64 [Q], NaN where it is undefined}."""
        left_out = self._left_out()
        similar, index = nearest(x, queries, max(self._ks), self._mesh, left_out)
        classes = (self._query.positive, self._candidates.positive)
        hits = (classes[0][:, None] & classes[1][index]).any(axis=2) & np.isfinite(similar)  # QK
        relevant, eligible = _counts(*classes, left_out)
        found = np.cumsum(hits, axis=1)
        chance = relevant / np.where(eligible, eligible, np.nan)
        values = {
            # of the first k, or of as many as there are for the query
            f"precision@{k}": found[:, k - 1] / np.where(eligible, np.minimum(k, eligible), np.nan)
            for k in self._ks
        }
        values |= {f"gain@{k}": values[f"precision@{k}"] - chance for k in self._ks}
        values["chance"] = chance
        recall = {
            f"recall/{k}": np.where(relevant, found[:, k - 1] / np.maximum(relevant, 1), np.nan)
            for k in self._ks
        }
        return values | recall

    def _own(self, queries: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
        """Whether an image of a text's own case is among the first k, and its chance: [Q]."""
        cases = self._query.source.cases
        of_query, of_candidate = cases[self._query.rows], cases[self._candidates.rows]
        _, index = nearest(x, queries, max(self._ks), self._mesh)
        hits = of_candidate[index] == of_query[:, None]  # QK
        owned = np.bincount(of_candidate, minlength=int(cases.max()) + 1)[of_query]
        values = {}
        for k in self._ks:
            missed = np.ones(len(owned))
            for drawn in range(k):  # without replacement
                missed *= np.maximum(len(x) - owned - drawn, 0) / (len(x) - drawn)
            values[f"own/{k}"] = np.where(owned > 0, hits[:, :k].any(axis=1), np.nan)
            values[f"own by chance/{k}"] = np.where(owned > 0, 1 - missed, np.nan)
        return values


def _counts(
    of_queries: np.ndarray, of_candidates: np.ndarray, left_out: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """How many candidates are relevant to each query, and how many may be found at all: int [Q].

    Args:
      of_queries, of_candidates: bool [Q, L] and [N, L], their classes.
      left_out: see `neighbours.nearest`.
    """
    chunk = max(1, CHUNK_ELEMENTS // len(of_candidates))
    relevant, eligible = [], []
    for start in range(0, len(of_queries), chunk):
        part = slice(start, start + chunk)
        shared = of_queries[part].astype(np.float32) @ of_candidates.T.astype(np.float32) > 0  # QN
        kept = np.ones(shared.shape, bool)
        for of_x, of_q in left_out:
            kept &= (of_q[part, None] != of_x[None]) | (of_q[part, None] < 0)
        relevant.append((shared & kept).sum(axis=1))
        eligible.append(kept.sum(axis=1))
    return np.concatenate(relevant), np.concatenate(eligible)
