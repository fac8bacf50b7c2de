"""Pixels in and out of files: strict decoding of JPEG, PNG and TIFF, resizing, encoding.

Decoding is Pillow's, because OpenCV returns a grey-filled picture for a truncated JPEG without a
word; OpenCV fills in where Pillow would halve 16-bit colour to 8 bits.
"""

import contextlib
import dataclasses
import io
import warnings
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

RESIZE_POLICIES = ("longer", "shorter", "exact", "none")
JPEG_QUALITY = 95
WINDOW_PERCENTILES = (0.5, 99.5)
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Reasons for which a file is left out, as they stand in quarantine.csv.
EMPTY, NOT_IMAGE, CORRUPT, BOMB, UNSUPPORTED = (
    "empty file",
    "not a JPEG, PNG or TIFF file",
    "corrupt or truncated image",
    "more pixels than any radiograph (decompression bomb?)",
    "unsupported pixel type",
)
_TIFF_PHOTOMETRIC, _TIFF_BITS = 262, 258
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # and every I;16 form
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class BadImage(Exception):
    """A file that cannot be used; the message is the reason, one of the constants above."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What an image file says of itself before its pixels are decoded."""

    channels: int  # 1 or 3; alpha is not counted
    bits: int  # 8 or 16


def probe(file: BinaryIO) -> Header:
    """Channels and bits of an encoded image, from its header alone.

    Raises:
      BadImage: empty, not an image, unreadable header, too many pixels, unsupported pixels.
    """
    with _opened(file) as image:
        return _header(image)


def decode(data: bytes, *, shrink_to: int | None = None) -> np.ndarray:
    """Decodes an image, upright by its EXIF orientation, transparent parts black.

    Args:
      data: a whole JPEG, PNG or TIFF file.
      shrink_to: the caller is going to shrink the image to about this many pixels a side; a large
        JPEG is then decoded at 1/2, 1/4 or 1/8 scale, still at least twice as large as that.

    Returns:
      uint8 or uint16, [H, W] where the image is grey (also by palette), else RGB [H, W, 3].

    Raises:
      BadImage: see `probe`; also any truncation or checksum error anywhere in the file.
    """
    if data[:4] == b"\x89PNG":
        with _opened(io.BytesIO(data)) as image, _refusing_corrupt():
            image.verify()  # checksums of all chunks; the image must be opened again after it
    with _opened(io.BytesIO(data)) as image:
        header = _header(image)
        if shrink_to and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * shrink_to, 2 * shrink_to))
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0
        with _refusing_corrupt():
            image.load()
            image = ImageOps.exif_transpose(image)
        if header.bits == 16:
            pixels = _sixteen_bit(image, header, data)
            # Pillow turns 8-bit white-is-zero TIFF round by itself, but not 16-bit.
            return np.uint16(65535) - pixels if white_is_zero else pixels
        return _eight_bit(image, header)


