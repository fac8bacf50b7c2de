"""Frozen features of a whole data set: one sharded pass, done once and kept on disk."""

import collections
import hashlib
import json
import logging
import math
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bigmed import metrics, sharding, tree
from bigmed.data.pipeline import evaluation_batches
from bigmed.errors import NonFiniteError

log = logging.getLogger("bigmed")

CACHE_FORMAT = 1
IN_FLIGHT = 2  # batches sent to the device before the first is fetched

PredictFn = Callable[[Any, Mapping[str, jax.Array]], jax.Array]


def weights_fingerprint(state: Any) -> str:
    """Hash of the names and values of a tree of arrays, the same on any mesh."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in tree.flatten(state).items():
        value = np.ascontiguousarray(on_host(leaf))
        digest.update(f"{name} {value.shape} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def cache_key(weights: str, preprocessing: Mapping[str, Any]) -> str:
    """`extract`'s, of `weights_fingerprint` and preprocessing: evaluators that agree share."""
    return json.dumps([weights, dict(preprocessing)], sort_keys=True)


def extract(
    predict_fn: PredictFn,
    state: Any,
    source: Any,
    mesh: jax.sharding.Mesh,
    *,
    canvas: int,
    channels: int,
    batch_size: int,
    text: Any = None,
    cache_dir: str | os.PathLike | None = None,
    cache_key: str = "",
    quiet: bool = False,
) -> np.ndarray:
    """The features of every record of a source, in the source's order.

    Args:
      predict_fn: pure; (state, batch) -> [B, D]. The batch is one of `evaluation_batches`, as
        global arrays whose rows are split over the mesh.
      state: what `predict_fn` wants.
      source: a `bigmed.data.sources.Source`.
      mesh: of `bigmed.sharding.make_mesh`.
      canvas, channels: form of the images, see `evaluation_batches`.
      batch_size: global; rounded up to a multiple of what the mesh divides rows over.
      text: the source's `bigmed.data.texts.Texts`, where `predict_fn` reads them; the features of
        records without text are zeros.
      cache_dir: where to keep the features; None to not keep them.
      cache_key: all else that they depend on: weights, layer, preprocessing.
      quiet: whether no progress is shown.

    Returns:
      float32 [N, D], the same on every process.

    Raises:
      NonFiniteError: a feature is not finite.
      UserError: an image cannot be read.
    """
    path = None
    if cache_dir is not None:
        identity = [CACHE_FORMAT, cache_key, source.fingerprint, canvas, channels]
        name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
        path = pathlib.Path(cache_dir) / f"{name}.npz"
        kept = _load(path, len(source))
        if sharding.everywhere(kept is not None):
            return kept
    batch_size = _round_up(batch_size, mesh)
    block, num_blocks = sharding.host_block(mesh)
    batches = evaluation_batches(
        source,
        canvas=canvas,
        channels=channels,
        batch_size=batch_size,
        block=block,
        num_blocks=num_blocks,
        **({"text": text} if text else {}),
    )
    num_batches = math.ceil(len(source) / batch_size)
    usable = text.has_text if text else np.ones(len(source), bool)
    progress = None
    if jax.process_index() == 0 and not quiet:
        progress = metrics.Progress(f"features of {source.name}", num_batches)
    features = _compute(predict_fn, state, source, mesh, batches, usable, progress)
    if path is not None and jax.process_index() == 0:
        write_npz(path, x=features)
    return features


def _round_up(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    return max(math.ceil(batch_size / shards), 1) * shards


def _compute(
    predict_fn: PredictFn,
    state: Any,
    source: Any,
    mesh: jax.sharding.Mesh,
    batches: Iterable[Mapping[str, np.ndarray]],
    usable: np.ndarray,
    progress: metrics.Progress | None,
) -> np.ndarray:
    predict, rows = jax.jit(predict_fn), sharding.batch_sharding(mesh)
    features, seen = None, np.zeros(len(source), bool)
    num_done, began = 0, time.monotonic()

    def store_oldest() -> None:
        nonlocal features, num_done
        x, record, mask = map(on_host, in_flight.popleft())
        x, record = x[mask].astype(np.float32), record[mask]
        x[~usable[record]] = 0.0
        finite = np.isfinite(x).all(axis=1)
        if not finite.all():
            raise NonFiniteError(
                f"the features of record {record[np.argmin(finite)]} of '{source.name}' are not "
                "finite"
            )
        if features is None:
            features = np.empty((len(source), x.shape[1]), np.float32)
        features[record], seen[record] = x, True
        num_done += 1
        if progress is not None:
            speed = seen.sum() / (time.monotonic() - began)
            progress.update(num_done, f"{speed:.1f} images/s")

    in_flight: collections.deque = collections.deque()
    for host_batch in batches:
        batch = sharding.put_batch(host_batch, rows)
        in_flight.append((predict(state, batch), batch["record"], batch["mask"]))
        if len(in_flight) > IN_FLIGHT:
            store_oldest()
    while in_flight:
        store_oldest()
    if progress is not None:
        progress.close()
    if features is None or not seen.all():
        raise RuntimeError(f"'{source.name}' gave {seen.sum()} of its {len(source)} records")
    return features


def on_host(array: Any) -> np.ndarray:
    """The whole of a global array, on every process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _load(path: pathlib.Path, num_records: int) -> np.ndarray | None:
    """The features kept at `path`; None where there are none, or none that can be trusted."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            features = file["x"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("kept features %s are damaged and are made anew (%s)", path.name, error)
        return None
    if features.ndim != 2 or len(features) != num_records or features.dtype != np.float32:
        log.warning("kept features %s do not fit the data and are made anew", path.name)
        return None
    return features


def write_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays so that a reader finds the whole file or none."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = metrics.temporary_for(path)
    try:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
