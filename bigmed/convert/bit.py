"""BiT ResNet-v2: the names of Google's released .npz files, of timm and of transformers.

REMEDIS's networks are BiTs as SavedModels, with the names of the .npz files in other scopes.

All three pad alike. timm and transformers add 1e-8 to a kernel's variance, BiT and we 1e-10: the
features differ where a filter's weights are smaller than about 1e-3.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.convert.mapping import CONV, SAME, Entry, renamed, timm_config
from bigmed.errors import UserError, did_you_mean
from bigmed.models import bit

NAMINGS = ("npz", "huggingface", "timm")
READ_ONLY = ("remedis",)
# Of three channels for grey images too, which the model takes as three equal channels.
STEM = "params/stem/kernel"
PIXELS = (0.5, 0.5)  # [0, 1] to [-1, 1]

_SCOPES = re.compile(r"^(?:\w+/)*?(?=(?:root_block|block\d+/unit\d+|group_norm)/)")
_SIZES = (256, 512, 1024, 2048)  # channels after each stage, at width 1
# A BitConfig's settings of which BiT has one value, which is also the default.
_FIXED = {
    "layer_type": "preactivation",
    "global_padding": None,
    "embedding_dynamic_padding": False,
    "num_groups": bit.GROUPS,
    "hidden_act": "relu",
    "output_stride": 32,
    "width_factor": 1,  # transformers leaves the stem and the last norm out of it
}


def entries(model: bit.Model, naming: str) -> list[Entry]:
    """Every leaf of the model beside its foreign tensor."""
    naming = "npz" if naming == "remedis" else naming
    npz = naming == "npz"
    layout = SAME if npz else CONV
    kernel = "/standardized_conv2d/kernel" if npz else ".weight"
    scale, bias = ("/gamma", "/beta") if npz else (".weight", ".bias")
    stem, block, norm = {
        "npz": ("resnet/root_block", "resnet/block{}/unit{:02d}/", "resnet/group_norm"),
        "huggingface": ("embedder.convolution", "encoder.stages.{}.layers.{}.", "norm"),
        "timm": ("stem.conv", "stages.{}.blocks.{}.", "norm"),
    }[naming]
    first = 1 if npz else 0  # number of the first stage and the first block
    shortcut = "a/proj" if npz else "downsample.conv"
    convs = ("a", "b", "c") if npz else ("conv1", "conv2", "conv3")
    norms = tuple(f"{c}/group_norm" for c in convs) if npz else ("norm1", "norm2", "norm3")

    table = [Entry("params/stem/kernel", (stem + kernel,), layout)]
    for i, blocks in enumerate(bit.VARIANTS[model.depth]):
        for j in range(blocks):
            ours, theirs = f"params/stage{i + 1}/block{j + 1}", block.format(first + i, first + j)
            for k in range(3):
                table += [
                    Entry(f"{ours}/norm{k + 1}/scale", (theirs + norms[k] + scale,)),
                    Entry(f"{ours}/norm{k + 1}/bias", (theirs + norms[k] + bias,)),
                    Entry(f"{ours}/conv{k + 1}/kernel", (theirs + convs[k] + kernel,), layout),
                ]
            if j == 0:
                table.append(
                    Entry(f"{ours}/shortcut/kernel", (theirs + shortcut + kernel,), layout)
                )
    table.append(Entry("params/norm/scale", (norm + scale,)))
    table.append(Entry("params/norm/bias", (norm + bias,)))
    return table


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Whatever scopes stand around the network as 'resnet', and convolutions without a number.

    Some .npz files number them, 'standardized_conv2d_7'; REMEDIS's networks may stand in
    'base_model/module/resnet'.
    """
    names = {name: _SCOPES.sub("resnet/", name, count=1) for name in tensors}
    return renamed(
        tensors,
        {
            name: re.sub(r"/standardized_conv2d_\d+/", "/standardized_conv2d/", new)
            for name, new in names.items()
        },
    )


def describe(model: bit.Model, naming: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The config.json of transformers' BitModel or of timm; for an .npz file, its name.

    Raises:
      UserError: timm has no model of this depth and width.
    """
    size, channels = f"{model.depth}x{model.width}", shapes[STEM][2]
    if naming == "huggingface":
        return {
            "model_type": "bit",
            "architectures": ["BitModel"],
            **_FIXED,
            "num_channels": channels,
            "embedding_size": 64 * model.width,
            "hidden_sizes": [size * model.width for size in _SIZES],
            "depths": list(bit.VARIANTS[model.depth]),
        }
    if naming == "npz":
        return {"architecture": f"BiT-R{size}"}
    if f"bit_r{size}" not in bit.NAMED:
        valid = ", ".join(name.removeprefix("bit_r") for name in bit.NAMED)
        raise UserError(
            f"timm has no BiT of config.model.depth={model.depth} and width={model.width}; "
            f"valid depth and width: {valid}"
        )
    return timm_config(f"resnetv2_{size}_bit", model.feature_dim, channels)


def from_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` of a config.json of transformers or timm, or of the name of an .npz file.

    Architectures are named 'BiT-M-R50x1', 'resnetv2_50x1_bit' or 'resnetv2_50x1_bit.goog_in21k'.

    Raises:
      UserError: another architecture, or a BitConfig of another form than the released models'.
    """
    if config.get("model_type") == "bit":
        return _from_bit_config(config)
    name = str(config.get("architecture"))
    found = re.fullmatch(
        r"(?:BiT-(?:[SML]-)?R(\d+)x(\d+)|resnetv2_(\d+)x(\d+)_bit)(?:[.-].*)?", name
    )
    depth, width = (int(n) for n in found.groups() if n) if found else (0, 0)
    if depth not in bit.VARIANTS or width < 1:
        valid = [n.replace("bit_r", "BiT-R") for n in bit.NAMED]
        raise UserError(f"architecture '{name}': {did_you_mean(name, valid)}")
    return {"name": "bit", "depth": depth, "width": width}


def _from_bit_config(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"BitConfig.{key}={config[key]}: valid here: {value}")
    depths = list(config.get("depths", bit.VARIANTS[50]))
    sizes = list(config.get("hidden_sizes", _SIZES))
    depth = next((d for d, blocks in bit.VARIANTS.items() if list(blocks) == depths), None)
    if depth is None:
        valid = "; ".join(str(list(blocks)) for blocks in bit.VARIANTS.values())
        raise UserError(f"BitConfig.depths={depths}: valid here: {valid}")
    stem = config.get("embedding_size", 64)
    width = max(stem // 64, 1)
    if [stem, *sizes] != [64 * width, *(size * width for size in _SIZES)]:
        raise UserError(
            f"BitConfig.embedding_size={stem} with hidden_sizes={sizes}: valid here: 64 and "
            f"{list(_SIZES)}, or a whole multiple of all of them"
        )
    return {"name": "bit", "depth": depth, "width": width}
