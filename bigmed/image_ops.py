"""Image operations on one image each, written to be mapped over a batch with `jax.vmap`.

Images on the input canvas are [H, W, C]. `crop_and_resize` gives *row-planar* images [S, C, S]:
row, channel, column. In that layout everything separable (resizing, flipping, blurring) is a matrix
product from the left and one from the right, and the values of a channel lie side by side. All
arithmetic is float32, values are in [0, 1], and boxes are (top, left, height, width) in pixels.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

# tf.image.rgb_to_grayscale
LUMA = (0.2989, 0.5870, 0.1140)
CROP_ATTEMPTS = 100
# Full float32 products also where the hardware's default is coarser (TF32 on GPUs, bf16 on TPUs):
# 16-bit images would lose grey levels.
PRECISION = Precision.HIGHEST


def to_float(images: jax.Array) -> jax.Array:
    """uint8 or uint16 to float32 in [0, 1] (by 255, 65535); float input is only cast."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        return images.astype(jnp.float32) / jnp.iinfo(images.dtype).max
    return images.astype(jnp.float32)


def sample_crop(
    key: jax.Array,
    box: jax.Array,
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    min_covered: float,
) -> jax.Array:
    """A random crop within `box`, drawn as TensorFlow's sample_distorted_bounding_box draws it.

    The aspect (width / height) is uniform, then the integer height is uniform between those that
    the area range allows. Of 100 attempts the first valid one counts; the whole box if there is
    none. torchvision's sampler (area uniform, log-aspect uniform) gives larger crops.

    Args:
      key: PRNG key.
      box: int [4], the valid pixels.
      area: least and greatest area, as fractions of the box's.
      aspect: least and greatest width / height.
      min_covered: crops with less than this fraction of the box's area are rejected.

    Returns:
      int32 [4], the crop in canvas coordinates.
    """
    top, left, box_height, box_width = box.astype(jnp.int32)
    whole = (box_height * box_width).astype(jnp.float32)
    min_area, max_area = area[0] * whole, area[1] * whole
    u_aspect, u_height, u_top, u_left = jax.random.uniform(key, (4, CROP_ATTEMPTS))

    def below(u: jax.Array, n: jax.Array) -> jax.Array:
        """Uniform integers in [0, n); 0 where n is not positive."""
        return jnp.clip(jnp.floor(u * n), 0, jnp.maximum(n - 1, 0)).astype(jnp.int32)

    def rint(x: jax.Array) -> jax.Array:
        return jnp.rint(x).astype(jnp.int32)

    ratio = aspect[0] + u_aspect * (aspect[1] - aspect[0])
    tallest = rint(jnp.sqrt(max_area / ratio))
    # the greatest height whose rounded width still fits
    fitting = jnp.floor((box_width + 0.5 - 1e-7) / ratio).astype(jnp.int32)
    fitting = jnp.where(rint(fitting * ratio) > box_width, fitting - 1, fitting)
    tallest = jnp.where(rint(tallest * ratio) > box_width, fitting, tallest)
    tallest = jnp.minimum(tallest, box_height)
    shortest = jnp.minimum(rint(jnp.sqrt(min_area / ratio)), tallest)
    height = shortest + below(u_height, tallest - shortest + 1)
    # rounding may leave the area range by a row
    height = jnp.where(height * rint(height * ratio) < min_area, height + 1, height)
    height = jnp.where(height * rint(height * ratio) > max_area, height - 1, height)
    width = rint(height * ratio)
    pixels = (height * width).astype(jnp.float32)
    valid = (
        (pixels >= jnp.maximum(min_area, 1.0))
        & (pixels <= max_area)
        & (width <= box_width)
        & (height <= box_height)
        & (pixels / whole >= min_covered)
    )
    # TensorFlow's offsets leave out the last possible one; so do these
    top += below(u_top, box_height - height)
    left += below(u_left, box_width - width)
    first = jnp.stack([top, left, height, width])[:, jnp.argmax(valid)]
    return jnp.where(valid.any(), first, box.astype(jnp.int32))


