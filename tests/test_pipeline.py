"""Decoding onto canvases, and batches that are a pure function of (seed, step)."""

import csv
import multiprocessing
import os
import pathlib
import threading
import time

import cv2
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from tfds_writer import TOY_FIELDS, png, tagged_image, write_tfds, write_toy

from bigmed.data import schema
from bigmed.data.decode import decode_onto
from bigmed.data.pipeline import Pipeline, evaluation_batches
from bigmed.data.sources import open_source
from bigmed.errors import UserError
from configs import common


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> pathlib.Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMED_CACHE", str(tmp_path / "cache"))


def _config(**sources) -> dict:
    return {
        "sources": tuple(sources),
        "source": sources,
        "canvas": 16,
        "channels": 1,
        "pairs": None,
        "single_image": "augment",
        "workers": 0,
        "threads": None,
        "prefetch": 3,
    }


def _toy_source(directory, split="train", **overrides) -> dict:
    return {"dir": str(directory), "split": split, "fields": TOY_FIELDS, **overrides}


def _toy_config(directory, **overrides) -> dict:
    return _config(toy=_toy_source(directory)) | overrides


def _assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        assert np.array_equal(got[name], expected[name]), name


def _tag(image: np.ndarray) -> int:
    """Which `tagged_image` lies on a canvas [H, W, 1]."""
    valid = image[:10, :12, 0]
    matches = [tag for tag in range(110) if np.array_equal(valid, tagged_image(tag))]
    assert len(matches) == 1
    return matches[0]


# ---------------------------------------- decoding


def _decoded(encoded: bytes, shape, dtype=np.uint8):
    canvas = np.full(shape, 77, dtype)  # dirty: all of it must be written
    return canvas, decode_onto(canvas, encoded)


def test_an_image_lies_at_the_top_left_and_zeros_follow():
    image = tagged_image(5)
    canvas, size = _decoded(png(image), (16, 20, 1))
    assert size == (10, 12)
    assert np.array_equal(canvas[:10, :12, 0], image)
    assert not canvas[10:].any() and not canvas[:, 12:].any()


def test_rgb_order_and_grey_both_ways():
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    canvas, _ = _decoded(png(rgb), (9, 7, 3))
    assert np.array_equal(canvas, rgb)
    grey, _ = _decoded(png(rgb), (9, 7, 1))
    assert np.abs(grey[..., 0] - rgb @ [0.299, 0.587, 0.114]).max() < 1.01
    canvas, _ = _decoded(png(tagged_image(3)), (10, 12, 3))
    assert np.array_equal(canvas, np.repeat(tagged_image(3)[..., None], 3, axis=-1))


def test_transparency_is_left_out():
    rgba = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
    canvas, _ = _decoded(cv2.imencode(".png", rgba)[1].tobytes(), (5, 6, 3))
    assert np.array_equal(canvas, rgba[..., 2::-1])


def test_16_bits_stay_and_8_bits_are_widened():
    deep = np.random.default_rng(0).integers(0, 2**16, (6, 6), np.uint16)
    canvas, _ = _decoded(png(deep), (6, 6, 1), np.uint16)
    assert np.array_equal(canvas[..., 0], deep)
    canvas, _ = _decoded(png(tagged_image(1)), (10, 12, 1), np.uint16)
    assert np.array_equal(canvas[..., 0], tagged_image(1).astype(np.uint16) * 257)
    canvas, _ = _decoded(png(deep), (6, 6, 1), np.uint8)
    assert np.abs(canvas[..., 0].astype(float) - deep / 257).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_larger_images_are_averaged_down_with_their_aspect(channels):
    image = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    if channels == 1:
        image = image[..., 0]
    canvas, size = _decoded(png(image), (30, 30, channels))
    assert size == (30, 20)
    means = image.reshape(30, 2, 20, 2, channels).mean((1, 3))
    assert np.abs(canvas[:, :20].astype(float) - means).max() <= 0.51
    assert not canvas[:, 20:].any()
    _, size = _decoded(png(np.zeros((400, 3), np.uint8)), (30, 30, 1))
    assert size == (30, 1)  # never nothing


