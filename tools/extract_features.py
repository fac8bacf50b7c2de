"""Embeddings of a folder of images, or of a prepared data set.

    python tools/extract_features.py --model DIR --data IMAGES --out features.npz
    python tools/extract_features.py --model RUN --stage 02_micle --data DATASET --split test \
        --out features.npz

--model is a folder of tools/import_weights.py or a run's workdir, of which --network teacher takes
the moving average of the network, where its objective has one. --data is a folder of JPEG, PNG
and TIFF files (searched through), or one of tools/prepare_dataset.py. The file holds `features`
float32 [N, D]; and `names`, the files' places in the folder, or `records`, their numbers in the
split, and `labels` where there are any. It is yours to keep safe: names may tell who someone is.
"""

import pathlib
import sys
from collections.abc import Iterator

import command  # beside this file
import numpy as np
from absl import app, flags

from bigmed.errors import UserError

MODEL = flags.DEFINE_string("model", None, "Where the weights are.")
STAGE = flags.DEFINE_string("stage", None, "Of a run that has several.")
NETWORK = flags.DEFINE_enum(
    "network", "student", ["student", "teacher"],
    "Of a run: the one that was trained, or its moving average (C2L, MoCo, BYOL, MoCo v3).",
)  # fmt: skip
DATA = flags.DEFINE_string("data", None, "Where the images are.")
SPLIT = flags.DEFINE_string("split", "train", "Of a prepared data set.")
OUT = flags.DEFINE_string("out", None, "The .npz to write.")
BATCH = flags.DEFINE_integer("batch_size", 64, "Images at a time.")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")

Batches = Iterator[tuple[np.ndarray, np.ndarray, int]]  # images, boxes, how many are real


def _extract() -> None:
    if BATCH.value < 1:
        raise UserError(f"--batch_size={BATCH.value}: valid: 1 and more")
    from bigmed.convert.encoder import Encoder
    from bigmed.evaluators.features import write_npz
    from bigmed.metrics import Progress

    data = pathlib.Path(DATA.value)
    if not data.is_dir():
        raise UserError(f"--data: no folder {data}")
    if pathlib.Path(OUT.value).is_dir():
        raise UserError(f"--out {OUT.value} is a folder; give a file")
    encoder = Encoder.load(MODEL.value, STAGE.value, NETWORK.value)
    prepared = (data / "dataset_info.json").is_file()
    batches, beside = (_of_dataset if prepared else _of_folder)(data, encoder)
    total = len(next(iter(beside.values())))
    progress = Progress(f"features of {data.name}", total, 0)
    features: list[np.ndarray] = []
    for images, boxes, real in batches:
        features.append(encoder(images, boxes)[:real])
        progress.update(min(sum(map(len, features)), total), "")
    progress.close()
    found = np.concatenate(features)
    if not np.isfinite(found).all():
        raise UserError(f"{MODEL.value} gives features that are not finite")
    write_npz(OUT.value, features=found, **beside)
    print(f"{OUT.value}: {found.shape[0]} x {found.shape[1]} features")


def _of_folder(folder: pathlib.Path, encoder) -> tuple[Batches, dict[str, np.ndarray]]:
    from bigmed.data.decode import decode_onto

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"--data {folder} holds no image ({', '.join(SUFFIXES)})")

    def batches() -> Batches:
        for start in range(0, len(files), BATCH.value):
            part = files[start : start + BATCH.value]
            shape = (BATCH.value, encoder.canvas, encoder.canvas, encoder.channels)
            images = np.zeros(shape, np.uint16)
            boxes = np.tile(np.array([0, 0, *shape[1:3]], np.int32), (len(images), 1))
            for i, path in enumerate(part):
                try:
                    boxes[i, 2:] = decode_onto(images[i], path.read_bytes())
                except (ValueError, OSError) as error:
                    raise UserError(f"{path} cannot be read as an image: {error}") from None
            yield images, boxes, len(part)

    return batches(), {"names": np.array([str(path.relative_to(folder)) for path in files])}


def _of_dataset(folder: pathlib.Path, encoder) -> tuple[Batches, dict[str, np.ndarray]]:
    from bigmed.data.pipeline import evaluation_batches
    from bigmed.data.sources import open_source

    source = open_source({"dir": str(folder), "split": SPLIT.value})
    form = {"canvas": encoder.canvas, "channels": encoder.channels}
    loaded = evaluation_batches(source, batch_size=BATCH.value, **form)
    batches = ((b["image"][:, 0], b["box"][:, 0], int(b["mask"].sum())) for b in loaded)
    beside = {"records": np.arange(len(source), dtype=np.int64)}
    if source.class_names:
        beside |= {"labels": source.labels, "classes": np.array(source.class_names)}
    return batches, beside


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(command.run(sys.argv, (MODEL, DATA, OUT), _extract))
