"""DenseNet: published sizes, PyTorch's numbers, names in and out, equal switches."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from bigmed import sharding, tree
from bigmed.convert import densenet as convert
from bigmed.convert import mapping
from bigmed.errors import UserError
from bigmed.models import densenet, layers

# with the classifier of 1000 classes, from torchvision's table
PUBLISHED = {121: 7_978_856, 161: 28_681_000, 169: 14_149_480, 201: 20_013_928}

SMALL = (16, (2, 1, 1, 1))
TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """A network of five layers, quick to compile."""
    monkeypatch.setitem(densenet.VARIANTS, 14, SMALL)


def torch_features(module, x, direction):
    """Features, and the gradients of <features, direction> by the image and the stem's kernel."""
    import torch

    image = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    features = module(image)
    (features * torch.tensor(direction)).sum().backward()
    kernel = module.features.conv0.weight.grad.permute(2, 3, 1, 0)
    return features.detach().numpy(), image.grad.permute(0, 2, 3, 1).numpy(), kernel.numpy()


def our_features(model, variables, x, direction, train=False):
    def scalar(params, x):
        (y, _), _ = model.apply(
            {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
        )
        return jnp.sum(y @ direction), y

    grads, features = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(variables["params"], x)
    return features, grads[1], grads[0]["stem"]["conv"]["kernel"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def assert_close(found, expected):
    """Within 1e-4 of the features, and of a gradient whose largest element is 1."""
    for name, f, e, scale in (
        ("features", found[0], expected[0], 1.0),
        ("gradient by the image", found[1], expected[1], np.max(np.abs(expected[1]))),
        ("gradient by the stem", found[2], expected[2], np.max(np.abs(expected[2]))),
    ):
        assert f.shape == e.shape and scale > 0
        difference = np.max(np.abs(np.asarray(f) - e)) / scale
        print(f"{name}: {difference:.2e} of {np.max(np.abs(e)):.2g}")
        assert difference <= 1e-4, (name, difference)


@pytest.mark.parametrize(
    ("depth", "size", "train"),
    [(14, 112, True), (121, 65, False)],
)
def test_equals_pytorch(depth, size, train, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is in the extra 'test'")
    monkeypatch.syspath_prepend(str(TOOLS))
    twin = __import__("torch_models").DenseNet(*densenet.VARIANTS[depth])
    module = parity.randomise(twin).train(train)
    for name, tensor in module.state_dict().items():
        # Far from 0, where rounding turns a ReLU and its gradient on or off; less so in training,
        # where large means cost the batch's variances their digits.
        if name.endswith("bias"):
            tensor.copy_((1.5 if train else 3) * tensor.sign())
    model = densenet.Model(depth)
    variables, left_over, fresh = parity.load(
        convert, model, "torchvision", parity.numpy_state(module), parity.image_spec(size)
    )
    assert not fresh
    counters = [name for name in module.state_dict() if name.endswith("num_batches_tracked")]
    assert left_over == sorted([*counters, "classifier.weight", "classifier.bias"])
    x, direction = random(4, size, size, 3), random(model.feature_dim, seed=1)
    found = our_features(model, variables, x, direction, train)
    expected = torch_features(module, x, direction)
    assert 0.1 < np.max(np.abs(expected[0])) < 100
    assert_close(found, expected)


def test_layers_of_published_files_are_renamed():
    entries = [convert.entries(densenet.Model(14), naming) for naming in convert.NAMINGS]
    assert entries[0] == entries[1]
    ours = {name for entry in entries[0] for name in entry.theirs}
    for old, new in (
        (
            "denseblock1.denselayer2.norm.1.running_mean",
            "denseblock1.denselayer2.norm1.running_mean",
        ),
        ("denseblock4.denselayer1.conv.2.weight", "denseblock4.denselayer1.conv2.weight"),
        ("transition1.norm.weight", "transition1.norm.weight"),
        ("norm5.bias", "norm5.bias"),
    ):
        assert f"features.{new}" in ours
        assert convert.plain_names({f"module.features.{old}": 1}) == {f"module.features.{new}": 1}


def test_a_grey_stem_gives_the_same_features():
    colour = tree.unflatten(parity.random_leaves(densenet.Model(14), 32))
    model = densenet.Model(14)
    grey = tree.map_with_name(
        lambda name, leaf: (
            mapping.refold_stem(np.asarray(leaf), 3, 1) if name == convert.STEM else leaf
        ),
        colour,
    )
    x = random(2, 32, 32, 1)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])
    found, expected = apply(grey, x), apply(colour, np.repeat(x, 3, -1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.max(expected) > 0.1


@pytest.fixture(scope="module")
def plain():
    """A model, its variables and images, and loss and gradients on one device without remat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(densenet.VARIANTS, 14, SMALL)
        model = densenet.Model(14, stem="small")
        variables = tree.unflatten(parity.random_leaves(model, 32))
        x = random(16, 16, 16, 3)
        return model, variables, x, loss_and_grads(model, variables, x)


def loss_and_grads(model, variables, x):
    def loss(params):
        (y, _), _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.sin(3 * y))

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


def assert_trees_close(found, expected, rtol):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for name in found:
        scale = np.max(np.abs(expected[name]))
        assert scale > 0, name
        difference = np.max(np.abs(np.asarray(found[name]) - np.asarray(expected[name])))
        assert difference <= rtol * scale, (name, difference / scale)


def test_remat_keeps_memory_linear_in_the_layers(monkeypatch):
    """What the backward pass of a block keeps: each layer's own output, not all before it."""

    def kept(layers_):
        monkeypatch.setitem(densenet.VARIANTS, 15, (16, (layers_, 1, 1, 1)))
        model = densenet.Model(15, stem="small", remat=True)
        variables = tree.unflatten(parity.random_leaves(model, 32))
        x = jnp.asarray(random(2, 16, 16, 3))

        def loss(params):
            return jnp.sum(model.apply({**variables, "params": params}, x, train=False)[0])

        _, saved = jax.eval_shape(lambda p: jax.vjp(loss, p), variables["params"])
        activations = [leaf for leaf in jax.tree.leaves(saved) if leaf.shape[:1] == (2,)]
        return sum(leaf.size for leaf in activations)

    few, more, most = kept(4), kept(8), kept(12)
    assert most - more == more - few


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "fsdp": 2}], ids=["data", "fsdp"])
def test_neither_remat_nor_a_mesh_changes_names_or_gradients(axes, plain, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 2**12)
    model, variables, x, expected = plain
    remat = model.clone(remat=True)
    spec = parity.image_spec(16)
    assert parity.abstract_leaves(remat, spec) == parity.abstract_leaves(model, spec)
    mesh = sharding.make_mesh(axes)
    shardings = sharding.tree_shardings(variables, mesh, densenet.SHARDING)
    split = {axis for s in jax.tree.leaves(shardings) for axis in s.spec if axis}
    assert split == ({"fsdp"} if "fsdp" in axes else set())
    placed = jax.device_put(variables, shardings)
    found = loss_and_grads(remat, placed, jax.device_put(x, sharding.batch_sharding(mesh)))
    assert_trees_close(found, expected, rtol=1e-3)