def test_exif_rotation_is_ignored_as_tfds_does():
    jpeg = cv2.imencode(".jpg", np.zeros((8, 16), np.uint8))[1].tobytes()
    # An APP1 segment with orientation 6 (rotate by 90 degrees), after the SOI marker.
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    app1 = b"Exif\0\0" + tiff
    rotated = jpeg[:2] + b"\xff\xe1" + (len(app1) + 2).to_bytes(2, "big") + app1 + jpeg[2:]
    assert cv2.imdecode(np.frombuffer(rotated, np.uint8), 0).shape == (16, 8)  # OpenCV would
    assert _decoded(rotated, (16, 16, 1))[1] == (8, 16)


@pytest.mark.parametrize("encoded", [b"", b"not an image", png(tagged_image(0))[:30]])
def test_what_cannot_be_decoded_is_refused(encoded):
    with pytest.raises(ValueError, match="cannot be decoded"):
        _decoded(encoded, (8, 8, 1))


# ---------------------------------------- training batches


def test_rows_hold_together_and_match_the_spec(toy):
    pipeline = Pipeline(_toy_config(toy), seed=1, batch_size=8)
    source = open_source(_toy_source(toy))
    seen = []
    for step in range(3):  # one epoch
        batch = pipeline.host_batch(step)
        for name, spec in pipeline.batch_spec().items():
            assert isinstance(spec, jax.ShapeDtypeStruct)
            assert (batch[name].shape, batch[name].dtype) == (spec.shape, spec.dtype), name
        assert batch.keys() == pipeline.batch_spec().keys()
        tags = [_tag(image[0]) for image in batch["image"]]
        assert np.array_equal(batch["labels"], source.labels[tags])
        names = np.array([f"secret-{tag // 3}" for tag in tags])
        same = batch["patient"][:, None] == batch["patient"]
        assert np.array_equal(same, names[:, None] == names)
        assert np.array_equal(batch["box"], np.tile([0, 0, 10, 12], (8, 1, 1)))
        assert np.array_equal(batch["index"], np.arange(8))
        seen += tags
    assert sorted(seen) == list(range(24))
    assert pipeline.units_per_epoch == 24
    assert pipeline.class_names == ("cat", "dog") and pipeline.task == "single_label"


