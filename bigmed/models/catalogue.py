"""Backbones by the name of their family, and by published names."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from bigmed import models
from bigmed.errors import UserError
from bigmed.resolve import resolve


def build(section: Mapping[str, Any], dtype: Any = jnp.float32, key: str = "model") -> Any:
    """The Linen module that the section `config.<key>` describes; None is the module's default.

    Raises:
      UserError: no such family, or a key that it does not have.
    """
    settings = {key: value for key, value in section.items() if value is not None}
    name = settings.pop("name")
    try:
        return resolve(name, "bigmed.models", "Model")(**settings, dtype=dtype)
    except TypeError as error:
        raise UserError(f"config.{key} of '{name}': {error}") from None


def named_models() -> dict[str, dict[str, Any]]:
    """`config.model` of every published name that a family knows, e.g. 'resnet50'."""
    found: dict[str, dict[str, Any]] = {}
    for module in pkgutil.iter_modules(models.__path__):
        found |= getattr(importlib.import_module(f"bigmed.models.{module.name}"), "NAMED", {})
    return found
