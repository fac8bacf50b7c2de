"""Vision Transformers: the config.json of transformers and timm, and our `config.model`."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bigmed.errors import UserError, did_you_mean
from bigmed.models import vit

CLASSES = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
# What transformers takes for a key that a config.json leaves out.
_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}
_TIMM_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant"}
_TIMM_NAME = re.compile(
    r"(?P<kind>vit|deit|deit3)_(?P<size>tiny|small|base|large|huge|giant)(?P<distilled>_distilled)?"
    r"_patch(?P<patch>\d+)(_reg(?P<registers>\d+))?(?P<dinov2>_dinov2)?(_\d+)?(\..*)?"
)
# timm's arguments that do not change the parts of the network
_TIMM_FORM = {"img_size", "in_chans", "num_classes", "dynamic_img_size", "fc_norm"}


def hf_type(model: vit.Model) -> str:
    """The `model_type` of the transformers model that has all of the model's parts."""
    if model.registers:
        return "dinov2_with_registers"
    if model.layer_scale or model.mlp == "swiglu":
        return "dinov2"
    return "deit" if model.distillation else "vit"


def settings(model: vit.Model) -> dict[str, Any]:
    """The model's `config.model`, without what is as by default or does not change the weights."""
    fields = {f.name: f.default for f in dataclasses.fields(model)}
    for name in ("variant", "scan", "remat", "dtype", "parent", "name"):
        del fields[name]
    changed = {
        k: getattr(model, k) for k, default in fields.items() if getattr(model, k) != default
    }
    return {"name": "vit", "variant": model.variant, **changed}


def describe(
    model: vit.Model, naming: str, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """The config.json under which a library loads the export.

    Args:
      model: what is exported; `entries` has accepted it for this naming.
      naming: for 'timm' timm's, for 'huggingface' transformers'; for others, which read none, our
        own settings.
      shapes: of the leaves, by path: they tell the images' size and channels, which the model does
        not know. Without them, 224 px (518 px for patches of 14 with LayerScale) and 3 channels.

    Raises:
      UserError: the library has no such model, or the images are not square.
    """
    size, patch = model.shape()
    image_size, channels = (518 if patch == 14 and model.layer_scale else 224), 3
    if shapes is not None:
        channels = shapes["params/patches/kernel"][0] // patch**2
    if shapes is not None and model.position == "learned":
        patches = shapes["params/pos_embedding"][1] - model.coded_tokens
        image_size = math.isqrt(patches) * patch
        if math.isqrt(patches) ** 2 != patches:
            raise UserError(
                f"position codes of {patches} patches are not of a square image, which a "
                f"config.json of '{naming}' takes; export a model for square images"
            )
    if naming == "timm":
        return _describe_timm(model, image_size, channels)
    if naming == "huggingface":
        return _describe_hf(model, image_size, channels)
    return {"architecture": "vit", "model": settings(model)}


def _describe_hf(model: vit.Model, image_size: int, channels: int) -> dict[str, Any]:
    size, patch = model.shape()
    kind = hf_type(model)
    config = {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_eps,
        "image_size": image_size,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
    }
    if kind in ("vit", "deit"):
        return {**config, "intermediate_size": size.mlp_dim}
    if size.mlp_dim % size.width:
        raise UserError(
            f"config.model.variant='{model.variant}' has an MLP of {size.mlp_dim}, no multiple of "
            f"its width {size.width}, as in transformers' DINOv2; valid sizes: Ti, S, B, L, H, g2"
        )
    config["mlp_ratio"] = size.mlp_dim // size.width
    config["layerscale_value"] = model.layer_scale
    config["use_swiglu_ffn"] = model.mlp == "swiglu"
    if kind == "dinov2":
        return {**config, "use_mask_token": False}
    return {**config, "num_register_tokens": model.registers}


def _describe_timm(model: vit.Model, image_size: int, channels: int) -> dict[str, Any]:
    name, patch = model.variant.partition("/")[0], model.shape()[1]
    gated = model.mlp == "swiglu"
    timm_size = "giant" if name == "g2" and gated else _TIMM_SIZES.get(name)
    valid = ("Ti", "S", "B") if model.distillation else ("g2",) if gated else tuple(_TIMM_SIZES)
    if timm_size is None or name not in valid:
        raise UserError(
            f"timm has no ViT of config.model.variant='{model.variant}' with mlp='{model.mlp}' "
            f"and distillation={model.distillation}; valid sizes: {', '.join(valid)}"
        )
    if model.norm_eps != 1e-6:
        raise UserError(
            f"config.model.norm_eps={model.norm_eps}: timm's ViT has 1e-06; features would differ"
        )
    args = {
        "img_size": image_size,
        "patch_size": patch,
        "in_chans": channels,
        "init_values": model.layer_scale or None,
    }
    if model.distillation:
        architecture = f"deit_{timm_size}_distilled_patch16_224"
    else:
        named_patch = 14 if gated or name in ("H", "g") else 16
        architecture = f"vit_{timm_size}_patch{named_patch}_{'dinov2' if gated else '224'}"
        args["reg_tokens"] = model.registers
        if model.pool == "gap":
            args |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    args["no_embed_class"] = model.coded_tokens == 0
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.feature_dim,
        "global_pool": "avg" if model.pool == "gap" else "token",
        "model_args": args,
        "pretrained_cfg": {"num_classes": 0},
    }


