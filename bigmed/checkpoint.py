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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bigmed import sharding, tree
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
        found = _newest_whole(self.directory, steps, lambda step: self._restore(step, abstract))
        if found is None and steps:
            raise UserError(
                f"every checkpoint in {self.directory} is torn (set aside as *{TORN_SUFFIX}); "
                "delete the stage's folder to start it again"
            )
        self._manager.reload()
        return found

    def _restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        path = self.directory / str(step)
        meta = on_every_host(lambda: read_meta(path))
        check_leaves(meta, abstract, path)

        def read() -> Any:
            # The handler alone: orbax's checkpointers wait for hosts that may have failed.
            handler = ocp.StandardCheckpointHandler()
            restored = handler.restore(path / "state", args=ocp.args.StandardRestore(abstract))
            # Copied into buffers of XLA's own, for the first step to donate.
            return jax.tree.map(jnp.copy, restored)

        state = on_every_host(lambda: _or_torn(read))
        verify(state, meta)
        return state, meta


def _newest_whole(
    directory: pathlib.Path, steps: Sequence[int], read: Callable[[int], Any]
) -> Any:
    """`read(step)` of the newest step that is not torn, or None; torn ones are set aside."""
    for step in sorted(_of_main_process(steps), reverse=True):
        try:
            return read(step)
        except TornCheckpoint as torn:
            print(f"checkpoint {step} in {directory} is torn ({torn}); trying the one before")
            if jax.process_index() == 0:
                _set_aside(directory / str(step))
    return None


def on_every_host(read: Callable[[], Any]) -> Any:
    """read(), or `TornCheckpoint` on all hosts if it is raised on any.

    A host that falls back alone would train from another step than the others.
    """
    torn, result = None, None
    try:
        result = read()
    except TornCheckpoint as error:
        torn = error
    if not sharding.everywhere(torn is None):
        raise torn or TornCheckpoint("another process cannot read it")
    return result


def _of_main_process(numbers: Sequence[int]) -> list[int]:
    """Process 0's numbers on every host, whose views of a shared file system may differ."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.array(len(numbers))))
    sent = np.resize(np.array(numbers, np.int64), count)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tolist()


def _or_torn(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # whatever the storage layer makes of a damaged file
        raise TornCheckpoint(_first_line(error)) from error


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """The meta item of the checkpoint in the folder `path`.

    Raises:
      TornCheckpoint: it does not read.
    """
    handler = ocp.JsonCheckpointHandler()
    return _or_torn(lambda: handler.restore(path / "meta", args=ocp.args.JsonRestore()))


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


def load_flat(directory: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The newest whole checkpoint of a stage as host arrays, for handing weights over.

    Args:
      directory: a stage's `checkpoints` folder, or one of its steps.

    Returns:
      (`{path: array}`, meta).

    Raises:
      UserError: no checkpoint there, or none that reads back whole.
    """
    directory = pathlib.Path(directory).absolute()
    found = directory.glob("*")
    if (directory / "meta").is_dir():
        found, directory = [directory], directory.parent
    steps = [int(path.name) for path in found if path.name.isdigit()]

    def read(step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        meta = read_meta(directory / str(step))
        flat = _or_torn(lambda: _load_as_numpy(directory / str(step) / "state"))
        verify(flat, meta)
        return flat, meta

    found = _newest_whole(directory, steps, lambda step: on_every_host(lambda: read(step)))
    if found is None:
        raise UserError(f"no {'whole ' if steps else ''}checkpoint in {directory}")
    return found


def _load_as_numpy(path: pathlib.Path) -> dict[str, np.ndarray]:
    handler = ocp.PyTreeCheckpointHandler()
    described = handler.metadata(path).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
    return tree.flatten(handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy)))


def _set_aside(path: pathlib.Path) -> None:
    target = path.with_name(path.name + TORN_SUFFIX)
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
