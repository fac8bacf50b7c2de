"""The synthetic phantom: deterministic, shared within a patient, labels not in the brightness."""

import hashlib
import json
import multiprocessing

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from bigmed.data import phantom, schema
from bigmed.errors import UserError


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "set"
    return out, phantom.prepare(out, num_patients=40, size=48, seed=0)


def test_reads_through_tfds_and_says_that_it_is_synthetic(prepared):
    out, facts = prepared
    assert facts.synthetic and facts.name == "synthetic_phantom"
    assert json.loads((out / "bigmed.json").read_text())["synthetic"] is True
    assert "Synthetic" in json.loads((out / "dataset_info.json").read_text())["description"]
    for split, count in facts.counts["images"].items():
        source = tfds.builder_from_directory(str(out)).as_data_source(split)
        index = schema.Index.load(schema.index_path(out, split))
        assert len(source) == len(index) == count
        for row, example in enumerate(source):
            assert example["image"].shape == (48, 48, 1) and example["image"].dtype == np.uint8
            assert example["mask"].shape == (48, 48, 1) and set(np.unique(example["mask"])) == {
                0,
                255,
            }
            assert example["source"].decode() == "synthetic_phantom"
            assert "synthetic" in example["view"].decode()
            assert example["text"].decode().startswith("Synthetic phantom.")
            np.testing.assert_array_equal(example["labels"], index.labels[row])
            patient = example["patient_id"].decode()
            assert patient == index.patient_keys[index.patients[row]]


def test_patients_have_one_to_four_images_in_one_split(prepared):
    out, facts = prepared
    keys = {}
    for split in facts.patients:
        index = schema.Index.load(schema.index_path(out, split))
        keys[split] = set(index.patient_keys)
        images = np.bincount(index.patients)
        assert images.min() >= 1 and images.max() <= 4
        for patient in range(len(images)):  # findings are the patient's
            assert len(np.unique(index.labels[index.patients == patient], axis=0)) == 1
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == 40
    assert facts.split_sha256 == schema.split_sha256(keys)


def test_same_arguments_same_bytes_and_nothing_is_done_twice(prepared, tmp_path):
    out, facts = prepared
    phantom.prepare(tmp_path / "set", num_patients=40, size=48, seed=0)
    assert hashes(tmp_path / "set") == hashes(out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert phantom.prepare(out, num_patients=40, size=48, seed=0) == facts
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_phantom_at_the_same_place_is_refused(prepared):
    with pytest.raises(UserError, match="another source"):
        phantom.prepare(prepared[0], num_patients=41, size=48, seed=0)


def test_a_killed_run_leaves_nothing_that_passes_for_a_data_set(prepared, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phantom.writer, "finish", die)
        with pytest.raises(Killed):
            phantom.prepare(tmp_path / "set", num_patients=40, size=48, seed=0)
    assert not (tmp_path / "set").exists()
    phantom.prepare(tmp_path / "set", num_patients=40, size=48, seed=0)
    assert hashes(tmp_path / "set") == hashes(prepared[0])


def test_two_processes_may_prepare_at_once(tmp_path):
    out = tmp_path / "set"
    arguments = {"num_patients": 12, "size": 32, "seed": 1}
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=phantom.prepare, args=(out,), kwargs=arguments) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert schema.DatasetFacts.read(out).synthetic
    assert "set.partial" not in {path.name for path in tmp_path.iterdir()}


def test_images_of_a_patient_differ_and_seeds_differ():
    films = [phantom.render(0, 7, image, 64)[0].astype(int) for image in range(3)]
    assert all(np.abs(films[0] - film).mean() > 5 for film in films[1:])
    np.testing.assert_array_equal(films[0], phantom.render(0, 7, 0, 64)[0])
    assert np.abs(films[0] - phantom.render(1, 7, 0, 64)[0]).mean() > 5


def test_findings_change_the_picture_inside_the_lungs(monkeypatch):
    changed = 0
    for patient in range(6):
        monkeypatch.setattr(phantom, "PREVALENCE", 1.0)
        sick = phantom.render(0, patient, 0, 96)[0].astype(float)
        monkeypatch.setattr(phantom, "PREVALENCE", 0.0)
        healthy, mask = phantom.render(0, patient, 0, 96)
        difference = np.abs(sick - healthy)
        assert difference[mask > 0].mean() > 3 * difference[mask == 0].mean()
        changed += difference[mask > 0].mean() > 10
    assert changed >= 5


def test_report_and_labels_agree():
    words = {"nodules": "nodules", "consolidation": "Consolidation", "effusion": "effusion",
             "cardiomegaly": "heart"}  # fmt: skip
    for patient in range(60):
        person = phantom.make_patient(0, patient)
        for finding, label in zip(phantom.FINDINGS, person.labels, strict=True):
            assert (words[finding] in person.report) == (label == schema.PRESENT)
        assert ("No finding" in person.report) == (not person.labels.any())


def test_devices_and_exposure_are_independent_of_the_labels(monkeypatch):
    """A device on the film of a patient is there, at the same place, were the patient healthy."""
    drawn = []
    monkeypatch.setattr(
        phantom, "_devices", lambda film, rng, size: drawn.append((rng.random(), film.shape))
    )
    for prevalence in (0.0, 1.0):
        monkeypatch.setattr(phantom, "PREVALENCE", prevalence)
        phantom.render(0, 3, 1, 32)
    assert drawn[0] == drawn[1]


def test_brightness_does_not_tell_the_labels_but_the_picture_does():
    """A linear probe on intensity statistics stays far below one on the picture itself."""

    def films(patients):
        pixels, labels = [], []
        for patient in patients:
            person = phantom.make_patient(0, patient)
            for image in range(person.num_images):
                pixels.append(phantom.render(0, patient, image, 32)[0] / 255.0)
                labels.append(person.labels)
        return np.stack(pixels), np.stack(labels)

    def statistics(x):
        flat = x.reshape(len(x), -1)
        quantiles = np.percentile(flat, (1, 10, 25, 50, 75, 90, 99), axis=1).T
        return np.column_stack([flat.mean(1), flat.std(1), quantiles])

    def macro_auc(features, columns):
        scaler = StandardScaler().fit(features(train))
        scores = []
        for k in columns:
            model = LogisticRegression(C=1e-2, max_iter=500)
            model.fit(scaler.transform(features(train)), train_labels[:, k])
            score = model.decision_function(scaler.transform(features(test)))
            scores.append(roc_auc_score(test_labels[:, k], score))
        return np.mean(scores)

    train, train_labels = films(range(250))
    test, test_labels = films(range(1000, 1150))
    assert macro_auc(statistics, range(4)) < 0.70
    # Effusion and heart size have a fixed place, so even pixels tell them: the labels are no noise.
    place = macro_auc(lambda x: x[:, ::2, ::2].reshape(len(x), -1), (2, 3))
    assert place > 0.75 and place > macro_auc(statistics, (2, 3)) + 0.1


def test_all_classes_and_views_occur():
    labels = np.stack([phantom.make_patient(0, patient).labels for patient in range(400)])
    share = labels.mean(0)
    assert np.all(np.abs(share - phantom.PREVALENCE) < 4 * np.sqrt(0.3 * 0.7 / 400))
    assert np.abs(np.corrcoef(labels.T) - np.eye(4)).max() < 0.2
