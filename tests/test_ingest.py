"""tools/prepare_dataset.py: what goes in, what comes out, what is left out, and being killed."""

import csv
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bigmed.data import images, schema, writer
from bigmed.data.ingest import StoreConfig, prepare
from bigmed.data.manifest import SourceConfig, read_source
from bigmed.errors import UserError

TOOL = pathlib.Path(__file__).resolve().parent.parent / "tools" / "prepare_dataset.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("prepare_dataset", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*flags):
    """The command, in this process, with one worker: its exit code."""
    return load_tool().main([*map(str, flags), "--workers", "1"])


def smooth(seed, height=24, width=32, channels=1, bits=8):
    """A smooth random picture, uint8 or uint16, that JPEG keeps well."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((4, 4, channels)).astype(np.float32)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture = np.clip(picture.reshape(height, width, channels), 0, 1) * (2**bits - 1)
    return np.squeeze(picture, 2 if channels == 1 else ()).astype(f"uint{bits}")


def save(path, pixels):
    """Writes with OpenCV, RGB; the suffix decides on the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels if pixels.ndim == 2 else pixels[..., ::-1])
    return path


def encoded(pixels, suffix):
    """Encodes with OpenCV, RGB."""
    return cv2.imencode(suffix, pixels if pixels.ndim == 2 else pixels[..., ::-1])[1].tobytes()


