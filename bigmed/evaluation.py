"""The evaluators of a stage, from their sections of the config."""

import concurrent.futures
import pathlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from bigmed import lineage, nested, sharding, sweep, train
from bigmed.data import sources, tokenise
from bigmed.errors import UserError, did_you_mean
from bigmed.places import fill_places
from bigmed.report.table import CLEAN
from bigmed.resolve import resolve


def make_evaluator(
    name: str,
    config: ConfigDict,
    stage: train.Stage,
    workdir: pathlib.Path,
    hash_key: bytes,
    stop: Callable[[], bool],
) -> Any:
    """One evaluator of a stage.

    Raises:
      UserError: a key, value or data set of its section that cannot work.
    """
    section = config.evaluator[name]
    settings = dict(fill_places(section, config.data_root, workdir))
    settings.pop("transductive", None)  # of `check_held_out`
    evaluator_class = resolve(settings.pop("name", name), "bigmed.evaluators", "Evaluator")
    if getattr(evaluator_class, "TRAINS", False):
        digest = sweep.Cell(name, name, section, None).digest()
        trains = nested.Trainer(stage, stage.directory / f"{name}-{digest[:8]}", stop)
        parts: tuple[Any, dict[str, Any]] = (trains, {})
    else:
        parts = _representation(name, evaluator_class, settings, stage, workdir)
    first, more = parts
    try:
        return evaluator_class(
            first,
            stage.mesh,
            canvas=stage.config.data.canvas,
            channels=stage.config.data.channels,
            predictions_dir=workdir / "predictions",
            hash_key=hash_key,
            **more,
            **settings,
        )
    except TypeError as error:  # a key that the evaluator does not have
        raise UserError(f"config.evaluator.{name}: {error}") from error


def run_cells(
    evaluators: Sequence[tuple[sweep.Cell, Any, Mapping[str, Any]]],
    state: Any,
    checkpoint: str,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[sweep.Cell, list[dict[str, Any]]]]:
    """Evaluates a state, cell by cell, in their order.

    In a sweep on several devices of one process, probes of frozen features run side by side, one on
    each device: the features are made on all of them before, and a probe is too small to divide.

    Args:
      evaluators: (cell, its evaluator, what all of its rows say).
      state: of a stage.
      checkpoint: its name in the rows.
      mesh: of the stage.

    Yields:
      (cell, its rows), as soon as those before it are done.
    """
    devices = mesh.devices.ravel() if mesh.size > 1 and jax.process_count() == 1 else []
    together = [len(devices) and cell.subset and hasattr(e, "on") for cell, e, _ in evaluators]
    free: queue.SimpleQueue = queue.SimpleQueue()
    for device in devices:
        free.put(sharding.make_mesh({"data": 1}, [device]))

    def run_on_one(evaluator: Any) -> list[dict[str, Any]]:
        mesh = free.get()
        try:
            return list(evaluator.on(mesh).run(state, checkpoint))
        finally:
            free.put(mesh)

    for name in {cell.evaluator for (cell, *_), t in zip(evaluators, together, strict=True) if t}:
        next(e for cell, e, _ in evaluators if cell.evaluator == name).prepare(state)
    with concurrent.futures.ThreadPoolExecutor(max(1, len(devices))) as pool:
        begun = [
            pool.submit(run_on_one, e) if t else None
            for (_, e, _), t in zip(evaluators, together, strict=True)
        ]
        try:
            for (cell, evaluator, about), future in zip(evaluators, begun, strict=True):
                rows = future.result() if future else evaluator.run(state, checkpoint)
                yield cell, [{**row, **about} for row in rows]
        finally:
            pool.shutdown(cancel_futures=True)  # asked to stop, or one failed


