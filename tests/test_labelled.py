"""What evaluators with labels share: other sites, cases, label policies; against scikit-learn."""

import json

import jax
import memory
import numpy as np
import pytest
from memory import MemorySource, pixels, settings
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
)
from sklearn.preprocessing import StandardScaler

from bigmed import comparison, sharding, statistics
from bigmed.errors import UserError
from bigmed.evaluators import knn, linear, parts

L2 = 0.01


@pytest.fixture
def mesh():
    return sharding.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture
def toy(monkeypatch):
    return memory.install(monkeypatch)


STATE = {"scale": np.ones((1, 1), np.float32)}


def rows_of(evaluator):
    return list(evaluator.run(STATE, "x"))


def by_metric(evaluator):
    return {row["metric"]: row for row in rows_of(evaluator)}


def x_of(source):
    return source.images.reshape(len(source), 16).astype(np.float64) / 255


def fitted(train, labels, **more):
    """scikit-learn's probe on a source's images; a function that gives probabilities."""
    scaler = StandardScaler().fit(x_of(train))
    known = labels >= 0
    weight = more.pop("sample_weight", None)
    model = LogisticRegression(C=1 / (L2 * more.pop("n", known.sum())), max_iter=9000, tol=1e-9)
    weight = None if weight is None else weight[known]
    model.fit(scaler.transform(x_of(train)[known]), labels[known], sample_weight=weight)
    return lambda x: model.predict_proba(scaler.transform(x))


# -------------------------------------------------------------------------------------- other sites


def other_site(task="multi_label", names=("yes", "maybe", "no")):
    site = MemorySource("elsewhere", 80, task=task, seed=9, first_patient=5000)
    site.class_names = names
    return site


def test_a_head_is_applied_unchanged_to_another_site(toy, mesh, tmp_path):
    sources = toy()
    sources["toy", "elsewhere"] = site = other_site()
    shift = {
        "site": {
            "source": {"dir": "toy", "split": "elsewhere"},
            "label_map": {"a": ("yes", "maybe"), "c": "no"},
        }
    }
    evaluator = linear.Evaluator(
        pixels, mesh, **settings(shift=shift, l2_grid=(L2,), predictions_dir=tmp_path)
    )
    rows = {(row["shift"], row["metric"]): row for row in rows_of(evaluator)}
    train = sources["toy", "train"]
    # any of two classes makes it present; uncertain before absent before missing
    a = site.labels[:, :2]
    expected = np.select([(a == 1).any(1), (a == -1).any(1), (a == 0).any(1)], [1, -1, 0], -2)
    scores = fitted(train, train.labels[:, 0])(x_of(site))[:, 1]
    known = expected >= 0
    found = rows["site", "auc/a"]
    assert found["value"] == pytest.approx(roc_auc_score(expected[known], scores[known]), abs=2e-3)
    assert found["n_images"] == known.sum() and found["test_set"] == "toy/elsewhere"
    assert found["split_sha256"] == "sha-elsewhere" and found["n_train_images"] == 120
    assert rows["site", "auc/b"]["value"] is None  # not mapped: nothing is made up
    assert rows["site", "auc_macro"]["undefined_classes"] == ["b"]
    assert rows[None, "auc/a"]["test_set"] == "toy/test"
    assert len({row["predictions"] for row in rows.values()}) == 2
    json.dumps(list(rows.values()))


def test_without_a_map_classes_of_equal_names_are_compared(toy, mesh):
    sources = toy("single_label")
    sources["toy", "elsewhere"] = other_site("single_label", ("c", "a", "other"))
    shift = {"site": {"source": {"dir": "toy", "split": "elsewhere"}}}
    evaluator = linear.Evaluator(pixels, mesh, **settings(shift=shift, l2_grid=(L2,)))
    rows = {(row["shift"], row["metric"]): row for row in rows_of(evaluator)}
    site = sources["toy", "elsewhere"]
    # images of a class that the head does not know are not scored
    assert rows["site", "accuracy"]["n_images"] == (site.labels[:, :2] == 1).any(axis=1).sum()
    assert rows["site", "auc/b"]["value"] is None


