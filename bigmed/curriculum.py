"""Many stages in order: hand-over of weights, evaluation, results and the report."""

import json
import logging
import pathlib
import platform
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from bigmed import __version__, checkpoint, metrics, sharding, train, tree
from bigmed.data import phantom, sources
from bigmed.errors import UserError, did_you_mean
from bigmed.report import html, table
from bigmed.resolve import resolve

log = logging.getLogger("bigmed")

# What may change between two runs in one workdir, because no result depends on it.
FREE_KEYS = (
    "checkpoint/.*",
    "log/.*",
    "mesh/.*",
    "data_root",
    ".*data/(workers|threads|prefetch)",
    "evaluate.*",
    "evaluator/.*",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
NOT_PER_STAGE = (
    "stages", "stage", "seeds", "evaluate", "evaluator", "phantom", "mesh", "data_root"
)  # fmt: skip


def run(config: ConfigDict, workdir: pathlib.Path, stop: Callable[[], bool]) -> str:
    """Runs or continues every stage of `config.stages`, for every seed of `config.seeds`.

    Args:
      config: locked; see `configs/common.py`.
      workdir: see the design of the workdir in the README.
      stop: whether the process was asked to stop.

    Returns:
      The table of results, as text.

    Raises:
      UserError: see `bigmed.errors`. Preempted, NonFiniteError: see `bigmed.train`.
    """
    plan = list(_plan(config))
    mesh = sharding.make_mesh(config.mesh)
    main_process = jax.process_index() == 0
    if main_process:
        _write_config(config, workdir)
    record = _Record(workdir, plan)
    if record.finished(config.evaluate):
        log.info("%s is finished", workdir)
        return table.format_table(record.rows)
    with jax.set_mesh(mesh):
        # Every stage of the first seed is built before any is run: mistakes are found at once, not
        # in the night. The other seeds differ in nothing that could be one.
        ready = {
            entry["directory"]: _make_ready(entry, config, mesh, workdir, record)
            for entry in plan[: len(config.stages)]
        }
        for entry in plan:
            stage, evaluators = ready.pop(entry["directory"], None) or _make_ready(
                entry, config, mesh, workdir, record
            )
            if not record.is_done(entry) or evaluators:
                _run_entry(entry, stage, evaluators, workdir, record, stop)
    if main_process:
        html.write_report(workdir)
    return table.format_table(record.rows)


def _plan(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The runs in order: every stage of the first seed, then of the next."""
    if not config.stages:
        raise UserError("config.stages is empty; name at least one stage of config.stage")
    for name in config.stages:
        if name not in config.stage:
            raise UserError(f"config.stages names '{name}': {did_you_mean(name, config.stage)}")
    index = 0
    for seed in config.seeds:
        for name in config.stages:
            suffix = f"_seed{seed}" if len(config.seeds) > 1 else ""
            yield {"name": name, "seed": seed, "directory": f"{index:02d}_{name}{suffix}"}
            index += 1


def prepare_stage(
    config: ConfigDict, name: str, seed: int, workdir: pathlib.Path
) -> ConfigDict:
    """The base config with the overrides of one stage, its folders filled in and its data there.

    Raises:
      UserError: no such stage, an override of an unknown key, or an unset `config.data_root`.
    """
    if name not in config.stage:
        raise UserError(f"no stage '{name}': {did_you_mean(name, config.stage)}")
    if config.get("phantom"):
        phantom.prepare(workdir / "data" / "phantom", **config.phantom)
    whole = config.copy_and_resolve_references()  # stages must not see one another's overrides
    base = ConfigDict({k: v for k, v in whole.items() if k not in NOT_PER_STAGE})
    base.seed = seed
    _override(base, config.stage[name], f"config.stage.{name}")
    return _fill_places(base, config.data_root, workdir)


def _override(base: ConfigDict, changes: Mapping[str, Any], where: str) -> None:
    """Overrides known keys in place; a section that names another component replaces the old one.

    The entries of `source` are data sets by name: each is replaced whole, and may be a new one.
    """
    free = where.endswith(".source")
    for key, value in changes.items():
        if key not in base and not free:
            raise UserError(f"{where}.{key} is no key of the config; {did_you_mean(key, base)}")
        old = base.get(key)
        section = not free and isinstance(value, ConfigDict) and isinstance(old, ConfigDict)
        if section and value.get("name", old.get("name")) == old.get("name"):
            _override(old, value, f"{where}.{key}")
        else:
            with base.ignore_type():
                base[key] = value


def _fill_places(config: Any, data_root: str, workdir: pathlib.Path) -> Any:
    """A copy with '{workdir}' and '{data_root}' filled in wherever a string names them."""

    def fill(value: Any) -> Any:
        if isinstance(value, ConfigDict):
            return ConfigDict({key: fill(item) for key, item in value.items()})
        if isinstance(value, (tuple, list)):
            return type(value)(fill(item) for item in value)
        if not isinstance(value, str):
            return value
        if "{data_root}" in value and not data_root:
            raise UserError(f"'{value}' needs --config.data_root=FOLDER, where the data sets lie")
        return value.replace("{workdir}", str(workdir)).replace("{data_root}", data_root)

    return fill(config).lock()


def _make_ready(
    entry: Mapping[str, Any],
    config: ConfigDict,
    mesh: Any,
    workdir: pathlib.Path,
    record: "_Record",
) -> tuple[train.Stage, dict[str, Any]]:
    """A stage and those of its evaluators that have not run, their configs and data checked."""
    stage_config = prepare_stage(config, entry["name"], entry["seed"], workdir)
    source = stage_config.init_from
    earlier = config.stages[: config.stages.index(entry["name"])]
    if source.stage and source.stage not in earlier:
        raise UserError(
            f"config.stage.{entry['name']}.init_from.stage='{source.stage}' is no earlier stage; "
            f"{did_you_mean(source.stage, earlier)}"
        )
    if source.load and not (source.stage or source.checkpoints):
        raise UserError(
            f"config.stage.{entry['name']}.init_from.checkpoints is empty; give the checkpoints "
            "folder of a stage of another run (or init_from.stage, an earlier stage of this one)"
        )
    if source.checkpoints and not pathlib.Path(source.checkpoints).is_dir():
        raise UserError(f"init_from.checkpoints: no folder {source.checkpoints}")
    label = entry["directory"]
    stage = train.build_stage(label, stage_config, workdir / label, mesh)
    missing = [name for name in config.evaluate if name not in record.evaluated(entry)]
    return stage, {
        name: _evaluator(name, config, stage, workdir, record.hash_key) for name in missing
    }


def _run_entry(
    entry: Mapping[str, Any],
    stage: train.Stage,
    evaluators: Mapping[str, Any],
    workdir: pathlib.Path,
    record: "_Record",
    stop: Callable[[], bool],
) -> None:
    """Trains or continues a stage, then evaluates it."""
    state = train.restore(stage)
    if state is None:
        weights, load, skip, lineage = _handed_over(stage, record, workdir)
        state = train.fresh(stage, weights, load, skip)
        record.update(entry, state="running", init_from=lineage)
    log.info(
        "%s: %s parameters, %s, steps %d to %d",
        stage.label,
        f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}",
        stage.pipeline.describe(),
        int(state.step),
        stage.total_steps,
    )
    state = train.run_stage(stage, state, train.preemption_watch(stop))
    record.update(entry, state="done", steps=int(state.step))
    for name, evaluator in evaluators.items():
        rows = evaluator.run(state, checkpoint=f"{stage.label}/{int(state.step)}")
        common = {"stage": entry["name"], "evaluator": name, "seed": entry["seed"]}
        record.add_rows(entry, name, [{**common, **row} for row in rows])
        log.info("%s: evaluated with %s", stage.label, name)


def _handed_over(
    stage: train.Stage, record: "_Record", workdir: pathlib.Path
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], dict[str, Any] | None]:
    """(weights, load patterns, skip patterns, lineage) of a stage's `init_from`.

    Without patterns, what the objective calls worth carrying is taken.
    """
    source = stage.config.init_from
    if not (source.stage or source.checkpoints):
        return {}, (), (), None
    if source.checkpoints:
        folder = pathlib.Path(source.checkpoints)
    else:
        folder = workdir / record.directory_of(source.stage, stage.config.seed) / "checkpoints"
    weights, meta = checkpoint.load_flat(folder, ("(params|batch_stats)/.*",))
    here = tree.flatten(
        {"params": stage.abstract.params, "batch_stats": stage.abstract.batch_stats}
    )
    load = tuple(source.load) or tuple(
        pattern
        for pattern in stage.objective.TRANSFER
        if any(tree.matches((pattern,), name) for name in here)
    )
    lineage = {
        "checkpoint": f"{folder.parent.name}/{meta['step']}",
        "load": list(load),
        "skip": list(source.skip),
    }
    return weights, load, tuple(source.skip), lineage


def _evaluator(
    name: str, config: ConfigDict, stage: train.Stage, workdir: pathlib.Path, hash_key: bytes
) -> Any:
    """One evaluator of a stage, its data checked: no test patient may be among those trained on."""
    if name not in config.evaluator:
        raise UserError(f"config.evaluate names '{name}': {did_you_mean(name, config.evaluator)}")
    settings = dict(_fill_places(config.evaluator[name], config.data_root, workdir))
    evaluator_class = resolve(settings.pop("name", name), "bigmed.evaluators", "Evaluator")
    representation = settings.pop("representation", "encoder")
    predict_fns = stage.objective.predict_fns()
    if representation not in predict_fns:
        raise UserError(
            f"config.evaluator.{name}.representation='{representation}': "
            f"{did_you_mean(representation, predict_fns)}"
        )
    if stage.total_steps and "test" in settings:
        for source in stage.pipeline.sources:
            sources.check_disjoint(source, sources.open_source(settings["test"]))
    try:
        return evaluator_class(
            predict_fns[representation],
            stage.mesh,
            canvas=stage.config.data.canvas,
            channels=stage.config.data.channels,
            preprocessing={"representation": representation, **stage.objective.preprocessing()},
            cache_dir=workdir / "features",
            predictions_dir=workdir / "predictions",
            hash_key=hash_key,
            **settings,
        )
    except TypeError as error:  # a key that the evaluator does not have
        raise UserError(f"config.evaluator.{name}: {error}") from error


class _Record:
    """`curriculum.json` and `results.json`: what is done, and what came of it."""

    def __init__(self, workdir: pathlib.Path, plan: list[dict[str, Any]]):
        self._path, self._results = workdir / "curriculum.json", workdir / "results.json"
        self._stages = {entry["directory"]: {**entry, "state": "pending"} for entry in plan}
        if self._path.exists():
            known = json.loads(self._path.read_text(encoding="utf-8"))["stages"]
            for stage in known:
                self._stages[stage["directory"]].update(stage)
        self.rows = json.loads(self._results.read_text()) if self._results.exists() else []
        self.hash_key = _secret(workdir / ".hash_key")

    def directory_of(self, name: str, seed: int) -> str:
        """The folder of a stage, which `_make_ready` has seen to exist."""
        return next(
            directory
            for directory, stage in self._stages.items()
            if (stage["name"], stage["seed"]) == (name, seed)
        )

    def is_done(self, entry: Mapping[str, Any]) -> bool:
        return self._stages[entry["directory"]]["state"] == "done"

    def evaluated(self, entry: Mapping[str, Any]) -> list[str]:
        return self._stages[entry["directory"]].get("evaluated", [])

    def finished(self, evaluators: tuple[str, ...]) -> bool:
        return all(
            stage["state"] == "done" and set(evaluators) <= set(stage.get("evaluated", []))
            for stage in self._stages.values()
        )

    def update(self, entry: Mapping[str, Any], **values: Any) -> None:
        self._stages[entry["directory"]].update(values)
        if jax.process_index() == 0:
            metrics.write_json(self._path, {"stages": list(self._stages.values())})

    def add_rows(self, entry: Mapping[str, Any], name: str, rows: list[dict[str, Any]]) -> None:
        """Adds an evaluator's rows, in place of any that a killed run left behind."""
        key = {"stage": entry["name"], "seed": entry["seed"], "evaluator": name}
        kept = [row for row in self.rows if any(row[k] != v for k, v in key.items())]
        self.rows = kept + [{k: metrics.json_safe(v) for k, v in row.items()} for row in rows]
        if jax.process_index() == 0:
            metrics.write_json(self._results, self.rows)
        self.update(entry, evaluated=[*self.evaluated(entry), name])


def _secret(path: pathlib.Path) -> bytes:
    """The workdir's own key for hashing identifiers; made once, readable by its owner alone."""
    if jax.process_index() == 0 and not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    return bytes.fromhex(path.read_text()) if path.exists() else b""


def _write_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, or checks it against the run that is being continued.

    Raises:
      UserError: a setting that results depend on has changed.
    """
    path = workdir / "config.json"
    wanted = json.loads(config.to_json_best_effort())
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["config"]
        old, new = tree.flatten(before), tree.flatten(wanted)
        changed = [
            f"config.{name.replace('/', '.')} was {old.get(name)!r} and is {new.get(name)!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and not tree.matches(FREE_KEYS, name)
        ]
        if changed:
            raise UserError(
                f"{workdir} holds a run with another config: {'; '.join(changed[:4])}; "
                "use another --workdir"
            )
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions |= {"bigmed": __version__, "python": platform.python_version()}
    metrics.write_json(
        path, {"config": wanted, "versions": versions, "git_commit": _git_commit()}
    )


def _git_commit() -> str | None:
    """The commit of the checkout that this code lies in, '+' for uncommitted changes."""
    here = pathlib.Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
