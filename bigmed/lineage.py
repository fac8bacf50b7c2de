"""What weights have seen of patients: the data of their stage, and of all stages before it.

The stages before it are those of `init_from`, in this run or in others, whose data sets are opened
again. No patient that a model is tested on may be among them; see `evaluation.check_held_out`.
"""

import dataclasses
import itertools
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bigmed import train
from bigmed.data.sources import Source, open_source
from bigmed.errors import UserError
from bigmed.places import fill_places
from bigmed.stages import stage_config
from bigmed.sweep import Cell

log = logging.getLogger("bigmed")


@dataclasses.dataclass(frozen=True)
class Sight:
    """Data that weights were trained on, or that chose among them.

    Attributes:
      where: the stage, for messages; of another run, 'RUN/STAGE'.
      objective: name of the stage's objective.
      trained: False of held-out data, whose loss sets the rate or says which weights are kept.
      source: the data.
    """

    where: str
    objective: str
    trained: bool
    source: Source

    def say(self) -> str:
        """The data and what was done with them, for messages."""
        did = "was trained on" if self.trained else "was validated on"
        return f"'{self.source.name}', which '{self.where}' {did}"


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What the weights of a stage have seen.

    Attributes:
      sights: all that is known.
      unknown: what is not, a phrase each, without folders.
    """

    sights: tuple[Sight, ...]
    unknown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Told:
    """What a config tells of a sight: `config` opens the data.

    Attributes:
      split: `Source.split_sha256` when it was seen; None of this run's, '' where it was not noted.
    """

    where: str
    objective: str
    trained: bool
    config: Mapping[str, Any]
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run, as far as its stages of one seed are concerned.

    Attributes:
      prefix: of its stages in messages; '' of this run.
      noted: {stage: `own_splits`}; None of this run, whose data are as it sees them.
      visited: folders of checkpoints on the way here.
    """

    config: ConfigDict
    workdir: pathlib.Path
    seed: int
    prefix: str = ""
    noted: Mapping[str, Mapping[str, str]] | None = None
    visited: frozenset[pathlib.Path] = frozenset()


def trace(config: ConfigDict, name: str, stage: train.Stage, workdir: pathlib.Path) -> Lineage:
    """What the weights of a stage have seen when it is evaluated.

    Data of other runs that cannot be opened any more, or that are no longer the same patients, and
    foreign weights are told as unknown, with a line in the log.

    Args:
      config: of the run.
      name: of the stage.
      stage: built.
      workdir: of the run.
    """
    own = _own_data(stage)
    opened = {_key(about): source for _, about, source in own}
    found = _seen(_of_stage(_Run(config, workdir, stage.config.seed), name), opened)
    for reason in found.unknown:
        log.warning("%s: leakage cannot be checked in full: %s", stage.label, reason)
    return found


def with_checkpoints(seen: Lineage, folders: Sequence[str]) -> Lineage:
    """A lineage, and what checkpoints that an evaluator takes beside the stage's own have seen."""
    paths = [pathlib.Path(folder).expanduser().absolute() for folder in folders]
    told = itertools.chain.from_iterable(_of_other_run(path, frozenset()) for path in paths)
    found = _seen(told, {})
    unknown = dict.fromkeys((*seen.unknown, *found.unknown))
    return Lineage((*seen.sights, *found.sights), tuple(unknown))


def _seen(tellings: Iterable[_Told | str], opened: dict[str, Source]) -> Lineage:
    """What configs tell, with the data opened; `opened` has those that are, by `_key`."""
    sights, unknown = [], {}
    for told in tellings:
        reason, source = told, None
        if isinstance(told, _Told):
            source, reason = _open(told, opened)
        if source is not None:
            sights.append(Sight(told.where, told.objective, told.trained, source))
        if reason:
            unknown[reason] = None
    return Lineage(tuple(sights), tuple(unknown))


def own_splits(stage: train.Stage) -> dict[str, str]:
    """The hash of the patients of each data set that a stage sees, for other runs' `trace`.

    It is of the whole set, and tells nothing of a single patient.
    """
    return {name: source.split_sha256 for name, _, source in _own_data(stage)}


def _own_data(stage: train.Stage) -> list[tuple[str, Mapping[str, Any], Source]]:
    """(name, config, opened) of each data set that a stage sees itself."""
    if not stage.total_steps:
        return []
    data, opened = stage.config.data, [(stage.config.data.sources, stage.pipeline)]
    if stage.validation:
        opened.append((stage.config.validate.sources, stage.validation.pipeline))
    return [
        (name, data.source[name], source)
        for names, pipeline in opened
        for name, source in zip(names, pipeline.sources, strict=True)
    ]


