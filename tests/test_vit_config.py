"""Vision Transformers by name: parameter counts, config.json of transformers and timm."""

import json
import math

import parity
import pytest

from bigmed import optim
from bigmed.convert import vit as table
from bigmed.errors import UserError
from bigmed.models import vit


def build(section):
    return vit.Model(**{key: value for key, value in section.items() if key != "name"})


def shapes_of(model, size, channels=3):
    leaves = parity.abstract_leaves(model, parity.image_spec(size, channels))
    return {path: leaf.shape for path, leaf in leaves.items()}


# Parameters as published, which timm 1.0 counts too: with a classifier of 1000 classes (two, if
# distilled); of facebook's DINOv2 with the mask token.
PUBLISHED = {
    "vit_ti16": 5_717_416,
    "vit_s32": 22_878_952,
    "vit_s16": 22_050_664,
    "vit_s8": 22_055_272,
    "vit_b32": 88_224_232,
    "vit_b16": 86_567_656,
    "vit_b8": 86_576_872,
    "vit_l32": 306_535_400,
    "vit_l16": 304_326_632,
    "vit_h14": 632_045_800,
    "vit_g14": 1_012_611_432,
    "deit_ti16": 5_717_416,
    "deit_s16": 22_050_664,
    "deit_b16": 86_567_656,
    "deit_ti16_distilled": 5_910_800,
    "deit_s16_distilled": 22_436_432,
    "deit_b16_distilled": 87_338_192,
    "deit3_s16": 22_059_496,
    "deit3_b16": 86_585_320,
    "deit3_l16": 304_374_760,
    "deit3_h14": 632_126_440,
    "dinov2_vits14": 22_056_576,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vitg14": 1_136_480_768,
    "dinov2_vits14_reg": 22_058_112,
    "dinov2_vitb14_reg": 86_583_552,
    "dinov2_vitl14_reg": 304_372_736,
    "dinov2_vitg14_reg": 1_136_486_912,
}


@pytest.mark.parametrize("name", vit.NAMED)
def test_parameter_counts(name):
    model = build(vit.NAMED[name])
    dinov2 = name.startswith("dinov2")
    (d, depth, mlp, _), patch = model.shape()
    grid = (518 if dinov2 else 224) // patch
    found = sum(math.prod(shape) for shape in shapes_of(model, grid * patch).values())
    if model.mlp == "swiglu":
        hidden = 4096  # of the one published size
        mlp_parameters = 2 * hidden * (d + 1) + (hidden + 1) * d
    else:
        mlp_parameters = mlp * (d + 1) + (mlp + 1) * d
    block = 4 * d * (d + 1) + 4 * d + mlp_parameters + (2 * d if model.layer_scale else 0)
    codes = grid**2 + (0 if "deit3" in name else 2 if "distilled" in name else 1)
    tokens = 1 + ("distilled" in name) + 4 * name.endswith("_reg")
    assert found == depth * block + (3 * patch**2 + 1) * d + (codes + tokens) * d + 2 * d
    heads = 2 if "distilled" in name else 1
    assert found + (d if dinov2 else heads * 1000 * (d + 1)) == PUBLISHED[name]


def test_every_published_model_is_described_and_read_back():
    for name, section in vit.NAMED.items():
        model = build(section)
        assert table.from_description({"architecture": name}) == section
        for naming in table.NAMINGS:
            if naming == "huggingface" and name.startswith("deit3"):
                with pytest.raises(UserError, match="config.model.cls_position=False"):
                    table.entries(model, naming)
                continue
            described = json.loads(json.dumps(table.describe(model, naming)))
            assert table.from_description(described) == section, (name, naming)


@pytest.mark.parametrize(
    ("architecture", "args", "section"),
    [
        ("vit_base_patch16_224.augreg_in21k", {}, {"variant": "B/16"}),
        ("vit_small_patch32_384", {"img_size": 256, "in_chans": 1}, {"variant": "S/32"}),
        ("vit_giant_patch14_224", {}, {"variant": "g/14"}),
        (
            "deit_small_distilled_patch16_224.fb_in1k",
            {},
            {"variant": "S/16", "distillation": True},
        ),
        (
            "vit_giant_patch14_reg4_dinov2.lvd142m",
            {},
            {
                "variant": "g2/14",
                "cls_position": False,
                "registers": 4,
                "mlp": "swiglu",
                "layer_scale": 1e-5,
            },
        ),
        (
            "vit_large_patch16_224",
            {"class_token": False, "global_pool": "avg", "patch_size": 8},
            {"variant": "L/8", "pool": "gap"},
        ),
    ],
)
def test_timm_architectures(architecture, args, section):
    config = {"architecture": architecture, "model_args": args, "num_classes": 0}
    assert table.from_description(config) == {"name": "vit", **section}


