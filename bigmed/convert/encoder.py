"""An encoder ready to use, for people who only want embeddings."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from bigmed import augment, networks, tree
from bigmed.convert import export
from bigmed.convert import weights as ours
from bigmed.errors import UserError
from bigmed.models.catalogue import build


class Encoder:
    """Images -> features, with the preprocessing that bigmed evaluates with.

        encoder = Encoder.load("RUN", "01_simclr")
        features = encoder(images)  # uint8 [B, H, W, C] -> float32 [B, D]

    Attributes:
      channels: C of the images.
      canvas: the size that data sets are put on, larger images being shrunk, before they get here.
      feature_dim: D.
    """

    def __init__(self, weights: ours.Weights):
        module = build(weights.model)
        if hasattr(module, "vocab_size"):
            raise UserError(f"a {weights.model['name']} encodes texts; this takes images")
        form = {key: getattr(weights, key) for key in augment.PREPROCESSING}
        settings = augment.AugmentConfig(**form)
        self.channels, self.feature_dim = weights.channels, module.feature_dim
        self.canvas = weights.canvas or math.ceil(settings.size / settings.eval_crop)
        self._variables = jax.device_put(tree.unflatten(weights.leaves))

        def embed(variables: dict, images: jax.Array, boxes: jax.Array) -> jax.Array:
            views = augment.eval_transform(settings, images, boxes)
            return module.apply(variables, views, train=False)[0]

        self._embed = jax.jit(embed)

    @classmethod
    def load(
        cls,
        folder: str | pathlib.Path,
        stage: str | None = None,
        network: str = networks.STUDENT,
    ) -> "Encoder":
        """From a folder of tools/import_weights.py, or a run's workdir and one of its stages.

        Args:
          folder: of either.
          stage: of a run that has several.
          network: of a run: 'student', or 'teacher' where its objective has one.

        Raises:
          UserError: it is neither; or see `export.from_run` and `weights.load`.
        """
        folder = pathlib.Path(folder)
        if (folder / ours.DESCRIPTION).is_file():
            if stage is not None or network != networks.STUDENT:
                raise UserError(
                    f"{folder} is of tools/import_weights.py: it has no stages, and one network"
                )
            return cls(ours.load(folder))
        return cls(export.from_run(folder, stage, network)[0])

    def __call__(self, images: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
        """Features of a batch.

        Args:
          images: uint8, uint16, or float in [0, 1], [B, H, W, C].
          boxes: int [B, 4], (top, left, height, width) of the valid pixels; None: all are.

        Returns:
          float32 [B, D].

        Raises:
          UserError: another number of channels, or pixels of another kind.
        """
        if images.ndim != 4 or images.shape[-1] != self.channels:
            raise UserError(
                f"images of shape {images.shape}: the encoder takes [B, H, W, {self.channels}]"
            )
        if images.dtype not in (np.uint8, np.uint16):
            floating = images.dtype.kind == "f" and images.size and images.max() <= 1
            if not floating:
                raise UserError(
                    f"images of {images.dtype} up to {images.max()}: valid: uint8, uint16, or "
                    "floats in [0, 1]"
                )
        if boxes is None:
            boxes = np.tile(np.array([0, 0, *images.shape[1:3]], np.int32), (len(images), 1))
        return np.asarray(self._embed(self._variables, jnp.asarray(images), jnp.asarray(boxes)))