def pillow(image, file_format, **options):
    """Encodes with Pillow."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, rows[0])
        out.writeheader()
        out.writerows(rows)
    return path


def read_all(out, split="train"):
    """{image id: example} through TFDS, as any user of TFDS would."""
    source = tfds.builder_from_directory(str(out)).as_data_source(split)
    return {example["image_id"].decode(): example for example in source}


def quarantine(folder):
    with open(folder / "quarantine.csv", newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def folder_of(tmp_path, count, **how):
    for k in range(count):
        save(tmp_path / "in" / f"p{k // 2}_{k}.png", smooth(k, **how))
    return tmp_path / "in"


ALL_TRAIN = ("--fractions", "1,0,0")


# ----------------------------------------------------------------------------------------- folders


def test_class_folder_reads_back_through_tfds(tmp_path):
    pixels = {}
    for k in range(12):
        name = f"{'benign' if k % 3 else 'malign'}/deep/p{k // 2}_{k}.png"
        pixels[name] = smooth(k)
        save(tmp_path / "in" / name, pixels[name])
    out = tmp_path / "My Set-1"
    flags = ("--patient_regex", r"(p\d+)_", "--format", "png", "--fractions", ".5,0,.5")
    assert run("--source", tmp_path / "in", "--out", out, *flags) == 0

    facts = schema.DatasetFacts.read(out)
    assert facts.class_names == ("benign", "malign") and facts.task == "single_label"
    assert facts.name == "my_set_1" and not facts.synthetic
    found, patients = {}, {}
    for split in facts.patients:
        examples = read_all(out, split)
        index = schema.Index.load(schema.index_path(out, split))
        assert len(index) == len(examples) == facts.counts["images"][split]
        for row, (name, example) in enumerate(examples.items()):
            np.testing.assert_array_equal(example["image"][..., 0], pixels[name])
            np.testing.assert_array_equal(
                example["labels"], [name.startswith("benign"), name.startswith("malign")]
            )
            np.testing.assert_array_equal(index.labels[row], example["labels"])
            patient = example["patient_id"].decode()
            assert index.patient_keys[index.patients[row]] == patient == name.split("/")[-1][:2]
            patients.setdefault(split, set()).add(patient)
        found |= examples
    assert set(found) == set(pixels)
    assert len(patients) == 2 and not set.intersection(*patients.values())
    assert facts.split_sha256 == schema.split_sha256(patients)
    assert facts.patients == {split: len(ids) for split, ids in patients.items()}
    assert not (tmp_path / "My Set-1.partial").exists()


def test_flat_folder_has_no_labels_and_each_image_its_patient(tmp_path, capsys):
    source = folder_of(tmp_path, 4)
    assert run("--source", source, "--out", tmp_path / "out", *ALL_TRAIN) == 0
    assert "each image counts as a patient of its own" in capsys.readouterr().out
    facts = schema.DatasetFacts.read(tmp_path / "out")
    assert facts.task == "none" and facts.patients == {"train": 4}
    assert "labels" not in read_all(tmp_path / "out")["p0_0.png"]


def test_split_folders_are_splits(tmp_path):
    for k, name in enumerate(("train/a/0", "train/b/1", "validation/a/2", "test/b/3")):
        save(tmp_path / "in" / f"{name}.png", smooth(k))
    assert run("--source", tmp_path / "in", "--out", tmp_path / "out") == 0
    facts = schema.DatasetFacts.read(tmp_path / "out")
    assert facts.counts["images"] == {"train": 2, "val": 1, "test": 1}
    assert facts.class_names == ("a", "b")


def test_one_folder_a_patient(tmp_path):
    for k in range(4):
        save(tmp_path / "in" / f"anna{k // 2}" / f"{k}.png", smooth(k))
    flags = ("--patient_regex", "^[^/]+", "--no_folder_labels")
    assert run("--source", tmp_path / "in", "--out", tmp_path / "out", *flags, *ALL_TRAIN) == 0
    facts = schema.DatasetFacts.read(tmp_path / "out")
    assert facts.task == "none" and facts.patients == {"train": 2}


def test_no_patient_is_named_on_the_console(tmp_path, capsys):
    for k in range(4):
        save(tmp_path / "in" / f"secret{k}" / f"{k}.png", smooth(k))
    (tmp_path / "in" / "secret0" / "bad.png").write_bytes(b"")
    flags = ("--patient_regex", "^[^/]+", "--max_bad", "1")
    assert run("--source", tmp_path / "in", "--out", tmp_path / "out", *flags) == 0
    assert run("--source", tmp_path / "in", "--out", tmp_path / "b", *flags[:2]) == 2
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err


# ------------------------------------------------------------------------------------------ labels


def manifest(tmp_path, rows):
    for k, row in enumerate(rows):
        row.setdefault("image_path", f"{k}.png")
        save(tmp_path / "m" / row["image_path"], smooth(k))
    return write_csv(tmp_path / "m" / "m.csv", rows)


def test_label_columns_take_every_code(tmp_path):
    cells = [("1", "0"), ("-1.0", ""), ("", "1.0"), (" 0 ", "-1")]
    rows = [{"pid": f"p{k}", "Edema": a, "Mass": b} for k, (a, b) in enumerate(cells)]
    source = manifest(tmp_path, rows)
    flags = ("--patient_column", "pid", "--label_columns", "Mass", "Edema")
    assert run("--source", source, "--out", tmp_path / "out", *flags, *ALL_TRAIN) == 0
    facts = schema.DatasetFacts.read(tmp_path / "out")
    assert facts.class_names == ("Mass", "Edema") and facts.task == "multi_label"
    labels = [example["labels"].tolist() for example in read_all(tmp_path / "out").values()]
    assert labels == [[0, 1], [-2, -1], [1, -2], [-1, 0]]


def test_label_separator_makes_multi_label(tmp_path):
    rows = [{"finding": cell} for cell in ("Mass|Edema", "Edema", "", "None")]
    config = SourceConfig(
        str(manifest(tmp_path, rows)), label_column="finding", label_separator="|",
        classes=("Mass", "Edema"),
    )  # fmt: skip
    found = read_source(config)
    assert found.class_names == ("Mass", "Edema") and found.task == "multi_label"
    assert [row.labels for row in found.rows] == [(1, 1), (0, 1), (-2, -2), (0, 0)]
    assert any("None" in note for note in found.notes)  # a class set aside is said


def test_single_label_column_and_the_order_of_classes(tmp_path):
    rows = [{"dx": cell} for cell in ("nv", "mel", "")]
    path = str(manifest(tmp_path, rows))
    found = read_source(SourceConfig(path, label_column="dx", classes=("nv", "mel")))
    assert [row.labels for row in found.rows] == [(1, 0), (0, 1), (-2, -2)]
    assert found.task == "single_label"
    assert read_source(SourceConfig(path, label_column="dx")).class_names == ("mel", "nv")


def test_texts_views_studies_masks_and_filter(tmp_path):
    lung = np.zeros((12, 16), np.uint8)
    lung[3:9, 4:12] = 255
    save(tmp_path / "m" / "lung.png", lung)
    rows = [
        {"pid": "p", "study": "1", "text": "Größer.", "view": "PA", "mask": "lung.png"},
        {"pid": "p", "study": "2", "text": "", "view": "AP", "mask": ""},
        {"pid": "q", "study": "1", "text": "", "view": "LL", "mask": ""},
        {"pid": "r", "study": "1", "text": "", "view": "PA", "mask": "lung.png"},
    ]
    flags = ["--patient_column", "pid", "--study_column", "study", "--text_column", "text"]
    flags += ["--view_column", "view", "--mask_column", "mask", "--size", "16"]
    flags += ["--filter", "view=PA", "--filter", "view=AP"]
    out = tmp_path / "out"
    assert run("--source", manifest(tmp_path, rows), "--out", out, *flags, *ALL_TRAIN) == 0
    found = list(read_all(out).values())
    assert [example["view"].decode() for example in found] == ["PA", "AP", "PA"]
    assert found[0]["text"].decode() == "Größer."
    np.testing.assert_array_equal(found[0]["mask"][..., 0], lung)  # 32x24 became 16x12
    assert found[1]["mask"].shape == (1, 1, 1)
    index = schema.Index.load(schema.index_path(out, "train"))
    np.testing.assert_array_equal(index.studies, [0, 1, 2])
    np.testing.assert_array_equal(index.patients, [0, 0, 1])


# ------------------------------------------------------------------------------------------ splits


def test_given_splits_are_kept(tmp_path):
    rows = [{"pid": f"p{k // 2}", "s": "test" if k < 2 else "train"} for k in range(6)]
    flags = ("--patient_column", "pid", "--split_column", "s")
    assert run("--source", manifest(tmp_path, rows), "--out", tmp_path / "out", *flags) == 0
    counts = schema.DatasetFacts.read(tmp_path / "out").counts["images"]
    assert counts == {"train": 4, "test": 2}


def test_given_splits_that_share_a_patient_are_refused(tmp_path, capsys):
    rows = [{"pid": "Jane", "s": "train"}, {"pid": "Joe", "s": "test"}, {"pid": "Jane", "s": "val"}]
    flags = ("--patient_column", "pid", "--split_column", "s")
    assert run("--source", manifest(tmp_path, rows), "--out", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert "rows 1 and 3" in said and "Jane" not in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_groups_stay_together(tmp_path):
    rows = [{"pid": f"p{k}", "g": f"g{k % 5}"} for k in range(40)]
    flags = ("--patient_column", "pid", "--group_column", "g", "--fractions", ".5,0,.5")
    assert run("--source", manifest(tmp_path, rows), "--out", tmp_path / "out", *flags) == 0
    sides = [
        {int(example["patient_id"].decode()[1:]) % 5 for example in read_all(tmp_path / "out", s)
         .values()} for s in ("train", "test")
    ]  # fmt: skip
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_patient_in_two_groups_that_are_split_is_refused(tmp_path, capsys):
    rows = [{"pid": "p", "g": f"g{k}"} for k in range(12)]
    flags = ("--patient_column", "pid", "--group_column", "g", "--fractions", ".5,0,.5")
    assert run("--source", manifest(tmp_path, rows), "--out", tmp_path / "out", *flags) == 2
    assert "a patient belongs to one split" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- bad files


def test_every_bad_file_is_listed_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    rng = np.random.default_rng(0)
    whole = encoded(smooth(0, 60, 60), ".jpg")
    files = {
        "good.jpg": whole,
        "truncated.jpg": encoded(smooth(1, 60, 60), ".jpg")[:-200],
        "truncated.png": encoded(smooth(2, 60, 60), ".png")[:-300],
        "truncated.tif": pillow(smooth(3, 60, 60), "TIFF")[:-900],
        "flipped.png": bytearray(encoded(smooth(4, 60, 60), ".png")),
        "head.png": encoded(smooth(5), ".png")[:20],
        "empty.png": b"",
        "text.jpg": b"Not an image.",
        "notes.txt": b"Not an image either.",
        "copy.jpg": whole,
        "bomb.png": encoded(np.zeros((200, 200), np.uint8), ".png"),
        "float.tif": pillow(rng.random((9, 9), dtype=np.float32), "TIFF"),
        "pages.tif": pillow(
            smooth(6), "TIFF", save_all=True, append_images=[Image.fromarray(smooth(7))]
        ),
        "unnamed/nobody.png": encoded(smooth(8), ".png"),
    }
    files["flipped.png"][len(files["flipped.png"]) // 2] ^= 0x10
    rows = [{"file": name, "pid": f"p{k}"} for k, name in enumerate(files)]
    for name, data in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    rows[-1]["pid"] = " "
    rows += [{"file": "absent.png", "pid": "p"}, {"file": "", "pid": "p"}]
    source = write_csv(tmp_path / "in" / "m.csv", rows)
    out = tmp_path / "out"
    flags = ("--image_column", "file", "--patient_column", "pid", "--max_bad", "1")
    assert run("--source", source, "--out", out, *flags, *ALL_TRAIN) == 0

    expected = {
        "truncated.jpg": images.CORRUPT,
        "truncated.png": images.CORRUPT,
        "truncated.tif": images.CORRUPT,
        "flipped.png": images.CORRUPT,
        "head.png": images.CORRUPT,
        "empty.png": "empty file",
        "text.jpg": images.NOT_IMAGE,
        "notes.txt": images.NOT_IMAGE,
        "copy.jpg": "same bytes as row 1",
        "bomb.png": images.BOMB,
        "float.tif": f"{images.UNSUPPORTED}: floating point",
        "pages.tif": f"{images.UNSUPPORTED}: TIFF of several pages",
        "unnamed/nobody.png": "no patient id",
        "absent.png": "missing file",
        "": "missing file",
    }
    assert quarantine(out) == expected
    assert list(read_all(out)) == ["good.jpg"]
    counts = schema.DatasetFacts.read(out).counts
    assert counts["rows"] == len(rows) == 1 + sum(counts["quarantined"].values())
    assert counts["quarantined"][images.CORRUPT] == 5 and counts["quarantined"]["duplicate"] == 1


def test_bad_masks_and_rows_without_split_are_listed(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "torn.png").write_bytes(encoded(smooth(0), ".png")[:-30])
    save(tmp_path / "m" / "tall.png", np.zeros((32, 8), np.uint8))
    rows = [
        {"s": "train", "mask": ""},
        {"s": "train", "mask": "none.png"},
        {"s": "train", "mask": "torn.png"},
        {"s": "train", "mask": "tall.png"},
        {"s": "", "mask": ""},
    ]
    flags = ("--mask_column", "mask", "--split_column", "s", "--max_bad", "1")
    out = tmp_path / "out"
    assert run("--source", manifest(tmp_path, rows), "--out", out, *flags) == 0
    assert list(quarantine(out).values()) == [
        "mask: missing file",
        f"mask: {images.CORRUPT}",
        "mask: not of the image's proportions",
        "no split given",
    ]


def test_too_many_bad_files_stop_with_the_list_and_can_be_allowed(tmp_path, capsys):
    source = folder_of(tmp_path, 8)
    (source / "torn.png").write_bytes((source / "p0_0.png").read_bytes()[:-40])
    (source / "readme.md").write_text("claims to be no image, so it does not count")
    (source / "copy.png").write_bytes((source / "p0_1.png").read_bytes())
    out = tmp_path / "out"
    assert run("--source", source, "--out", out) == 2
    said = capsys.readouterr().err
    assert "1 of 9 rows are unusable (11.1 %, more than --max_bad 0.05)" in said
    assert not out.exists()
    listed = quarantine(tmp_path / "out.partial")
    assert listed["torn.png"] == images.CORRUPT and len(listed) == 3
    assert run("--source", source, "--out", out, "--max_bad", ".2") == 0
    assert quarantine(out) == listed


# ------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("suffix", (".png", ".tiff"))
@pytest.mark.parametrize("channels", (1, 3))
def test_sixteen_bits_survive_bit_for_bit(tmp_path, suffix, channels):
    rng = np.random.default_rng(0)
    shape = (20, 30) if channels == 1 else (20, 30, 3)
    pixels = rng.integers(0, 65536, shape, dtype=np.uint16)
    save(tmp_path / "in" / f"a{suffix}", pixels)
    eight = rng.integers(0, 256, (20, 30), dtype=np.uint8)
    save(tmp_path / "in" / "b.png", eight)
    out = tmp_path / "out"
    assert run("--source", tmp_path / "in", "--out", out, "--resize", "none", *ALL_TRAIN) == 0
    assert schema.DatasetFacts.read(out).bits == 16
    found = read_all(out)
    np.testing.assert_array_equal(found[f"a{suffix}"]["image"].squeeze(), pixels)
    assert found["b.png"]["image"].dtype == np.uint16
    np.testing.assert_array_equal(found["b.png"]["image"][..., 0], eight.astype(int) * 257)


def test_bits_8_windows_between_percentiles(tmp_path):
    pixels = np.arange(1000, 5000, dtype=np.uint16).reshape(40, 100)
    save(tmp_path / "in" / "a.png", pixels)
    out = tmp_path / "out"
    flags = ("--bits", "8", "--format", "png", "--resize", "none")
    assert run("--source", tmp_path / "in", "--out", out, *flags, *ALL_TRAIN) == 0
    low, high = np.percentile(pixels.astype(np.float64), (0.5, 99.5))
    expected = np.clip((pixels - low) / (high - low) * 255, 0, 255)
    image = read_all(out)["a.png"]["image"][..., 0]
    assert image.dtype == np.uint8 and np.abs(image - expected).max() <= 0.51


def test_jpeg_cannot_hold_sixteen_bits(tmp_path, capsys):
    source = folder_of(tmp_path, 2, bits=16)
    assert run("--source", source, "--out", tmp_path / "out", "--format", "jpeg") == 2
    assert "--bits 8" in capsys.readouterr().err
    # Nothing was encoded, so other flags may be tried at once.
    assert run("--source", source, "--out", tmp_path / "out", "--bits", "8") == 0


def test_one_colour_image_makes_all_rgb(tmp_path):
    grey, colour = smooth(0), smooth(1, channels=3)
    save(tmp_path / "in" / "grey.png", grey)
    save(tmp_path / "in" / "colour.png", colour)
    out = tmp_path / "out"
    assert run("--source", tmp_path / "in", "--out", out, "--format", "png", *ALL_TRAIN) == 0
    found = read_all(out)
    np.testing.assert_array_equal(found["colour.png"]["image"], colour)
    np.testing.assert_array_equal(found["grey.png"]["image"], np.repeat(grey[..., None], 3, 2))


def test_eight_bits_are_kept_as_good_jpeg(tmp_path):
    pixels = smooth(3, 64, 64)
    save(tmp_path / "in" / "a.png", pixels)
    assert run("--source", tmp_path / "in", "--out", tmp_path / "out", *ALL_TRAIN) == 0
    raw = tfds.builder_from_directory(str(tmp_path / "out")).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )[0]["image"]
    assert raw.startswith(b"\xff\xd8\xff")
    found = read_all(tmp_path / "out")["a.png"]["image"][..., 0].astype(int)
    assert np.abs(found - pixels).max() <= 4


@pytest.mark.parametrize(
    ("policy", "shape", "expected"),
    [
        ("longer", (60, 100), (19, 32)),
        ("longer", (30, 20), (30, 20)),
        ("shorter", (60, 100), (32, 53)),
        ("shorter", (30, 100), (30, 100)),
        ("exact", (60, 100), (32, 32)),
        ("exact", (10, 10), (32, 32)),
        ("none", (60, 100), (60, 100)),
    ],
)
def test_resize_policies(policy, shape, expected):
    pixels = smooth(0, *shape, bits=16)
    found = images.resize(pixels, 32, policy)
    assert found.shape == expected and found.dtype == np.uint16
    # Averaging keeps the mean; a smooth picture looks alike at any size.
    assert abs(found.mean() - pixels.mean()) < 0.03 * pixels.mean()


def test_shrinking_averages_areas():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    expected = pixels.reshape(16, 4, 16, 4).mean((1, 3))
    assert np.abs(images.resize(pixels, 16, "longer") - expected).max() <= 0.51


def test_odd_pillow_modes():
    colour, grey = smooth(0, channels=3), smooth(1)
    orange = Image.new("P", (4, 3), 1)
    orange.putpalette([0, 0, 0, 255, 128, 0])
    mid_grey = Image.new("P", (4, 3), 1)
    mid_grey.putpalette([0, 0, 0, 99, 99, 99])
    half = np.dstack([colour, np.full(grey.shape, 255, np.uint8)])
    half[:5, :, 3] = 0
    cases = {
        "palette": (pillow(orange, "PNG"), np.full((3, 4, 3), (255, 128, 0))),
        "grey palette": (pillow(mid_grey, "PNG"), np.full((3, 4), 99)),
        "alpha": (pillow(half, "PNG"), np.where(np.arange(24)[:, None, None] < 5, 0, colour)),
        "one bit": (pillow(Image.fromarray(grey > 99), "PNG"), np.where(grey > 99, 255, 0)),
        "white is zero": (
            pillow(grey.astype(np.uint16) * 257, "TIFF", tiffinfo={262: 0}),
            65535 - grey.astype(int) * 257,
        ),
        "cmyk": (
            pillow(Image.fromarray(colour).convert("CMYK"), "TIFF"),
            np.asarray(Image.fromarray(colour).convert("CMYK").convert("RGB")),
        ),
    }
    for name, (data, expected) in cases.items():
        found = images.decode(data)
        assert found.shape == expected.shape, name
        np.testing.assert_array_equal(found, expected, name)
        header = images.probe(io.BytesIO(data))
        assert header.channels == (1 if found.ndim == 2 else 3), name
        assert header.bits == 8 * found.dtype.itemsize, name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", (8, 16))
def test_exif_orientation(orientation, bits):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = smooth(0, bits=bits)
    flipped = pixels[:, ::-1]
    expected = {
        1: pixels, 2: flipped, 3: np.rot90(pixels, 2), 4: pixels[::-1],
        5: pixels.T, 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels),
    }  # fmt: skip
    found = images.decode(pillow(pixels, "PNG", exif=exif))
    np.testing.assert_array_equal(found, expected[orientation])


def test_large_jpeg_is_decoded_at_reduced_scale_without_visible_difference():
    pixels = smooth(0, 1200, 900)
    data = encoded(pixels, ".jpg")
    assert images.decode(data, shrink_to=100).shape == (300, 225)
    fast = images.resize(images.decode(data, shrink_to=100), 100, "longer")
    full = images.resize(images.decode(data), 100, "longer")
    assert fast.shape == full.shape and np.abs(fast.astype(int) - full).max() <= 3


def test_metadata_of_the_source_does_not_reach_the_data_set(tmp_path):
    exif = Image.Exif()
    exif[270] = "NAME^PATIENT"
    data = pillow(smooth(0), "JPEG", exif=exif, comment=b"NAME^PATIENT")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    assert b"NAME^PATIENT" in data
    assert run("--source", tmp_path / "in", "--out", tmp_path / "out", *ALL_TRAIN) == 0
    for path in (tmp_path / "out").iterdir():
        assert b"NAME^PATIENT" not in path.read_bytes()


# ----------------------------------------------------------------------------- bad input, re-runs


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--source", "nowhere"), "no such file or folder"),
        (("--patient_column", "pidd"), "did you mean 'pid'"),
        (("--label_columns", "pid"), "row 1 has 'p0'"),
        (("--label_column", "dx", "--classes", "nv", "mell"), "did you mean 'mel'"),
        (("--label_column", "dx", "--classes", "nv"), "'mel' is not among --classes"),
        (("--filter", "dx"), "write column=value"),
        (("--filter", "dx=bcc"), "leaves nothing"),
        (("--fractions", ".5,.6,.1"), "sum to 1"),
        (("--fractions", ".5,.5"), "three shares"),
        (("--patient_regex", "("), "--patient_regex"),
        (("--size", "0"), "--size"),
        (("--sise", "9"), "--sise"),
        (("--name", "My set"), "--name"),
        (("--image_column", "image"), "did you mean 'image_path'"),
        (("--label_separator", "|"), "needs --label_column"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys, flags, match):
    rows = [{"pid": "p0", "dx": "nv"}, {"pid": "p1", "dx": "mel"}]
    source = manifest(tmp_path, rows)
    assert run("--source", source, "--out", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert match in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_bad_manifests(tmp_path):
    path = tmp_path / "m.csv"
    for content, match in (
        (b"image_path,pid\na.png\n", "row 1"),
        (b"image_path,image_path\na,b\n", "twice"),
        (b"image_path\n\xff\xfe\n", "UTF-8"),
        (b"image_path\n", "nothing in it"),
        (b"", "no such column"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            read_source(SourceConfig(str(path)))
    (tmp_path / "m.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match="csv"):
        read_source(SourceConfig(str(tmp_path / "m.xlsx")))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing in it"):
        read_source(SourceConfig(str(tmp_path / "nothing")))


def test_out_inside_the_source_is_refused(tmp_path):
    source = folder_of(tmp_path, 2)
    with pytest.raises(UserError, match="inside the source"):
        prepare(SourceConfig(str(source)), StoreConfig(), source / "out")


def test_second_run_says_so_and_another_source_is_refused(tmp_path, capsys):
    source, out = folder_of(tmp_path, 4), tmp_path / "out"
    assert run("--source", source, "--out", out) == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert run("--source", source, "--out", out) == 0
    assert "prepared already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert run("--source", source, "--out", out, "--size", "16") == 2
    save(source / "new.png", smooth(99))
    assert run("--source", source, "--out", out) == 2
    assert "another source" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert run("--source", source, "--out", tmp_path / "other") == 2
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_two_runs_at_once_are_refused(tmp_path):
    out = tmp_path / "out"
    with writer.working(out), pytest.raises(UserError, match="another run"):
        prepare(SourceConfig(str(folder_of(tmp_path, 2))), StoreConfig(), out)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def all_processes():
    return [int(path.name) for path in pathlib.Path("/proc").iterdir() if path.name.isdigit()]


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_kill_minus_9_and_run_again(tmp_path):
    """Killed at several moments, then finished: the same bytes as a run that nobody disturbed."""
    source = tmp_path / "in"
    for k in range(700):
        save(source / f"p{k // 3}_{k}.png", smooth(k, 150, 150, bits=16))
    (source / "torn.png").write_bytes((source / "p0_0.png").read_bytes()[:-40])
    flags = ["--patient_regex", r"^p(\d+)_|^torn", "--name", "x", "--max_bad", ".1"]
    assert run("--source", source, "--out", tmp_path / "calm" / "x", *flags) == 0

    out = tmp_path / "killed" / "x"
    command = [sys.executable, str(TOOL), "--source", str(source), "--out", str(out), *flags]
    work = writer.partial_directory(out) / writer.WORK
    survivors = []
    for least in (1, 4):  # kill when so many shards are done
        process = subprocess.Popen([*command, "--workers", "2"], start_new_session=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            done = list(work.glob("*.done"))
            if len(done) >= least:
                break
            time.sleep(0.002)
        survivors = {path: path.stat().st_mtime_ns for path in work.glob("*.done")}
        children = [pid for pid in all_processes() if session_of(pid) == process.pid]
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    assert len(children) > 1  # the command and its workers
    while set(children) & set(all_processes()):
        assert time.monotonic() < deadline, "worker processes outlive their parent"
        time.sleep(0.05)

    changed = subprocess.run([*command, "--size", "16"], capture_output=True, text=True)
    assert changed.returncode == 2 and "was begun with" in changed.stderr
    assert {p: p.stat().st_mtime_ns for p in survivors} == survivors  # nothing was lost by that
    assert run(*command[2:]) == 0
    assert hashes(out) == hashes(tmp_path / "calm" / "x")


@pytest.mark.parametrize("moment", ("dataset_info.json", "bigmed.json", "rename"))
def test_killed_while_finishing(tmp_path, monkeypatch, moment):
    class Killed(BaseException):
        pass

    source, out = folder_of(tmp_path, 6), tmp_path / "out"
    atomically, replace = writer.write_atomically, os.replace

    def dying_write(path, write):
        if path.name == moment:
            raise Killed
        atomically(path, write)

    def dying_replace(old, new):
        if moment == "rename" and pathlib.Path(new) == out:
            raise Killed
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_atomically", dying_write)
        patch.setattr(writer.os, "replace", dying_replace)
        with pytest.raises(Killed):
            prepare(SourceConfig(str(source)), StoreConfig(), out)
    assert not out.exists()
    prepare(SourceConfig(str(source)), StoreConfig(), out)
    undisturbed = tmp_path / "calm" / "out"
    prepare(SourceConfig(str(source)), StoreConfig(), undisturbed)
    assert hashes(out) == hashes(undisturbed)


# --------------------------------------------------------------------------------------- real data


def slice_of(shared_data, name, count, tmp_path):
    with open(shared_data / name / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:count]
    return rows, write_csv(tmp_path / f"{name}.csv", rows)


def test_real_radiographs(shared_data, tmp_path):
    rows, path = slice_of(shared_data, "cxr_nih", 60, tmp_path)
    flags = ["--image_root", shared_data, "--patient_column", "patient_id", "--view_column", "view"]
    flags += ["--label_column", "labels", "--label_separator", "|", "--group_column", "split_group"]
    out = tmp_path / "out"
    assert run("--source", path, "--out", out, *flags) == 0
    facts = schema.DatasetFacts.read(out)
    assert facts.channels == 1 and facts.task == "multi_label"
    by_path, seen = {row["image_path"]: row for row in rows}, 0
    for split in facts.patients:
        for name, example in read_all(out, split).items():
            row, seen = by_path[name], seen + 1
            expected = {c for c, v in zip(facts.class_names, example["labels"], strict=True) if v}
            assert expected == set(row["labels"].split("|"))
            assert example["patient_id"].decode() == row["patient_id"]
            assert max(example["image"].shape) == 256 and example["image"].shape[2] == 1
            original = np.asarray(Image.open(shared_data / name).convert("L"), np.float64)
            assert abs(example["image"].mean() - original.mean()) < 1.0
    assert seen == len(rows) - len(quarantine(out))


def test_real_skin_lesions(shared_data, tmp_path):
    rows, path = slice_of(shared_data, "derm_ham10000", 80, tmp_path)
    flags = ["--image_root", shared_data, "--patient_column", "patient_id", "--mask_column"]
    flags += ["mask_path", "--label_column", "labels"]
    out = tmp_path / "out"
    assert run("--source", path, "--out", out, *flags) == 0
    facts = schema.DatasetFacts.read(out)
    assert facts.channels == 3 and facts.task == "single_label"
    by_path = {row["image_path"]: row for row in rows}
    for split in facts.patients:
        for name, example in read_all(out, split).items():
            assert facts.class_names[int(example["labels"].argmax())] == by_path[name]["labels"]
            assert example["labels"].sum() == 1 and example["image"].shape == (150, 200, 3)
            mask = np.asarray(Image.open(shared_data / by_path[name]["mask_path"]).convert("L"))
            np.testing.assert_array_equal(example["mask"][..., 0], mask)
    assert json.loads((out / "bigmed.json").read_text())["counts"]["rows"] == 80