def central_crop(box: jax.Array, fraction: float) -> jax.Array:
    """The square of `fraction` of the box's shorter side about its centre (SimCLR's evaluation).

    Returns:
      int32 [4]. A box of height 375 and width 500 gives 328 x 328 at (24, 86) for 0.875.
    """
    top, left, height, width = box.astype(jnp.int32)
    side = jnp.rint(fraction * jnp.minimum(height, width)).astype(jnp.int32)
    side = jnp.maximum(side, 1)
    return jnp.stack([top + (height - side + 1) // 2, left + (width - side + 1) // 2, side, side])


def _cubic(x: jax.Array) -> jax.Array:
    """The cubic convolution kernel of Keys (1981) with a = -0.5."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def resize_matrix(
    size: int, canvas: int, start: jax.Array, length: jax.Array, flip: jax.Array, antialias: bool
) -> jax.Array:
    """The matrix [size, canvas] that crops, bicubically resizes and maybe mirrors one axis.

    Half-pixel centres; as in TensorFlow, pixels outside the crop get no weight and the rest is
    renormalised.
    """
    outputs, pixels = jnp.arange(size), jnp.arange(canvas)
    outputs = jnp.where(flip, size - 1 - outputs, outputs)
    inside = (pixels >= start) & (pixels < start + length)
    # Distances from an output's centre (i + .5) * length / size - .5 to the pixels, in units of
    # 1 / (2 * size) of a pixel: exact in integers, so that nothing depends on how it is compiled.
    centres = (2 * outputs + 1) * length - size
    distances = (centres[:, None] - 2 * size * (pixels - start)[None, :]).astype(jnp.float32)
    reach = jnp.maximum(length, size) if antialias else size
    weights = _cubic(distances / (2 * reach))
    weights = jnp.where(inside[None, :], weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def crop_and_resize(
    image: jax.Array, crop: jax.Array, size: int, *, flip: jax.Array, antialias: bool
) -> jax.Array:
    """Crops, resizes bicubically to size x size, and mirrors left-right where `flip` is true.

    Values may leave [0, 1] a little, as bicubic interpolation overshoots.

    Args:
      image: float [H, W, C].
      crop: int [4]. No pixel outside it is read.
      size: S.
      flip: bool scalar.
      antialias: widens the kernel when shrinking.

    Returns:
      float32 [S, C, S].
    """
    height, width, channels = image.shape
    top, left, crop_height, crop_width = crop
    rows = resize_matrix(size, height, top, crop_height, jnp.bool_(False), antialias)
    columns = resize_matrix(size, width, left, crop_width, flip, antialias)
    # [S, H] @ [H, W * C], then [S * C, W] @ [W, S]
    image = jnp.matmul(rows, image.reshape(height, width * channels), precision=PRECISION)
    image = image.reshape(size, width, channels).swapaxes(1, 2)
    image = jnp.matmul(image.reshape(size * channels, width), columns.T, precision=PRECISION)
    return image.reshape(size, channels, size)


def equalize(image: jax.Array, box: jax.Array) -> jax.Array:
    """Histogram equalisation over the pixels of `box`, each channel by itself, with 256 bins.

    A value becomes (cdf(value) - cdf(darkest)) / (pixels - cdf(darkest)), as in OpenCV's
    equalizeHist; between bins (16-bit images) the map is linear. A constant channel stays as it is.
    Takes [H, W, C] in [0, 1] and gives the same; what lies outside the box is of no meaning.
    """
    height, width, channels = image.shape
    rows, columns = _inside(box, jnp.arange(height), jnp.arange(width))
    counted = (rows[:, None] & columns[None, :]).astype(jnp.int32).reshape(-1)
    pixels = counted.sum()

    def one_channel(values: jax.Array) -> jax.Array:
        values = jnp.clip(values, 0.0, 1.0) * 255.0
        bins = jnp.rint(values).astype(jnp.int32)
        counts = jnp.zeros(256, jnp.int32).at[bins].add(counted, mode="promise_in_bounds")
        cdf = jnp.cumsum(counts)
        darkest = counts[jnp.argmax(counts > 0)]
        spread = pixels - darkest
        # pixels outside the box may be darker than the darkest inside it
        table = jnp.maximum(cdf - darkest, 0) / jnp.maximum(spread, 1)
        lower = jnp.minimum(jnp.floor(values), 254.0)
        at = lower.astype(jnp.int32)
        below = table.at[at].get(mode="promise_in_bounds")
        above = table.at[at + 1].get(mode="promise_in_bounds")
        mapped = below + (values - lower) * (above - below)
        return jnp.where(spread > 0, mapped, values / 255.0)

    flat = image.reshape(height * width, channels)
    mapped = [one_channel(flat[:, channel]) for channel in range(channels)]
    return jnp.stack(mapped, axis=1).reshape(image.shape)


def affine(
    image: jax.Array,
    box: jax.Array,
    radians: jax.Array,
    shift: tuple[jax.Array | float, jax.Array | float] = (0.0, 0.0),
    scale: jax.Array | float = 1.0,
) -> jax.Array:
    """Turns what lies in `box` about the box's centre, counter-clockwise, scales and shifts it.

    Bilinear. The box keeps its size. What the moved image leaves open is 0: black, like the
    surround of a radiograph, and unlike repeated edge pixels it draws no streaks.

    Args:
      image: float [H, W, C]. No pixel outside the box [4] is read; the result is 0 there.
      radians, scale: float scalars; a scale above 1 enlarges.
      shift: down and to the right, in pixels.
    """
    height, width, channels = image.shape
    top, left, box_height, box_width = box.astype(jnp.float32)
    centre_y, centre_x = top + (box_height - 1) / 2, left + (box_width - 1) / 2
    y = jnp.arange(height)[:, None] - centre_y - shift[0]
    x = jnp.arange(width)[None, :] - centre_x - shift[1]
    cos, sin = jnp.cos(radians) / scale, jnp.sin(radians) / scale
    source_y = centre_y + cos * y + sin * x
    source_x = centre_x - sin * y + cos * x
    y0, x0 = jnp.floor(source_y), jnp.floor(source_x)
    flat = image.reshape(height * width, channels)
    turned = jnp.zeros(image.shape, jnp.float32)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tap_y, tap_x = y0 + dy, x0 + dx
        weight = (1 - jnp.abs(source_y - tap_y)) * (1 - jnp.abs(source_x - tap_x))
        in_rows, in_columns = _inside(box, tap_y, tap_x)
        weight = jnp.where(in_rows & in_columns, weight, 0.0)
        index = jnp.clip(tap_y, 0, height - 1) * width + jnp.clip(tap_x, 0, width - 1)
        taps = flat.at[index.astype(jnp.int32)].get(mode="promise_in_bounds")
        turned += weight[:, :, None] * taps
    in_rows, in_columns = _inside(box, jnp.arange(height), jnp.arange(width))
    # Besides tidiness: XLA's CPU compiler would otherwise take the sum into the matrix product that
    # follows and write each of the four gathers to memory, ten times slower.
    return jnp.where(in_rows[:, None, None] & in_columns[None, :, None], turned, 0.0)


def _inside(box: jax.Array, y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether rows y and columns x lie within the box."""
    top, left, height, width = box
    return (y >= top) & (y < top + height), (x >= left) & (x < left + width)


def adjust_hsv(
    image: jax.Array, is_saturation: jax.Array, saturation: jax.Array, hue: jax.Array
) -> jax.Array:
    """tf.image.adjust_saturation or adjust_hue of [S, 3, S]: one HSV round trip for either.

    `is_saturation` (bool scalar) says which: the saturation is scaled by the factor and clipped to
    at most 1, or the hue is shifted by turns of the colour circle.
    """
    red, green, blue = image[:, 0], image[:, 1], image[:, 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, (blue - red) * scale + 2.0, (red - green) * scale + 4.0),
    )
    sextant += jnp.where(is_saturation, 0.0, 6.0 * hue)
    # chroma = value * saturation, and a saturation is at most 1
    scaled = jnp.clip(chroma * saturation, 0.0, jnp.maximum(value, 0.0))
    chroma = jnp.where(is_saturation, scaled, chroma)

    def channel(offset: float) -> jax.Array:
        k = sextant + offset
        k = k - 6.0 * jnp.floor(k / 6.0)
        return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=1)