def test_pairs_are_two_distinct_images_of_a_patient(toy):
    pipeline = Pipeline(_toy_config(toy, pairs="case"), seed=1, batch_size=8)
    assert pipeline.units_per_epoch == 8
    drawn = []
    for step in range(12):
        images = pipeline.host_batch(step)["image"]
        tags = np.array([[_tag(one) for one in pair] for pair in images])
        assert np.all(tags[:, 0] != tags[:, 1])
        assert np.all(tags[:, 0] // 3 == tags[:, 1] // 3)
        assert sorted((tags[:, 0] // 3).tolist()) == list(range(8))  # each case once
        drawn.append(set(map(tuple, tags.tolist())))
    assert len(set.union(*drawn)) > 30  # of 48: pairs are drawn anew at each visit


def test_single_images_are_repeated_or_dropped(toy):
    config = _toy_config(toy, pairs="case")
    config["source"] = {"toy": _toy_source(toy, fields={"image": "img"})}  # no patient ids
    batch = Pipeline(config, seed=0, batch_size=24).host_batch(0)
    assert np.array_equal(batch["image"][:, 0], batch["image"][:, 1])
    assert np.array_equal(batch["box"][:, 0], batch["box"][:, 1])
    assert batch["box"][:, :, 2:].min() == 10
    with pytest.raises(UserError, match="no case with two images"):
        Pipeline(config | {"single_image": "drop"}, seed=0, batch_size=4)


@pytest.mark.parametrize(("workers", "pairs"), [(0, None), (0, "case"), (1, "case"), (2, "case")])
def test_iterating_from_any_step_gives_the_batches_of_the_steps(toy, workers, pairs):
    reference = Pipeline(_toy_config(toy, pairs=pairs, threads=1), seed=5, batch_size=8)
    config = _toy_config(toy, pairs=pairs, workers=workers, threads=workers + 1)
    batches = Pipeline(config, seed=5, batch_size=8).iterate(4)
    for step, batch in zip(range(4, 11), batches, strict=False):
        _assert_equal(batch, reference.host_batch(step))
    batches.close()


def test_no_prefetch_is_the_same(toy):
    pipeline = Pipeline(_toy_config(toy, prefetch=0), seed=5, batch_size=8)
    for step, batch in zip(range(2), pipeline.iterate(0), strict=False):
        _assert_equal(batch, pipeline.host_batch(step))


@pytest.mark.parametrize("mixed", [False, True])
def test_two_hosts_together_make_the_batch_of_one(toy, mixed):
    config = _toy_config(toy, pairs="case")
    if mixed:
        config |= _config(a=_toy_source(toy), b=_toy_source(toy, "test")) | {"pairs": "case"}
        config["sources"] = ("a", "b")
    one = Pipeline(config, seed=2, batch_size=6)
    hosts = [
        Pipeline(config, seed=2, batch_size=6, block=p, num_blocks=2) for p in (0, 1)
    ]
    assert {one.fingerprint} == {host.fingerprint for host in hosts}
    for step in (0, 3, 8):
        parts = [host.host_batch(step) for host in hosts]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _assert_equal(joined, one.host_batch(step))
    assert hosts[0].batch_spec()["image"].shape[0] == 6  # the spec is of the global batch


def test_configs_of_a_run_are_taken_as_they_are(toy):
    data = common.base().data
    data.canvas = 16
    data.source = ConfigDict({"toy": common.source(str(toy), "train", fields=TOY_FIELDS)})
    data.sources = ("toy",)
    expected = Pipeline(_toy_config(toy), seed=0, batch_size=8)
    got = Pipeline(data.lock(), seed=0, batch_size=8)
    assert got.fingerprint == expected.fingerprint
    _assert_equal(next(got.iterate(2)), expected.host_batch(2))


def test_seeds_differ(toy):
    one, other = (Pipeline(_toy_config(toy), seed=s, batch_size=8).host_batch(0) for s in (0, 1))
    assert not np.array_equal(one["image"], other["image"])


def test_mixed_sources_join_classes_and_patients(toy, tmp_path):
    copy = write_toy(tmp_path, name="other")
    findings = {**TOY_FIELDS, "labels": "findings"}
    config = _config(
        a=_toy_source(toy, weight=3),
        b=_toy_source(copy, weight=1, fields=findings),
    )
    pipeline = Pipeline(config, seed=0, batch_size=8)
    assert pipeline.class_names == ("cat", "dog", "a", "c") and pipeline.task == "multi_label"
    rows_of_a = 0
    codes = {}
    for step in range(6):
        batch = pipeline.host_batch(step)
        for row in range(8):
            tag, labels = _tag(batch["image"][row, 0]), batch["labels"][row].tolist()
            if labels[0] != schema.MISSING:
                rows_of_a += 1
                assert labels == [1 - tag % 2, tag % 2, -2, -2]
            else:
                assert labels == [-2, 0, tag % 2, tag % 2]
            # The same id in one id space is the same person, wherever the image comes from.
            assert codes.setdefault(tag // 3, batch["patient"][row]) == batch["patient"][row]
    assert rows_of_a == 36
    assert len(set(codes.values())) == len(codes)
    config["source"]["b"]["id_space"] = "other"
    apart = Pipeline(config, seed=0, batch_size=8).host_batch(0)
    from_a = apart["labels"][:, 0] != schema.MISSING
    assert not set(apart["patient"][from_a]) & set(apart["patient"][~from_a])


def test_without_weights_sources_are_mixed_by_size(toy):
    config = _config(a=_toy_source(toy), b=_toy_source(toy, "test"))
    pipeline = Pipeline(config, seed=0, batch_size=5)
    tags = [_tag(i[0]) for step in range(6) for i in pipeline.host_batch(step)["image"]]
    assert sum(tag >= 100 for tag in tags) == 6 and pipeline.units_per_epoch == 30


def test_8_and_16_bit_sources_mix_as_16_bit(toy, tmp_path):
    deep = np.random.default_rng(0).integers(0, 2**16, (5, 6), np.uint16)
    feature = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    directory = write_tfds(
        tmp_path, "deep", {"image": feature}, {"train": [{"image": png(deep)}] * 8}
    )
    config = _config(a=_toy_source(toy), b={"dir": str(directory), "split": "train"})
    pipeline = Pipeline(config, seed=0, batch_size=8)
    assert pipeline.batch_spec()["image"].dtype == np.uint16
    batch = pipeline.host_batch(0)
    assert batch["image"].dtype == np.uint16
    for image, (_, _, height, width) in zip(batch["image"][:, 0], batch["box"][:, 0], strict=True):
        if height == 5:
            assert np.array_equal(image[:5, :6, 0], deep)
        else:
            assert np.all(image % 257 == 0) and _tag((image // 257).astype(np.uint8)) < 24
        assert not image[height:].any() and not image[:, width:].any()


def test_fingerprints_change_with_what_determines_the_batches_alone(toy):
    def fingerprint(seed=0, batch_size=8, **overrides):
        config = _toy_config(toy, **overrides)
        return Pipeline(config, seed=seed, batch_size=batch_size).fingerprint

    by_study = {**TOY_FIELDS, "study_id": "study"}
    cases = [
        {"toy": _toy_source(toy, fields=by_study, case=case)} for case in ("patient_id", "study_id")
    ]
    base = fingerprint()
    assert base == fingerprint(workers=3, threads=2, prefetch=9)
    others = [
        fingerprint(seed=1),
        fingerprint(batch_size=4),
        fingerprint(pairs="case"),
        fingerprint(canvas=32),
        fingerprint(channels=3),
        *(fingerprint(pairs="case", source=source) for source in cases),
    ]
    assert len({base, *others}) == 8


def test_descriptions_hold_no_patient_ids(toy):
    text = Pipeline(_toy_config(toy), seed=0, batch_size=8).describe()
    assert "24 images an epoch" in text and "8 patients" in text and "secret" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 7, "num_blocks": 2}, "batch_size=7 does not divide over 2 hosts"),
        ({"batch_size": 25}, "a batch of 25 takes 25 images of 'toy/train', which has 24"),
        ({"batch_size": 9, "pairs": "case"}, "takes 9 cases of 'toy/train', which has 8"),
        ({"pairs": "patient"}, "data.pairs='patient'; valid: None, 'case'"),
        ({"pairs": "case", "single_image": "skip"}, "valid: augment, drop"),
        ({"channels": 2}, "channels=2; valid: 1"),
        ({"canvas": 0}, "canvas=0"),
        ({"sources": ()}, "data.sources is empty"),
        ({"sources": ("toi",)}, "no such entry; did you mean 'toy'"),
    ],
)
def test_mistakes_are_named_before_a_batch_is_made(toy, overrides, message):
    named = {"batch_size": 8} | {
        key: overrides.pop(key) for key in ("batch_size", "num_blocks") if key in overrides
    }
    with pytest.raises(UserError, match=message):
        Pipeline(_toy_config(toy, **overrides), seed=0, **named)


def test_weights_must_be_positive_and_complete(toy):
    for weights, message in [((1, None), "to each of the mixed"), ((1, 0), "b.weight=0; valid")]:
        a, b = (_toy_source(toy, weight=weight) for weight in weights)
        with pytest.raises(UserError, match=message):
            Pipeline(_config(a=a, b=b), seed=0, batch_size=4)
    a, b = _toy_source(toy, weight=1), _toy_source(toy, "test", weight=9)
    with pytest.raises(UserError, match="takes 9 images of 'toy/test', which has 6"):
        Pipeline(_config(a=a, b=b), seed=0, batch_size=10)


def _with_bad_image(folder: pathlib.Path) -> pathlib.Path:
    features = {"image": tfds.features.Text(), "patient_id": tfds.features.Text()}
    rows = [{"image": png(tagged_image(i)), "patient_id": f"secret-{i}"} for i in range(12)]
    rows[7]["image"] = b"\xff\xd8 torn"
    return write_tfds(folder, "damaged", features, {"train": rows})


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_and_stops_the_iteration(tmp_path, workers):
    directory = _with_bad_image(tmp_path)
    config = _config(a={"dir": str(directory), "split": "train"}) | {"workers": workers}
    batches = Pipeline(config, seed=0, batch_size=12).iterate(0)
    with pytest.raises(UserError) as error:
        next(batches)
    message = str(error.value)
    assert "data set 'damaged', split 'train', record 7: the image cannot be decoded" in message
    assert "\n" not in message and "secret" not in message


def test_a_damaged_file_is_named_by_record_during_training(toy, tmp_path):
    copy = write_toy(tmp_path)
    shard = next(copy.glob("*train*"))
    stored = open_source(_toy_source(copy)).read([11])[0]
    content, stamp = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[content.find(stored[40:]) + 3] ^= 0xFF
    shard.write_bytes(content)
    os.utime(shard, ns=(stamp, stamp))
    pipeline = Pipeline(_toy_config(copy), seed=0, batch_size=24)
    with pytest.raises(UserError, match="split 'train', record 11: cannot be read"):
        pipeline.host_batch(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_closing_ends_the_threads_and_processes_that_fetch_ahead(toy, workers):
    batches = Pipeline(_toy_config(toy, workers=workers), seed=0, batch_size=8).iterate(0)
    next(batches)

    def running():
        threads = [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]
        return threads + multiprocessing.active_children()

    assert running()
    batches.close()
    deadline = time.monotonic() + 20
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running()


# ---------------------------------------- evaluation batches


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_evaluation_visits_every_record_once_in_order_and_pads(toy, num_blocks):
    source = open_source(_toy_source(toy))
    hosts = [
        list(
            evaluation_batches(
                source,
                canvas=16,
                channels=1,
                batch_size=10,
                block=p,
                num_blocks=num_blocks,
            )
        )
        for p in range(num_blocks)
    ]
    assert {len(batches) for batches in hosts} == {3}
    for number, parts in enumerate(zip(*hosts, strict=True)):
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        records = np.arange(10 * number, 10 * number + 10)
        expected_mask = records < 24
        assert np.array_equal(batch["mask"], expected_mask)
        assert np.array_equal(batch["record"], np.where(expected_mask, records, -1))
        assert batch["image"].shape == (10, 1, 16, 16, 1) and batch["record"].dtype == np.int32
        for row, record in enumerate(records[expected_mask]):
            assert _tag(batch["image"][row, 0]) == record
            assert np.array_equal(batch["labels"][row], source.labels[record])
            assert batch["patient"][row] == source.patients[record]
        padding = ~expected_mask
        assert not batch["image"][padding].any()
        assert np.all(batch["labels"][padding] == schema.MISSING)
        assert np.all(batch["box"][padding] == [0, 0, 16, 16])  # a box of nothing cannot be cropped
        assert np.array_equal(batch["index"], np.arange(10))


def test_evaluation_batches_must_divide_over_the_hosts(toy):
    source = open_source(_toy_source(toy))
    with pytest.raises(UserError, match="does not divide over 2 hosts"):
        evaluation_batches(source, canvas=16, channels=1, batch_size=3, num_blocks=2)


# ---------------------------------------- real images


def _real_set(shared_data, folder, name, limit):
    """A TFDS directory, field names as in the manifest, of some real images; and the rows."""
    with open(shared_data / name / "manifest.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:limit]
    features = {"picture": tfds.features.Text(), "patient_id": tfds.features.Text()}
    examples = [
        {
            "picture": (shared_data / row["image_path"]).read_bytes(),
            "patient_id": row["patient_id"],
        }
        for row in rows
    ]
    return write_tfds(folder, name, features, {"train": examples}), rows


def test_pairs_of_real_radiographs(shared_data, tmp_path):
    directory, rows = _real_set(shared_data, tmp_path, "cxr_nih", 120)
    source = {"dir": str(directory), "split": "train", "fields": {"image": "picture"}}
    options = {"pairs": "case", "single_image": "drop", "canvas": 352}
    pipeline = Pipeline(_config(nih=source) | options, seed=0, batch_size=4)
    counts = np.unique([row["patient_id"] for row in rows], return_counts=True)[1]
    assert pipeline.units_per_epoch == (counts > 1).sum()
    originals = [cv2.imread(str(shared_data / row["image_path"]), 0) for row in rows]
    batch = pipeline.host_batch(0)
    patients = []
    for pair, boxes in zip(batch["image"], batch["box"], strict=True):
        found = []
        for image, (_, _, height, width) in zip(pair, boxes, strict=True):
            valid = image[:height, :width, 0]
            found.append(
                [
                    i
                    for i, o in enumerate(originals)
                    if o.shape == valid.shape and (o == valid).all()
                ]
            )
        assert all(found) and not set(found[0]) & set(found[1])  # two different real images
        people = {rows[i]["patient_id"] for same in found for i in same}
        assert len(people) == 1
        patients += people
    assert len(set(patients)) == 4


def test_real_ultrasound_with_one_id_an_image_never_pairs(shared_data, tmp_path):
    directory, _ = _real_set(shared_data, tmp_path, "us_busi", 20)
    source = {"dir": str(directory), "split": "train", "fields": {"image": "picture"}}
    config = _config(busi=source) | {"pairs": "case"}
    batch = Pipeline(config, seed=0, batch_size=10).host_batch(0)
    assert np.array_equal(batch["image"][:, 0], batch["image"][:, 1])
    with pytest.raises(UserError, match="no case with two images"):
        Pipeline(config | {"single_image": "drop"}, seed=0, batch_size=2)
