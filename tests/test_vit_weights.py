"""Vision Transformers against transformers: features, gradients, names both ways, positions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from bigmed import tree
from bigmed.convert import mapping
from bigmed.convert import vit as table
from bigmed.errors import UserError
from bigmed.models import vit
from bigmed.models.positions import resample_positions

SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZE |= {"image_size": 24, "patch_size": 8}
DINOV2 = {"variant": "small/8", "layer_scale": 0.5}
# class, its config, the model that it is here
CASES = {
    "vit": ("ViT", {"intermediate_size": 192}, {"variant": "small/8", "norm_eps": 1e-12}),
    "deit": (
        "DeiT",
        {"intermediate_size": 192},
        {"variant": "small/8", "norm_eps": 1e-12, "distillation": True},
    ),
    "dinov2": ("Dinov2", {"layerscale_value": 0.5}, DINOV2),
    "swiglu": (
        "Dinov2",
        {"layerscale_value": 0.5, "use_swiglu_ffn": True},
        {**DINOV2, "mlp": "swiglu"},
    ),
    "registers": (
        "Dinov2WithRegisters",
        {"layerscale_value": 0.5, "num_register_tokens": 4},
        {**DINOV2, "registers": 4},
    ),
}


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "small", vit.Size(48, 2, 192, 3))


def build(section):
    return vit.Model(**{key: value for key, value in section.items() if key != "name"})


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """case -> (transformers' model, tensors of its file, its config.json)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.numpy")
    made = {}

    def make(case):
        if case not in made:
            kind, config, _ = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            config = getattr(transformers, f"{kind}Config")(**SIZE, **config)
            model = parity.randomise(getattr(transformers, f"{kind}Model")(config))
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    if "lambda1" in name:
                        tensor.add_(1)  # LayerScale lets the branches through
            model.save_pretrained(folder)
            state = safetensors.load_file(folder / "model.safetensors")
            made[case] = model, state, json.loads((folder / "config.json").read_text())
        return made[case]

    return make


def images(height=24, width=24):
    return np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)


