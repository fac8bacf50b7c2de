"""Fine-tuning: encoder and a fresh linear head are trained on labels, on the loop of every stage.

A setting of the grid (learning rate x weight decay) is chosen on validation, where each run also
stops early and keeps its best weights; then the chosen setting is run again with other seeds. The
protocols: SimCLR (arXiv 2002.05709, B.5 and B.8), Big-SSL (arXiv 2101.05224), ConVIRT (arXiv
2010.00747, appendix), BiT (arXiv 1912.11370, 3.3); see `configs/finetune.py`.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from bigmed import sharding, tree
from bigmed.errors import NonFiniteError, UserError
from bigmed.evaluators import features
from bigmed.evaluators.labelled import Labelled, Learnt

log = logging.getLogger("bigmed")

MAX_EVALUATIONS = 100  # of a run, where they are once an epoch


class Trainer(Protocol):
    """Trains a network of the stage's model in a folder of its own (`bigmed.nested`)."""

    projection: Mapping[str, Any] | None  # settings of the stage's projection head, if it has one

    def check(self, changes: Mapping[str, Any], look: Any) -> None:
        """Raises `UserError` where a run with these changes of the stage's config cannot work."""

    def fit(self, name: str, changes: Mapping[str, Any], weights: Any, load: Any, look: Any) -> Any:
        """(objective, state) of the run; continued where it was stopped, at once if it is done."""

    def outcome(self, name: str) -> float | None:
        """What was noted of a run, None where it is not done."""

    def note(self, name: str, value: float) -> None:
        """Notes the outcome of a run."""

    def forget(self, name: str) -> None:
        """Removes the weights of a run, not its metrics or outcome."""


