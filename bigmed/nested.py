"""Runs inside the evaluation of a stage: its model, trained on with another config."""

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bigmed import augment, metrics, optim, train
from bigmed.models.heads import ProjectionHead
from bigmed.state import TrainState, shardings
from bigmed.validation import BEST, Best

OUTCOME = "outcome.json"


class OnScores(Best):
    """Looks at a metric of held-out predictions, of which more is better; the best weights stay.

    Args:
      every, patience: see `Best`.
      metric: its name.
      score: state -> the metric.
      observe: (state, loss) -> the state as a schedule leaves it.
    """

    SIGN = -1

    def __init__(
        self,
        every: int,
        patience: int,
        metric: str,
        score: Callable[[TrainState], float],
        observe: Callable[[TrainState, Any], TrainState],
    ):
        super().__init__(every, "best", patience)
        self.NAME, self._score, self._observe = f"val_{metric}", score, observe

    def run(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state as the schedule leaves it after this, and {NAME: value}."""
        value = self._score(state)
        return self._observe(state, np.float32(-value)), {self.NAME: value}


class Trainer:
    """`evaluators.finetune.Trainer` for one stage.

    Args:
      stage: whose model and config the runs start from.
      directory: of the runs.
      stop: whether the process was asked to stop.
    """

    def __init__(self, stage: train.Stage, directory: pathlib.Path, stop: Callable[[], bool]):
        self._stage, self._directory, self._stop = stage, directory, stop
        head = getattr(stage.objective, "head", None)
        self.projection = None
        if isinstance(head, ProjectionHead):
            names = ("num_layers", "hidden_dim", "out_dim", "norms", "biases")
            self.projection = {name: getattr(head, name) for name in names}

    def check(self, changes: Mapping[str, Any], look: Mapping[str, Any] | None) -> None:
        """Builds a run as `fit` would, without making or training anything."""
        self._build("check", changes, look)

    def fit(
        self,
        name: str,
        changes: Mapping[str, Any],
        weights: Mapping[str, np.ndarray],
        load: Sequence[str],
        look: Mapping[str, Any] | None,
    ) -> tuple[Any, TrainState]:
        """(objective, state) of a run, continued where it was stopped.

        Args:
          name: its folder.
          changes: of the stage's config, by section.
          weights, load: what it starts from, see `train.fresh`.
          look: None, or {'every', 'patience', 'metric', 'function'}, a function of (objective,
            state) by which weights are kept and training ends.

        Raises:
          Preempted, NonFiniteError, UserError: see `train`.
        """
        stage = self._build(name, changes, look)
        state = train.restore(stage)
        if state is None:
            state = train.fresh(stage, weights, load, ())
        state, _ = train.run_stage(stage, state, self._stop)
        return stage.objective, state

    def outcome(self, name: str) -> float | None:
        """What was noted of a run; None if nothing was."""
        path = self._directory / name / OUTCOME
        if not path.exists():
            return None
        value = json.loads(path.read_text())["value"]
        return -math.inf if value is None else value

    def note(self, name: str, value: float) -> None:
        """Notes the outcome of a run; -inf of one that did not stay finite."""
        if jax.process_index() == 0:
            path = self._directory / name / OUTCOME
            path.parent.mkdir(parents=True, exist_ok=True)
            metrics.write_json(path, {"value": metrics.json_safe(value)})

    def forget(self, name: str) -> None:
        """Removes the weights of a run; its metrics and outcome stay."""
        if jax.process_index() == 0:
            for folder in (self._directory / name).glob(f"**/{BEST}"):
                shutil.rmtree(folder)
            for folder in (self._directory / name).glob("**/checkpoints"):
                shutil.rmtree(folder)

    def _build(
        self, name: str, changes: Mapping[str, Any], look: Mapping[str, Any] | None
    ) -> train.Stage:
        config = ConfigDict(self._stage.config.to_dict())
        config.data.text = ConfigDict({"tokeniser": ""})
        config.validate.update(sources=(), every=0, keep="last", patience=0)
        config.micro_batch.update(count=1)
        config.checkpoint.keep = 1
        with config.ignore_type():
            for key, value in changes.items():
                whole = key in ("objective", "augment") or not isinstance(value, Mapping)
                config[key] = value if whole else {**config[key], **value}
            # The weights want their images as before, whatever else is done to them.
            before = augment.from_config(self._stage.config.augment)
            kept = {name: getattr(before, name) for name in augment.PREPROCESSING}
            config.augment = {**kept, **changes["augment"]}

        def looking(objective: Any, abstract: TrainState) -> Best:
            def observe(state: TrainState, loss: jax.Array) -> TrainState:
                return state.replace(opt_state=optim.observe(config.optim, state.opt_state, loss))

            return OnScores(
                look["every"],
                look["patience"],
                look["metric"],
                lambda state: look["function"](objective, state),
                jax.jit(observe, donate_argnums=0, out_shardings=shardings(abstract)),
            )

        return train.build_stage(
            f"{self._stage.label}/{self._directory.name}/{name}",
            config.lock(),
            self._directory / name,
            self._stage.mesh,
            look=looking if look else None,
        )
