"""Path names of a pytree's leaves, regular expressions over them, and merging with a loud report.

A leaf's path is its keys joined by '/', e.g. 'backbone/stem/conv/kernel'. Patterns are matched with
`re.fullmatch`, so '.*/bias' means what it says and 'bias' alone matches only a top-level leaf.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from bigmed.errors import UserError


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: tuple[Any, ...]) -> str:
    """The '/'-joined name of a `jax.tree_util` key path."""
    return "/".join(map(_key_name, path))


def flatten(tree: Any) -> dict[str, Any]:
    """`{path: leaf}` in the tree's own order."""
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries with the paths of a flat one; undoes `flatten` for such trees."""
    nested: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        here = nested
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = leaf
    return nested


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, but `function(name, leaf, *rest_leaves)` also gets the leaf's path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether any of the patterns matches the whole of `name`."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def mask(patterns: Iterable[str], tree: Any) -> Any:
    """A tree of booleans: True where a leaf's path matches one of the patterns."""
    patterns = tuple(patterns)
    return map_with_name(lambda name, _: matches(patterns, name), tree)


def describe_shape(leaf: Any) -> str:
    """'(3, 3, 64) float32' of an array or `jax.ShapeDtypeStruct`."""
    return f"{tuple(leaf.shape)} {leaf.dtype}"


def merge(
    target: Any, source: Mapping[str, Any], load: Iterable[str], skip: Iterable[str] = ()
) -> tuple[Any, list[str]]:
    """Replaces leaves of `target` by the leaves of the flat `source` that have the same path.

    Args:
      target: pytree of arrays or `ShapeDtypeStruct`s.
      source: `{path: leaf}` as `flatten` gives it.
      load: patterns of the target paths to take from the source; each must match at least one.
      skip: patterns of target paths to leave fresh although `load` matches them.

    Returns:
      The merged tree, and the sorted paths that were taken from the source.

    Raises:
      UserError: a pattern matches no path, a wanted path is missing in the source, or a shape or
        dtype differs. Both sides are listed.
    """
    load, skip = tuple(load), tuple(skip)
    names = list(flatten(target))
    problems = [
        f"init_from pattern '{pattern}' matches nothing in this model"
        for pattern in (*load, *skip)
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    taken: list[str] = []

    def pick(name: str, leaf: Any) -> Any:
        if not matches(load, name) or matches(skip, name):
            return leaf
        if name not in source:
            problems.append(f"'{name}' {describe_shape(leaf)} is missing in the source")
            return leaf
        other = source[name]
        if tuple(other.shape) != tuple(leaf.shape) or other.dtype != leaf.dtype:
            problems.append(
                f"'{name}' is {describe_shape(leaf)} here but {describe_shape(other)} in the source"
            )
            return leaf
        taken.append(name)
        return other

    merged = map_with_name(pick, target)
    if problems:
        shown = "; ".join(problems[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"weights do not fit: {shown}{more}")
    return merged, sorted(taken)
