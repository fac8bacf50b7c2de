"""Checkpoints: async, atomic, checked on restore; the only module that imports orbax.

A checkpoint has two items: `state`, a pytree of (possibly sharded) arrays, and `meta`, JSON. The
meta holds a 32-bit fingerprint of every leaf, computed on the devices when it was saved, so that a
truncated, missing or altered file is noticed on restore even where the storage format would give
zeros back without a word.
"""

import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bigmed import tree
from bigmed.errors import UserError

FORMAT = 1
TORN_SUFFIX = ".torn"

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every save and thread otherwise


def _leaf_fingerprint(leaf: jax.Array) -> jax.Array:
    """Sum mod 2^32 of bits times an odd function of position: independent of the sharding."""
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    width = leaf.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for dim in range(leaf.ndim):
        position = position * jnp.uint32(leaf.shape[dim])
        position = position + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


@jax.jit
def _fingerprints(state: Any) -> jax.Array:
    return jnp.stack([_leaf_fingerprint(leaf) for leaf in jax.tree.leaves(state)])


def fingerprints(state: Any) -> dict[str, int]:
    """`{path: 32-bit fingerprint}` of every leaf; equal if and only (nearly) if the bits are."""
    return dict(zip(tree.flatten(state), np.asarray(_fingerprints(state)).tolist(), strict=True))


class TornCheckpoint(Exception):
    """A checkpoint that was committed but does not read back as it was written."""


def torn_line(step: int, directory: pathlib.Path, torn: TornCheckpoint) -> str:
    return f"checkpoint {step} in {directory} is torn ({torn}); trying the one before"


class Checkpointer:
    """The checkpoints of one stage, `directory/<step>/`.

    Args:
      directory: made if absent.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        self.directory = pathlib.Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to save; what `state` holds may be donated as soon as this returns.

        Raises what the save before raised in the background, e.g. OSError on a full disk.
        """
        self._manager.wait_until_finished()
        if jax.default_backend() == "cpu":
            # There orbax's host copy may be the buffer itself, which the next step will reuse.
            state = jax.tree.map(jnp.copy, state)
        described = {
            "format": FORMAT,
            "step": step,
            "leaves": {k: tree.describe_shape(v) for k, v in tree.flatten(state).items()},
            "fingerprints": fingerprints(state),
            **meta,
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(described)
            ),
            force=True,
        )

    def wait(self) -> None:
        """Returns when everything saved is committed; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def restore_latest(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that reads back whole, or None where there is none.

        A torn one is set aside as `<step>.torn` with a line that says so, and the one before it is
        tried.

        Args:
          abstract: `jax.ShapeDtypeStruct`s with shardings, which may be of another mesh.

        Returns:
          (state, meta).

        Raises:
          UserError: the checkpoint is whole but of another model; both sides are named. Or there
            are checkpoints and all of them are torn.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self._restore(step, abstract)
            except TornCheckpoint as torn:
                print(torn_line(step, self.directory, torn))
                if jax.process_index() == 0:
                    _set_aside(self.directory / str(step))
                self._manager.reload()
        if steps:
            raise UserError(
                f"every checkpoint in {self.directory} is torn (set aside as *{TORN_SUFFIX}); "
                "delete the stage's folder to start it again"
            )
        return None

    def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        meta = read_meta(self.directory, step)
        check_leaves(meta, abstract, self.directory / str(step))
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )
            # Copied into buffers of XLA's own, for the first step to donate.
            state = jax.tree.map(jnp.copy, restored["state"])
        except Exception as error:  # whatever the storage layer makes of a damaged file
            raise TornCheckpoint(_first_line(error)) from error
        verify(state, meta)
        return state, meta


def read_meta(directory: str | os.PathLike, step: int) -> dict[str, Any]:
    """The meta item of a checkpoint.

    Raises:
      TornCheckpoint: it does not read.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(pathlib.Path(directory).absolute() / str(step) / "meta")
    except Exception as error:
        raise TornCheckpoint(_first_line(error)) from error


def check_leaves(meta: Mapping[str, Any], abstract: Any, where: Any) -> None:
    """Raises `UserError` unless the checkpoint's leaves have the names and shapes of `abstract`."""
    saved = meta["leaves"]
    wanted = {name: tree.describe_shape(leaf) for name, leaf in tree.flatten(abstract).items()}
    differ = [
        f"'{name}' is {wanted.get(name, 'absent')} here but {saved.get(name, 'absent')} there"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise UserError(f"{where} is of another model: {'; '.join(differ[:4])}{more}")


def verify(state: Any, meta: Mapping[str, Any]) -> None:
    """Raises `TornCheckpoint` unless every leaf has the fingerprint it was saved with."""
    for name, value in fingerprints(state).items():
        if meta["fingerprints"][name] != value:
            raise TornCheckpoint(f"'{name}' does not read back as it was written")


def load_flat(
    directory: str | os.PathLike, patterns: tuple[str, ...] = (".*",)
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The newest whole checkpoint of a stage as host arrays, for handing weights over.

    Args:
      directory: a stage's `checkpoints` folder.
      patterns: which paths the caller wants; the others are not returned.

    Returns:
      (`{path: array}`, meta).

    Raises:
      UserError: no checkpoint there, or none that reads back whole.
    """
    directory = pathlib.Path(directory).absolute()
    steps = sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
    for step in steps:
        try:
            meta = read_meta(directory, step)
            flat = _load_as_numpy(directory / str(step) / "state")
            for name, value in fingerprints(flat).items():
                if meta["fingerprints"][name] != value:
                    raise TornCheckpoint(f"'{name}' does not read back as it was written")
        except TornCheckpoint as torn:
            print(torn_line(step, directory, torn))
            if jax.process_index() == 0:
                _set_aside(directory / str(step))
            continue
        return {name: leaf for name, leaf in flat.items() if tree.matches(patterns, name)}, meta
    raise UserError(f"no {'whole ' if steps else ''}checkpoint in {directory}")


def _load_as_numpy(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            described = reader.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
            return tree.flatten(
                reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            )
    except Exception as error:
        raise TornCheckpoint(_first_line(error)) from error


def _set_aside(path: pathlib.Path) -> None:
    target = path.with_name(path.name + TORN_SUFFIX)
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
