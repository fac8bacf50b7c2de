"""PyTorch twins of encoders for benchmarks and tests; needs the extra `bench` or `test`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}
VITS = {"vit-s16": (384, 12, 6), "vit-b16": (768, 12, 12)}
PATCH = 16


class Block(nn.Module):
    """A residual block of ResNet v1.5."""

    def __init__(self, inputs: int, features: int, stride: int, bottleneck: bool):
        super().__init__()
        out = features * (4 if bottleneck else 1)
        c = features
        if bottleneck:
            convs = [(inputs, c, 1, 1), (c, c, 3, stride), (c, out, 1, 1)]
        else:
            convs = [(inputs, out, 3, stride), (out, out, 3, 1)]
        layers: list[nn.Module] = []
        for i, o, size, s in convs:
            layers += [nn.Conv2d(i, o, size, s, size // 2, bias=False), nn.BatchNorm2d(o)]
            layers.append(nn.ReLU(inplace=True))
        self.main = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.main(x) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """[B, 3, S, S] -> [B, D]."""

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        self.feature_dim = 64
        for stage, count in enumerate(blocks):
            for j in range(count):
                features, stride = 64 * 2**stage, 2 if stage and not j else 1
                layers.append(Block(self.feature_dim, features, stride, bottleneck))
                self.feature_dim = features * (4 if bottleneck else 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


class DenseLayer(nn.Module):
    """[B, C, H, W] -> [B, C + growth, H, W]."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.conv1(functional.relu(self.norm1(x), inplace=True))
        new = self.conv2(functional.relu(self.norm2(new), inplace=True))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """[B, C, H, W] -> [B, C // 2, H // 2, W // 2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(x), inplace=True)), 2)


class DenseNet(nn.Module):
    """[B, 3, S, S] -> [B, D]; parameters have torchvision's names."""

    def __init__(self, growth: int, blocks: Sequence[int]):
        super().__init__()
        channels = 2 * growth
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, padding=1))
        for b, count in enumerate(blocks, start=1):
            if b > 1:
                self.features.add_module(f"transition{b - 1}", Transition(channels))
                channels //= 2
            block = nn.Sequential()
            for i in range(1, count + 1):
                block.add_module(f"denselayer{i}", DenseLayer(channels, growth))
                channels += growth
            self.features.add_module(f"denseblock{b}", block)
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, 10)  # unused, and left over on import

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.features(x), inplace=True).mean((2, 3))


class TransformerBlock(nn.Module):
    """A pre-norm block with PyTorch's fused attention."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
        y = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """[B, 3, S, S] -> [B, D], the class token."""

    def __init__(self, d: int, depth: int, heads: int, size: int):
        super().__init__()
        self.feature_dim = d
        self.patches = nn.Conv2d(3, d, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // PATCH) ** 2 + 1, d))
        self.blocks = nn.Sequential(*(TransformerBlock(d, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(d, 1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.norm(self.blocks(x))[:, 0]


def simclr(name: str, size: int) -> nn.Module:
    """Encoder and two-layer projection head: [B, 3, size, size] -> [B, 128]."""
    encoder = ResNet(*RESNETS[name]) if name in RESNETS else ViT(*VITS[name], size)
    d = encoder.feature_dim
    return nn.Sequential(
        encoder,
        nn.Linear(d, d, bias=False),
        nn.BatchNorm1d(d),
        nn.ReLU(inplace=True),
        nn.Linear(d, 128, bias=False),
        nn.BatchNorm1d(128),
    )


def load_encoder(
    encoder: nn.Module, params: dict[str, Any], batch_stats: dict[str, Any] | None = None
) -> None:
    """Copies the variables (NumPy arrays) of bigmed's encoder into its twin."""
    with torch.no_grad():
        if isinstance(encoder, ResNet):
            _copy_resnet(encoder, params, batch_stats)
        else:
            _copy_vit(encoder, params)


def _set(target: nn.Module, **values: Any) -> None:
    for name, value in values.items():
        getattr(target, name).copy_(torch.tensor(value))


def _copy_resnet(encoder: ResNet, params: dict[str, Any], stats: dict[str, Any]) -> None:
    def conv_norm(layers: nn.Module, conv: Any, norm: Any, norm_stats: Any) -> None:
        _set(layers[0], weight=conv["kernel"].transpose(3, 2, 0, 1))
        _set(layers[1], weight=norm["scale"], bias=norm["bias"])
        _set(layers[1], running_mean=norm_stats["mean"], running_var=norm_stats["var"])

    conv_norm(encoder.layers[:2], **params["stem"], norm_stats=stats["stem"]["norm"])
    blocks = iter(encoder.layers[4:])
    for stage in (f"stage{i}" for i in range(1, 5)):
        for name in (f"block{j}" for j in range(1, len(params[stage]) + 1)):
            block, p, s = next(blocks), params[stage][name], stats[stage][name]
            for k in range(1, 4 if "conv3" in p else 3):
                layers = block.main[3 * k - 3 : 3 * k - 1]
                conv_norm(layers, p[f"conv{k}"], p[f"norm{k}"], s[f"norm{k}"])
            if "shortcut" in p:
                conv_norm(block.shortcut, **p["shortcut"], norm_stats=s["shortcut"]["norm"])


def _copy_vit(encoder: ViT, params: dict[str, Any]) -> None:
    def dense(target: nn.Linear, p: dict[str, Any], outputs: int) -> None:
        _set(target, weight=p["kernel"].reshape(-1, outputs).T, bias=p["bias"].reshape(outputs))

    d = encoder.feature_dim
    kernel = params["patches"]["kernel"].reshape(PATCH, PATCH, 3, d)
    _set(encoder, cls=params["cls"], position=params["pos_embedding"])
    _set(encoder.patches, weight=kernel.transpose(3, 2, 0, 1), bias=params["patches"]["bias"])
    _set(encoder.norm, weight=params["norm"]["scale"], bias=params["norm"]["bias"])
    for i, block in enumerate(encoder.blocks, start=1):
        p = params[f"block{i}"]
        for norm, name in ((block.norm1, "norm1"), (block.norm2, "norm2")):
            _set(norm, weight=p[name]["scale"], bias=p[name]["bias"])
        dense(block.qkv, p["attention"]["qkv"], 3 * d)
        dense(block.out, p["attention"]["out"], d)
        dense(block.mlp[0], p["mlp"]["up"], 4 * d)
        dense(block.mlp[2], p["mlp"]["down"], d)
