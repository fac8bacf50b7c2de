"""Pictures of a run for people to look at: augmented views, nearest neighbours, a map of features.

They show what the data sets hold, so they are to be treated likewise; `config.pictures` turns them
off. No identifier and no report text is in them.
"""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import jax
import numpy as np

from bigmed import augment, metrics, train
from bigmed.data import images
from bigmed.data.sources import Source
from bigmed.evaluators.neighbours import Features, Neighbours

log = logging.getLogger("bigmed")

GAP, FRAME, LINE = 4, 3, 16  # pixels between tiles, of a frame, of a line of text
TILE = 112  # pixels of an image among its neighbours
ALIKE, UNLIKE, INK = (46, 160, 110), (200, 90, 40), (150, 150, 150)  # RGB
ITEMS, DRAWS = 4, 3  # of the picture of augmented views
MAP_POINTS = 1500
JPEG_QUALITY = 88


def draw(
    stage: train.Stage, evaluators: Sequence[Any], state: Any, workdir: pathlib.Path
) -> None:
    """Writes the pictures of a stage to `workdir`/pictures, each with a JSON file that tells of it.

    Every process takes part, the main one writes. Evaluators of one test set show the same.
    """
    folder = workdir / "pictures"
    if stage.total_steps and jax.process_index() == 0:
        settings = dataclasses.replace(augment.from_config(stage.config.augment), normalize="none")
        batch = {k: v[:ITEMS] for k, v in stage.pipeline.host_batch(0).items()}
        _write(
            folder,
            f"{stage.label}-views",
            {"kind": "views", "stage": stage.label, "title": "what the network sees in training"},
            augmentation(batch, settings, DRAWS),
        )
    done = set()
    for evaluator in evaluators:
        for found in getattr(evaluator, "neighbours", lambda _: ())(state):
            about = {"kind": "neighbours", "stage": stage.label, "title": found.title}
            if (name := _name(about)) not in done and jax.process_index() == 0:
                _write(folder, name, about, neighbours(found))
            done.add(name)
        for found in getattr(evaluator, "features", lambda _: ())(state):
            about = {"kind": "map", "stage": stage.label, "title": found.title}
            if (name := _name(about)) not in done and jax.process_index() == 0:
                _write(folder, name, {**about, **feature_map(found)})
            done.add(name)


def _name(about: Mapping[str, Any]) -> str:
    return re.sub(r"[^\w.-]+", "-", f"{about['stage']}-{about['kind']}-{about['title']}")


def _write(
    folder: pathlib.Path, name: str, about: Mapping[str, Any], sheet: np.ndarray | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if sheet is not None:
        quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]  # a tenth of a PNG's size
        cv2.imwrite(str(folder / f"{name}.jpg"), sheet[..., ::-1], quality)
        about = {**about, "file": f"{name}.jpg"}
    metrics.replace_text(folder / f"{name}.json", json.dumps(about))


def tile(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W] or [H, W, C], integers or [0, 1], -> uint8 [size, size, 3], aspect kept."""
    if image.dtype.kind == "u":
        image = image.astype(np.float32) / np.iinfo(image.dtype).max
    h, w = image.shape[:2]
    scale = size / max(h, w)
    shape = (max(round(w * scale), 1), max(round(h * scale), 1))
    resized = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    resized = resized.reshape(*resized.shape[:2], -1)
    resized = np.repeat(resized, 3 // resized.shape[-1], axis=-1)
    canvas = np.full((size, size, 3), 32, np.uint8)
    canvas[: shape[1], : shape[0]] = np.rint(np.clip(resized, 0, 1) * 255)
    return canvas


def augmentation(
    batch: Mapping[str, np.ndarray], settings: augment.AugmentConfig, draws: int
) -> np.ndarray:
    """One row an item: stored images, then pairs of augmented views. [H, W, 3] uint8, RGB.

    Args:
      batch: of a pipeline.
      settings: of the views.
      draws: how many pairs.
    """
    size, stored, boxes = settings.size, batch["image"], batch["box"]  # [B, K, H, W, C], [B, K, 4]
    columns = []
    for k in range(stored.shape[1]):
        cropped = [
            image[top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(stored[:, k], boxes[:, k], strict=True)
        ]
        columns.append([tile(image, size) for image in cropped])
    draw_views = jax.jit(lambda key, x, box: augment.augment(settings, key, x, box))
    for i in range(draws):
        for view, k in enumerate((0, -1)):
            key = jax.random.fold_in(jax.random.key(i), view)
            views = np.asarray(draw_views(key, stored[:, k], boxes[:, k]))
            columns.append([tile(image, size) for image in views])
    return _sheet([list(row) for row in zip(*columns, strict=True)])


def neighbours(found: Neighbours) -> np.ndarray:
    """One row an image: it, then its neighbours, their classes below. [H, W, 3] uint8, RGB.

    The frame of a neighbour tells whether it shares a class with the image.
    """
    rows = []
    for q, labels in enumerate(found.query_labels):
        row = [_labelled(found.queries, found.query_rows[q], labels, found.class_names, INK)]
        for record, of_found in zip(found.found_rows[q], found.found_labels[q], strict=True):
            if record < 0:
                row.append(np.zeros((TILE + LINE, TILE, 3), np.uint8))
                continue
            colour = ALIKE if ((labels == 1) & (of_found == 1)).any() else UNLIKE
            row.append(_labelled(found.found, record, of_found, found.class_names, colour))
        rows.append(row)
    return _sheet(rows)


def _labelled(
    source: Source,
    row: int,
    labels: np.ndarray,
    names: Sequence[str],
    colour: tuple[int, int, int],
) -> np.ndarray:
    picture = tile(images.decode(source.read([row])[0]), TILE - 2 * FRAME)
    framed = cv2.copyMakeBorder(picture, *[FRAME] * 4, cv2.BORDER_CONSTANT, value=colour)
    own = [name for name, label in zip(names, labels, strict=True) if label == 1]
    said = (", ".join(own) or "none")[:19]
    line = np.zeros((LINE, TILE, 3), np.uint8)
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(line, said, (2, 11), font, 0.33, (235,) * 3, 1, cv2.LINE_AA)
    return np.concatenate([framed, line])


def _sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Tiles of one size -> one picture."""
    height, width = rows[0][0].shape[:2]
    shape = (len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP, 3)
    sheet = np.zeros(shape, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return sheet


def feature_map(found: Features) -> dict[str, Any]:
    """t-SNE of features, of at most `MAP_POINTS` images: x, y [n], group [n], names.

    The group is the first class that an image has, or 'none' after the last.
    """
    from sklearn.manifold import TSNE  # late: it takes a second

    rows = np.arange(len(found.x))
    if len(rows) > MAP_POINTS:
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:MAP_POINTS])
    x = found.x[rows].astype(np.float64)
    x = (x - x.mean(axis=0)) / max(float(x.std()), 1e-12)
    positive = found.labels[rows] == 1
    group = np.where(positive.any(axis=1), positive.argmax(axis=1), positive.shape[1])
    perplexity = min(30.0, (len(rows) - 1) / 3)
    placed = np.zeros((len(rows), 2))
    if perplexity >= 1 and x.std() > 0:
        placed = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x)
    names = [*found.class_names, "none"]
    return {
        "x": np.round(placed[:, 0], 3).tolist(),
        "y": np.round(placed[:, 1], 3).tolist(),
        "group": group.tolist(),
        "names": names[: int(group.max()) + 1],
    }
