"""Backbones and heads: sizes, shapes, equivalence of their switches, and PyTorch's numbers."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmed import sharding, tree
from bigmed.errors import UserError
from bigmed.models import heads, positions, resnet, vit

TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"
RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
RESNETS |= {152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


def sizes(model, channels=3, size=224):
    """Numbers of parameters and of running statistics, without computing anything."""
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    count = {k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in variables.items()}
    return count["params"], count.get("batch_stats", 0)


def convolutions(depth, width, sk, channels=3):
    """[(kernel size, in, out, whether a norm follows)] of a ResNet, written out from the papers."""
    w = 64 * width
    if sk:
        convs = [(3, channels, w // 2, 1), (3, w // 2, w // 2, 1), (3, w // 2, w, 1)]
    else:
        convs = [(7, channels, w, 1)]
    inputs = w
    for stage, blocks in enumerate(RESNETS[depth]):
        c = w * 2**stage
        for block in range(blocks):
            if depth < 50:
                convs += [(3, inputs, c, 1), (3, c, c, 1)]
                convs += [(1, inputs, c, 1)] if inputs != c else []
                inputs = c
                continue
            convs += [(1, inputs, c, 1), (1, c, 4 * c, 1)]
            if sk:
                squeezed = max(c // 16, 32)
                convs += [(3, c, 2 * c, 1), (1, c, squeezed, 1), (1, squeezed, 2 * c, 0)]
            else:
                convs += [(3, c, c, 1)]
            convs += [(1, inputs, 4 * c, 1)] if block == 0 else []
            inputs = 4 * c
    return convs


@pytest.mark.parametrize(
    ("depth", "width", "sk", "published", "with_classifier"),
    [
        # million parameters: torchvision's 1000-class models
        (18, 1, False, 11.690, True),
        (34, 1, False, 21.798, True),
        (50, 1, False, 25.557, True),
        (101, 1, False, 44.549, True),
        (152, 1, False, 60.193, True),
        (200, 1, False, 64.674, True),
        # the table of SimCLR v2's README: whole millions, running statistics counted, no classifier
        (50, 1, False, 24, False),
        (50, 1, True, 35, False),
        (50, 2, False, 94, False),
        (50, 2, True, 140, False),
        (101, 1, False, 43, False),
        (101, 1, True, 65, False),
        (101, 2, False, 170, False),
        (101, 2, True, 257, False),
        (152, 1, False, 58, False),
        (152, 1, True, 89, False),
        (152, 2, False, 233, False),
        (152, 2, True, 354, False),
        (152, 3, True, 795, False),
    ],
)
def test_resnet_parameter_counts(depth, width, sk, published, with_classifier):
    model = resnet.Model(depth, width, sk_ratio=0.0625 * sk, resnet_d=sk)
    params, stats = sizes(model)
    convs = convolutions(depth, width, sk)
    normed = sum(o for _, _, o, norm in convs if norm)
    assert params == sum(k * k * i * o for k, i, o, _ in convs) + 2 * normed
    assert stats == 2 * normed
    if with_classifier:
        params += (model.feature_dim + 1) * 1000
        assert params / 1e6 == pytest.approx(published, abs=6e-4)
    else:
        assert round((params + stats) / 1e6) == published


@pytest.mark.parametrize(
    ("variant", "width", "depth", "mlp", "published", "with_classifier"),
    [
        ("Ti/16", 192, 12, 768, 5.5, None),
        ("S/16", 384, 12, 1536, 21.67, 22.05),
        ("B/16", 768, 12, 3072, 85.8, 86.57),
        ("L/16", 1024, 24, 4096, 303.3, 304.33),
        ("H/14", 1280, 32, 5120, 630.8, 632.05),
        ("g/14", 1408, 40, 6144, 1011, None),
    ],
)
def test_vit_parameter_counts(variant, width, depth, mlp, published, with_classifier):
    patch = int(variant.split("/")[1])
    block = 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width + 4 * width
    codes = (224 // patch) ** 2 + 1
    expected = (3 * patch**2 + 1) * width + (codes + 1) * width + depth * block + 2 * width
    assert sizes(vit.Model(variant)) == (expected, 0)
    if variant == "Ti/16":
        without_tokens = vit.Model(variant, pool="gap", position="sincos2d")
        assert sizes(without_tokens)[0] == expected - (codes + 1) * width
    assert expected / 1e6 == pytest.approx(published, rel=0.005)
    if with_classifier:
        assert (expected + 1000 * (width + 1)) / 1e6 == pytest.approx(with_classifier, abs=0.01)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Networks of two blocks, quick to compile, and a transformer of three."""
    monkeypatch.setitem(resnet.VARIANTS, 6, ((1, 0, 0, 1), False))
    monkeypatch.setitem(resnet.VARIANTS, 8, ((1, 0, 0, 1), True))
    monkeypatch.setitem(vit.VARIANTS, "deep", vit.Size(16, 3, 32, 2))


