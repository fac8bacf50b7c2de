"""The data set on disk: records, label codes, side-car index, facts, patient splits."""

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from bigmed.data import schema
from bigmed.errors import UserError


def png(pixels):
    """Encodes with OpenCV, RGB."""
    return cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


@pytest.mark.parametrize("bits", (8, 16))
@pytest.mark.parametrize("channels", (1, 3))
def test_tfds_reads_what_encode_example_writes(bits, channels):
    dtype = np.uint8 if bits == 8 else np.uint16
    shape = (5, 7) if channels == 1 else (5, 7, 3)
    pixels = np.random.default_rng(0).integers(0, 2**bits, shape).astype(dtype)
    labels = np.array([1, 0, -1, -2], np.int8)
    record = schema.encode_example(
        {"image": png(pixels), "labels": labels, "text": "für", "mask": schema.NO_MASK}
    )
    features = schema.features(
        ("image", "labels", "text", "mask"), num_classes=4, channels=channels, bits=bits
    )
    found = features.deserialize_example_np(record)
    np.testing.assert_array_equal(found["image"], pixels.reshape(5, 7, channels))
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["labels"].dtype == np.int8
    assert found["text"].decode() == "für"
    assert found["mask"].shape == (1, 1, 1)


def test_decode_fields_converts_what_is_asked_for():
    record = schema.encode_example(
        {"image": b"\xff\x00", "labels": np.array([1, -2], np.int8), "patient_id": "p", "text": ""}
    )
    image, labels, missing, patient, text = schema.decode_fields(
        record, ("image", "labels", "view", "patient_id", "text")
    )
    assert (image, missing, patient, text) == (b"\xff\x00", None, b"p", b"")
    np.testing.assert_array_equal(labels, [1, -2])
    # Asking for an absent field must not make it present.
    assert schema.decode_fields(record, ("view", "view")) == [None, None]


def test_equal_values_give_equal_bytes():
    values = {name: f"text of {name}" for name in schema.TEXT_FIELDS} | {"image": b"x"}
    assert schema.encode_example(values) == schema.encode_example(dict(reversed(values.items())))


def test_no_mask_is_a_readable_pixel():
    assert Image.open(io.BytesIO(schema.NO_MASK)).size == (1, 1)


def test_index_round_trip(tmp_path):
    labels = np.array([[1, 0], [-1, -2], [0, 0]], np.int8)
    index = schema.Index.build(["b", "a", "b"], labels, ["1", "1", "2"])
    np.testing.assert_array_equal(index.patients, [0, 1, 0])
    # One study id under two patients is two studies.
    np.testing.assert_array_equal(index.studies, [0, 1, 2])
    path = schema.index_path(tmp_path, "train")
    index.save(path)
    found = schema.Index.load(path)
    assert found.patient_keys == ("b", "a") and found.study_keys == ("1", "1", "2")
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.studies, index.studies)
    assert found.patients.dtype == np.int32 and found.labels.dtype == np.int8
    with np.load(path, allow_pickle=False) as stored:  # nothing pickled in it
        assert all(stored[name].dtype != object for name in stored)


def test_index_without_labels_or_studies(tmp_path):
    index = schema.Index.build(["a"], np.zeros((1, 0), np.int8))
    index.save(tmp_path / "i.npz")
    found = schema.Index.load(tmp_path / "i.npz")
    assert found.labels.shape == (1, 0) and found.studies is None and len(found) == 1


def test_torn_or_missing_index_is_one_plain_line(tmp_path):
    path = tmp_path / "i.npz"
    with pytest.raises(UserError, match="not found"):
        schema.Index.load(path)
    schema.Index.build(["a"] * 50, np.zeros((50, 3), np.int8)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="unreadable index"):
        schema.Index.load(path)
    np.savez(path, patients=np.zeros(3, np.int32), labels=np.zeros((2, 1), np.int8),
             patient_keys=np.frombuffer(b'["a"]', np.uint8))  # fmt: skip
    with pytest.raises(UserError, match="different lengths"):
        schema.Index.load(path)


def facts(**changes):
    values = {
        "name": "x",
        "class_names": ("a", "b"),
        "task": "multi_label",
        "split_sha256": {"all": "0"},
        "counts": {"images": {"train": 1}},
        "patients": {"train": 1},
    }
    return schema.DatasetFacts(**(values | changes))


def test_facts_round_trip(tmp_path):
    written = facts(synthetic=True, bits=16)
    written.write(tmp_path / schema.INFO_FILE)
    assert schema.DatasetFacts.read(tmp_path) == written
    assert json.loads((tmp_path / "bigmed.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "unreadable"), ("[]", "unreadable"), ('{"format": 99}', "this version reads format 1"),
     ('{"format": 1, "class_names": []}', "unreadable")],
)  # fmt: skip
def test_bad_facts_are_one_plain_line(tmp_path, text, match):
    (tmp_path / "bigmed.json").write_text(text)
    with pytest.raises(UserError, match=match):
        schema.DatasetFacts.read(tmp_path)


GOLDEN = 0.39758435392751945  # patient_uniform('patient 0', seed=0)
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
PATIENTS = [f"patient {i}" for i in range(4000)]


def test_patient_uniform_is_uniform_and_keyed():
    draws = np.array([schema.patient_uniform(p, 0) for p in PATIENTS])
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    other = np.array([schema.patient_uniform(p, 1) for p in PATIENTS])
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.06
    # Published splits depend on these values: they must never change.
    assert schema.patient_uniform("patient 0", 0) == pytest.approx(GOLDEN, abs=1e-15)


def test_patient_split_has_the_shares_and_depends_on_the_patient_alone():
    split = schema.patient_split(PATIENTS, SHARES, seed=3)
    for name, share in SHARES.items():
        found = np.mean([split[p] == name for p in PATIENTS])
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / len(PATIENTS))
    half = schema.patient_split(PATIENTS[::-2], SHARES, seed=3)
    assert all(split[p] == name for p, name in half.items())
    assert schema.patient_split(PATIENTS, SHARES, seed=4) != split


def test_larger_fractions_hold_the_smaller():
    small = schema.patient_split(PATIENTS, {"in": 0.1, "out": 0.9}, seed=0)
    large = schema.patient_split(PATIENTS, {"in": 0.3, "out": 0.7}, seed=0)
    assert all(large[p] == "in" for p in PATIENTS if small[p] == "in")


@pytest.mark.parametrize("shares", ({"a": 0.5, "b": 0.6}, {"a": 1.2, "b": -0.2}, {}))
def test_impossible_fractions_are_refused(shares):
    with pytest.raises(UserError, match="sum to 1"):
        schema.patient_split(["p"], shares, seed=0)


def test_shares_that_sum_to_almost_one_leave_no_gap():
    shares = {"a": 0.1, "b": 0.2, "c": 0.7 - 5e-7}
    assert set(schema.patient_split(PATIENTS, shares, 0).values()) == {"a", "b", "c"}


def test_split_sha256_sees_patients_only():
    one = schema.split_sha256({"train": ["a", "b", "a"], "test": ["c"]})
    assert one == schema.split_sha256({"test": ["c"], "train": ["b", "a"]})
    moved = schema.split_sha256({"train": ["a"], "test": ["b", "c"]})
    assert set(one) == {"train", "test", "all"}
    assert all(one[name] != moved[name] for name in one)
    assert one["train"] != schema.split_sha256({"train": ["ab", ""]})["train"]
