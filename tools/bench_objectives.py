"""Times an objective's train step beside its encoders' passes alone; memory in micro-batches.

    python tools/bench_objectives.py --objectives=c2l,moco,byol,simclr --size=64 --batch=32
    python tools/bench_objectives.py --objectives=simclr --batch=256 --micro=1,4,16 --steps=0

Passes are `embed` and its gradient on views that are made already: what the networks cost, however
an objective goes about the rest. The step is the whole of it: augmentation, heads, loss, optimiser,
teacher, queue. They take turns, so that a change of the machine's load meets all. Memory is the
temporary memory of the compiled step on one device.
"""

import importlib
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from bigmed.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts its threads
sys.path.append(str(pathlib.Path(__file__).parents[1]))  # for the configs

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import timing  # noqa: E402  # beside this file

from bigmed import optim, sharding  # noqa: E402
from bigmed.errors import UserError  # noqa: E402
from bigmed.objectives.base import DataSpec  # noqa: E402
from bigmed.resolve import resolve  # noqa: E402
from bigmed.state import abstract_state, make_init  # noqa: E402
from bigmed.step import MicroBatches, make_train_step  # noqa: E402
from configs import common  # noqa: E402

OBJECTIVES = flags.DEFINE_list("objectives", ["c2l", "moco", "byol", "simclr"], "names of configs")
DEPTH = flags.DEFINE_integer("depth", 18, "of the ResNet")
SIZE = flags.DEFINE_integer("size", 64, "of the views")
BATCH = flags.DEFINE_integer("batch", 32, "images a step")
MICRO = flags.DEFINE_list("micro", ["1"], "numbers of micro-batches to compile the step for")
STEPS = flags.DEFINE_integer("steps", 7, "timed steps of each, after two; 0 for memory alone")


class Timed:
    """An objective on one device, on random images: its step, its passes, its views."""

    def __init__(self, name: str):
        config = importlib.import_module(f"configs.{name}").get_config()
        config.model = common.resnet(DEPTH.value)
        config.augment.size = SIZE.value
        config.data.batch_size = BATCH.value
        rng, shape = np.random.default_rng(0), (BATCH.value, 1, SIZE.value, SIZE.value, 3)
        self._batch = {
            "image": rng.integers(0, 256, shape, dtype=np.uint8),
            "box": np.tile(np.int32([0, 0, SIZE.value, SIZE.value]), (BATCH.value, 1, 1)),
            "labels": np.zeros((BATCH.value, 0), np.int32),
            "patient": np.arange(BATCH.value, dtype=np.int32),
            "index": np.arange(BATCH.value, dtype=np.int32),
        }
        self._mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        objective_class = resolve(config.objective.name, "bigmed.objectives", "Objective")
        self._objective = objective_class(config, DataSpec(num_examples=10_000, total_steps=1000))
        params = jax.eval_shape(
            lambda: self._objective.init(jax.random.key(0), self._batch)[0]
        )  # fmt: skip
        self._tx, self._schedule = optim.make_optimizer(
            {**config.optim, "warmup_steps": 0}, params,
            batch_size=BATCH.value, total_steps=1000,
        )  # fmt: skip
        self._init = make_init(self._objective, self._tx, self._batch, 0)

    def compile(self, micro: int) -> Any:
        """The train step in so many micro-batches."""
        abstract = abstract_state(self._init, self._mesh, self._objective.SHARDING)
        step = make_train_step(
            self._objective, self._tx, self._schedule, self._mesh, abstract, MicroBatches(micro)
        )
        return step.lower(abstract, self._batch, np.int32(0), np.bool_(False)).compile()

    def runs(self) -> dict[str, Callable[[], None]]:
        """What to time."""
        objective, batch, key = self._objective, self._batch, jax.random.key(0)
        step, state = self.compile(1), jax.jit(self._init)()
        fixed = jax.tree.map(jnp.copy, state)  # the step is given the state's buffers
        prepare = jax.jit(lambda batch: objective.prepare(batch, key, True))
        views, number = prepare(batch), 0

        @jax.jit
        def passes(state: Any, views: jax.Array) -> Any:
            def total(params: Any) -> Any:
                outputs, stats = objective.embed(
                    params, state.batch_stats, state.extra, views, key, True
                )
                return sum(map(jnp.sum, jax.tree.leaves(outputs))), stats

            return jax.value_and_grad(total, has_aux=True)(state.params)

        def run_step() -> None:
            nonlocal state, number
            state, found = step(state, batch, np.int32(number), np.bool_(False))
            number += 1
            assert int(found["step"]) == number, "the loss is not finite"

        return {
            "step": run_step,
            "passes": lambda: jax.block_until_ready(passes(fixed, views)),
            "augmentation": lambda: jax.block_until_ready(prepare(batch)),
        }


def main(argv: list[str]) -> None:
    """Prints a line for each objective and measure."""
    del argv
    device = timing.device_name(jax.devices()[0])
    print(
        f"ResNet-{DEPTH.value}, {SIZE.value} px, batch {BATCH.value}, float32, jax "
        f"{jax.__version__} on {device}; medians of {STEPS.value} steps, in turns"
    )
    for name in OBJECTIVES.value:
        timed = Timed(name)
        if STEPS.value:
            seconds = timing.time_in_turns(timed.runs(), STEPS.value)
            median = {key: statistics.median(values) for key, values in seconds.items()}
            fastest = {key: min(values) for key, values in seconds.items()}
            shown = ", ".join(f"{key} {value * 1e3:.0f} ms" for key, value in median.items())
            ratio = f"{median['step'] / median['passes']:.2f} (medians), "
            ratio += f"{fastest['step'] / fastest['passes']:.2f} (fastest)"
            print(f"{name}: {shown}; step / passes {ratio}", flush=True)
        for micro in map(int, MICRO.value):
            mib = timed.compile(micro).memory_analysis().temp_size_in_bytes / 2**20
            print(f"{name}: {mib:.0f} MiB in {micro} micro-batches", flush=True)


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