# The four operations of colour jitter and their orders.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
_IDLE = -1


def _program(order: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """An order as slots: two of brightness/contrast, one of HSV, two, one, two; some stay idle."""
    affine, is_saturation = [_IDLE] * 6, []
    used = 0
    for operation in order:
        if operation in (SATURATION, HUE):
            is_saturation.append(operation == SATURATION)
            used = 0
        else:
            affine[2 * len(is_saturation) + used] = operation
            used += 1
    return affine, is_saturation


_AFFINE_SLOTS = np.array([_program(order)[0] for order in ORDERS], np.int32)
_HSV_SLOTS = np.array([_program(order)[1] for order in ORDERS])
_AFFINE_ONLY = np.array([[op for op in o if op in (BRIGHTNESS, CONTRAST)] for o in ORDERS])
_HSV_FIRST = np.array([order[0] in (SATURATION, HUE) for order in ORDERS])


def color_jitter(
    image: jax.Array,
    order: jax.Array,
    *,
    brightness: jax.Array,
    contrast: jax.Array,
    saturation: jax.Array | None,
    hue: jax.Array | None,
    additive: bool,
) -> jax.Array:
    """SimCLR's colour jitter: four operations in the given order, clipped to [0, 1] after each.

    Brightness (times a factor, or plus a shift) and contrast (about the channel's mean, as
    tf.image.adjust_contrast) are both gain * x + bias, and saturation and hue share one HSV round
    trip. Every order fits the fixed sequence of slots in `_program`, so a mapped batch computes two
    HSV round trips and six multiply-adds instead of all four operations four times.

    Args:
      image: float [S, C, S], C = 1 or 3.
      order: int scalar, an index into ORDERS.
      brightness: factor, or shift where `additive`.
      contrast: factor.
      saturation: factor of the HSV saturation; None, with `hue`, to leave both out: they change
        nothing but the clipping on grey images.
      hue: shift in turns.
      additive: adds the brightness (SimCLR v1) instead of multiplying by it (v2).

    Returns:
      float32 [S, C, S] in [0, 1].
    """

    def gain_and_bias(x: jax.Array, operation: jax.Array) -> jax.Array:
        mean = x.mean(axis=(0, 2), keepdims=True)
        brighter = x + brightness if additive else x * brightness
        contrasted = (x - mean) * contrast + mean
        changed = jnp.where(operation == BRIGHTNESS, brighter, contrasted)
        return jnp.where(operation == _IDLE, x, jnp.clip(changed, 0.0, 1.0))

    if saturation is None or hue is None:
        first, second = jnp.asarray(_AFFINE_ONLY)[order]
        clip_first = jnp.asarray(_HSV_FIRST)[order]
        image = jnp.where(clip_first, jnp.clip(image, 0.0, 1.0), image)
        return gain_and_bias(gain_and_bias(image, first), second)

    operations = jnp.asarray(_AFFINE_SLOTS)[order]
    is_saturation = jnp.asarray(_HSV_SLOTS)[order]
    for group in range(3):
        image = gain_and_bias(image, operations[2 * group])
        image = gain_and_bias(image, operations[2 * group + 1])
        if group < 2:
            image = adjust_hsv(image, is_saturation[group], saturation, hue)
            image = jnp.clip(image, 0.0, 1.0)
    return image


def grayscale(image: jax.Array) -> jax.Array:
    """tf.image.rgb_to_grayscale on [S, 3, S], three equal channels kept."""
    red, green, blue = LUMA
    gray = red * image[:, 0] + green * image[:, 1] + blue * image[:, 2]
    return jnp.broadcast_to(gray[:, None, :], image.shape)


def blur_taps(size: int) -> int:
    """Width of SimCLR's blur kernel: 23 at 224 pixels, 45 at 448, 3 at 32."""
    return 2 * (size // 10 // 2) + 1


def gaussian_matrix(size: int, sigma: jax.Array) -> jax.Array:
    """The banded Toeplitz matrix [size, size] of a zero-padded Gaussian blur along one axis."""
    radius = blur_taps(size) // 2
    steps = jnp.arange(-radius, radius + 1)
    offsets = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]

    def bell(x: jax.Array) -> jax.Array:
        return jnp.exp(-(x.astype(jnp.float32) ** 2) / (2.0 * sigma**2))

    return jnp.where(jnp.abs(offsets) <= radius, bell(offsets), 0.0) / bell(steps).sum()


def separable(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Applies matrix [S, S] along the rows and along the columns of image [S, C, S]."""
    size, channels, _ = image.shape
    # [S, S] @ [S, C * S], then [S * C, S] @ [S, S]
    image = jnp.matmul(matrix, image.reshape(size, channels * size), precision=PRECISION)
    image = jnp.matmul(image.reshape(size * channels, size), matrix.T, precision=PRECISION)
    return image.reshape(size, channels, size)


def cutout(image: jax.Array, centre: jax.Array, side: int, fill: np.ndarray) -> jax.Array:
    """Sets a square of `side` pixels about `centre` (row, column) to `fill` [C]; it may stick out.

    DeVries and Taylor, arXiv 1708.04552. Works on [S, C, S].
    """
    start = centre - side // 2
    pixels = jnp.arange(image.shape[0])
    hit = (pixels[:, None] >= start[None, :]) & (pixels[:, None] < start[None, :] + side)
    return jnp.where(hit[:, None, None, 0] & hit[None, None, :, 1], fill[None, :, None], image)
