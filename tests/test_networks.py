"""Student and teacher: exported, embedding, starting a stage; by one name everywhere."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_tools import tool

from bigmed import augment, checkpoint, curriculum, networks
from bigmed.convert import export, weights
from bigmed.convert.encoder import Encoder
from bigmed.errors import UserError
from bigmed.models.catalogue import build
from configs import byol, common, linear

pytestmark = pytest.mark.usefixtures("one_device")

TINY = {"name": "tiny_model:Model", "variant": "mu/8", "remat": False}  # has batch norms
# where a teacher lies in a checkpoint, spelled out: a change of place must be a choice
PLACES = {"params": "extra/teacher/teacher_backbone", "batch_stats": "batch_stats/teacher_backbone"}
ENCODER = common.ENCODER  # of linear, few_label and finetune alike
NORMS, VIT = "00_norms", "01_vit"


@pytest.fixture(scope="module")
def run(on_one_device, tmp_path_factory):
    """BYOL for three steps, with a teacher far from its student: a network of norms, and a ViT."""
    workdir = tmp_path_factory.mktemp("byol")
    config = byol.get_config("smoke")
    config.objective.momentum = 0.5
    config.evaluate, config.stages = ("knn", "of_teacher"), ("norms", "vit")
    config.evaluator.of_teacher = {**config.evaluator.knn, "representation": "teacher"}
    config.stage = {
        "norms": common.stage(steps=3, model=TINY),
        "vit": common.stage(steps=3),
    }
    config.optim = common.adamw(lr=0.01, warmup_steps=0)
    with on_one_device():
        curriculum.run(config.lock(), workdir, stop=lambda: False)
    return workdir


def leaves_of(workdir, stage, network):
    """{path in the backbone's variables: array}, by the places above."""
    flat, _ = checkpoint.load_flat(workdir / stage / "checkpoints")
    places = PLACES if network == "teacher" else {c: f"{c}/backbone" for c in PLACES}
    return {
        f"{collection}/{name.removeprefix(place + '/')}": leaf
        for collection, place in places.items()
        for name, leaf in flat.items()
        if name.startswith(f"{place}/")
    }


def features_of(leaves, images):
    """Of the network itself, outside all that the tools share."""
    variables = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        here = variables
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = leaf
    boxes = np.tile(np.array([0, 0, *images.shape[1:3]], np.int32), (len(images), 1))
    settings = augment.from_config(common.augmentation("byol", 32))
    views = augment.eval_transform(settings, jnp.asarray(images), boxes)
    apply = jax.jit(lambda v, x: build(TINY).apply(v, x, train=False)[0])
    return np.asarray(apply(variables, views))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 48, 1), np.uint8)


def test_either_network_embeds_and_its_features_are_its_own(run, images):
    found = {}
    for network in networks.NETWORKS:
        found[network] = Encoder.load(run, NORMS, network)(images)
        want = features_of(leaves_of(run, NORMS, network), images)
        np.testing.assert_allclose(found[network], want, rtol=1e-4, atol=1e-4)
    assert np.abs(found["student"] - found["teacher"]).max() > 1e-2
    np.testing.assert_array_equal(Encoder.load(run, NORMS)(images), found["student"])


