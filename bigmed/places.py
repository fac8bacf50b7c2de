"""The folders that a config leaves open."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from bigmed.errors import UserError


def fill_places(config: Any, data_root: str, workdir: pathlib.Path) -> Any:
    """A locked copy with '{workdir}' and '{data_root}' filled in wherever a string names them.

    Raises:
      UserError: a string names '{data_root}', and there is none.
    """

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
