"""Draws what the model sees: the images of one batch, and their augmented views.

    python tools/inspect_batch.py --config configs/quickstart.py --workdir DIR --out batch.png

Each row is one item: the image (or the two images of a case) as stored, then `--draws` pairs of
views. The stage is the first one that trains, or `--stage`. Nothing is trained or downloaded; the
synthetic data set is made in the workdir if the config wants it. The picture shows what the data
set holds, so treat it likewise.
"""

import dataclasses
import pathlib
import sys

import cv2
import jax
import numpy as np
from absl import app, flags

from bigmed import augment, curriculum, errors, main, sharding, train

OUT = flags.DEFINE_string("out", "batch.png", "The PNG to write.")
STAGE = flags.DEFINE_string("stage", None, "The stage whose batches to draw.")
STEP = flags.DEFINE_integer("step", 0, "Which batch.")
ROWS = flags.DEFINE_integer("rows", 8, "How many items of it.")
DRAWS = flags.DEFINE_integer("draws", 4, "How many times to augment each.")
GAP = 4  # pixels between tiles


def tile(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, C] uint8, uint16 or float in [0, 1] -> [size, size, 3] uint8, aspect kept."""
    if image.dtype.kind == "u":
        image = image.astype(np.float32) / np.iinfo(image.dtype).max
    h, w = image.shape[:2]
    scale = size / max(h, w)
    shape = (max(round(w * scale), 1), max(round(h * scale), 1))
    resized = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    resized = np.repeat(resized.reshape(*resized.shape[:2], -1), 3 // image.shape[-1], axis=-1)
    canvas = np.full((size, size, 3), 32, np.uint8)
    canvas[: shape[1], : shape[0]] = np.rint(np.clip(resized, 0, 1) * 255)
    return canvas


def montage(batch: dict[str, np.ndarray], settings: augment.AugmentConfig, draws: int):
    """One row an item: stored images, then the augmented views. [H, W, 3] uint8, RGB."""
    size = settings.size
    images, boxes = batch["image"], batch["box"]  # [B, K, H, W, C], [B, K, 4]
    columns = []
    for k in range(images.shape[1]):
        cropped = [
            image[top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(images[:, k], boxes[:, k], strict=True)
        ]
        columns.append([tile(image, size) for image in cropped])
    draw = jax.jit(lambda key, x, box: augment.augment(settings, key, x, box))
    for i in range(draws):
        for view, k in enumerate((0, -1)):
            key = jax.random.fold_in(jax.random.key(i), view)
            views = np.asarray(draw(key, images[:, k], boxes[:, k]))
            columns.append([tile(image, size) for image in views])
    height, width = len(columns[0]), len(columns)
    sheet = np.zeros((height * (size + GAP) - GAP, width * (size + GAP) - GAP, 3), np.uint8)
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            top, left = y * (size + GAP), x * (size + GAP)
            sheet[top : top + size, left : left + size] = picture
    return sheet


def draw(argv: list[str]) -> int:
    """Parses the flags, writes the picture and returns the exit code."""
    try:
        workdir = main.parse(argv)
        config = main.CONFIG.value
        stages = [s for s in config.stages if config.stage[s].steps or config.stage[s].epochs]
        name = STAGE.value or (stages or config.stages)[0]
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        stage_config = curriculum.prepare_stage(config, name, config.seeds[0], workdir)
        stage = train.build_stage(name, stage_config, workdir / "inspect", mesh)
        batch = {k: v[: ROWS.value] for k, v in stage.pipeline.host_batch(STEP.value).items()}
        settings = augment.from_config(stage_config.augment)
        viewable = dataclasses.replace(settings, normalize="none")
        sheet = montage(batch, viewable, DRAWS.value)
        out = pathlib.Path(OUT.value)
        if not cv2.imwrite(str(out), sheet[..., ::-1]):
            raise errors.UserError(f"--out {out} cannot be written; give a .png in a folder")
        print(f"{out}: {len(batch['image'])} items of '{name}', batch {STEP.value}")
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return errors.EXIT_USER_ERROR
    return errors.EXIT_OK


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(draw(sys.argv))
