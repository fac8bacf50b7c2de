"""Feature pass, linear probe and k-NN on a data set in memory, against scikit-learn."""

import json
import logging
import types

import cv2
import jax
import jax.numpy as jnp
import memory
import numpy as np
import pytest
from memory import KEY, MemorySource, pixels, settings
from processes import run_two
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from bigmed import sharding
from bigmed.data import ingest, manifest, schema
from bigmed.data.sources import open_source
from bigmed.errors import NonFiniteError, UserError
from bigmed.evaluators import features, knn, linear, neighbours, parts, scored


@pytest.fixture
def mesh():
    return sharding.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture
def mesh8():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture
def state():
    return {"scale": np.ones((1, 1), np.float32)}


@pytest.fixture
def toy(monkeypatch):
    """Makes sources openable by config, and returns what fills the table of them."""
    return memory.install(monkeypatch)


# ------------------------------------------------------------------------------------ feature pass


def extract(source, state, mesh, **overrides):
    form = {"canvas": 4, "channels": 1, "batch_size": 30}
    return features.extract(pixels, state, source, mesh, **{**form, **overrides})


def test_features_are_in_record_order_without_padding(toy, state, mesh8):
    source = toy()["toy", "train"]
    expected = source.images.reshape(-1, 16) / np.float32(255)
    found = extract(source, state, mesh8, batch_size=50)  # 120 = 52 + 52 + 16, rounded up from 50
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_features_are_kept_by_weights_data_and_preprocessing(toy, state, mesh, tmp_path):
    source = toy()["toy", "train"]
    keep = {"cache_dir": tmp_path, "cache_key": "one"}
    first = extract(source, state, mesh, **keep)
    again = extract(source, state, mesh, **keep)
    assert source.passes == 1
    np.testing.assert_array_equal(first, again)
    extract(source, state, mesh, cache_dir=tmp_path, cache_key="two")
    source.fingerprint = "other data"
    extract(source, state, mesh, **keep)
    assert source.passes == 3
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".npz"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other array", "wrong length"])
def test_damaged_kept_features_are_made_anew(toy, state, mesh, tmp_path, caplog, damage):
    source = toy()["toy", "train"]
    keep = {"cache_dir": tmp_path, "cache_key": "one"}
    first = extract(source, state, mesh, **keep)
    (path,) = tmp_path.glob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other array":
        np.savez(path, y=first)
    else:
        np.savez(path, x=first[:-1])
    with caplog.at_level(logging.WARNING, logger="bigmed"):
        again = extract(source, state, mesh, **keep)
    assert "made anew" in caplog.text
    assert source.passes == 2
    np.testing.assert_array_equal(first, again)
    extract(source, state, mesh, **keep)
    assert source.passes == 2  # the damaged file was replaced


def test_kept_features_with_a_pickle_inside_are_not_loaded(toy, state, mesh, tmp_path):
    source = toy()["toy", "train"]
    keep = {"cache_dir": tmp_path, "cache_key": "one"}
    extract(source, state, mesh, **keep)
    (path,) = tmp_path.glob("*.npz")
    np.savez(path, x=np.array([{"a": 1}] * len(source), dtype=object))
    extract(source, state, mesh, **keep)
    assert source.passes == 2


def test_features_that_are_not_finite_stop_the_run(toy, mesh):
    source = toy()["toy", "val"]
    with pytest.raises(NonFiniteError, match="record 0 of 'toy/val'"):
        extract(source, {"scale": jnp.full((1, 1), jnp.nan)}, mesh)


def test_weights_fingerprint_sees_names_values_and_dtypes_but_not_placement(mesh8):
    array = np.arange(8, dtype=np.float32).reshape(4, 2)
    base = features.weights_fingerprint({"a": array})
    split = jax.device_put(array, sharding.batch_sharding(mesh8))
    assert features.weights_fingerprint({"a": split}) == base
    changed = array.copy()
    changed[3, 1] = np.nextafter(changed[3, 1], 9)
    for other in ({"b": array}, {"a": changed}, {"a": array.astype(np.int32)}, {"a": array.T}):
        assert features.weights_fingerprint(other) != base


