"""DenseNet: the names of torchvision, which timm shares.

Batch normalisation is the same on both sides (epsilon 1e-5; PyTorch's momentum 0.1 is our 0.9), and
so are paddings. PyTorch's `num_batches_tracked` has no counterpart here: it is left over on import
and absent from an export, which PyTorch fills in by itself.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.convert.mapping import CONV, Entry, timm_config, timm_named
from bigmed.errors import UserError
from bigmed.models import densenet

NAMINGS = ("torchvision", "timm")
STEM = "params/stem/conv/kernel"


def entries(model: densenet.Model, naming: str) -> list[Entry]:
    """Every leaf of the model beside its foreign tensor; both namings are the same."""
    del naming
    table = []

    def conv(ours: str, theirs: str) -> None:
        table.append(Entry(f"params/{ours}/kernel", (f"features.{theirs}.weight",), CONV))

    def norm(ours: str, theirs: str) -> None:
        for leaf, tensor in (
            (f"params/{ours}/scale", "weight"),
            (f"params/{ours}/bias", "bias"),
            (f"batch_stats/{ours}/mean", "running_mean"),
            (f"batch_stats/{ours}/var", "running_var"),
        ):
            table.append(Entry(leaf, (f"features.{theirs}.{tensor}",)))

    conv("stem/conv", "conv0")
    norm("stem/norm", "norm0")
    _, blocks = densenet.VARIANTS[model.depth]
    for b, layers in enumerate(blocks, start=1):
        if b > 1:
            norm(f"transition{b - 1}/norm", f"transition{b - 1}.norm")
            conv(f"transition{b - 1}/conv", f"transition{b - 1}.conv")
        for i in range(1, layers + 1):
            ours, theirs = f"block{b}/layer{i}", f"denseblock{b}.denselayer{i}"
            for k in (1, 2):
                norm(f"{ours}/norm{k}", f"{theirs}.norm{k}")
                conv(f"{ours}/conv{k}", f"{theirs}.conv{k}")
    norm("norm", "norm5")
    return table


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names 'norm.1' of a layer, as in the files that torchvision publishes, to its own 'norm1'."""
    return {
        re.sub(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", name): tensor
        for name, tensor in tensors.items()
    }


def describe(
    model: densenet.Model, naming: str, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """timm's config.json; torchvision reads none, and its export says the same.

    Raises:
      UserError: a small stem, which neither library has.
    """
    del naming
    if model.stem != "imagenet":
        raise UserError(
            f"config.model.stem='{model.stem}' of a DenseNet cannot be described for torchvision "
            "or timm; valid: imagenet"
        )
    return timm_config(f"densenet{model.depth}", model.feature_dim, shapes[STEM][2])


def from_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` of a timm config.json, e.g. of architecture 'densenet121.tv_in1k'.

    Raises:
      UserError: another architecture.
    """
    return timm_named(config, densenet.NAMED)
