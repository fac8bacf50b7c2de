"""Metrics and intervals against scikit-learn, brute force and a plain bootstrap loop."""

import time

import numpy as np
import pytest
from sklearn import metrics as sk

from bigmed import calibration, classification, statistics
from bigmed.errors import UserError

NAMES = ("a", "b", "c")


def multi_label_set(n=120, seed=0):
    """Scores with many ties, labels with every code, patients of 1-5 images."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([1, 0, -1, -2], size=(n, 3), p=[0.3, 0.5, 0.1, 0.1]).astype(np.int8)
    scores = np.round(rng.normal(size=(n, 3)) + 0.8 * (labels == 1), 1)
    return scores, labels, rng.integers(n // 3, size=n)


def single_label_set(n=150, seed=1):
    rng = np.random.default_rng(seed)
    actual = rng.choice(3, size=n, p=[0.6, 0.3, 0.1])
    labels = np.eye(3, dtype=np.int8)[actual]
    scores = rng.dirichlet(np.ones(3), size=n) + 0.3 * labels
    return scores / scores.sum(axis=1, keepdims=True), labels, rng.integers(n // 3, size=n)


def test_auc_with_ties_and_ignored_labels_equals_sklearn():
    scores, labels, _ = multi_label_set()
    for c in range(3):
        known = labels[:, c] >= 0
        expected = sk.roc_auc_score(labels[known, c], scores[known, c])
        assert classification.auc(scores[:, c], labels[:, c]) == pytest.approx(expected, abs=1e-12)
        # the same through 32-bit floats, whose ties are the same
        single = classification.auc(scores[:, c].astype(np.float32), labels[:, c])
        assert single == pytest.approx(expected, abs=1e-12)


def test_weighted_auc_equals_repeating_the_images():
    scores, labels, _ = multi_label_set()
    weights = np.random.default_rng(3).integers(0, 4, size=(len(scores), 7))
    fast = classification.auc(scores[:, 0], labels[:, 0], weights)
    for r in range(7):
        repeated = np.repeat(np.arange(len(scores)), weights[:, r])
        assert fast[r] == pytest.approx(
            classification.auc(scores[repeated, 0], labels[repeated, 0]), abs=1e-12
        )


def test_auc_of_one_class_is_missing_not_a_half():
    assert np.isnan(classification.auc(np.arange(4.0), np.array([1, 1, 1, -1])))
    assert np.isnan(classification.auc(np.arange(4.0), np.array([0, 0, -2, -1])))
    assert np.isnan(classification.auc(np.zeros(0), np.zeros(0)))
    assert classification.auc(np.zeros(4), np.array([1, 0, 1, 0])) == 0.5  # all ties: defined
    with pytest.raises(ValueError, match="finite"):
        classification.auc(np.array([0.0, np.nan]), np.array([0, 1]))


def test_single_label_metrics_equal_sklearn():
    scores, labels, patients = single_label_set()
    found = statistics.estimate(scores, labels, patients, NAMES, "single_label", num_resamples=20)
    actual, predicted = labels.argmax(1), scores.argmax(1)
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(actual, predicted))
    assert found["balanced_accuracy"].value == pytest.approx(
        sk.balanced_accuracy_score(actual, predicted)
    )
    expected = sk.roc_auc_score(actual, scores, multi_class="ovr", average="macro")
    assert found["auc_macro"].value == pytest.approx(expected)
    assert found["accuracy"].n_images == 150
    assert found["accuracy"].n_patients == len(np.unique(patients))


def test_macro_auc_is_the_mean_of_the_defined_classes():
    scores, labels, patients = multi_label_set()
    labels[labels[:, 1] == 0, 1] = -2  # class b has no negatives left
    found = statistics.estimate(scores, labels, patients, NAMES, "multi_label", num_resamples=50)
    assert np.isnan(found["auc/b"].value)
    assert found["auc/b"].low is None and found["auc/b"].high is None
    assert found["auc/b"].undefined_resamples == 50
    expected = (found["auc/a"].value + found["auc/c"].value) / 2
    assert found["auc_macro"].value == pytest.approx(expected)
    assert found["auc/b"].n_images == (labels[:, 1] == 1).sum()
    assert "accuracy" not in found


def test_balanced_accuracy_leaves_out_absent_classes():
    scores, labels, patients = single_label_set()
    rows = labels[:, 2] == 0
    found = statistics.estimate(
        scores[rows], labels[rows], patients[rows], NAMES, "single_label", num_resamples=5
    )
    actual, predicted = labels[rows].argmax(1), scores[rows].argmax(1)
    recalls = [(predicted[actual == c] == c).mean() for c in (0, 1)]
    assert found["balanced_accuracy"].value == pytest.approx(np.mean(recalls))


def plain_bootstrap(scores, labels, patients, num_resamples, seed):
    """Patient by patient, image by image, with scikit-learn."""
    rng = np.random.default_rng(seed)
    unique = np.unique(patients)
    values = []
    for _ in range(num_resamples):
        drawn = rng.integers(len(unique), size=len(unique))
        rows = np.concatenate([np.flatnonzero(patients == unique[p]) for p in drawn])
        aucs = []
        for c in range(labels.shape[1]):
            known = rows[labels[rows, c] >= 0]
            if len(set(labels[known, c])) == 2:
                aucs.append(sk.roc_auc_score(labels[known, c], scores[known, c]))
        values.append(np.mean(aucs) if aucs else np.nan)
    return values


def test_bootstrap_equals_a_plain_loop_over_patients(monkeypatch):
    scores, labels, patients = multi_label_set(n=60)
    unique, codes = np.unique(patients, return_inverse=True)
    function = classification.classification_metrics(
        scores, labels, NAMES, "multi_label", units=codes
    )
    fast = statistics.bootstrap(function, len(unique), num_resamples=40, seed=5)["auc_macro"]
    np.testing.assert_allclose(fast, plain_bootstrap(scores, labels, patients, 40, 5), rtol=1e-12)
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 7 * len(unique))  # chunks of 7 resamples
    again = statistics.bootstrap(function, len(unique), num_resamples=40, seed=5)["auc_macro"]
    np.testing.assert_allclose(again, fast, rtol=1e-12)


def test_interval_is_that_of_patients_not_of_images():
    """Twenty copies of every image add no information: the interval must not shrink."""
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], 30)[:, None].astype(np.int8)
    scores = rng.normal(size=(60, 1)) + labels
    patients = np.arange(60)
    one = statistics.estimate(scores, labels, patients, ("x",), "multi_label")["auc_macro"]
    rows = np.repeat(np.arange(60), 20)
    many = statistics.estimate(scores[rows], labels[rows], patients[rows], ("x",), "multi_label")[
        "auc_macro"
    ]
    assert many.low == pytest.approx(one.low) and many.high == pytest.approx(one.high)
    assert many.n_images == 1200 and many.n_patients == 60


def test_interval_covers_the_true_auc_about_95_times_in_100():
    rng = np.random.default_rng(0)
    truth, covered = 0.76025, 0  # of two unit normals one standard deviation apart
    for trial in range(120):
        labels = np.repeat([1, 0], 60)[:, None].astype(np.int8)
        scores = rng.normal(size=(120, 1)) + labels
        found = statistics.estimate(
            scores, labels, np.arange(120), ("x",), "multi_label", num_resamples=300, seed=trial
        )["auc_macro"]
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / 120 <= 0.99


def test_interval_is_missing_when_many_resamples_are_undefined():
    rng = np.random.default_rng(0)
    labels = (np.arange(40) < 2)[:, None].astype(np.int8)
    scores = rng.normal(size=(40, 1))

    def found(patients):
        return statistics.estimate(scores, labels, patients, ("x",), "multi_label")["auc/x"]

    two_patients, one_patient = np.arange(40), np.maximum(np.arange(40), 1)
    given = found(two_patients)
    assert given.low < given.value < given.high
    assert 90 < given.undefined_resamples < 190  # (38 / 40) ** 40 is 13 %
    missing = found(one_patient)
    assert missing.value == pytest.approx(given.value) and missing.low is missing.high is None
    assert 300 < missing.undefined_resamples < 440
    assert found(np.zeros(40)).low is None  # all images of one patient


def test_paired_difference_is_narrower_than_the_intervals_and_zero_for_equal_models():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(200, 1)).astype(np.int8)
    shared = rng.normal(size=(200, 1)) + labels
    a, b = shared + 0.3 * labels, shared + 0.05 * rng.normal(size=(200, 1))
    args = (labels, np.arange(200) // 2, ("x",), "multi_label")
    of_a, of_b = (statistics.resample([scores], *args) for scores in (a, b))
    difference = statistics.paired_difference(of_a, of_b)["auc_macro"]
    one, other = (of.estimates()["auc_macro"] for of in (of_a, of_b))
    assert difference.value == pytest.approx(one.value - other.value)
    assert difference.low > 0  # although the two models' intervals overlap
    assert other.high > one.low
    seeds = [statistics.resample(scores, *args) for scores in ([a, b], [b, a])]
    none = statistics.paired_difference(*seeds)["auc_macro"]
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, 0), abs=1e-12)
    mean = seeds[0].estimates()["auc_macro"]
    assert mean.value == pytest.approx((one.value + other.value) / 2)


def test_a_calibration_error_has_no_interval_as_resampling_raises_it():
    rng = np.random.default_rng(0)
    scores = rng.random((200, 2))
    labels = (rng.random((200, 2)) < scores).astype(np.int8)  # calibrated
    point = calibration.operating_point(scores, labels, "multi_label")
    more = {"points": [point], "num_resamples": 200}
    found = statistics.resample(
        [scores], labels, np.arange(200), NAMES[:2], "multi_label", **more
    )
    name = "calibration/ece"
    assert (found.samples[name] > found.values[name]).mean() > 0.9
    estimates = found.estimates()
    assert estimates[name].low is None and estimates[name].undefined_resamples == 0
    assert estimates["calibration/brier"].low < estimates["calibration/brier"].value


def test_predictions_that_do_not_fit_are_refused():
    scores, labels, patients = multi_label_set()
    for wrong in ((scores[1:], labels, patients), (scores, labels, patients[:-1])):
        with pytest.raises(UserError, match="predictions of 1.. images, labels of 120, patients"):
            statistics.estimate(*wrong, NAMES, "multi_label")
    scores[7, 1] = np.nan
    with pytest.raises(UserError, match="prediction of image 7 is not finite"):
        statistics.estimate(scores, labels, patients, NAMES, "multi_label")


def test_label_policies():
    labels = np.array([[1, 0, -1, -2]], np.int8)
    assert statistics.apply_label_policy(labels, "ignore").tolist() == [[1, 0, -1, -2]]
    assert statistics.apply_label_policy(labels, "zeros").tolist() == [[1, 0, 0, -2]]
    assert statistics.apply_label_policy(labels, "ones").tolist() == [[1, 0, 1, -2]]
    with pytest.raises(UserError, match="did you mean 'zeros'"):
        statistics.apply_label_policy(labels, "zero")


def test_unusable_rows_are_left_out_and_bad_tasks_refused():
    single = np.array([[1, 0], [0, 0], [-2, -2], [0, 1]], np.int8)
    assert statistics.usable(single, "single_label").tolist() == [True, False, False, True]
    multi = np.array([[1, -2], [-1, -2], [-2, 0]], np.int8)
    assert statistics.usable(multi, "multi_label").tolist() == [True, False, True]
    with pytest.raises(UserError, match="row 1 has 2 classes"):
        statistics.usable(np.array([[1, 0], [1, 1]]), "single_label")
    with pytest.raises(UserError, match="task 'none'"):
        statistics.usable(single, "none")
    empty = statistics.estimate(
        np.zeros((1, 2)), np.full((1, 2), -2), np.zeros(1), ("x", "y"), "multi_label"
    )
    assert np.isnan(empty["auc_macro"].value) and empty["auc_macro"].n_images == 0


def test_a_thousand_resamples_of_a_big_test_set_take_seconds():
    rng = np.random.default_rng(0)
    labels = (rng.random((5000, 14)) < 0.1).astype(np.int8)
    scores = rng.normal(size=(5000, 14)).astype(np.float32)
    began = time.monotonic()
    names = [str(c) for c in range(14)]
    statistics.estimate(scores, labels, rng.integers(2000, size=5000), names, "multi_label")
    assert time.monotonic() - began < 20
