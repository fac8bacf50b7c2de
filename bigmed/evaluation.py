"""The evaluators of a stage, from their sections of the config."""

import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from bigmed import nested, sweep, train
from bigmed.data import sources
from bigmed.errors import UserError, did_you_mean
from bigmed.places import fill_places
from bigmed.resolve import resolve


def make_evaluator(
    name: str,
    config: ConfigDict,
    stage: train.Stage,
    workdir: pathlib.Path,
    hash_key: bytes,
    stop: Callable[[], bool],
) -> Any:
    """One evaluator of a stage: no patient of its test may be in what its weights saw.

    Raises:
      UserError: a key, value or data set of its section that cannot work.
    """
    section = config.evaluator[name]
    settings = dict(fill_places(section, config.data_root, workdir))
    evaluator_class = resolve(settings.pop("name", name), "bigmed.evaluators", "Evaluator")
    if stage.total_steps:
        _check_held_out(evaluator_class, settings, stage)
    if getattr(evaluator_class, "TRAINS", False):
        digest = sweep.Cell(name, name, section, None).digest()
        trains = nested.Trainer(stage, stage.directory / f"{name}-{digest[:8]}", stop)
        parts: tuple[Any, dict[str, Any]] = (trains, {})
    else:
        parts = _representation(name, settings, stage, workdir)
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


def _check_held_out(evaluator_class: Any, settings: dict[str, Any], stage: train.Stage) -> None:
    validated = stage.validation.pipeline.sources if stage.validation else ()
    held_out = [settings[key] for key in getattr(evaluator_class, "HELD_OUT", ("test",))]
    held_out += [other["source"] for other in (settings.get("shift") or {}).values()]
    for test in map(sources.open_source, held_out):
        for source in (*stage.pipeline.sources, *validated):
            sources.check_disjoint(source, test)


def _representation(
    name: str, settings: dict[str, Any], stage: train.Stage, workdir: pathlib.Path
) -> tuple[Any, dict[str, Any]]:
    """The function that gives features, and what else their evaluators take; out of `settings`."""
    predict_fns = stage.objective.predict_fns()
    settings.setdefault("representation", "encoder")
    for key in ("representation", "query_representation"):
        value = settings.get(key)
        if value is not None and value not in predict_fns:
            raise UserError(
                f"config.evaluator.{name}.{key}='{value}': {did_you_mean(value, predict_fns)}"
            )
        if value in stage.objective.OF_TEXTS and not settings.get("text"):
            raise UserError(
                f"config.evaluator.{name}.{key}='{value}' is of texts; give it a text section "
                "as config.data.text is, if it is an evaluator that reads them (retrieval)"
            )
    representation = settings.pop("representation")
    if settings.get("query_representation"):
        of_query = settings["query_representation"]
        settings["query_representation"] = (of_query, predict_fns[of_query])
    return predict_fns[representation], {
        "preprocessing": {"representation": representation, **stage.objective.preprocessing()},
        "cache_dir": workdir / "features",
    }