# ------------------------------------------------------------------------------------ linear probe


def correlated_features(n=200, d=40, seed=0):
    """Features of very different scales and high correlation, one constant, one offset by far."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 6))
    x = z @ rng.normal(size=(6, d)) + 0.1 * rng.normal(size=(n, d))
    x = x * 10 ** rng.uniform(-2, 2, size=d)
    x[:, 0], x[:, 1] = 3.7, x[:, 1] + 1000
    return x.astype(np.float32), z, rng


@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_multinomial_fit_equals_sklearn(mesh, l2):
    x, z, rng = correlated_features()
    actual = (z[:, :4] + rng.normal(size=(200, 4))).argmax(axis=1)
    found = linear.fit(x, np.eye(4, dtype=np.int8)[actual], [l2, 1.0], "single_label", mesh)
    assert found.converged.all()
    scaler = StandardScaler().fit(x.astype(np.float64))
    scaler.scale_[0] = np.inf  # the constant
    reference = LogisticRegression(C=1 / (l2 * 200), tol=1e-9, max_iter=20000)
    reference.fit(scaler.transform(x.astype(np.float64)), actual)
    expected = reference.predict_proba(scaler.transform(x.astype(np.float64)))
    np.testing.assert_allclose(linear.predict(found, 0, x, "single_label"), expected, atol=1e-3)
    # the softmax's kernel is fixed but for a constant over classes, which L2 makes zero
    kernel = found.kernel[0] * scaler.scale_[:, None].clip(max=1e6)
    np.testing.assert_allclose(kernel[1:], reference.coef_.T[1:], atol=2e-3)
    assert (found.kernel[0][0] == 0).all()


@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_independent_sigmoids_with_unknown_labels_equal_sklearn(mesh, l2):
    x, z, rng = correlated_features()
    labels = (z[:, :3] + rng.normal(size=(200, 3)) > 0.8).astype(np.int8)
    labels[rng.random(labels.shape) < 0.2] = -1
    labels[rng.random(labels.shape) < 0.1] = -2
    found = linear.fit(x, labels, [l2], "multi_label", mesh)
    assert found.converged.all()
    scaled = StandardScaler().fit_transform(x[:, 1:].astype(np.float64))
    probabilities = linear.predict(found, 0, x, "multi_label")
    for c in range(3):
        known = labels[:, c] >= 0
        reference = LogisticRegression(C=1 / (l2 * known.sum()), tol=1e-9, max_iter=20000)
        reference.fit(scaled[known], labels[known, c])
        expected = reference.predict_proba(scaled)[:, 1]
        np.testing.assert_allclose(probabilities[:, c], expected, atol=1e-3)


def test_fit_with_fewer_images_than_features_and_separable_classes(mesh):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(21, 60)).astype(np.float32)
    actual = np.arange(21) % 2
    labels = np.stack([1 - actual, actual], axis=1).astype(np.int8)
    strengths = [1e-2, 10.0, 1e-4, 1e-3, 0.1]  # in no order
    found = linear.fit(x, labels, strengths, "multi_label", mesh, max_iterations=100)
    assert found.converged.all()
    scaled = StandardScaler().fit_transform(x.astype(np.float64))
    for g, l2 in enumerate(strengths):
        reference = LogisticRegression(C=1 / (l2 * 21), tol=1e-8, max_iter=5000)
        expected = reference.fit(scaled, actual).predict_proba(scaled)
        np.testing.assert_allclose(linear.predict(found, g, x, "multi_label"), expected, atol=1e-3)


def test_fit_does_not_depend_on_the_mesh(mesh, mesh8):
    x, z, rng = correlated_features(n=101)
    labels = (z[:, :2] > 0).astype(np.int8)
    alone = linear.fit(x, labels, [1e-2], "multi_label", mesh)
    spread = linear.fit(x, labels, [1e-2], "multi_label", mesh8)
    a, b = (linear.predict(f, 0, x, "multi_label") for f in (alone, spread))
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_classes_that_cannot_be_learnt_score_alike_everywhere(mesh):
    x, z, _ = correlated_features()
    labels = (z[:, :3] > 0).astype(np.int8)
    labels[:, 1] = 0
    scores = linear.predict(linear.fit(x, labels, [0.1], "multi_label", mesh), 0, x, "multi_label")
    np.testing.assert_array_equal(scores[:, 1], 0.5)
    actual = 2 * (z[:, 0] > 0)  # of three classes the second never occurs
    one_hot = np.eye(3, dtype=np.int8)[actual]
    found = linear.fit(x, one_hot, [0.1], "single_label", mesh)
    scores = linear.predict(found, 0, x, "single_label")
    np.testing.assert_array_equal(scores[:, 1], 0)
    assert (scores.argmax(axis=1) == actual).mean() > 0.9
    assert parts.learnable(labels).tolist() == [True, False, True]


# -------------------------------------------------------------------------------------------- k-NN


def test_nearest_equals_brute_force_in_chunks(mesh8, monkeypatch):
    rng = np.random.default_rng(0)
    x, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (53, 31))
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", 53 * 9)  # chunks of 8 queries
    similarities, indices = neighbours.nearest(x, queries, 7, mesh8)
    unit = [a / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (queries, x)]
    expected = unit[0] @ unit[1].T
    order = np.argsort(-expected, axis=1)[:, :7]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(similarities, np.take_along_axis(expected, order, 1), atol=1e-6)


def test_votes_equal_sklearn(mesh):
    rng = np.random.default_rng(0)
    x, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 20))
    actual = rng.integers(3, size=60)
    labels = np.eye(3, dtype=np.int8)[actual]
    similarities, indices = neighbours.nearest(x, queries, 9, mesh)
    prior = knn.prevalence(labels)
    for temperature, weights in (
        (None, "uniform"),
        (0.07, lambda distances: np.exp((1 - distances) / 0.07)),
    ):
        found = knn.votes(similarities, labels[indices], (9, 4, 1), prior, temperature)
        for g, k in enumerate((9, 4, 1)):
            reference = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(x, actual)
            np.testing.assert_allclose(found[g], reference.predict_proba(queries), atol=1e-5)


def test_unknown_labels_do_not_vote():
    labels = np.array([[[1], [-1], [0], [-2]], [[-1], [-2], [-1], [1]]], np.int8)  # [M=2, K=4, L=1]
    similarities = np.tile(np.array([[0.9, 0.8, 0.7, 0.6]], np.float32), (2, 1))
    found = knn.votes(similarities, labels, (3, 4), np.array([0.25]), None)
    assert found[:, :, 0].tolist() == [[0.5, 0.25], [0.5, 1.0]]  # nobody votes: the prior


# ---------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("module", [linear, knn])
@pytest.mark.parametrize("task", ["multi_label", "single_label"])
def test_rows_state_everything_that_a_number_needs(toy, state, mesh, tmp_path, module, task):
    source = toy(task)["toy", "test"]
    evaluator = module.Evaluator(pixels, mesh, **settings(predictions_dir=tmp_path, details=False))
    rows = {row["metric"]: row for row in evaluator.run(state, "00_simclr/12")}
    wanted = {f"{name}{end}" for name in ("auc", "ap") for end in ("_macro", "/a", "/b", "/c")}
    if task == "single_label":
        wanted |= {"accuracy", "balanced_accuracy"}
    assert set(rows) == wanted
    main = rows["auc_macro"]
    assert main["value"] > 0.8 and main["ci_low"] < main["value"] < main["ci_high"]
    assert (main["train_set"], main["test_set"]) == ("toy/train", "toy/test")
    assert main["split_sha256"] == "sha-test" and main["checkpoint"] == "00_simclr/12"
    assert main["label_policy"] == "uncertain=ignore, missing=ignore"
    assert main["n_images"] == 90 and main["n_patients"] == len(np.unique(source.patients))
    assert main["resample_unit"] == "patient"
    assert main["n_train_images"] == 120 and main["synthetic"] is True
    for c, name in enumerate("abc"):
        assert rows[f"auc/{name}"]["n_images"] == (source.labels[:, c] >= 0).sum()
    json.dumps(list(rows.values()))  # nothing that JSON cannot hold
    # the predictions reproduce the number
    with np.load(tmp_path / main["predictions"], allow_pickle=False) as file:
        kept = dict(file)
    aucs = []
    for c in range(3):
        known = kept["labels"][:, c] >= 0
        aucs.append(roc_auc_score(kept["labels"][known, c], kept["scores"][known, c]))
    assert np.mean(aucs) == pytest.approx(main["value"], abs=1e-6)
    assert len(np.unique(kept["patients"])) == main["n_patients"]
    assert len(np.unique(kept["image_ids"])) == 90


def test_no_identifier_leaves_unhashed(toy, state, mesh, tmp_path):
    toy()
    files = {}
    for key in (KEY, b"another"):
        folder = tmp_path / key.decode()
        evaluator = knn.Evaluator(pixels, mesh, **settings(predictions_dir=folder, hash_key=key))
        rows = list(evaluator.run(state, "00_simclr/12"))
        assert "patient-2" not in json.dumps(rows)
        (path,) = folder.glob("*.npz")
        content = path.read_bytes()
        text = np.array(["patient-2", "image-toy"])
        for identifier in text:  # arrays of text hold UTF-32
            assert identifier.encode() not in content
            assert str(identifier).encode("utf-32-le") not in content
        with np.load(path) as file:
            files[key] = file["patients"]
    assert not set(files[KEY]) & set(files[b"another"])  # unlinkable without the key


def test_images_without_ids_are_told_apart_by_record(toy, state, mesh, tmp_path):
    test = toy()["toy", "test"]
    test.records.keys, test.has_patients = {"image": "image"}, False
    evaluator = knn.Evaluator(pixels, mesh, **settings(predictions_dir=tmp_path))
    (row, *_) = evaluator.run(state, "x")
    assert row["resample_unit"] == "image"
    with np.load(tmp_path / row["predictions"]) as file:
        assert len(np.unique(file["image_ids"])) == 90


def test_the_setting_is_chosen_on_validation_not_on_test(toy, state, mesh):
    sources = toy("single_label")
    val, test = sources["toy", "val"], sources["toy", "test"]
    rng = np.random.default_rng(0)
    test.labels = test.labels[rng.permutation(len(test))]  # test says nothing
    evaluator = linear.Evaluator(pixels, mesh, **settings(select_by="accuracy"))
    (row, *_) = evaluator.run(state, "x")
    train = sources["toy", "train"]
    scaler = StandardScaler().fit(train.images.reshape(-1, 16).astype(np.float64))
    x, queries = (scaler.transform(s.images.reshape(-1, 16)) for s in (train, val))
    best = []
    for l2 in linear.L2_GRID:
        reference = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-8)
        reference.fit(x, train.labels.argmax(1))
        best.append(reference.score(queries, val.labels.argmax(1)))
    good = [l2 for l2, value in zip(linear.L2_GRID, best, strict=True) if value == max(best)]
    assert row["chosen"]["l2"] == max(good)  # the strongest of equals


def test_refit_learns_from_validation_too(toy, state, mesh):
    sources = toy()
    train, val, test = (sources["toy", split] for split in scored.SPLITS)
    evaluator = linear.Evaluator(pixels, mesh, **settings(refit=True, l2_grid=(0.01,)))
    rows = {row["metric"]: row for row in evaluator.run(state, "x")}
    x = np.concatenate([s.images for s in (train, val)]).reshape(-1, 16).astype(np.float64)
    scaler = StandardScaler().fit(x)
    labels = np.concatenate([train.labels[:, 0], val.labels[:, 0]])
    known = labels >= 0
    # standardised by all images, though class a is not known in some
    reference = LogisticRegression(C=1 / (0.01 * known.sum()), max_iter=5000, tol=1e-8)
    reference.fit(scaler.transform(x[known]), labels[known])
    scores = reference.decision_function(scaler.transform(test.images.reshape(-1, 16)))
    known = test.labels[:, 0] >= 0
    expected = roc_auc_score(test.labels[known, 0], scores[known])
    assert rows["auc/a"]["value"] == pytest.approx(expected, abs=2e-3)


def test_fractions_are_nested_by_patient_and_independent_of_the_split(toy, mesh):
    sources = toy(sizes=(600, 60, 90))
    train = sources["toy", "train"]
    # patients as a split of 70 % leaves them
    train.patient_keys = [k for k in map(str, range(2000)) if schema.patient_uniform(k, 0) < 0.7]
    drawn = {}
    for fraction in (0.1, 0.3, 1.0):
        evaluator = linear.Evaluator(pixels, mesh, **settings(fraction=fraction, uncertain="ones"))
        rows = evaluator._parts["train"].rows
        drawn[fraction] = set(train.patients[rows])
        everyone = np.flatnonzero(np.isin(train.patients, list(drawn[fraction])))
        assert set(rows) == set(everyone)  # all images of a patient or none
    assert drawn[0.1] < drawn[0.3] < drawn[1.0]
    assert 0.22 < len(drawn[0.3]) / len(drawn[1.0]) < 0.38
    other = linear.Evaluator(pixels, mesh, **settings(fraction=0.3, seed=1))
    assert set(train.patients[other._parts["train"].rows]) != drawn[0.3]


def test_undefined_and_untrained_classes_are_listed(toy, state, mesh):
    sources = toy()
    sources["toy", "test"].labels[:, 1] = 0
    sources["toy", "train"].labels[:, 2] = -1
    evaluator = knn.Evaluator(pixels, mesh, **settings())
    rows = {row["metric"]: row for row in evaluator.run(state, "x")}
    assert rows["auc/b"]["value"] is None and rows["auc/b"]["ci_low"] is None
    assert rows["auc_macro"]["undefined_classes"] == ["b"]
    assert rows["auc_macro"]["untrained_classes"] == ["c"]
    assert "training labels of both kinds" in rows["auc/c"]["reason"]  # no made-up 0.5
    assert "test set has no labels of both kinds" in rows["auc/b"]["reason"]
    for metric in ("auc/c", "ap/c", "f1/c", "sensitivity@spec0.9/c"):
        assert rows[metric]["value"] is None and rows[metric]["ci_low"] is None
    assert rows["auc_macro"]["value"] == pytest.approx(rows["auc/a"]["value"])
    assert "reason" not in rows["auc_macro"]


def test_bad_input_is_refused_in_one_line(toy, mesh):
    sources = toy()

    def refused(match, module=linear, **overrides):
        with pytest.raises(UserError, match=match) as error:
            module.Evaluator(pixels, mesh, **settings(**overrides))
        assert "\n" not in str(error.value) and "patient-" not in str(error.value)

    refused("fraction=0", fraction=0)
    refused("fraction=1.5", fraction=1.5)
    refused("did you mean 'ignore'", uncertain="ignored")
    refused("select_by='accuracy' for task multi_label", select_by="accuracy")
    refused("did you mean 'uniform'", module=knn, weighting="unifrom")
    refused("k_grid", module=knn, k_grid=(0,))
    refused("l2_grid", l2_grid=(0.0, 1.0))
    refused("num_resamples=0", num_resamples=0)
    refused("no labelled image at fraction=1e-06", fraction=1e-6)

    good = dict(sources)
    sources["toy", "train"] = MemorySource("train", 20)
    sources["toy", "train"].labels[:] = 1
    refused("'toy/train' has no class with both positive and negative images")
    sources["toy", "train"] = good["toy", "train"]
    sources["toy", "val"] = MemorySource("val", 20, first_patient=0)
    refused("share patients")
    sources["toy", "val"] = MemorySource("val", 20, num_classes=4, first_patient=5000)
    refused("val source 'toy/val' has 4 classes .* but train source 'toy/train' has 3")
    sources["toy", "val"] = good["toy", "val"]
    sources["toy", "train"] = MemorySource("train", 20)
    sources["toy", "train"].task, sources["toy", "train"].class_names = "none", ()
    refused("train source 'toy/train' has no labels")
    sources["toy", "train"] = good["toy", "train"]
    sources["toy", "test"].labels[:] = -2
    refused("test source 'toy/test' has no labelled image")


def test_validation_without_both_kinds_cannot_choose(toy, mesh):
    toy()["toy", "val"].labels[:] = 1
    with pytest.raises(UserError, match="val source 'toy/val' has no class with both"):
        linear.Evaluator(pixels, mesh, **settings())


def test_other_weights_are_never_served_kept_features(toy, mesh, tmp_path):
    source = toy()["toy", "test"]
    evaluator = knn.Evaluator(pixels, mesh, **settings(cache_dir=tmp_path))
    first = list(evaluator.run({"scale": np.ones((1, 16), np.float32)}, "00_simclr/12"))
    again = list(evaluator.run({"scale": np.ones((1, 16), np.float32)}, "00_simclr/12"))
    assert source.passes == 1 and first == again
    blind = np.ones((1, 16), np.float32)
    blind[0, :3] = 0  # the pixels that carry the classes
    other = list(evaluator.run({"scale": blind}, "00_simclr/12"))
    assert source.passes == 2 and other[0]["value"] < first[0]["value"] - 0.1


def test_evaluators_work_inside_a_set_mesh(toy, state, mesh8):
    toy()
    for module in (linear, knn):
        evaluator = module.Evaluator(pixels, mesh8, **settings())
        outside = list(evaluator.run(state, "x"))
        with jax.set_mesh(mesh8):
            inside = list(evaluator.run(state, "x"))
        assert inside[0]["value"] == pytest.approx(outside[0]["value"], abs=1e-6)


def test_a_state_may_be_any_tree_with_attributes(toy, mesh):
    """`TrainState` is not a dict; only `predict_fn` looks inside."""
    source = toy()["toy", "val"]
    wrapped = types.SimpleNamespace(weights={"scale": jnp.ones((1, 1))})
    jax.tree_util.register_pytree_node(
        types.SimpleNamespace,
        lambda s: ((s.weights,), None),
        lambda _, children: types.SimpleNamespace(weights=children[0]),
    )
    found = features.extract(
        lambda s, b: pixels(s.weights, b),
        wrapped, source, mesh, canvas=4, channels=1, batch_size=16,
    )  # fmt: skip
    assert found.shape == (60, 16)


# --------------------------------------------------------------------- real data, real processes


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A data set on disk, made by ingest: bright at the left or right; 1-4 images a patient."""
    folder = tmp_path_factory.mktemp("stored")
    rng = np.random.default_rng(0)
    lines = ["image_path,person,side"]
    for patient in range(60):
        for i in range(rng.integers(1, 5)):
            side = rng.integers(2)
            image = rng.normal(90, 30, size=(20, 28))
            image[:, 14 * side : 14 * side + 14] += 30
            cv2.imwrite(str(folder / f"{patient}_{i}.png"), image.clip(0, 255).astype(np.uint8))
            lines.append(f"{patient}_{i}.png,MRN-{patient:04d},{('left', 'right')[side]}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    source = manifest.SourceConfig(
        str(folder / "manifest.csv"), patient_column="person", label_column="side"
    )
    store = ingest.StoreConfig(name="sides", size=28, format="png", fractions=(0.5, 0.2, 0.3))
    ingest.prepare(source, store, folder / "sides", say=lambda line: None)
    return folder


