"""Opening data sets: TFDS directories of any origin, side-cars, caches, leaks, broken files."""

import io
import os
import pathlib
import pickle
import shutil
from concurrent import futures

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tfds_writer import TOY_FIELDS, tagged_image, write_tfds, write_toy

from bigmed.data import indexing, records, schema, sources
from bigmed.data.sources import check_disjoint, open_source
from bigmed.errors import UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> pathlib.Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("BIGMED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _open(directory, split="train", **overrides):
    return open_source({"dir": str(directory), "split": split, "fields": TOY_FIELDS, **overrides})


def _prepared(folder: pathlib.Path, patients: dict[str, list[str]]) -> pathlib.Path:
    """A directory as ingest leaves it: our feature names, bigmed.json, side-car indexes."""
    features = schema.features(["image", "patient_id", "labels"], num_classes=2)
    labels = np.array([[1, 0], [0, -1], [-2, 1]], np.int8)

    def rows(ids):
        for i, patient in enumerate(ids):
            image = schema.cv2.imencode(".png", tagged_image(i))[1].tobytes()
            yield {"image": image, "patient_id": patient, "labels": labels[i % 3]}

    directory = write_tfds(
        folder, "prep", features, {k: list(rows(v)) for k, v in patients.items()}
    )
    schema.DatasetFacts(
        name="prepared",
        class_names=("edema", "mass"),
        task="multi_label",
        split_sha256=schema.split_sha256(patients),
        counts={},
        patients={split: len(set(ids)) for split, ids in patients.items()},
        synthetic=True,
    ).write(directory / schema.INFO_FILE)
    for split, ids in patients.items():
        index = schema.Index.build(ids, labels[np.arange(len(ids)) % 3])
        index.save(schema.index_path(directory, split))
    return directory


def test_a_foreign_directory_reads_as_tfds_itself_reads_it(toy):
    expected = list(tfds.builder_from_directory(str(toy)).as_data_source("train"))
    source = _open(toy)
    assert len(source) == 24 and source.name == "toy/train" and source.bits == 8
    encoded = source.read(range(24))
    for i, example in enumerate(expected):
        image = schema.cv2.imdecode(np.frombuffer(encoded[i], np.uint8), 0)
        assert np.array_equal(image, example["img"][..., 0])
        assert source.patient_keys[source.patients[i]] == example["pid"].decode()
        assert source.labels[i].tolist() == np.eye(2)[example["label"]].tolist()
    assert source.labels.dtype == np.int8 and source.patients.dtype == np.int32
    assert source.class_names == ("cat", "dog") and source.task == "single_label"
    assert source.read_field("patient_id", [5]) == ["secret-1"]
    assert np.array_equal(source.cases, source.patients)


def test_ids_in_any_order_and_repeated(toy):
    source = _open(toy)
    assert source.read([7, 0, 7]) == [source.read([7])[0], source.read([0])[0], source.read([7])[0]]


def test_label_features_of_every_kind(toy):
    findings = _open(toy, fields={**TOY_FIELDS, "labels": "findings"})
    assert findings.task == "multi_label" and findings.class_names == ("a", "dog", "c")
    assert findings.labels[:2].tolist() == [[0, 0, 0], [1, 0, 1]]
    vector = _open(toy, fields={**TOY_FIELDS, "labels": "vector"})
    assert vector.labels[:3].tolist() == [[1, 0], [0, -1], [-2, 1]]
    assert vector.class_names == ("class_0", "class_1")
    none = _open(toy, fields={"image": "img"})
    assert none.labels.shape == (24, 0) and none.task == "none" and none.class_names == ()
    subset = _open(toy, fields={**TOY_FIELDS, "labels": "findings"}, classes=("c", "a"))
    assert subset.class_names == ("c", "a")
    assert subset.labels[1].tolist() == [1, 1]


def test_unlabelled_examples_of_tfds_are_missing():
    reader = indexing.LabelReader(3, numbered=True)
    assert reader(np.array([-1])).tolist() == [schema.MISSING] * 3
    with pytest.raises(ValueError, match=r"0\.\.2"):
        reader(np.array([3]))


def test_without_patient_ids_each_image_is_its_own_patient_and_this_is_said(toy):
    source = _open(toy, fields={"image": "img", "labels": "label"})
    assert len(set(source.patients.tolist())) == 24
    assert "no patient ids: each image counts as its own patient" in source.describe()
    check_disjoint(source, _open(toy, "test"))  # other records, and no more is known
    with pytest.raises(UserError, match="'toy/train' and 'toy/train' share 24 patients"):
        check_disjoint(source, _open(toy))


def test_parts_and_sums_of_splits(toy):
    whole, test = _open(toy), _open(toy, "test")
    source = _open(toy, "test+train[50%:]")
    assert len(source) == 6 + 12
    assert source.read(range(18)) == test.read(range(6)) + whole.read(range(12, 24))
    keys = [source.patient_keys[code] for code in source.patients]
    assert keys == [f"secret-{100 + i // 3}" for i in range(6)] + [
        f"secret-{i // 3}" for i in range(12, 24)
    ]
    assert np.array_equal(source.labels, np.concatenate([test.labels, whole.labels[12:]]))
    # A message counts within the split that is on disk.
    assert "split 'train', record 13:" in str(source.records.error(7, "x"))


def test_cases_by_study_are_told_apart_between_patients(toy):
    fields = {**TOY_FIELDS, "study_id": "study"}
    source = _open(toy, fields=fields, case="study_id")
    groups = {}
    for i, case in enumerate(source.cases.tolist()):
        groups.setdefault(case, set()).add((i // 3, i % 2))
    assert all(len(members) == 1 for members in groups.values())
    assert len(groups) == 16  # 8 patients of two studies each
    with pytest.raises(UserError, match="has no field study_id"):
        _open(toy, case="study_id")


def test_a_foreign_split_is_scanned_once(toy, cache, monkeypatch, capfd):
    first = _open(toy)
    assert len(list(cache.glob("index-*.npz"))) == 1
    assert os.stat(next(cache.glob("index-*"))).st_mode & 0o077 == 0  # it holds patient ids
    monkeypatch.setattr(records.Records, "read_fields", None)  # any read would fail
    second = _open(toy)
    assert np.array_equal(first.patients, second.patients)
    assert np.array_equal(first.labels, second.labels)
    with pytest.raises(TypeError):
        _open(toy, fields={**TOY_FIELDS, "labels": "findings"})  # another index is needed
    assert "secret" not in "".join(capfd.readouterr())


def test_a_changed_file_is_scanned_again_and_a_torn_cache_is_replaced(toy, tmp_path, cache):
    copy = shutil.copytree(toy, tmp_path / "copy")
    _open(copy)
    shard = next(copy.glob("*train*"))
    os.utime(shard, (1, 1))
    _open(copy)
    cached = list(cache.glob("index-*.npz"))
    assert len(cached) == 2
    for path in cached:
        path.write_bytes(path.read_bytes()[:100])
    assert len(_open(copy).patients) == 24


def test_an_unwritable_cache_does_not_stop_the_run(toy, tmp_path, monkeypatch, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    monkeypatch.setenv("BIGMED_CACHE", str(blocker / "below"))
    assert len(_open(toy)) == 24
    assert "cannot keep an index" in capsys.readouterr().err


def test_our_own_directories_open_without_reading_a_record(tmp_path, monkeypatch):
    ids = ["p1", "p0", "p1", "p2"]
    directory = _prepared(tmp_path, {"train": ids, "test": ["q"]})
    monkeypatch.setattr(records.Records, "read_fields", None)
    source = open_source({"dir": directory, "split": "train"})
    assert source.name == "prepared/train" and source.class_names == ("edema", "mass")
    assert [source.patient_keys[code] for code in source.patients] == ids
    assert source.labels.tolist() == [[1, 0], [0, -1], [-2, 1], [1, 0]]
    assert source.task == "multi_label"
    assert "synthetic" in source.describe() and "3 patients" in source.describe()
    facts = schema.DatasetFacts.read(directory)
    assert source.split_sha256 == facts.split_sha256["train"]


def test_a_side_car_of_other_records_is_refused(tmp_path):
    directory = _prepared(tmp_path, {"train": ["a", "b", "c"]})
    index = schema.Index.build(["a", "b"], np.zeros((2, 2), np.int8))
    index.save(schema.index_path(directory, "train"))
    with pytest.raises(UserError, match="is of 2 records but the split has 3"):
        open_source({"dir": directory, "split": "train"})


def test_labels_narrower_than_the_class_names_are_refused(tmp_path):
    directory = _prepared(tmp_path, {"train": ["a", "b"]})
    index = schema.Index.build(["a", "b"], np.zeros((2, 1), np.int8))
    index.save(schema.index_path(directory, "train"))
    with pytest.raises(UserError, match="labels are 1 wide but there are 2 class names"):
        open_source({"dir": directory, "split": "train"})


def test_16_bit_directories_say_so(tmp_path):
    image = np.full((4, 5), 60000, np.uint16)
    feature = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    rows = [{"image": schema.cv2.imencode(".png", image)[1].tobytes()}]
    directory = write_tfds(tmp_path, "deep", {"image": feature}, {"train": rows})
    assert open_source({"dir": directory, "split": "train"}).bits == 16


def test_fingerprints_follow_the_content_not_the_place(toy, tmp_path):
    copy = shutil.copytree(toy, tmp_path / "elsewhere")
    base = _open(toy).fingerprint
    assert _open(copy).fingerprint == base
    others = [
        _open(toy, "test"),
        _open(toy, "train[:50%]"),
        _open(toy, fields={**TOY_FIELDS, "labels": "findings"}),
        _open(toy, classes=("dog",)),
    ]
    assert len({base, *(source.fingerprint for source in others)}) == 5


def test_leaks_are_refused_with_a_count_and_no_identifier(toy):
    train, test = _open(toy), _open(toy, "test")
    check_disjoint(train, test)
    with pytest.raises(UserError) as error:
        check_disjoint(test, _open(toy, "train[:50%]"), train)
    assert "'toy/train[:50%]' and 'toy/train' share 4 patients" in str(error.value)
    assert "secret" not in str(error.value)
    check_disjoint(train, _open(toy, id_space="another hospital"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dir": "/no/such/folder"}, "data directory not found: /no/such/folder"),
        ({"split": "tran"}, "has no split 'tran'; did you mean 'train'"),
        ({"split": "train[:x]"}, "has no split"),
        ({"split": ""}, "give split"),
        ({"spilt": "train"}, "no key 'spilt'; did you mean 'split'"),
        ({"fields": {"image": "imgs"}}, "no such feature; did you mean 'img'"),
        ({"fields": {"picture": "img"}}, "fields.picture: no such field"),
        ({"fields": {}}, "has no feature 'image'; set fields.image to one of: age"),
        ({"fields": {"image": "vector"}}, "'vector' of data set 'toy' is a Tensor"),
        ({"fields": {"image": "img", "labels": "pid"}}, "is a Text .*valid: ClassLabel"),
        ({"fields": {"image": "img", "labels": "age"}}, "'train', record 0: labels must be 1"),
        ({"classes": ("cta",)}, "no class 'cta'; did you mean 'cat'"),
        ({"case": "lesion"}, "valid: patient_id, study_id"),
        ({"dir": None}, "give dir"),
    ],
)
def test_mistakes_are_named_in_one_line(toy, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        _open(toy, **overrides)
    assert "\n" not in str(error.value)


def test_a_folder_above_the_data_set_gets_a_hint(toy):
    with pytest.raises(UserError, match=f"did you mean {toy}"):
        _open(toy.parent.parent)


def test_tfrecord_directories_are_refused(toy, tmp_path):
    copy = shutil.copytree(toy, tmp_path / "copy")
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="stored as tfrecord, which has no random access"):
        _open(copy)


def test_catalogue_names_need_tensorflow_and_are_prepared_as_array_record(toy, monkeypatch):
    config = {"name": "toy_catalogue", "split": "train", "fields": TOY_FIELDS}
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bigmed\[tf\]'"):
        open_source(config)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: object())
    calls = []

    class Builder:
        data_path = toy

        def download_and_prepare(self):
            calls.append("prepared")

    def builder(name, *, data_dir, file_format):
        calls.append((name, data_dir, file_format))
        return Builder()

    monkeypatch.setattr(sources.tfds, "builder", builder)
    assert len(open_source(config)) == 24
    assert calls == [("toy_catalogue", None, "array_record"), "prepared"]
    monkeypatch.undo()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="catalogue has no 'mnits'; did you mean 'mnist'"):
        open_source({**config, "name": "mnits"})


def test_a_real_catalogue_name_is_prepared_from_files_placed_by_hand(tmp_path):
    """CheXpert of the catalogue, in its published layout; needs the extra `tf`."""
    pytest.importorskip("tensorflow", reason="the TFDS catalogue needs pip install -e '.[tf]'")
    config = {"name": "chexpert", "dir": str(tmp_path), "split": "train"}
    with pytest.raises(UserError, match="'chexpert' of the TFDS catalogue cannot be prepared: "):
        open_source(config)
    placed = tmp_path / "downloads" / "manual"
    findings = [f"finding {i}" for i in range(14)]
    for split, patients in (("train", 3), ("valid", 1)):
        rows = []
        for patient in range(patients):
            name = f"CheXpert-v1.0-small/{split}/patient{patient:05d}/study1/view1_frontal.jpg"
            (placed / name).parent.mkdir(parents=True)
            Image.fromarray(np.full((20, 24), 40 * patient, np.uint8)).save(placed / name)
            states = ["1.0", "", "-1.0", "0.0", "1.0", "", "-1.0"] * 2
            rows.append([name, "Male", "50", "Frontal", "AP", *states])
        header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *findings]
        table = "\n".join(",".join(row) for row in [header, *rows]) + "\n"
        (placed / "CheXpert-v1.0-small" / f"{split}.csv").write_text(table)
    source = open_source(config)
    assert len(source) == 3 and source.bits == 8 and not source.has_patients
    sizes = [Image.open(io.BytesIO(encoded)).size for encoded in source.read(range(3))]
    assert sizes == [(24, 20)] * 3
    assert list(tmp_path.rglob("*.array_record*"))


def test_a_corrupt_record_is_named_by_number_and_spares_the_others(toy, tmp_path):
    copy = shutil.copytree(toy, tmp_path / "copy")
    source = _open(copy)
    broken = _corrupt(copy, source, record=17)
    with pytest.raises(UserError, match="data set 'toy', split 'train', record 17: cannot be read"):
        broken.read(range(24))
    assert broken.read([16, 18]) == source.read([16, 18])


def _corrupt(directory: pathlib.Path, source, record: int):
    """Flips bits inside one record's stored image; the source opened anew (from the cache)."""
    shard = next(directory.glob("*train*"))
    content = bytearray(shard.read_bytes())
    stamp = shard.stat().st_mtime_ns
    place = content.find(source.read([record])[0][40:])  # beyond the PNG header
    assert place > 0
    content[place + 5] ^= 0xFF
    shard.write_bytes(content)
    os.utime(shard, ns=(stamp, stamp))
    return _open(directory)


@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage", "remove"])
def test_a_broken_shard_is_named(toy, tmp_path, damage):
    copy = shutil.copytree(toy, tmp_path / "copy")
    shard = next(copy.glob("*train*"))
    content = shard.read_bytes()
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(
            {"truncate": content[: len(content) // 2], "empty": b"", "garbage": b"x" * 99999}[
                damage
            ]
        )
    with pytest.raises(UserError, match=shard.name):
        _open(copy)


def test_sources_pickle_and_many_threads_may_read_one(toy):
    source = _open(toy)
    expected = source.read(range(24))
    rebuilt = pickle.loads(pickle.dumps(source))
    orders = [np.random.default_rng(n).permutation(24) for n in range(64)]
    with futures.ThreadPoolExecutor(8) as pool:
        for order, got in zip(orders, pool.map(rebuilt.read, orders), strict=True):
            assert got == [expected[i] for i in order]
