"""Zero-shot classification: against float64 by hand, image by image, its prompt files, mistakes."""

import json

import jax
import jax.numpy as jnp
import memory
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.metrics import roc_auc_score

from bigmed import checkpoint, curriculum, sharding
from bigmed.data import phantom, prompts, tokenise
from bigmed.errors import UserError
from bigmed.evaluators import zero_shot
from bigmed.report import table
from bigmed.state import TrainState
from configs import common, convirt

WORDS = ("no", "seen", "apple", "berry", "cherry", "ripe", "raw")
FRUIT = dict(zip("abc", ("apple", "berry", "cherry"), strict=True))
POS_NEG = {
    name: {"positive": [fruit, f"ripe {fruit}"], "negative": [f"no {fruit}", f"raw {fruit}"]}
    for name, fruit in FRUIT.items()
}
MULTICLASS = {name: [fruit, f"ripe {fruit}", f"raw {fruit}"] for name, fruit in FRUIT.items()}
TEMPLATES = ["{}", "{} seen"]
SCALE = 7.5


@pytest.fixture
def mesh():
    return sharding.make_mesh({"data": 2}, jax.devices()[:2])


@pytest.fixture
def toy(monkeypatch):
    return memory.install(monkeypatch)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "vocab.txt"
    path.write_text("\n".join([*tokenise.SPECIAL, *WORDS]) + "\n")
    return path


def state_of(seed=0):
    """Vectors of every word, and what pixels are multiplied by."""
    rng = np.random.default_rng(seed)
    size = len(tokenise.SPECIAL) + len(WORDS)
    params = {
        "words": rng.normal(size=(size, 16)).astype(np.float32),
        "pixels": rng.normal(size=(16, 16)).astype(np.float32),
        "logit_scale": np.float32(np.log(SCALE)),
    }
    return TrainState(0, jax.tree.map(jnp.asarray, params), {}, (), {}, jnp.zeros(2, jnp.uint32))


def of_images(state, batch):
    x = batch["image"][:, 0].reshape(-1, 16).astype(jnp.float32) / 255
    return jnp.matmul(x, state.params["pixels"], precision="highest")


def of_texts(state, batch):
    mask = batch["token_mask"][:, 0, :, None]
    total = jnp.sum(jnp.where(mask, state.params["words"][batch["tokens"][:, 0]], 0), axis=1)
    return total / jnp.sum(mask, axis=1)


def write(folder, mode="pos_neg", **changes):
    classes = POS_NEG if mode == "pos_neg" else MULTICLASS
    content = {"name": "fruit", "version": "1", "mode": mode, "templates": TEMPLATES}
    content = {**content, "classes": classes, **changes}
    path = folder / "fruit.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def make(mesh, vocabulary, path, **changes):
    settings = memory.settings(
        prompts=path,
        text={"tokeniser": str(vocabulary), "length": 6},
        query_representation=("text", of_texts),
        scale=lambda params: jnp.exp(params["logit_scale"]),
        preprocessing={"representation": "image"},
    )
    del settings["train"]
    settings |= changes
    return zero_shot.Evaluator(of_images, mesh, **settings)


