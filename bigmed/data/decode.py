"""Encoded images onto fixed canvases, a batch at a time, on all cores."""

import os
import threading
from collections.abc import Sequence
from concurrent import futures

import cv2
import numpy as np

from bigmed.data.records import Records

# The pipeline's own threads are the parallelism: OpenCV's would compete with them.
cv2.setNumThreads(1)

_SPAN = 16  # images that a thread takes at a time


def decode_onto(canvas: np.ndarray, encoded: bytes) -> tuple[int, int]:
    """Decodes an image into the top-left corner of a canvas and fills the rest with zeros.

    An image larger than the canvas is averaged down (area resampling) to fit, its aspect kept.
    Grey becomes RGB by repetition, RGB grey by its luma; 16 bits become 8 by the upper byte, 8
    become 16 times 257, so that white stays white. EXIF rotation is ignored, as TFDS does.

    Args:
      canvas: uint8 or uint16 [H, W, C] with C 1 or 3; written in full.
      encoded: a JPEG, PNG or TIFF.

    Returns:
      Height and width of the valid pixels.

    Raises:
      ValueError: not an image that can be decoded.
    """
    height, width, channels = canvas.shape
    flags = cv2.IMREAD_IGNORE_ORIENTATION
    flags |= cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    if canvas.dtype == np.uint16:
        flags |= cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise ValueError("the image cannot be decoded")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels are {image.dtype}; valid: uint8, uint16")
    h, w = image.shape[:2]
    scale = min(height / h, width / w)
    if scale < 1:
        h, w = (max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale))))
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    if channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if image.dtype == canvas.dtype:
        canvas[:h, :w] = image.reshape(h, w, channels)
    else:
        np.multiply(image.reshape(h, w, channels), np.uint16(257), out=canvas[:h, :w])
    canvas[h:] = 0
    canvas[:h, w:] = 0
    return h, w


class BatchDecoder:
    """Reads and decodes the images of a batch into one array.

    Threads take spans of the batch: element-wise loading and batching, as grain does it by itself,
    reaches half the images a second. Pickles without its threads.
    """

    def __init__(
        self, sources: Sequence[Records], canvas: int, channels: int, bits: int, threads: int
    ):
        self._sources = tuple(sources)
        self._image_shape = (canvas, canvas, channels)
        self._dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
        self._threads = threads
        self._pool: futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __reduce__(self):
        canvas, _, channels = self._image_shape
        bits = 8 * self._dtype.itemsize
        return BatchDecoder, (self._sources, canvas, channels, bits, self._threads)

    def __call__(self, source: np.ndarray, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images of a batch.

        Args:
          source: int [N], number of each image's source.
          records: int [N], its record there; -1 for no image (zeros, box of the whole canvas).

        Returns:
          images uint8 or uint16 [N, H, W, C], boxes int32 [N, 4] (top, left, height, width).

        Raises:
          UserError: a record cannot be read or decoded; it is named.
        """
        images = np.empty((len(records), *self._image_shape), self._dtype)
        boxes = np.zeros((len(records), 4), np.int32)
        boxes[:, 2:] = self._image_shape[:2]
        images[records < 0] = 0
        order = np.lexsort((records, source))
        order = order[records[order] >= 0]
        spans = [order[i : i + _SPAN] for i in range(0, len(order), _SPAN)]
        if self._threads <= 1:
            for span in spans:
                self._decode_span(span, source, records, images, boxes)
        else:
            pool = self._started_pool()
            jobs = [
                pool.submit(self._decode_span, span, source, records, images, boxes)
                for span in spans
            ]
            for job in jobs:
                job.result()
        return images, boxes

    def _decode_span(self, span, source, records, images, boxes) -> None:
        """Fills images and boxes at the places `span`."""
        for number in np.unique(source[span]).tolist():
            held_by, slots = self._sources[number], span[source[span] == number].tolist()
            # First all reads, then all decodes: in turns they cost a seventh more (code caches).
            encoded = held_by.read("image", records[slots].tolist())
            for slot, image in zip(slots, encoded, strict=True):
                try:
                    boxes[slot, 2:] = decode_onto(images[slot], image)
                except ValueError as error:
                    raise held_by.error(records[slot], str(error)) from None

    def _started_pool(self) -> futures.ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = futures.ThreadPoolExecutor(self._threads, "bigmed-decode")
            return self._pool


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