@pytest.mark.parametrize("depth", PUBLISHED)
def test_parameter_counts(depth):
    section = dict(densenet.NAMED[f"densenet{depth}"])
    assert section.pop("name") == "densenet"
    model = densenet.Model(**section)
    shapes = parity.abstract_leaves(model, parity.image_spec(32))
    params = sum(leaf.size for name, leaf in shapes.items() if name.startswith("params/"))
    assert params + (model.feature_dim + 1) * 1000 == PUBLISHED[depth]
    assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("stem", "size", "map_size"), [("imagenet", 29, 1), ("imagenet", 65, 2), ("small", 17, 2)]
)
def test_outputs(stem, size, map_size):
    model = densenet.Model(14, stem=stem, dtype=jnp.bfloat16)
    x = jnp.zeros((2, size, size, 1))
    features, aux = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0], x
    )
    assert features.shape == (2, model.feature_dim) and features.dtype == jnp.float32
    assert aux["feature_map"].shape == (2, map_size, map_size, model.feature_dim)
    assert aux["feature_map"].dtype == jnp.bfloat16


def test_bfloat16():
    model = densenet.Model(14, stem="small")
    variables = tree.unflatten(parity.random_leaves(model, 32))
    x = random(2, 16, 16, 3)
    features, half = (
        jax.jit(lambda v, x, dtype=dtype: model.clone(dtype=dtype).apply(v, x, train=False)[0])(
            variables, x
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    difference = np.max(np.abs(features - half)) / np.max(np.abs(features))
    assert 0 < difference < 0.05  # two to three digits


def test_descriptions():
    model = densenet.Model(169)
    for naming in convert.NAMINGS:
        config = convert.describe(model, naming, {convert.STEM: (7, 7, 1, 64)})
        assert config["model_args"] == {"in_chans": 1}
        assert config["architecture"] == "densenet169" and config["num_features"] == 1664
        assert convert.from_description(config) == {"name": "densenet", "depth": 169}
    tagged = {"architecture": "densenet121.tv_in1k"}
    assert convert.from_description(tagged) == {"name": "densenet", "depth": 121}
    for name in ("densenet264", "densenetblur121d", "resnet50", None):
        with pytest.raises(UserError, match="valid: densenet121, "):
            convert.from_description({"architecture": name})
    with pytest.raises(UserError, match="config.model.stem='small' .* valid: imagenet"):
        convert.describe(densenet.Model(121, "small"), "timm", {})


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (densenet.Model(120), 32, "config.model.depth=120: valid: 121, 161, 169, 201"),
        (densenet.Model(stem="smal"), 32, "config.model.stem='smal': did you mean 'small'"),
        (densenet.Model(), 28, "images of 28x28 .* at least 29x29, or stem='small'"),
        (densenet.Model(stem="small"), 7, "images of 7x7 .* at least 8x8"),
    ],
)
def test_mistakes_are_named(model, size, message):
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (9, 8), (7, 7), (2, 2), (1, 1)])
@pytest.mark.parametrize(
    ("pool", "value"), [(layers.max_pool_symmetric, -np.inf), (layers.max_pool_zeros, 0)]
)
def test_max_pools(pool, value, h, w):
    """Against windows cut out one by one, and PyTorch's gradient where windows have ties."""
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    x = np.random.default_rng(0).integers(-3, 2, (2, h, w, 3)).astype(np.float32)
    found, vjp = jax.vjp(pool, x)
    padded = np.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)), constant_values=value)
    assert found.shape == (2, -(-h // 2), -(-w // 2), 3)
    for a in range(found.shape[1]):
        for b in range(found.shape[2]):
            window = padded[:, 2 * a : 2 * a + 3, 2 * b : 2 * b + 3]
            np.testing.assert_array_equal(found[:, a, b], window.max((1, 2)))
    image = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_()
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=value)
    expected = torch.nn.functional.max_pool2d(padded, 3, 2)
    g = random(*found.shape)
    expected.backward(torch.tensor(g).permute(0, 3, 1, 2))
    np.testing.assert_allclose(vjp(g)[0], image.grad.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    plain = jax.vjp(lambda x: layers.conv_cpu.max_pool(x, (1, 1), float(value)), x)[1](g)[0]
    np.testing.assert_allclose(plain, vjp(g)[0], rtol=1e-5, atol=1e-6)