def test_the_teacher_is_exported_with_what_was_measured_on_it(run, tmp_path):
    out, features = tmp_path / "exported", tmp_path / "features.npz"
    done = tool("export_weights", f"--workdir={run}", f"--stage={VIT}", "--to=huggingface",
                "--network=teacher", f"--out={out}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of the teacher of 'vit', step 3" in done.stdout
    tensors = load_file(out / "model.safetensors")
    student, teacher = (leaves_of(run, VIT, network) for network in networks.NETWORKS)
    kernel = "params/block1/mlp/up/kernel"
    np.testing.assert_array_equal(
        tensors["encoder.layer.0.intermediate.dense.weight"], teacher[kernel].T
    )
    assert np.abs(teacher[kernel] - student[kernel]).max() > 1e-3
    card = (out / "README.md").read_text()
    assert "this is the teacher" in card
    assert "| of_teacher |" in card and "| knn |" not in card
    _, facts = export.from_run(run, VIT)
    assert {row["evaluator"] for row in facts["results"]} == {"knn"}

    dataset = next((run / "data" / "phantom").rglob("dataset_info.json")).parent
    done = tool("extract_features", f"--model={run}", f"--stage={VIT}", f"--data={dataset}",
                "--split=test", "--network=teacher", f"--out={features}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(features, allow_pickle=False) as file:
        found = file["features"]
    cached = [np.load(path, allow_pickle=False)["x"] for path in (run / "features").iterdir()]
    same = [x for x in cached if x.shape == found.shape]
    assert len(same) > 1, "of either network"
    assert sum(np.allclose(x, found, rtol=0, atol=1e-4) for x in same) == 1


@pytest.mark.parametrize("stage", [NORMS, VIT])
def test_a_stage_and_an_evaluation_start_from_the_teacher(stage, run, tmp_path):
    config = linear.get_config("smoke")
    config.model = TINY if stage == NORMS else byol.get_config("smoke").model
    config.stages, config.evaluate = ("given",), ("knn",)
    source = {"checkpoints": str(run / stage / "checkpoints"), "network": "teacher"}
    config.stage.given = common.stage(steps=0, init_from=common.init_from(load=ENCODER, **source))
    shutil.copytree(run / "data", tmp_path / "data")
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    flat, _ = checkpoint.load_flat(tmp_path / "00_given" / "checkpoints")
    leaves = leaves_of(run, stage, "teacher")
    assert any(name.startswith("batch_stats/") for name in leaves) == (stage == NORMS)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(flat[name.replace("/", "/backbone/", 1)], leaf, err_msg=name)
    (told,) = json.loads((tmp_path / "curriculum.json").read_text())["stages"]
    assert told["init_from"]["checkpoint"] == f"{stage}/3, its teacher"
    assert told["init_from"]["network"] == "teacher"


def test_a_network_that_is_not_there_is_one_line(run, tmp_path):
    shutil.copytree(run / "data", tmp_path / "data")
    config = linear.get_config("smoke")
    config.evaluate, config.stages = (), ("untrained", "given")
    config.stage.given.init_from = common.init_from(stage="untrained", network="teacher")
    said = r"'given': init_from\.network='teacher': objective 'simclr' of stage 'untr.*student"
    with pytest.raises(UserError, match=said):
        curriculum.run(config, tmp_path, stop=lambda: False)
    assert not list(tmp_path.rglob("checkpoints")), "found before any stage runs"
    config.stages = ("untrained",)
    curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    done = tool("export_weights", f"--workdir={tmp_path}", "--stage=00_untrained", "--to=timm",
                "--network=teacher", f"--out={tmp_path / 'out'}")  # fmt: skip
    assert done.returncode == 2 and "has none" in done.stderr and not (tmp_path / "out").exists()
    results = tmp_path / "results.json"
    results.write_text("[{")
    with pytest.raises(UserError, match="results.json is damaged"):
        export.from_run(tmp_path, "00_untrained")
    results.unlink()
    imported = tmp_path / "imported"
    weights.save(export.from_run(tmp_path, "00_untrained")[0], imported, {})
    with pytest.raises(UserError, match="has no stages, and one network"):
        Encoder.load(imported, network="teacher")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"network": "teacher"}, r"is of init_from\.stage or init_from\.checkpoints, which is"),
        ({"weights": "x", "network": "teacher"}, r"is of init_from\.stage or init_from\.check"),
        ({"checkpoints": "x", "network": "techer"}, "did you mean 'teacher'"),
    ],
)
def test_a_network_of_nothing_is_refused(tmp_path, source, said):
    config = linear.get_config("smoke")
    config.evaluate, config.stages = (), ("given",)
    config.stage.given.init_from = common.init_from(**source)
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