class Evaluator(Labelled):
    """`Labelled` by training the whole network.

    Args:
      trainer: see `Trainer`.
      mesh: of `bigmed.sharding.make_mesh`.
      canvas, channels: form of the images.
      optim: as `config.optim`; its `lr` and `weight_decay` come from the grid.
      learning_rates, weight_decays: the grid.
      decay_over_rate: whether weight decays are divided by the learning rate, as SimCLR's are.
      batch_size: of training; where there are fewer images, as many as there are.
      steps, epochs: length of a run; one of the two.
      head_only_steps, head_only_rate: the classifier alone is trained first, by the same optimiser
        at a constant rate.
      from_layer: how many layers of the projection head are kept under the classifier.
      class_weights: 'none', or 'balanced': inversely to frequency.
      dropout, batch_norm, mixup: see `bigmed.objectives.supervised`.
      augment: in place of the stage's `config.augment`, but for its preprocessing.
      evaluate_every: steps from a look at validation to the next; None: once an epoch.
      patience: looks without improvement after which a run ends; 0: it does not.
      runs: of the chosen setting, with as many seeds.
      eval_batch_size: images a step of evaluation.
      **labelled: see `Labelled`.

    Raises:
      UserError: a value that cannot work; see also `Labelled`.
    """

    NAME = "finetune"
    AVERAGES = ("scores",)
    TRAINS = True  # takes a `Trainer` in place of a function that predicts

    def __init__(
        self,
        trainer: Trainer,
        mesh: jax.sharding.Mesh,
        *,
        canvas: int,
        channels: int,
        optim: Mapping[str, Any],
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
        decay_over_rate: bool = False,
        batch_size: int = 64,
        steps: int | None = None,
        epochs: float | None = None,
        head_only_steps: int = 0,
        head_only_rate: float = 1e-3,
        from_layer: int = 0,
        class_weights: str = "none",
        dropout: float = 0.0,
        batch_norm: str = "train",
        mixup: float = 0.0,
        augment: Mapping[str, Any] | None = None,
        evaluate_every: int | None = None,
        patience: int = 0,
        runs: int = 1,
        eval_batch_size: int = 256,
        **labelled: Any,
    ):
        if not learning_rates or not weight_decays or min(learning_rates) <= 0:
            raise UserError(
                f"learning_rates={tuple(learning_rates)}, weight_decays={tuple(weight_decays)}: "
                "valid: rates above 0, decays from 0, at least one of each"
            )
        if class_weights not in ("none", "balanced"):
            raise UserError(f"class_weights='{class_weights}': valid: none, balanced")
        if runs < 1 or batch_size < 1 or head_only_steps < 0 or (steps is None) == (epochs is None):
            raise UserError(
                f"runs={runs}, batch_size={batch_size}, head_only_steps={head_only_steps}, "
                f"steps={steps}, epochs={epochs}: valid: runs and batch_size from 1, one of steps "
                "and epochs"
            )
        projection = trainer.projection or {}
        if not 0 <= from_layer <= projection.get("num_layers", 0):
            raise UserError(
                f"from_layer={from_layer}: this stage's projection head has "
                f"{projection.get('num_layers', 0)} layers; valid: 0 to as many"
            )
        self._trainer, self._optim = trainer, dict(optim)
        self._form = {"canvas": canvas, "channels": channels, "batch_size": eval_batch_size}
        self._rates, self._decays = tuple(learning_rates), tuple(weight_decays)
        self._decay_over_rate, self._batch_size = decay_over_rate, batch_size
        self._length = {"steps": steps, "epochs": epochs}
        self._head_only = (head_only_steps, head_only_rate)
        self._class_weights, self._runs = class_weights, runs
        self._augment, self._train_config = dict(augment or {}), dict(labelled["train"])
        self._every, self._patience = evaluate_every, patience
        self._objective = {
            "name": "supervised",
            "uncertain": labelled.get("uncertain", "ignore"),
            "dropout": dropout,
            "batch_norm": batch_norm,
            "mixup": mixup,
            "from_layer": from_layer,
            "projection": dict(projection),
        }
        super().__init__(mesh, **labelled)
        trainer.check(self._changes(self.settings()[0], 0), self._look_at_validation())

    def _draw_subset(self, fraction: float, seed: int) -> str | None:
        wrong = super()._draw_subset(fraction, seed)
        shards = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH_AXES)
        found = len(self._parts["train"].rows)
        if wrong is None and found < shards:
            wrong = (
                f"train source '{self._train_source.name}' has {found} labelled images at "
                f"fraction={fraction}, seed={seed}, fewer than the {shards} devices that a batch "
                "is divided over; use fewer devices or more labels"
            )
        return wrong

    def settings(self) -> list[dict[str, float]]:
        """The grid, in the order in which it is run."""
        return [
            {"lr": lr, "weight_decay": decay / lr if self._decay_over_rate else decay}
            for lr, decay in itertools.product(self._rates, self._decays)
        ]

    def learn(self, state: Any) -> Iterator[Learnt]:
        """Chooses a setting on validation, and runs it with several seeds."""
        weights = {
            name: features.on_host(leaf)
            for name, leaf in tree.flatten(
                {"params": state.params, "batch_stats": state.batch_stats}
            ).items()
        }
        best, best_value = {}, -math.inf
        settings = self.settings()
        for setting in settings if len(settings) > 1 else ():
            name = self._name(setting, 0)
            value = self._trainer.outcome(name)
            if value is None:
                try:
                    value = self._quality(self._predict(*self._fit(setting, 0, weights), "val"))
                except NonFiniteError as error:
                    log.warning("%s: %s is out of the choice (%s)", self.NAME, setting, error)
                    value = -math.inf
                self._trainer.note(name, value)
            worse = setting
            if value > best_value:
                worse, best, best_value = best, setting, value
            if worse:  # the weights of one setting at a time are kept
                self._trainer.forget(self._name(worse, 0))
        if len(settings) > 1 and not best:
            raise UserError(
                f"{self.NAME}: every run of learning_rates={self._rates} grew beyond all bounds; "
                "use lower ones"
            )
        best = best or settings[0]
        for run in range(self._runs):
            trained = self._fit(best, run, weights)
            names = ("val", *self._test_sets)
            yield Learnt(best, {name: self._predict(*trained, name) for name in names})
            if run:
                self._trainer.forget(self._name(best, run))

    def _name(self, setting: Mapping[str, float], run: int) -> str:
        """Folder of a run."""
        return (
            f"fraction{self._fraction:g}_draw{self._seed}/"
            f"lr{setting['lr']:.3g}_wd{setting['weight_decay']:.3g}_run{run}"
        )

    def _fit(
        self, setting: Mapping[str, float], run: int, weights: Mapping[str, np.ndarray]
    ) -> tuple[Any, Any]:
        """(objective, state) of one run."""
        modules = "backbone|head" if self._objective["from_layer"] else "backbone"
        kept = tuple(
            f"{collection}/({modules})/.*"
            for collection in ("params", "batch_stats")
            if any(name.startswith(f"{collection}/backbone/") for name in weights)
        )
        name, changes = self._name(setting, run), self._changes(setting, run)
        steps, rate = self._head_only
        if steps:
            alone = {"freeze": ("(backbone|head)/.*",), "lr": rate, "lr_scaling": "none"}
            alone |= {"schedule": "constant", "warmup_steps": 0, "layer_decay": 1.0}
            first = {**changes, "optim": {**changes["optim"], **alone}}
            first |= {"steps": steps, "epochs": None, "objective": {**self._weighted()}}
            first["objective"]["batch_norm"] = "frozen"
            _, state = self._trainer.fit(f"{name}/head", first, weights, kept, None)
            values = {"params": state.params, "batch_stats": state.batch_stats}
            weights = {n: features.on_host(leaf) for n, leaf in tree.flatten(values).items()}
            kept = tuple(f"{c}/.*" for c in values if tree.flatten(values[c]))
        return self._trainer.fit(name, changes, weights, kept, self._look_at_validation())

    def _look_at_validation(self) -> dict[str, Any]:
        """How often a run looks at validation, what it finds there, and when it gives up."""
        every = self._every
        if every is None:
            per_epoch = math.ceil(len(self._parts["train"].rows) / self._fitting_batch())
            steps = self._length["steps"] or math.ceil(per_epoch * self._length["epochs"])
            every = max(per_epoch, math.ceil(steps / MAX_EVALUATIONS))
        return {
            "every": every,
            "patience": self._patience,
            "metric": self._select_by,
            "function": lambda objective, state: self._quality(
                self._predict(objective, state, "val")
            ),
        }

    def _fitting_batch(self) -> int:
        """The batch size, or as many images as there are, in whole rows of the mesh."""
        shards = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH_AXES)
        return min(self._batch_size, len(self._parts["train"].rows)) // shards * shards

    def _changes(self, setting: Mapping[str, float], run: int) -> dict[str, Any]:
        """What is other than in the stage's config."""
        train = {
            **self._train_config,
            "classes": self._classes,
            "labelled": self._uncertain,
            "fraction": self._fraction,
            "fraction_seed": self._seed,
        }
        data = {"sources": ("train",), "source": {"train": train}, "pairs": None}
        return {
            "seed": self._seed + run,
            **self._length,
            "data": {**data, "batch_size": self._fitting_batch()},
            "augment": self._augment,
            "objective": self._weighted(),
            "optim": {**self._optim, **setting},
        }

    def _weighted(self) -> dict[str, Any]:
        """The objective's section, with the weights of the classes."""
        targets, weights = self._targets("train"), ()
        if self._class_weights == "balanced":
            present = (targets > 0.5).sum(axis=0)
            absent = ((targets >= 0) & (targets <= 0.5)).sum(axis=0)
            of = absent if self._task == "multi_label" else len(targets) / (present > 0).sum()
            weights = tuple(np.where(present > 0, of / np.maximum(present, 1), 1.0).tolist())
        return {**self._objective, "class_weights": weights}

    def _predict(self, objective: Any, state: Any, name: str) -> np.ndarray:
        """Probabilities [m, L] of a part's units."""
        part = self._parts[name]
        everything = features.extract(
            objective.probabilities, state, part.source, self._mesh, quiet=True, **self._form
        )
        return part.average(everything[part.rows])

    def _identity(self) -> Any:
        return [self._objective, self._optim, self._rates, self._decays, self._length]
