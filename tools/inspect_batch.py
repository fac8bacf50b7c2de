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
from absl import app, flags

from bigmed import augment, errors, main, pictures, sharding, train
from bigmed.stages import prepare_stage

OUT = flags.DEFINE_string("out", "batch.png", "The PNG to write.")
STAGE = flags.DEFINE_string("stage", None, "The stage whose batches to draw.")
STEP = flags.DEFINE_integer("step", 0, "Which batch.")
ROWS = flags.DEFINE_integer("rows", 8, "How many items of it.")
DRAWS = flags.DEFINE_integer("draws", 4, "How many times to augment each.")


def draw(argv: list[str]) -> int:
    """Parses the flags, writes the picture and returns the exit code."""
    try:
        workdir = main.parse(argv)
        config = main.CONFIG.value
        stages = [s for s in config.stages if config.stage[s].steps or config.stage[s].epochs]
        name = STAGE.value or (stages or config.stages)[0]
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        stage_config = prepare_stage(config, name, config.seeds[0], workdir)
        stage = train.build_stage(name, stage_config, workdir / "inspect", mesh)
        batch = {k: v[: ROWS.value] for k, v in stage.pipeline.host_batch(STEP.value).items()}
        settings = augment.from_config(stage_config.augment)
        viewable = dataclasses.replace(settings, normalize="none")
        sheet = pictures.augmentation(batch, viewable, DRAWS.value)
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
