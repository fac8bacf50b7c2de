"""Near-duplicate images: against brute force, on made and on real images, and the tool's report."""

import base64
import csv
import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_report import Checker
from tfds_writer import write_tfds

from bigmed.data import overlap, phantom, sources
from bigmed.data.decode import decode_onto
from bigmed.errors import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent
SIZE = 128
FILMS = 12


def film(patient, image=0):
    return phantom.render(0, patient, image, SIZE)[0]


def copies(image):
    """The same film as others may hold it."""
    bright = np.clip(image.astype(float) * 0.8 + 30, 0, 255).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    wide = cv2.resize(image, (90, 100), interpolation=cv2.INTER_LINEAR)
    return {
        "recompressed": cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE),
        "smaller": cv2.resize(image, (70, 70), interpolation=cv2.INTER_AREA),
        "larger": cv2.resize(image, (200, 200), interpolation=cv2.INTER_CUBIC),
        "other proportions": wide,
        "brighter, flatter": bright,
        "16 bits": image.astype(np.uint16) * 16,
        "all at once": cv2.imdecode(
            cv2.imencode(".jpg", cv2.resize(bright, (80, 80)), [cv2.IMWRITE_JPEG_QUALITY, 60])[1],
            cv2.IMREAD_GRAYSCALE,
        ),
    }


def found(images, **limits):
    pairs = overlap.near_pairs(overlap.hash_images(images), **limits)
    assert not pairs.mirrored.any()
    return set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))


# -------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("block", [1, 64, overlap.BLOCK])
def test_the_search_is_brute_force_in_any_blocks(monkeypatch, block):
    monkeypatch.setattr(overlap, "BLOCK", block)
    rng = np.random.default_rng(0)
    bits = rng.integers(2, size=(40, 256)).astype(np.uint8)
    for i in range(1, 40, 3):  # 0 to 60 bits away from the one before
        bits[i] = bits[i - 1] ^ (rng.random(256) < i / 160)
    bits[7], bits[9] = 1 - bits[3], bits[3]  # the very opposite, and the same
    turned = rng.integers(2, size=(40, 256)).astype(np.uint8)
    turned[30], turned[9], turned[26] = bits[20], bits[3], bits[25]
    turned[26, :30] ^= 1
    small = rng.integers(256, size=(40, 32, 32)).astype(np.uint8)
    small[1::2] = small[::2] // 2 + rng.integers(40, size=(20, 32, 32), dtype=np.uint8)
    small[9], small[30], small[26] = small[3], small[20, :, ::-1], small[25, :, ::-1]
    hashes = (np.packbits(words, axis=1).view(np.uint64) for words in (bits, turned))
    pairs = overlap.near_pairs(overlap.Hashes(*hashes, small), 40, 0.5)
    flat = small.reshape(40, -1).astype(np.float64)
    r = np.corrcoef(flat, small[:, :, ::-1].reshape(40, -1))
    expected = sorted(
        (int((bits[a] != others[b]).sum()), a, b, mirrored)
        for a in range(40)
        for b in range(a + 1, 40)
        for mirrored, others in ((False, bits), (True, turned))
        if (bits[a] != others[b]).sum() <= 40 and r[a, b + 40 * mirrored] >= 0.5
    )
    assert len(expected) > 5 and {(0, 3, 9, False), (0, 20, 30, True), (30, 25, 26, True)} <= set(
        expected
    )
    assert list(zip(pairs.distance, pairs.a, pairs.b, pairs.mirrored, strict=True)) == expected
    correlated = r[pairs.a, pairs.b + 40 * pairs.mirrored]
    np.testing.assert_allclose(pairs.correlation, correlated, rtol=1e-5)


