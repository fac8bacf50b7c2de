"""Every image operation against an oracle in NumPy, SciPy, Pillow, OpenCV or colorsys."""

import colorsys
import functools
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from bigmed import image_ops

RNG = np.random.default_rng(0)


def planar(image):
    """[H, W, C] -> [H, C, W], the layout of the operations on resized images."""
    return jnp.asarray(np.swapaxes(image, 1, 2), jnp.float32)


def unplanar(image):
    return np.swapaxes(np.asarray(image), 1, 2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_integers_are_scaled_by_their_greatest_value(dtype):
    top = np.iinfo(dtype).max
    values = image_ops.to_float(jnp.array([0, 1, top], dtype))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [0.0, 1 / top, 1.0], rtol=1e-6)


# Crops


def tensorflow_crop(draws, height, width, area, aspect, min_covered):
    """TensorFlow's kernel as a loop over attempts; float32 as there. None if all attempts fail."""
    f = np.float32
    for u_aspect, u_height, u_top, u_left in draws.T:
        ratio = f(aspect[0]) + u_aspect * (f(aspect[1]) - f(aspect[0]))
        min_area, max_area = f(area[0]) * f(height * width), f(area[1]) * f(height * width)
        h = int(np.rint(np.sqrt(min_area / ratio)))
        max_h = int(np.rint(np.sqrt(max_area / ratio)))
        if np.rint(f(max_h) * ratio) > width:
            max_h = int((width + 0.5 - 1e-7) / ratio)
            if np.rint(f(max_h) * ratio) > width:
                max_h -= 1
        max_h = min(max_h, height)
        h = min(h, max_h)
        if h < max_h:
            h += int(u_height * (max_h - h + 1))
        w = int(np.rint(f(h) * ratio))
        if h * w < min_area:
            h += 1
            w = int(np.rint(f(h) * ratio))
        if h * w > max_area:
            h -= 1
            w = int(np.rint(f(h) * ratio))
        if not (min_area <= h * w <= max_area) or w > width or h > height or w <= 0 or h <= 0:
            continue
        if h * w / (height * width) < min_covered:
            continue
        y = int(u_top * (height - h)) if h < height else 0
        x = int(u_left * (width - w)) if w < width else 0
        return y, x, h, w
    return None


@functools.partial(jax.jit, static_argnames=("area", "aspect"))
def sample(keys, box, area=(0.08, 1.0), aspect=(0.75, 4 / 3)):
    draw = functools.partial(image_ops.sample_crop, area=area, aspect=aspect, min_covered=0.1)
    return jax.vmap(draw, in_axes=(0, None))(keys, box)


uniform = jax.jit(jax.vmap(lambda key: jax.random.uniform(key, (4, image_ops.CROP_ATTEMPTS))))
resize = jax.jit(image_ops.crop_and_resize, static_argnames=("size", "antialias"))
rotate = jax.jit(image_ops.affine)
equalize = jax.jit(image_ops.equalize)


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (3, 5, 40, 90), (7, 0, 101, 33), (0, 0, 12, 12)])
def test_crops_are_those_of_tensorflow(box):
    keys = jax.random.split(jax.random.key(1), 300)
    crops = np.asarray(sample(keys, jnp.array(box)))
    for crop, draws in zip(crops, np.asarray(uniform(keys)), strict=True):
        y, x, h, w = tensorflow_crop(draws, box[2], box[3], (0.08, 1.0), (0.75, 4 / 3), 0.1)
        assert tuple(crop) == (box[0] + y, box[1] + x, h, w)


def test_the_whole_box_is_the_crop_when_no_attempt_fits():
    # an aspect of 3 to 4 and nine tenths of the area do not fit a square
    keys = jax.random.split(jax.random.key(2), 20)
    crops = sample(keys, jnp.array([4, 6, 50, 50]), area=(0.9, 1.0), aspect=(3.0, 4.0))
    assert (np.asarray(crops) == [4, 6, 50, 50]).all()


def test_crop_areas_have_the_distribution_of_the_reference():
    keys = jax.random.split(jax.random.key(3), 20_000)
    crops = np.asarray(sample(keys, jnp.array([0, 0, 256, 256])))
    area = crops[:, 2] * crops[:, 3] / 256**2
    assert area.min() >= 0.1  # not .08: SimCLR's min_object_covered
    assert area.max() <= 1.0
    # simulated for the reference: .42 and .39 (torchvision's sampler: .48 and .475)
    assert area.mean() == pytest.approx(0.42, abs=0.01)
    assert np.median(area) == pytest.approx(0.39, abs=0.01)
    ratio = crops[:, 3] / crops[:, 2]
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, :2] + crops[:, 2:] <= 256).all()


def test_central_crop_of_the_reference():
    # 500 wide and 375 high: 328 x 328 with 86 to the left and 24 above
    crop = image_ops.central_crop(jnp.array([0, 0, 375, 500]), 0.875)
    assert crop.tolist() == [24, 86, 328, 328]
    crop = image_ops.central_crop(jnp.array([10, 20, 500, 375]), 0.875)
    assert crop.tolist() == [10 + 86, 20 + 24, 328, 328]
    assert image_ops.central_crop(jnp.array([0, 0, 32, 32]), 1.0).tolist() == [0, 0, 32, 32]


