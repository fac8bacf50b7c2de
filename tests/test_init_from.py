"""What a stage starts from: foreign files as tools/import_weights.py takes them."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_curriculum import foreign_folder, tower_of, trained_by, with_texts
from test_tools import tool

from bigmed import curriculum
from bigmed.convert import export, weights
from bigmed.errors import UserError
from bigmed.models.catalogue import build
from configs import common, quickstart

pytestmark = pytest.mark.usefixtures("one_device")

VIT = {"name": "vit", "variant": "mu/8"}
CHOSEN, OTHER = "state_dict.backbone.", "state_dict.momentum_backbone."


def start(workdir, overrides=None, **source):
    """A stage of no steps that starts from somewhere."""
    config = quickstart.get_config("smoke")
    config.model = {**VIT, "remat": False}
    config.evaluate, config.stages = (), ("given",)
    config.stage.given = common.stage(steps=0, init_from=common.init_from(**source))
    config.stage.given.update(overrides or {})
    workdir.mkdir(exist_ok=True)
    curriculum.run(config.lock(), workdir, stop=lambda: False)
    return trained_by(workdir, "00_given")


def foreign_weights(seed, section=VIT, size=48, channels=3):
    """An encoder of other images than the stage's, which are grey, of 32 pixels."""
    rng = np.random.default_rng(seed)
    shapes = weights.abstract_leaves(build(section), size, channels)
    leaves = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in shapes.items()}
    return weights.Weights(dict(section), size, channels, "none", leaves)


@pytest.fixture
def pickled(tmp_path):
    """A folder of transformers', its weights a pickle of two copies in nests."""
    torch = pytest.importorskip("torch")
    folder, nested = tmp_path / "foreign", {}
    export.export(foreign_weights(0), "huggingface", folder, "")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for nest, factor in ((CHOSEN, 1.0), (OTHER, 2.0)):
        path = nest.removeprefix("state_dict.")
        nested |= {f"{path}{name}": torch.tensor(t * factor) for name, t in tensors.items()}
    nested["projector.0.weight"] = torch.ones(2, 2)
    torch.save({"state_dict": nested}, folder / "pytorch_model.bin")
    return folder


def test_a_stage_reads_a_file_as_the_tool_does(tmp_path, pickled, caplog):
    """A pickle, a nest, other images: to the same bits, and the same is left over."""
    out = tmp_path / "imported"
    done = tool("import_weights", "--from=huggingface", f"--src={pickled}", f"--out={out}",
                "--normalize=none", "--size=32", "--channels=1", f"--prefix={OTHER}",
                "--allow_pickle")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "encoder.json").read_text())["origin"]["prefix"] == OTHER
    of_tool = start(tmp_path / "of_tool", weights=str(out))
    source = {"weights": str(pickled), "naming": "huggingface", "prefix": OTHER[:-1]}
    with caplog.at_level(logging.INFO):
        of_file = start(tmp_path / "of_file", allow_pickle=True, **source)
    backbone = [name for name in of_tool if "/backbone/" in name]
    assert len(backbone) == len(foreign_weights(0).leaves)
    for name in backbone:
        np.testing.assert_array_equal(of_file[name], of_tool[name], err_msg=name)
    kernel = foreign_weights(0).leaves["params/block1/mlp/up/kernel"]
    np.testing.assert_array_equal(of_file["params/backbone/block1/mlp/up/kernel"], 2 * kernel)
    said = done.stdout.splitlines()[-1].removeprefix("left over: ")
    assert said in caplog.text and "'state_dict.projector.0.weight'" in said
    told = json.loads((tmp_path / "of_file" / "curriculum.json").read_text())["stages"][0]
    record = {key: told["init_from"].get(key) for key in ("naming", "prefix", "allow_pickle")}
    assert record == {"naming": "huggingface", "prefix": OTHER[:-1], "allow_pickle": True}

    for change, said in (
        ({"prefix": None, "allow_pickle": True}, r"2 copies .*choose one .*init_from\.prefix"),
        ({"allow_pickle": False}, r"is a pickle.*init_from\.allow_pickle=True"),
    ):
        with pytest.raises(UserError, match=said):
            start(tmp_path / "refused", **{**source, **change})
    assert not list((tmp_path / "refused").glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"weights": "x", "prefix": "a."}, r"'given': init_from\.prefix='a\.' is of init_"),
        ({"naming": "timm"}, r"naming='timm' is of init_from\.weights, which is empty"),
        ({"text_naming": "huggingface"}, r"is of init_from\.text_weights, which is empty"),
        ({"text_weights": "x", "text_prefix": "a."}, r"is of init_from\.text_naming, which"),
        ({"weights": "x", "allow_pickle": True}, r"naming or init_from\.text_naming, which is"),
        ({"weights": "x", "stage": "first"}, "has stage and weights; give one of"),
        ({"load": (".*",)}, "has no source; give one of"),
        ({"skip": (".*",)}, "has no source; give one of"),
    ],
)
def test_keys_that_say_nothing_are_refused(tmp_path, source, said):
    config = quickstart.get_config("smoke")
    config.evaluate, config.stages = (), ("first", "given")
    config.stage.first = common.stage(steps=0)
    config.stage.given = common.stage(steps=0, init_from=common.init_from(**source))
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    assert not list(tmp_path.glob("*/checkpoints"))


