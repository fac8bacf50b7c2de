"""Where each of our leaves stands in a foreign checkpoint: one table a family, read both ways.

A family's module in this package defines

  NAMINGS                    the foreign namings that it knows, e.g. ('torchvision', 'timm')
  STEM                       the path of the leaf that takes the image's channels; None for texts
  entries(model, naming)     a list of `Entry`, one for every leaf of the model
  describe(model, naming, shapes)
                             the config.json under which that library loads the export, given the
                             shape of every leaf by path (for the size and channels of images)
  from_description(config)   a foreign config.json -> our `config.model` section

and, where the network scales pixels by itself, or names or sizes of foreign tensors vary,

  PIXELS                     (mean, deviation) of that scaling
  READ_ONLY                  further foreign namings, which nothing is exported in
  plain_names(tensors)       -> the same tensors under the names of the tables
  fit_positions(tensors, model, naming, (height, width))
                             -> the same tensors, position codes resampled to images of this size

`model` is the family's Linen module. A path is a leaf's collection and path in the module's own
variables: 'params/stem/conv/kernel', 'batch_stats/stem/norm/mean'.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.errors import UserError, did_you_mean

PIXELS = (0.0, 1.0)  # mean and deviation by which a network itself scales our images: nothing


@dataclasses.dataclass(frozen=True)
class Layout:
    """How foreign tensors and one leaf hold the same numbers; each undoes the other, bit for bit.

    Attributes:
      to_ours: foreign tensors, in the order of the entry's names -> our leaf.
      to_theirs: our leaf -> the foreign tensors.
    """

    to_ours: Callable[[Sequence[np.ndarray]], np.ndarray]
    to_theirs: Callable[[np.ndarray], Sequence[np.ndarray]]


def permuted(*axes: int) -> Layout:
    """One tensor whose axes stand in another order: ours is theirs.transpose(axes)."""
    back = tuple(np.argsort(axes))
    return Layout(lambda t: t[0].transpose(axes), lambda leaf: (leaf.transpose(back),))


SAME = Layout(lambda t: t[0], lambda leaf: (leaf,))
CONV = permuted(2, 3, 1, 0)  # OIHW -> HWIO
DENSE = permuted(1, 0)  # OI -> IO


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our leaves, and the foreign tensors that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def to_ours(
    source: Mapping[str, np.ndarray], entries: Sequence[Entry], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Foreign tensors -> our leaves.

    Args:
      source: foreign tensors by name.
      entries: of the model.
      shapes: the shape of every leaf of the model, by path.

    Returns:
      (leaves float32 by path, names of foreign tensors left over, paths of leaves left fresh).

    Raises:
      UserError: a tensor has a shape that the leaf does not, with both sides named.
    """
    leaves, fresh, used = {}, [], set()
    for entry in entries:
        if not all(name in source for name in entry.theirs):
            fresh.append(entry.ours)
            continue
        tensors = [np.asarray(source[name]) for name in entry.theirs]
        for name, tensor in zip(entry.theirs, tensors, strict=True):
            if tensor.dtype.kind != "f":
                raise UserError(f"'{name}' is of {tensor.dtype}; valid: floating point numbers")
        tensors = [tensor.astype(np.float32) for tensor in tensors]
        found = ", ".join(
            f"'{name}' {tuple(t.shape)}" for name, t in zip(entry.theirs, tensors, strict=True)
        )
        wanted = tuple(shapes[entry.ours])
        try:
            leaf = entry.layout.to_ours(tensors)
        except (ValueError, IndexError):  # of another rank
            leaf = None
        if leaf is None or leaf.shape != wanted:
            raise UserError(f"{found} does not fit '{entry.ours}' {wanted} of this model")
        leaves[entry.ours] = np.ascontiguousarray(leaf)
        used.update(entry.theirs)
    return leaves, sorted(source.keys() - used), fresh


def to_theirs(
    leaves: Mapping[str, np.ndarray], entries: Sequence[Entry]
) -> dict[str, np.ndarray]:
    """Our leaves -> foreign tensors by name; every entry's leaf must be there."""
    tensors = {}
    for entry in entries:
        for name, tensor in zip(
            entry.theirs, entry.layout.to_theirs(np.asarray(leaves[entry.ours])), strict=True
        ):
            tensors[name] = np.ascontiguousarray(tensor)
    return tensors


def renamed(
    tensors: Mapping[str, np.ndarray], names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """The tensors, those that `names` has under their new names.

    Raises:
      UserError: two of them would have the same name.
    """
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        new = names.get(name, name)
        if new in found:
            twin = next(old for old in tensors if names.get(old, old) == new)
            raise UserError(f"the file holds '{new}' twice, as '{twin}' and as '{name}'")
        found[new] = tensor
    return found


def timm_config(architecture: str, features: int, channels: int) -> dict[str, Any]:
    """timm's config.json of a convolutional network without a classifier.

    Args:
      architecture: timm's name.
      features: length of the feature vector.
      channels: of the images. What pixels it takes is the exporter's to say.
    """
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": features,
        "global_pool": "avg",
        "model_args": {"in_chans": channels},
        "pretrained_cfg": {"num_classes": 0},
    }


def timm_named(config: Mapping[str, Any], named: Mapping[str, Mapping]) -> dict[str, Any]:
    """The section of `named` that a timm config.json means, e.g. by 'densenet121.tv_in1k'.

    Raises:
      UserError: none of them.
    """
    architecture = str(config.get("architecture"))
    name = architecture.partition(".")[0]
    if name not in named:
        raise UserError(f"architecture '{architecture}': {did_you_mean(name, named)}")
    return dict(named[name])


def refold_stem(kernel: np.ndarray, channels: int, wanted: int) -> np.ndarray:
    """A stem's kernel [..., channels * ..., O] for images of another number of channels.

    3 -> 1 sums over the channels, 1 -> 3 spreads a third over each: in both directions the stem's
    output on a grey image, alone or repeated three times, stays the same. (Under
    `augment.normalize='imagenet'` the three channels differ, and so does the output, by some
    per cent.)

    Args:
      kernel: [k, k, C, O], or [k * k * C, O] with the channels innermost.
      channels: C.
      wanted: 1 or 3.
    """
    if channels == wanted:
        return kernel
    if {channels, wanted} != {1, 3}:
        raise UserError(f"a stem of {channels} channels cannot be made one of {wanted}")
    out = kernel.shape[-1]
    per_channel = kernel.reshape(-1, channels, out)
    refolded = np.repeat(per_channel.sum(1, keepdims=True) / wanted, wanted, axis=1)
    shape = (*kernel.shape[:2], wanted, out) if kernel.ndim == 4 else (-1, out)
    return refolded.reshape(shape).astype(kernel.dtype)
