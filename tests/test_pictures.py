"""Pictures of a run: which images are shown, their neighbours, the map of features."""

import json
import types

import numpy as np
import pytest

from bigmed import pictures
from bigmed.data import images
from bigmed.evaluators.neighbours import Features, Neighbours, spread

NAMES = ("effusion", "mass")


def source_of(pixels):
    """Stands in for a `Source`: grey images [N, 40, 40]."""
    return types.SimpleNamespace(
        read=lambda rows: [images.encode(pixels[row], "png") for row in rows]
    )


def test_classes_take_turns_and_the_choice_never_changes():
    labels = np.zeros((50, 3), np.int8)
    labels[:40, 0], labels[40:43, 1] = 1, 1
    labels[0, 1] = 1
    rows = spread(labels, 8)
    assert len(set(rows)) == 8 and (labels[rows].sum(axis=1) > 0).all()
    assert labels[rows, 1].sum() >= 3  # the rare one is not drowned
    np.testing.assert_array_equal(rows, spread(labels, 8))
    assert len(spread(labels)) == 8 and len(spread(np.zeros((5, 2)))) == 0
    assert set(spread(labels[38:43], 99)) == set(range(5))  # no more than there are


def test_neighbours_are_framed_by_whether_they_share_a_class():
    pixels = np.full((4, 40, 40), 90, np.uint8)
    source = source_of(pixels)
    found = Neighbours(
        title="t", queries=source, found=source,
        query_rows=np.array([0]), found_rows=np.array([[1, 2, -1]]),
        query_labels=np.array([[1, -1]]), found_labels=np.array([[[1, 0], [-1, 1], [1, 1]]]),
        class_names=NAMES,
    )  # fmt: skip
    sheet = pictures.neighbours(found)
    step = pictures.TILE + pictures.GAP
    assert sheet.shape == (pictures.TILE + pictures.LINE, 4 * step - pictures.GAP, 3)
    frames = [tuple(sheet[0, i * step + 50]) for i in range(3)]
    assert frames == [pictures.INK, pictures.ALIKE, pictures.UNLIKE]
    inside = sheet[60, [50, step + 50, 2 * step + 50]]
    assert (inside == 90).all() and not sheet[:, 3 * step :].any()  # there was no third
    assert sheet[-10:, :100].max() > 150  # the class in words


def test_the_map_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.array([[1, 0], [0, 1], [0, 0]]), 30, axis=0)
    x = 8 * labels @ rng.normal(size=(2, 16)) + rng.normal(size=(90, 16))
    found = pictures.feature_map(Features("t", x.astype(np.float32), labels, NAMES))
    assert found["names"] == ["effusion", "mass", "none"]
    points, group = np.array([found["x"], found["y"]]).T, np.array(found["group"])
    near = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(near, np.inf)
    assert (group[near.argmin(axis=1)] == group).mean() > 0.95
    json.dumps(found)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_map_of_hardly_any_images(n):
    x = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    found = pictures.feature_map(Features("t", x, np.ones((n, 2)), NAMES))
    assert len(found["x"]) == len(found["y"]) == len(found["group"]) == n


@pytest.mark.parametrize(
    "shape", [(40, 20), (20, 40, 1), (30, 30, 3)], ids=["tall", "wide", "coloured"]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiles_keep_aspect_and_brightness(shape, dtype):
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0
    tile = pictures.tile(np.full(shape, top, dtype), 16)
    assert tile.shape == (16, 16, 3) and tile.dtype == np.uint8
    scale = 16 / max(shape[:2])
    assert (tile[: round(shape[0] * scale), : round(shape[1] * scale)] == 255).all()
    assert (tile == 255).all(axis=2).sum() == round(shape[0] * scale) * round(shape[1] * scale)