def test_a_hash_says_which_neighbour_is_brighter():
    rng = np.random.default_rng(0)
    grid = rng.permutation(272).reshape(16, 17) * np.float32(0.9)
    image = np.kron(grid, np.ones((8, 8))).astype(np.uint8)  # as it is once it is made small
    hashes = overlap.hash_images([image])
    expected = grid.astype(np.uint8)
    expected = expected[:, :-1] < expected[:, 1:]
    assert np.bitwise_count(hashes.bits).sum() == expected.sum()
    other = image.copy()
    other[40:48] = other[40:48, ::-1]  # one row of the grid
    turned = expected.copy()
    turned[5] = ~expected[5, ::-1]
    differ = np.bitwise_count(hashes.bits ^ overlap.hash_images([other]).bits).sum()
    assert differ == (turned != expected).sum()


def test_copies_are_found_and_other_films_are_not():
    films = [film(i) for i in range(FILMS)] + [film(i, 1) for i in range(FILMS)]
    assert not found(films)
    for name, copy in copies(films[3]).items():
        assert found([*films, copy]) == {(3, len(films))}, name


def test_mirrored_copies_are_found_and_turned_and_cropped_ones_are_not_searched_for():
    image = film(3)
    assert not found([image, np.rot90(image), image[20:-20, 20:-20], 255 - image])
    for name, copy in copies(image[:, ::-1]).items():
        pairs = overlap.near_pairs(overlap.hash_images([film(2), image, copy, film(4)]))
        assert (pairs.a, pairs.b, pairs.mirrored) == (1, 2, True), name
    even = np.concatenate([image[:, :64], image[:, 63::-1]], axis=1)  # as it is in a mirror
    assert found([even, even]) == {(0, 1)}


def test_images_of_one_value_are_like_no_other():
    blank = [np.full((20, 20), value, np.uint8) for value in (0, 0, 255)]
    assert not found([*blank, film(0)])


def test_limits_that_cannot_be_or_find_everything_are_refused(monkeypatch):
    hashes = overlap.hash_images([film(0)] * 12)
    for limits in ({"distance": -1}, {"distance": 257}, {"correlation": 0}, {"correlation": 1.1}):
        with pytest.raises(UserError, match="valid: distance 0 to 256, correlation above 0"):
            overlap.near_pairs(hashes, **limits)
    monkeypatch.setattr(overlap, "MOST_PAIRS", 65)
    with pytest.raises(UserError, match="more than 65 pairs"):
        overlap.near_pairs(hashes)


def test_listed_pairs_of_real_images_are_found_and_no_other_radiographs(shared_data):
    def listed(name, *columns):
        with open(shared_data / name, newline="", encoding="utf-8") as file:
            return [tuple(row[c] for c in columns) for row in csv.DictReader(file)]

    kept = ("cxr_covid/", "cxr_actualmed/", "us_busi/")
    paths = [p for (p,) in listed("manifest.csv", "image_path") if p.startswith(kept)]
    images = []
    for path in paths:
        canvas = np.empty((overlap.CANVAS, overlap.CANVAS, 1), np.uint8)
        height, width = decode_onto(canvas, (shared_data / path).read_bytes())
        images.append(canvas[:height, :width, 0])
    at = {path: i for i, path in enumerate(paths)}
    pairs = listed("near_duplicates.csv", "a", "b")
    known = {tuple(sorted((at[a], at[b]))) for a, b in pairs if a in at and b in at}
    pairs = overlap.near_pairs(overlap.hash_images(images))
    (turned,) = np.flatnonzero(pairs.mirrored)  # of one patient, the same film
    assert paths[pairs.a[turned]].startswith("cxr_actualmed") and pairs.distance[turned] < 8
    got = set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    got.remove((int(pairs.a[turned]), int(pairs.b[turned])))
    assert len(known) == 132 and known <= got
    # Those of ultrasound that are not listed are of the same scene too, by eye.
    assert all(paths[a].startswith("us_busi") for a, _ in got - known)
    assert len(got - known) < 30


# -------------------------------------------------------------------------------------- the report


