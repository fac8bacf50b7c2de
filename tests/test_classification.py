"""Metrics and what is chosen on validation, against scikit-learn, SciPy and plain loops."""

import numpy as np
import pytest
from scipy import optimize
from sklearn import metrics as sk

from bigmed import calibration, classification, statistics

NAMES = ("a", "b", "c", "d")


def multi_label_set(n=150, seed=0):
    """Probabilities with many ties, labels with every code."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([1, 0, -1, -2], size=(n, 4), p=[0.3, 0.5, 0.1, 0.1]).astype(np.int8)
    logits = rng.normal(size=(n, 4)) + 1.5 * (labels == 1) - 0.5
    return np.round(1 / (1 + np.exp(-2 * logits)), 2), labels


def single_label_set(n=200, seed=1):
    rng = np.random.default_rng(seed)
    labels = np.eye(4, dtype=np.int8)[rng.choice(4, size=n, p=[0.5, 0.2, 0.2, 0.1])]
    logits = 3 * (rng.normal(size=(n, 4)) + labels)
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), labels


def ones(n):
    return np.ones((n, 1))


def drawn(n, r=6, seed=5):
    return np.random.default_rng(seed).integers(0, 4, size=(n, r))


def all_metrics(task, weights, seed=0):
    made = multi_label_set if task == "multi_label" else single_label_set
    scores, labels = made(seed=seed)
    point = calibration.operating_point(*made(seed=seed + 10), task)
    function = classification.classification_metrics(scores, labels, NAMES, task, point)
    return function(weights(len(scores))), scores, labels, point


@pytest.mark.parametrize("task", statistics.TASKS)
def test_drawing_patients_is_drawing_their_images(task):
    _, scores, labels, point = all_metrics(task, ones)
    units = np.random.default_rng(0).permutation(len(scores)) % 31
    weights = drawn(31)
    args = (scores, labels, NAMES, task, point)
    found = classification.classification_metrics(*args, units)(weights)
    expected = classification.classification_metrics(*args)(weights[units])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("task", statistics.TASKS)
def test_resamples_equal_repeating_the_images(task):
    found, scores, labels, point = all_metrics(task, drawn)
    weights = drawn(len(scores))
    for r in range(weights.shape[1]):
        rows = np.repeat(np.arange(len(scores)), weights[:, r])
        again = classification.classification_metrics(
            scores[rows], labels[rows], NAMES, task, point
        )(ones(len(rows)))
        assert again.keys() == found.keys()
        for name, value in again.items():
            np.testing.assert_allclose(found[name][r], value[0], rtol=1e-10, err_msg=name)


def test_curve_metrics_equal_sklearn_with_ties():
    found, scores, labels, _ = all_metrics("multi_label", ones)
    precisions = []
    for c, name in enumerate(NAMES):
        known = labels[:, c] >= 0
        y, s = labels[known, c], scores[known, c]
        precisions.append(sk.average_precision_score(y, s))
        assert found[f"ap/{name}"][0] == pytest.approx(precisions[-1], abs=1e-12)
        fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
        expected = tpr[fpr <= 1 - classification.SPECIFICITY].max()
        assert found[f"sensitivity@spec0.9/{name}"][0] == pytest.approx(expected, abs=1e-12)
    assert found["ap_macro"][0] == pytest.approx(np.mean(precisions), abs=1e-12)


def test_thresholds_of_validation_give_sklearns_f1_and_mcc():
    found, scores, labels, point = all_metrics("multi_label", ones)
    validation = multi_label_set(seed=10)
    macro = []
    for c, name in enumerate(NAMES):
        known = validation[1][:, c] >= 0
        y, s = validation[1][known, c], validation[0][known, c]
        best = max(sk.matthews_corrcoef(y, s >= t) for t in np.unique(s))
        assert sk.matthews_corrcoef(y, s >= point.thresholds[c]) == pytest.approx(best)
        known = labels[:, c] >= 0
        y, yes = labels[known, c], scores[known, c] >= point.thresholds[c]
        macro.append(sk.f1_score(y, yes))
        assert found[f"f1/{name}"][0] == pytest.approx(macro[-1])
        assert found[f"mcc/{name}"][0] == pytest.approx(sk.matthews_corrcoef(y, yes))
        assert found[f"sensitivity/{name}"][0] == pytest.approx(sk.recall_score(y, yes))
        specificity = sk.recall_score(y, yes, pos_label=0)
        assert found[f"specificity/{name}"][0] == pytest.approx(specificity)
    assert found["f1/macro"][0] == pytest.approx(np.mean(macro))


def test_top_three_and_balanced_accuracy_equal_sklearn():
    found, scores, labels, _ = all_metrics("single_label", ones)
    actual = labels.argmax(axis=1)
    expected = sk.top_k_accuracy_score(actual, scores, k=3)
    assert found["top3_accuracy"][0] == pytest.approx(expected)
    expected = sk.balanced_accuracy_score(actual, scores.argmax(axis=1))
    assert found["balanced_accuracy"][0] == pytest.approx(expected)
    few = classification.classification_metrics(scores[:, :3], labels[:, :3], "abc", "multi_label")
    assert not {"top3_accuracy", "accuracy"} & set(few(ones(len(scores))))
    ties = classification.top_k(np.zeros((2, 4)), np.array([0, 3]), 3)
    assert not ties.any()  # of equal scores none is among the highest three


def plain_ece(confidence, correct):
    total = 0.0
    for k in range(15):
        last = k == 14
        inside = (confidence >= k / 15) & ((confidence < (k + 1) / 15) | last)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def test_calibration_equals_plain_loops():
    found, scores, labels, point = all_metrics("multi_label", ones)
    scaled = point.scaled(scores, "multi_label")
    briers, errors, after = [], [], []
    for c in range(4):
        known = labels[:, c] >= 0
        y, p = labels[known, c], scores[known, c]
        briers.append(sk.brier_score_loss(y, p))
        errors.append(plain_ece(p, y))
        after.append(plain_ece(scaled[known, c], y))
    assert found["calibration/brier"][0] == pytest.approx(np.mean(briers))
    assert found["calibration/ece"][0] == pytest.approx(np.mean(errors))
    assert found["calibration/ece_scaled"][0] == pytest.approx(np.mean(after))
    found, scores, labels, point = all_metrics("single_label", ones)
    actual = labels.argmax(axis=1)
    assert found["calibration/brier"][0] == pytest.approx(((scores - labels) ** 2).sum(1).mean())
    correct = (scores.argmax(axis=1) == actual).astype(float)
    expected = plain_ece(scores.max(axis=1), correct)
    assert found["calibration/ece"][0] == pytest.approx(expected)
    assert found["calibration/ece_scaled"][0] < expected  # logits three times too large


def test_temperatures_minimise_the_loss():
    scores, labels = multi_label_set(seed=3)
    point = calibration.operating_point(scores, labels, "multi_label")
    for c in range(4):
        known = labels[:, c] >= 0
        p = np.clip(scores[known, c], 1e-7, 1 - 1e-7)
        z, y = np.log(p / (1 - p)), labels[known, c]
        best = optimize.minimize_scalar(
            lambda t, z=z, y=y: np.mean(np.logaddexp(0, z / t) - y * z / t),
            bounds=(0.02, 50), method="bounded", options={"xatol": 1e-9},
        )  # fmt: skip
        assert point.temperatures[c] == pytest.approx(best.x, rel=1e-4)
    scores, labels = single_label_set(seed=3)
    (found,) = calibration.operating_point(scores, labels, "single_label").temperatures
    z = np.log(scores)

    def loss(t):
        return np.mean(np.log(np.exp(z / t).sum(axis=1)) - (labels * z).sum(axis=1) / t)

    best = optimize.minimize_scalar(loss, bounds=(0.02, 50), method="bounded")
    assert found == pytest.approx(best.x, rel=1e-3) and 1.5 < found < 4.5


def test_what_validation_cannot_tell_is_missing():
    scores, labels = multi_label_set()
    validation = labels.copy()
    validation[:, 1] = 0
    point = calibration.operating_point(scores, validation, "multi_label")
    assert np.isnan(point.thresholds[1]) and np.isnan(point.temperatures[1])
    assert np.isfinite(point.thresholds[[0, 2, 3]]).all()
    function = classification.classification_metrics(scores, labels, NAMES, "multi_label", point)
    found = function(ones(len(scores)))
    for name in ("f1", "mcc", "sensitivity", "specificity"):
        assert np.isnan(found[f"{name}/b"][0]) and np.isfinite(found[f"{name}/macro"][0])
    assert np.isfinite(found["sensitivity@spec0.9/b"][0])  # needs no threshold of validation
    assert np.isfinite(found["auc/b"][0])


def test_one_class_alone_has_no_metric():
    scores, labels = multi_label_set()
    labels[:, 0] = np.where(labels[:, 0] >= 0, 1, labels[:, 0])
    labels[:, 1] = np.where(labels[:, 1] >= 0, 0, labels[:, 1])
    labels[:, 2] = -2
    point = calibration.operating_point(*multi_label_set(seed=8), "multi_label")
    function = classification.classification_metrics(scores, labels, NAMES, "multi_label", point)
    found = {name: value[0] for name, value in function(ones(len(scores))).items()}
    for name in ("auc", "mcc", "sensitivity@spec0.9"):
        assert all(np.isnan(found[f"{name}/{c}"]) for c in "abc"), name
    assert np.isnan(found["ap/b"]) and np.isnan(found["f1/b"]) and np.isnan(found["f1/c"])
    assert np.isfinite(found["calibration/brier"])


def test_separable_validation_has_a_bounded_temperature():
    scores = np.array([[0.9], [0.8], [0.2], [0.1]])
    labels = np.array([[1], [1], [0], [0]])
    point = calibration.operating_point(scores, labels, "multi_label")
    assert point.temperatures[0] == pytest.approx(calibration.TEMPERATURES[0], rel=1e-3)
    assert point.thresholds[0] == 0.8
