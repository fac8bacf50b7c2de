"""The SGD recipe of linear probes: against PyTorch, head by head, and against L-BFGS; mistakes."""

import itertools

import jax
import memory
import numpy as np
import pytest
import torch
from memory import pixels, settings
from sklearn.metrics import roc_auc_score

from bigmed import sharding
from bigmed.errors import UserError
from bigmed.evaluators import linear, linear_sgd

N, D, L = 150, 12, 3
GRID = [
    {"lr": lr, "weight_decay": decay} for lr, decay in itertools.product((0.3, 2.0), (0.01, 0.0))
]
RECIPE = {"batch_size": 64, "epochs": 3, "momentum": 0.9, "nesterov": True}
STATE = {"scale": np.ones((1, 1), np.float32)}


@pytest.fixture
def mesh():
    return sharding.make_mesh({"data": 1}, jax.devices()[:1])


@pytest.fixture
def toy(monkeypatch):
    return memory.install(monkeypatch)


def problem(task, n=N, noise=1.0):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, D)).astype(np.float32)
    logits = x @ rng.normal(size=(D, L)) + noise * rng.normal(size=(n, L))
    if task == "single_label":
        return x, np.eye(L, dtype=np.int8)[logits.argmax(axis=1)]
    targets = (logits > 0.5).astype(np.float32)
    targets[rng.random(targets.shape) < 0.2] = -2  # missing
    targets[rng.random(targets.shape) < 0.1] = 0.7  # smoothed
    return x, targets


def fit(x, targets, grid, task, mesh, **changes):
    return linear_sgd.fit(x, targets, grid, task, mesh, **{"seed": 3, **RECIPE, **changes})


def by_torch(x, targets, setting, task, *, batch_size, epochs, momentum, nesterov):
    """The same steps by torch.optim.SGD, in float64."""
    x = torch.tensor(x, dtype=torch.float64)
    known = torch.tensor(targets >= 0, dtype=torch.float64)
    y = torch.tensor(np.maximum(targets, 0), dtype=torch.float64)
    kernel, bias = (torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in ((D, L), L))
    optimiser = torch.optim.SGD(
        [{"params": [kernel], "weight_decay": setting["weight_decay"]}, {"params": [bias]}],
        lr=setting["lr"] * batch_size / 256,
        momentum=momentum,
        nesterov=nesterov,
    )
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in range(epochs):
        for rows in np.array(linear_sgd.order(3, epoch, len(x), batch_size)):
            logits = x[rows] @ kernel + bias
            if task == "single_label":
                loss = torch.nn.functional.cross_entropy(logits, y[rows].argmax(dim=1))
            else:
                each = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, y[rows], reduction="none"
                )
                # a class counts by the share of all its labels that the batch holds
                share = len(x) / batch_size / known.sum(dim=0)
                loss = (each * known[rows] * share).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return kernel.detach().numpy(), bias.detach().numpy()


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_head_takes_the_steps_of_torchs_sgd(mesh, task, nesterov):
    x, targets = problem(task)
    found = fit(x, targets, GRID, task, mesh, nesterov=nesterov)
    for g, setting in enumerate(GRID):
        kernel, bias = by_torch(x, targets, setting, task, **{**RECIPE, "nesterov": nesterov})
        assert np.abs(kernel).max() > 0.05
        np.testing.assert_allclose(found.kernel[g], kernel, atol=1e-6)
        np.testing.assert_allclose(found.bias[g], bias, atol=1e-6)
    assert found.converged.all()


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_heads_at_once_are_those_one_at_a_time(mesh, axes):
    """Also where their number is no multiple of the devices'."""
    many = sharding.make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    x, targets = problem("multi_label")
    grid = [*GRID, {"lr": 0.5, "weight_decay": 0.1}]
    together = fit(x, targets, grid, "multi_label", many)
    alone = [fit(x, targets, [one], "multi_label", mesh) for one in grid]
    assert together.kernel.shape == (5, D, L) and together.bias.shape == (5, L)
    for name in ("kernel", "bias"):
        apart = np.concatenate([getattr(one, name) for one in alone])
        np.testing.assert_allclose(getattr(together, name), apart, atol=1e-6)


def test_an_epoch_visits_images_once_in_an_order_of_its_own():
    drawn = ((0, 0), (0, 1), (1, 0))
    rows = [np.asarray(linear_sgd.order(seed, epoch, 10, 3)) for seed, epoch in drawn]
    for one in rows:
        assert one.shape == (3, 3) and len(set(one.ravel())) == 9
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[1], linear_sgd.order(0, 1, 10, 3))


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_it_ends_where_l_bfgs_does(mesh, task):
    x, targets = problem(task)
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)  # as `linear` has them
    decay = 0.05
    best = linear.fit(x, targets, [decay], task, mesh)
    grid = [{"lr": 2.0, "weight_decay": decay}]
    found = fit(x, targets, grid, task, mesh, epochs=200, batch_size=N)

    def loss(solution):
        logits = x.astype(np.float64) @ solution.kernel[0] + solution.bias[0]
        y, known = np.maximum(targets, 0), targets >= 0
        if task == "single_label":
            ce = np.log(np.exp(logits).sum(axis=1)) - (y * logits).sum(axis=1)
            value = ce.mean()
        else:
            ce = (np.logaddexp(0, logits) - y * logits) * known
            value = (ce.sum(axis=0) / known.sum(axis=0)).sum()
        return value + decay / 2 * (solution.kernel[0] ** 2).sum()

    assert loss(found) == pytest.approx(loss(best), abs=1e-5)
    np.testing.assert_allclose(found.kernel, best.kernel, atol=2e-3)


