"""Recipes and their fields; distributions of the draws; independence of the device count."""

import colorsys
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_dict
from scipy import stats

from bigmed import augment, image_ops
from bigmed.errors import UserError

N = 2048  # examples of a distribution test
STILL = augment.RECIPES["none"]
EVERYTHING = dataclasses.replace(
    augment.RECIPES["cxr"],
    size=32,
    blur_prob=0.5,
    blur_sigma_per="image",
    equalize_prob=0.5,
    cutout_prob=0.5,
    cutout_holes=2,
)

apply = jax.jit(augment.augment, static_argnums=0)


def views(image, *, n=N, seed=0, **fields):
    """`n` views of one float image [S, S, C], whole and unaugmented but for the given fields."""
    size = image.shape[0]
    config = dataclasses.replace(STILL, size=size, eval_crop=1.0, **fields)
    images = jnp.broadcast_to(jnp.asarray(image, jnp.float32), (n, *image.shape))
    boxes = jnp.broadcast_to(jnp.array([0, 0, size, size]), (n, 4))
    # a fresh function, as the cache of compiled ones does not see what a test patches
    draw = jax.jit(functools.partial(augment.augment, config))
    return np.asarray(draw(jax.random.key(seed), images, boxes))


def batch(n=16, size=40, channels=3, dtype=np.uint8):
    """Random images whose valid boxes differ; what lies outside is 0."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, channels)).astype(dtype)
    heights, widths = rng.integers(size // 2, size + 1, (2, n))
    boxes = np.stack([np.zeros(n, int), np.zeros(n, int), heights, widths], 1).astype(np.int32)
    inside = (np.arange(size)[:, None] < heights[:, None, None]) & (
        np.arange(size)[None, :] < widths[:, None, None]
    )
    return images * inside[..., None].astype(dtype), boxes, inside


def assert_probability(hits, probability):
    """Within four standard deviations of the binomial."""
    hits = np.asarray(hits)
    deviation = np.sqrt(probability * (1 - probability) / len(hits))
    assert abs(hits.mean() - probability) < 4 * deviation


def assert_uniform(values, low, high):
    values = np.asarray(values)
    slack = 1e-3 * (high - low)
    assert values.min() >= low - slack
    assert values.max() <= high + slack
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


# Configs


def test_recipes():
    natural, cxr = augment.RECIPES["natural"], augment.RECIPES["cxr"]
    assert (natural.crop_area_min, natural.crop_area_max) == (0.08, 1.0)
    assert (natural.flip_prob, natural.color_prob, natural.color_strength) == (0.5, 0.8, 1.0)
    assert (natural.grayscale_prob, natural.blur_prob, natural.brightness) == (0.2, 0.5, "multiply")
    assert (natural.blur_sigma_min, natural.blur_sigma_max) == (0.1, 2.0)
    assert augment.RECIPES["derm"] == natural
    assert (cxr.color_strength, cxr.rotation_degrees, cxr.blur_prob) == (0.5, 45.0, 0.0)
    assert (cxr.crop_area_min, cxr.flip_prob) == (0.08, 0.5)


def test_recipes_with_other_jitter():
    c2l, moco, convirt = (augment.RECIPES[name] for name in ("c2l", "moco_v2", "convirt"))

    def jitter(recipe):
        return tuple(
            recipe.color_strength * getattr(recipe, f"jitter_{name}")
            for name in ("brightness", "contrast", "saturation", "hue")
        )

    assert jitter(augment.RECIPES["natural"]) == (0.8, 0.8, 0.8, 0.2)
    assert jitter(c2l) == (0.4, 0.4, 0.4, 0.4) and jitter(moco) == (0.4, 0.4, 0.4, 0.1)
    assert jitter(convirt) == (0.4, 0.4, 0.0, 0.0)
    assert [r.color_prob for r in (c2l, moco, convirt)] == [1.0, 0.8, 1.0]
    assert [r.grayscale_prob for r in (c2l, moco, convirt)] == [0.2, 0.2, 0.0]
    assert [r.blur_prob for r in (c2l, moco, convirt)] == [0.0, 0.5, 1.0]
    assert [r.crop_area_min for r in (c2l, moco, convirt)] == [0.2, 0.2, 0.6]
    assert [r.affine_degrees for r in (c2l, moco, convirt)] == [10.0, 0.0, 20.0]
    assert (c2l.cutout_holes, round(c2l.cutout_size * 224)) == (3, 32)
    assert (convirt.blur_sigma_min, convirt.blur_sigma_max) == (0.1, 3.0)
    assert (convirt.affine_shift, convirt.affine_scale_min, convirt.affine_scale_max) == (
        0.1, 0.95, 1.05
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "order"),
    [
        ("c2l", ["crop_and_resize", "affine", "grayscale", "color_jitter", "cutout"]),
        ("convirt", ["crop_and_resize", "affine", "color_jitter", "separable"]),
        ("byol", ["crop_and_resize", "color_jitter", "grayscale", "separable"]),
    ],
)
def test_the_order_of_operations(recipe, order, monkeypatch):
    called = []

    def watch(name):
        operation = getattr(image_ops, name)

        def watched(*args, **kwargs):
            called.append(name)
            return operation(*args, **kwargs)

        monkeypatch.setattr(image_ops, name, watched)

    for name in ("crop_and_resize", "affine", "grayscale", "color_jitter", "separable", "cutout"):
        watch(name)
    config = dataclasses.replace(augment.RECIPES[recipe], size=32)
    images, boxes, _ = batch(n=2)
    jax.eval_shape(functools.partial(augment.augment, config), jax.random.key(0), images, boxes)
    assert list(dict.fromkeys(called)) == order


def test_a_config_overrides_its_recipe_where_it_is_not_none():
    config = ConfigDict({"recipe": "cxr", "size": 96, "rotation_degrees": 10.0})
    config.blur_prob = config_dict.placeholder(float)
    expected = dataclasses.replace(augment.RECIPES["cxr"], size=96, rotation_degrees=10.0)
    assert augment.from_config(config) == expected
    assert augment.from_config({}) == augment.RECIPES["natural"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"recipe": "cxrr"}, ["recipe='cxrr'", "did you mean 'cxr'"]),
        ({"blur_porb": 0.1}, ["blur_porb", "did you mean 'blur_prob'"]),
        ({"flip_prob": 1.5}, ["flip_prob=1.5", "0.0 to 1.0"]),
        ({"flip_prob": "0.5"}, ["flip_prob='0.5'", "a number"]),
        ({"flip_prob": True}, ["flip_prob=True"]),
        ({"size": 0}, ["size=0"]),
        ({"size": 32.5}, ["size=32.5", "a whole number"]),
        ({"crop_area_min": 2.0}, ["crop_area_min=2.0"]),
        ({"crop_area_min": float("nan")}, ["crop_area_min=nan"]),
        ({"crop_area_max": 0.05}, ["crop_area_min=0.08", "crop_area_max=0.05"]),
        ({"crop_aspect_min": 2.0}, ["crop_aspect_min=2.0"]),
        ({"blur_sigma_min": 3.0}, ["blur_sigma_min=3.0", "blur_sigma_max=2.0"]),
        ({"blur_sigma_min": 0.0}, ["blur_sigma_min=0.0"]),
        ({"brightness": "divide"}, ["brightness='divide'", "multiply, add"]),
        ({"blur_sigma_per": "step"}, ["batch, image"]),
        ({"antialias": 1}, ["antialias=1", "True, False"]),
        ({"rotation_degrees": -3.0}, ["rotation_degrees=-3.0"]),
        ({"cutout_size": 1.1}, ["cutout_size=1.1"]),
        ({"eval_crop": 0.0}, ["eval_crop=0.0"]),
    ],
)
def test_mistakes_in_a_config_are_said_in_one_line(config, words):
    with pytest.raises(UserError) as error:
        augment.from_config(config)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected"):
        augment.augment(STILL, jax.random.key(0), jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="expected"):
        augment.eval_transform(STILL, jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 4)))


# Distributions


def test_flip_probability():
    image = np.zeros((4, 4, 1))
    image[:, :2] = 1
    got = views(image, flip_prob=0.5)
    flipped = got[:, 0, 0, 0] == 0
    assert_probability(flipped, 0.5)
    np.testing.assert_array_equal(got[flipped], np.broadcast_to(image[:, ::-1], got[flipped].shape))
    np.testing.assert_array_equal(got[~flipped], np.broadcast_to(image, got[~flipped].shape))


def test_grayscale_probability():
    got = views(np.broadcast_to([0.2, 0.5, 0.8], (2, 2, 3)), grayscale_prob=0.2)
    assert_probability(np.ptp(got[:, 0, 0], axis=-1) == 0, 0.2)


@pytest.mark.parametrize("per", ["image", "batch"])
def test_blur_probability_and_sigma(per):
    point = np.zeros((32, 32, 1))  # three taps
    point[16, 16] = 1
    got = views(point, blur_prob=0.5, blur_sigma_per=per, n=512)
    column = got[:, 15:18, :, 0].sum(axis=2)
    sigmas = np.sqrt(-1 / (2 * np.log(np.maximum(column[:, 0] / column[:, 1], 1e-30))))
    blurred = sigmas > 0.2  # below, the neighbours are 0 in float32
    if per == "image":
        # of sigmas from .1 to 2, those over .2
        assert_probability(blurred, 0.5 * 1.8 / 1.9)
        assert_uniform(sigmas[blurred], 0.2, 2.0)
    else:
        assert_probability(blurred, 0.5)
        assert np.ptp(sigmas[blurred]) < 1e-3
    np.testing.assert_allclose(got.sum(axis=(1, 2, 3)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("form", ["multiply", "add"])
def test_jitter_probability_and_brightness(form):
    # on a constant grey image only the brightness acts
    value = 0.25 if form == "multiply" else 0.5
    got = views(np.full((2, 2, 3), value), color_prob=0.8, color_strength=0.6, brightness=form)[
        :, 0, 0, 0
    ]
    drawn = got / value if form == "multiply" else got - value
    changed = np.abs(drawn - (form == "multiply")) > 1e-5
    assert_probability(changed, 0.8)
    middle = 1.0 if form == "multiply" else 0.0
    assert_uniform(drawn[changed], middle - 0.48, middle + 0.48)


def test_full_strength_draws_factors_from_a_fifth_to_nine_fifths():
    got = views(np.full((2, 2, 1), 0.25), color_prob=1.0)[:, 0, 0, 0] / 0.25
    assert_uniform(got, 0.2, 1.8)


def test_contrast_factor():
    image = np.full((2, 2, 1), 0.25)
    image[0], image[1] = 0.24, 0.26  # brightness scales mean and difference alike
    got = views(image, color_prob=1.0)[:, :, 0, 0]
    assert_uniform((got[:, 1] - got[:, 0]) / (got.mean(axis=1) * 0.08), 0.2, 1.8)


def test_saturation_and_hue():
    color = colorsys.hsv_to_rgb(0.5, 0.5, 0.4)  # brightness keeps hue and saturation
    got = views(np.broadcast_to(color, (2, 2, 3)), color_prob=1.0)[:, 0, 0]
    hsv = np.array([colorsys.rgb_to_hsv(*map(float, pixel)) for pixel in got])
    assert_uniform(hsv[:, 0], 0.3, 0.7)
    assert_uniform(hsv[:, 1] / 0.5, 0.2, 1.8)
    factors = np.concatenate([hsv[:, :2], hsv[:, 2:] / 0.4], axis=1)
    correlation = np.corrcoef(factors.T) - np.eye(3)
    assert np.abs(correlation).max() < 0.1  # each has a draw of its own


def test_orders_and_angles_are_uniform(monkeypatch):
    def show_order(image, order, **factors):
        del factors
        return jnp.zeros_like(image) + order / 24

    def show_angle(image, box, radians):
        del box
        return jnp.zeros_like(image) + (radians / np.pi + 1) / 2

    image = np.zeros((2, 2, 1))
    monkeypatch.setattr(image_ops, "color_jitter", show_order)
    orders = np.rint(views(image, color_prob=1.0)[:, 0, 0, 0] * 24).astype(int)
    counts = np.bincount(orders, minlength=24)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    monkeypatch.setattr(image_ops, "affine", show_angle)
    angles = (views(image, rotation_degrees=45.0)[:, 0, 0, 0] * 2 - 1) * 180
    assert_uniform(angles, -45.0, 45.0)


def test_cutout_probability_and_hole():
    got = views(np.ones((8, 8, 1)), cutout_prob=0.3, cutout_size=0.25, n=1024)
    dark = (got == 0).sum(axis=(1, 2, 3))
    assert_probability(dark > 0, 0.3)
    assert set(dark) == {0, 1, 2, 4}  # two by two, also cut off by the border


def test_solarize_probability():
    got = views(np.array([[[0.2], [0.5]], [[0.7], [1.0]]]), solarize_prob=0.2)[..., 0]
    inverted = got[:, 1, 1] == 0
    assert_probability(inverted, 0.2)
    want = np.array([[0.2, 0.5], [0.3, 0.0]], np.float32)  # what is below one half stays
    np.testing.assert_allclose(got[inverted], np.broadcast_to(want, got[inverted].shape), atol=1e-6)


def test_equalize_probability():
    image = np.linspace(0.4, 0.6, 16).reshape(4, 4, 1)
    got = views(image, equalize_prob=0.5)
    stretched = np.ptp(got, axis=(1, 2, 3)) > 0.9
    assert_probability(stretched, 0.5)


# The whole chain


@pytest.mark.parametrize("recipe", ["natural", "everything"])
def test_draws_are_the_same_on_one_and_on_eight_devices(recipe):
    config = EVERYTHING
    if recipe == "natural":
        config = dataclasses.replace(augment.RECIPES["natural"], size=32)
    images, boxes, _ = batch()
    key = jax.random.key(5)
    alone = apply(config, key, images, boxes)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.jit(functools.partial(augment.augment, config), out_shardings=rows)(
        key, jax.device_put(images, rows), jax.device_put(boxes, rows)
    )
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(alone, spread, atol=1e-6)


def test_a_part_of_a_batch_is_augmented_as_in_the_whole():
    config = dataclasses.replace(augment.RECIPES["natural"], size=32, color_prob=0.0)
    images, boxes, _ = batch()
    key = jax.random.key(5)
    whole = apply(config, key, images, boxes)
    parts = [apply(config, key, images[i:][:8], boxes[i:][:8], first_index=i) for i in (0, 8)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-6)


def test_views_differ_by_example_and_by_key_and_stay_in_range():
    images, boxes, _ = batch()
    images[:], boxes[:] = images[0], boxes[0]
    first, second = (
        np.asarray(apply(EVERYTHING, jax.random.key(i), images, boxes)) for i in (0, 1)
    )
    assert first.dtype == np.float32
    assert first.shape == (16, 32, 32, 3)
    assert min(first.min(), second.min()) >= 0
    assert max(first.max(), second.max()) <= 1
    flat = np.concatenate([first, second]).reshape(32, -1)
    distances = np.abs(flat[:, None] - flat[None]).max(axis=-1)
    assert (distances + np.eye(32) > 0.01).all()


def test_padding_outside_the_box_is_never_read():
    images, boxes, inside = batch()
    noise = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    noisy = np.where(inside[..., None], images, noise)
    key = jax.random.key(3)
    np.testing.assert_array_equal(
        apply(EVERYTHING, key, images, boxes), apply(EVERYTHING, key, noisy, boxes)
    )
    np.testing.assert_array_equal(
        augment.eval_transform(EVERYTHING, images, boxes),
        augment.eval_transform(EVERYTHING, noisy, boxes),
    )


def test_16_bits_and_grey_give_the_same_views_as_8_bits_and_rgb():
    config = dataclasses.replace(
        EVERYTHING, size=16, grayscale_prob=0.0
    )  # its weights sum to .9999
    key = jax.random.key(4)
    grey, boxes, _ = batch(channels=1)
    expected = np.asarray(apply(config, key, grey, boxes))
    wide = grey.astype(np.uint16) * 257
    np.testing.assert_allclose(apply(config, key, wide, boxes), expected, atol=1e-5)
    rgb = apply(config, key, np.repeat(grey, 3, axis=3), boxes)
    np.testing.assert_allclose(rgb, np.repeat(expected, 3, axis=3), atol=1e-5)


def test_an_operation_does_not_change_the_draws_of_the_others():
    images, boxes, _ = batch()
    config = dataclasses.replace(augment.RECIPES["natural"], size=32, color_prob=0.0)
    cut = dataclasses.replace(config, cutout_prob=1.0)
    key = jax.random.key(6)
    plain, holed = apply(config, key, images, boxes), apply(cut, key, images, boxes)
    kept = np.asarray(holed) > 0
    np.testing.assert_allclose(np.asarray(plain)[kept], np.asarray(holed)[kept], atol=1e-6)
    assert kept.mean() > 0.8


def test_no_augmentation_is_the_evaluation_and_both_are_the_central_crop():
    images, boxes, _ = batch()
    config = augment.from_config({"recipe": "none", "size": 24})
    got = np.asarray(augment.eval_transform(config, images, boxes))
    np.testing.assert_allclose(apply(config, jax.random.key(0), images, boxes), got, atol=1e-6)
    for image, box, view in zip(images, boxes, got, strict=True):
        crop = image_ops.central_crop(jnp.asarray(box), 0.875)
        expected = image_ops.crop_and_resize(
            image_ops.to_float(jnp.asarray(image)), crop, 24, flip=jnp.array(False), antialias=False
        )
        np.testing.assert_allclose(view, np.clip(np.swapaxes(expected, 1, 2), 0, 1), atol=1e-6)


def test_empty_boxes_of_filling_rows_stay_finite():
    images, boxes = np.zeros((2, 16, 16, 1), np.uint8), np.zeros((2, 4), np.int32)
    config = dataclasses.replace(EVERYTHING, size=8, color_prob=0.0)
    assert np.isfinite(apply(config, jax.random.key(0), images, boxes)).all()
    assert np.isfinite(augment.eval_transform(config, images, boxes)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_comes_last_in_views_and_in_evaluation(channels):
    image = np.random.default_rng(0).integers(0, 256, (2, 20, 20, channels), np.uint8)
    boxes = np.tile(np.array([0, 0, 20, 20], np.int32), (2, 1))
    plain = augment.from_config({"recipe": "none", "size": 20, "eval_crop": 1.0})
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    if channels == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    for name, expected in (
        ("none", image / 255), ("half", image / 127.5 - 1), ("imagenet", (image / 255 - mean) / std)
    ):  # fmt: skip
        settings = dataclasses.replace(plain, normalize=name)
        views = augment.eval_transform(settings, image, boxes)
        np.testing.assert_allclose(views, expected, rtol=0, atol=2e-5)
        drawn = augment.augment(settings, jax.random.key(0), image, boxes)
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="config.augment.normalize='imagnet'"):
        augment.from_config({"normalize": "imagnet"})


def test_affine_draws_are_uniform_and_independent(monkeypatch):
    def show(image, box, radians, shift, scale):
        del box
        shown = jnp.stack([radians, *shift, jnp.asarray(scale)])
        return jnp.zeros_like(image) + shown[:, None, None][: image.shape[0]] / 10 + 0.5

    monkeypatch.setattr(image_ops, "affine", show)
    got = views(
        np.zeros((4, 4, 1)), affine_degrees=20.0, affine_shift=0.1, affine_scale_min=0.95,
        affine_scale_max=1.05, n=1024,
    )[:, :, 0, 0]  # fmt: skip
    seen = (got - 0.5) * 10
    for column, (low, high) in enumerate(
        ((-np.deg2rad(20), np.deg2rad(20)), (-0.4, 0.4), (-0.4, 0.4), (0.95, 1.05))
    ):
        assert_uniform(seen[:, column], low, high)
    assert np.abs(np.corrcoef(seen.T) - np.eye(4)).max() < 0.15
    shrunk = views(np.zeros((4, 4, 1)), affine_scale_min=0.5, n=64)[:, 3, 0, 0]
    assert_uniform((shrunk - 0.5) * 10, 0.5, 1.0)


def test_c2ls_holes_are_exactly_zero_after_normalising():
    config = dataclasses.replace(augment.RECIPES["c2l"], size=42, affine_degrees=0.0)
    images = np.random.default_rng(0).integers(30, 226, (16, 48, 48, 3), dtype=np.uint8)
    boxes = np.tile([[0, 0, 48, 48]], (16, 1))
    got = np.asarray(apply(config, jax.random.key(0), images, boxes))
    holes = (got == 0).all(axis=-1).sum(axis=(1, 2))
    assert (holes > 9).all() and (holes <= 3 * 6 * 6).all()  # 42 / 7 = 6 pixels a side
    whole = dataclasses.replace(config, cutout_prob=0.0)
    outside = np.asarray(apply(whole, jax.random.key(0), images, boxes))
    np.testing.assert_allclose(np.where(got == 0, 0, outside), got, atol=1e-6)


def test_each_jitter_has_its_own_reach():
    images = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    boxes = np.tile([[0, 0, 24, 24]], (4, 1))
    still = dataclasses.replace(
        augment.RECIPES["none"], size=24, color_prob=1.0, jitter_brightness=0.0,
        jitter_contrast=0.0, jitter_saturation=0.0, jitter_hue=0.0,
    )  # fmt: skip
    want = augment.augment(still, jax.random.key(1), images, boxes)
    for name in ("brightness", "contrast", "saturation", "hue"):
        moved = dataclasses.replace(still, **{f"jitter_{name}": 0.3})
        got = augment.augment(moved, jax.random.key(1), images, boxes)
        assert np.abs(np.asarray(got) - np.asarray(want)).max() > 0.02, name
    without = dataclasses.replace(still, color_prob=0.0)
    plain = augment.augment(without, jax.random.key(1), images, boxes)
    np.testing.assert_allclose(want, plain, atol=1e-6)
