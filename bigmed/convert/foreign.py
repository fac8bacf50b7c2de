"""Foreign weights as a user asks for them: what tools/import_weights.py and `init_from` share."""

import itertools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from bigmed.convert import weights
from bigmed.errors import UserError

# How the name of a layer's weight ends.
_WEIGHTS = ("weight", "bias", "running_mean", "running_var", "kernel", "gamma", "beta")
_WEIGHTS += ("moving_mean", "moving_variance")
_SHOWN = 5  # leaves that the source lacks


def take(
    source: pathlib.Path,
    naming: str,
    model: Mapping[str, Any] | None,
    *,
    needed: Callable[[str], bool] = lambda path: True,
    **form: Any,
) -> weights.Weights:
    """`weights.import_weights`, of a source that has every leaf that is needed.

    Args:
      source, naming, model: see `weights.import_weights`.
      needed: whether a leaf may not be missing, by its path in the model.
      **form: size, channels, normalize, prefix and allow_pickle, as there.

    Raises:
      UserError: what that raises; the source is a folder of tools/import_weights.py; leaves are
        missing.
    """
    if (source / weights.DESCRIPTION).is_file():
        raise UserError(
            f"{source} is a folder of tools/import_weights.py, to start from as it is, without "
            f"naming='{naming}'"
        )
    found = weights.import_weights(source, naming, model, **form)
    fresh = [path for path in found.fresh if needed(path)]
    if fresh:
        shown = ", ".join(f"'{path}'" for path in fresh[:_SHOWN])
        more = f" and {len(fresh) - _SHOWN} more" if len(fresh) > _SHOWN else ""
        raise UserError(f"{source} lacks {len(fresh)} leaves of the model: {shown}{more}")
    return found


def describe_left_over(found: weights.Weights) -> str:
    """'2 tensors: ...', in groups of like names; '' where none is left over."""
    if not found.left_over:
        return ""
    return f"{len(found.left_over)} tensors: {_grouped(found.left_over)}"


def _grouped(names: tuple[str, ...]) -> str:
    """'module.encoder_k.layer1.0.bn1.bias' is one of 'module.encoder_k...'; a few stand alone.

    Names that end as no layer's weight does, such as an optimiser's, are apart from those that do.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        separator = "/" if "/" in name else "."
        *parts, last = name.split(separator)
        kept = itertools.takewhile(lambda part: not re.search(r"\d", part), parts)
        start = separator.join(itertools.islice(kept, 1 if separator == "/" else 2))
        end = "" if last in _WEIGHTS else f"{separator}{last}"
        groups.setdefault(f"{start}...{end}", []).append(name)
    shown = []
    for group, members in groups.items():
        few = len(members) <= 2
        shown += [f"'{name}'" for name in members] if few else [f"{len(members)} of '{group}'"]
    return ", ".join(shown)
