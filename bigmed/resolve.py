"""Dotted names to objects, resolved late, so that a new component is one new file and a config."""

import importlib
import pkgutil
from typing import Any

from bigmed.errors import UserError, did_you_mean


def resolve(name: str, package: str, attribute: str) -> Any:
    """The object a config names.

    Args:
      name: 'simclr' for `package.simclr`'s `attribute`; 'my_pkg.my_module:Thing' for anything else.
      package: where bare names live, e.g. 'bigmed.objectives'.
      attribute: what a bare name's module must define, e.g. 'Objective'.

    Raises:
      UserError: no such module or attribute; the message lists the bare names that exist.
    """
    module_name, _, object_name = name.partition(":")
    if not object_name:
        module_name, object_name = f"{package}.{name}", attribute
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module exists; something that it imports does not
        choices = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
        raise UserError(
            f"no '{name}' in {package} (or use 'module:Name'); {did_you_mean(name, choices)}"
        ) from None
    if not hasattr(module, object_name):
        raise UserError(
            f"module '{module_name}' has no '{object_name}'; "
            f"{did_you_mean(object_name, [n for n in vars(module) if n[:1].isupper()])}"
        )
    return getattr(module, object_name)