def by_hand(source, state, mode, aggregate, scale):
    """Probabilities [N, L], prompt by prompt and image by image, in float64."""
    params = {name: np.asarray(x, np.float64) for name, x in state.params.items()}
    ids = {word: len(tokenise.SPECIAL) + i for i, word in enumerate(WORDS)}
    ends = [tokenise.SPECIAL.index(word) for word in ("[CLS]", "[SEP]")]

    def vector(prompt):
        rows = [ends[0], *(ids[word] for word in prompt.split()), ends[1]]
        v = params["words"][rows].mean(axis=0)
        return v / np.sqrt((v**2).sum())

    def logit(image, texts):
        vectors = [vector(template.replace("{}", t)) for template in TEMPLATES for t in texts]
        if aggregate == "mean_embedding":
            middle = sum(vectors) / len(vectors)
            return scale * (image @ middle) / np.sqrt((middle**2).sum())
        found = [scale * (image @ v) for v in vectors]
        return max(found) if aggregate == "max_logit" else sum(found) / len(found)

    rows = []
    for pixels in source.images.reshape(len(source), 16).astype(np.float64) / 255:
        image = pixels @ params["pixels"]
        image = image / np.sqrt((image**2).sum())
        if mode == "pos_neg":
            pairs = [
                (np.exp(logit(image, c["positive"])), np.exp(logit(image, c["negative"])))
                for c in POS_NEG.values()
            ]
            rows.append([yes / (yes + no) for yes, no in pairs])
        else:
            odds = np.exp([logit(image, texts) for texts in MULTICLASS.values()])
            rows.append(odds / odds.sum())
    return np.array(rows)


def kept(folder, row):
    with np.load(folder / row["predictions"]) as file:
        return dict(file)


@pytest.mark.parametrize("aggregate", zero_shot.AGGREGATES)
@pytest.mark.parametrize("mode", prompts.MODES)
def test_probabilities_are_those_by_hand(toy, mesh, vocabulary, tmp_path, mode, aggregate):
    source = toy(zero_shot.TASK_OF[mode])["toy", "test"]
    path, state = write(tmp_path, mode), state_of()
    evaluator = make(mesh, vocabulary, path, aggregate=aggregate, predictions_dir=tmp_path)
    rows = {row["metric"]: row for row in evaluator.run(state, "x")}
    expected = by_hand(source, state, mode, aggregate, SCALE)
    found = kept(tmp_path, rows["auc_macro"])
    labelled = ((source.labels == 0) | (source.labels == 1)).any(axis=1)
    np.testing.assert_allclose(found["scores"], expected[labelled], atol=2e-6)
    known = source.labels[:, 0] >= 0
    auc = roc_auc_score(source.labels[known, 0], expected[known, 0])
    assert rows["auc/a"]["value"] == pytest.approx(auc, abs=1e-9)
    assert "calibration/ece" in rows, "there is validation to choose thresholds on"
    if mode == "multiclass":
        right = np.mean(expected.argmax(axis=1) == source.labels.argmax(axis=1))
        assert rows["accuracy"]["value"] == pytest.approx(right)
    row = rows["auc_macro"]
    assert row["prompts_sha256"] == prompts.load(path).sha256 and row["fraction"] == 0
    assert "temperature 0.133" in row["prompts"] and aggregate in row["prompts"]
    assert row["ci_low"] < row["value"] < row["ci_high"] and row["n_images"] == labelled.sum()


def test_a_temperature_of_ones_own(toy, mesh, vocabulary, tmp_path):
    source = toy()["toy", "test"]
    evaluator = make(
        mesh, vocabulary, write(tmp_path), temperature=0.5, predictions_dir=tmp_path, val=None
    )
    rows = {row["metric"]: row for row in evaluator.run(state_of(), "x")}
    expected = by_hand(source, state_of(), "pos_neg", "mean_embedding", 2.0)
    keep = ((source.labels == 0) | (source.labels == 1)).any(axis=1)
    np.testing.assert_allclose(
        kept(tmp_path, rows["auc_macro"])["scores"], expected[keep], atol=2e-6
    )
    assert not any(name.startswith(("f1", "calibration")) for name in rows), "without validation"


@pytest.mark.parametrize("mode", prompts.MODES)
def test_the_score_of_an_image_depends_on_no_other(mode):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 8)).astype(np.float32)
    groups = 2 if mode == "pos_neg" else 1
    vectors = [[rng.normal(size=(3, 8)) for _ in range(groups)] for _ in range(4)]
    for aggregate in zero_shot.AGGREGATES:
        settings = (vectors, aggregate, 0.1, zero_shot.TASK_OF[mode])
        together = zero_shot.probabilities(images, *settings)
        alone = [zero_shot.probabilities(images[i : i + 1], *settings)[0] for i in range(40)]
        np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_prompts_in_chunks_are_the_same(toy, mesh, vocabulary, tmp_path):
    toy()
    path = write(tmp_path)
    values = [
        [r["value"] for r in make(mesh, vocabulary, path, batch_size=n).run(state_of(), "x")]
        for n in (4, 90)
    ]
    assert values[0] == values[1]