def _open(told: _Told, opened: dict[str, Source]) -> tuple[Source | None, str]:
    """The data, if it can be opened, and what is wrong with it."""
    key, name = _key(told.config), f"'{_name(told.config)}', which '{told.where}' saw"
    try:
        if key not in opened:
            if told.config.get("name") and told.split is not None:
                raise UserError(f"{name}, is of the TFDS catalogue and is not fetched to compare")
            opened[key] = open_source(told.config)
    except UserError as error:
        log.info("%s", error)
        return None, f"{name}, cannot be opened"
    if told.split == "":
        return opened[key], f"'{told.where}' did not note whether it saw the patients there are now"
    if told.split not in (None, opened[key].split_sha256):
        return opened[key], f"{name}, has other patients now"
    return opened[key], ""


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True, default=dict)


def _name(config: Mapping[str, Any]) -> str:
    """A data set for messages, without its folder."""
    folder = pathlib.Path(str(config.get("name") or config.get("dir")))
    return f"{folder.name}/{config.get('split')}"


# ------------------------------------------------------------------------------- what configs tell


def _of_stage(run: _Run, name: str) -> Iterator[_Told | str]:
    """What a stage saw, and those before it; or why that is not known."""
    stage = stage_config(run.config, name, run.seed, run.workdir)
    if stage.steps or stage.epochs:
        held_out = stage.get("validate", {}).get("sources", ())
        for trained, names in ((True, stage.data.sources), (False, held_out)):
            for source in names:
                split = None if run.noted is None else run.noted.get(name, {}).get(source, "")
                about = stage.data.source[source]
                yield _Told(f"{run.prefix}{name}", stage.objective.name, trained, about, split)
    origin = stage.init_from
    if origin.stage:
        yield from _of_stage(run, origin.stage)
    if origin.checkpoints:
        folder = pathlib.Path(origin.checkpoints).expanduser().absolute()
        yield from _of_other_run(folder, run.visited)
    for key in ("weights", "text_weights"):
        if origin.get(key):
            yield f"what the {key} '{pathlib.Path(origin[key]).name}' were trained on is not known"


def _of_other_run(
    checkpoints: pathlib.Path, visited: frozenset[pathlib.Path]
) -> Iterator[_Told | str]:
    """What the checkpoints of another run saw."""
    if checkpoints in visited:
        return
    needed = ("config.json", "curriculum.json")
    runs = (p for p in checkpoints.parents if all((p / file).is_file() for file in needed))
    workdir, stage = next(runs, None), None
    if workdir is not None:
        config, record = (json.loads((workdir / f).read_text(encoding="utf-8")) for f in needed)
        directory, *inside = checkpoints.relative_to(workdir).parts
        stage = next((s for s in record["stages"] if s["directory"] == directory), None)
    if stage is None:
        yield f"no run around '{checkpoints.parent.name}' of init_from.checkpoints says what it saw"
        return
    noted = {s["name"]: s.get("saw", {}) for s in record["stages"] if s["seed"] == stage["seed"]}
    config, prefix = ConfigDict(config["config"]), f"{workdir.name}/"
    run = _Run(config, workdir, stage["seed"], prefix, noted, visited | {checkpoints})
    try:
        yield from _of_stage(run, stage["name"])
        if len(inside) > 1:  # of a network that was fine-tuned
            yield from _of_evaluator(run, inside[0])
    except (UserError, KeyError, AttributeError):  # of another version, or changed by hand
        yield f"the config of '{prefix}{stage['name']}' cannot be read"


def _of_evaluator(run: _Run, folder: str) -> Iterator[_Told | str]:
    """What a fine-tuned network saw beside what it started from; see `evaluation.make_evaluator`.

    The whole training split, of which it may have seen a part.
    """
    name, _, digest = folder.rpartition("-")
    where, section = f"{run.prefix}{name}", run.config.evaluator.get(name)
    if section is None or Cell(name, name, section, None).digest()[: len(digest)] != digest:
        yield f"'{where}' has other settings now than when it trained"
        return
    section = fill_places(section, run.config.data_root, run.workdir)
    for trained, split in ((True, "train"), (False, "val")):
        yield _Told(where, "supervised", trained, section[split], "")  # the split is not noted