# Resizing


def bicubic(image, size):
    """Keys' cubic, a = -.5, half-pixel centres, no antialias, renormalised at the edges; float64.

    Pixel by pixel, on an image that is already cropped.
    """

    def kernel(x, a=-0.5):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def axis(image, size):
        length = image.shape[0]
        rows = []
        for i in range(size):
            centre = (i + 0.5) * length / size - 0.5
            first = math.floor(centre) - 1
            taps = [j for j in range(first, first + 4) if 0 <= j < length]
            weights = np.array([kernel(centre - j) for j in taps])
            rows.append(np.tensordot(weights / weights.sum(), image[taps], axes=1))
        return np.stack(rows)

    image = axis(image.astype(np.float64), size)
    return np.swapaxes(axis(np.swapaxes(image, 0, 1), size), 0, 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [(0, 0, 30, 40), (5, 7, 22, 9), (29, 39, 1, 1), (2, 3, 16, 16)])
def test_crop_and_resize(crop, flip):
    image = RNG.random((30, 40, 3))
    top, left, height, width = crop
    expected = bicubic(image[top : top + height, left : left + width], 16)
    expected = expected[:, ::-1] if flip else expected
    got = resize(
        jnp.asarray(image, jnp.float32),
        jnp.array(crop),
        size=16,
        flip=jnp.array(flip),
        antialias=False,
    )
    np.testing.assert_allclose(unplanar(got), expected, atol=3e-6)


@pytest.mark.parametrize("size", [9, 50])
def test_antialiased_resizing_is_pillows(size):
    image = RNG.random((30, 41)).astype(np.float32)
    got = resize(
        jnp.asarray(image[..., None]),
        jnp.array([0, 0, 30, 41]),
        size=size,
        flip=jnp.array(False),
        antialias=True,
    )
    expected = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(unplanar(got)[..., 0], np.asarray(expected), atol=2e-6)


# Equalisation and rotation


def test_equalize_is_opencvs_within_its_rounding():
    image = RNG.integers(30, 200, (20, 24), dtype=np.uint8)
    box = (2, 3, 15, 18)
    inner = np.ascontiguousarray(image[2:17, 3:21])
    got = equalize(image_ops.to_float(jnp.asarray(image[..., None])), jnp.array(box))
    np.testing.assert_allclose(
        np.asarray(got)[2:17, 3:21, 0] * 255, cv2.equalizeHist(inner), atol=0.501
    )


def test_equalize_keeps_the_grey_levels_of_16_bits_and_treats_channels_apart():
    image = RNG.integers(0, 65536, (16, 16, 3), dtype=np.uint16)
    image[..., 2] = 777  # constant: left as it is
    got = np.asarray(equalize(image_ops.to_float(image), jnp.array([0, 0, 16, 16])))
    for channel in range(2):
        levels = image[..., channel].astype(np.float64) / 257
        counts = np.bincount(np.rint(levels).astype(int).ravel(), minlength=256)
        darkest = counts[counts > 0][0]
        table = np.maximum(np.cumsum(counts) - darkest, 0) / (256 - darkest)
        expected = np.interp(levels, np.arange(256), table)
        np.testing.assert_allclose(got[..., channel], expected, atol=1e-4)
    np.testing.assert_allclose(got[..., 2], 777 / 65535, rtol=1e-5)


@pytest.mark.parametrize("degrees", [0.0, 17.0, -45.0, 90.0])
@pytest.mark.parametrize("box", [(0, 0, 20, 24), (3, 2, 15, 10)])
def test_rotate(degrees, box):
    image = RNG.random((20, 24, 2))
    top, left, height, width = box
    inner = image[top : top + height, left : left + width]
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    expected = np.zeros_like(image)
    for channel in range(2):
        expected[top : top + height, left : left + width, channel] = ndimage.affine_transform(
            inner[..., channel],
            matrix,
            offset=centre - matrix @ centre,
            order=1,
            mode="grid-constant",
        )
    got = rotate(jnp.asarray(image, jnp.float32), jnp.array(box), jnp.float32(np.deg2rad(degrees)))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_rotation_is_counter_clockwise():
    image = np.zeros((5, 5, 1), np.float32)
    image[2, 4] = 1  # to the right of the centre
    box = jnp.array([0, 0, 5, 5])
    turned = rotate(jnp.asarray(image), box, jnp.float32(np.pi / 2))
    assert turned[0, 2, 0] == pytest.approx(1.0, abs=1e-5)  # above it


def test_affine_shifts_and_scales_about_the_centre():
    image, degrees, shift, scale = RNG.random((20, 24, 1)), 13.0, (2.25, -1.5), 1.05
    cos, sin = np.cos(np.deg2rad(degrees)) / scale, np.sin(np.deg2rad(degrees)) / scale
    matrix, centre = np.array([[cos, sin], [-sin, cos]]), np.array([9.5, 11.5])
    expected = ndimage.affine_transform(
        image[..., 0], matrix, offset=centre - matrix @ (centre + shift), order=1,
        mode="grid-constant",
    )  # fmt: skip
    got = image_ops.affine(
        jnp.asarray(image, jnp.float32), jnp.array([0, 0, 20, 24]),
        jnp.float32(np.deg2rad(degrees)), shift, scale,
    )  # fmt: skip
    np.testing.assert_allclose(got[..., 0], expected, atol=2e-5)


