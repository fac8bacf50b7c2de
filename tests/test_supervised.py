"""The supervised objective: its losses against torch, its head, its draws, every mesh alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exactness import assert_same_everywhere
from ml_collections import ConfigDict

from bigmed import optim, statistics, tree
from bigmed.errors import UserError
from bigmed.objectives import base, supervised
from configs import common

B, L = 16, 3
SECTION = {
    "name": "supervised",
    "uncertain": "ignore",
    "class_weights": (),
    "dropout": 0.0,
    "batch_norm": "train",
    "mixup": 0.0,
    "from_layer": 0,
    "projection": {},
}
PROJECTION = {"num_layers": 2, "hidden_dim": 24, "out_dim": 12, "norms": "all", "biases": "none"}


def objective(task="multi_label", recipe="crop_flip", **section):
    config = common.base()
    config.model = ConfigDict({"name": "tiny_model:Model", "variant": "mu/16"})
    config.augment = common.augmentation(recipe, 16)
    config.data.channels = 3
    config.objective = ConfigDict({**SECTION, **section})
    return supervised.Objective(config.lock(), base.DataSpec(("a", "b", "c"), task))


def make_batch(task="multi_label", seed=0, size=24):
    rng = np.random.default_rng(seed)
    labels = np.eye(L, dtype=np.int32)[rng.integers(0, L, B)]
    if task == "multi_label":
        labels = rng.choice([1, 0, -1, -2], size=(B, L), p=[0.4, 0.3, 0.2, 0.1]).astype(np.int32)
    else:
        labels[3] = -2
    return {
        "image": rng.integers(0, 256, (B, 1, size, size, 3), dtype=np.uint8),
        "box": np.tile(np.array([0, 0, size, size - 2], np.int32), (B, 1, 1)),
        "labels": labels,
        "patient": np.arange(B, dtype=np.int32),
        "index": np.arange(B, dtype=np.int32),
    }


def logits_of(width=L, seed=1):
    return np.random.default_rng(seed).normal(0, 2, (B, width)).astype(np.float32)


@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0)])
def test_single_label_is_torchs_weighted_cross_entropy(weights):
    labels, logits = make_batch("single_label")["labels"], logits_of()
    found = objective("single_label", class_weights=weights).cross_entropy(logits, labels)
    target = np.where(labels.max(axis=1) == 1, labels.argmax(axis=1), -100)
    weight = torch.tensor(weights) if weights else None
    expected = torch.nn.CrossEntropyLoss(weight=weight)(
        torch.tensor(logits), torch.tensor(target.astype(np.int64))
    )
    np.testing.assert_allclose(found, expected.item(), rtol=1e-6)


@pytest.mark.parametrize("uncertain", ["ignore", "zeros", "ones", "smooth"])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.0)])
def test_multi_label_is_torchs_over_what_is_labelled(uncertain, weights):
    labels, logits = make_batch()["labels"], logits_of()
    made = objective(uncertain=uncertain, class_weights=weights)
    found = made.cross_entropy(logits, labels)
    counts_as = {"ignore": -1, "zeros": 0, "ones": 1, "smooth": statistics.SMOOTH_TARGET}
    targets = np.where(labels == -1, counts_as[uncertain], labels)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits),
        torch.tensor(np.maximum(targets, 0), dtype=torch.float32),
        pos_weight=torch.tensor(weights) if weights else None,
        reduction="none",
    ).numpy()
    np.testing.assert_allclose(found, losses[targets >= 0].mean(), rtol=1e-6)


def test_three_classes_are_softmax_of_each_label():
    labels, logits = make_batch()["labels"], logits_of(3 * L)
    found = objective(uncertain="three_class").cross_entropy(logits, labels)
    target = np.select([labels == -1, labels == -2], [2, -100], labels)
    expected = torch.nn.CrossEntropyLoss()(
        torch.tensor(logits.reshape(B * L, 3)), torch.tensor(target.reshape(-1).astype(np.int64))
    )
    np.testing.assert_allclose(found, expected.item(), rtol=1e-6)


def test_without_any_label_the_loss_is_zero():
    labels = np.full((B, L), -2, np.int32)
    for task in statistics.TASKS:
        assert objective(task).cross_entropy(logits_of(), labels) == 0.0


@pytest.mark.parametrize("section", [{}, {"mixup": 0.3, "dropout": 0.2}])
def test_loss_statistics_and_gradients_are_those_of_one_device(section):
    assert_same_everywhere(objective(**section), make_batch())


def states(made, batch, seed=0):
    """(params, batch_stats) with a classifier that is not zero."""
    spec = {"image": jax.ShapeDtypeStruct(batch["image"].shape, np.uint8)}
    params, stats, _ = made.init(jax.random.key(seed), spec)
    kernel = params["classifier"]["kernel"]
    random = jax.random.normal(jax.random.key(1), kernel.shape)
    return {**params, "classifier": {**params["classifier"], "kernel": random}}, stats


def test_mixup_mixes_images_and_losses_by_one_lambda():
    batch, key = make_batch(), jax.random.key(7)
    plain, mixed = objective(recipe="none"), objective(recipe="none", mixup=0.4)
    share, order = mixed._mix(key, B)
    views = plain.prepare(batch, key, True)
    np.testing.assert_allclose(
        mixed.prepare(batch, key, True), share * views + (1 - share) * views[order], rtol=1e-6
    )
    assert 0 < share < 1 and sorted(order.tolist()) == list(range(B))
    params, stats = states(plain, batch)
    outputs = jax.random.normal(key, (B, plain.width))
    loss = mixed.compare(params, stats, {}, outputs, batch, key, True)[0]
    logits = outputs @ params["classifier"]["kernel"]
    own = plain.cross_entropy(logits, batch["labels"])
    other = plain.cross_entropy(logits, batch["labels"][np.asarray(order)])
    np.testing.assert_allclose(loss, share * own + (1 - share) * other, rtol=1e-5)
    unmixed = mixed.compare(params, stats, {}, outputs, batch, key, False)[0]
    np.testing.assert_allclose(unmixed, own, rtol=1e-6)


def test_frozen_statistics_stay_and_are_those_that_are_used():
    batch, key = make_batch(), jax.random.key(0)
    frozen, learning = objective(batch_norm="frozen"), objective()
    params, stats = states(frozen, batch)
    views = frozen.prepare(batch, key, True)
    outputs, after = frozen.embed(params, stats, {}, views, key, True)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    evaluated, _ = frozen.embed(params, stats, {}, views, key, False)
    np.testing.assert_array_equal(outputs, evaluated)
    _, after = learning.embed(params, stats, {}, views, key, True)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after, stats)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(("layer", "width"), [(1, 24), (2, 12)])
def test_layers_of_the_projection_head_are_kept_with_their_norm_and_relu(layer, width):
    batch = make_batch()
    made = objective(from_layer=layer, projection=PROJECTION)
    params, stats = states(made, batch)
    assert params["classifier"]["kernel"].shape == (width, L)
    kept = range(1, layer + 1)
    assert set(params["head"]) == {f"{m}{k}" for k in kept for m in ("dense", "norm")}
    views = made.prepare(batch, jax.random.key(0), False)
    outputs, _ = made.embed(params, stats, {}, views, jax.random.key(0), False)
    assert outputs.shape == (B, width)
    assert (np.asarray(outputs).min() >= 0) == (layer == 1)  # the last layer has no ReLU


def test_probabilities_of_every_task():
    batch = make_batch()
    for task, uncertain in (
        ("single_label", "ignore"), ("multi_label", "ones"), ("multi_label", "three_class")
    ):  # fmt: skip
        made = objective(task, uncertain=uncertain)
        params, stats = states(made, batch)
        state = type("State", (), {"params": params, "batch_stats": stats})
        p = np.asarray(made.predict_fns()["probabilities"](state, batch), np.float64)
        views = made.prepare(batch, jax.random.key(0), False)
        features, _ = made.embed(params, stats, {}, views, jax.random.key(0), False)
        logits = np.asarray(features, np.float64) @ np.asarray(params["classifier"]["kernel"])
        if uncertain == "three_class":
            odds = np.exp(logits.reshape(B, L, 3))
            expected = odds[..., 1] / (odds[..., 0] + odds[..., 1])
        elif task == "single_label":
            expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        else:
            expected = 1 / (1 + np.exp(-logits))
        np.testing.assert_allclose(p, expected, rtol=2e-5)


def test_bad_settings_are_refused_in_one_line():
    for section, said in (
        ({"batch_norm": "off"}, "valid: train, frozen"),
        ({"dropout": 1.0}, "dropout from 0, below 1"),
        ({"class_weights": (1.0,)}, "1 values for 3 classes"),
        ({"task": "single_label", "uncertain": "three_class"}, "is of task multi_label"),
        ({"task": "none"}, "needs labels"),
    ):
        with pytest.raises(UserError, match=said):
            objective(**section)


# ------------------------------------------------------------------------- rates that fall by layer


def test_layer_scales_fall_from_the_head_to_the_stem():
    names = [
        *("backbone/stem/conv/kernel", "backbone/stage1/block1/conv1/kernel"),
        *("backbone/stage1/block2/norm1/scale", "backbone/stage2/block1/conv1/kernel"),
        *("backbone/norm/scale", "classifier/kernel"),
    ]
    scales = optim.layer_scales(names, 0.5)
    assert [scales[name] for name in names] == [0.5**4, 0.5**3, 0.5**2, 0.5, 0.5, 1.0]
    dense = ["backbone/block1/layer2/conv1/kernel", "backbone/transition1/conv/kernel",
             "backbone/block2/layer1/conv1/kernel"]  # fmt: skip
    assert list(optim.layer_scales(dense, 0.5).values()) == [0.125, 0.25, 0.5]
    vit = ["backbone/patches/kernel", "backbone/cls", "backbone/block2/mlp/up/kernel",
           "backbone/block10/mlp/up/kernel"]  # fmt: skip
    assert list(optim.layer_scales(vit, 0.5).values()) == [0.125, 0.125, 0.25, 0.5]


def test_an_update_is_scaled_by_its_layer_and_frozen_leaves_stay():
    params = {
        "backbone": {"stem": {"kernel": jnp.ones(2)}, "block1": {"mlp": {"kernel": jnp.ones(2)}}},
        "classifier": {"kernel": jnp.ones(2)},
    }
    grads = jax.tree.map(jnp.ones_like, params)
    config = {**common.optimizer("sgd", 1.0, lr_scaling="none", weight_decay=0.0, warmup_steps=0)}
    config.update(schedule="constant", momentum=0.0, layer_decay=0.5)
    tx, _ = optim.make_optimizer(config, params, batch_size=1, total_steps=1)
    updates = tree.flatten(tx.update(grads, tx.init(params), params)[0])
    assert {name: -float(u[0]) for name, u in updates.items()} == {
        "backbone/stem/kernel": 0.25, "backbone/block1/mlp/kernel": 0.5, "classifier/kernel": 1.0
    }  # fmt: skip
    config["freeze"] = ("backbone/.*",)
    tx, _ = optim.make_optimizer(config, params, batch_size=1, total_steps=1)
    updates = tree.flatten(tx.update(grads, tx.init(params), params)[0])
    assert float(updates["backbone/stem/kernel"][0]) == 0.0
    assert float(updates["classifier/kernel"][0]) == -1.0
    with pytest.raises(UserError, match="layer_decay=0.0"):
        optim.make_optimizer({**config, "layer_decay": 0.0}, params, batch_size=1, total_steps=1)
