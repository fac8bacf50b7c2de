"""One stage: restore or start, the loop, and what may go wrong in it.

The order inside the loop is fixed: the batch of step s is a pure function of (seed, s); a step's
metrics are read only when two more steps have been sent, so that the host never stalls the device;
and metrics.jsonl is on disk before the checkpoint that it belongs to.
"""

import collections
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from bigmed import metrics, optim, sharding, tree
from bigmed.checkpoint import Checkpointer
from bigmed.data.pipeline import Pipeline
from bigmed.errors import NonFiniteError, Preempted, UserError
from bigmed.objectives.base import DataSpec
from bigmed.recorder import Recorder
from bigmed.resolve import resolve
from bigmed.state import TrainState, abstract_state, make_init, shardings
from bigmed.step import MicroBatches, first_non_finite, make_train_step
from bigmed.validation import BEST, Best, Validation, best_state

IN_FLIGHT = 2  # steps sent to the device whose outcome the host has not looked at
MAX_SKIPPED = 10  # batches left out under on_non_finite='rollback' before the run stops
ON_NON_FINITE = ("stop", "rollback")


@dataclasses.dataclass
class Stage:
    """A stage made ready: its parts, built from its config before anything is computed."""

    label: str
    config: Any
    directory: pathlib.Path
    mesh: Any
    pipeline: Pipeline
    objective: Any
    total_steps: int
    init: Callable[[], TrainState]
    abstract: TrainState
    tx: Any
    schedule: Any
    micro: MicroBatches
    validation: Best | None

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.directory / "checkpoints"


def build_stage(
    label: str,
    config: Any,
    directory: pathlib.Path,
    mesh: Any,
    look: Callable[[Any, TrainState], Best] | None = None,
) -> Stage:
    """Builds the parts of a stage and checks that they fit together.

    Args:
      label: its name in messages.
      config: of the stage.
      directory: its folder.
      mesh: of `bigmed.sharding.make_mesh`.
      look: (objective, abstract state) -> what is looked at while it trains, in place of the
        validation of the config.

    Raises:
      UserError: anything in the config or the data that cannot work, before a step is run.
    """
    batch_size, micro = config.data.batch_size, MicroBatches(**config.micro_batch)
    sharding.check_batch_size(batch_size, mesh, micro.count)
    if config.on_non_finite not in ON_NON_FINITE:
        raise UserError(
            f"config.on_non_finite='{config.on_non_finite}': valid: {', '.join(ON_NON_FINITE)}"
        )
    for section, key in (("checkpoint", "every"), ("checkpoint", "keep"), ("log", "every")):
        if config[section][key] < 1:
            raise UserError(f"config.{section}.{key}={config[section][key]}: valid: 1 and more")
    objective_class = resolve(config.objective.name, "bigmed.objectives", "Objective")
    block, num_blocks = sharding.host_block(mesh)
    pipeline = Pipeline(
        config.data,
        seed=config.seed,
        batch_size=batch_size,
        block=block,
        num_blocks=num_blocks,
    )
    spec = pipeline.batch_spec()
    valid = objective_class.IMAGES_PER_EXAMPLE
    if spec["image"].shape[1] not in valid:
        raise UserError(
            f"objective '{config.objective.name}' wants {' or '.join(map(str, valid))} "
            f"image(s) a row but config.data.pairs={config.data.pairs!r} gives "
            f"{spec['image'].shape[1]}; valid: None for single images, 'case' for pairs"
        )
    total_steps = stage_steps(config, pipeline.units_per_epoch)
    data = DataSpec(
        class_names=pipeline.class_names,
        task=pipeline.task,
        num_examples=pipeline.units_per_epoch,
        total_steps=total_steps,
        tokeniser=pipeline.tokeniser,
    )
    objective = objective_class(config, data)
    # The optimiser is made from shapes: the parameters themselves do not exist yet.
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0), spec)[0])
    freeze = (*config.optim.freeze, *objective.FROZEN)
    tx, schedule = optim.make_optimizer(
        {**config.optim, "freeze": freeze}, params, batch_size=batch_size, total_steps=total_steps
    )
    init = make_init(objective, tx, spec, config.seed)
    abstract = abstract_state(init, mesh, objective.SHARDING)
    validation = look(objective, abstract) if look else None
    asked_for = config.validate.every or config.validate.sources
    if total_steps and not look and (asked_for or config.validate.keep != "last"):
        validation = Validation(config, objective, pipeline, mesh, abstract)
    elif total_steps and not look and config.optim.schedule == "plateau":
        raise UserError(
            "config.optim.schedule='plateau' follows the validation loss; give "
            "config.validate.sources and .every"
        )
    return Stage(
        label=label,
        config=config,
        directory=directory,
        mesh=mesh,
        pipeline=pipeline,
        objective=objective,
        total_steps=total_steps,
        init=init,
        abstract=abstract,
        tx=tx,
        schedule=schedule,
        micro=micro,
        validation=validation,
    )


