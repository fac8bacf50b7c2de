"""What a workdir says of its run: config.json, curriculum.json, results.json."""

import itertools
import json
import os
import pathlib
import platform
import secrets
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from bigmed import __version__, metrics, tree
from bigmed.data.card import joined
from bigmed.errors import UserError
from bigmed.sweep import Cell

# What may change between two runs in one workdir, because no result depends on it.
FREE_KEYS = (
    "checkpoint/.*",
    "log/.*",
    "(.*/)?on_non_finite",
    "mesh/.*",
    "data_root",
    ".*data/(workers|threads|prefetch)",
    "evaluate.*",
    "evaluator/.*",
    "sweep/.*",
    "pictures",
)
# What keys, by pattern, stand for in a run that is older than they are.
INTRODUCED = {
    "micro_batch/count": 1,
    "micro_batch/batch_norm": "micro",
    "optim/nesterov": True,
    "optim/decay": 0.1,
    "optim/layer_decay": 1.0,
    "optim/patience": 5,
    "validate/keep": "last",
    "validate/patience": 0,
    "(stage/[^/]+/)?init_from/network": "student",
}
OF_TEXTS = ("text_model/.*", "data/text/(?!tokeniser).*")  # without a tokeniser they do nothing
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Record:
    """`curriculum.json` and `results.json`: what is done, and what came of it."""

    def __init__(self, workdir: pathlib.Path, plan: list[dict[str, Any]]):
        self._path, self._results = workdir / "curriculum.json", workdir / "results.json"
        self._stages = {entry["directory"]: {**entry, "state": "pending"} for entry in plan}
        if self._path.exists():
            known = json.loads(self._path.read_text(encoding="utf-8"))["stages"]
            for stage in known:
                self._stages[stage["directory"]].update(stage)
        self._rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}  # by cell
        for row in json.loads(self._results.read_text()) if self._results.exists() else []:
            self._rows.setdefault(_cell_of(row), []).append(row)
        self._journal = workdir / "results.new.jsonl"
        for line in metrics.read_jsonl(self._journal):  # of a run that was killed
            self._put(line["origin"], line["rows"])
        self.hash_key = _secret(workdir / ".hash_key")

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """Those of every cell that has run, as they stand in results.json."""
        return list(itertools.chain.from_iterable(self._rows.values()))

    def weights_of(self, name: str, seed: int) -> pathlib.Path:
        """The checkpoint of an earlier stage, `<directory>/<folder>/<step>`, by its name."""
        stage = next(s for s in self._stages.values() if (s["name"], s["seed"]) == (name, seed))
        weights = stage.get("weights", f"checkpoints/{stage.get('steps')}")  # before it was noted
        return self._path.parent / stage["directory"] / weights

    def is_done(self, entry: Mapping[str, Any]) -> bool:
        """Whether a stage is trained and the checkpoint that stands for it is there."""
        stage = self._stages[entry["directory"]]
        if stage["state"] != "done":
            return False
        return self.weights_of(stage["name"], stage["seed"]).is_dir()

    def not_evaluated(self, entry: Mapping[str, Any], cells: Sequence[Cell]) -> list[Cell]:
        """The cells that have not run on a stage, or ran with other settings."""
        done = self._evaluated(entry)
        return [cell for cell in cells if done.get(cell.name) != cell.digest()]

    def _evaluated(self, entry: Mapping[str, Any]) -> dict[str, str]:
        """The cells that have run on a stage, and the digests of their settings."""
        return self._stages[entry["directory"]].get("evaluated", {})

    def finished(self, cells: Sequence[Cell]) -> bool:
        return all(
            self.is_done(stage) and not self.not_evaluated(stage, cells)
            for stage in self._stages.values()
        )

    def update(self, entry: Mapping[str, Any], **values: Any) -> None:
        self._stages[entry["directory"]].update(values)
        if jax.process_index() == 0:
            metrics.write_json(self._path, {"stages": list(self._stages.values())})

    def add_rows(
        self, entry: Mapping[str, Any], cell: Cell, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Adds a cell's rows, in place of those of other settings or of a killed run.

        They are on disk then, in a file that only grows: a sweep has thousands of cells, and
        results.json, which has them all, is written by `write_results`.
        """
        origin = {"stage": entry["name"], "seed": entry["seed"]}
        origin |= {"evaluator": cell.evaluator, "cell": cell.name, "settings": cell.protocol()}
        new = [{k: metrics.json_safe(v) for k, v in {**origin, **row}.items()} for row in rows]
        self._put(origin, new)
        if jax.process_index() == 0:
            with self._journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"origin": origin, "rows": new}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.update(entry, evaluated={**self._evaluated(entry), cell.name: cell.digest()})

    def _put(self, origin: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows.pop(_cell_of(origin), None)  # new ones come last
        if rows:
            self._rows[_cell_of(origin)] = list(rows)

    def write_results(self) -> None:
        """Writes results.json, if there is anything new."""
        if jax.process_index() == 0 and self._journal.exists():
            metrics.write_json(self._results, self.rows)
            self._journal.unlink()


def _cell_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What ran on what; rows that are older than sweeps name the evaluator alone."""
    return row["stage"], row["seed"], row.get("cell", row["evaluator"])


def _secret(path: pathlib.Path) -> bytes:
    """The workdir's own key for hashing identifiers; made once, readable by its owner alone."""
    if jax.process_index() == 0 and not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_hex(32))
        temporary.rename(path)
    return bytes.fromhex(path.read_text()) if path.exists() else b""


def check_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checks the config against that of the run that is being continued.

    Raises:
      UserError: a setting that results depend on has changed.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["config"]
    new = tree.flatten(json.loads(config.to_json_best_effort()))
    since = {name: new[name] for name in new if tree.matches(OF_TEXTS, name)}
    for pattern, value in INTRODUCED.items():
        since |= {name: value for name in new if tree.matches((pattern,), name)}
    old = {**since, **tree.flatten(before)}
    changed = [
        f"config.{name.replace('/', '.')} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if (old.get(name) or None) != (new.get(name) or None)  # new keys begin empty
        and not tree.matches(FREE_KEYS, name)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config: {'; '.join(changed[:4])}; "
            "use another --workdir"
        )


def write_config(config: ConfigDict, workdir: pathlib.Path, command: Sequence[str] = ()) -> None:
    """Writes config.json: the config, the command, and the versions and commit that run it now."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions |= {"bigmed": __version__, "python": platform.python_version()}
    metrics.write_json(
        workdir / "config.json",
        {
            "config": json.loads(config.to_json_best_effort()),
            "versions": versions,
            "git_commit": _git_commit(),
            "command": list(command),
        },
    )


def write_data(workdir: pathlib.Path, cards: Iterable[Mapping[str, Any]]) -> None:
    """Adds what the data sets hold (`data.card`) to data.json."""
    path = workdir / "data.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    metrics.write_json(path, joined(known, cards))


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
