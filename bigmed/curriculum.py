"""Many stages in order: hand-over of weights, evaluation, results and the report."""

import logging
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from bigmed import augment, handover, lineage, metrics, pictures, sharding, sweep, train
from bigmed.data.card import card
from bigmed.errors import Preempted, UserError, did_you_mean
from bigmed.evaluation import check_held_out, make_evaluator, run_cells
from bigmed.record import Record, check_config, write_config, write_data
from bigmed.report import html, table
from bigmed.stages import prepare_stage

log = logging.getLogger("bigmed")


def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    stop: Callable[[], bool],
    command: Sequence[str] = (),
) -> str:
    """Runs or continues every stage of `config.stages`, for every seed of `config.seeds`.

    Args:
      config: locked; see `configs/common.py`.
      workdir: see the design of the workdir in the README.
      stop: whether the process was asked to stop.
      command: by which the run was started, for its report.

    Returns:
      The table of results, as text.

    Raises:
      UserError: see `bigmed.errors`. Preempted, NonFiniteError: see `bigmed.train`.
    """
    plan, cells = list(_plan(config)), sweep.cells(config)
    mesh = sharding.make_mesh(config.mesh)
    main_process = jax.process_index() == 0
    check_config(config, workdir)
    record = Record(workdir, plan)
    record.write_results()
    if record.finished(cells):
        log.info("%s is finished", workdir)
        if main_process:
            html.write_report(workdir)
        return table.format_table(record.rows)
    with jax.set_mesh(mesh):
        stop = sharding.preemption_watch(stop)
        # Every stage of the first seed is built before any is run: mistakes are found at once, not
        # in the night. The other seeds differ in nothing that could be one.
        ready = {
            entry["directory"]: _make_ready(entry, config, cells, mesh, workdir, record, stop)
            for entry in plan[: len(config.stages)]
        }
        if main_process:
            write_config(config, workdir, command)
            write_data(workdir, _cards(ready.values()))
        for entry in plan:
            if not record.is_done(entry) or record.not_evaluated(entry, cells):
                made = ready.pop(entry["directory"], None)
                stage, evaluators = made or _make_ready(
                    entry, config, cells, mesh, workdir, record, stop
                )
                draws = config.pictures and entry["seed"] == config.seeds[0]
                _run_entry(entry, stage, evaluators, workdir, record, stop, draws)
                if config.sweep.fractions and entry != plan[-1]:  # long: what is known so far
                    log.info("%s", table.format_table(record.rows))
    if main_process:
        html.write_report(workdir)
    return table.format_table(record.rows)


