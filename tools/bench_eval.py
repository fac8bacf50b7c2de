"""Evaluation beside scikit-learn, in one run: intervals, regularisation grids, nearest neighbours.

    python tools/bench_eval.py                          # all parts, as docs/results.md states them
    python tools/bench_eval.py --parts=bootstrap

bootstrap   patient bootstrap of 14 AUCs on 25,000 images, 1,000 resamples, against a loop of
            scikit-learn's roc_auc_score (timed on a few resamples and scaled up, as the whole would
            take the better part of an hour), and the largest difference of the two
l2_grid     45 strengths on 10,000 x 2,048 features, 5 labels, against LogisticRegression (timed on
            a few strengths and scaled up), with both losses
sgd_heads   4 rates x 3 decays on 5,000 x 512 features, 90 epochs: all heads at once, and in turn
neighbours  k-NN of 20,000 images among 200,000 x 2,048 features: peak memory beyond the features
            themselves, of the process
"""

import resource
import time

import jax
import numpy as np
from absl import app, flags
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bigmed import sharding, statistics
from bigmed.classification import classification_metrics
from bigmed.evaluators import knn, linear, linear_sgd

ALL_PARTS = ["bootstrap", "l2_grid", "sgd_heads", "neighbours"]
PARTS = flags.DEFINE_list("parts", ALL_PARTS, "which of them")
GRID = tuple(np.logspace(-6, 5, 45))  # of SimCLR's transfer (arXiv 2002.05709, B.8)
FEW = flags.DEFINE_integer("few", 4, "resamples, and strengths, that scikit-learn is timed on")


def bootstrap() -> None:
    rng = np.random.default_rng(0)
    n, classes, resamples = 25_000, 14, 1000
    labels = (rng.random((n, classes)) < 0.1).astype(np.int8)
    scores = (rng.normal(size=(n, classes)) + labels).astype(np.float32)
    patients = rng.integers(n // 3, size=n)
    names = [str(c) for c in range(classes)]
    began = time.perf_counter()
    unique, codes = np.unique(patients, return_inverse=True)
    metrics = classification_metrics(scores, labels, names, "multi_label", units=codes)
    found = statistics.bootstrap(metrics, len(unique), num_resamples=resamples)
    ours = time.perf_counter() - began
    draws = np.random.default_rng(0).integers(len(unique), size=(FEW.value, len(unique)))
    began, theirs = time.perf_counter(), []
    for drawn in draws:
        weight = np.bincount(drawn, minlength=len(unique))[codes]
        kept = weight > 0
        theirs.append(
            [
                roc_auc_score(labels[kept, c], scores[kept, c], sample_weight=weight[kept])
                for c in range(classes)
            ]
        )
    loop = (time.perf_counter() - began) / FEW.value * resamples
    mine = np.stack([found[f"auc/{name}"][: FEW.value] for name in names], axis=1)
    print(
        f"bootstrap: {ours:.1f} s, scikit-learn {loop:.0f} s ({FEW.value} of {resamples} resamples "
        f"timed): {loop / ours:.0f}x; largest difference {np.abs(mine - theirs).max():.1e}"
    )


def l2_grid() -> None:
    rng = np.random.default_rng(0)
    n, d, classes = 10_000, 2048, 5
    mixing = rng.normal(size=(128, d)) / 11
    x = np.maximum(rng.normal(size=(n, 128)) @ mixing + 0.3 * rng.normal(size=(n, d)), 0)
    x = x.astype(np.float32)  # correlated, and never negative, as a network's features are
    truth = rng.normal(size=(d, classes)) / np.sqrt(d)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    labels = (standard @ truth + rng.normal(size=(n, classes)) > 0.5).astype(np.int8)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])

    def fit() -> linear.Solution:
        return linear.fit(x, labels, GRID, "multi_label", mesh)

    began = time.perf_counter()
    found = fit()
    first = time.perf_counter() - began
    began = time.perf_counter()
    found = fit()
    ours = time.perf_counter() - began

    def loss(kernel: np.ndarray, bias: np.ndarray, l2: float) -> float:
        logits = standard @ kernel + bias
        losses = np.logaddexp(0, logits) - labels * logits
        return float(losses.mean(axis=0).sum() + 0.5 * l2 * (kernel**2).sum())

    chosen = np.linspace(0, len(GRID) - 1, FEW.value + 2).astype(int)[1:-1]
    took, gaps = [], []
    for g in chosen:
        l2 = GRID[g]
        began = time.perf_counter()
        models = [
            LogisticRegression(C=1 / (l2 * n), max_iter=2000, tol=1e-4).fit(standard, labels[:, c])
            for c in range(classes)
        ]
        took.append(time.perf_counter() - began)
        kernel = np.stack([m.coef_[0] for m in models], axis=1)
        theirs = loss(kernel, np.array([m.intercept_[0] for m in models]), l2)
        scale = x.std(axis=0)[:, None]
        own = loss(
            found.kernel[g] * scale, found.bias[g] + x.mean(axis=0) @ found.kernel[g], l2
        )
        gaps.append(own - theirs)
        print(f"l2_grid: l2 {l2:.1e}: loss {own:.6f}, scikit-learn {theirs:.6f}, {took[-1]:.1f} s")
    whole = np.mean(took) * len(GRID)
    print(
        f"l2_grid: {ours:.1f} s ({first:.1f} with compiling), scikit-learn {whole:.0f} s "
        f"({FEW.value} of {len(GRID)} strengths timed): {whole / ours:.0f}x; loss at most "
        f"{max(gaps):+.1e} above"
    )


