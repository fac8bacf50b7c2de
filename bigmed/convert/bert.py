"""BERT: the names of transformers' BertModel.

The pooler and the heads of pretraining are left over on import. Older files, bert-base-uncased's
among them, call the scale and the bias of a LayerNorm gamma and beta: see `plain_names`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.convert.mapping import DENSE, Entry, Layout
from bigmed.errors import UserError
from bigmed.models import bert

NAMINGS = ("huggingface",)
STEM = None  # texts have no channels

# BertConfig's key -> ours
_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_length",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_eps",
}
# A BertConfig's settings of which we have one value, which is also transformers' default.
_FIXED = {
    "hidden_act": "gelu",
    "type_vocab_size": bert.TOKEN_TYPES,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def plain_names(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The foreign tensors with `LayerNorm.weight` and `LayerNorm.bias`, whatever their age."""
    today = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}

    def plain(name: str) -> str:
        for old, new in today.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    return {plain(name): tensor for name, tensor in source.items()}


def entries(model: bert.Model, naming: str) -> list[Entry]:
    """Every leaf of the model beside its foreign tensors, named without a leading 'bert.'."""
    del naming  # there is one
    head_shape = (model.heads, model.width // model.heads)
    table: list[Entry] = []

    def add(ours: str, *theirs: str, **layout: Layout) -> None:
        table.append(Entry(f"params/{ours}", theirs, **layout))

    def norm(ours: str, theirs: str) -> None:
        add(f"{ours}/scale", f"{theirs}.weight")
        add(f"{ours}/bias", f"{theirs}.bias")

    for ours, theirs in (("words", "word"), ("positions", "position"), ("types", "token_type")):
        add(f"embeddings/{ours}/kernel", f"embeddings.{theirs}_embeddings.weight")
    norm("embeddings/norm", "embeddings.LayerNorm")
    for i in range(model.depth):
        ours, theirs = f"layer{i + 1}", f"encoder.layer.{i}"
        qkv = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        out = f"{theirs}.attention.output"
        layout = _qkv_kernel(head_shape)
        add(f"{ours}/attention/qkv/kernel", *(f"{n}.weight" for n in qkv), layout=layout)
        layout = _qkv_bias(head_shape)
        add(f"{ours}/attention/qkv/bias", *(f"{n}.bias" for n in qkv), layout=layout)
        layout = _out_kernel(head_shape)
        add(f"{ours}/attention/out/kernel", f"{out}.dense.weight", layout=layout)
        add(f"{ours}/attention/out/bias", f"{out}.dense.bias")
        norm(f"{ours}/norm1", f"{out}.LayerNorm")
        for part, name in (("up", "intermediate"), ("down", "output")):
            add(f"{ours}/mlp/{part}/kernel", f"{theirs}.{name}.dense.weight", layout=DENSE)
            add(f"{ours}/mlp/{part}/bias", f"{theirs}.{name}.dense.bias")
        norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm")
    return table


def _qkv_kernel(head_shape: tuple[int, int]) -> Layout:
    """Three matrices OI -> [I, 3, heads, head_dim]."""

    def to_ours(tensors: Sequence[np.ndarray]) -> np.ndarray:
        oi = np.stack(tensors)
        return oi.reshape(3, *head_shape, oi.shape[2]).transpose(3, 0, 1, 2)

    return Layout(to_ours, lambda leaf: tuple(leaf.reshape(len(leaf), 3, -1).transpose(1, 2, 0)))


def _qkv_bias(head_shape: tuple[int, int]) -> Layout:
    """Three vectors -> [3, heads, head_dim]."""
    return Layout(
        lambda t: np.stack(t).reshape(3, *head_shape), lambda leaf: tuple(leaf.reshape(3, -1))
    )


def _out_kernel(head_shape: tuple[int, int]) -> Layout:
    """A matrix OI -> [heads, head_dim, O]."""
    return Layout(
        lambda t: t[0].transpose(1, 0).reshape(*head_shape, len(t[0])),
        lambda leaf: (leaf.reshape(-1, leaf.shape[2]).transpose(1, 0),),
    )


def describe(model: bert.Model, naming: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json with which transformers' AutoModel loads the export.

    The pooling has no place in it, nor has our dropout: who fine-tunes there gets BERT's.
    """
    del naming, shapes  # there is one naming, and the model says all the sizes
    sizes = {theirs: getattr(model, ours) for theirs, ours in _SIZES.items()}
    return {"model_type": "bert", "architectures": ["BertModel"], **_FIXED, **sizes}


def from_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` of a transformers config.json; what it does not say is BERT-base's.

    Raises:
      UserError: another architecture, or a BERT of another form than the paper's.
    """
    if config.get("model_type") != "bert":
        raise UserError(f"config.json has model_type='{config.get('model_type')}'; valid: bert")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"BertConfig.{key}={config[key]!r}: valid here: {value!r}")
    sizes = {ours: config[theirs] for theirs, ours in _SIZES.items() if theirs in config}
    bert.Model(**sizes).check()
    return {"name": "bert", **sizes}