def png(image):
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Two data sets: `mine` with patients, `public` without; each has copies of films of `mine`."""
    folder = tmp_path_factory.mktemp("sets")
    features = {"image": tfds.features.Image(shape=(None, None, 1))}
    with_ids = {**features, "patient_id": tfds.features.Text()}

    def rows(*images):
        return [{"image": png(image), "patient_id": f"MRN-{p}"} for p, image in images]

    own = [(p, film(p)) for p in range(6)]
    train = [*own, (0, copies(film(0))["brighter, flatter"]), (77, copies(film(1))["smaller"])]
    test = [(50, film(50)), (51, copies(film(2))["all at once"])]
    splits = {"train": rows(*train), "test": rows(*test)}
    mine = write_tfds(folder / "mine", "mine", with_ids, splits)
    public = [film(60), copies(film(3))["recompressed"], copies(film(50))["larger"]]
    public = {"train": [{"image": png(image)} for image in public]}
    return mine, write_tfds(folder / "public", "public", features, public)


def tool(*flags):
    return subprocess.run(
        [sys.executable, "tools/check_overlap.py", *map(str, flags)],
        cwd=REPO, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def test_the_tool_tells_kinds_leaks_and_no_identifiers(two_sets, tmp_path):
    mine, public = two_sets
    flags = ("--data", mine, "--data", public, "--out", tmp_path / "report")
    done = tool(*flags, "--fail_on_leak")
    assert done.returncode == 1, done.stderr
    content = json.loads((tmp_path / "report" / "overlap.json").read_text())
    assert content["counts"] == {
        "across splits": 1, "across data sets": 2, "other patient": 1, "same patient": 1
    }  # fmt: skip
    # of another split: record 2 of train in test, and record 0 of test in public's train
    assert content["leaks"] == 2 and "2 pairs across splits" in done.stdout

    def where(row):
        return [(row[f"set_{s}"], row[f"split_{s}"], row[f"record_{s}"]) for s in "ab"]

    by_kind = {(row["kind"], row["leak"]): row for row in content["pairs"]}
    assert {tuple(sorted(where(row))) for row in content["pairs"]} == {
        (("mine", "train", 0), ("mine", "train", 6)),
        (("mine", "train", 1), ("mine", "train", 7)),
        (("mine", "test", 1), ("mine", "train", 2)),
        (("mine", "train", 3), ("public", "train", 1)),
        (("mine", "test", 0), ("public", "train", 2)),
    }
    same = by_kind["same patient", False]
    assert same["patient_a"] == same["patient_b"]
    assert by_kind["other patient", False]["patient_a"] != same["patient_a"]
    with open(tmp_path / "report" / "overlap.csv", newline="") as file:
        assert [int(row["record_a"]) for row in csv.DictReader(file)] == [
            row["record_a"] for row in content["pairs"]
        ]
    page = (tmp_path / "report" / "overlap.html").read_text()
    checked = Checker(page)
    shown = [value for key, value in checked.attributes if key == "src"]
    assert checked.tags.count("figure") == 5 and len(shown) == 10
    for one, other in zip(shown[::2], shown[1::2], strict=True):
        pictures = [
            base64.b64decode(src.removeprefix("data:image/jpeg;base64,")) for src in (one, other)
        ]
        pictures = [
            cv2.imdecode(np.frombuffer(p, np.uint8), cv2.IMREAD_GRAYSCALE) for p in pictures
        ]
        pictures = [cv2.resize(p, (64, 64), interpolation=cv2.INTER_AREA).ravel() for p in pictures]
        assert np.corrcoef(pictures)[0, 1] > 0.98
    for file in (tmp_path / "report").iterdir():
        assert "MRN" not in file.read_text() and str(mine.parent) not in file.read_text()
    assert "keep it like the data sets" in page


def test_a_mistake_is_one_line_and_exit_2(tmp_path):
    done = tool("--data", "/nowhere", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: data directory not found: /nowhere"


def test_equal_ids_of_two_data_sets_are_not_the_same_people(two_sets):
    source = sources.open_source({"dir": str(two_sets[0]), "split": "train"})
    images = overlap.in_one_row([source, source], [0, 1], ["train", "train"])
    assert not set(images.patients[:8]) & set(images.patients[8:])
    one_set = overlap.in_one_row([source, source], [0, 0], ["train", "test"])
    np.testing.assert_array_equal(one_set.patients[:8], one_set.patients[8:])