def torch_features(model, x):
    """Class token, map of patches [B, h, w, D], gradient of the class token's sines by x."""
    import torch

    x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    same = tuple(x.shape[2:]) == (24, 24)
    options = {} if same or "Dinov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    tokens = model(x, **options).last_hidden_state
    (grad,) = torch.autograd.grad(tokens[:, 0].sin().sum(), x)
    h, w = (side // 8 for side in x.shape[2:])
    patches = tokens[:, -h * w :].reshape(2, h, w, -1)
    return [t.detach().numpy() for t in (tokens[:, 0], patches, grad.permute(0, 2, 3, 1))]


def our_features(model, variables, x):
    def value(x):
        features, aux = model.apply(variables, x, train=False)
        return jnp.sum(jnp.sin(features)), (features, aux["feature_map"])

    (_, outputs), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(x)
    return [*outputs, grad]


def assert_close(found, expected):
    for name, a, b in zip(("features", "feature map", "gradient"), found, expected, strict=True):
        assert a.shape == b.shape
        difference = np.max(np.abs(np.asarray(a) - b))
        print(f"{name}: maximum {np.max(np.abs(b)):.3g}, difference {difference:.2g}")
        assert difference <= 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_features_and_gradients_equal_transformers(case, foreign):
    reference, state, config = foreign(case)
    section = table.from_description(config)
    assert section == {"name": "vit", **CASES[case][2]}
    model = build(section)
    variables, left_over, fresh = parity.load(
        table, model, "huggingface", state, parity.image_spec(24)
    )
    unused = ["pooler.dense.bias", "pooler.dense.weight"]
    assert not fresh
    assert left_over == (unused if case in ("vit", "deit") else ["embeddings.mask_token"])
    expected = torch_features(reference, images())
    assert np.std(expected[0]) > 0.5
    assert_close(our_features(model, variables, images()), expected)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_an_export(case, foreign, tmp_path):
    torch, save_file = pytest.importorskip("torch"), __import__("safetensors.numpy").numpy.save_file
    reference, state, config = foreign(case)
    model = build(table.from_description(config))
    shapes = shapes_of(model, 24)
    entries = table.entries(model, "huggingface")
    leaves, _, _ = mapping.to_ours(state, entries, shapes)
    exported = mapping.to_theirs(leaves, entries)
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    description = table.describe(model, "huggingface", shapes)
    (tmp_path / "config.json").write_text(json.dumps(description))
    loaded, report = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    assert missing == ({"embeddings.mask_token"} if case == "registers" else set())
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    x = torch.tensor(images()).permute(0, 3, 1, 2)
    with torch.no_grad():
        found, expected = (m.eval()(x).last_hidden_state for m in (loaded, reference))
    assert torch.equal(found, expected)


def shapes_of(model, size, channels=3):
    leaves = parity.abstract_leaves(model, parity.image_spec(size, channels))
    return {path: leaf.shape for path, leaf in leaves.items()}


# The same weights under other names, written out apart from the table under test.


def as_timm(state, model, naming):
    """transformers' DeiT or DINOv2 as timm or facebook name it."""
    dinov2 = model.layer_scale > 0
    out = {"cls_token": state["embeddings.cls_token"]}
    codes = state["embeddings.position_embeddings"]
    if model.distillation:
        out["dist_token"] = state["embeddings.distillation_token"]
    if model.registers:
        registers = state["embeddings.register_tokens"]
        out["reg_token" if naming == "timm" else "register_tokens"] = registers
        if naming == "timm" and model.cls_position:
            codes = np.concatenate([codes[:, :1], 0 * registers, codes[:, 1:]], axis=1)
    out["pos_embed"] = codes if model.cls_position else codes[:, 1:]
    mlp = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")
    mlp_there = ("mlp.fc1", "mlp.fc2")
    if model.mlp == "swiglu":
        mlp = ("mlp.weights_in", "mlp.weights_out")
        mlp_there = mlp_there if naming == "timm" else ("mlp.w12", "mlp.w3")
    norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    for kind in ("weight", "bias"):
        out[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        out[f"norm.{kind}"] = state[f"layernorm.{kind}"]
        for i in range(2):
            a, b = f"encoder.layer.{i}.", f"blocks.{i}."
            parts = [f"{a}attention.attention.{p}.{kind}" for p in ("query", "key", "value")]
            out[f"{b}attn.qkv.{kind}"] = np.concatenate([state[part] for part in parts])
            out[f"{b}attn.proj.{kind}"] = state[f"{a}attention.output.dense.{kind}"]
            for k in (0, 1):
                out[f"{b}norm{k + 1}.{kind}"] = state[f"{a}{norms[k]}.{kind}"]
                out[f"{b}{mlp_there[k]}.{kind}"] = state[f"{a}{mlp[k]}.{kind}"]
                if dinov2:
                    gamma = state[f"{a}layer_scale{k + 1}.lambda1"]
                    out[f"{b}ls{k + 1}.gamma"] = gamma
    return out


def as_npz(state, attention, norm2, mlp, codes):
    """transformers' ViT as vit_jax and big_vision name it; `codes` names its position codes."""
    out = {"cls": state["embeddings.cls_token"], **codes}

    def dense(theirs, name, shape):
        out[f"{theirs}/kernel"] = state[f"{name}.weight"].T.reshape(shape)
        out[f"{theirs}/bias"] = state[f"{name}.bias"].reshape(shape[1:] if "query" in name else -1)

    def norm(theirs, name):
        out[f"{theirs}/scale"], out[f"{theirs}/bias"] = (
            state[f"{name}.weight"],
            state[f"{name}.bias"],
        )

    patches = "embeddings.patch_embeddings.projection"
    out["embedding/kernel"] = np.einsum("dchw->hwcd", state[f"{patches}.weight"])
    out["embedding/bias"] = state[f"{patches}.bias"]
    norm("Transformer/encoder_norm", "layernorm")
    for i in range(2):
        a, b = f"encoder.layer.{i}.", f"Transformer/encoderblock_{i}/"
        attend = f"{b}MultiHeadDotProductAttention_{attention}/"
        for part in ("query", "key", "value"):
            name = f"{a}attention.attention.{part}"
            out[f"{attend}{part}/kernel"] = state[f"{name}.weight"].T.reshape(48, 3, 16)
            out[f"{attend}{part}/bias"] = state[f"{name}.bias"].reshape(3, 16)
        dense(f"{attend}out", f"{a}attention.output.dense", (3, 16, 48))
        norm(f"{b}LayerNorm_0", f"{a}layernorm_before")
        norm(f"{b}LayerNorm_{norm2}", f"{a}layernorm_after")
        dense(f"{b}MlpBlock_{mlp}/Dense_0", f"{a}intermediate.dense", (48, 192))
        dense(f"{b}MlpBlock_{mlp}/Dense_1", f"{a}output.dense", (192, 48))
    return out


def equal_leaves(model, naming, state, expected):
    """Loads both ways (`parity.load` checks the way back) and compares bits."""
    spec = parity.image_spec(24)
    variables, left_over, fresh = parity.load(table, model, naming, state, spec)
    assert not left_over and not fresh
    for path, leaf in tree.flatten(variables).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize(
    ("case", "naming"),
    [
        ("vit", "timm"),
        ("deit", "timm"),
        ("dinov2", "timm"),
        ("dinov2", "dinov2"),
        ("swiglu", "timm"),
        ("swiglu", "dinov2"),
        ("registers", "timm"),
        ("registers", "dinov2"),
        ("vit", "npz"),
        ("vit", "big_vision"),
    ],
)
def test_other_namings_hold_the_same_weights(case, naming, foreign):
    _, state, config = foreign(case)
    model = build(table.from_description(config))
    entries = table.entries(model, "huggingface")
    leaves, _, _ = mapping.to_ours(state, entries, shapes_of(model, 24))
    if naming in ("timm", "dinov2"):
        return equal_leaves(model, naming, as_timm(state, model, naming), leaves)
    codes = leaves["params/pos_embedding"]
    if naming == "npz":
        renamed = {"Transformer/posembed_input/pos_embedding": codes}
        return equal_leaves(model, naming, as_npz(state, 1, 2, 3, renamed), leaves)
    # big_vision gives the class token no code
    leaves["params/pos_embedding"] = codes[:, 1:]
    renamed = {"pos_embedding": codes[:, 1:]}
    model = model.clone(cls_position=False)
    return equal_leaves(model, naming, as_npz(state, 0, 1, 0, renamed), leaves)


def test_timm_registers_have_no_code(foreign):
    """As timm's own files have it: no code for the class token, so none for the registers."""
    _, state, config = foreign("registers")
    coded = build(table.from_description(config))
    model = coded.clone(cls_position=False)
    entries = table.entries(coded, "huggingface")
    leaves, _, _ = mapping.to_ours(state, entries, shapes_of(coded, 24))
    leaves["params/pos_embedding"] = leaves["params/pos_embedding"][:, 1:]
    equal_leaves(model, "timm", as_timm(state, model, "timm"), leaves)
    # a code for a register cannot be kept
    theirs = as_timm(state, coded, "timm")
    theirs["pos_embed"][:, 2] = 1
    with pytest.raises(UserError, match="codes of register tokens are not 0"):
        mapping.to_ours(theirs, table.entries(coded, "timm"), shapes_of(coded, 24))
    # without its own code, the class token takes it over: the same features
    variables = tree.unflatten(leaves)
    full, _, _ = parity.load(table, coded, "huggingface", state, parity.image_spec(24))
    params = variables["params"]
    params["cls"] = params["cls"] + full["params"]["pos_embedding"][:, :1]  # not in place: a view
    found, expected = (
        jax.jit(lambda v, m=m: m.apply(v, images(), train=False)[0])(v)
        for m, v in ((model, variables), (coded, full))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (9, 9)), ((5, 5), (16, 16)), ((7, 7), (4, 11)), ((4, 6), (6, 4))]
)
def test_positions_equal_pytorch(old, new, antialias):
    torch = pytest.importorskip("torch")
    codes = np.random.default_rng(0).standard_normal((1, 2 + old[0] * old[1], 6)).astype(np.float32)
    # in float64: PyTorch's own float32 is off by 3e-6
    grid = torch.tensor(codes[:, 2:]).double().reshape(1, *old, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, size=new, mode="bicubic", align_corners=False, antialias=antialias
    )
    found = resample_positions(codes, old, new, 2, antialias=antialias)
    np.testing.assert_array_equal(found[:, :2], codes[:, :2])
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    np.testing.assert_allclose(found[:, 2:], expected, atol=3e-7)
    assert found.dtype == np.float32
    other = resample_positions(codes, old, new, 2, antialias=not antialias)
    assert np.max(np.abs(other - found)) > 0.01  # the two forms are not the same
    assert resample_positions(codes, old, old, 2, antialias=antialias) is codes
    with pytest.raises(UserError, match="are not those of 1 tokens and"):
        resample_positions(codes, old, new, 1, antialias=antialias)


