"""ONNX graphs of encoders: the same features at any size of batch, or no folder at all."""

import dataclasses
import json
import sys

import numpy as np
import parity
import pytest
from test_init_from import foreign_weights, start
from test_tools import tool

from bigmed.convert import export, onnx, weights
from bigmed.convert.encoder import Encoder
from bigmed.errors import UserError
from bigmed.models import bit
from bigmed.models.catalogue import build

pytest.importorskip("onnxscript", reason="onnxscript is in the extra 'onnx'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")
pytest.importorskip("torch", reason="torch is in the extra 'onnx'")


def features_of(folder, images):
    """As a user of the folder has it: by its config.json and graph alone."""
    config = json.loads((folder / "config.json").read_text())
    mean, std = np.float32(config["mean"]), np.float32(config["std"])
    pixels = (images.astype(np.float32) / 255 - mean) / std
    graph = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert graph.get_inputs()[0].shape[1:] == config["input_size"]
    return graph.run(None, {"pixels": pixels.transpose(0, 3, 1, 2)})[0]


def features_of_ours(given, images):
    """Of images of the network's own size, of which nothing is cut off."""
    return Encoder(dataclasses.replace(given, eval_crop=1.0))(images)


def test_a_run_is_exported_and_its_graph_gives_the_same_features(tmp_path):
    run, out = tmp_path / "run", tmp_path / "onnx"
    start(run)
    done = tool("export_weights", f"--workdir={run}", "--to=onnx", f"--out={out}")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()
    assert len(last) == 1 and float(last[0].rpartition(": ")[2]) < 1e-4
    assert "LOAD REPORT" not in done.stderr and "Warning" not in done.stderr
    graph = (out / "model.onnx").read_bytes()
    assert sys.prefix.encode() not in graph and b".py" not in graph  # paths of this machine
    images = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 1), np.uint8)
    mine = features_of_ours(export.from_run(run)[0], images)
    np.testing.assert_allclose(features_of(out, images), mine, rtol=0, atol=1e-4)
    assert np.abs(mine[0] - mine[1]).max() > 1e-2


@pytest.mark.parametrize(
    "section",
    [
        {"name": "resnet", "depth": 18, "stem": "torchvision"},
        {"name": "bit", "depth": 14, "width": 1},
        {"name": "densenet", "depth": 121},
    ],
    ids=lambda section: section["name"],
)
def test_a_network_of_grey_images(tmp_path, monkeypatch, section):
    monkeypatch.setitem(bit.VARIANTS, 14, (1, 1, 1, 1))  # quick to trace
    if section["name"] == "densenet":
        pytest.importorskip("timm", reason="of transformers and timm, timm alone has a DenseNet")
    leaves = parity.random_leaves(build(section), 64, 1)
    given = weights.Weights(section, 64, 1, "none", leaves)
    assert onnx.export(given, tmp_path / "out", "card") < 1e-4
    images = np.random.default_rng(3).integers(0, 256, (4, 64, 64, 1), np.uint8)
    mine = features_of_ours(given, images)
    np.testing.assert_allclose(features_of(tmp_path / "out", images), mine, rtol=0, atol=1e-4)
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    given, out = foreign_weights(0, size=32, channels=1), tmp_path / "out"
    load = onnx._load_transformers

    def scaled(folder, weights):
        network, features, channels = load(folder, weights)
        return network, lambda network, pixels: 1.01 * features(network, pixels), channels

    monkeypatch.setattr(onnx, "_load_transformers", scaled)
    with pytest.raises(UserError, match="differ from ours by .*nothing is written"):
        onnx.export(given, out, "")
    assert not out.exists()


def test_a_network_that_no_library_has_and_a_large_one_are_one_line(tmp_path, monkeypatch):
    given = foreign_weights(0, {"name": "resnet", "depth": 18}, 32, 1)
    with pytest.raises(UserError, match="is none of PyTorch's") as refused:
        onnx.export(given, tmp_path / "out", "")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(onnx, "_LIMIT", 1000)
    with pytest.raises(UserError, match=r"bytes; valid: below 1,000"):
        onnx.export(given, tmp_path / "out", "")
    assert not list(tmp_path.iterdir())
