"""Weights in and out: what is read and refused, ResNets against PyTorch, the tools end to end."""

import json
import os
import pickle
import shutil
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import parity
import PIL.Image
import pytest
from safetensors.numpy import save_file
from test_tools import tool

from bigmed import augment, curriculum, networks, tree
from bigmed.convert import export, onnx, read, resnet, weights
from bigmed.convert.encoder import Encoder
from bigmed.errors import UserError
from bigmed.models import resnet as resnet_module
from bigmed.models.catalogue import build, named_models
from configs import common, quickstart

RESNET18 = {"name": "resnet", "depth": 18, "stem": "torchvision"}
VIT = {"name": "vit", "variant": "mu/8"}


def torch_resnet(depth, channels=3):
    """torchvision's ResNet without its classifier, written anew; its names are the published."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, c, stride, expansion):
            super().__init__()
            shapes = [(inputs, c, 3, stride), (c, c, 3, 1)]
            if expansion > 1:
                shapes = [(inputs, c, 1, 1), (c, c, 3, stride), (c, expansion * c, 1, 1)]
            for k, (i, o, size, s) in enumerate(shapes, start=1):
                setattr(self, f"conv{k}", nn.Conv2d(i, o, size, s, size // 2, bias=False))
                setattr(self, f"bn{k}", nn.BatchNorm2d(o))
            self.count, self.downsample = len(shapes), nn.Identity()
            if stride > 1 or inputs != expansion * c:
                project = nn.Conv2d(inputs, expansion * c, 1, stride, bias=False)
                self.downsample = nn.Sequential(project, nn.BatchNorm2d(expansion * c))

        def forward(self, x):
            y = x
            for k in range(1, self.count + 1):
                y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
                y = y.relu() if k < self.count else y
            return (y + self.downsample(x)).relu()

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            blocks, bottleneck = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
            expansion, inputs = (4 if bottleneck else 1), 64
            self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
            self.bn1, self.maxpool = nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
            for stage, count in enumerate(blocks, start=1):
                layers = []
                for j in range(count):
                    stride = 2 if stage > 1 and j == 0 else 1
                    layers.append(Block(inputs, 32 * 2**stage, stride, expansion))
                    inputs = 32 * 2**stage * expansion
                setattr(self, f"layer{stage}", nn.Sequential(*layers))
            self.fc = nn.Linear(inputs, 10)

        def forward(self, x):
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            return x.mean((2, 3))

    return damped(parity.randomise(ResNet()))


def damped(module):
    """The last norm of each block scaled down, so that activations stay of order one."""
    for name, tensor in module.state_dict().items():
        if name.endswith(("bn2.weight", "bn3.weight", "layer.2.normalization.weight")):
            tensor.mul_(0.3)
    return module


def images(size, channels=3, batch=2):
    return np.random.default_rng(0).random((batch, size, size, channels), np.float32)


def assert_same_features_and_gradient(model, variables, module, x):
    """Features, and the gradient by the images of a weighted sum of them, to 1e-4."""
    import torch

    def loss(x):
        features = model.apply(variables, x, train=False)[0]
        return jnp.sum(features * jnp.cos(jnp.arange(features.shape[-1]))[None]), features

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(x))
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = module(theirs)
    (expected * torch.cos(torch.arange(expected.shape[-1]))).sum().backward()
    assert np.abs(found).max() > 0.1
    np.testing.assert_allclose(found, expected.detach(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(gradient, theirs.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("depth", "size"), [(18, 75), (50, 64)])
def test_resnet_equals_torchvisions(depth, size):
    module = torch_resnet(depth)
    model = build({**RESNET18, "depth": depth})
    spec = parity.image_spec(64)
    state = parity.numpy_state(module)
    variables, left_over, fresh = parity.load(resnet, model, "torchvision", state, spec)
    assert not fresh
    assert {n for n in left_over if "num_batches" not in n} == {"fc.weight", "fc.bias"}
    assert_same_features_and_gradient(model, variables, module, images(size))


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_equals_that_of_transformers(depth, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build({**RESNET18, "depth": depth})
    shapes = {k: v.shape for k, v in parity.abstract_leaves(model, parity.image_spec(64)).items()}
    config = transformers.ResNetConfig(**resnet.describe(model, "huggingface", shapes))
    module = damped(parity.randomise(transformers.ResNetModel(config)))
    state = parity.numpy_state(module)
    variables, _, fresh = parity.load(resnet, model, "huggingface", state, parity.image_spec(64))
    assert not fresh
    assert_same_features_and_gradient(
        model, variables, lambda x: module(x).pooler_output[:, :, 0, 0], images(64)
    )


def test_a_grey_stem_gives_what_repeated_channels_gave(tmp_path):
    """3 -> 1 -> 3 channels, through the files."""
    state = parity.numpy_state(torch_resnet(18))
    save_file(state, tmp_path / "three.safetensors")
    three, one = (
        weights.import_weights(tmp_path / "three.safetensors", "torchvision", RESNET18,
                               size=64, channels=channels)
        for channels in (3, 1)
    )  # fmt: skip
    grey = images(64, 1)
    model = build(RESNET18)
    found = [
        model.apply(tree.unflatten(w.leaves), jnp.repeat(grey, w.channels, axis=-1), train=False)[0]
        for w in (three, one)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4)
    export.export(one, "torchvision", tmp_path / "one", "")
    again = weights.import_weights(tmp_path / "one", "torchvision", RESNET18, size=64, channels=3)
    back = model.apply(tree.unflatten(again.leaves), jnp.repeat(grey, 3, axis=-1), train=False)[0]
    np.testing.assert_allclose(back, found[0], rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------- reading and refusing


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def test_a_pickle_is_refused_and_one_that_runs_code_does_not_run_it(tmp_path):
    trap, ran = tmp_path / "trap.pth", tmp_path / "ran"
    trap.write_bytes(pickle.dumps({"conv1.weight": Malicious(ran)}))
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        read.read_tensors(trap)
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="not a file of weights alone"):
        read.read_tensors(trap, allow_pickle=True)
    assert not ran.exists()


def test_a_checkpoint_of_moco_is_read_on_request_and_its_nest_is_chosen(tmp_path):
    torch = pytest.importorskip("torch")
    state = torch_resnet(18).state_dict()
    nested = {
        f"module.{side}.{name}": tensor + (side == "encoder_k") * (tensor.ndim > 0)
        for side in ("encoder_q", "encoder_k")
        for name, tensor in state.items()
    }
    path = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 3, "state_dict": nested, "queue": torch.ones(4, 4)}, path)
    form = {"size": 64, "allow_pickle": True}
    with pytest.raises(UserError, match=r"2 copies .*encoder_k\.', .*encoder_q\.'.*--prefix"):
        weights.import_weights(path, "torchvision", RESNET18, **form)
    prefix = "state_dict.module.encoder_q."
    found = weights.import_weights(path, "torchvision", RESNET18, prefix=prefix, **form)
    assert not found.fresh and "queue" in found.left_over
    np.testing.assert_array_equal(
        found.leaves["params/stem/conv/kernel"], state["conv1.weight"].permute(2, 3, 1, 0)
    )


def write_shards(folder, missing=None):
    folder.mkdir()
    tensors = {name: np.full((2,), i, np.float32) for i, name in enumerate("ab")}
    for i, (name, tensor) in enumerate(tensors.items()):
        if name != missing:
            save_file({name: tensor}, folder / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate("ab")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    tensors = read.read_tensors(write_shards(tmp_path / "whole"))
    assert sorted(tensors) == ["a", "b"] and tensors["b"][0] == 1
    with pytest.raises(UserError, match=r"model-1\.safetensors, which is missing"):
        read.read_tensors(write_shards(tmp_path / "torn", missing="b"))
    index = tmp_path / "whole" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../else.safetensors"}}))
    with pytest.raises(UserError, match="outside its folder"):
        read.read_tensors(tmp_path / "whole")


def damage(kind, path):
    whole = {"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}
    if kind == "truncated":
        save_file(whole, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "not finite":
        save_file({"w": np.array([1, np.nan], np.float32)}, path)
    elif kind == "objects":
        np.savez(path, w=np.array([{}], object))
    elif kind == "no npz":
        path.write_bytes(b"PK nothing")
    elif kind == "unknown":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("truncated", "w.safetensors", "does not read as safetensors"),
        ("not finite", "w.safetensors", "'w' holds values that are not finite"),
        ("objects", "w.npz", "does not read as npz"),
        ("no npz", "w.npz", "does not read as npz"),
        ("unknown", "w.safetensor", r"did you mean '\.safetensors'"),
        ("absent", "w.npz", "no file"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, kind, name, said):
    damage(kind, tmp_path / name)
    with pytest.raises(UserError, match=said) as caught:
        read.read_tensors(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bfloat16_is_read(tmp_path):
    from safetensors.flax import save_file as save_jax

    save_jax({"w": jnp.arange(4, dtype=jnp.bfloat16)}, tmp_path / "w.safetensors")
    assert read.read_tensors(tmp_path / "w.safetensors")["w"].dtype == np.float32


def test_another_architecture_is_refused_with_both_sides(tmp_path):
    path = tmp_path / "r18.safetensors"
    save_file(parity.numpy_state(torch_resnet(18)), path)
    both = r"'layer1\.0\.conv1\.weight' \(64, 64, 3, 3\) does not fit .* \(1, 1, 64, 64\)"
    with pytest.raises(UserError, match=both):
        weights.import_weights(path, "torchvision", {**RESNET18, "depth": 50}, size=64)
    with pytest.raises(UserError, match="none of the model's tensors is in the file"):
        weights.import_weights(path, "timm", VIT, size=64)
    with pytest.raises(UserError, match="did you mean 'torchvision'"):
        weights.import_weights(path, "torchvison", RESNET18, size=64)
    with pytest.raises(UserError, match="valid: stem='torchvision'"):
        weights.import_weights(path, "timm", {"name": "resnet", "depth": 18}, size=64)
    with pytest.raises(UserError, match="normalize is not given"):
        weights.import_weights(path, "torchvision", RESNET18, size=64, normalize=None)


def test_every_resnet_has_tables_that_name_every_leaf():
    """Abstractly; the other families' tests do the same for theirs."""
    for name, section in resnet_module.TORCHVISION.items():
        module = build(section)
        shapes = weights.abstract_leaves(module, 224, 3)
        for naming in resnet.NAMINGS:
            ours = [entry.ours for entry in resnet.entries(module, naming)]
            assert len(ours) == len(set(ours)) and set(ours) == set(shapes), (name, naming)
    assert "resnet50" in named_models()


