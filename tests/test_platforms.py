"""Training steps for accelerators: they lower for CUDA and TPU, without what is meant for a CPU."""

import re

import jax
import jax.numpy as jnp
import pytest
import test_exactness
from exactness import mesh_of
from ml_collections import ConfigDict
from test_convirt import LENGTH, batch_of, spec_of
from test_objectives import BATCH, make_batch

from bigmed import optim, sharding
from bigmed.models import bit, densenet, resnet, vit
from bigmed.objectives import byol, c2l, convirt, micle, moco_v3, simclr, supervised
from bigmed.state import abstract_state, make_init
from bigmed.step import MicroBatches, make_train_step
from configs import common

TINY = {"name": "tiny_model:Model", "variant": "mu/8"}
VIT = common.vit("mu/8")
MLP = {"head_hidden": 16, "head_dim": 8}
FINETUNED = {
    "name": "supervised", "uncertain": "ignore", "class_weights": (), "dropout": 0.1,
    "batch_norm": "train", "mixup": 0.2, "from_layer": 0, "projection": {},
}  # fmt: skip
RESNET = common.resnet(1, resnet_d=True)
DENSENET = {"name": "densenet", "depth": 1, "stem": "small"}
BIT = {"name": "bit", "depth": 1}
# objective, its config, encoder, optimiser, number of micro-batches
CASES = {
    "simclr": (simclr, common.simclr_objective(**MLP), RESNET, "lars", 1),
    "micle": (micle, common.simclr_objective("micle", **MLP), TINY, "adamw", 2),
    "c2l": (c2l, common.c2l_objective(head_dim=8, queue_size=64, bn_groups=2), TINY, "sgd", 1),
    "convirt": (convirt, common.convirt_objective(**MLP), VIT, "adam", 2),
    "siglip": (
        convirt, common.convirt_objective(**MLP, loss="sigmoid", learn_temperature=True), DENSENET,
        "lamb", 1,
    ),
    "byol": (byol, common.byol_objective(**MLP), TINY, "lars", 1),
    "moco_v3": (
        moco_v3, common.moco_v3_objective(**MLP), common.vit("deep/8", scan=True, remat=True),
        "adamw", 1,
    ),
    "supervised": (supervised, ConfigDict(FINETUNED), BIT, "sgd", 1),
}  # fmt: skip


def traced(name, folder, sizes, precision):
    """The traced step that `bigmed.step` makes."""
    module, section, model, optimiser, count = CASES[name]
    config = common.base()
    config.precision = precision
    config.model, config.objective = ConfigDict(model), section
    config.text_model = common.bert(width=16, depth=2, heads=2, mlp_dim=16, train_after_layer=1)
    recipe = "natural" if name == "micle" else "none"  # which is traced in half the time
    config.augment = common.augmentation(recipe, 16)
    config.data.update(channels=3, batch_size=BATCH)
    config.data.text = common.text("vocab.txt", length=LENGTH)
    config.optim = common.optimizer(
        optimiser, 0.1, lr_scaling="none", weight_decay=1e-4, warmup_steps=2
    )
    objective = module.Objective(config.lock(), spec_of(folder))
    batch = make_batch(objective.IMAGES_PER_EXAMPLE[0], size=16)
    batch = {**batch_of(), **batch} if objective.OF_TEXTS else batch
    mesh = mesh_of(*sizes)
    params = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch)[0])
    tx, schedule = optim.make_optimizer(
        {**config.optim, "freeze": objective.FROZEN}, params, batch_size=BATCH, total_steps=10
    )
    abstract = abstract_state(make_init(objective, tx, batch, seed=0), mesh, objective.SHARDING)
    step = make_train_step(objective, tx, schedule, mesh, abstract, MicroBatches(count))
    rows = sharding.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    number, skip = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, bool))
    with jax.set_mesh(mesh):
        return step.trace(abstract, batch, number, skip)


@pytest.fixture(autouse=True)
def _marked(monkeypatch):
    """Operations of one platform alone carry its name; networks have a block a stage, or three."""
    choose = jax.lax.platform_dependent

    def marking(*args, default=None, **branches):
        branches = {p: jax.named_scope(f"only_{p}")(f) for p, f in branches.items()}
        return choose(*args, default=default, **branches)

    monkeypatch.setattr(jax.lax, "platform_dependent", marking)
    monkeypatch.setitem(resnet.VARIANTS, 1, ((1, 1, 1, 1), True))
    monkeypatch.setitem(densenet.VARIANTS, 1, (4, (1, 1)))
    monkeypatch.setitem(bit.VARIANTS, 1, (1, 1, 1, 1))
    monkeypatch.setitem(vit.VARIANTS, "deep", vit.Size(16, 3, 32, 2))


def lowered(program, platform):
    return program.lower(lowering_platforms=(platform,)).as_text(debug_info=True)


@pytest.mark.parametrize("name", CASES)
def test_steps_lower_without_what_is_meant_for_a_cpu(name, tmp_path, monkeypatch):
    """On one device in float32, and on eight in bfloat16 with tiles, which go round a ring.

    No program calls anything by its name: neither the host nor a library of one platform.
    """
    alone = traced(name, tmp_path, (1, 1, 1), "f32")
    test_exactness.in_tiles(monkeypatch)
    together = traced(name, tmp_path, (2, 2, 2), "bf16")
    for platform in ("cuda", "tpu"):
        for program, halved in ((alone, False), (together, True)):
            text = lowered(program, platform)
            assert "only_cpu" not in text and "custom_call" not in text and "f64>" not in text
            assert bool(re.search(r"(dot_general|convolution).*xbf16>", text)) == halved
            assert ('"data"=2, "fsdp"=2, "tensor"=2' in text) == halved


def test_on_a_cpu_its_own_operations_are_found(tmp_path):
    assert "only_cpu" in lowered(traced("supervised", tmp_path, (1, 1, 1), "f32"), "cpu")