def test_linear_and_knn_on_a_stored_data_set(stored, mesh8, tmp_path):
    def coarse(state, batch):
        """Means of 4 x 4 blocks of the image on its canvas."""
        image = batch["image"][:, 0, :, :, 0].astype(jnp.float32) / 255
        means = image.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
        return means.reshape(-1, 64) * state["scale"]

    state = {"scale": jnp.ones((1, 1))}
    splits = {s: {"dir": str(stored / "sides"), "split": s} for s in scored.SPLITS}
    form = {"canvas": 32, "channels": 1, "preprocessing": {}, "batch_size": 16, "hash_key": KEY}
    kept = {"cache_dir": tmp_path / "features", "predictions_dir": tmp_path / "predictions"}
    test = open_source(splits["test"])
    found = features.extract(coarse, state, test, mesh8, canvas=32, channels=1, batch_size=16)
    names = test.read_field("image_id", range(3))
    top_left = [cv2.imread(str(stored / name), -1)[:4, :4].mean() / 255 for name in names]
    np.testing.assert_allclose(found[:3, 0], top_left, rtol=1e-5)
    assert (found[:, 8 * 5 :] == 0).all()  # below the image there is only canvas

    for module in (linear, knn):
        evaluator = module.Evaluator(coarse, mesh8, **splits, **form, **kept)
        rows = {row["metric"]: row for row in evaluator.run(state, "00_simclr/5")}
        assert set(rows) >= {"auc_macro", "accuracy", "balanced_accuracy", "auc/right"}
        assert rows["accuracy"]["value"] > 0.9 and rows["accuracy"]["ci_low"] > 0.8
        assert rows["accuracy"]["n_images"] == len(test)
        assert rows["accuracy"]["n_patients"] == len(test.patient_keys)
        assert rows["accuracy"]["split_sha256"] == test.split_sha256
        assert "MRN-" not in json.dumps(list(rows.values()))
    assert len(list((tmp_path / "features").iterdir())) == 3  # shared by both evaluators
    with pytest.raises(UserError, match="share .* patients"):
        linear.Evaluator(coarse, mesh8, **{**splits, "val": splits["test"]}, **form)


