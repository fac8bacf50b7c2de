"""SimCLR's ResNets in TensorFlow: layers are numbered in the order in which they were made.

In every block the shortcut's convolution and norm are made before the main branch's; a selective
kernel makes its two streams, then the squeeze, then the mixing, which has no norm. Kernels are HWIO
on both sides. Release 1 and 2, TensorFlow 1 and 2 share the order (google-research/simclr).
"""

import os
import re
from collections.abc import Mapping

import numpy as np

from bigmed.convert.mapping import Entry, renamed
from bigmed.errors import UserError
from bigmed.models import resnet

_SCOPE = "base_model"
_AVERAGED = "ema_model/"  # a moving average of the whole model, in some checkpoints of v2
_LAYER = re.compile(
    r"(?:^|/)(?:sync_)?(conv2d|batch_normalization)(?:_(\d+))?"
    r"/(kernel|gamma|beta|moving_mean|moving_variance)$"
)
_STATISTICS = (
    ("params", "scale", "gamma"),
    ("params", "bias", "beta"),
    ("batch_stats", "mean", "moving_mean"),
    ("batch_stats", "var", "moving_variance"),
)


def entries(model: resnet.Model) -> list[Entry]:
    """Every leaf of the model beside its variable.

    Raises:
      UserError: a network that SimCLR's code does not have.
    """
    blocks, bottleneck = resnet.VARIANTS[model.depth]
    _check(model, bottleneck)
    table: list[Entry] = []
    made = {"conv2d": 0, "batch_normalization": 0}

    def next_layer(kind: str) -> str:
        made[kind] += 1
        return _numbered(kind, made[kind] - 1)

    def conv(ours: str) -> None:
        table.append(Entry(f"params/{ours}/kernel", (f"{next_layer('conv2d')}/kernel",)))

    def conv_norm(our_conv: str, our_norm: str) -> None:
        conv(our_conv)
        layer = next_layer("batch_normalization")
        for collection, leaf, variable in _STATISTICS:
            table.append(Entry(f"{collection}/{our_norm}/{leaf}", (f"{layer}/{variable}",)))

    three = model.resnet_d and model.stem == "imagenet"
    for stem in ("stem1", "stem2", "stem3") if three else ("stem",):
        conv_norm(f"{stem}/conv", f"{stem}/norm")
    for i, count in enumerate(blocks, start=1):
        for j in range(1, count + 1):
            block = f"stage{i}/block{j}"
            if j == 1:
                conv_norm(f"{block}/shortcut/conv", f"{block}/shortcut/norm")
            conv_norm(f"{block}/conv1", f"{block}/norm1")
            if model.sk_ratio:
                conv_norm(f"{block}/sk/streams/conv", f"{block}/sk/streams/norm")
                conv_norm(f"{block}/sk/squeeze/conv", f"{block}/sk/squeeze/norm")
                conv(f"{block}/sk/mixing")
            else:
                conv_norm(f"{block}/conv2", f"{block}/norm2")
            if bottleneck:
                conv_norm(f"{block}/conv3", f"{block}/norm3")
    return table


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's layers numbered from 0 within 'base_model', as TensorFlow 1's are.

    TensorFlow 2 numbers them over the whole program and puts scopes of its own around them, as in
    'resnet/block_group1/bottleneck_block/conv2d_fixed_padding_2/conv2d_2/kernel'. The encoder is
    what stands beside its convolutions; heads have none.
    """
    layers = {
        name: found
        for name in tensors
        if not name.startswith(_AVERAGED) and (found := _LAYER.search(name))
    }
    scopes = [
        [part for part in name[: found.start()].split("/") if part]
        for name, found in layers.items()
        if found[1] == "conv2d"
    ]
    shared = os.path.commonprefix(scopes)  # of lists, too
    inside = {
        name: (found[1], int(found[2] or 0), found[3])
        for name, found in layers.items()
        if scopes and name.split("/")[: len(shared)] == shared
    }
    rank = {}
    for kind in ("conv2d", "batch_normalization"):
        numbers = sorted({number for k, number, _ in inside.values() if k == kind})
        rank |= {(kind, number): i for i, number in enumerate(numbers)}
    return renamed(
        tensors,
        {
            name: f"{_numbered(kind, rank[kind, number])}/{variable}"
            for name, (kind, number, variable) in inside.items()
        },
    )


def _numbered(kind: str, number: int) -> str:
    return f"{_SCOPE}/{kind}_{number}" if number else f"{_SCOPE}/{kind}"


def _check(model: resnet.Model, bottleneck: bool) -> None:
    kernels = bool(model.sk_ratio) == model.resnet_d
    if model.stem == "torchvision" or not kernels or not (bottleneck or model.project_first):
        raise UserError(
            f"a ResNet with depth={model.depth}, stem='{model.stem}', sk_ratio={model.sk_ratio}, "
            f"resnet_d={model.resnet_d}, project_first={model.project_first} is none of SimCLR's; "
            "valid: stem='imagenet' or 'small', sk_ratio and resnet_d both or neither, "
            "project_first=True for depths below 50; e.g. --model=simclr_r50_1x_sk0"
        )
