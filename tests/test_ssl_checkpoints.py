"""ResNets as the PyTorch libraries of self-supervision save them: solo-learn, lightly, C2L."""

import argparse

import numpy as np
import parity
import pytest
from safetensors.numpy import save_file
from test_convert import RESNET18, torch_resnet
from test_tools import tool

from bigmed.convert import mapping, resnet, weights
from bigmed.errors import UserError
from bigmed.models.catalogue import build

torch = pytest.importorskip("torch")

LIGHTNING = {"epoch": 9, "optimizer_states": [{"state": {}}], "callbacks": {"c": {"best": 1.0}}}


@pytest.fixture(scope="module")
def online():
    return torch_resnet(18)


@pytest.fixture(scope="module")
def averaged():
    return parity.randomise(torch_resnet(18), seed=1)


def below(nest, state):
    return {f"{nest}.{name}": tensor for name, tensor in state.items()}


def without_classifier(module):
    """The state of torchvision's network, its classifier the identity."""
    return {name: t for name, t in module.state_dict().items() if not name.startswith("fc.")}


def sequence(module):
    """The state of the sequence of the network's parts but the last, the classifier."""
    parts = [module.conv1, module.bn1, torch.nn.ReLU(), module.maxpool]
    parts += [module.layer1, module.layer2, module.layer3, module.layer4]
    return torch.nn.Sequential(*parts, torch.nn.AdaptiveAvgPool2d(1)).state_dict()


def read(path, **form):
    return weights.import_weights(
        path, "torchvision", RESNET18, size=64, allow_pickle=True, **form
    )


def assert_leaves_of(found, module):
    """Every leaf is the module's, bit for bit."""
    model = build(RESNET18)
    shapes = weights.abstract_leaves(model, 64, 3)
    expected, _, _ = mapping.to_ours(
        parity.numpy_state(module),
        resnet.entries(model, "torchvision"),
        {name: leaf.shape for name, leaf in shapes.items()},
    )
    assert not found.fresh and found.leaves.keys() == expected.keys() == shapes.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found.leaves[name], leaf, err_msg=name)


def left_over(found):
    return {name for name in found.left_over if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("nest", ["backbone", "encoder"])  # today, and until 2021
def test_a_checkpoint_of_solo_learn(tmp_path, online, nest):
    state = {
        **below(nest, without_classifier(online)),
        "projector.0.weight": torch.ones(4, 512),
        "classifier.weight": torch.ones(10, 512),
    }
    torch.save({"state_dict": state, **LIGHTNING}, tmp_path / "simclr.ckpt")
    found = read(tmp_path / "simclr.ckpt")
    assert_leaves_of(found, online)
    heads = {"state_dict.projector.0.weight", "state_dict.classifier.weight"}
    assert left_over(found) == heads


def test_a_checkpoint_of_lightly(tmp_path, online):
    state = {
        **below("backbone", sequence(online)),
        "projection_head.layers.0.weight": torch.ones(4, 512),
        "projection_head.layers.1.weight": torch.ones(4),
    }
    assert "backbone.0.weight" in state and "backbone.7.1.bn2.running_var" in state
    torch.save({"state_dict": state, **LIGHTNING}, tmp_path / "simclr.ckpt")
    found = read(tmp_path / "simclr.ckpt")
    assert_leaves_of(found, online)
    heads = {f"state_dict.projection_head.layers.{i}.weight" for i in (0, 1)}
    assert left_over(found) == heads


def test_a_bare_sequence(tmp_path, online):
    save_file({n: t.numpy() for n, t in sequence(online).items()}, tmp_path / "w.safetensors")
    assert_leaves_of(read(tmp_path / "w.safetensors"), online)


@pytest.mark.parametrize(
    ("one", "other", "layout"),
    [
        ("backbone", "momentum_backbone", without_classifier),  # solo-learn
        ("backbone", "backbone_momentum", sequence),  # lightly
        ("student_backbone", "teacher_backbone", sequence),
        ("backbone", "key_backbone", without_classifier),
    ],
)
def test_two_copies_are_told_apart_by_their_prefix(tmp_path, online, averaged, one, other, layout):
    state = {**below(one, layout(online)), **below(other, layout(averaged))}
    path = tmp_path / "both.safetensors"
    save_file({f"state_dict.{n}": t.numpy() for n, t in state.items()}, path)
    with pytest.raises(UserError, match=rf"2 copies .*'state_dict\.{other}\.'.*--prefix"):
        read(path)
    assert_leaves_of(read(path, prefix=f"state_dict.{one}."), online)
    assert_leaves_of(read(path, prefix=f"state_dict.{other}."), averaged)


def test_the_checkpoint_of_c2l_with_its_settings_and_without_its_head(tmp_path, online):
    fc = {"fc.weight": torch.ones(128, 512), "fc.bias": torch.ones(128)}
    parts = {
        "opt": argparse.Namespace(learning_rate=0.03, gpu=[0, 1]),
        "model": below("encoder.module", without_classifier(online) | fc),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        "epoch": 240,
    }
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save(parts, path)
    found = read(path)
    assert_leaves_of(found, online)
    slot = "optimizer.state.0.momentum_buffer"
    assert left_over(found) == {"fc.weight", "fc.bias", slot}

    out = tmp_path / "out"
    done = tool("import_weights", "--from=torchvision", f"--src={path}", "--model=resnet18",
                "--normalize=imagenet", "--allow_pickle", f"--out={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    assert "'fc.weight'" in said and slot in said and "20 of '....num_batches_tracked'" in said


class Settings:
    """Stands for a class of which nothing is known."""


def test_settings_of_another_kind_are_refused(tmp_path, online):
    path = tmp_path / "w.pth"
    torch.save({"opt": Settings(), "model": without_classifier(online)}, path)
    with pytest.raises(UserError, match="not a file of weights alone"):
        read(path)