TWO_PROCESSES = """
import types
import numpy as np
rank, folder = jax.process_index(), sys.argv[1]
from bigmed import sharding
from bigmed.evaluators import features, linear, neighbours

def batches(source, *, batch_size, block, num_blocks, **form):
    half = batch_size // num_blocks
    for start in range(0, 23, batch_size):
        record = start + half * block + np.arange(half, dtype=np.int32)
        mask = record < 23
        yield {"image": source.images[np.minimum(record, 22)], "mask": mask, "record": record}

features.evaluation_batches = batches
class Source(types.SimpleNamespace):
    def __len__(self):
        return 23
images = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
source = Source(name="toy", fingerprint="f", images=images)
mesh = sharding.make_mesh({"data": 2, "fsdp": 2})
weights = sharding.put_batch({"w": np.eye(5, dtype=np.float32)[2 * rank : 2 * rank + 2]},
                             sharding.batch_sharding(mesh))
features.weights_fingerprint(weights)
for _ in range(2):  # the second time from the kept file
    x = features.extract(lambda state, batch: 2 * batch["image"], {}, source, mesh,
                         canvas=1, channels=1, batch_size=8, cache_dir=folder)
    np.testing.assert_allclose(x, 2 * images)
labels = (images[:, :1] > 0).astype(np.int8)
solution = linear.fit(x, labels, [0.1], "multi_label", mesh)
assert ((linear.predict(solution, 0, x, "multi_label") > 0.5) == labels).mean() > 0.9
similarity, index = neighbours.nearest(x, x, 3, mesh)
np.testing.assert_array_equal(index[:, 0], np.arange(23))
print("whole")
"""


def test_the_feature_pass_and_the_probes_work_in_two_processes(tmp_path):
    for out in run_two(TWO_PROCESSES, tmp_path, devices=2):
        assert out.rstrip().endswith("whole")
    assert len(list(tmp_path.iterdir())) == 1