def test_a_folder_of_ours_and_a_foreign_one_are_told_apart(tmp_path):
    given = foreign_weights(0, size=32, channels=1)
    weights.save(given, tmp_path / "ours", {})
    export.export(given, "huggingface", tmp_path / "foreign", "")
    with pytest.raises(UserError, match=r"start from as it is, without naming='huggingface'"):
        start(tmp_path / "run", weights=str(tmp_path / "ours"), naming="huggingface")
    with pytest.raises(UserError, match=r"is no folder of tools.*give init_from\.naming too"):
        start(tmp_path / "run", weights=str(tmp_path / "foreign"))


def test_leaves_that_a_file_lacks_are_refused_alike_or_skipped(tmp_path):
    given = foreign_weights(0, size=32, channels=1)
    export.export(given, "huggingface", tmp_path / "foreign", "")
    path = tmp_path / "foreign" / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if not n.startswith("layernorm.")}, path)
    done = tool("import_weights", "--from=huggingface", f"--src={path.parent}", "--size=32",
                "--channels=1", "--normalize=none", f"--out={tmp_path / 'out'}")  # fmt: skip
    said = done.stderr.strip().removeprefix("error: ")
    assert done.returncode == 2 and "lacks 2 leaves of the model: 'params/norm/" in said
    source = {"weights": str(path.parent), "naming": "huggingface"}
    with pytest.raises(UserError) as refused:
        start(tmp_path / "run", **source)
    assert str(refused.value) == said
    found = start(tmp_path / "run", skip=("params/backbone/norm/.*",), **source)
    np.testing.assert_array_equal(found["params/backbone/norm/scale"], 1)
    name = "params/block1/mlp/up/kernel"
    np.testing.assert_array_equal(found[name.replace("/", "/backbone/", 1)], given.leaves[name])


def test_the_normalisation_that_counts_is_the_recipes(tmp_path):
    """C2L's takes ImageNet's moments where the config gives none."""
    for normalize in ("none", "imagenet"):
        given = foreign_weights(0, size=32, channels=1)
        folder = tmp_path / normalize
        weights.save(weights.Weights(VIT, 32, 1, normalize, given.leaves), folder, {})
    recipe = {"augment": common.augmentation("c2l", 32)}
    start(tmp_path / "run", recipe, weights=str(tmp_path / "imagenet"))
    with pytest.raises(UserError, match=r"normalize='none' but .*'imagenet'; set it to 'none'"):
        start(tmp_path / "refused", recipe, weights=str(tmp_path / "none"))


def test_a_text_tower_comes_from_a_foreign_file_in_a_nest(tmp_path):
    source = {"text_naming": "huggingface", "text_prefix": "bert."}
    source["text_weights"] = str(tmp_path / "tower.safetensors")
    config = with_texts(tmp_path, {"init_from": common.init_from(**source)})
    leaves = foreign_folder(tmp_path / "ours", tower_of(config, tmp_path), 0)
    export.export(weights.load(tmp_path / "ours"), "huggingface", tmp_path / "theirs", "")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    nested = {f"{nest}.{n}": t + (nest == "other") for nest in ("bert", "other")
              for n, t in tensors.items()}  # fmt: skip
    save_file(nested, source["text_weights"])
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    found = trained_by(tmp_path, "00_stage0")
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(found[name.replace("/", "/text/", 1)], leaf, err_msg=name)
