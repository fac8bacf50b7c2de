"""The weights that a stage begins with: its `init_from`."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigmed import networks, train, tree
from bigmed.convert import foreign
from bigmed.convert import weights as ours
from bigmed.errors import UserError, did_you_mean
from bigmed.objectives import momentum
from bigmed.record import Record
from bigmed.resolve import resolve

# What says nothing without another key of `init_from`.
_NEEDS = {
    "naming": ("weights",),
    "text_naming": ("text_weights",),
    "prefix": ("naming",),
    "text_prefix": ("text_naming",),
    "allow_pickle": ("naming", "text_naming"),
    "network": ("stage", "checkpoints"),
}
_UNSET = (None, "", False, networks.STUDENT)


@dataclasses.dataclass(frozen=True)
class Handover:
    """Weights for a stage to begin with.

    Attributes:
      weights: host arrays by their path in a state.
      load, skip: patterns of what is taken, see `tree.merge`.
      told: what the record says of it; None of a stage from scratch.
      left_over: a line for each foreign file of which something is not used.
    """

    weights: Mapping[str, Any]
    load: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    told: Mapping[str, Any] | None = None
    left_over: tuple[str, ...] = ()


def check(
    source: Any, name: str, earlier: Sequence[str], objective_of: Callable[[str], str]
) -> None:
    """Checks that the keys of a stage's `init_from` go together; reads nothing.

    Args:
      source: the section.
      name: of the stage.
      earlier: the stages that come before it.
      objective_of: the name of the objective of one of them.

    Raises:
      UserError: no earlier stage, or one without the network; several sources or none; a key that
        says nothing.
    """
    where = f"stage '{name}': init_from"  # of the stage alone, or of all
    if source.stage and source.stage not in earlier:
        raise UserError(
            f"{where}.stage='{source.stage}' is no earlier stage; "
            f"{did_you_mean(source.stage, earlier)}"
        )
    given = [key for key in ("stage", "checkpoints", "weights") if source[key]]
    given += ["text_weights"] if source.text_weights and given != ["weights"] else []
    if len(given) > 1 or ((source.load or source.skip) and not given):
        raise UserError(
            f"{where} has {' and '.join(given) or 'no source'}; "
            "give one of stage (an earlier one), checkpoints (of a stage of another run) and "
            "weights, text_weights or both (folders of tools/import_weights.py, or foreign files "
            "and their naming, text_naming)"
        )
    networks.check(source.network, f"{where}.network")
    for key, of in _NEEDS.items():
        if source[key] not in _UNSET and not any(source[other] for other in of):
            needed = " or ".join(f"init_from.{other}" for other in of)
            raise UserError(f"{where}.{key}={source[key]!r} is of {needed}, which is empty")
    if source.stage and source.network == networks.TEACHER:
        objective = objective_of(source.stage)
        of_class = resolve(objective, "bigmed.objectives", "Objective")
        if not issubclass(of_class, momentum.Objective):
            raise UserError(
                f"{where}.network='teacher': objective '{objective}' of stage '{source.stage}' "
                f"keeps no moving average; valid: {networks.STUDENT}"
            )


def take(stage: train.Stage, record: Record) -> Handover:
    """Reads the weights that a stage's `init_from` names.

    Without patterns, what the objective calls worth carrying is taken, where the source has it.

    Args:
      stage: built.
      record: of its run, for the checkpoint of an earlier stage.

    Raises:
      UserError: they cannot be had, or are of another model, image size or channels.
    """
    source = stage.config.init_from
    left_over: tuple[str, ...] = ()
    if source.weights or source.text_weights:
        weights, origin, left_over = _foreign(stage)
        modules = dict.fromkeys(name.split("/")[1] for name in weights)
        carried = tuple(f"(params|batch_stats)/{module}/.*" for module in modules)
    elif source.checkpoints or source.stage:
        if source.checkpoints and not pathlib.Path(source.checkpoints).is_dir():
            raise UserError(f"init_from.checkpoints: no folder {source.checkpoints}")
        folder, step = pathlib.Path(source.checkpoints), None
        if source.stage:
            last = record.weights_of(source.stage, stage.config.seed)
            folder, step = last.parent, int(last.name)
        weights, step = networks.load(folder, source.network, step=step)
        origin, carried = f"{folder.parent.name}/{step}", stage.objective.TRANSFER
        origin += "" if source.network == networks.STUDENT else f", its {source.network}"
    else:
        return Handover({})
    here = tree.flatten(_abstract(stage))
    load = tuple(source.load) or tuple(
        pattern
        for pattern in carried
        if all(any(tree.matches((pattern,), name) for name in names) for names in (here, weights))
    )
    if not load:
        raise UserError(f"init_from: {origin} has no weights that this objective carries over")
    told = {"checkpoint": origin, "load": list(load), "skip": list(source.skip)}
    told |= {key: source[key] for key in _NEEDS if source[key] not in _UNSET}
    return Handover(weights, load, tuple(source.skip), told, left_over)


def check_fit(stage: train.Stage, found: Handover) -> None:
    """Raises `UserError` where weights do not fit a stage, before anything runs."""
    tree.merge(_abstract(stage), found.weights, found.load, found.skip)


def _abstract(stage: train.Stage) -> dict[str, Any]:
    """Shapes of what can be handed over."""
    return {"params": stage.abstract.params, "batch_stats": stage.abstract.batch_stats}


def _foreign(stage: train.Stage) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """`init_from.weights` and `.text_weights` as leaves of this stage, their names, what is left.

    Raises:
      UserError: see `foreign.take` and `weights.load`; the weights are of another model, image size
        or channels.
    """
    source, leaves, left_over, names = stage.config.init_from, {}, [], []
    for key, read, module in (
        ("weights", _encoder, "backbone"),
        ("text_weights", _text_tower, "text"),
    ):
        if not source[key]:
            continue
        path = pathlib.Path(source[key])
        found = read(stage, path)
        names.append(path.name)
        for name, leaf in found.leaves.items():
            collection, _, rest = name.partition("/")
            leaves[f"{collection}/{module}/{rest}"] = leaf
        left = foreign.describe_left_over(found)
        left_over += [f"init_from.{key}: left over of {path.name}: {left}"] if left else []
    return leaves, " and ".join(names), tuple(left_over)


def _encoder(stage: train.Stage, path: pathlib.Path) -> ours.Weights:
    source, config = stage.config.init_from, stage.config
    form = {"size": config.augment.size, "channels": config.data.channels}
    form["normalize"] = stage.objective.augmentation.normalize  # the recipe's, where none is given
    if source.naming:
        return _of_file(stage, path, source.naming, source.prefix, "backbone", config.model, form)
    found = _of_folder(path, "naming")
    ours.check_same_model(found.model, stage.objective.backbone, path)
    for key in ("size", "channels"):
        if getattr(found, key) != form[key]:
            raise UserError(
                f"{path} was imported with {key}={getattr(found, key)} and this stage has "
                f"{form[key]}; import it again with --{key}={form[key]}"
            )
    if found.normalize != form["normalize"]:
        raise UserError(
            f"{path} takes images with normalize='{found.normalize}' but "
            f"config.augment.normalize='{form['normalize']}'; set it to '{found.normalize}'"
        )
    return found


def _text_tower(stage: train.Stage, path: pathlib.Path) -> ours.Weights:
    source, config = stage.config.init_from, stage.config
    tower = getattr(stage.objective, "text", None)
    if tower is None:
        raise UserError(
            f"init_from.text_weights: objective '{config.objective.name}' has no text tower"
        )
    if source.text_naming:
        model = {**config.text_model, "vocab_size": tower.vocab_size}
        form = {"normalize": None}
        return _of_file(stage, path, source.text_naming, source.text_prefix, "text", model, form)
    found = _of_folder(path, "text_naming")
    how_used = ("pool", "pool_special", "dropout")  # which a BERT's weights do not say
    ours.check_same_model(found.model, tower, path, "text_model", how_used)
    return found


def _of_folder(path: pathlib.Path, naming: str) -> ours.Weights:
    """A folder of tools/import_weights.py; `naming` is the key that would say that it is not."""
    if not (path / ours.DESCRIPTION).is_file() and path.exists():
        raise UserError(
            f"{path} is no folder of tools/import_weights.py; of a foreign file or folder give "
            f"init_from.{naming} too"
        )
    return ours.load(path)


def _of_file(
    stage: train.Stage,
    path: pathlib.Path,
    naming: str,
    prefix: str | None,
    module: str,
    model: Mapping[str, Any],
    form: Mapping[str, Any],
) -> ours.Weights:
    """What tools/import_weights.py would make of a foreign file; `module` of the state needs it."""
    source = stage.config.init_from

    def needed(leaf: str) -> bool:
        name = leaf.replace("/", f"/{module}/", 1)
        wanted = not source.load or tree.matches(source.load, name)
        return wanted and not tree.matches(source.skip, name)

    allow_pickle = source.allow_pickle
    return foreign.take(
        path, naming, model, needed=needed, prefix=prefix, allow_pickle=allow_pickle, **form
    )
