"""What ingest's worker processes do: look at files, and encode shards of rows."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np

from bigmed.data import images, schema, writer
from bigmed.data.manifest import Row

# Reasons for which a row is left out, beside those of images.py.
MISSING_FILE, UNREADABLE = "missing file", "unreadable file"


@dataclasses.dataclass(frozen=True)
class PixelConfig:
    """The store's choices once the whole source has been seen."""

    size: int
    resize: str
    format: str
    bits: int
    channels: int
    has_masks: bool


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard: which rows, and where to."""

    path: pathlib.Path
    rows: tuple[Row, ...]
    pixels: PixelConfig

    @property
    def result_path(self) -> pathlib.Path:
        return self.path.with_suffix(".done")


def probe_files(jobs: list[tuple[str, bool, bool]]) -> list[tuple[images.Header | str, str]]:
    """(header or reason, sha256 or "") of each file; hashed only where another has its size."""
    found = []
    for path, exists, same_size in jobs:
        sha256 = ""
        try:
            if not exists:
                raise images.BadImage(MISSING_FILE)
            with open(path, "rb") as file:
                header = images.probe(file)
            if same_size:
                with open(path, "rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except images.BadImage as bad:
            header = str(bad)
        except OSError:
            header = UNREADABLE
        found.append((header, sha256))
    return found


def encode_shard(task: ShardTask) -> int:
    """Writes a shard, then its result file, by which it counts as done."""
    kept: list[int] = []
    bad: list[tuple[int, str, str]] = []
    coloured = False

    def records() -> Iterator[bytes]:
        nonlocal coloured
        for row in task.rows:
            try:
                image, values = _record(row, task.pixels)
            except images.BadImage as error:
                bad.append((row.number, row.file, str(error)))
            else:
                kept.append(row.number)
                coloured = coloured or images.is_coloured(image)
                yield schema.encode_example(values)

    shard = writer.write_shard(task.path, records())
    text = json.dumps({"kept": kept, "bad": bad, "bytes": shard.bytes, "coloured": coloured})
    writer.write_atomically(task.result_path, lambda temporary: temporary.write_text(text))
    return len(task.rows)


def _record(row: Row, pixels: PixelConfig) -> tuple[np.ndarray, dict]:
    """The image as it is stored, and the fields of its record.

    Raises:
      BadImage: the image, or its mask, cannot be used.
    """
    shrink_to = None if pixels.resize == "none" else pixels.size
    whole = images.decode(_read(row.path), shrink_to=shrink_to)
    image = images.resize(whole, pixels.size, pixels.resize)
    image = images.unify(image, channels=pixels.channels, bits=pixels.bits)
    values = {
        "image": images.encode(image, pixels.format),
        "image_id": row.file,
        "patient_id": row.patient,
        **dict(row.texts),
    }
    if row.labels:
        values["labels"] = np.array(row.labels, np.int8)
    if pixels.has_masks:
        values["mask"] = schema.NO_MASK
        if row.mask:
            values["mask"] = _mask(row.mask, of=whole.shape[:2], stored=image.shape[:2])
    return image, values


def _mask(path: str, *, of: tuple[int, int], stored: tuple[int, int]) -> bytes:
    """The mask of an image of shape `of`, as 8-bit PNG of the shape that is stored."""
    try:
        mask = images.decode(_read(path))
    except images.BadImage as bad:
        raise images.BadImage(f"mask: {bad}") from bad
    if mask.dtype != np.uint8:
        raise images.BadImage("mask: not 8-bit")
    mask = images.unify(mask, channels=1, bits=8)
    height, width = mask.shape
    # The same proportions, to 2 % and a pixel: masks are often kept at another resolution.
    if abs(height * of[1] - width * of[0]) > 0.02 * height * of[1] + max(of):
        raise images.BadImage("mask: not of the image's proportions")
    return images.encode(images.resize_mask(mask, stored), "png")


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise images.BadImage(MISSING_FILE) from error
    except OSError as error:
        raise images.BadImage(UNREADABLE) from error


class Pool:
    """Ordered map over processes that end with this one, even when it is killed."""

    def __init__(self, workers: int):
        """With one worker no process is started."""
        self._executor = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = concurrent.futures.ProcessPoolExecutor(
                workers, context, initializer=_start_worker
            )

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable, jobs: Sequence) -> Iterator:
        """Results in the order of `jobs`.

        Raises:
          OSError: a worker was killed.
        """
        if not self._executor:
            yield from map(function, jobs)
            return
        try:
            yield from self._executor.map(function, jobs)
        except concurrent.futures.BrokenExecutor as error:
            raise OSError("a worker was killed (out of memory? give fewer --workers)") from error


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
