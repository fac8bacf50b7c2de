"""Reading foreign files of tensors: safetensors, npz, TensorFlow's; pickles only on request.

A pickle (.pth, .pt, .bin, .ckpt) can run code when it is read. It is refused unless the caller asks
for it, and is then read by PyTorch with `weights_only=True` in a process of its own.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping

import numpy as np

from bigmed.convert import tf_checkpoint
from bigmed.errors import UserError, did_you_mean

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_FILES = (
    "model.safetensors", "model.safetensors.index.json", "weights.safetensors", "pytorch_model.bin"
)  # fmt: skip


def read_tensors(path: pathlib.Path, *, allow_pickle: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of a folder of a known layout, float16 and bfloat16 as float32.

    Args:
      path: .safetensors, .npz, a pickle; a folder with model.safetensors (or its index); or what
        `tf_checkpoint.prefix_of` takes.
      allow_pickle: read a pickle, in a process of its own.

    Raises:
      UserError: no such file, one that is damaged or not finite, a missing shard, or a pickle that
        was not asked for.
    """
    path = pathlib.Path(path)
    path = next((path / name for name in _FILES if (path / name).is_file()), path)
    prefix = tf_checkpoint.prefix_of(path)
    if prefix is None and path.is_dir():
        valid = ", ".join((*_FILES, "variables/variables.index"))
        raise UserError(f"{path} holds none of {valid}")
    if prefix is None and not path.is_file():
        raise UserError(f"no file {path}")
    if prefix is not None:
        variables = tf_checkpoint.read_variables(prefix)
        tensors = {name: _as_float32(variable) for name, variable in variables.items()}
    elif path.name.endswith(".index.json"):
        tensors = _read_shards(path)
    elif path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix == ".npz":
        tensors = _read_npz(path)
    elif path.suffix in PICKLES:
        if not allow_pickle:
            raise UserError(
                f"{path} is a pickle, which can run code when it is read; get the weights as "
                ".safetensors, or, if you trust it, ask with --allow_pickle "
                "(init_from.allow_pickle=True)"
            )
        tensors = _read_pickle(path)
    else:
        raise UserError(f"{path}: {did_you_mean(path.suffix, ('.safetensors', '.npz', *PICKLES))}")
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise UserError(f"{path}: '{name}' holds values that are not finite")
    return tensors


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file  # knows bfloat16, as NumPy alone does not

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not read as safetensors: {_one_line(error)}") from error
    return {name: _as_float32(np.asarray(tensor)) for name, tensor in tensors.items()}


def _as_float32(tensor: np.ndarray) -> np.ndarray:
    half = tensor.dtype.itemsize == 2 and tensor.dtype.kind not in "iub"
    return tensor.astype(np.float32) if half else tensor


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(name) for name in files.values()})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of shards: {_one_line(error)}") from error
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise UserError(f"{index} names a shard outside its folder: '{name}'")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names the shard {name}, which is missing")
        tensors |= _read_safetensors(index.parent / name)
    absent = sorted(files.keys() - tensors.keys())
    if absent:
        raise UserError(f"{index}: '{absent[0]}' is not in its shard {files[absent[0]]}")
    return tensors


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _as_float32(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not read as npz: {_one_line(error)}") from error


# What a program's settings are pickled as, beside its weights, is read as an object that keeps
# nothing and does nothing.
_UNPICKLE = """
import sys
import torch
from safetensors.torch import save_file

class Namespace:
    def __init__(self, *args, **kwargs):
        pass
    def __setstate__(self, state):
        pass

Namespace.__module__ = "argparse"
torch.serialization.add_safe_globals([Namespace])

def tensors(value, prefix=""):
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{prefix}.{key}" if prefix else str(key))

loaded = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
save_file({k: v.detach().clone().contiguous() for k, v in tensors(loaded)}, sys.argv[2])
"""


def _read_pickle(path: pathlib.Path) -> dict[str, np.ndarray]:
    """In another process, which knows PyTorch; nested dictionaries become dotted names."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "tensors.safetensors"
        done = subprocess.run(
            [sys.executable, "-I", "-c", _UNPICKLE, str(path), str(out)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not out.is_file():
            said = done.stderr.strip()
            if "No module named 'torch'" in said:
                raise UserError(f"reading {path} needs PyTorch: pip install torch")
            reason = next((x for x in said.splitlines() if "Error" in x), "no reason given")
            raise UserError(f"{path} is not a file of weights alone: {reason[:200]}")
        return _read_safetensors(out)


def without_prefix(
    tensors: Mapping[str, np.ndarray], wanted: set[str], prefix: str | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors below the nest that holds the model, and the names of all others.

    A checkpoint may hold the encoder as 'state_dict.module.encoder_q.conv1.weight'. The nest is the
    prefix under which most of the wanted names stand.

    Args:
      tensors: by name.
      wanted: the names of the model's tensors.
      prefix: the nest, where it is known, with its last dot or without; '' for none.

    Returns:
      (tensors below the nest by their names there, whole names of the others).

    Raises:
      UserError: several nests fit equally well, or none does.
    """
    if prefix is None:
        prefix = _find_prefix(tensors, wanted)
    elif prefix:
        prefix = f"{prefix.removesuffix('.')}."
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return inside, [name for name in tensors if not name.startswith(prefix)]


def _find_prefix(tensors: Mapping[str, np.ndarray], wanted: set[str]) -> str:
    counts: dict[str, int] = {}
    for name in tensors:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
    if not counts:
        shown = ", ".join(f"'{name}'" for name in sorted(tensors)[:3])
        raise UserError(
            f"none of the model's tensors is in the file, which holds {shown} ...; "
            "is it of this model, and in the naming that --from (init_from.naming) says?"
        )
    most = max(counts.values())
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    if len(best) > 1:
        raise UserError(
            f"the file holds {len(best)} copies of the model, below "
            f"{', '.join(repr(prefix) for prefix in best)}; choose one with --prefix "
            "(init_from.prefix)"
        )
    return best[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
