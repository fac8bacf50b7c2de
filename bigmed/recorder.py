"""Everything that a stage writes while it trains: checkpoints, metrics, timing, progress."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from bigmed import metrics
from bigmed.checkpoint import Checkpointer
from bigmed.state import TrainState

COLLAPSE_STD, COLLAPSE_RANK = 0.1, 1.5  # of the embeddings; healthy runs are far above


class Recorder:
    """Everything that a stage writes while it trains: checkpoints, metrics, timing, progress."""

    def __init__(
        self,
        directory: pathlib.Path,
        label: str,
        *,
        start: int,
        total_steps: int,
        batch_size: int,
        keep: int,
        identity: Mapping[str, Any],
    ):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._label = directory, label
        self._total_steps, self._batch_size = total_steps, batch_size
        self._identity = identity
        self._main = jax.process_index() == 0
        self._checkpointer = Checkpointer(directory / "checkpoints", keep=keep)
        self._alarmed = False
        self._stopwatch = metrics.Stopwatch(start)
        if self._main:
            self._metrics = metrics.JsonlWriter(directory / "metrics.jsonl", resume_step=start)
            self._timing = metrics.JsonlWriter(directory / "timing.jsonl")
            self._tensorboard = metrics.TensorBoard(directory / "tensorboard", start + 1)
            self._progress = metrics.Progress(label, total_steps, start)
        self.event("restarted" if start else "started", start, devices=jax.device_count())

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpointer.close()
        if self._main:
            for writer in (self._metrics, self._timing, self._tensorboard, self._progress):
                writer.close()

    def describe(self, params: Any) -> None:
        """Writes the table of parameters, with shapes and shardings, to parameters.txt."""
        if self._main:
            overview = parameter_overview.get_parameter_overview(params, include_stats="sharding")
            (self._directory / "parameters.txt").write_text(overview + "\n", encoding="utf-8")

    def event(self, name: str, step: int, **values: Any) -> None:
        """A line of timing.jsonl that is not a reading; the clock starts anew after it."""
        if self._main:
            self._timing.write(step, {"event": name, **values})
        self._stopwatch = metrics.Stopwatch(step)

    def say(self, line: str) -> None:
        if self._main:
            self._progress.say(line)

    def waited(self, seconds: float) -> None:
        self._stopwatch.waited(seconds)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The metrics of one step, and the timing since the last one."""
        if not self._main:
            return
        self._metrics.write(step, values)
        timing = self._stopwatch.read(step, self._batch_size, self._total_steps)
        memory = _peak_memory()
        self._timing.write(step, {**timing, **memory})
        self._tensorboard.write(step, {**values, **{f"timing/{k}": v for k, v in timing.items()}})
        self._progress.update(
            step,
            f"loss {float(values['loss']):.4f}, {timing['images_per_second']:.1f} images/s, "
            f"{timing['step_seconds']:.3f} s/step, data wait {timing['data_wait_fraction']:.1%}, "
            f"{metrics.duration(timing['eta_seconds'])} to go",
        )
        self._warn_of_collapse(step, values)

    def write_validation(self, step: int, values: Mapping[str, Any], name: str) -> None:
        """A line of its own in metrics.jsonl; the clock of the training starts anew after it."""
        self._stopwatch = metrics.Stopwatch(step)
        if not self._main:
            return
        self._metrics.write(step, values)
        self._tensorboard.write(step, values)
        self.say(f"{self._label}: step {step}, {name} {values[name]:.4f}")

    def save(self, state: TrainState, step: int, last: bool = False) -> None:
        """The metrics so far, then the state; returns when the state before this one is safe.

        Returns when the state itself is safe where it is the `last` one.
        """
        if self._main:
            self._metrics.sync()
        if step in self._checkpointer.steps():  # a stop right after a periodic save
            return
        self._checkpointer.save(step, state, self._identity)
        if last or step == 0:
            self._checkpointer.wait()

    def _warn_of_collapse(self, step: int, values: Mapping[str, Any]) -> None:
        std, rank = values.get("feature_std", 1.0), values.get("effective_rank", np.inf)
        collapsed = std < COLLAPSE_STD or rank < COLLAPSE_RANK
        if collapsed and not self._alarmed:
            self.say(
                f"{self._label}: step {step}: the embeddings are collapsing (feature_std "
                f"{float(std):.3f}, effective_rank {float(rank):.1f})"
            )
        self._alarmed = collapsed


def _peak_memory() -> dict[str, float]:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"device_peak_gib": peak / 2**30}
