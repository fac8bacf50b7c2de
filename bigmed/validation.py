"""The objective's loss on held-out images while a stage trains, and the best weights by it.

Labels are left out: what a schedule or a choice of weights sees must not come from them.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigmed import checkpoint, optim, sharding
from bigmed.data import schema, sources
from bigmed.data.pipeline import Pipeline
from bigmed.errors import UserError
from bigmed.state import TrainState, shardings, stream

KEEP = ("last", "best")
SEED = 0  # of the order and the draws, in every run and at every evaluation
BEST = "best"  # folder of the stage


class Best:
    """What is looked at every so many steps of a stage, and the weights where it was best.

    Attributes:
      NAME: of the value in metrics.jsonl.
      SIGN: 1 where less is better, -1 where more is.
      every: how many steps.
      patience: after so many times in a row without a better value the stage ends; 0: it does not.
    """

    NAME, SIGN = "val_loss", 1

    def __init__(self, every: int, keep: str, patience: int = 0):
        if keep not in KEEP:
            raise UserError(f"config.validate.keep='{keep}': valid: {', '.join(KEEP)}")
        if patience < 0 or (patience and keep != "best"):
            raise UserError(
                f"config.validate.patience={patience}: valid: 0 and more, with keep='best'"
            )
        self.every, self.patience, self._keep = every, patience, keep

    def due(self, step: int, total_steps: int) -> bool:
        return step % self.every == 0 or step == total_steps

    def run(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state as the schedule leaves it after this, and {name: value}, `NAME` among them."""
        raise NotImplementedError

    def keep_if_best(
        self,
        state: TrainState,
        values: Mapping[str, float],
        directory: pathlib.Path,
        identity: Mapping[str, Any],
    ) -> None:
        """Saves the state in `directory`/best if its value is better than that of the one there."""
        value = values[self.NAME]
        if self._keep != "best" or not np.isfinite(value):
            return
        checkpointer = checkpoint.Checkpointer(directory / BEST, keep=1)
        steps, step = checkpointer.steps(), int(state.step)
        # The step is there where a resumed run comes by it again.
        better = step not in steps and self.SIGN * value < self._kept(directory / BEST, steps)
        if sharding.everywhere(better):
            checkpointer.save(step, state, {**identity, self.NAME: value})
        checkpointer.close()

    def _kept(self, folder: pathlib.Path, steps: Sequence[int]) -> float:
        """The value of the last of the kept steps, times SIGN; infinite where none can be read."""
        try:
            if not steps:
                return math.inf
            return self.SIGN * checkpoint.read_meta(folder / str(steps[-1]))[self.NAME]
        except checkpoint.TornCheckpoint:
            return math.inf

    def exhausted(self, step: int, directory: pathlib.Path) -> bool:
        """Whether the stage ends at this step for want of patience, going by what is kept."""
        if not self.patience or not (directory / BEST).is_dir():
            return False
        checkpointer = checkpoint.Checkpointer(directory / BEST, keep=1)
        steps = checkpointer.steps()
        checkpointer.close()
        late = bool(steps) and step - steps[-1] >= self.patience * self.every
        return sharding.everywhere(late)


class Validation(Best):
    """Evaluates the loss on the same batches with the same draws every time.

    All units of the held-out data are visited, in batches as large as the training's, because a
    contrastive loss depends on the batch size; the first units once more fill up the last batch.

    Config (`config.validate`): `sources`, names of `config.data.source`; `every` so many steps;
    `keep`, whether the stage's weights are the 'last' or the 'best', of the lowest loss;
    `patience`, see `Best`.

    Raises:
      UserError: an invalid value, fewer units than a batch, or patients shared with the training
        data.
    """

    def __init__(self, config: Any, objective: Any, training: Pipeline, mesh: Any, abstract: Any):
        settings = config.validate
        super().__init__(settings.every, settings.keep, settings.patience)
        if not settings.sources or settings.every < 1:
            raise UserError(
                f"config.validate.every={settings.every} and .sources={tuple(settings.sources)}: "
                "give both, a number of steps and names of config.data.source"
            )
        block, num_blocks = sharding.host_block(mesh)
        batch_size = config.data.batch_size
        self.pipeline = Pipeline(
            {**config.data, "sources": settings.sources},
            seed=SEED,
            batch_size=batch_size,
            block=block,
            num_blocks=num_blocks,
            every_unit=True,
        )
        for held_out in self.pipeline.sources:
            for source in training.sources:
                sources.check_disjoint(source, held_out)
        self._num_batches = -(-self.pipeline.units_per_epoch // batch_size)
        self._rows = sharding.batch_sharding(mesh)
        self._labels = (batch_size // num_blocks, len(training.class_names))

        def loss(state: TrainState, batch: Mapping[str, Any], number: jax.Array) -> Any:
            key = stream(jax.random.key(SEED), "validate", number)
            value, aux = objective.loss(
                state.params, state.batch_stats, state.extra, batch, key, False
            )
            found = {k: v for k, v in aux["metrics"].items() if not k.startswith("probe_")}
            return {"loss": value, **found}

        def observe(state: TrainState, value: jax.Array) -> TrainState:
            return state.replace(opt_state=optim.observe(config.optim, state.opt_state, value))

        self._loss = jax.jit(loss, out_shardings=sharding.replicated(mesh))
        self._observe = jax.jit(observe, donate_argnums=0, out_shardings=shardings(abstract))

    def run(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The state as the schedule leaves it after this, and {'val_loss' and other metrics}."""
        found = []
        for number in range(self._num_batches):
            rows = self.pipeline.host_batch(number)
            rows["labels"] = np.full(self._labels, schema.MISSING, np.int32)
            batch = sharding.put_batch(rows, self._rows)
            found.append(jax.device_get(self._loss(state, batch, np.int32(number))))
        values = {f"val_{name}": float(np.mean([f[name] for f in found])) for name in found[0]}
        return self._observe(state, np.float32(values["val_loss"])), values


def best_state(directory: pathlib.Path, abstract: TrainState) -> TrainState | None:
    """The state that `keep_if_best` kept, or None where there is none."""
    if not (directory / BEST).is_dir():
        return None
    checkpointer = checkpoint.Checkpointer(directory / BEST, keep=1)
    found = checkpointer.restore_latest(abstract)
    checkpointer.close()
    return None if found is None else found[0]