def test_what_is_not_known_is_not_learnt_from(mesh):
    x, targets = problem("multi_label")
    hidden = targets < 0
    for code in (-1, -2):
        other = np.where(hidden, code, targets)
        np.testing.assert_array_equal(
            fit(x, other, GRID, "multi_label", mesh).kernel,
            fit(x, targets, GRID, "multi_label", mesh).kernel,
        )
    targets = targets.copy()
    targets[:, 1] = np.where(targets[:, 1] > 0.5, 1, -2)  # a class without negatives
    found = fit(x, targets, GRID, "multi_label", mesh)
    assert np.abs(found.kernel[:, :, 0]).min() > 0 and not found.kernel[:, :, 1].any()
    np.testing.assert_array_equal(linear.predict(found, 0, x, "multi_label")[:, 1], 0.5)


def test_a_class_without_images_is_never_the_answer(mesh):
    x, targets = problem("single_label")
    targets = np.pad(targets, ((0, 0), (0, 1)))
    p = linear.predict(fit(x, targets, GRID, "single_label", mesh), 1, x, "single_label")
    assert p[:, 3].max() == 0 and np.allclose(p.sum(axis=1), 1)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_the_evaluator_chooses_a_head_on_validation(toy, mesh, task, tmp_path):
    sources = toy(task)
    grid = {"learning_rates": (10.0, 1e-4), "weight_decays": (0.0,)}
    evaluator = linear_sgd.Evaluator(
        pixels, mesh, **settings(**grid, train_batch_size=40, predictions_dir=tmp_path)
    )
    rows = {row["metric"]: row for row in evaluator.run(STATE, "x")}
    row = rows["auc_macro"]
    assert row["chosen"] in [{"lr": lr, "weight_decay": 0.0} for lr in (10.0, 1e-4)]
    assert row["value"] > 0.75 and "linear_sgd" in row["predictions"]
    train, val = (sources["toy", split] for split in ("train", "val"))
    labels = lambda s: np.where(s.labels < 0, -2, s.labels)  # noqa: E731
    images = lambda s: s.images.reshape(len(s), 16).astype(np.float32) / 255  # noqa: E731
    keep = (labels(train) >= 0).any(axis=1)
    recipe = {"batch_size": 40, "epochs": 90, "seed": 0}
    heads = evaluator.settings(0)
    found = fit(images(train)[keep], labels(train)[keep], heads, task, mesh, **recipe)

    def quality(g):
        p = linear.predict(found, g, images(val), task)
        known = labels(val) >= 0
        return np.mean([roc_auc_score(labels(val)[k, c], p[k, c]) for c, k in enumerate(known.T)])

    assert row["chosen"] == max(heads, key=lambda one: quality(heads.index(one)))


def test_three_classes_of_uncertain_labels(toy, mesh):
    toy()
    evaluator = linear_sgd.Evaluator(pixels, mesh, **settings(uncertain="three_class", epochs=10))
    rows = {row["metric"]: row for row in evaluator.run(STATE, "x")}
    assert rows["auc_macro"]["value"] > 0.75


def test_heads_that_diverge_are_not_chosen(toy, mesh, caplog):
    toy()
    wild = {"train_batch_size": 40, "epochs": 20, "weight_decays": (1e4,)}
    evaluator = linear_sgd.Evaluator(
        pixels, mesh, **settings(learning_rates=(1e-5, 1e3), **wild)
    )
    rows = {row["metric"]: row for row in evaluator.run(STATE, "x")}
    assert rows["auc_macro"]["chosen"]["lr"] == 1e-5
    assert "grew beyond all bounds, left at zero: [{'lr': 1000.0" in caplog.text
    evaluator = linear_sgd.Evaluator(pixels, mesh, **settings(learning_rates=(1e3,), **wild))
    with pytest.raises(UserError, match="every head of .*use lower ones"):
        list(evaluator.run(STATE, "x"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rates": ()}, r"learning_rates=\(\)"),
        ({"weight_decays": ()}, r"weight_decays=\(\)"),
        ({"learning_rates": (0.1, 0.0)}, "valid: rates above 0"),
        ({"weight_decays": (-1e-4,)}, "valid: decays from 0"),
        ({"momentum": 1.0}, "momentum from 0 to below 1"),
        ({"epochs": 0}, "epochs=0"),
        ({"train_batch_size": 0}, "train_batch_size=0"),
        ({"select_by": "auc"}, "select_by='auc'"),
    ],
)
def test_mistakes_are_named(toy, mesh, change, said):
    toy()
    with pytest.raises(UserError, match=said):
        linear_sgd.Evaluator(pixels, mesh, **settings(**change))