def test_another_site_is_scored_in_its_own_words(toy, mesh, vocabulary, tmp_path):
    sources = toy()
    site = memory.MemorySource("elsewhere", 80, seed=9, first_patient=5000)
    site.class_names = ("yes", "maybe", "no")
    sources["toy", "elsewhere"] = site
    other = {"source": {"dir": "toy", "split": "elsewhere"}, "label_map": {"a": ("yes",)}}
    evaluator = make(mesh, vocabulary, write(tmp_path), shift={"site": other})
    rows = {(row["shift"], row["metric"]): row for row in evaluator.run(state_of(), "x")}
    scores = by_hand(site, state_of(), "pos_neg", "mean_embedding", SCALE)[:, 0]
    known = site.labels[:, 0] >= 0
    assert rows["site", "auc/a"]["value"] == pytest.approx(
        roc_auc_score(site.labels[known, 0], scores[known])
    )
    assert rows["site", "auc/b"]["value"] is None and rows[None, "auc/b"]["value"] is not None


def test_the_images_of_a_case_are_averaged(toy, mesh, vocabulary, tmp_path):
    source = toy()["toy", "test"]
    evaluator = make(
        mesh, vocabulary, write(tmp_path), average="scores", predictions_dir=tmp_path
    )
    row = next(evaluator.run(state_of(), "x"))
    scores = by_hand(source, state_of(), "pos_neg", "mean_embedding", SCALE)
    usable = ((source.labels == 0) | (source.labels == 1)).any(axis=1)
    cases = source.cases[usable]
    expected = [scores[usable][cases == c].mean(axis=0) for c in np.unique(cases)]
    np.testing.assert_allclose(kept(tmp_path, row)["scores"], expected, atol=2e-6)


def save(folder, state):
    checkpointer = checkpoint.Checkpointer(folder)
    checkpointer.save(0, state, {})
    checkpointer.close()
    return str(folder)


def test_an_ensemble_is_the_mean_of_its_members_probabilities(toy, mesh, vocabulary, tmp_path):
    source = toy()["toy", "test"]
    folders = [save(tmp_path / str(seed), state_of(seed)) for seed in (1, 0)]
    evaluator = make(
        mesh,
        vocabulary,
        write(tmp_path),
        checkpoints=(folders[0], f"{folders[1]}/0"),
        predictions_dir=tmp_path,
    )
    state = jax.device_put(state_of(0), sharding.replicated(mesh))
    rows = [row for row in evaluator.run(state, "x") if row["metric"] == "auc_macro"]
    single, middle, ensemble = rows
    assert (single["members"], single["train_set"]) == (1, "prompts fruit")
    assert ensemble["members"] == 2, "the state's own weights, which are also kept, count once"
    assert ensemble["train_set"] == "prompts fruit, ensemble of 2 checkpoints"
    assert middle["train_set"] == "prompts fruit, mean of 2 checkpoints"
    each = [by_hand(source, state_of(s), "pos_neg", "mean_embedding", SCALE) for s in (0, 1)]
    keep = ((source.labels == 0) | (source.labels == 1)).any(axis=1)
    for row, expected in ((single, each[0]), (ensemble, np.mean(each, axis=0))):
        np.testing.assert_allclose(kept(tmp_path, row)["scores"], expected[keep], atol=2e-6)
    y = source.labels
    known = [y[:, c] >= 0 for c in range(3)]
    aucs = [roc_auc_score(y[k, c], p[k, c]) for p in each for c, k in enumerate(known)]
    assert middle["value"] == pytest.approx(np.mean(aucs)) and middle["predictions"] is None
    assert middle["ci_low"] < middle["value"] < middle["ci_high"]
    origin = {"evaluator": "zero_shot", "stage": "s", "seed": 0}
    title = table.format_table([{**origin, **row} for row in rows])
    assert "prompts fruit, mean of 2 checkpoints -> toy/test, 0 % of the labels" in title