@pytest.mark.parametrize("case", ["vit", "dinov2", "registers"])
def test_another_resolution_equals_transformers(case, foreign):
    reference, state, config = foreign(case)
    model = build(table.from_description(config))
    x = images(40, 24)
    fitted = table.fit_positions(state, model, "huggingface", x.shape[1:3])
    codes = "embeddings.position_embeddings"
    assert fitted.keys() == state.keys() and fitted[codes].shape == (1, 1 + 5 * 3, 48)
    same = table.fit_positions(state, model, "huggingface", (24, 24))
    assert same[codes] is state[codes]
    spec = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    variables, _, _ = parity.load(table, model, "huggingface", fitted, spec)
    assert_close(our_features(model, variables, x), torch_features(reference, x))


@pytest.mark.parametrize("naming", ["timm", "dinov2"])
def test_positions_fit_below_register_codes(naming, foreign):
    _, state, config = foreign("registers")
    model = build(table.from_description(config))
    there = as_timm(state, model, naming)
    fitted = table.fit_positions(there, model, naming, (32, 32))
    shapes = shapes_of(model, 32)
    leaves, _, fresh = mapping.to_ours(fitted, table.entries(model, naming), shapes)
    expected = resample_positions(
        state["embeddings.position_embeddings"], (3, 3), (4, 4), 1, antialias=True
    )
    assert not fresh
    np.testing.assert_array_equal(leaves["params/pos_embedding"], expected)
    fixed = model.clone(position="sincos2d")
    with pytest.raises(UserError, match="config.model.position=sincos2d"):
        table.fit_positions(there, fixed, naming, (32, 32))


