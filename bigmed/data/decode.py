"""Encoded images onto a fixed canvas."""

import cv2
import numpy as np

# The pipeline's own threads are the parallelism: OpenCV's would compete with them.
cv2.setNumThreads(1)


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
