"""The encoder of a run as an ONNX graph: written by torch.onnx, checked by onnxruntime.

The network is built in transformers, or in timm where transformers does not have it, from the
export for that library. The graph takes `pixels` float32 [batch, C, S, S] and gives `features`
float32 [batch, D], for batches of any size.
"""

import contextlib
import dataclasses
import io
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bigmed.convert import export as libraries
from bigmed.convert import weights as ours
from bigmed.convert.encoder import Encoder
from bigmed.errors import UserError

GRAPH = "model.onnx"
TOLERANCE = 1e-4
_LIMIT = 2**31  # bytes that one file of the format holds
_BATCHES = (1, 3)  # the graph is traced with two images


def export(weights: ours.Weights, folder: pathlib.Path, card: str) -> float:
    """Writes the graph, `config.json` (what pixels it takes) and the model card; checked first.

    Args:
      weights: of the encoder.
      folder: must not exist, or be empty.
      card: README.md.

    Returns:
      The greatest difference between the graph's features and ours, of random images.

    Raises:
      UserError: a package is missing, neither library has the network, it is too large, or the
        features differ by more than 1e-4; then nothing is written.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"onnx needs '{error.name}': pip install 'bigmed[onnx]'") from None
    size = 4 * sum(leaf.size for leaf in weights.leaves.values())
    if size >= _LIMIT:
        raise UserError(f"onnx: the encoder has {size:,} bytes; valid: below {_LIMIT:,}")
    with tempfile.TemporaryDirectory() as scratch:
        module, channels = _in_torch(weights, pathlib.Path(scratch))
        graph = _trace(module, channels, weights.size, pathlib.Path(scratch) / GRAPH)
    graph = _without_origins(graph)
    described = libraries.pixels(weights, channels)
    difference = _difference(graph, weights, described)
    if not difference <= TOLERANCE:
        raise UserError(
            f"onnx: the graph's features differ from ours by {difference:.1e}; valid: up to "
            f"{TOLERANCE:g}; nothing is written"
        )
    ours.write_folder(folder, {}, "", {"README.md": card, "config.json": described, GRAPH: graph})
    return difference


def _in_torch(weights: ours.Weights, scratch: pathlib.Path) -> tuple[Any, int]:
    """The encoder as a torch module of pixels, and how many channels it takes."""
    import torch

    refused: list[UserError] = []
    for naming in ("huggingface", "timm"):
        folder = scratch / naming
        try:
            libraries.export(weights, naming, folder, "")
        except UserError as error:
            refused.append(error)
            continue
        load = {"huggingface": _load_transformers, "timm": _load_timm}[naming]

        class Features(torch.nn.Module):
            def __init__(self, network: Any, features: Any):
                super().__init__()
                self.network, self.features = network, features

            def forward(self, pixels: Any) -> Any:
                return self.features(self.network, pixels)

        network, features, channels = load(folder, weights)
        return Features(network, features).eval(), channels
    raise UserError(f"onnx: {refused[0]}; {refused[1]}")


def _load_transformers(folder: pathlib.Path, weights: ours.Weights) -> tuple[Any, Any, int]:
    import transformers

    del weights
    with _quiet():  # it tells of the pooling layer that the export does not need
        network = transformers.AutoModel.from_pretrained(folder).eval()

    def features(network: Any, pixels: Any) -> Any:
        found = network(pixels)
        if found.last_hidden_state.ndim == 3:  # tokens, of which the first is the class token
            return found.last_hidden_state[:, 0]
        return found.pooler_output.flatten(1)

    return network, features, network.config.num_channels


def _load_timm(folder: pathlib.Path, weights: ours.Weights) -> tuple[Any, Any, int]:
    try:
        import timm
    except (ImportError, RuntimeError):  # the latter of a torchvision for another torch
        raise UserError(
            f"onnx: of transformers and timm, timm alone has this {weights.model['name']}; "
            "pip install timm, and a torchvision for this torch"
        ) from None
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def features(network: Any, pixels: Any) -> Any:
        if weights.model.get("distillation"):
            return network.forward_features(pixels)[:, 0]
        return network(pixels)

    return network, features, network.pretrained_cfg["input_size"][0]


def _trace(module: Any, channels: int, size: int, path: pathlib.Path) -> bytes:
    import torch

    try:
        with _quiet(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            torch.onnx.export(
                module,
                (torch.rand(2, channels, size, size),),
                str(path),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["pixels"],
                output_names=["features"],
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"onnx: torch.onnx cannot write this network: {said}") from None
    return path.read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and progress of torch.onnx and transformers."""
    import transformers

    said = transformers.utils.logging
    level, bar = said.get_verbosity(), said.is_progress_bar_enabled()
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    said.set_verbosity_error()
    said.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)
        said.set_verbosity(level)
        if bar:
            said.enable_progress_bar()


def _without_origins(graph: bytes) -> bytes:
    """The graph without what torch.onnx notes beside each node: paths and lines of this machine."""
    import onnx

    def clear(message: Any) -> None:
        for field, value in message.ListFields():
            if field.name in ("metadata_props", "doc_string"):
                message.ClearField(field.name)
            elif field.message_type:
                for part in value if field.is_repeated else [value]:
                    clear(part)

    model = onnx.load_model_from_string(graph)
    clear(model)
    return model.SerializeToString()


def _difference(graph: bytes, weights: ours.Weights, described: dict[str, Any]) -> float:
    """The greatest one, of features of random images as the graph's user would make them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    encoder = Encoder(dataclasses.replace(weights, eval_crop=1.0))
    shape = (max(_BATCHES), weights.size, weights.size, weights.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with jax.default_matmul_precision("highest"):  # as onnxruntime has it, on any device
        mine = encoder(images)
    mean, deviation = (np.float32(described[key]) for key in ("mean", "std"))
    pixels = ((images.astype(np.float32) / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    differences = []
    for count in _BATCHES:
        (found,) = session.run(["features"], {"pixels": pixels[:count]})
        if found.shape != mine[:count].shape:
            raise UserError(f"onnx: the graph's features are {found.shape}, ours {mine.shape}")
        differences.append(float(np.abs(found - mine[:count]).max()))
    return max(differences)