def stage_steps(config: Any, units_per_epoch: int) -> int:
    """`config.steps`, or `config.epochs` in whole steps, rounded up.

    Raises:
      UserError: not exactly one of the two is given.
    """
    if (config.steps is None) == (config.epochs is None):
        raise UserError(
            f"config.steps={config.steps} and config.epochs={config.epochs}: give exactly one"
        )
    length = config.epochs if config.steps is None else config.steps
    if length < 0:
        raise UserError(f"config.steps={config.steps}, config.epochs={config.epochs}: 0 or more")
    if config.steps is not None:
        return int(config.steps)
    return int(np.ceil(units_per_epoch * config.epochs / config.data.batch_size))


def restore(stage: Stage) -> TrainState | None:
    """The newest good state of this stage, on this mesh; None where it has not begun.

    Raises:
      UserError: the checkpoint is of another model, data, seed or batch size.
    """
    checkpointer = Checkpointer(stage.checkpoints)
    found = checkpointer.restore_latest(stage.abstract)
    checkpointer.close()
    if found is None:
        return None
    state, meta = found
    for key, value in _identity(stage).items():
        if meta[key] != value:
            raise UserError(
                f"{stage.checkpoints} was made with {key}={meta[key]}, this run has {key}={value}; "
                "use another --workdir"
            )
    return state


def fresh(stage: Stage, weights: Mapping[str, np.ndarray], load: Any, skip: Any) -> TrainState:
    """A new state, with the weights that match the `load` patterns taken from `weights`.

    Raises:
      UserError: the weights do not fit; see `tree.merge`.
    """
    state = jax.jit(stage.init, out_shardings=shardings(stage.abstract))()
    if not load:
        return state
    carried = {"params": state.params, "batch_stats": state.batch_stats}
    merged, _ = tree.merge(carried, weights, load, skip)

    def place(new: Any, old: jax.Array) -> jax.Array:
        if isinstance(new, jax.Array):
            return new
        return jax.make_array_from_callback(old.shape, old.sharding, lambda index: new[index])

    state = state.replace(**jax.tree.map(place, merged, carried))

    def follow(state: TrainState) -> TrainState:
        stats, extra = stage.objective.handed_over(state.params, state.batch_stats, state.extra)
        return state.replace(batch_stats=stats, extra=extra)

    return jax.jit(follow, out_shardings=shardings(stage.abstract))(state)


def run_stage(
    stage: Stage, state: TrainState, stop_requested: Callable[[], bool]
) -> tuple[TrainState, str]:
    """Trains from `state` to the stage's last step.

    Args:
      stage: from `build_stage`.
      state: restored or fresh; its buffers are used up.
      stop_requested: from `sharding.preemption_watch`, asked after every step; True saves and
        stops.

    Returns:
      The state that stands for the stage, and its checkpoint in the stage's folder: the final one,
      'checkpoints/<step>', or with `config.validate.keep='best'` that of the lowest validation
      loss, 'best/<step>'.

    Raises:
      Preempted: stopped on request, after saving.
      NonFiniteError: under `on_non_finite='stop'`, or after too many batches were left out.
    """
    start = int(state.step)
    with Recorder(
        stage.directory,
        stage.label,
        start=start,
        total_steps=stage.total_steps,
        batch_size=stage.config.data.batch_size,
        keep=stage.config.checkpoint.keep,
        identity=_identity(stage),
    ) as recorder:
        recorder.describe(stage.abstract.params)
        ended = stage.validation and stage.validation.exhausted(start, stage.directory)
        if ended or start >= stage.total_steps:
            recorder.save(state, start, True)  # of a stage of no steps; else it is there
        else:
            state = _train(stage, state, recorder, stop_requested)
    best = best_state(stage.directory, stage.abstract)
    if best is not None:
        return best, f"{BEST}/{int(best.step)}"
    return state, f"checkpoints/{int(state.step)}"


def _train(
    stage: Stage, state: TrainState, recorder: Recorder, stop_requested: Callable[[], bool]
) -> TrainState:
    train_step = _compile(stage, state, recorder)
    while True:
        try:
            return _loop(stage, state, train_step, recorder, stop_requested)
        except _BadBatch as bad:
            state = bad.state
            _leave_out_or_stop(stage, state, recorder)


class _BadBatch(Exception):
    """The loop met a batch that the state refused; `state` is the one before it."""

    def __init__(self, state: TrainState):
        super().__init__()
        self.state = state


