"""The config of one stage: that of the run with the stage's overrides."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigmed.data import phantom
from bigmed.errors import UserError, did_you_mean
from bigmed.places import fill_places

NOT_PER_STAGE = (
    "stages", "stage", "seeds", "evaluate", "evaluator", "sweep", "phantom", "mesh", "data_root",
    "pictures",
)  # fmt: skip


def prepare_stage(config: ConfigDict, name: str, seed: int, workdir: pathlib.Path) -> ConfigDict:
    """`stage_config`, and its synthetic data set is made if it has one.

    Raises:
      UserError: see `stage_config`.
    """
    made = stage_config(config, name, seed, workdir)
    if config.get("phantom"):
        phantom.prepare(workdir / "data" / "phantom", **config.phantom)
    return made


def stage_config(config: ConfigDict, name: str, seed: int, workdir: pathlib.Path) -> ConfigDict:
    """The base config with the overrides of one stage, and its folders filled in.

    Raises:
      UserError: no such stage, an override of an unknown key, or an unset `config.data_root`.
    """
    if name not in config.stage:
        raise UserError(f"no stage '{name}': {did_you_mean(name, config.stage)}")
    whole = config.copy_and_resolve_references()  # stages must not see one another's overrides
    base = ConfigDict({k: v for k, v in whole.items() if k not in NOT_PER_STAGE})
    base.seed = seed
    _override(base, config.stage[name], f"config.stage.{name}")
    return fill_places(base, config.data_root, workdir)


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
