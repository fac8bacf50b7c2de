"""timm itself loads what is exported, with the same features; and its own weights come in.

timm brings torchvision, which is built for one version of PyTorch: see the README for how to run
this file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import PIL.Image
import pytest
from test_convert import damped

from bigmed import tree
from bigmed.convert import export, weights
from bigmed.convert.encoder import Encoder
from bigmed.models.catalogue import build

timm = pytest.importorskip("timm", reason="timm is in the extra 'timm'")
torch = pytest.importorskip("torch")

RESNET18 = {"name": "resnet", "depth": 18, "stem": "torchvision"}
BIT = {"name": "bit", "depth": 50, "width": 1}
REGISTERS = {"registers": 4, "cls_position": False}
DINOV2 = {"name": "vit", "variant": "S/14", "layer_scale": 1e-5}
VIT = {"name": "vit", "variant": "Ti/16"}
# our section, pixels, channels, the normalisation, timm's architecture
CASES = {
    "resnet18": (RESNET18, 75, 3, "imagenet", "resnet18"),
    "resnet50": ({**RESNET18, "depth": 50}, 64, 1, "none", "resnet50"),
    "densenet121": ({"name": "densenet", "depth": 121}, 64, 3, "imagenet", "densenet121"),
    "bit": (BIT, 64, 1, "none", "resnetv2_50x1_bit"),
    "vit": (VIT, 48, 1, "half", "vit_tiny_patch16_224"),
    "vit_mean": ({**VIT, "pool": "gap"}, 48, 3, "none", "vit_tiny_patch16_224"),
    "deit": ({**VIT, "distillation": True}, 48, 3, "imagenet", "deit_tiny_distilled_patch16_224"),
    "deit3": (
        {"name": "vit", "variant": "S/16", "cls_position": False, "layer_scale": 1e-6},
        48, 3, "imagenet", "deit3_small_patch16_224",
    ),
    "dinov2": (DINOV2, 56, 3, "imagenet", "vit_small_patch14_dinov2"),
    "dinov2_registers": (
        {**DINOV2, **REGISTERS}, 56, 1, "none", "vit_small_patch14_reg4_dinov2"
    ),
}  # fmt: skip


FACTS = {
    "objective": "simclr", "steps": 0, "batch_size": 8, "network": "student", "seed": 0,
    "init_from": None, "sources": ["x"], "config_sha256": "", "git_commit": "", "results": [],
}  # fmt: skip


def features_of(model, pixels, section):
    """timm's, as the model card says; of DeiT's two tokens ours are of the first."""
    with torch.no_grad():
        if section.get("distillation"):
            return model.forward_features(pixels)[:, 0].numpy()
        return model(pixels).numpy()


def assert_same(theirs, mine):
    assert mine.shape == theirs.shape and 0.1 < np.abs(mine).max() < 100
    np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_timm_loads_an_export_and_makes_the_same_features_of_an_image(case, tmp_path):
    """As its user would: by the folder alone, which says what pixels the network takes."""
    section, size, channels, normalize, _ = CASES[case]
    leaves = parity.random_leaves(build(section), size, channels)
    given = weights.Weights(section, size, channels, normalize, leaves, eval_crop=1.0)
    card = export.model_card(given, FACTS, "timm", "unknown")
    export.export(given, "timm", tmp_path / "out", card)
    of_one_token = "forward_features(pixels)[:, 0]" in (tmp_path / "out" / "README.md").read_text()
    assert of_one_token == bool(section.get("distillation"))
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()

    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    assert len(config["mean"]) == len(config["std"]) == config["input_size"][0]
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    images = np.random.default_rng(1).integers(0, 256, (2, size, size, channels), np.uint8)
    pictures = [PIL.Image.fromarray(x if channels == 3 else x[:, :, 0]) for x in images]
    pixels = torch.stack([transform(picture.convert(mode)) for picture in pictures])
    assert_same(features_of(model, pixels, section), Encoder(given)(images))


@pytest.mark.parametrize("case", CASES)
def test_weights_that_timm_saved_are_read(case, tmp_path):
    section, size, channels, _, architecture = CASES[case]
    channels = 3 if section["name"] == "bit" else channels  # whose stem takes grey as RGB
    args = {"in_chans": channels, "num_classes": 0}
    if section["name"] == "vit":
        args["img_size"] = size
    if section.get("pool") == "gap":
        args |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model = damped(parity.randomise(timm.create_model(architecture, **args)))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=args)
    found = weights.import_weights(tmp_path, "timm", size=size, channels=channels)
    ours = build(section)
    assert build(found.model) == ours and not found.fresh
    images = np.random.default_rng(1).random((2, size, size, channels), np.float32)
    apply = jax.jit(lambda v, x: ours.apply(v, x, train=False)[0])
    mine = np.asarray(apply(tree.unflatten(found.leaves), jnp.asarray(images)))
    pixels = images * 2 - 1 if section["name"] == "bit" else images  # as our network does
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
    assert_same(features_of(model, pixels, section), mine)
