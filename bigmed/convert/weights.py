"""Weights of one encoder: in from foreign files, out to foreign folders, and as a folder of ours.

A folder of ours holds `weights.safetensors`, whose tensors are the leaves of the model by path, and
`encoder.json`: the `config.model` section, image size and channels, and where it came from.
"""

import dataclasses
import hashlib
import importlib
import json
import pathlib
import pkgutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmed import tree
from bigmed.convert import mapping, read, tf_checkpoint
from bigmed.errors import UserError, did_you_mean
from bigmed.models.catalogue import build

WEIGHTS, DESCRIPTION = "weights.safetensors", "encoder.json"
# what `encoder.json` and a run's curriculum.json say of an encoder
FORM = ("model", "size", "channels", "normalize", "eval_crop", "antialias", "canvas")


@dataclasses.dataclass(frozen=True)
class Weights:
    """An encoder's weights.

    Attributes:
      model: the `config.model` section, with `name`.
      size: of the images that position codes are for, in pixels.
      channels: of the images, 1 or 3.
      normalize, eval_crop, antialias: see `augment.AugmentConfig`.
      canvas: that images are put on before they are cropped; 0: just large enough.
      leaves: float32 arrays by path, 'params/stem/conv/kernel'.
      left_over: tensors of the source that no leaf took.
      fresh: paths of leaves that the source does not have.
    """

    model: dict[str, Any]
    size: int
    channels: int
    normalize: str
    leaves: dict[str, np.ndarray]
    eval_crop: float = 0.875
    antialias: bool = False
    canvas: int = 0
    left_over: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def families() -> dict[str, Any]:
    """The modules of tables in this package, by the name of the model that they are of."""
    package = importlib.import_module("bigmed.convert")
    found = {
        m.name: importlib.import_module(f"bigmed.convert.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
    }
    return {name: module for name, module in found.items() if hasattr(module, "NAMINGS")}


def readable(family: Any) -> tuple[str, ...]:
    """The namings in which weights of a family can be imported."""
    return (*family.NAMINGS, *getattr(family, "READ_ONLY", ()))


def family_of(model: Mapping[str, Any], naming: str, *, to_write: bool = False) -> Any:
    """The module of tables of a model's family.

    Args:
      model: a `config.model` section.
      naming: of foreign weights.
      to_write: that will be exported, not imported.

    Raises:
      UserError: the family has no tables, or does not know the naming.
    """
    known = families()
    if model["name"] not in known:
        raise UserError(
            f"no weights of '{model['name']}' can be converted; valid: {', '.join(known)}"
        )
    family = known[model["name"]]
    namings = family.NAMINGS if to_write else readable(family)
    if naming not in namings:
        valid = (*namings, "onnx") if to_write else namings  # which `convert.onnx` writes
        raise UserError(f"naming '{naming}' of a {model['name']}: {did_you_mean(naming, valid)}")
    return family


def abstract_leaves(module: Any, size: int, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the leaves by path; of a text tower, for tokens of whatever length."""
    if hasattr(module, "vocab_size"):
        inputs = [jax.ShapeDtypeStruct((1, 2), jnp.int32)] * 2
    else:
        inputs = [jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)]
    return tree.flatten(
        jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, train=False), *inputs)
    )


def import_weights(
    source: pathlib.Path,
    naming: str,
    model: Mapping[str, Any] | None = None,
    *,
    size: int = 224,
    channels: int = 3,
    normalize: str | None = "none",
    prefix: str | None = None,
    allow_pickle: bool = False,
) -> Weights:
    """Foreign weights as the leaves of a model.

    Args:
      source: see `read.read_tensors`.
      naming: one of the family's `readable` ones.
      model: a `config.model` section; None: as the config.json beside the weights says.
      size: of the images, pixels; position codes are resampled to it.
      channels: of the images, 1 or 3; the stem is summed or spread over them.
      normalize: of the pixels that the weights were trained on; kept beside them. None will do for
        weights of a text tower alone.
      prefix: see `read.without_prefix`.
      allow_pickle: see `read.read_tensors`.

    Raises:
      UserError: what `read` and `mapping.to_ours` raise; a model that cannot be told.
    """
    if size < 1 or channels not in (1, 3):
        raise UserError(f"size={size}, channels={channels}: valid: 1 and more; 1 or 3")
    known = sorted({name for family in families().values() for name in readable(family)})
    if naming not in known:
        raise UserError(f"naming '{naming}': {did_you_mean(naming, known)}")
    model = dict(model) if model else _described(source, naming)
    family = family_of(model, naming)
    if normalize is None and family.STEM:
        raise UserError(
            f"normalize is not given, for which pixels a {model['name']} was trained; "
            "valid: none, imagenet, half"
        )
    normalize = normalize or "none"
    if normalize != "none" and getattr(family, "PIXELS", mapping.PIXELS) != mapping.PIXELS:
        raise UserError(
            f"normalize='{normalize}': a {model['name']} scales pixels by itself; valid: none"
        )
    module = build(model)
    _check_heads(source, naming, module)
    entries = family.entries(module, naming)
    tensors = read.read_tensors(source, allow_pickle=allow_pickle)
    wanted = {name for entry in entries for name in entry.theirs}
    if hasattr(family, "plain_names"):
        tensors = family.plain_names(tensors)
    tensors, outside = read.without_prefix(tensors, wanted, prefix)
    if hasattr(family, "fit_positions"):
        tensors = family.fit_positions(tensors, module, naming, (size, size))
    shapes = {
        c: {path: leaf.shape for path, leaf in abstract_leaves(module, size, c).items()}
        for c in (1, 3)
    }
    stem = next((entry for entry in entries if entry.ours == family.STEM), None)
    in_source = _stem_channels(stem, tensors, shapes)
    leaves, left_over, fresh = mapping.to_ours(tensors, entries, shapes[in_source])
    if stem and stem.ours in leaves and leaves[stem.ours].shape != shapes[channels][stem.ours]:
        leaves[stem.ours] = mapping.refold_stem(leaves[stem.ours], in_source, channels)
    return Weights(
        model, size, channels, normalize, leaves,
        left_over=tuple(sorted([*left_over, *outside])), fresh=tuple(fresh),
    )  # fmt: skip


def _described(source: pathlib.Path, naming: str) -> dict[str, Any]:
    """The model of the config.json beside foreign weights, by the first family that knows it."""
    source = pathlib.Path(source)
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file():
        raise UserError(f"there is no {path} to tell the model by; name it with --model")
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} describes no model: {error}") from None
    reasons = []
    for name, family in families().items():
        if naming in family.NAMINGS:
            try:
                return family.from_description(config)
            except (UserError, KeyError, TypeError, ValueError) as error:
                reasons.append(f"{name}: {error}")
    kind = config.get("model_type") or config.get("architecture")
    raise UserError(
        f"{path} describes '{kind}', which no family reads; {'; '.join(reasons)[:300]}"
    )


def _check_heads(source: pathlib.Path, naming: str, module: Any) -> None:
    """Refuses another number of attention heads than a config.json says: no shape tells of it."""
    try:
        there = getattr(build(_described(source, naming)), "heads", None)
    except UserError:  # none, or one that says nothing to us
        return
    here = getattr(module, "heads", there)
    if there not in (None, here):
        raise UserError(
            f"{source}: its config.json says {there} attention heads, the model given has {here}"
        )


def _stem_channels(
    stem: mapping.Entry | None,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
) -> int:
    """How many channels the source's stem takes: 1 if it fits that, else 3.

    `shapes` has the shape of every leaf by path, for each number of channels.
    """
    if stem is None or not all(name in tensors for name in stem.theirs):
        return 3
    try:
        shape = stem.layout.to_ours([tensors[name] for name in stem.theirs]).shape
    except (ValueError, IndexError):
        return 3
    three, one = (shapes[channels][stem.ours] for channels in (3, 1))
    return 1 if shape == one and shape != three else 3


def save(weights: Weights, folder: pathlib.Path, origin: Mapping[str, Any]) -> None:
    """Writes a folder of ours; whole or not at all.

    Args:
      weights: without fresh leaves.
      folder: must not exist, or be empty.
      origin: JSON, kept under 'origin'.

    Raises:
      UserError: the folder is not empty.
    """
    described = {
        **{key: getattr(weights, key) for key in FORM},
        "origin": dict(origin),
    }
    write_folder(folder, weights.leaves, WEIGHTS, {DESCRIPTION: described})


def write_folder(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    tensors_name: str,
    files: Mapping[str, Any],
) -> None:
    """A folder of a file of tensors, if any, and others (str, bytes, JSON); whole or not at all."""
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder).absolute()
    check_out(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = pathlib.Path(scratch) / "made"
        made.mkdir()
        # safetensors writes the memory as it lies, whatever the strides
        contiguous = {name: np.ascontiguousarray(t) for name, t in tensors.items()}
        if tensors_name.endswith(".npz"):
            np.savez(made / tensors_name, allow_pickle=False, **contiguous)
        elif tensors:
            save_file(contiguous, made / tensors_name, metadata={"format": "pt"})
        for name, content in files.items():
            if not isinstance(content, (str, bytes)):
                content = json.dumps(content, indent=2) + "\n"
            data = content if isinstance(content, bytes) else content.encode()
            (made / name).write_bytes(data)
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)


def check_out(folder: pathlib.Path) -> None:
    """Raises `UserError` unless the folder can be made: absent, or there and empty."""
    folder = pathlib.Path(folder).absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; give another folder")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; give a folder")


def load(folder: pathlib.Path) -> Weights:
    """Reads a folder of ours.

    Raises:
      UserError: it is none, or does not fit the model that it describes.
    """
    path = pathlib.Path(folder) / DESCRIPTION
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        form = {key: described[key] for key in FORM}
        module = build(form["model"])
        shapes = abstract_leaves(module, form["size"], form["channels"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} is no folder of tools/import_weights.py ({reason})") from None
    leaves = read.read_tensors(path.with_name(WEIGHTS))
    for name in sorted(shapes.keys() | leaves.keys()):
        here, there = shapes.get(name), leaves.get(name)
        if here is None or there is None or here.shape != there.shape:
            ours, file = (x if x is None else tree.describe_shape(x) for x in (here, there))
            raise UserError(f"{folder}: '{name}' is {ours} in the model and {file} in the file")
    return Weights(**form, leaves=leaves)


def check_same_model(
    section: Mapping[str, Any],
    module: Any,
    where: Any,
    key: str = "model",
    free: Sequence[str] = (),
) -> None:
    """Raises `UserError` unless a section describes this module, which `config.<key>` made.

    Shapes alone do not tell: a ResNet's pooling has none. The attributes in `free` may differ.
    """
    other = build(section)
    if type(other) is not type(module):
        raise UserError(f"{where} is of another model: {section['name']}")
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name", "dtype", "remat", "scan"):
            continue  # which change no number
        if field.name.startswith("train_after") or field.name in free:
            continue
        here, there = getattr(module, field.name), getattr(other, field.name)
        if here != there:
            raise UserError(
                f"{where} is of a model with {field.name}={there!r} but "
                f"config.{key}.{field.name} is {here!r}"
            )


def sha256(path: pathlib.Path) -> str:
    """Of a file, of a folder's files in order of their names, or of a TensorFlow checkpoint's."""
    digest = hashlib.sha256()
    prefix = tf_checkpoint.prefix_of(path)
    if prefix is not None:
        files = tf_checkpoint.files(prefix)
    else:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