def check_held_out(
    name: str, config: ConfigDict, stage: train.Stage, seen: lineage.Lineage, workdir: pathlib.Path
) -> dict[str, Any]:
    """Compares the patients of an evaluator with those that the weights have seen.

    No patient of a test set may have been trained on, or have helped to choose the weights. Nor may
    a patient of the split `val` have been trained on: settings, thresholds and temperatures that
    are chosen on images that the network was fitted to are too good for others. (It may have chosen
    the weights: that is what it is for.) The split `train` may have been seen.

    `transductive=True` in the evaluator's section declares that unlabelled images of its patients
    were in pretraining, as where a method is to be fitted to exactly the images at hand. It is no
    excuse for weights that saw labels or reports of theirs.

    Args:
      name: of the evaluator.
      config: of the run.
      stage: whose weights are evaluated.
      seen: of `lineage.trace`.
      workdir: of the run.

    Returns:
      What every row says: `transductive`, whether it is declared; `leakage`, 'none found', or what
      was found where it is declared, or 'unchecked: ' and what cannot be known.

    Raises:
      UserError: patients are shared; says how many and with what, never who.
    """
    settings = fill_places(config.evaluator[name], config.data_root, workdir)
    if settings.get("checkpoints"):
        seen = lineage.with_checkpoints(seen, settings.checkpoints)
    found: dict[str, None] = {}
    unknown = dict.fromkeys(seen.unknown)
    for key, about in _held_out(name, settings).items() if seen.sights else ():
        source = sources.open_source(about)
        for sight in seen.sights:
            shared = sources.shared_patients(sight.source, source)
            if shared is None:
                nameless = [s.name for s in (sight.source, source) if not s.has_patients]
                unknown |= dict.fromkeys(f"'{one}' names no patients" for one in nameless)
            elif shared and (sight.trained or key != "val"):
                said = f"'{source.name}' shares {shared} patients with {sight.say()}"
                if not settings.get("transductive"):
                    raise UserError(
                        f"config.evaluator.{name}.{key}: {said}; splits must be disjoint by "
                        "patient: split again, or give one an id_space if equal ids are other "
                        "people, or set transductive=True there to say that images without labels "
                        "were meant to be seen"
                    )
                learnt = resolve(sight.objective, "bigmed.objectives", "Objective").LEARNS_FROM
                if learnt:
                    raise UserError(
                        f"config.evaluator.{name}.{key}: {said}, and learnt from their {learnt}; "
                        "transductive=True is for images alone"
                    )
                found[said] = None
    notes = [*found, *(f"unchecked: {reason}" for reason in unknown)]
    return {
        "transductive": bool(settings.get("transductive")),
        "leakage": "; ".join(notes) or CLEAN,
    }


def _held_out(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of an evaluator that weights may not have seen, by their key in its section."""
    evaluator_class = resolve(settings.get("name", name), "bigmed.evaluators", "Evaluator")
    keys = (*getattr(evaluator_class, "HELD_OUT", ("test",)), "val")
    shift = settings.get("shift") or {}
    return {key: settings[key] for key in keys if key in settings} | {
        f"shift.{key}": other["source"] for key, other in shift.items()
    }


def _representation(
    name: str,
    evaluator_class: Any,
    settings: dict[str, Any],
    stage: train.Stage,
    workdir: pathlib.Path,
) -> tuple[Any, dict[str, Any]]:
    """The function that gives features, and what else their evaluators take; out of `settings`."""
    predict_fns = stage.objective.predict_fns()
    settings.setdefault("representation", "encoder")
    more: dict[str, Any] = {}
    if getattr(evaluator_class, "PROMPTED", False):
        of_prompts, of_texts = settings.get("query_representation"), stage.objective.OF_TEXTS
        if of_prompts not in of_texts:
            raise UserError(
                f"config.evaluator.{name}.query_representation='{of_prompts}': prompts need one of "
                f"texts, of objective '{stage.config.objective.name}'; "
                f"{did_you_mean(str(of_prompts), of_texts)}"
            )
        more["scale"] = stage.objective.scale
    for key in ("representation", "query_representation"):
        value = settings.get(key)
        if value is not None and value not in predict_fns:
            raise UserError(
                f"config.evaluator.{name}.{key}='{value}': {did_you_mean(value, predict_fns)}"
            )
        if value in stage.objective.OF_TEXTS and not settings.get("text"):
            raise UserError(
                f"config.evaluator.{name}.{key}='{value}' is of texts; give it a text section "
                "as config.data.text is, if its evaluator reads them (retrieval, zero_shot)"
            )
        if value in stage.objective.OF_TEXTS:
            text = settings["text"]
            given = tokenise.load(text.get("tokeniser", ""), lower_case=text.get("lower_case"))
            if given.fingerprint != stage.pipeline.tokeniser.fingerprint:
                raise UserError(
                    f"config.evaluator.{name}.text.tokeniser='{given.path}' is another "
                    "tokeniser, or lower-cases otherwise, than config.data.text's of this stage"
                )
    representation = settings.pop("representation")
    if settings.get("query_representation"):
        of_query = settings["query_representation"]
        settings["query_representation"] = (of_query, predict_fns[of_query])
    return predict_fns[representation], {
        "preprocessing": {"representation": representation, **stage.objective.preprocessing()},
        "cache_dir": workdir / "features",
        **more,
    }