def _loop(
    stage: Stage,
    state: TrainState,
    train_step: Any,
    recorder: Recorder,
    stop_requested: Callable[[], bool],
) -> TrainState:
    config, start = stage.config, int(state.step)
    in_flight: collections.deque = collections.deque()

    def look_at_oldest() -> None:
        step, outcome = in_flight.popleft()
        if int(outcome["step"]) != step:
            raise _BadBatch(state)
        if step % config.log.every == 0 or step == stage.total_steps:
            recorder.write(step, jax.device_get(outcome["metrics"]))

    for step, batch, control in _batches(stage, start, recorder):
        state, outcome = train_step(state, batch, *control)
        in_flight.append((step + 1, outcome))
        if len(in_flight) > IN_FLIGHT:
            look_at_oldest()
        done, stopping = step + 1, stop_requested()
        last = done == stage.total_steps
        saving = stopping or done % config.checkpoint.every == 0 or last
        validating = stage.validation and stage.validation.due(done, stage.total_steps)
        while in_flight and (saving or validating):
            look_at_oldest()
        if validating:  # before the save, which holds what the schedule made of it
            state = _validate(stage, state, recorder, done)
            last = last or stage.validation.exhausted(done, stage.directory)
        if saving or last:
            recorder.save(state, done, last)
        if last:
            return state
        if stopping:
            raise Preempted(f"{stage.label}: stopped on request; step {done} is saved")
    return state


def _validate(stage: Stage, state: TrainState, recorder: Recorder, step: int) -> TrainState:
    state, values = stage.validation.run(state)
    recorder.write_validation(step, values, stage.validation.NAME)
    stage.validation.keep_if_best(state, values, stage.directory, _identity(stage))
    return state


def _batches(stage: Stage, start: int, recorder: Recorder) -> Iterator[tuple[int, Any, Any]]:
    """(step, global batch, (step, skip) on the devices) from `start` to the last step."""
    rows = sharding.batch_sharding(stage.mesh)
    everywhere = sharding.replicated(stage.mesh)
    skipped = set(_skipped(stage))
    host_batches = stage.pipeline.iterate(start)
    for step in range(start, stage.total_steps):
        asked = time.monotonic()
        batch = sharding.put_batch(next(host_batches), rows)
        control = [
            # Not device_put, which on many hosts compares the values among them first.
            jax.make_array_from_callback((), everywhere, lambda _, value=value: value)
            for value in (np.array(step, np.int32), np.array(step in skipped))
        ]
        recorder.waited(time.monotonic() - asked)
        yield step, batch, control


def _compile(stage: Stage, state: TrainState, recorder: Recorder) -> Any:
    """The stage's step, compiled for exactly the batches it will get."""
    began = time.monotonic()
    train_step = make_train_step(
        stage.objective, stage.tx, stage.schedule, stage.mesh, stage.abstract, stage.micro
    )
    rows, everywhere = sharding.batch_sharding(stage.mesh), sharding.replicated(stage.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=rows)
        for name, spec in stage.pipeline.batch_spec().items()
    }
    scalars = [
        jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (np.int32, np.bool_)
    ]
    compiled = train_step.lower(stage.abstract, batch, *scalars).compile()
    recorder.event("compiled", int(state.step), seconds=time.monotonic() - began)
    return compiled


def _skipped(stage: Stage) -> list[int]:
    """The batches that are left out for good, noted beside the checkpoints."""
    path = stage.directory / "skipped.json"
    return json.loads(path.read_text()) if path.exists() else []


def _leave_out_or_stop(stage: Stage, state: TrainState, recorder: Recorder) -> None:
    """Names the first non-finite tensor; then notes the batch to leave out, or raises."""
    step = int(state.step)
    rows = sharding.batch_sharding(stage.mesh)
    batch = sharding.put_batch(stage.pipeline.host_batch(step), rows)
    name = first_non_finite(stage.objective, state, batch, stage.micro)
    found = f"{stage.label}: batch {step} gives a non-finite '{name}'"
    skipped = _skipped(stage)
    if stage.config.on_non_finite == "rollback" and len(skipped) < MAX_SKIPPED:
        metrics.write_json(stage.directory / "skipped.json", [*skipped, step])
        recorder.event("rolled_back", step, tensor=name)
        recorder.say(f"{found}; its update is undone and the batch left out")
        return
    recorder.save(state, step)
    raise NonFiniteError(
        f"{found}; stopped, and the state before it is saved as step {step}. "
        "Set config.on_non_finite='rollback' to leave such batches out, or start from the saved "
        "state (init_from.checkpoints) in another workdir with a lower rate or clipping"
    )


def _identity(stage: Stage) -> dict[str, Any]:
    """What makes a step number mean the same batch and draw."""
    return {
        "seed": stage.config.seed,
        "batch_size": stage.config.data.batch_size,
        "data": stage.pipeline.fingerprint,
    }
