"""Retrieval against brute force in float64: who is left out, what is relevant, chance, mistakes."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmed import curriculum, sharding, statistics
from bigmed.data import phantom
from bigmed.data.sources import open_source
from bigmed.errors import UserError
from bigmed.evaluators import neighbours, retrieval
from configs import common, convirt

D = 8
FORM = {"canvas": 32, "channels": 1, "preprocessing": {"representation": "image"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    phantom.prepare(folder, num_patients=120, size=32)
    return folder


def source(folder, split="test"):
    return {"dir": str(folder), "split": split}


def text(folder):
    return {"tokeniser": str(folder / "vocab.txt"), "length": 24, "sections": "all", "sentences": 0}


def make(folder, mesh=None, **settings):
    mesh = mesh or sharding.make_mesh({"data": 1}, jax.devices()[:1])
    settings = {"query": source(folder), "candidates": source(folder), **settings}
    images = lambda state, batch: state["images"][batch["record"]]  # noqa: E731
    return retrieval.Evaluator(images, mesh, **FORM, **settings)


def of_texts(state, batch):
    """As if each text had features of its own; the tokens must be there."""
    some = batch["token_mask"].any(axis=(1, 2))
    return jnp.where(some[:, None], state["texts"][batch["record"]], jnp.nan)


def state_of(*splits):
    size = max(len(s) for s in splits)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(size, D)).astype(np.float32) for name in ("images", "texts")}


def run(evaluator, state):
    return {row["metric"]: row for row in evaluator.run(state, "00_untrained/checkpoints/0")}


def brute_force(queries, x, of_query, of_candidate, own, k):
    """Of each query: (precision at k, chance, recall at k), None without candidates."""
    for i, query in enumerate(queries.astype(np.float64)):
        found = []
        for j, candidate in enumerate(x.astype(np.float64)):
            if own(i, j):
                continue
            cosine = query @ candidate / np.linalg.norm(query) / np.linalg.norm(candidate)
            found.append((-cosine, bool((of_query[i] & of_candidate[j]).any())))
        hits = [hit for _, hit in sorted(found)]
        recall = sum(hits[:k]) / sum(hits) if any(hits) else None
        yield np.mean(hits[:k]), np.mean(hits), recall


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_images_by_an_image(folder, split, axes):
    mesh = sharding.make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    opened = [open_source(source(folder, name)) for name in ("test", split)]
    state = state_of(*opened)
    rows = run(make(folder, mesh, candidates=source(folder, split), ks=(1, 5, 10**6)), state)
    assert {"precision@1", "precision@5", "gain@5", "chance", "recall/5"} <= set(rows)
    assert "precision@1000000" not in rows
    some = [(s.labels == 1).any(axis=1) for s in opened]
    assert not all(keep.all() for keep in some)
    labels = [s.labels[keep] == 1 for s, keep in zip(opened, some, strict=True)]
    people = [np.array(s.patient_keys)[s.patients][k] for s, k in zip(opened, some, strict=True)]
    x = [state["images"][: len(s)][keep] for s, keep in zip(opened, some, strict=True)]
    want = list(brute_force(*x, *labels, lambda i, j: people[0][i] == people[1][j], 5))
    precision, chance, recall = zip(*want, strict=True)
    for name, value in (("precision@5", precision), ("chance", chance)):
        np.testing.assert_allclose(rows[name]["value"], np.mean(value), rtol=1e-6)
    np.testing.assert_allclose(
        rows["gain@5"]["value"], np.mean(precision) - np.mean(chance), rtol=1e-5
    )
    defined = [value for value in recall if value is not None]
    np.testing.assert_allclose(rows["recall/5"]["value"], np.mean(defined), rtol=1e-6)
    row = rows["precision@5"]
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert row["n_images"] == some[0].sum() and row["n_patients"] == len(set(people[0]))
    assert (row["train_set"], row["n_candidates"]) == (opened[1].name, some[1].sum())


def test_images_by_a_text(folder):
    opened = open_source(source(folder))
    state, k = state_of(opened), 5
    evaluator = make(
        folder, text=text(folder), query_representation=("text", of_texts), ks=(1, k)
    )
    rows = run(evaluator, state)
    keep = (opened.labels == 1).any(axis=1)
    reports = np.array(opened.read_field("text", np.flatnonzero(keep)))
    people, labels = opened.patients[keep], opened.labels[keep] == 1
    # a whole report, from the second line on the same words
    body = np.array([report.partition("FINDINGS")[2] or report for report in reports])
    assert len(set(body)) < len(body), "the test needs equal reports of different patients"
    equal = [[a == b for b in body] for a in body]
    queries, x = (state[name][: len(opened)][keep] for name in ("texts", "images"))
    left_out = lambda i, j: people[i] == people[j] or equal[i][j]  # noqa: E731
    precision, chance, _ = zip(*brute_force(queries, x, labels, labels, left_out, k), strict=True)
    np.testing.assert_allclose(rows[f"precision@{k}"]["value"], np.nanmean(precision), rtol=1e-6)
    np.testing.assert_allclose(rows["chance"]["value"], np.nanmean(chance), rtol=1e-6)
    # its own patient's images, which nothing keeps from being found here
    cosines = queries @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    first = np.argsort(-cosines, axis=1)[:, :k]
    hits = [(people[first[i]] == people[i]).any() for i in range(len(people))]
    np.testing.assert_allclose(rows[f"own/{k}"]["value"], np.mean(hits), rtol=1e-6)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        picked = np.array([rng.permutation(len(people))[:k] for _ in range(1)])[0]
        drawn.append(np.mean([(people[picked] == p).any() for p in people]))
    expected = rows[f"own by chance/{k}"]["value"]
    np.testing.assert_allclose(np.mean(drawn), expected, atol=4 * np.std(drawn) / 2000**0.5)


def test_memory_does_not_grow_with_pairs_of_images(folder, monkeypatch):
    n, mebibyte = 8000, 2**20
    monkeypatch.setattr(retrieval, "CHUNK_ELEMENTS", 2**20)
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", 2**20)
    evaluator = make(folder, text=text(folder), query_representation=("text", of_texts), ks=(5,))
    side = evaluator._query
    some = np.arange(n) % len(side.rows)
    source = side.source.only(side.rows[some])
    many = retrieval.Side(source, np.arange(n), side.positive[some], side.text_ids[some])
    evaluator._query = evaluator._candidates = many
    x = np.random.default_rng(0).normal(size=(n, D)).astype(np.float32)
    tracemalloc.start()
    found = {**evaluator._precision(x, x), **evaluator._own(x, x)}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * mebibyte < n**2, "less than a byte for each pair"
    assert all(value.shape == (n,) for value in found.values())


def test_nearest_leaves_out_a_querys_own():
    rng = np.random.default_rng(0)
    x, queries = rng.normal(size=(2, 40, D)).astype(np.float32)
    of_x, of_query = rng.integers(-1, 3, (2, 40)).astype(np.int32)
    mesh = sharding.make_mesh({"data": 8})
    similar, index = neighbours.nearest(x, queries[:13], 40, mesh, [(of_x, of_query[:13])])
    for i in range(13):
        own = (of_x == of_query[i]) & (of_query[i] >= 0)
        assert set(index[i][np.isfinite(similar[i])]) == set(np.flatnonzero(~own))


def test_the_interval_covers_what_is_known():
    """A binary value a patient, alike in all of its images: the interval of a proportion."""
    rng, covered, trials = np.random.default_rng(0), 0, 200
    for trial in range(trials):
        patients = np.repeat(np.arange(60), rng.integers(1, 5, 60))
        value = (rng.random(60) < 0.3).astype(float)[patients]
        found = statistics.means({"m": value}, patients, num_resamples=300, seed=trial)["m"]
        covered += found.low <= 0.3 <= found.high
    # the percentile interval of a ratio of 60 clusters covers a little less than 95 %
    assert 0.88 <= covered / trials <= 0.99


def test_a_mean_over_what_is_defined():
    found = statistics.means({"m": np.array([1.0, np.nan, 0.0])}, np.array([0, 1, 2]))["m"]
    assert (found.value, found.n_images, found.n_patients) == (0.5, 2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ks": ()}, "ks=()"),
        ({"ks": (0,)}, "valid: 1 and more"),
        ({"ks": (1000,)}, "candidates"),
        ({"classes": ("effusio",)}, "did you mean 'effusion'"),
        ({"uncertain": "twos"}, "uncertain='twos'"),
    ],
)
def test_mistakes_are_named(folder, change, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        make(folder, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": {"query_representation": "text"}}, "query_representation='text' is of texts"),
        ({"linear": {"representation": "text"}}, "linear.representation='text' is of texts"),
        ({"text_image": {"query_representation": "txt"}}, "did you mean 'text'"),
        ({"image_image": {"query": {"split": "train"}}}, "disjoint"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tmp_path, change, said):
    config = convirt.get_config("smoke")
    config.evaluate = tuple(change)
    config.evaluator.images = common.retrieval(common.source("{workdir}/data/phantom", "test"))
    config.evaluator.update(change)
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_what_is_shown_of_a_query_is_what_is_counted(folder):
    opened = open_source(source(folder))
    evaluator, state = make(folder), state_of(opened)
    (found,) = evaluator.neighbours(state)
    x = state["images"][: len(opened)]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    having = (opened.labels == 1).any(axis=1)
    for row, shown in zip(found.query_rows, found.found_rows, strict=True):
        eligible = np.flatnonzero(having & (opened.patients != opened.patients[row]))
        expected = eligible[np.argsort(-(x[eligible] @ x[row]))][: len(shown)]
        np.testing.assert_array_equal(shown, expected)
    assert found.query_labels.any(axis=1).all() and "by image" in found.title