@pytest.mark.parametrize(
    ("label_map", "said"),
    [
        ({"d": "yes"}, "shift.site.label_map: 'd': valid: a, b, c"),
        ({"a": "yess"}, "has no class 'yess'; did you mean 'yes'"),
        ({}, "none of which is among a, b, c; give a label_map"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_in_one_line(toy, mesh, label_map, said):
    toy()["toy", "elsewhere"] = other_site()
    shift = {"site": {"source": {"dir": "toy", "split": "elsewhere"}, "label_map": label_map}}
    with pytest.raises(UserError, match=said) as error:
        linear.Evaluator(pixels, mesh, **settings(shift=shift))
    assert "\n" not in str(error.value)


def test_another_site_has_no_patient_of_training(toy, mesh):
    sources = toy()
    sources["toy", "elsewhere"] = MemorySource("elsewhere", 80, first_patient=0)
    shift = {"site": {"source": {"dir": "toy", "split": "elsewhere"}}}
    with pytest.raises(UserError, match="share patients"):
        linear.Evaluator(pixels, mesh, **settings(shift=shift))
    with pytest.raises(UserError, match="choose another name"):
        linear.Evaluator(pixels, mesh, **settings(shift={"val": shift["site"]}))


# ------------------------------------------------------------------------------------------- cases


def by_case(source, values, reduce):
    return np.array([reduce(values[source.cases == c]) for c in np.unique(source.cases)])


def case_label(labels):
    """Of one class: present where any image has it, else uncertain, else absent, else missing."""
    return next((code for code in (1, -1, 0) if (labels == code).any()), -2)


@pytest.mark.parametrize("average", ["features", "scores"])
def test_images_of_a_case_are_averaged(toy, mesh, average):
    sources = toy()
    for source in sources.values():
        source.case_key = "study_id"
    evaluator = linear.Evaluator(pixels, mesh, **settings(average=average, l2_grid=(L2,)))
    rows = {row["metric"]: row for row in rows_of(evaluator)}
    train, test = sources["toy", "train"], sources["toy", "test"]
    usable = {s: statistics.usable(s.labels, "multi_label") for s in (train, test)}
    for s, keep in usable.items():  # images without any label are left out first
        s.cases, s.labels, s.images = s.cases[keep], s.labels[keep], s.images[keep]
    labels = {s: by_case(s, s.labels[:, 0], case_label) for s in (train, test)}
    if average == "features":
        x = {s: by_case(s, x_of(s), lambda v: v.mean(axis=0)) for s in (train, test)}
        scaler = StandardScaler().fit(x[train])
        known = labels[train] >= 0
        model = LogisticRegression(C=1 / (L2 * known.sum()), max_iter=9000, tol=1e-9)
        model.fit(scaler.transform(x[train][known]), labels[train][known])
        scores = model.predict_proba(scaler.transform(x[test]))[:, 1]
    else:
        each = fitted(train, train.labels[:, 0])(x_of(test))[:, 1]
        scores = by_case(test, each, np.mean)
    known = labels[test] >= 0
    row = rows["auc/a"]
    assert row["value"] == pytest.approx(
        roc_auc_score(labels[test][known], scores[known]), abs=2e-3
    )
    assert row["n_images"] == known.sum() and row["unit"] == "study" and row["averaged"] == average
    assert row["n_train_images"] == len(train.labels)


def test_cases_of_several_classes_have_no_label(toy, mesh):
    toy("single_label")
    with pytest.raises(UserError, match="cases whose images are of several classes"):
        linear.Evaluator(pixels, mesh, **settings(average="scores"))
    with pytest.raises(UserError, match="did you mean 'scores'"):
        linear.Evaluator(pixels, mesh, **settings(average="score"))


# -------------------------------------------------------------------------------------- uncertainty


def test_smooth_targets_are_learnt_from_and_not_scored(toy, mesh):
    sources = toy()
    rows = {
        row["metric"]: row
        for row in rows_of(
            linear.Evaluator(pixels, mesh, **settings(uncertain="smooth", l2_grid=(L2,)))
        )
    }
    train, test = sources["toy", "train"], sources["toy", "test"]
    labels = train.labels[:, 0]
    # a target of .7 is .7 of a positive and .3 of a negative image
    weight = np.where(labels == -1, statistics.SMOOTH_TARGET, 1.0)
    twice = MemorySource("twice", 1)
    twice.images = np.concatenate([train.images, train.images[labels == -1]])
    twice.labels = np.concatenate([np.where(labels == -1, 1, labels), 0 * labels[labels == -1]])
    weights = np.concatenate([weight, np.full((labels == -1).sum(), 1 - statistics.SMOOTH_TARGET)])
    scaler = StandardScaler().fit(x_of(train))
    known = twice.labels >= 0
    x = twice.images.reshape(-1, 16).astype(np.float64) / 255
    model = LogisticRegression(C=1 / (L2 * (labels >= -1).sum()), max_iter=9000, tol=1e-9)
    model.fit(scaler.transform(x[known]), twice.labels[known], sample_weight=weights[known])
    scores = model.predict_proba(scaler.transform(x_of(test)))[:, 1]
    scored = test.labels[:, 0] >= 0
    row = rows["auc/a"]
    expected = roc_auc_score(test.labels[scored, 0], scores[scored])
    assert row["value"] == pytest.approx(expected, abs=2e-3) and row["n_images"] == scored.sum()
    assert row["label_policy"] == "uncertain=smooth, missing=ignore"


def test_three_classes_give_present_against_absent(toy, mesh):
    sources = toy()
    evaluator = linear.Evaluator(pixels, mesh, **settings(uncertain="three_class", l2_grid=(L2,)))
    rows = {row["metric"]: row for row in rows_of(evaluator)}
    train, test = sources["toy", "train"], sources["toy", "test"]
    labels = train.labels[:, 0]
    known = labels >= -1
    scaler = StandardScaler().fit(x_of(train)[known])
    model = LogisticRegression(C=1 / (L2 * known.sum()), max_iter=9000, tol=1e-9)
    p = model.fit(scaler.transform(x_of(train)[known]), labels[known]).predict_proba(
        scaler.transform(x_of(test))
    )
    at = {code: i for i, code in enumerate(model.classes_)}
    scores = p[:, at[1]] / (p[:, at[0]] + p[:, at[1]])
    scored = test.labels[:, 0] >= 0
    expected = roc_auc_score(test.labels[scored, 0], scores[scored])
    assert rows["auc/a"]["value"] == pytest.approx(expected, abs=2e-3)
    toy("single_label")
    with pytest.raises(UserError, match="is of task multi_label"):
        linear.Evaluator(pixels, mesh, **settings(uncertain="three_class"))


def test_what_is_missing_is_never_learnt_from():
    labels = np.array([[1, 0, -1, -2]], np.int8)
    expected = {
        "ignore": [1, 0, -1, -2], "zeros": [1, 0, 0, -2], "ones": [1, 0, 1, -2],
        "smooth": [1, 0, 0.7, -2], "three_class": [1, 0, -1, -2],
    }  # fmt: skip
    for policy in statistics.UNCERTAIN_POLICIES:
        found = parts.training_targets(labels, policy)
        np.testing.assert_allclose(found[0], expected[policy], rtol=1e-6)


def test_neighbours_with_smooth_targets_vote_in_part():
    targets = np.array([[[1.0], [0.7], [-2.0], [0.0]]])
    similarities = np.ones((1, 4))
    found = knn.votes(similarities, targets, [4], np.array([0.1]), None)
    np.testing.assert_allclose(found, (1 + 0.7 + 0) / 3)


# ---------------------------------------------------------------------------------- draws of labels


def test_a_draw_that_leaves_nothing_gives_rows_that_say_so(toy, mesh, tmp_path):
    sources = toy()
    sources["toy", "train"].labels[:] = 0
    sources["toy", "train"].labels[0] = 1  # one patient has them all
    whole = linear.Evaluator(pixels, mesh, **settings(predictions_dir=tmp_path, l2_grid=(L2,)))
    draws = [whole.with_subset(0.05, seed) for seed in range(8)]
    empty = [draw for draw in draws if draw._unlearnable]
    assert empty
    rows = rows_of(empty[0])
    of_classes = {f"{metric}/{c}" for metric in ("auc", "ap") for c in "abc"}
    assert {row["metric"] for row in rows} == {"auc_macro", "ap_macro"} | of_classes
    for row in rows:
        assert row["value"] is None and row["ci_low"] is None and row["fraction"] == 0.05
        assert "no class with both" in row["reason"] or "no labelled image" in row["reason"]
    with pytest.raises(UserError, match="fraction=0"):
        whole.with_subset(0.0, 0)
    sources["toy", "train"].labels[1:] = -2
    with pytest.raises(UserError, match="no class with both positive and negative"):
        linear.Evaluator(pixels, mesh, **settings())


def test_subsets_are_written_once_and_equal_in_every_workdir(toy, mesh, tmp_path):
    toy()
    hashes = []
    for folder, key in ((tmp_path / "a", b"one"), (tmp_path / "b", b"two")):
        more = {"predictions_dir": folder, "hash_key": key, "l2_grid": (L2,)}
        whole = linear.Evaluator(pixels, mesh, **settings(**more))
        rows = rows_of(whole.with_subset(0.5, 1))
        hashes.append({row["subset_sha256"] for row in rows})
        assert rows[0]["subset_seed"] == 1
        (manifest,) = folder.glob("subset-*.json")
        content = json.loads(manifest.read_text())
        assert manifest.stem == f"subset-{rows[0]['subset_sha256']}"
        assert content["n_images"] == rows[0]["n_train_images"] == len(content["records"])
        assert content["n_patients"] == rows[0]["n_train_patients"] == len(content["patients"])
        assert "patient-" not in manifest.read_text()
    assert hashes[0] == hashes[1] and len(hashes[0]) == 1
    assert rows_of(whole)[0]["subset_seed"] is None


# ---------------------------------------------------------------------------- metrics and intervals


def test_thresholds_come_from_validation_and_details_can_be_left_out(toy, mesh, tmp_path):
    sources = toy()
    more = {"l2_grid": (L2,), "predictions_dir": tmp_path}
    rows = by_metric(linear.Evaluator(pixels, mesh, **settings(**more)))
    train, val, test = (sources["toy", split] for split in ("train", "val", "test"))
    known = (test.labels[:, 0] == 0) | (test.labels[:, 0] == 1)
    predict = fitted(train, train.labels[:, 0])
    of_val, of_test = (predict(x_of(source))[:, 1] for source in (val, test))
    mask = (val.labels[:, 0] == 0) | (val.labels[:, 0] == 1)
    thresholds = np.unique(of_val[mask])
    mcc = [matthews_corrcoef(val.labels[mask, 0], of_val[mask] >= t) for t in thresholds]
    answers = of_test[known] >= thresholds[int(np.argmax(mcc))]
    expected = f1_score(test.labels[known, 0], answers)
    assert rows["f1/a"]["value"] == pytest.approx(expected, abs=0.02)
    expected = average_precision_score(test.labels[known, 0], of_test[known])
    assert rows["ap/a"]["value"] == pytest.approx(expected, abs=1e-3)
    assert rows["calibration/ece"]["ci_low"] is None and rows["calibration/brier"]["ci_low"] > 0
    few = rows_of(linear.Evaluator(pixels, mesh, **settings(details=False, **more)))
    kinds = {row["metric"].partition("/")[0] for row in few}
    assert kinds == {"auc_macro", "ap_macro", "auc", "ap"}


def test_a_site_without_a_source_is_refused(toy, mesh):
    toy()
    for wrong in ({"dir": "x"}, "x", None):
        with pytest.raises(UserError, match="shift.there has no source"):
            linear.Evaluator(pixels, mesh, **settings(shift={"there": wrong}))


def test_delongs_interval_of_single_classes(toy, mesh, tmp_path):
    sources = toy()
    more = {"l2_grid": (L2,), "predictions_dir": tmp_path, "interval": "delong"}
    rows = by_metric(linear.Evaluator(pixels, mesh, **settings(**more)))
    (file,) = {row["predictions"] for row in rows.values()}
    with np.load(tmp_path / file) as found:
        scores = found["scores"][:, 1]
    test = sources["toy", "test"]
    low, high = comparison.delong([scores], test.labels[:, 1], test.patients).interval()
    assert rows["auc/b"]["ci_low"] == pytest.approx(low, abs=1e-6)
    assert rows["auc/b"]["ci_high"] == pytest.approx(high, abs=1e-6)
    assert [name for name, row in rows.items() if row["interval"] == "delong"] == [
        "auc/a", "auc/b", "auc/c",
    ]  # fmt: skip
    with pytest.raises(UserError, match="did you mean 'delong'"):
        linear.Evaluator(pixels, mesh, **settings(interval="delongs"))


# ----------------------------------------------------------------------------------------- pictures


def test_neighbours_are_the_training_images_that_lie_nearest(toy, mesh):
    sources = toy()
    evaluator = knn.Evaluator(pixels, mesh, **settings())
    (found,) = evaluator.neighbours(STATE)
    train, test = sources["toy", "train"], sources["toy", "test"]
    x = x_of(train)
    known = np.flatnonzero(((train.labels == 0) | (train.labels == 1)).any(axis=1))
    for q, row in enumerate(found.query_rows):
        similar = x[known] @ x_of(test)[row] / np.linalg.norm(x[known], axis=1)
        expected = known[np.argsort(-similar)[: found.found_rows.shape[1]]]
        np.testing.assert_array_equal(found.found_rows[q], expected)
        np.testing.assert_array_equal(found.found_labels[q], train.labels[expected])
        np.testing.assert_array_equal(found.query_labels[q], test.labels[row])
    assert len(found.query_rows) == 8 and found.class_names == train.class_names


@pytest.mark.parametrize("average", ["features", "scores"])
def test_a_map_shows_cases_where_they_are_averaged(toy, mesh, average):
    sources = toy()
    evaluator = knn.Evaluator(pixels, mesh, **settings(average=average))
    (found,) = evaluator.features(STATE)
    test = sources["toy", "test"]
    known = ((test.labels == 0) | (test.labels == 1)).any(axis=1)
    cases = [known & (test.cases == case) for case in np.unique(test.cases[known])]
    expected = np.stack([x_of(test)[case].mean(axis=0) for case in cases])
    np.testing.assert_allclose(found.x, expected, rtol=1e-5, atol=1e-6)
    assert len(found.labels) == len(cases)
