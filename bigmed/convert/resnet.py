"""ResNet: the names of torchvision, which timm shares, of transformers' ResNetModel, of SimCLR.

Batch normalisation is the same on both sides (epsilon 1e-5; PyTorch's momentum 0.1 is our 0.9).
PyTorch pads the max-pooling on every side: `stem='torchvision'`. Its `num_batches_tracked` has no
counterpart here: left over on import, absent from an export, filled in by PyTorch itself.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigmed.convert import simclr
from bigmed.convert.mapping import CONV, Entry, renamed, timm_config, timm_named
from bigmed.errors import UserError
from bigmed.models import resnet

NAMINGS = ("torchvision", "timm", "huggingface")
READ_ONLY = ("simclr",)
STEM = "params/stem/conv/kernel"
_STATISTICS = (
    ("params", "scale", "weight"),
    ("params", "bias", "bias"),
    ("batch_stats", "mean", "running_mean"),
    ("batch_stats", "var", "running_var"),
)
# torchvision's network as a bare sequence of its parts, as lightly has it; 2, 3 and 8 are without
# parameters, 9 is the classifier
_PLACES = dict(zip("014567", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), strict=True))
_NUMBERED_BLOCK = re.compile(r"^(.*\.)?[4-7]\.\d+\.(?:conv\d|bn\d|downsample)\.")


def entries(model: resnet.Model, naming: str) -> list[Entry]:
    """Every leaf of the model beside its foreign tensor.

    Raises:
      UserError: a network that PyTorch's libraries, or SimCLR's code, do not have.
    """
    if naming == "simclr":
        return simclr.entries(model)
    _check_describable(model)
    huggingface = naming == "huggingface"
    blocks, bottleneck = resnet.VARIANTS[model.depth]
    convs = 3 if bottleneck else 2

    table: list[Entry] = []

    def conv_norm(conv: str, norm: str, their_conv: str, their_norm: str) -> None:
        table.append(Entry(f"params/{conv}/kernel", (f"{their_conv}.weight",), CONV))
        for collection, leaf, tensor in _STATISTICS:
            table.append(Entry(f"{collection}/{norm}/{leaf}", (f"{their_norm}.{tensor}",)))

    def pair(theirs: str) -> tuple[str, str]:
        return f"{theirs}.convolution", f"{theirs}.normalization"

    stem = pair("embedder.embedder") if huggingface else ("conv1", "bn1")
    conv_norm("stem/conv", "stem/norm", *stem)
    inputs = 64 * model.width
    for i, count in enumerate(blocks):
        out = 64 * model.width * 2**i * (resnet.EXPANSION if bottleneck else 1)
        for j in range(count):
            ours = f"stage{i + 1}/block{j + 1}"
            theirs = f"encoder.stages.{i}.layers.{j}" if huggingface else f"layer{i + 1}.{j}"
            for k in range(1, convs + 1):
                names = (f"{theirs}.conv{k}", f"{theirs}.bn{k}")
                if huggingface:
                    names = pair(f"{theirs}.layer.{k - 1}")
                conv_norm(f"{ours}/conv{k}", f"{ours}/norm{k}", *names)
            if j == 0 and (i > 0 or inputs != out):
                names = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
                if huggingface:
                    names = pair(f"{theirs}.shortcut")
                conv_norm(f"{ours}/shortcut/conv", f"{ours}/shortcut/norm", *names)
    return table


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A bare sequence's numbers as torchvision's names, and `simclr.plain_names`."""
    nests = {found[1] or "" for name in tensors if (found := _NUMBERED_BLOCK.match(name))}
    names = {}
    for nest in nests:
        for name in tensors:
            place, _, rest = name.removeprefix(nest).partition(".")
            if name.startswith(nest) and place in _PLACES:
                names[name] = f"{nest}{_PLACES[place]}.{rest}"
    return simclr.plain_names(renamed(tensors, names))


def describe(model: resnet.Model, naming: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of timm (torchvision reads none) or of transformers."""
    _check_describable(model)
    channels = shapes[STEM][2]
    blocks, bottleneck = resnet.VARIANTS[model.depth]
    if naming == "huggingface":
        expansion = resnet.EXPANSION if bottleneck else 1
        return {
            "model_type": "resnet",
            "num_channels": channels,
            "architectures": ["ResNetModel"],
            "embedding_size": 64 * model.width,
            "hidden_sizes": [64 * model.width * 2**i * expansion for i in range(4)],
            "depths": list(blocks),
            "layer_type": "bottleneck" if bottleneck else "basic",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        }
    if model.width != 1:
        raise UserError(f"config.model.width={model.width}: timm and torchvision have 1 alone")
    return timm_config(f"resnet{model.depth}", model.feature_dim, channels)


def from_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` of a config.json of timm ('resnet50.a1_in1k') or transformers.

    Raises:
      UserError: another architecture.
    """
    if config.get("model_type") == "resnet":
        depths = tuple(config["depths"])
        bottleneck = config.get("layer_type", "bottleneck") == "bottleneck"
        for depth, variant in resnet.VARIANTS.items():
            if variant == (depths, bottleneck):
                width = int(config["embedding_size"]) // 64
                return {"name": "resnet", "depth": depth, "width": width, "stem": "torchvision"}
        raise UserError(f"config.json: no ResNet here has depths {list(depths)}")
    return timm_named(config, resnet.TORCHVISION)


def _check_describable(model: resnet.Model) -> None:
    if model.stem != "torchvision" or model.sk_ratio or model.resnet_d or model.project_first:
        raise UserError(
            f"a ResNet with stem='{model.stem}', sk_ratio={model.sk_ratio}, "
            f"resnet_d={model.resnet_d}, project_first={model.project_first} is none of PyTorch's; "
            "valid: stem='torchvision', 0, False, False"
        )