def _plan(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The runs in order: every stage of the first seed, then of the next."""
    for key in ("stages", "seeds"):
        if not config[key]:
            raise UserError(f"config.{key} is empty; give at least one")
    for name in config.stages:
        if name not in config.stage:
            raise UserError(f"config.stages names '{name}': {did_you_mean(name, config.stage)}")
    index = 0
    for seed in config.seeds:
        for name in config.stages:
            suffix = f"_seed{seed}" if len(config.seeds) > 1 else ""
            yield {"name": name, "seed": seed, "directory": f"{index:02d}_{name}{suffix}"}
            index += 1


def _make_ready(
    entry: Mapping[str, Any],
    config: ConfigDict,
    cells: Sequence[sweep.Cell],
    mesh: Any,
    workdir: pathlib.Path,
    record: Record,
    stop: Callable[[], bool],
) -> tuple[train.Stage, list[tuple[sweep.Cell, Any, dict[str, Any]]]]:
    """A stage and its cells that have not run, each with its evaluator; configs and data checked.

    An evaluator comes with what all of its rows say.
    """
    stage_config = prepare_stage(config, entry["name"], entry["seed"], workdir)
    earlier = config.stages[: config.stages.index(entry["name"])]

    def objective_of(name: str) -> str:
        return prepare_stage(config, name, entry["seed"], workdir).objective.name

    handover.check(stage_config.init_from, entry["name"], earlier, objective_of)
    label = entry["directory"]
    stage = train.build_stage(label, stage_config, workdir / label, mesh)
    if not stage_config.init_from.stage and not stage.checkpoints.is_dir():
        handover.check_fit(stage, handover.take(stage, record))
    missing = record.not_evaluated(entry, cells)
    names = dict.fromkeys(cell.evaluator for cell in missing)
    seen = lineage.trace(config, entry["name"], stage, workdir) if names else None
    about = {name: check_held_out(name, config, stage, seen, workdir) for name in names}
    whole = {  # a sweep opens the data sets of an evaluator once
        name: make_evaluator(name, config, stage, workdir, record.hash_key, stop) for name in names
    }
    made = []
    for cell in missing:
        evaluator = whole[cell.evaluator]
        evaluator = evaluator.with_subset(*cell.subset) if cell.subset else evaluator
        made.append((cell, evaluator, about[cell.evaluator]))
    return stage, made


def _run_entry(
    entry: Mapping[str, Any],
    stage: train.Stage,
    evaluators: Sequence[tuple[sweep.Cell, Any, Mapping[str, Any]]],
    workdir: pathlib.Path,
    record: Record,
    stop: Callable[[], bool],
    draws: bool,
) -> None:
    """Trains or continues a stage, evaluates it, then draws its pictures if asked to."""
    state = train.restore(stage)
    if state is None:
        given = handover.take(stage, record)
        for line in given.left_over:
            log.info("%s: %s", stage.label, line)
        state = train.fresh(stage, given.weights, given.load, given.skip)
        record.update(entry, state="running", init_from=given.told)
    record.update(entry, encoder=_describe_encoder(stage.config), saw=lineage.own_splits(stage))
    log.info(
        "%s: %s parameters, %s, steps %d to %d",
        stage.label,
        f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}",
        stage.pipeline.describe(),
        int(state.step),
        stage.total_steps,
    )
    state, weights = train.run_stage(stage, state, stop)
    record.update(entry, state="done", steps=stage.total_steps, weights=weights)
    _evaluate(entry, stage, evaluators, state, f"{stage.label}/{weights}", record, stop)
    if draws:
        last = {cell.evaluator: evaluator for cell, evaluator, _ in evaluators}  # the most labels
        pictures.draw(stage, list(last.values()), state, workdir)


def _evaluate(
    entry: Mapping[str, Any],
    stage: train.Stage,
    evaluators: Sequence[tuple[sweep.Cell, Any, Mapping[str, Any]]],
    state: Any,
    checkpoint: str,
    record: Record,
    stop: Callable[[], bool],
) -> None:
    """Runs the cells of a stage, and keeps their rows one by one."""
    if not evaluators:
        return
    progress = None
    if jax.process_index() == 0:
        progress = metrics.Progress(f"{stage.label}: evaluations", len(evaluators))
    results = run_cells(evaluators, state, checkpoint, stage.mesh)
    try:
        for number, (waiting, *_) in enumerate(evaluators, start=1):
            if stop():
                raise Preempted(
                    f"{stage.label}: stopped on request before '{waiting.name}'; it is trained"
                )
            cell, rows = next(results)
            record.add_rows(entry, cell, rows)
            if progress is not None:
                progress.update(number, " ".join([cell.name, *map(table.describe_row, rows[:1])]))
    finally:
        results.close()
        record.write_results()
    if progress is not None:
        progress.close()


def _cards(
    made: Iterable[tuple[train.Stage, Sequence[tuple[sweep.Cell, Any, Any]]]],
) -> Iterator[dict[str, Any]]:
    """What the data sets of stages and evaluators hold."""
    for stage, evaluators in made:
        validated = stage.validation.pipeline.sources if stage.validation else ()
        if stage.total_steps:
            name = stage.config.objective.name
            yield from (card(source, f"pretraining ({name})") for source in stage.pipeline.sources)
            yield from (card(source, "validation of pretraining") for source in validated)
        for name, evaluator in {cell.evaluator: e for cell, e, _ in evaluators}.items():
            for use, source in evaluator.sources().items():
                yield card(source, f"{name}: {use}")


def _describe_encoder(config: ConfigDict) -> dict[str, Any]:
    """What a stage's weights are worth nothing without; for those who export them."""
    settings = augment.from_config(config.augment)
    return {
        "model": {key: value for key, value in config.model.items() if value is not None},
        **{key: getattr(settings, key) for key in augment.PREPROCESSING},
        "channels": config.data.channels,
        "canvas": config.data.canvas,
        "objective": config.objective.name,
        "batch_size": config.data.batch_size,
        "sources": sorted(config.data.sources),
    }
