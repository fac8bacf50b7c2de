"""Reading TensorFlow's checkpoints and SavedModels: variables by the names their program gave them.

A checkpoint is a prefix, 'model.ckpt-250228': an index and one or more data files ("shards") beside
it. TensorFlow 1 keeps variables by name. TensorFlow 2 keeps them by their place among the program's
objects, in a SavedModel 'trainable_variables_list/12'; a record of those objects, in the same file,
has the names.
"""

import collections
import glob
import os
import pathlib
import re
from typing import Any

import numpy as np

from bigmed.errors import UserError

_RECORD = "_CHECKPOINTABLE_OBJECT_GRAPH"
_PLACE_END = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
_WEIGHT = re.compile(r"(?:^|/)(?:kernel|bias|gamma|beta|moving_mean|moving_variance)$")
# Nothing is computed here: TensorFlow need not say how it would.
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
# Stands for what is no layer's weight: an optimiser's slots are as large as the model once more.
_UNREAD = np.empty(0, np.float32)


def prefix_of(path: pathlib.Path) -> pathlib.Path | None:
    """The prefix of the checkpoint that a path means; None if it means none.

    Args:
      path: the prefix itself, its index, a SavedModel's folder, or a folder of one checkpoint.

    Raises:
      UserError: a folder of several.
    """
    if path.suffix == ".index" and path.is_file():
        return path.with_suffix("")
    if _beside(path, ".index").is_file():
        return path
    for folder in (path / "variables", path):
        found = sorted(folder.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(index.stem for index in found[:5])
            raise UserError(f"{folder} holds {len(found)} checkpoints; give one: {names}")
        if found:
            return found[0].with_suffix("")
    return None


def files(prefix: pathlib.Path) -> list[pathlib.Path]:
    """The index and the shards of a checkpoint.

    Raises:
      UserError: a shard is missing.
    """
    pattern = f"{glob.escape(prefix.name)}.data-[0-9]*-of-[0-9]*"
    found = sorted(prefix.parent.glob(pattern))
    count = int(found[0].name.rpartition("-")[2]) if found else 1
    shards = [_beside(prefix, f".data-{i:05d}-of-{count:05d}") for i in range(count)]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{_beside(prefix, '.index')} has the shard {shard.name}, missing here")
    return [_beside(prefix, ".index"), *shards]


def read_variables(prefix: pathlib.Path) -> dict[str, np.ndarray]:
    """A checkpoint's variables by name; what is no layer's weight is there as an empty array.

    Raises:
      UserError: TensorFlow is not installed; a shard is missing; a file is damaged.
    """
    files(prefix)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(f"reading {prefix} needs TensorFlow: pip install 'bigmed[tf]'") from None
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        names = _names(reader)
        return {
            name: reader.get_tensor(key) if _is_weight(key, name) else _UNREAD
            for key, name in names.items()
        }
    except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{prefix} does not read as a TensorFlow checkpoint: {reason}") from None


def _is_weight(key: str, name: str) -> bool:
    return _SLOT not in key and _WEIGHT.search(name) is not None


def _names(reader: Any) -> dict[str, str]:
    """{key in the file: the variable's name, or its place where two have the same name}."""
    keys = [key for key in reader.get_variable_to_shape_map() if key != _RECORD]
    given = _recorded_names(reader.get_tensor(_RECORD)) if reader.has_tensor(_RECORD) else {}
    count = collections.Counter(given.values())
    return {
        key: given[key] if count[given.get(key)] == 1 else key.removesuffix(_PLACE_END)
        for key in keys
    }


def _recorded_names(record: bytes) -> dict[str, str]:
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    return {
        attribute.checkpoint_key: attribute.full_name
        for node in TrackableObjectGraph.FromString(record).nodes
        for attribute in node.attributes
        if attribute.full_name
    }


def _beside(prefix: pathlib.Path, ending: str) -> pathlib.Path:
    return prefix.with_name(prefix.name + ending)