def from_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` of a config.json of transformers, of timm or of `describe`.

    An `architecture` may also be one of `vit.NAMED`, e.g. 'dinov2_vits14_reg'.

    Raises:
      UserError: another architecture, or one with parts that our ViT does not have.
    """
    if "model_type" in config:
        return _from_hf(config)
    name = str(config.get("architecture"))
    if name == "vit" and "model" in config:
        return dict(config["model"])
    if name in vit.NAMED:
        return dict(vit.NAMED[name])
    return _from_timm(name, config.get("model_args") or {})


def _from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config["model_type"]
    if kind not in CLASSES:
        raise UserError(f"model_type '{kind}': {did_you_mean(kind, CLASSES)}")
    old = kind in ("vit", "deit")
    defaults = {"layer_norm_eps": 1e-12 if old else 1e-6, "patch_size": 16 if old else 14}
    config = {**_DEFAULTS, **defaults, **config}
    for key, value in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if config[key] != value:
            raise UserError(f"{CLASSES[kind]}'s {key}={config[key]}: valid here: {value}")
    width = config["hidden_size"]
    hidden = config["intermediate_size"] if old else int(width * config["mlp_ratio"])
    size = (width, config["num_hidden_layers"], hidden, config["num_attention_heads"])
    variant = next((name for name, s in vit.VARIANTS.items() if s == size), None)
    if variant is None:
        known = "; ".join(f"{name} {tuple(s)}" for name, s in vit.VARIANTS.items())
        raise UserError(
            f"{CLASSES[kind]} of width, depth, MLP and heads {size}: valid here: {known}"
        )
    model = {"name": "vit", "variant": f"{variant}/{config['patch_size']}"}
    if config["layer_norm_eps"] != 1e-6:
        model["norm_eps"] = config["layer_norm_eps"]
    if kind == "deit":
        model["distillation"] = True
    if not old:
        model["layer_scale"] = config["layerscale_value"]
        if config["use_swiglu_ffn"]:
            model["mlp"] = "swiglu"
    if kind == "dinov2_with_registers":
        model["registers"] = config["num_register_tokens"]
    return model


def _from_timm(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    found = _TIMM_NAME.fullmatch(name)
    if not found:
        raise UserError(
            f"architecture '{name}' is no ViT of these weights' families; valid: e.g. "
            "vit_base_patch16_224, deit_small_patch16_224, vit_small_patch14_reg4_dinov2, or one "
            f"of {', '.join(vit.NAMED)}"
        )
    size = next(ours for ours, theirs in _TIMM_SIZES.items() if theirs == found["size"])
    gated = bool(found["dinov2"]) and size == "g"
    args = {
        "patch_size": int(found["patch"]),
        "reg_tokens": int(found["registers"] or 0),
        "init_values": 1e-5 if found["dinov2"] else 1e-6 if found["kind"] == "deit3" else None,
        "no_embed_class": bool(found["registers"]) or found["kind"] == "deit3",
        "class_token": True,
        "global_pool": "token",
        **{key: value for key, value in args.items() if key not in _TIMM_FORM},
    }
    model = {"name": "vit", "variant": f"{'g2' if gated else size}/{args.pop('patch_size')}"}
    pool = (args.pop("class_token"), args.pop("global_pool"))
    if pool not in ((True, "token"), (False, "avg")):
        raise UserError(
            f"timm's class_token={pool[0]} with global_pool='{pool[1]}' is none of our poolings; "
            "valid: True with 'token', False with 'avg'"
        )
    values = {
        "pool": "cls" if pool[0] else "gap",
        "cls_position": not (args.pop("no_embed_class") and pool[0]),
        "distillation": bool(found["distilled"]),
        "registers": args.pop("reg_tokens"),
        "mlp": "swiglu" if gated else "gelu",
        "layer_scale": args.pop("init_values") or 0.0,
    }
    if args:
        raise UserError(
            f"timm's model_args of {', '.join(sorted(args))} are not read here; valid: patch_size, "
            "reg_tokens, init_values, no_embed_class, class_token, global_pool"
        )
    defaults = vit.Model()
    return model | {k: value for k, value in values.items() if value != getattr(defaults, k)}