def random_variables(model, x):
    """Values for a model's variables such that no branch is dead and no norm is degenerate."""
    rng = np.random.default_rng(1)

    def draw(name, leaf):
        role = name.split("/")[-1]
        if role == "kernel":
            fan_in = leaf.size / leaf.shape[-1]
            return rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in, dtype=np.float32)
        low = {"scale": 0.5, "var": 0.5}.get(role, -0.2)
        return rng.uniform(low, low + 0.5, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    return jax.tree.map(jnp.asarray, tree.map_with_name(draw, shapes))


def prepare(model, size=32, channels=3, batch=2):
    """Random images and variables."""
    x = jnp.asarray(np.random.default_rng(0).random((batch, size, size, channels), np.float32))
    return x, random_variables(model, x)


@pytest.mark.parametrize(
    ("model", "size", "channels", "map_size", "dim"),
    [
        (resnet.Model(6), 33, 1, 5, 512),
        (resnet.Model(6, stem="small", width=2), 16, 3, 8, 1024),
        (resnet.Model(8, sk_ratio=0.0625, resnet_d=True), 32, 3, 4, 2048),
        (vit.Model("mu/8"), 24, 1, 3, 32),
        (vit.Model("mu/4", pool="gap", position="sincos2d"), 12, 3, 3, 32),
        (
            vit.Model("mu/8", distillation=True, registers=3, layer_scale=0.1, mlp="swiglu"),
            24,
            3,
            3,
            32,
        ),
    ],
    ids=["basic", "small-stem-x2", "sk", "vit-cls", "vit-gap", "vit-all"],
)
def test_outputs(model, size, channels, map_size, dim):
    for dtype in (jnp.float32, jnp.bfloat16):
        typed = model.clone(dtype=dtype)
        x, variables = prepare(typed, size, channels)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        apply = jax.jit(lambda v, x, typed=typed: typed.apply(v, x, train=False))
        features, aux = apply(variables, x)
        assert features.shape == (2, dim) and features.dtype == jnp.float32
        assert typed.feature_dim == dim
        assert aux["feature_map"].shape == (2, map_size, map_size, dim)
        assert aux["feature_map"].dtype == dtype
        assert np.all(np.isfinite(features))


@pytest.mark.parametrize(("depth", "last"), [(6, 2), (8, 3)])
def test_resnet_names_and_zero_scales(depth, last):
    model = resnet.Model(depth)
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(x)["params"]
    names = tree.flatten(params)
    for name in (
        "stem/conv/kernel",
        "stem/norm/bias",
        "stage1/block1/conv1/kernel",
        "stage4/block1/shortcut/conv/kernel",
        f"stage4/block1/norm{last}/scale",
    ):
        assert name in names
    zero = {name for name, leaf in names.items() if name.endswith("scale") and not np.any(leaf)}
    assert zero == {f"stage{s}/block1/norm{last}/scale" for s in (1, 4)}


def loss_and_grads(model, variables, x, train=True):
    def loss(params):
        (y, _), _ = model.apply(
            {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(3 * y))

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


def assert_trees_close(found, expected, rtol):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for name in found:
        scale = np.max(np.abs(expected[name])) + 1e-6
        difference = np.max(np.abs(np.asarray(found[name]) - np.asarray(expected[name])))
        assert difference <= rtol * scale, name


@pytest.mark.parametrize(
    "model", [resnet.Model(6, stem="small"), vit.Model("mu/8")], ids=["resnet", "vit"]
)
def test_remat_changes_neither_names_nor_results(model):
    x, variables = prepare(model, 16)
    found = loss_and_grads(model.clone(remat=True), variables, x)
    assert_trees_close(found, loss_and_grads(model, variables, x), rtol=1e-3)


def test_scan_changes_neither_names_nor_results():
    model = vit.Model("deep/8", registers=2, layer_scale=0.1, mlp="swiglu")
    x, variables = prepare(model, 16)
    expected = loss_and_grads(model, variables, x)
    for remat in (False, True):
        scanned = model.clone(scan=True, remat=remat)
        names = jax.eval_shape(lambda x, m=scanned: m.init(jax.random.key(0), x, train=False), x)
        assert list(tree.flatten(names)) == list(tree.flatten(variables))
        found = loss_and_grads(scanned, variables, x)
        assert_trees_close(found, expected, rtol=1e-3)
        program = str(jax.make_jaxpr(lambda v, m=scanned: m.apply(v, x, train=True))(variables))
        # one block for all but the last, which has its class token and the others apart
        assert program.count("logistic") == 1 + 2
        assert ("remat" in program or "checkpoint" in program) == remat
    key = jax.random.key(0)
    init = jax.jit(lambda x: scanned.init(key, x, train=False))(x)["params"]
    first, second = (init[f"block{i}"]["mlp"]["up"]["kernel"] for i in (1, 2))
    assert not np.allclose(first, second)  # every block is drawn anew


@pytest.mark.parametrize("stage", [0, 2, 4])
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(stage):
    model = resnet.Model(6, stem="small", train_after_stage=stage)
    x, variables = prepare(model, 16)
    _, grads = loss_and_grads(model, variables, x)
    _, mutated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    frozen = ("stem", *(f"stage{i}" for i in range(1, stage + 1)))
    for name, grad in grads.items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(grad)) == (name not in frozen)
        changed = jax.tree.map(
            lambda new, old: bool(np.any(new != old)),
            mutated["batch_stats"][name],
            variables["batch_stats"][name],
        )
        assert all(jax.tree.leaves(changed)) == (name not in frozen)


@pytest.mark.parametrize(
    ("model", "rules"),
    [
        (resnet.Model(6, stem="small"), resnet.SHARDING),
        (vit.Model("mu/8"), vit.SHARDING),
        (vit.Model("deep/8", scan=True, mlp="swiglu"), vit.SHARDING),
    ],
    ids=["resnet", "vit", "vit-scan"],
)
def test_a_mesh_does_not_change_loss_or_gradients(model, rules):
    x, variables = prepare(model, 16, batch=8)
    expected = loss_and_grads(model, variables, x)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = sharding.tree_shardings(variables, mesh, rules)
    used = {axis for s in jax.tree.leaves(shardings) for axis in s.spec if axis}
    assert used == ({"fsdp", "tensor"} if rules else {"fsdp"})
    placed = jax.device_put(variables, shardings)
    found = loss_and_grads(model, placed, jax.device_put(x, sharding.batch_sharding(mesh)))
    assert_trees_close(found, expected, rtol=1e-3)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_tensor_rules_split_heads_and_hidden_units(mlp):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, variables = prepare(vit.Model("mu/8", mlp=mlp), 16)
    names = tree.flatten(sharding.tree_shardings(variables["params"], mesh, vit.SHARDING))
    gate = (None,) if mlp == "swiglu" else ()
    for leaf, spec in {
        "attention/qkv/kernel": ("fsdp", None, "tensor", None),
        "attention/qkv/bias": (None, "tensor", None),
        "attention/out/kernel": ("tensor", None, "fsdp"),
        "mlp/up/kernel": ("fsdp", *gate, "tensor"),
        "mlp/up/bias": (*gate, "tensor"),
        "mlp/down/kernel": ("tensor", "fsdp"),
    }.items():
        assert tuple(names[f"block1/{leaf}"].spec) == spec


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3, 4])
def test_projection_head(num_layers):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)
    head = heads.ProjectionHead(num_layers, out_dim=3)
    variables = random_variables(head, x)
    if not num_layers:
        assert not jax.tree.leaves(variables)
    (z, layers), _ = head.apply(variables, x, train=True, mutable=["batch_stats"])
    assert len(layers) == num_layers + 1
    y = np.asarray(x, np.float64)
    for k in range(num_layers + 1):
        np.testing.assert_allclose(layers[k], y, rtol=2e-3, atol=2e-4)
        if k == num_layers:
            break
        params = variables["params"]
        dense, norm = jax.tree.map(np.asarray, (params[f"dense{k + 1}"], params[f"norm{k + 1}"]))
        last = k + 1 == num_layers
        assert set(dense) == {"kernel"} and set(norm) == ({"scale"} if last else {"scale", "bias"})
        assert dense["kernel"].shape == (6, 3 if last else 6)
        y = y @ dense["kernel"].astype(np.float64)
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * norm["scale"]
        y = y if last else np.maximum(y + norm["bias"], 0)
    np.testing.assert_array_equal(z, layers[-1])
    np.testing.assert_array_equal(heads.select_layer(layers, 0), x)
    np.testing.assert_array_equal(heads.select_layer(layers, -1), z)
    with pytest.raises(UserError, match=f"head layer {num_layers + 1} .* to {num_layers},"):
        heads.select_layer(layers, num_layers + 1)


