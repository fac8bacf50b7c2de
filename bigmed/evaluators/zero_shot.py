"""Zero-shot classification: which of a file's prompts an image lies nearest to, without labels.

As CheXzero does it (Tiu et al., Nature Biomedical Engineering 2022; CLIP, arXiv 2103.00020, section
3.1), with two differences. Similarities are divided by the temperature that the model was trained
with, so that what comes out are probabilities and not all about 0.5; and an image's score never
depends on the other images of the test set, as it does where scores are standardised over a batch.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmed import checkpoint as checkpoints_of
from bigmed import networks, sharding, statistics, tree
from bigmed.calibration import probabilities_of
from bigmed.data import prompts as prompt_files
from bigmed.data import texts, tokenise
from bigmed.data.sources import open_source
from bigmed.errors import UserError, did_you_mean
from bigmed.evaluators import features
from bigmed.evaluators.scored import Scored

AGGREGATES = ("mean_embedding", "mean_logit", "max_logit")
TASK_OF = {"pos_neg": "multi_label", "multiclass": "single_label"}
WEIGHTS = ("params/(?!probe/).*", "batch_stats/.*")  # no score depends on the online probe


class Evaluator(Scored):
    """`Scored` by the similarity of images and prompts.

    In the mode 'pos_neg' the probability of a class is the softmax over its positive and its
    negative prompts; in 'multiclass' over all classes (see `bigmed.data.prompts`).

    Args:
      predict_fn: (state, batch) -> features [B, D] of images; see `features.extract`.
      mesh: of `bigmed.sharding.make_mesh`.
      prompts: path of a prompt file.
      test: as `bigmed.data.sources.open_source` takes it.
      query_representation: (name, function like predict_fn) of the prompts, of one width with the
        images'.
      text: as `config.data.text`; of it `tokeniser`, `lower_case` and `length` are used, which have
        to be those of training.
      scale: params -> what similarities are multiplied by in training, 1 / temperature.
      val: like `test`; None for no thresholds, and no metrics that need them.
      aggregate: of a class's prompts: 'mean_embedding', the mean of their unit vectors, made a unit
        vector again; 'mean_logit' or 'max_logit' of their similarities.
      temperature: None for the one of training; of an ensemble each member has its own.
      checkpoints: further weights of the same network: folders of checkpoints, of which the newest
        is taken, or single steps in them. Of all of them (the stage's own, too; equal ones count
        once) the mean of their metrics, and the metrics of their mean probabilities, are given
        beside those of the stage.
      canvas, channels, preprocessing, cache_dir, batch_size: as in `probe.Probe`.
      **scored: see `Scored`; `average` may be 'scores'.

    Raises:
      UserError: a value that is none of these, prompts for an unknown class or none for a class,
        an empty prompt or one too long for the text tower; see also `Scored`.
    """

    NAME = "zero_shot"
    HELD_OUT = ("test",)
    AVERAGES = ("scores",)
    POLICIES = statistics.SCORING_POLICIES
    PROMPTED = True  # takes a representation of texts, and the objective's `scale`

    def __init__(
        self,
        predict_fn: features.PredictFn,
        mesh: jax.sharding.Mesh,
        *,
        prompts: str | os.PathLike,
        test: Mapping[str, Any],
        canvas: int,
        channels: int,
        preprocessing: Mapping[str, Any],
        query_representation: tuple[str, features.PredictFn],
        text: Mapping[str, Any],
        scale: Callable[[Any], jax.Array | float],
        val: Mapping[str, Any] | None = None,
        aggregate: str = "mean_embedding",
        temperature: float | None = None,
        checkpoints: Sequence[str] = (),
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 256,
        **scored: Any,
    ):
        if aggregate not in AGGREGATES:
            raise UserError(f"aggregate='{aggregate}': {did_you_mean(aggregate, AGGREGATES)}")
        if temperature is not None and not temperature > 0:
            raise UserError(f"temperature={temperature}: valid: above 0, or None for training's")
        for folder in checkpoints:
            if not pathlib.Path(folder).is_dir():
                raise UserError(f"checkpoints names '{folder}', which is no folder of checkpoints")
        self._prompts = prompt_files.load(prompts)
        splits = {"test": test, **({"val": val} if val is not None else {})}
        super().__init__(mesh, splits, **scored)
        known = open_source({**dict(test), "classes": None}).class_names
        for name in self._prompts.of_class:
            if name not in known:
                raise UserError(
                    f"prompts '{self._prompts.name}' are for '{name}', which is no class of "
                    f"'{self._opened['test'].name}'; {did_you_mean(name, known)}"
                )
        if self._task != TASK_OF[self._prompts.mode]:
            raise UserError(
                f"prompts '{self._prompts.name}' have the mode {self._prompts.mode}, for data of "
                f"task {TASK_OF[self._prompts.mode]}, and '{self._opened['test'].name}' is "
                f"{self._task}"
            )
        self._groups = self._prompts.groups(self._classes)
        self._tokens = _tokens(self._texts(), text, self._prompts.name)
        self._predict_fn, self._of_text = predict_fn, query_representation
        self._form = {"canvas": canvas, "channels": channels, "batch_size": batch_size}
        self._preprocessing, self._cache_dir = dict(preprocessing), cache_dir
        self._scale, self._temperature, self._aggregate = scale, temperature, aggregate
        self._checkpoints = tuple(checkpoints)

    def _texts(self) -> list[str]:
        """All prompts, group after group of class after class."""
        return [text for of_class in self._groups for group in of_class for text in group]

    def run(self, state: Any, checkpoint: str) -> Iterator[dict[str, Any]]:
        """Result rows of one state, and of it with other checkpoints.

        Args:
          state: of a stage.
          checkpoint: its name in the rows.

        Yields:
          As `Labelled.run`, less what is about training labels (`train_set` are the prompts,
          `fraction` is 0), and: prompts ('name version', with aggregate and temperature),
          prompts_sha256, n_prompts, members (how many checkpoints, whose mean or ensemble is named
          in `train_set`).
        """
        temperature, own = self._probabilities(state)
        members = {features.weights_fingerprint(_weights(state)): own}
        yield from self._rows([own], checkpoint, temperature, "", 1)
        for folder in self._checkpoints:
            other = self._with_weights(state, folder)
            fingerprint = features.weights_fingerprint(_weights(other))
            if fingerprint not in members:
                members[fingerprint] = self._probabilities(other)[1]
        if len(members) > 1:
            each, count = list(members.values()), len(members)
            mean = {name: np.mean([m[name] for m in each], axis=0) for name in own}
            yield from self._rows(each, checkpoint, temperature, "mean", count)
            yield from self._rows([mean], checkpoint, temperature, "ensemble", count)

    def _with_weights(self, state: Any, folder: str) -> Any:
        """The state with the weights of a checkpoint."""
        weights, _ = networks.load(folder, patterns=WEIGHTS)
        here = {n: x for n, x in tree.flatten(_weights(state)).items() if tree.matches(WEIGHTS, n)}
        there = {name: tree.describe_shape(leaf) for name, leaf in weights.items()}
        checkpoints_of.check_leaves({"leaves": there}, here, folder)
        return state.replace(
            **tree.map_with_name(
                lambda name, old: (
                    sharding.place(weights[name], old.sharding) if name in weights else old
                ),
                _weights(state),
            )
        )

    def _probabilities(self, state: Any) -> tuple[float, dict[str, np.ndarray]]:
        """The temperature, and of each part the probabilities [m, L]."""
        temperature = self._temperature
        if temperature is None:
            temperature = 1 / float(features.on_host(self._scale(state.params)))
        prompts = self._embedded(state)
        cache_key = features.cache_key(features.weights_fingerprint(state), self._preprocessing)
        found = {}
        for name, part in self._parts.items():
            images = features.extract(
                self._predict_fn,
                state,
                part.source,
                self._mesh,
                cache_dir=self._cache_dir,
                cache_key=cache_key,
                **self._form,
            )[part.rows]
            if images.shape[1] != prompts[0][0].shape[1]:
                raise UserError(
                    f"representation '{self._preprocessing['representation']}' is "
                    f"{images.shape[1]} wide and query_representation '{self._of_text[0]}' "
                    f"{prompts[0][0].shape[1]}; give those that were trained together"
                )
            scores = probabilities(images, prompts, self._aggregate, temperature, self._task)
            found[name] = part.average(scores)
        return temperature, found

    def _embedded(self, state: Any) -> list[list[np.ndarray]]:
        """The vectors [P, D] of the prompts: of each class, of each of its groups."""
        everywhere = sharding.replicated(self._mesh)
        embed = jax.jit(self._of_text[1], out_shardings=everywhere)
        found, chunk = [], self._form["batch_size"]
        for start in range(0, len(self._tokens.tokens), chunk):
            part = slice(start, start + chunk)
            batch = {"tokens": self._tokens.tokens, "token_mask": self._tokens.mask}
            batch = {  # PRT
                name: sharding.place(x[part, None], everywhere) for name, x in batch.items()
            }
            found.append(features.on_host(embed(state, batch)))
        sizes = [len(group) for of_class in self._groups for group in of_class]
        split = iter(np.split(np.concatenate(found), np.cumsum(sizes)[:-1]))
        return [[next(split) for _ in of_class] for of_class in self._groups]

    def _rows(
        self,
        scores: Sequence[Mapping[str, np.ndarray]],
        checkpoint: str,
        temperature: float,
        what: str,
        members: int,
    ) -> Iterator[dict[str, Any]]:
        prompts, of_members = self._prompts, f", {what} of {members} checkpoints" if what else ""
        identity = [prompts.sha256, self._uncertain, self._average, self._aggregate, temperature]
        identity += [self._preprocessing, list(self._classes)]
        identity += [what, self._checkpoints if what else ()]
        for name in self._test_sets:
            file = None  # of a mean of metrics there is none
            if len(scores) == 1:
                file = self._write_predictions(name, scores[0][name], checkpoint, identity)
            common = {
                **self._of_test_set(name, checkpoint),
                "train_set": f"prompts {prompts.name}{of_members}",
                "fraction": 0.0,
                "prompts": f"{prompts.name} {prompts.version}, {self._aggregate}, "
                f"temperature {temperature:.3g}",
                "prompts_sha256": prompts.sha256,
                "n_prompts": len(self._tokens.tokens),
                "members": members,
                "predictions": file,
            }
            yield from self._result_rows(name, scores, common)


def probabilities(
    images: np.ndarray,
    prompts: Sequence[Sequence[np.ndarray]],
    aggregate: str,
    temperature: float,
    task: str,
) -> np.ndarray:
    """What the prompts say about each image, by itself: float64 [N, L].

    Args:
      images: [N, D].
      prompts: of each of L classes, of each of its groups (two: present, absent; or one), [P, D].
      aggregate: one of `AGGREGATES`.
      temperature: that cosine similarities are divided by.
      task: 'multi_label', with two groups, or 'single_label', with one.
    """
    x = _unit(images)
    similar = [[_similarity(x, _unit(group), aggregate) for group in groups] for groups in prompts]
    # a softmax over two is the sigmoid of their difference
    logits = [groups[0] - groups[1] if len(groups) > 1 else groups[0] for groups in similar]
    return probabilities_of(np.stack(logits, axis=1), np.array([temperature]), task)


def _similarity(x: np.ndarray, prompts: np.ndarray, aggregate: str) -> np.ndarray:
    """[N] of unit vectors [N, D] and [P, D]."""
    if aggregate == "mean_embedding":
        return x @ _unit(prompts.mean(axis=0, keepdims=True))[0]  # ND.D = N
    similar = x @ prompts.T  # ND.DP = NP
    return similar.mean(axis=1) if aggregate == "mean_logit" else similar.max(axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _weights(state: Any) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _tokens(prompts: Sequence[str], config: Mapping[str, Any], name: str) -> tokenise.Tokens:
    """The prompts as the text tower takes them; `UserError` names one that does not fit."""
    _, tokeniser = texts.prepare((), config)
    length = config.get("length", texts.TextSettings.length)
    tokens = tokenise.encode(prompts, tokeniser, length)
    if tokens.truncated or tokens.empty:
        for prompt in prompts:
            alone = tokenise.encode([prompt], tokeniser, length)
            if alone.truncated or alone.empty:
                wrong = f"has more than {length} tokens" if alone.truncated else "has no token"
                raise UserError(f"prompts '{name}': '{prompt:.60}' {wrong} (text.length={length})")
    return tokens