# Colour


def saturate(pixel, factor):
    """tf.image.adjust_saturation of one pixel."""
    value = max(pixel)
    if value <= 0:
        return pixel
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb(hue, min(max(saturation * factor, 0.0), 1.0), value)


def shift_hue(pixel, turns):
    """tf.image.adjust_hue of one pixel."""
    if max(pixel) <= 0:
        return pixel
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    return colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)


def jitter(image, order, brightness, contrast, saturation, hue, additive):
    """SimCLR's colour jitter one operation after another, float64 [H, W, 3]."""
    for operation in order:
        if operation == image_ops.BRIGHTNESS:
            image = image + brightness if additive else image * brightness
        elif operation == image_ops.CONTRAST:
            mean = image.mean(axis=(0, 1))
            image = (image - mean) * contrast + mean
        elif operation == image_ops.SATURATION:
            image = np.apply_along_axis(saturate, 2, image, saturation)
        else:
            image = np.apply_along_axis(shift_hue, 2, image, hue)
        image = np.clip(image, 0.0, 1.0)
    return image


def test_orders_are_the_24_permutations():
    assert len(set(image_ops.ORDERS)) == 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in image_ops.ORDERS)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("factors", [(1.6, 1.7, 1.5, 0.17), (0.3, 0.4, 0.3, -0.12)])
def test_color_jitter_in_every_order(factors, additive):
    brightness, contrast, saturation, hue = factors
    if additive:
        brightness -= 1.0
    # bicubic interpolation overshoots, so values a little outside [0, 1] come in
    image = RNG.uniform(-0.1, 1.1, (7, 7, 3))
    image[0, 0] = 0.4  # grey, and ties between channels
    image[0, 1] = (0.7, 0.7, 0.2)
    image[0, 2] = (0.2, 0.7, 0.7)

    def apply(order):
        return image_ops.color_jitter(
            planar(image),
            order,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            additive=additive,
        )

    got = jax.jit(jax.vmap(apply))(jnp.arange(24))
    for order, result in zip(image_ops.ORDERS, got, strict=True):
        expected = jitter(image, order, brightness, contrast, saturation, hue, additive)
        np.testing.assert_allclose(unplanar(result), expected, atol=3e-6, err_msg=str(order))


def test_grey_jitter_is_the_colour_jitter_of_replicated_grey():
    image = RNG.uniform(-0.1, 1.1, (7, 7, 1))
    factors = {"brightness": 1.5, "contrast": 1.6, "additive": False}

    def apply(order):
        grey = image_ops.color_jitter(planar(image), order, saturation=None, hue=None, **factors)
        color = image_ops.color_jitter(
            planar(np.repeat(image, 3, 2)), order, saturation=1.7, hue=0.1, **factors
        )
        return grey, color

    grey, color = jax.jit(jax.vmap(apply))(jnp.arange(24))
    np.testing.assert_allclose(np.repeat(grey, 3, 2), color, atol=1e-6)


def test_grayscale():
    image = RNG.random((4, 4, 3))
    expected = image @ np.array([0.2989, 0.5870, 0.1140])
    got = unplanar(image_ops.grayscale(planar(image)))
    for channel in range(3):
        np.testing.assert_allclose(got[..., channel], expected, atol=1e-6)


# Blur and cutout


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (448, 45), (32, 3), (16, 1)])
def test_blur_kernel_width(size, taps):
    assert image_ops.blur_taps(size) == taps
    # a wide Gaussian fills the kernel: count the pixels that one pixel reaches
    row = np.asarray(image_ops.gaussian_matrix(size, jnp.float32(50.0)))[size // 2]
    assert (row > 0).sum() == taps


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_zero_padded_gaussian(sigma):
    size = 64
    image = RNG.random((size, size, 3))
    x = np.arange(-3, 4)
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    expected = ndimage.convolve1d(image, kernel, axis=0, mode="constant")
    expected = ndimage.convolve1d(expected, kernel, axis=1, mode="constant")
    matrix = image_ops.gaussian_matrix(size, jnp.float32(sigma))
    np.testing.assert_allclose(
        unplanar(image_ops.separable(planar(image), matrix)), expected, atol=2e-6
    )


@pytest.mark.parametrize("centre", [(8, 5), (0, 0), (15, 15)])
def test_cutout(centre):
    image = RNG.uniform(0.1, 1.0, (16, 16, 3))
    expected = image.copy()
    y, x = centre[0] - 2, centre[1] - 2
    expected[max(y, 0) : y + 5, max(x, 0) : x + 5] = 0
    got = unplanar(image_ops.cutout(planar(image), jnp.array(centre), 5, np.zeros(image.shape[2])))
    np.testing.assert_allclose(got, expected, atol=1e-7)