def test_stems_for_grey_images(foreign):
    _, state, config = foreign("dinov2")
    model = build(table.from_description(config))
    entries, shapes = table.entries(model, "huggingface"), shapes_of(model, 24)
    leaves, _, _ = mapping.to_ours(state, entries, shapes)
    kernel = mapping.refold_stem(leaves[table.STEM], 3, 1)
    assert kernel.shape == shapes_of(model, 24, channels=1)[table.STEM]
    grey = images()[..., :1]
    encode = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])
    expected = encode(tree.unflatten(leaves), np.repeat(grey, 3, axis=3))
    found = encode(tree.unflatten({**leaves, table.STEM: kernel}), grey)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # and out again as one channel
    exported = mapping.to_theirs({**leaves, table.STEM: kernel}, entries)
    summed = state["embeddings.patch_embeddings.projection.weight"].sum(1, keepdims=True)
    stem = exported["embeddings.patch_embeddings.projection.weight"]
    np.testing.assert_allclose(stem, summed, atol=1e-6)
    described = table.describe(model, "huggingface", shapes_of(model, 40, channels=1))
    assert (described["num_channels"], described["image_size"]) == (1, 40)


def test_a_tensor_of_another_shape_names_both_sides(foreign):
    _, state, config = foreign("dinov2")
    model = build(table.from_description(config))
    entries, shapes = table.entries(model, "huggingface"), shapes_of(model, 24)
    for name, ours in (
        ("encoder.layer.1.attention.attention.key.weight", "block2/attention/qkv/kernel"),
        ("encoder.layer.0.mlp.fc1.weight", "block1/mlp/up/kernel"),
        ("embeddings.position_embeddings", "pos_embedding"),
        ("embeddings.patch_embeddings.projection.weight", "patches/kernel"),
    ):
        wrong = {**state, name: np.swapaxes(state[name], 0, 1)[..., :-1]}
        with pytest.raises(UserError, match=f"'{name}' .* does not fit 'params/{ours}'"):
            mapping.to_ours(wrong, entries, shapes)
    # a dense layer the other way round has as many numbers, but is refused
    name = "encoder.layer.0.mlp.fc1.weight"
    with pytest.raises(UserError, match="does not fit"):
        mapping.to_ours({**state, name: state[name].T}, entries, shapes)