def sgd_heads() -> None:
    rng = np.random.default_rng(0)
    n, d, classes = 5000, 512, 5
    x = rng.normal(size=(n, d)).astype(np.float32)
    truth = rng.normal(size=(d, classes)) / np.sqrt(d)
    labels = (x @ truth + rng.normal(size=(n, classes)) > 0.5).astype(np.int8)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    rates, decays = linear_sgd.LEARNING_RATES, linear_sgd.WEIGHT_DECAYS
    grid = [{"lr": lr, "weight_decay": decay} for lr in rates for decay in decays]
    recipe = {"batch_size": 256, "epochs": 90, "momentum": 0.9, "nesterov": True}

    def fit(settings: list) -> float:
        began = time.perf_counter()
        linear_sgd.fit(x, labels, settings, "multi_label", mesh, seed=0, **recipe)
        return time.perf_counter() - began

    fit(grid), fit(grid[:1])  # to compile
    at_once, in_turn = fit(grid), sum(fit([setting]) for setting in grid)
    print(f"sgd_heads: {len(grid)} at once {at_once:.2f} s, in turn {in_turn:.2f} s")


def neighbours() -> None:
    n, d, queries, k = 200_000, 2048, 20_000, 200
    rng = np.random.default_rng(0)
    x = np.empty((n, d), np.float32)
    for start in range(0, n, 10_000):
        x[start : start + 10_000] = rng.normal(size=(10_000, d))
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    targets = (x[:, :5] > 0).astype(np.int8)
    found = knn.shares(x, targets, x[:queries], [k], 0.07, mesh)
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact = x[:3] @ x.T / np.linalg.norm(x, axis=1) / np.linalg.norm(x[:3], axis=1)[:, None]
    weights = np.exp(np.sort(exact, axis=1)[:, ::-1][:, :k].astype(np.float64) / 0.07)
    near = targets[np.argsort(-exact, axis=1)[:, :k]]
    votes = (weights[:, :, None] * near).sum(axis=1) / weights.sum(axis=1)[:, None]
    same = [np.abs(found[0, :3] - votes).max() < 1e-4]
    print(
        f"neighbours: {queries} queries in {took:.1f} s; {(after - before) / 2**20:.2f} GiB beyond "
        f"the features' {x.nbytes / 2**30:.2f}; equal to brute force: {all(same)}"
    )


def main(argv: list[str]) -> None:
    del argv
    for name in PARTS.value:
        {
            "bootstrap": bootstrap,
            "l2_grid": l2_grid,
            "sgd_heads": sgd_heads,
            "neighbours": neighbours,
        }[name]()


if __name__ == "__main__":
    app.run(main)