def test_hidden_width_and_linear_head():
    x = jnp.ones((4, 6))
    head = heads.ProjectionHead(3, hidden_dim=10)
    params = head.init(jax.random.key(0), x, train=False)["params"]
    shapes = [params[f"dense{k}"]["kernel"].shape for k in (1, 2, 3)]
    assert shapes == [(6, 10), (10, 10), (10, 128)]
    x = jnp.ones((4, 600), jnp.bfloat16)
    params = heads.LinearHead(50).init(jax.random.key(0), x)["params"]
    assert np.std(params["kernel"]) == pytest.approx(0.01, rel=0.05) and not np.any(params["bias"])
    logits = heads.LinearHead(50).apply({"params": params}, x)
    np.testing.assert_allclose(logits[0], np.sum(params["kernel"], 0), rtol=1e-4, atol=1e-5)
    assert logits.dtype == jnp.float32
    zero = heads.LinearHead(50, zero_init=True).init(jax.random.key(0), x)["params"]["kernel"]
    assert not np.any(zero)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (resnet.Model(51), "config.model.depth=51: valid: 18, 34"),
        (resnet.Model(stem="large"), "config.model.stem='large'"),
        (resnet.Model(width=0), "config.model.width=0"),
        (resnet.Model(18, sk_ratio=0.1), "needs a bottleneck"),
        (resnet.Model(train_after_stage=5), "config.model.train_after_stage=5"),
        (vit.Model("Q/16"), "config.model.variant='Q/16'"),
        (vit.Model("S"), "lacks a patch size"),
        (vit.Model("S/16", pool="max"), "config.model.pool='max'"),
        (vit.Model("S/16", position="rope"), "config.model.position='rope'"),
        (vit.Model("S/16", mlp="glu"), "config.model.mlp='glu'"),
        (vit.Model("S/16", registers=-1), "config.model.registers=-1"),
        (vit.Model("S/16", pool="gap", distillation=True), "config.model.distillation=True"),
        (vit.Model("mu/5"), "images of 32x32 .* multiple of 5"),
        (heads.ProjectionHead(5), "head_layers=5"),
    ],
)
def test_mistakes_are_named(model, message):
    x = jnp.zeros((2, 32, 32, 3))
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0), x, train=False)


def test_sincos2d():
    codes = positions.sincos2d(2, 3, 8)
    assert codes.shape == (6, 8)
    y, x = 1, 2
    frequencies = np.array([1.0, 1e-4])
    parts = (np.sin(x * frequencies), np.cos(x * frequencies), np.sin(y * frequencies))
    expected = np.concatenate([*parts, np.cos(y * frequencies)])
    np.testing.assert_allclose(codes[y * 3 + x], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit-s16"])
def test_forward_equals_pytorch(name, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    monkeypatch.syspath_prepend(str(TOOLS))
    torch_models = __import__("torch_models")
    # 66 px: the stem's output of 33 px is odd, where PyTorch's padding of the pooling is SAME's
    size = 32 if name.startswith("vit") else 66
    model = {"vit-s16": vit.Model("S/16")}.get(name) or resnet.Model(int(name[6:]))
    x, variables = prepare(model, size)
    encoder = torch_models.simclr(name, size)[0].eval()
    torch_models.load_encoder(encoder, **jax.tree.map(np.asarray, variables))
    found, _ = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    with torch.no_grad():
        expected = encoder(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.max(np.abs(expected)))
    sys.modules.pop("torch_models")
