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


class Validation:
    """Evaluates the loss on the same batches with the same draws every time.

    All units of the held-out data are visited, in batches as large as the training's, because a
    contrastive loss depends on the batch size; the first units once more fill up the last batch.

    Config (`config.validate`): `sources`, names of `config.data.source`; `every` so many steps;
    `keep`, whether the stage's weights are the 'last' or the 'best', of the lowest loss.

    Raises:
      UserError: an invalid value, fewer units than a batch, or patients shared with the training
        data.
    """

    def __init__(self, config: Any, objective: Any, training: Pipeline, mesh: Any, abstract: Any):
        settings = config.validate
        if settings.keep not in KEEP:
            raise UserError(f"config.validate.keep='{settings.keep}': valid: {', '.join(KEEP)}")
        if not settings.sources or settings.every < 1:
            raise UserError(
                f"config.validate.every={settings.every} and .sources={tuple(settings.sources)}: "
                "give both, a number of steps and names of config.data.source"
            )
        self.every, self._keep = settings.every, settings.keep
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

    def due(self, step: int, total_steps: int) -> bool:
        return step % self.every == 0 or step == total_steps

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

    def keep_if_best(
        self, state: TrainState, value: float, directory: pathlib.Path, identity: Mapping[str, Any]
    ) -> None:
        """Saves the state in `directory`/best if its loss is lower than that of the one there."""
        if self._keep != "best" or not np.isfinite(value):
            return
        checkpointer = checkpoint.Checkpointer(directory / BEST, keep=1)
        steps, step = checkpointer.steps(), int(state.step)
        # The step is there where a resumed run comes by it again.
        lower = step not in steps and value < _loss_of(directory / BEST, steps)
        if sharding.everywhere(lower):
            checkpointer.save(step, state, {**identity, "val_loss": value})
        checkpointer.close()


def _loss_of(folder: pathlib.Path, steps: Sequence[int]) -> float:
    """The validation loss of the last of the kept steps; infinite where none can be read."""
    try:
        return checkpoint.read_meta(folder / str(steps[-1]))["val_loss"] if steps else math.inf
    except checkpoint.TornCheckpoint:
        return math.inf


def best_state(directory: pathlib.Path, abstract: TrainState) -> TrainState | None:
    """The state that `keep_if_best` kept, or None where there is none."""
    if not (directory / BEST).is_dir():
        return None
    checkpointer = checkpoint.Checkpointer(directory / BEST, keep=1)
    found = checkpointer.restore_latest(abstract)
    checkpointer.close()
    return None if found is None else found[0]