# -------------------------------------------------------------------------------------- end to end


def vit_run(workdir, init_from=None):
    """A run of a few steps on synthetic images, with evaluation."""
    workdir.mkdir(exist_ok=True)
    config = quickstart.get_config("smoke")
    config.model = {**VIT, "remat": False}
    config.augment.size = 32
    config.stages = ("simclr",)
    if init_from:
        config.stage.simclr.steps = 0
        config.stage.simclr.init_from = common.init_from(**init_from)
    curriculum.run(config.lock(), workdir, stop=lambda: False)
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return vit_run(tmp_path_factory.mktemp("run"))


def test_a_run_is_exported_loaded_by_transformers_and_imported_again_bit_equal(run, tmp_path):
    out = tmp_path / "exported"
    done = tool("export_weights", f"--workdir={run}", "--to=huggingface", f"--out={out}",
                "--license=cc-by-4.0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    rows = json.loads((run / "results.json").read_text())
    assert "license: cc-by-4.0" in card and f"{rows[0]['value']:.3f}" in card
    again = tool("export_weights", f"--workdir={run}", "--to=huggingface", f"--out={out}")
    assert again.returncode == 2 and "is not empty" in again.stderr

    imported = tmp_path / "imported"
    done = tool("import_weights", "--from=huggingface", f"--src={out}", f"--out={imported}",
                "--normalize=none", "--size=32", "--channels=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    backbone = ("params/backbone/.*",)
    flat, _ = networks.load(run / "00_simclr" / "checkpoints", patterns=backbone)
    found = weights.load(imported)
    assert len(flat) == len(found.leaves)
    for name, leaf in flat.items():
        np.testing.assert_array_equal(found.leaves[name.replace("backbone/", "")], leaf)

    encoder = Encoder.load(imported)
    x = np.random.default_rng(0).integers(0, 256, (3, 40, 36, 1), np.uint8)
    mine = encoder(x)
    np.testing.assert_array_equal(mine, Encoder.load(run)(x))
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    module = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    boxes = np.tile(np.array([0, 0, 40, 36], np.int32), (3, 1))
    views = np.array(augment.eval_transform(augment.AugmentConfig(size=32), jnp.asarray(x), boxes))
    with torch.no_grad():
        theirs = module(torch.tensor(views.transpose(0, 3, 1, 2))).last_hidden_state[:, 0]
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "normalize", "mean", "std"),
    [
        (RESNET18, "none", 0.0, 1.0),
        (RESNET18, "imagenet", 0.449, 0.226),
        ({"name": "bit", "depth": 50, "width": 1}, "none", 0.5, 0.5),
        ({"name": "bit", "depth": 50, "width": 1}, "half", 0.75, 0.25),  # [0, 1], [-1, 1], [-3, 1]
    ],
)
def test_timms_config_says_the_normalisation(tmp_path, section, normalize, mean, std):
    shapes = weights.abstract_leaves(build(section), 64, 1)
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    export.export(weights.Weights(section, 64, 1, normalize, leaves), "timm", tmp_path / "out", "")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert described["mean"][0] == pytest.approx(mean, abs=1e-6)
    assert described["std"][0] == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize(
    ("section", "size", "channels", "normalize", "eval_crop", "side"),
    [
        (RESNET18, 224, 3, "imagenet", 0.875, 256),
        (RESNET18, 32, 1, "imagenet", 0.875, 36),  # 36.57, and an even border
        (VIT, 48, 1, "half", 1.0, 48),
        ({"name": "bit", "depth": 50, "width": 1}, 64, 1, "none", 0.8, 80),  # takes grey as RGB
    ],
)
def test_transformers_makes_our_pixels_of_an_image_by_the_exported_folder(
    tmp_path, section, size, channels, normalize, eval_crop, side
):
    transformers = pytest.importorskip("transformers")
    shapes = weights.abstract_leaves(build(section), size, channels)
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    form = {"size": size, "channels": channels, "normalize": normalize, "eval_crop": eval_crop}
    out = tmp_path / "out"
    export.export(weights.Weights(section, leaves=leaves, **form), "huggingface", out, "")
    processor = transformers.AutoImageProcessor.from_pretrained(out)

    image = np.random.default_rng(0).integers(0, 256, (side, side, channels), np.uint8)
    pil = PIL.Image.fromarray(image if channels == 3 else image[:, :, 0])
    found = processor(pil, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    settings = augment.AugmentConfig(size=size, normalize=normalize, eval_crop=eval_crop)
    box = np.array([[0, 0, side, side]], np.int32)
    expected = np.asarray(augment.eval_transform(settings, jnp.asarray(image[None]), box)[0])
    if section["name"] == "bit":  # what our network does by itself
        expected = np.repeat(expected, 3, axis=-1) * 2 - 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    # of another size: the crop and the number of channels are the network's
    wide = processor(PIL.Image.new("L", (300, 200)), return_tensors="np")["pixel_values"]
    config = json.loads((out / "config.json").read_text())
    assert wide.shape == (1, config["num_channels"], size, size)


def test_onnx_without_its_packages_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    given = weights.Weights(VIT, 32, 1, "none", {})
    with pytest.raises(UserError, match=r"onnx needs 'onnxruntime': pip install 'bigmed\[onnx\]'"):
        onnx.export(given, tmp_path / "out", "")
    assert not (tmp_path / "out").exists()


def test_npz_comes_back_bit_equal_and_is_npz(run, tmp_path):
    stage_weights, _ = export.from_run(run)
    export.export(stage_weights, "npz", tmp_path / "out", "card")
    with np.load(tmp_path / "out" / "weights.npz", allow_pickle=False) as file:
        assert "Transformer/encoder_norm/scale" in file.files
    form = {"size": 32, "channels": 1}
    again = weights.import_weights(tmp_path / "out" / "weights.npz", "npz", VIT, **form)
    assert not again.fresh and not again.left_over
    for name, leaf in stage_weights.leaves.items():
        np.testing.assert_array_equal(again.leaves[name], leaf, err_msg=name)


def test_a_torn_stage_is_not_exported_with_the_metrics_of_its_end(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    last = max((copy / "00_simclr" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    stages = json.loads((copy / "curriculum.json").read_text())
    # as if a later one had been set aside
    stages["stages"][0]["weights"] = f"checkpoints/{int(last.name) + 1}"
    (copy / "curriculum.json").write_text(json.dumps(stages))
    with pytest.raises(UserError, match="last checkpoint of '00_simclr' is torn"):
        export.from_run(copy)


def test_what_stands_outside_the_nest_is_left_over_and_never_used(tmp_path):
    state = parity.numpy_state(torch_resnet(18))
    nested = {f"module.{name}": tensor for name, tensor in state.items()}
    lost = nested.pop("module.bn1.weight")
    save_file({**nested, "bn1.weight": 7 * lost, "fc.weight": lost}, tmp_path / "w.safetensors")
    found = weights.import_weights(tmp_path / "w.safetensors", "torchvision", RESNET18, size=64)
    assert found.fresh == ("params/stem/norm/scale",)
    assert "bn1.weight" in found.left_over and found.left_over.count("fc.weight") == 2


def test_numbers_that_are_no_weights_are_refused(tmp_path):
    state = parity.numpy_state(torch_resnet(18))
    state["bn1.weight"] = np.ones(64, np.int8)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="'bn1.weight' is of int8"):
        weights.import_weights(tmp_path / "w.safetensors", "torchvision", RESNET18, size=64)


def test_the_encoder_refuses_pixels_that_it_would_misread(run):
    encoder = Encoder.load(run)
    for wrong in (np.full((1, 40, 40, 1), 200.0, np.float32), np.ones((1, 40, 40, 1), np.int32)):
        with pytest.raises(UserError, match="valid: uint8, uint16, or floats in"):
            encoder(wrong)


def test_a_stage_starts_from_imported_weights_and_says_what_does_not_fit(run, tmp_path):
    out = tmp_path / "exported"
    stage_weights, facts = export.from_run(run)
    card = export.model_card(stage_weights, facts, "huggingface", "unknown")
    export.export(stage_weights, "huggingface", out, card)
    imported = tmp_path / "imported"
    weights.save(stage_weights, imported, {})
    for source in ({"weights": str(imported)}, {"weights": str(out), "naming": "huggingface"}):
        workdir = vit_run(tmp_path / source.get("naming", "ours"), source)
        flat, _ = networks.load(workdir / "00_simclr" / "checkpoints")
        for name, leaf in stage_weights.leaves.items():
            np.testing.assert_array_equal(flat[name.replace("/", "/backbone/", 1)], leaf)
    config = json.loads((imported / "encoder.json").read_text())
    config["normalize"] = "half"
    (imported / "encoder.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="normalize='half'.*set it to 'half'"):
        vit_run(tmp_path / "refused", {"weights": str(imported)})
    config["model"]["variant"] = "mu/16"
    (imported / "encoder.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is .* in the model and .* in the file"):
        vit_run(tmp_path / "refused", {"weights": str(imported)})
    with pytest.raises(UserError, match=r"init_from\.naming='timm' is of init_from\.weights"):
        vit_run(tmp_path / "refused", {"naming": "timm"})
    with pytest.raises(UserError, match="has checkpoints and weights; give one of"):
        vit_run(tmp_path / "refused", {"weights": str(out), "checkpoints": str(out)})


def test_features_of_a_folder_of_real_images_and_of_a_data_set(run, tmp_path, shared_data):
    folder = tmp_path / "images"
    folder.mkdir()
    chosen = sorted((shared_data / "cxr_nih").rglob("*.png"))[:3]
    chosen = chosen or sorted((shared_data / "cxr_nih").rglob("*.jpg"))[:3]
    for path in chosen:
        shutil.copy(path, folder)
    out = tmp_path / "features.npz"
    done = tool("extract_features", f"--model={run}", f"--data={folder}", f"--out={out}",
                "--batch_size=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out, allow_pickle=False) as file:
        features, names = file["features"], file["names"]
    assert features.shape == (3, 32) and list(names) == [p.name for p in chosen]
    encoder = Encoder.load(run)
    for path, feature in zip(chosen, features, strict=True):
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)[None, :, :, None]
        cosine = (encoder(image)[0] @ feature) / np.linalg.norm(feature) ** 2
        assert cosine == pytest.approx(1, abs=0.05)  # shrunk to the canvas first, or at once

    # the same features as the run's own evaluation cached
    dataset = next((run / "data" / "phantom").rglob("dataset_info.json")).parent
    done = tool("extract_features", f"--model={run}", f"--data={dataset}", "--split=test",
                f"--out={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(out, allow_pickle=False) as file:
        assert len(file["features"]) == len(file["labels"]) == len(file["records"])
        cached = [np.load(path, allow_pickle=False)["x"] for path in (run / "features").iterdir()]
        same = [x for x in cached if x.shape == file["features"].shape]
        assert any(np.allclose(x, file["features"], rtol=0, atol=1e-5) for x in same)
    (folder / "broken.png").write_bytes(b"no image")
    out.unlink()
    done = tool("extract_features", f"--model={run}", f"--data={folder}", f"--out={out}")
    assert done.returncode == 2 and "broken.png cannot be read" in done.stderr
    assert not out.exists()