def test_a_checkpoint_of_another_network_is_refused(toy, mesh, vocabulary, tmp_path):
    toy()
    state = state_of()
    other = state.replace(params={**state.params, "pixels": jnp.zeros((16, 9))})
    evaluator = make(
        mesh, vocabulary, write(tmp_path), checkpoints=(save(tmp_path / "other", other),)
    )
    with pytest.raises(UserError, match=r"other is of another model: 'params/pixels' is \(16, 16"):
        list(evaluator.run(state, "x"))


def test_some_of_the_classes(mesh, tmp_path):
    """Prompts for classes of the data that were not asked for are no mistake."""
    phantom.prepare(tmp_path / "phantom", num_patients=40, size=16)
    folder = {"dir": str(tmp_path / "phantom")}
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 8)).astype(np.float32)
    words = rng.normal(size=(1000, 8)).astype(np.float32)

    params = {"images": jnp.asarray(images), "words": jnp.asarray(words)}

    def of_tokens(state, batch):
        return jnp.sum(state.params["words"][batch["tokens"][:, 0]], axis=1)

    evaluator = zero_shot.Evaluator(
        lambda state, batch: state.params["images"][batch["record"]],
        mesh,
        prompts="configs/prompts/synthetic_phantom.json",
        test={**folder, "split": "test"},
        classes=("effusion", "nodules"),
        canvas=16,
        channels=1,
        preprocessing={"representation": "image"},
        query_representation=("text", of_tokens),
        text={"tokeniser": str(tmp_path / "phantom/vocab.txt"), "length": 24},
        scale=None,
        temperature=0.1,
        num_resamples=20,
    )
    state = state_of().replace(params=params)
    rows = {row["metric"]: row for row in evaluator.run(state, "x")}
    assert {m for m in rows if m.startswith("auc/")} == {"auc/effusion", "auc/nodules"}


# --------------------------------------------------------------------------------------- mistakes


def changed(**changes):
    return {**POS_NEG, **changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": changed(d=POS_NEG["a"])}, "'fruit' are for 'd', which is no class of 'toy/t"),
        ({"classes": {"a": POS_NEG["a"]}}, "none for b, c; choose classes among a"),
        ({"classes": {}}, "classes is empty"),
        ({"classes": None}, "classes is None"),
        ({"classes": changed(a={"positive": ["x"]})}, "class 'a', negative is None"),
        ({"classes": changed(a={**POS_NEG["a"], "neutral": ["x"]})}, "class 'a' has 'neutral'"),
        ({"classes": changed(a={"positive": ["x"], "negative": [" "]})}, "has the prompt ' '"),
        ({"classes": changed(a={"positive": ["x"], "negative": ["x"]})}, "as positive and as neg"),
        ({"classes": changed(a={"positive": ["x", "x"], "negative": ["y"]})}, "has 'x' twice"),
        ({"classes": changed(a=["apple"])}, "class 'a' is .'apple'.; valid: an object"),
        ({"templates": ["a fruit"]}, "template 'a fruit' must have '{}' once"),
        ({"templates": []}, "templates is .*; valid: a list"),
        ({"mode": "multi_class"}, "mode 'multi_class': did you mean 'multiclass'"),
        ({"version": None}, "version is None"),
        ({"version": 1}, "version is 1; valid: a text"),
        ({"author": "me"}, "'author': valid: about, classes"),
        ({"templates": ["{} seen seen seen seen"]}, "'apple seen seen seen seen' has more than 6"),
    ],
)
def test_a_prompt_file_that_cannot_work_is_named(toy, mesh, vocabulary, tmp_path, change, said):
    toy()
    with pytest.raises(UserError, match=said) as error:
        make(mesh, vocabulary, write(tmp_path, **change))
    assert "fruit" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "the file is .*; valid: an object"),
        ('{"name": "a", "name": "b"}', "has the key 'name' twice"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, said):
    (tmp_path / "fruit.json").write_text(text)
    with pytest.raises(UserError, match=said):
        prompts.load(tmp_path / "fruit.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aggregate": "mean"}, "aggregate='mean': "),
        ({"temperature": 0.0}, "temperature=0.0: valid: above 0"),
        ({"average": "features"}, "average='features': valid: scores"),
        ({"checkpoints": ("nowhere",)}, "'nowhere', which is no folder"),
        ({"prompts": "nowhere.json"}, "there is no such file"),
        ({"interval": "delongs"}, "did you mean 'delong'"),
    ],
)
def test_settings_that_cannot_work_are_named(toy, mesh, vocabulary, tmp_path, change, said):
    toy()
    with pytest.raises(UserError, match=said):
        make(mesh, vocabulary, write(tmp_path), **change)


