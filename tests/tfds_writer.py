"""Writes small data sets as TFDS itself writes them, for tests that read foreign directories."""

import pathlib
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import tensorflow_datasets as tfds


class _Examples(tfds.core.GeneratorBasedBuilder):
    """A TFDS data set of given examples."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, features, splits, **kwargs):
        self._features, self._splits = features, splits
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )  # records stay in the order given

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

    def _generate_examples(self, rows):
        yield from enumerate(rows)


def write_tfds(
    folder: pathlib.Path, name: str, features: Mapping, splits: Mapping[str, Sequence[Mapping]]
) -> pathlib.Path:
    """Writes examples (images as encoded bytes), in order; the TFDS directory."""
    _Examples.name = name
    builder = _Examples(
        features=features, splits=splits, data_dir=str(folder), file_format="array_record"
    )
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def png(image: np.ndarray) -> bytes:
    """Lossless encoding of an image, uint8 or uint16, [H, W] grey or [H, W, 3] RGB."""
    if image.ndim == 3:
        image = np.ascontiguousarray(image[..., ::-1])  # OpenCV wants BGR
    return cv2.imencode(".png", image)[1].tobytes()


def tagged_image(tag: int, height: int = 10, width: int = 12) -> np.ndarray:
    """A grey image whose pixels say which one it is."""
    image = (np.arange(height * width).reshape(height, width) * 3 + tag * 7) % 251
    return image.astype(np.uint8)


def write_toy(folder: pathlib.Path, name: str = "toy") -> pathlib.Path:
    """24 training and 6 test images; patient i // 3, the test ones from patient 100 on.

    Image i of a split is `tagged_image(i)` (+ 100 in test). Feature names are not ours.
    """
    features = {
        "img": tfds.features.Image(shape=(None, None, 1)),
        "pid": tfds.features.Text(),
        "study": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "findings": tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "dog", "c"])),
        "vector": tfds.features.Tensor(shape=(2,), dtype=np.int8),
        "age": tfds.features.Scalar(np.int64),
    }

    def row(i: int, patient: int) -> dict:
        return {
            "img": png(tagged_image(i)),
            "pid": f"secret-{patient}",
            "study": f"s{i % 2}",
            "label": i % 2,
            "findings": [0, 2] if i % 2 else [],
            "vector": [(1, 0), (0, -1), (-2, 1)][i % 3],
            "age": 40 + i,
        }

    return write_tfds(
        folder,
        name,
        features,
        {
            "train": [row(i, i // 3) for i in range(24)],
            "test": [row(100 + i, 100 + i // 3) for i in range(6)],
        },
    )


TOY_FIELDS = {"image": "img", "patient_id": "pid", "labels": "label"}
