"""Prompt files: what a zero-shot classifier says about each class, as JSON without any code.

    {
      "name": "chestxray14", "version": "1", "mode": "pos_neg",
      "templates": ["{}", "there is {}"],
      "classes": {"Edema": {"positive": ["edema"], "negative": ["no edema"]}}
    }

In the mode 'pos_neg' every class has prompts for its presence and for its absence (CheXzero, Tiu et
al., Nature BME 2022); in 'multiclass' a class has a list of prompts, and classes compete. Each
prompt is put in each template in place of '{}'. Nothing is drawn by chance: the file is the
protocol, and its hash stands in the results.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bigmed.errors import UserError, did_you_mean

MODES = ("pos_neg", "multiclass")
SIDES = ("positive", "negative")
KEYS = ("name", "version", "about", "mode", "templates", "classes")  # 'about' is for readers
PLACE = "{}"
REPOSITORY = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a file.

    Attributes:
      name, version, mode: as the file says.
      sha256: of the file's bytes.
      of_class: of each class its groups of prompts, with the templates applied: ('positive',
        'negative') in the mode 'pos_neg', one group in 'multiclass'.
    """

    name: str
    version: str
    mode: str
    sha256: str
    of_class: Mapping[str, tuple[tuple[str, ...], ...]]

    def groups(self, class_names: Sequence[str]) -> list[tuple[tuple[str, ...], ...]]:
        """The groups of these classes, in their order.

        Raises:
          UserError: a class without prompts.
        """
        missing = [name for name in class_names if name not in self.of_class]
        if missing:
            raise UserError(
                f"prompts '{self.name}' have none for {', '.join(missing)}; choose classes among "
                f"{', '.join(self.of_class)} with classes=(...)"
            )
        return [self.of_class[name] for name in class_names]


def load(path: str | os.PathLike) -> Prompts:
    """Reads and checks a prompt file.

    Args:
      path: a relative one is looked for in the working directory, then where `configs` lies.

    Raises:
      UserError: no such file, no JSON, a key that is not known or missing, an empty prompt, a
        prompt that a class has twice or that stands for presence and for absence.
    """
    file = next((f for f in (pathlib.Path(path), REPOSITORY / path) if f.is_file()), None)
    if file is None:
        raise UserError(f"prompts='{path}': there is no such file")
    where, data = f"prompts '{file.name}'", file.read_bytes()
    try:
        content = json.loads(data, object_pairs_hook=lambda pairs: _no_twins(pairs, where))
    except ValueError as error:
        raise UserError(f"{where} is no JSON: {error}") from None
    content = _mapping(content, where, "the file")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{where}: '{key}': {did_you_mean(key, KEYS)}")
    texts = {key: content.get(key) for key in ("name", "version", "mode")}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key} is {value!r}; valid: a text")
    if texts["mode"] not in MODES:
        raise UserError(f"{where}: mode '{texts['mode']}': {did_you_mean(texts['mode'], MODES)}")
    templates = _strings(content.get("templates", [PLACE]), where, "templates")
    for template in templates:
        if template.count(PLACE) != 1:
            raise UserError(f"{where}: template '{template}' must have '{PLACE}' once")
    classes = _mapping(content.get("classes"), where, "classes")
    if not classes:
        raise UserError(f"{where}: classes is empty; give at least one")
    of_class = {
        name: _groups(name, value, texts["mode"], templates, where)
        for name, value in classes.items()
    }
    return Prompts(**texts, sha256=hashlib.sha256(data).hexdigest(), of_class=of_class)


def _groups(
    name: str, value: Any, mode: str, templates: Sequence[str], where: str
) -> tuple[tuple[str, ...], ...]:
    """The groups of prompts of one class."""
    if mode == "multiclass":
        lists = [_strings(value, where, f"class '{name}'")]
    else:
        sides = _mapping(value, where, f"class '{name}'")
        for side in sides:
            if side not in SIDES:
                raise UserError(f"{where}: class '{name}' has '{side}': valid: {', '.join(SIDES)}")
        lists = [_strings(sides.get(s), where, f"class '{name}', {s}") for s in SIDES]
        both = set(lists[0]) & set(lists[1])
        if both:
            raise UserError(
                f"{where}: class '{name}' has '{min(both)}' as positive and as negative prompt"
            )
    return tuple(
        tuple(template.replace(PLACE, prompt) for template in templates for prompt in prompts)
        for prompts in lists
    )


def _mapping(value: Any, where: str, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {what} is {value!r:.40}; valid: an object {{...}} of names")
    return value


def _strings(value: Any, where: str, what: str) -> list[str]:
    """A list of texts, none of which is empty or there twice."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {what} is {value!r:.40}; valid: a list of texts, not empty")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {what} has the prompt {text!r}; valid: a text, not empty")
        if value.count(text) > 1:
            raise UserError(f"{where}: {what} has '{text}' twice")
    return value


def _no_twins(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Of equal keys JSON would keep the last without a word."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where} has the key '{name}' twice")
    return dict(pairs)
