"""Augmentation on the accelerator: a recipe of `image_ops`, drawn afresh for every image.

The order is that of SimCLR (arXiv 2002.05709, appendix A, and its code) with REMEDIS's additions in
front and an affine map after the flip: equalise, rotate, crop and resize, flip, affine, colour
jitter, grayscale, clip, blur, solarise, cutout.

Each example draws from its own key, the caller's folded with the example's global index, and every
decision has a number of its own. So draws do not depend on how the batch is spread over devices,
and switching one operation off leaves the draws of the others alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmed import image_ops
from bigmed.errors import UserError, did_you_mean

_DECIDED = ("flip", "color", "grayscale", "blur", "solarize", "equalize", "cutout")
# Least and greatest valid value of each number.
_RANGES = {
    **{f"{name}_prob": (0.0, 1.0) for name in _DECIDED},
    **dict.fromkeys(("crop_area_min", "crop_area_max"), (1e-4, 1.0)),
    **dict.fromkeys(("crop_aspect_min", "crop_aspect_max"), (0.01, 100.0)),
    **dict.fromkeys(("jitter_brightness", "jitter_contrast", "jitter_saturation"), (0.0, 0.8)),
    **dict.fromkeys(("affine_scale_min", "affine_scale_max"), (0.1, 10.0)),
    **dict.fromkeys(("blur_sigma_min", "blur_sigma_max"), (0.01, 100.0)),
    **dict.fromkeys(("rotation_degrees", "affine_degrees"), (0.0, 180.0)),
    "size": (1, 8192),
    "crop_min_covered": (0.0, 1.0),
    "color_strength": (0.0, 1.25),
    "jitter_hue": (0.0, 0.4),
    "affine_shift": (0.0, 1.0),
    "cutout_size": (0.0, 1.0),
    "cutout_holes": (1, 100),
    "eval_crop": (0.01, 1.0),
}
# Mean and deviation of each channel, subtracted and divided by at the end. Grey images get
# ImageNet's means over the channels.
_MOMENTS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_CHOICES = {
    "random_crop": (True, False),
    "antialias": (True, False),
    "brightness": ("multiply", "add"),
    "blur_sigma_per": ("batch", "image"),
    "grayscale_first": (True, False),
    "cutout_fill": ("black", "mean"),
    "normalize": tuple(_MOMENTS),
}
_WHOLE = ("size", "cutout_holes")
_PAIRS = ("crop_area", "crop_aspect", "blur_sigma", "affine_scale")
PREPROCESSING = ("size", "eval_crop", "antialias", "normalize")  # what `eval_transform` goes by
# What an example draws besides its crop and the places of its holes: one number in [0, 1) for each.
_DRAWS = (
    *("equalize", "rotation", "flip", "color", "order", "brightness", "contrast", "saturation"),
    *("hue", "grayscale", "blur", "sigma", "cutout"),
)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What `augment` and `eval_transform` do; the defaults are SimCLR's (code of v2).

    Raises:
      UserError: a value of the wrong type or out of range.
    """

    size: int = 224  # side of the square output
    random_crop: bool = True  # False: the central crop of `eval_transform`
    crop_area_min: float = 0.08  # of the image's area
    crop_area_max: float = 1.0
    crop_aspect_min: float = 3 / 4  # width / height
    crop_aspect_max: float = 4 / 3
    crop_min_covered: float = 0.1  # crops of less area are rejected, as in SimCLR's code
    antialias: bool = False  # widen the bicubic kernel when shrinking
    flip_prob: float = 0.5
    color_prob: float = 0.8
    color_strength: float = 1.0  # times the reach of each jitter:
    jitter_brightness: float = 0.8
    jitter_contrast: float = 0.8
    jitter_saturation: float = 0.8
    jitter_hue: float = 0.2
    brightness: str = "multiply"  # 'multiply' (SimCLR v2) | 'add' (v1)
    grayscale_prob: float = 0.2
    grayscale_first: bool = False  # before the jitter, not after it
    affine_degrees: float = 0.0  # of the crop, uniform in [-this, this]
    affine_shift: float = 0.0  # up to this part of the side, in both directions
    affine_scale_min: float = 1.0
    affine_scale_max: float = 1.0
    blur_prob: float = 0.5
    blur_sigma_min: float = 0.1  # in pixels of the output
    blur_sigma_max: float = 2.0
    blur_sigma_per: str = "batch"  # one sigma per view of the 'batch' (SimCLR's code) | 'image'
    solarize_prob: float = 0.0
    rotation_degrees: float = 0.0  # uniform in [-this, this]
    equalize_prob: float = 0.0
    cutout_prob: float = 0.0
    cutout_size: float = 0.25  # side of a hole, of the output's
    cutout_holes: int = 1
    cutout_fill: str = "black"  # 'mean': of `normalize`, so that a hole is 0 after it
    eval_crop: float = 0.875  # of the shorter side; 1 keeps all of it
    # SimCLR's networks take pixels in [0, 1]; others' weights: 'imagenet' mean and deviation, or
    # 'half' (to [-1, 1])
    normalize: str = "none"

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            kinds = int if name in _WHOLE else (int, float)
            number = isinstance(value, kinds) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                kind = "a whole number" if name in _WHOLE else "a number"
                raise UserError(f"config.augment.{name}={value!r}: valid: {kind} {low} to {high}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                valid = ", ".join(map(str, choices))
                raise UserError(f"config.augment.{name}={value!r}: valid: {valid}")
        for name in _PAIRS:
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise UserError(
                    f"config.augment.{name}_min={low}: valid: at most {name}_max={high}"
                )


# fmt: off
RECIPES = {
    # SimCLR on photographs. For 32-pixel images SimCLR takes color_strength .5 and no blur.
    "natural": AugmentConfig(),
    # MICLe's dermatology: as SimCLR (reference: secondary source; the strength 1.0 is unverified).
    "derm": AugmentConfig(),
    # MICLe's chest X-rays: half the jitter, rotation to 45 degrees, no blur as it may hide fine
    # texture (secondary source). The crop area .08 to 1 is SimCLR's: the paper's is unverified.
    "cxr": AugmentConfig(color_strength=0.5, rotation_degrees=45.0, blur_prob=0.0),
    # C2L's, of its released code: every jitter .4 and always on, three holes of 32 of 224 pixels.
    # On grey images saturation, hue and grayscale change nothing.
    "c2l": AugmentConfig(
        crop_area_min=0.2, affine_degrees=10.0, grayscale_first=True, color_prob=1.0,
        jitter_brightness=0.4, jitter_contrast=0.4, jitter_saturation=0.4, jitter_hue=0.4,
        blur_prob=0.0, cutout_prob=1.0, cutout_holes=3, cutout_size=1 / 7, cutout_fill="mean",
        normalize="imagenet",
    ),
    # MoCo v2's (arXiv 2003.04297): v1's crop and grayscale, a weaker jitter and a blur.
    "moco_v2": AugmentConfig(
        crop_area_min=0.2, jitter_brightness=0.4, jitter_contrast=0.4, jitter_saturation=0.4,
        jitter_hue=0.1, blur_sigma_per="image", normalize="imagenet",
    ),
    # BYOL's first view (arXiv 2006.07733, appendix B); the second: blur_prob .1, solarize_prob .2.
    "byol": AugmentConfig(
        jitter_brightness=0.4, jitter_contrast=0.4, jitter_saturation=0.2, jitter_hue=0.1,
        blur_prob=1.0, blur_sigma_per="image", normalize="imagenet",
    ),
    # ConVIRT's (arXiv 2010.00747, section 3.1). U: that the crop's .6 to 1 is of the area, and that
    # every image is blurred, with a kernel of a tenth of the side.
    "convirt": AugmentConfig(
        crop_area_min=0.6, affine_degrees=20.0, affine_shift=0.1, affine_scale_min=0.95,
        affine_scale_max=1.05, color_prob=1.0, jitter_brightness=0.4, jitter_contrast=0.4,
        jitter_saturation=0.0, jitter_hue=0.0, grayscale_prob=0.0, blur_prob=1.0,
        blur_sigma_max=3.0, blur_sigma_per="image",
    ),
    # SimCLR's for classifiers (arXiv 2002.05709, B.5).
    "crop_flip": AugmentConfig(color_prob=0.0, grayscale_prob=0.0, blur_prob=0.0),
    # No augmentation: the same as `eval_transform`.
    "none": AugmentConfig(
        random_crop=False, flip_prob=0.0, color_prob=0.0, grayscale_prob=0.0, blur_prob=0.0
    ),
}
# fmt: on


def from_config(config: Mapping[str, Any]) -> AugmentConfig:
    """The recipe that `config['recipe']` names, its fields replaced by the values not None.

    Raises:
      UserError: no such recipe or field, or a value out of range.
    """
    values = {name: value for name, value in config.items() if value is not None}
    recipe = values.pop("recipe", "natural")
    if recipe not in RECIPES:
        raise UserError(f"config.augment.recipe='{recipe}': {did_you_mean(recipe, RECIPES)}")
    fields = [field.name for field in dataclasses.fields(AugmentConfig)]
    for name in values:
        if name not in fields:
            raise UserError(f"config.augment.{name}: no such field; {did_you_mean(name, fields)}")
    return dataclasses.replace(RECIPES[recipe], **values)


def augment(
    config: AugmentConfig,
    key: jax.Array,
    images: jax.Array,
    boxes: jax.Array,
    *,
    first_index: int | jax.Array = 0,
) -> jax.Array:
    """One augmented view of each image; compile it with `jax.jit`, `config` being static.

    Args:
      config: what to do.
      key: PRNG key of this view of this step.
      images: uint8 or uint16 [B, H, W, C], or float in [0, 1]; C = 1 or 3. Hue, saturation and
        grayscale are left out where C = 1, as they change nothing on grey images.
      boxes: int [B, 4], (top, left, height, width) of the valid pixels. Nothing else is read.
      first_index: global index of the first example, where the batch is a part of a larger one.

    Returns:
      float32 [B, S, S, C] in [0, 1] (then normalised), S = config.size.

    Raises:
      ValueError: shapes that do not fit together.
    """
    _check_shapes(images, boxes)
    batch_key, example_key = jax.random.split(key)
    indices = first_index + jnp.arange(len(images))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(example_key, indices)
    view = functools.partial(_view, config, jax.random.uniform(batch_key))
    views = jax.vmap(view)(keys, images, _at_least_a_pixel(boxes)).swapaxes(2, 3)
    return normalize(config, views)


def eval_transform(config: AugmentConfig, images: jax.Array, boxes: jax.Array) -> jax.Array:
    """SimCLR's evaluation: the central square of `eval_crop`, resized bicubically.

    Args:
      config: its `size`, `eval_crop`, `antialias` and `normalize` are used.
      images: as in `augment`.
      boxes: as in `augment`.

    Returns:
      float32 [B, S, S, C] in [0, 1] (then normalised).
    """
    _check_shapes(images, boxes)

    def one(image: jax.Array, box: jax.Array) -> jax.Array:
        crop = image_ops.central_crop(box, config.eval_crop)
        return jnp.clip(_resize(config, image_ops.to_float(image), crop, False), 0.0, 1.0)

    views = jax.vmap(one)(images, _at_least_a_pixel(boxes)).swapaxes(2, 3)
    return normalize(config, views)


def moments(normalization: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float32 [channels], that `normalize` subtracts and divides by."""
    mean, deviation = (np.array(m, np.float32) for m in _MOMENTS[normalization])
    if channels == 1:
        return mean.mean(keepdims=True), deviation.mean(keepdims=True)
    return mean, deviation


def normalize(config: AugmentConfig, images: jax.Array) -> jax.Array:
    """[..., C] in [0, 1] -> what `config.normalize` makes of it."""
    if config.normalize == "none":
        return images
    mean, deviation = moments(config.normalize, images.shape[-1])
    expand = (None,) * (images.ndim - 1)
    return (images - mean[expand]) / deviation[expand]


def _view(
    config: AugmentConfig, batch_draw: jax.Array, key: jax.Array, image: jax.Array, box: jax.Array
) -> jax.Array:
    """One view [S, C, S] of one image [H, W, C]; the row-planar layout is that of `image_ops`."""
    crop_key, holes_key, key = jax.random.split(key, 3)
    draw = dict(zip(_DRAWS, jax.random.uniform(key, (len(_DRAWS),)), strict=True))
    image = image_ops.to_float(image)

    if config.equalize_prob:
        on = draw["equalize"] < config.equalize_prob
        image = jnp.where(on, image_ops.equalize(image, box), image)
    if config.rotation_degrees:
        degrees = _between(-config.rotation_degrees, config.rotation_degrees, draw["rotation"])
        image = image_ops.affine(image, box, jnp.deg2rad(degrees))

    crop = _crop(config, crop_key, box)
    image = _resize(config, image, crop, draw["flip"] < config.flip_prob)

    scales = (config.affine_scale_min, config.affine_scale_max)
    if config.affine_degrees or config.affine_shift or scales != (1, 1):
        image = _affine(config, jax.random.fold_in(key, 0), image)
    recolour = [_maybe_jitter, _maybe_grayscale]
    for change in recolour[::-1] if config.grayscale_first else recolour:
        image = change(config, draw, image)
    image = jnp.clip(image, 0.0, 1.0)

    if config.blur_prob and image_ops.blur_taps(config.size) > 1:
        place = batch_draw if config.blur_sigma_per == "batch" else draw["sigma"]
        sigma = _between(config.blur_sigma_min, config.blur_sigma_max, place)
        blur = image_ops.gaussian_matrix(config.size, sigma)
        # an image that is not blurred is multiplied by the identity, which is exact
        matrix = jnp.where(draw["blur"] < config.blur_prob, blur, jnp.eye(config.size))
        image = jnp.clip(image_ops.separable(image, matrix), 0.0, 1.0)
    if config.solarize_prob:
        on = jax.random.uniform(jax.random.fold_in(key, 1)) < config.solarize_prob
        image = jnp.where(on & (image >= 0.5), 1.0 - image, image)
    if config.cutout_prob and config.cutout_size:
        holed, fill = image, np.zeros(image.shape[1], np.float32)
        if config.cutout_fill == "mean":
            fill = moments(config.normalize, image.shape[1])[0]
        for centre in jax.random.randint(holes_key, (config.cutout_holes, 2), 0, config.size):
            holed = image_ops.cutout(
                holed, centre, round(config.cutout_size * config.size), fill
            )
        image = jnp.where(draw["cutout"] < config.cutout_prob, holed, image)
    return image


def _crop(config: AugmentConfig, key: jax.Array, box: jax.Array) -> jax.Array:
    if not config.random_crop:
        return image_ops.central_crop(box, config.eval_crop)
    return image_ops.sample_crop(
        key,
        box,
        area=(config.crop_area_min, config.crop_area_max),
        aspect=(config.crop_aspect_min, config.crop_aspect_max),
        min_covered=config.crop_min_covered,
    )


def _resize(
    config: AugmentConfig, image: jax.Array, crop: jax.Array, flip: jax.Array | bool
) -> jax.Array:
    return image_ops.crop_and_resize(
        image, crop, config.size, flip=jnp.asarray(flip), antialias=config.antialias
    )


def _affine(config: AugmentConfig, key: jax.Array, image: jax.Array) -> jax.Array:
    size = image.shape[0]
    degrees, down, right, scale = jax.random.uniform(key, (4,))
    reach = config.affine_shift * size
    turned = image_ops.affine(
        image.swapaxes(1, 2),
        jnp.array([0, 0, size, size]),
        jnp.deg2rad(_between(-config.affine_degrees, config.affine_degrees, degrees)),
        (_between(-reach, reach, down), _between(-reach, reach, right)),
        _between(config.affine_scale_min, config.affine_scale_max, scale),
    )
    return turned.swapaxes(1, 2)


def _maybe_grayscale(
    config: AugmentConfig, draw: Mapping[str, jax.Array], image: jax.Array
) -> jax.Array:
    if not config.grayscale_prob or image.shape[1] != 3:
        return image
    return jnp.where(draw["grayscale"] < config.grayscale_prob, image_ops.grayscale(image), image)


def _maybe_jitter(
    config: AugmentConfig, draw: Mapping[str, jax.Array], image: jax.Array
) -> jax.Array:
    strength = config.color_strength
    if not config.color_prob or not strength:
        return image
    names = ["brightness", "contrast"]
    if image.shape[1] == 3 and (config.jitter_saturation or config.jitter_hue):
        names += ["saturation", "hue"]
    reach = {name: strength * getattr(config, f"jitter_{name}") for name in names}
    additive = config.brightness == "add"
    centre = {"brightness": 0.0 if additive else 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0}
    drawn = {
        name: _between(centre[name] - own, centre[name] + own, draw[name])
        for name, own in reach.items()
    }
    jittered = image_ops.color_jitter(
        image,
        jnp.floor(draw["order"] * len(image_ops.ORDERS)).astype(jnp.int32),
        brightness=drawn["brightness"],
        contrast=drawn["contrast"],
        saturation=drawn.get("saturation"),
        hue=drawn.get("hue"),
        additive=additive,
    )
    return jnp.where(draw["color"] < config.color_prob, jittered, image)


def _between(low: float, high: float, place: jax.Array) -> jax.Array:
    return low + (high - low) * place


def _at_least_a_pixel(boxes: jax.Array) -> jax.Array:
    """Rows that only fill up a batch may have empty boxes; they must not become NaN."""
    return jnp.maximum(boxes, jnp.array([[0, 0, 1, 1]], boxes.dtype))


def _check_shapes(images: jax.Array, boxes: jax.Array) -> None:
    if images.ndim != 4 or images.shape[3] not in (1, 3) or boxes.shape != (len(images), 4):
        raise ValueError(
            f"images [B, H, W, 1 or 3] and boxes [B, 4] expected, got {images.shape}, {boxes.shape}"
        )