def test_timm_description_of_a_network_without_class_token():
    model = vit.Model("B/16", pool="gap", registers=2)
    shapes = shapes_of(model, 96, channels=1)
    config = table.describe(model, "timm", shapes)
    assert config["architecture"] == "vit_base_patch16_224"
    assert config["num_features"] == 768 and config["num_classes"] == 0
    args = config["model_args"]
    assert (args["img_size"], args["in_chans"], args["no_embed_class"]) == (96, 1, True)
    section = table.from_description(config)
    assert section == {"name": "vit", "variant": "B/16", "pool": "gap", "registers": 2}
    with pytest.raises(UserError, match="24 patches are not of a square image"):
        table.describe(model, "timm", {**shapes, "params/pos_embedding": (1, 24, 768)})


HF_VIT = {"model_type": "vit"}


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: table.from_description({"model_type": "vitt"}), "did you mean 'vit'"),
        (lambda: table.from_description({**HF_VIT, "hidden_act": "relu"}), "hidden_act=relu"),
        (lambda: table.from_description({**HF_VIT, "qkv_bias": False}), "qkv_bias=False"),
        (lambda: table.from_description({**HF_VIT, "hidden_size": 99}), r"\(99, 12, 3072, 12\)"),
        (
            lambda: table.from_description({"architecture": "vit_base_patch16_clip_224"}),
            "architecture 'vit_base_patch16_clip_224' is no ViT",
        ),
        (
            lambda: table.from_description(
                {"architecture": "vit_base_patch16_224", "model_args": {"qk_norm": True}}
            ),
            "model_args of qk_norm",
        ),
        (
            lambda: table.from_description(
                {"architecture": "vit_base_patch16_224", "model_args": {"global_pool": "map"}}
            ),
            "global_pool='map'",
        ),
        (
            lambda: table.entries(vit.Model("S/16", registers=2), "npz"),
            "config.model.registers=2 has no name in the naming 'npz'",
        ),
        (
            lambda: table.entries(vit.Model("S/16", mlp="swiglu"), "big_vision"),
            "config.model.mlp=swiglu has no name",
        ),
        (
            lambda: table.entries(vit.Model("S/16", distillation=True), "dinov2"),
            "config.model.distillation=True has no name",
        ),
        (
            lambda: table.entries(vit.Model("S/16", pool="gap"), "huggingface"),
            "config.model.pool=gap .* valid: cls",
        ),
        (
            lambda: table.entries(vit.Model("S/16"), "big_vision"),
            "config.model.cls_position=True .* valid: False",
        ),
        (
            lambda: table.entries(vit.Model("S/16", registers=2), "huggingface"),
            "config.model.layer_scale=0",
        ),
        (lambda: table.describe(vit.Model("S/16", norm_eps=1e-12), "timm"), "norm_eps=1e-12"),
        (lambda: table.describe(vit.Model("mu/8"), "timm"), "variant='mu/8'"),
        (lambda: table.describe(vit.Model("S/14", mlp="swiglu"), "timm"), "valid sizes: g2"),
        (
            lambda: table.describe(vit.Model("g/14", layer_scale=1.0), "huggingface"),
            "MLP of 6144, no multiple",
        ),
    ],
)
def test_mistakes_are_named(action, message):
    with pytest.raises(UserError, match=message):
        action()


def test_every_parameter_has_a_role_in_the_optimiser():
    model = vit.Model("mu/8", distillation=True, registers=2, layer_scale=0.1, mlp="swiglu")
    shapes = parity.abstract_leaves(model, parity.image_spec(16))
    roles = optim.roles({}, {"backbone": dict(shapes)})
    for path, role in roles["backbone"].items():
        assert role == ("adapted" if path.endswith("kernel") else "plain"), path