def test_the_mode_fits_the_task(toy, mesh, vocabulary, tmp_path):
    toy("single_label")
    with pytest.raises(UserError, match="mode pos_neg, for data of task multi_label, and 'toy/te"):
        make(mesh, vocabulary, write(tmp_path))


def test_representations_of_two_widths(toy, mesh, vocabulary, tmp_path):
    toy()
    narrow = ("text", lambda state, batch: of_texts(state, batch)[:, :8])
    evaluator = make(mesh, vocabulary, write(tmp_path), query_representation=narrow)
    with pytest.raises(UserError, match="'image' is 16 wide and query_representation 'text' 8"):
        next(evaluator.run(state_of(), "x"))


# ----------------------------------------------------------------------------------- real networks


@pytest.mark.parametrize("name", ["chestxray14", "chest_pneumonia", "synthetic_phantom"])
def test_the_prompts_that_come_with_it(name):
    found = prompts.load(f"configs/prompts/{name}.json")
    assert found.name == name
    texts = {t for groups in found.of_class.values() for group in groups for t in group}
    assert not any("no no " in text.lower() for text in texts)
    if name == "chestxray14":
        assert len(found.of_class) == 15 and "no pleural effusion" in found.of_class["Effusion"][1]
        assert "no acute cardiopulmonary process" in found.of_class["No Finding"][0]


PHANTOM = "{workdir}/data/phantom"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"query_representation": "image"}, "='image': prompts need one of texts, .*; valid: text"),
        ({"query_representation": "txt"}, "did you mean 'text'"),
        ({"classes": ("effusio",)}, "did you mean 'effusion'"),
        ({"test": common.source(PHANTOM, "train")}, "disjoint"),
        ({"text": common.text(f"{PHANTOM}/vocab.txt", lower_case=False)}, "is another tokeniser"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tmp_path, change, said):
    config = convirt.get_config("smoke")
    config.stages, config.evaluate = ("convirt",), ()
    common.add_zero_shot(config, PHANTOM, "synthetic_phantom")
    settings = {**config.evaluator.zero_shot, **change}
    config.evaluator.zero_shot = ConfigDict(settings)
    with pytest.raises(UserError, match=said):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
    assert not list(tmp_path.rglob("checkpoints/*"))


def test_it_needs_a_text_tower(tmp_path):
    config = common.smoke(common.base())
    config.evaluate = ()
    config.stages = ("untrained",)
    config.stage.untrained = common.stage(steps=0)
    common.add_zero_shot(config, PHANTOM, "synthetic_phantom")
    with pytest.raises(UserError, match="need one of texts, of objective 'simclr'; valid: .none."):
        curriculum.run(config.lock(), tmp_path, stop=lambda: False)