def resize(pixels: np.ndarray, size: int, policy: str) -> np.ndarray:
    """Resizes [H, W(, C)] by policy; shrinking averages areas, so nothing aliases.

    longer: the longer side becomes `size`; smaller images stay as they are.
    shorter: the shorter side becomes `size`; smaller images stay as they are.
    exact: `size` x `size`, whatever that does to the aspect ratio.
    none: untouched.
    """
    height, width = pixels.shape[:2]
    if policy == "exact":
        target = (size, size)
    elif policy == "none":
        return pixels
    else:
        scale = size / (max(height, width) if policy == "longer" else min(height, width))
        if scale >= 1:
            return pixels
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if target == (width, height):
        return pixels
    shrinks = target[0] <= width and target[1] <= height
    return cv2.resize(pixels, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes a mask [H, W] to `shape` by nearest neighbour, so that no new values appear."""
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def unify(pixels: np.ndarray, *, channels: int, bits: int) -> np.ndarray:
    """Brings an image to a data set's channels and bits.

    8 to 16 bits multiplies by 257, so that white stays white. 16 to 8 bits windows each image
    linearly between its 0.5 and 99.5 percentiles: the raw upper bytes of a 12-bit radiograph in a
    16-bit file would keep 4 bits of it.
    """
    if bits == 16 and pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    elif bits == 8 and pixels.dtype == np.uint16:
        low, high = np.percentile(pixels, WINDOW_PERCENTILES)
        scaled = (pixels.astype(np.float32) - low) * (255.0 / max(high - low, 1.0))
        pixels = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    if channels == 3 and pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if channels == 1 and pixels.ndim == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return pixels


def is_coloured(pixels: np.ndarray) -> bool:
    """Whether an image has colours beyond the rounding of JPEG (2 of 255 levels)."""
    if pixels.ndim == 2:
        return False
    tolerance = 2 if pixels.dtype == np.uint8 else 2 * 257
    red, green, blue = cv2.split(pixels)
    return bool(max(cv2.absdiff(red, green).max(), cv2.absdiff(green, blue).max()) > tolerance)


def encode(pixels: np.ndarray, file_format: str) -> bytes:
    """Encodes uint8 or uint16 [H, W] or RGB [H, W, 3] as 'jpeg' (8-bit, quality 95) or 'png'."""
    if pixels.ndim == 3:
        pixels = pixels[:, :, ::-1]
    if file_format == "jpeg":
        done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    else:
        done, data = cv2.imencode(".png", pixels)
    if not done:
        raise RuntimeError(f"OpenCV could not encode {pixels.dtype} {pixels.shape} {file_format}")
    return data.tobytes()


# --------------------------------------------------------------------------------- inside decoding


def _opened(file: BinaryIO) -> Image.Image:
    """Opens lazily with Pillow; only the three formats, and no more pixels than Pillow's limit."""
    head = file.read(4)
    if not head:
        raise BadImage(EMPTY)
    if not head.startswith(MAGIC):
        raise BadImage(NOT_IMAGE)
    file.seek(0)
    with _refusing_corrupt():
        return Image.open(file, formats=("JPEG", "PNG", "TIFF"))


@contextlib.contextmanager
def _refusing_corrupt():
    """Turns whatever a decoder raises on hostile bytes into BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of half-read tags before it raises
            yield
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(BOMB) from error
    except Exception as error:
        raise BadImage(CORRUPT) from error


def _header(image: Image.Image) -> Header:
    with _refusing_corrupt():
        bits = 16 if image.mode in _SIXTEEN_BIT_MODES else 8
        if image.format == "PNG":
            image.fp.seek(24)  # IHDR's depth and colour type, which Pillow does not hand out
            depth, colour_type = image.fp.read(2)
            bits = 16 if depth == 16 else 8
            if depth == 16 and colour_type == 4:  # grey with alpha, which Pillow calls RGBA
                return Header(1, 16)
        elif image.format == "TIFF":
            if getattr(image, "n_frames", 1) > 1:
                raise BadImage(f"{UNSUPPORTED}: TIFF of several pages")
            depths = image.tag_v2.get(_TIFF_BITS, (1,))
            bits = 16 if max(depths) > 8 else 8
        if image.mode == "F":
            raise BadImage(f"{UNSUPPORTED}: floating point")
        if image.mode == "P":
            palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return Header(1 if (palette == palette[:, :1]).all() else 3, bits)
        grey = image.mode in _GREY_MODES or image.mode.startswith("I;16")
        return Header(1 if grey else 3, bits)


def _eight_bit(image: Image.Image, header: Header) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] from a loaded 8-bit Pillow image."""
    plain = "L" if header.channels == 1 else "RGB"
    if image.has_transparency_data:
        over_black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(over_black, image.convert("RGBA"))
    if image.mode != plain:
        try:
            image = image.convert(plain)
        except ValueError as error:
            raise BadImage(f"{UNSUPPORTED}: {image.mode}") from error
    return np.array(image)


def _sixteen_bit(image: Image.Image, header: Header, data: bytes) -> np.ndarray:
    """uint16 [H, W] or [H, W, 3]: grey from Pillow's pixels, else from OpenCV's."""
    if image.mode in _SIXTEEN_BIT_MODES:
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BadImage(f"{UNSUPPORTED}: values outside 0..65535")
        return pixels.astype(np.uint16)
    buffer = np.frombuffer(data, np.uint8)
    pixels = cv2.imdecode(buffer, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # upright by EXIF too
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != image.size[::-1]:
        raise BadImage(f"{UNSUPPORTED}: 16-bit {image.mode}")
    pixels = pixels[:, :, 0] if header.channels == 1 else np.ascontiguousarray(pixels[:, :, ::-1])
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"), np.float32) / 255
        alpha = alpha if pixels.ndim == 2 else alpha[:, :, None]
        pixels = np.rint(pixels * alpha).astype(np.uint16)
    return pixels
