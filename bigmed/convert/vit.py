"""Vision Transformers: the names of timm, transformers, facebook's DINOv2 and Google's .npz files.

  timm          also of facebook's DeiT; SwiGLU's gate and values are one matrix `fc1`
  huggingface   the names in the files, which transformers 4 and 5 read and write, of ViTModel,
                DeiTModel, Dinov2Model or Dinov2WithRegistersModel, whichever has the model's parts
  dinov2        facebook's .pth
  npz           vit_jax's, which AugReg was released in
  big_vision    the same in big_vision's numbering, e.g. 'MlpBlock_0' for 'MlpBlock_3'

Features are those of the class token after the last norm; transformers' pooler, classifiers and
DINOv2's mask token are left over on import.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.convert.mapping import DENSE, SAME, Entry, Layout
from bigmed.convert.vit_config import describe, from_description, hf_type
from bigmed.errors import UserError
from bigmed.models import vit
from bigmed.models.positions import resample_positions

__all__ = [
    "NAMINGS", "STEM", "describe", "entries", "fit_positions", "from_description",
]  # fmt: skip

NAMINGS = ("timm", "huggingface", "dinov2", "npz", "big_vision")
STEM = "params/patches/kernel"

# part of the model -> foreign name; a naming without a part cannot hold a model that has it
_TIMM = {
    "patches": "patch_embed.proj",
    "cls": "cls_token",
    "distillation": "dist_token",
    "registers": "reg_token",
    "pos_embedding": "pos_embed",
    "block": "blocks.{}.",
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": ("attn.qkv",),
    "out": "attn.proj",
    "gelu": ("mlp.fc1", "mlp.fc2"),
    "swiglu": ("mlp.fc1", "mlp.fc2"),
    "layer_scale": ("ls1.gamma", "ls2.gamma"),
    "norm": "norm",
}
_DINOV2 = {**_TIMM, "registers": "register_tokens", "swiglu": ("mlp.w12", "mlp.w3")}
del _DINOV2["distillation"]
_HF_VIT = {
    "patches": "embeddings.patch_embeddings.projection",
    "cls": "embeddings.cls_token",
    "distillation": "embeddings.distillation_token",
    "pos_embedding": "embeddings.position_embeddings",
    "block": "encoder.layer.{}.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "out": "attention.output.dense",
    "gelu": ("intermediate.dense", "output.dense"),
    "norm": "layernorm",
}
_HF_DINOV2 = {
    **_HF_VIT,
    "registers": "embeddings.register_tokens",
    "norm1": "norm1",
    "norm2": "norm2",
    "gelu": ("mlp.fc1", "mlp.fc2"),
    "swiglu": ("mlp.weights_in", "mlp.weights_out"),
    "layer_scale": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
}
del _HF_DINOV2["distillation"]


def _npz(attention: int, norm2: int, mlp: int, positions: str) -> dict[str, Any]:
    attention_name = f"MultiHeadDotProductAttention_{attention}"
    return {
        "patches": "embedding",
        "cls": "cls",
        "pos_embedding": positions,
        "block": "Transformer/encoderblock_{}/",
        "norm1": "LayerNorm_0",
        "norm2": f"LayerNorm_{norm2}",
        "qkv": tuple(f"{attention_name}/{part}" for part in ("query", "key", "value")),
        "out": f"{attention_name}/out",
        "gelu": (f"MlpBlock_{mlp}/Dense_0", f"MlpBlock_{mlp}/Dense_1"),
        "norm": "Transformer/encoder_norm",
    }


_NAMES = {
    "timm": _TIMM,
    "dinov2": _DINOV2,
    "npz": _npz(1, 2, 3, "Transformer/posembed_input/pos_embedding"),
    "big_vision": _npz(0, 1, 0, "pos_embedding"),
}


# What an attribute of the model must be for a naming to hold it, beside the names above.
_ONLY = {
    "timm": {"position": ("learned",)},
    "huggingface": {"pool": ("cls",), "position": ("learned",), "cls_position": (True,)},
    "dinov2": {"pool": ("cls",), "position": ("learned",), "cls_position": (True,)},
    "npz": {"position": ("learned",), "cls_position": (True,)},
    "big_vision": {"cls_position": (False,)},
}


def _names(model: vit.Model, naming: str) -> dict[str, Any]:
    """Names of the parts; raises `UserError` if the model has one that the naming lacks."""
    if naming == "huggingface":
        names = _HF_VIT if hf_type(model) in ("vit", "deit") else _HF_DINOV2
    else:
        names = _NAMES[naming]
    for key, part in (
        ("distillation", "distillation"),
        ("registers", "registers"),
        ("layer_scale", "layer_scale"),
        ("mlp", model.mlp),
    ):
        if getattr(model, key) and part not in names:
            raise UserError(
                f"config.model.{key}={getattr(model, key)} has no name in the naming '{naming}' of "
                "a ViT with these parts; 'timm' has names for the most"
            )
    only = dict(_ONLY[naming])
    if model.pool != "cls" or model.position != "learned":
        only.pop("cls_position", None)  # it decides nothing
    for key, valid in only.items():
        if getattr(model, key) not in valid:
            raise UserError(
                f"config.model.{key}={getattr(model, key)} of a ViT does not exist in the naming "
                f"'{naming}'; valid: {valid[0]}"
            )
    if naming == "huggingface" and names is _HF_DINOV2 and not model.layer_scale:
        raise UserError(
            "config.model.layer_scale=0 with registers or swiglu does not exist in transformers, "
            "whose DINOv2 has LayerScale; valid: more than 0"
        )
    if naming == "timm" and model.distillation and model.registers:
        raise UserError("config.model.registers with distillation does not exist in timm; valid: 0")
    return names


def entries(model: vit.Model, naming: str) -> list[Entry]:
    """Every leaf of the model beside its foreign tensors.

    Raises:
      UserError: the model has a part that the naming has no name for.
    """
    size, patch = model.shape()
    names = _names(model, naming)
    d, head = size.width, (size.heads, size.width // size.heads)
    wide = (2, vit.swiglu_hidden(size.mlp_dim)) if model.mlp == "swiglu" else (size.mlp_dim,)
    if naming in ("npz", "big_vision"):
        kernel, scale, bias = "/kernel", "/scale", "/bias"
        patches = _patches(patch, (0, 1, 2, 3))
        qkv, qkv_bias, out, up, down = _joined(SAME, 1), _joined(SAME, 0), SAME, SAME, SAME
    else:
        kernel, scale, bias = ".weight", ".weight", ".bias"
        patches = _patches(patch, (2, 3, 1, 0))
        out, up, down = _dense((*head,), (d,)), _dense((d,), wide), DENSE
        if len(names["qkv"]) == 1:
            qkv, qkv_bias = _dense((d,), (3, *head)), _flat((3, *head))
        else:
            qkv, qkv_bias = _joined(_dense((d,), head), 1), _joined(_flat(head), 0)
    table = []

    def add(ours: str, theirs: str | Sequence[str], layout: Layout = SAME) -> None:
        theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        table.append(Entry(f"params/{ours}", theirs, layout))

    def norm(ours: str, theirs: str) -> None:
        add(f"{ours}/scale", theirs + scale)
        add(f"{ours}/bias", theirs + bias)

    add("patches/kernel", names["patches"] + kernel, patches)
    add("patches/bias", names["patches"] + bias)
    for token, there in (
        ("cls", model.pool == "cls"),
        ("distillation", model.distillation),
        ("registers", model.registers),
    ):
        if there:
            add(token, names[token])
    if model.position == "learned":
        add("pos_embedding", names["pos_embedding"], _positions(model, naming))
    for i in range(size.depth):
        ours, theirs = f"block{i + 1}", names["block"].format(i)
        norm(f"{ours}/norm1", theirs + names["norm1"])
        add(f"{ours}/attention/qkv/kernel", [theirs + n + kernel for n in names["qkv"]], qkv)
        add(f"{ours}/attention/qkv/bias", [theirs + n + bias for n in names["qkv"]], qkv_bias)
        add(f"{ours}/attention/out/kernel", theirs + names["out"] + kernel, out)
        add(f"{ours}/attention/out/bias", theirs + names["out"] + bias)
        norm(f"{ours}/norm2", theirs + names["norm2"])
        first, second = (theirs + name for name in names[model.mlp])
        add(f"{ours}/mlp/up/kernel", first + kernel, up)
        add(f"{ours}/mlp/up/bias", first + bias, _flat(wide))
        add(f"{ours}/mlp/down/kernel", second + kernel, down)
        add(f"{ours}/mlp/down/bias", second + bias)
        if model.layer_scale:
            for k, name in enumerate(names["layer_scale"], start=1):
                add(f"{ours}/layer_scale{k}/gamma", theirs + name)
    norm("norm", names["norm"])
    return table


def _dense(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Layout:
    """A matrix OI -> [*inputs, *outputs]."""
    oi = (math.prod(outputs), math.prod(inputs))

    def to_ours(tensors: Sequence[np.ndarray]) -> np.ndarray:
        if tensors[0].shape != oi:
            raise ValueError(f"not {oi}")
        return tensors[0].transpose(1, 0).reshape(*inputs, *outputs)

    return Layout(to_ours, lambda leaf: (leaf.reshape(oi[::-1]).transpose(1, 0),))


def _flat(shape: tuple[int, ...]) -> Layout:
    """A vector -> `shape`."""
    return Layout(lambda t: t[0].reshape(shape), lambda leaf: (leaf.reshape(-1),))


def _joined(part: Layout, axis: int) -> Layout:
    """Several tensors of layout `part`, stacked along a new axis."""
    return Layout(
        lambda t: np.stack([part.to_ours([tensor]) for tensor in t], axis),
        lambda leaf: tuple(part.to_theirs(leaf.take(i, axis))[0] for i in range(leaf.shape[axis])),
    )


def _patches(patch: int, axes: tuple[int, ...]) -> Layout:
    """A kernel whose axes in the order `axes` are [p, p, C, D] -> [p * p * C, D]."""
    back = tuple(np.argsort(axes))

    def to_ours(tensors: Sequence[np.ndarray]) -> np.ndarray:
        kernel = tensors[0].transpose(axes)
        if kernel.shape[:2] != (patch, patch):
            raise ValueError(f"not of patches of {patch}")
        return kernel.reshape(-1, kernel.shape[3])

    def to_theirs(leaf: np.ndarray) -> Sequence[np.ndarray]:
        return (leaf.reshape(patch, patch, -1, leaf.shape[1]).transpose(back),)

    return Layout(to_ours, to_theirs)


def _uncoded_rows(model: vit.Model, naming: str) -> int:
    """How many codes of zeros follow those of the class tokens in the foreign tensor.

    timm gives registers a code whenever the class token has one; official weights have neither.
    """
    return model.registers if naming == "timm" and model.coded_tokens else 0


def _positions(model: vit.Model, naming: str) -> Layout:
    coded, zeros = model.coded_tokens, _uncoded_rows(model, naming)
    if not zeros:
        return SAME

    def to_ours(tensors: Sequence[np.ndarray]) -> np.ndarray:
        codes = tensors[0]
        if np.any(codes[:, coded : coded + zeros]):
            raise UserError("position codes of register tokens are not 0, as they are here")
        return np.delete(codes, slice(coded, coded + zeros), axis=1)

    def to_theirs(leaf: np.ndarray) -> Sequence[np.ndarray]:
        return (np.insert(leaf, [coded] * zeros, 0, axis=1),)

    return Layout(to_ours, to_theirs)


def fit_positions(
    source: Mapping[str, np.ndarray], model: vit.Model, naming: str, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The foreign tensors with position codes for images of another size, before `to_ours`.

    The codes must be of a square grid, or of the wanted one. They are resampled as the naming's
    library does it: with antialiasing, but for transformers' and facebook's models without
    registers (facebook's own code enlarges the grid by another 0.1 patch first).

    Args:
      source: foreign tensors by name.
      model: the model that they are for.
      naming: of the source.
      size: height and width of the images, which the patch divides.

    Returns:
      The tensors; of the source without changes if the codes fit, or if there are none.

    Raises:
      UserError: the codes are of another grid.
    """
    name = _names(model, naming)["pos_embedding"]
    if model.position != "learned" or name not in source:
        return dict(source)
    codes, patch = source[name], model.shape()[1]
    prefix = model.coded_tokens + _uncoded_rows(model, naming)
    old = math.isqrt(max(codes.shape[1] - prefix, 0))
    new = (size[0] // patch, size[1] // patch)
    # a grid that cannot be square must be the wanted one
    old_grid = (old, old) if old * old + prefix == codes.shape[1] else new
    antialias = naming not in ("huggingface", "dinov2") or model.registers > 0
    fitted = resample_positions(codes, old_grid, new, prefix, antialias=antialias)
    return {**source, name: fitted}
