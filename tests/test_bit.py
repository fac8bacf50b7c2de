"""BiT ResNet-v2: published sizes, transformers' numbers, names in and out, equal switches."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from bigmed import tree
from bigmed.convert import bit as convert
from bigmed.convert import mapping
from bigmed.errors import UserError
from bigmed.models import bit

# million parameters with the classifier of 1000 classes: timm's table of resnetv2_*_bit
PUBLISHED = {
    "bit_r50x1": 25.55,
    "bit_r50x3": 217.32,
    "bit_r101x1": 44.54,
    "bit_r101x3": 387.93,
    "bit_r152x2": 236.34,
    "bit_r152x4": 936.53,
}

STEM = {convert.STEM: (7, 7, 3, 64)}


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Networks with all kinds of blocks, quick to compile."""
    monkeypatch.setitem(bit.VARIANTS, 8, (1, 0, 0, 1))
    monkeypatch.setitem(bit.VARIANTS, 14, (1, 1, 1, 1))
    monkeypatch.setitem(bit.VARIANTS, 17, (2, 1, 1, 1))


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def torch_bit(model, **changes):
    """transformers' BitModel of this size, with random weights.

    Biases of 3 or -3 hold most of a ReLU's inputs far from 0. Elsewhere rounding turns one in a
    hundred thousand on or off; in a deep network every one of them shows in a gradient, and a
    float32 gradient of PyTorch's is then itself 1e-2 off the float64 one.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    from transformers import BitConfig, BitModel

    config = convert.describe(model, "huggingface", STEM)
    with torch.no_grad():
        module = parity.randomise(BitModel(BitConfig(**config | changes)))
        for name, tensor in module.state_dict().items():
            if name.endswith("bias"):
                tensor.copy_(3 * tensor.sign())
    return module


def torch_features(module, x, direction):
    """Features, and the gradients of <features, direction> by the image and the stem's kernel."""
    import torch

    image = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).requires_grad_()
    features = module(image * 2 - 1).pooler_output[..., 0, 0]
    (features * torch.tensor(direction)).sum().backward()
    kernel = module.embedder.convolution.weight.grad.permute(2, 3, 1, 0)
    return features.detach().numpy(), image.grad.permute(0, 2, 3, 1).numpy(), kernel.numpy()


def our_features(model, variables, x, direction):
    def scalar(params, x):
        y, _ = model.apply({"params": params}, x, train=False)
        return jnp.sum(y @ direction), y

    grads, features = jax.jit(jax.grad(scalar, (0, 1), has_aux=True))(variables["params"], x)
    return features, grads[1], grads[0]["stem"]["kernel"]


@pytest.mark.parametrize(
    ("depth", "width", "size"), [(50, 1, 64), (14, 2, 49)], ids=["50x1", "14x2-odd"]
)
def test_equals_transformers(depth, width, size):
    model = bit.Model(depth, width)
    module = torch_bit(model)
    variables, left_over, fresh = parity.load(
        convert, model, "huggingface", parity.numpy_state(module), parity.image_spec(size)
    )
    assert not fresh and not left_over
    x, direction = random(2, size, size, 3), random(model.feature_dim, seed=1)
    found = our_features(model, variables, x, direction)
    expected = torch_features(module, x, direction)
    assert 0.1 < np.max(np.abs(expected[0])) < 100
    for f, e, what in zip(found, expected, ("features", "image", "stem"), strict=True):
        # features as they are, gradients over their largest element
        scale = 1.0 if what == "features" else np.max(np.abs(e))
        assert f.shape == e.shape and scale > 0
        difference = np.max(np.abs(np.asarray(f) - e)) / scale
        print(f"{what}: {difference:.2e}")
        assert difference <= 1e-4, what


def test_a_stem_of_one_channel_becomes_one_of_three():
    """Its features on grey images stay: three equal channels, which the first norm evens out."""
    model = bit.Model(14)
    module = torch_bit(model, num_channels=1)
    state = parity.numpy_state(module)
    name = "embedder.convolution.weight"
    kernel = mapping.refold_stem(state[name].transpose(2, 3, 1, 0), 1, 3)
    state[name] = kernel.transpose(3, 2, 0, 1)
    x, direction = random(2, 33, 33, 1), random(model.feature_dim, seed=1)
    variables, _, _ = parity.load(
        convert, model, "huggingface", state, parity.image_spec(33, channels=1)
    )
    assert variables["params"]["stem"]["kernel"].shape == (7, 7, 3, 64)
    found = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])(variables, x)
    expected, _, _ = torch_features(module, x, direction)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_grey_image_is_three_equal_channels():
    model = bit.Model(8)
    variables = random_variables(model)
    assert parity.abstract_leaves(model, parity.image_spec(32, 1)) == parity.abstract_leaves(
        model, parity.image_spec(32, 3)
    )
    x = random(2, 32, 32, 1)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])
    found, expected = apply(variables, x), apply(variables, np.repeat(x, 3, -1))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.max(expected) > 0.1


def test_released_names():
    """Of the .npz files and of timm, for the first and the last block of a stage."""
    model = bit.Model(101)
    names = {
        naming: {e.ours: e for e in convert.entries(model, naming)} for naming in ("npz", "timm")
    }
    for ours, npz, timm in (
        ("stem/kernel", "root_block/standardized_conv2d/kernel", "stem.conv.weight"),
        ("norm/scale", "group_norm/gamma", "norm.weight"),
        ("norm/bias", "group_norm/beta", "norm.bias"),
        (
            "stage1/block1/shortcut/kernel",
            "block1/unit01/a/proj/standardized_conv2d/kernel",
            "stages.0.blocks.0.downsample.conv.weight",
        ),
        (
            "stage3/block23/conv2/kernel",
            "block3/unit23/b/standardized_conv2d/kernel",
            "stages.2.blocks.22.conv2.weight",
        ),
        (
            "stage4/block1/norm3/bias",
            "block4/unit01/c/group_norm/beta",
            "stages.3.blocks.0.norm3.bias",
        ),
        (
            "stage4/block1/norm1/scale",
            "block4/unit01/a/group_norm/gamma",
            "stages.3.blocks.0.norm1.weight",
        ),
    ):
        assert names["npz"][f"params/{ours}"].theirs == (f"resnet/{npz}",)
        assert names["timm"][f"params/{ours}"].theirs == (timm,)
    shapes = {name: leaf.shape for name, leaf in abstract(model).items()}
    assert set(shapes) == names["npz"].keys() == names["timm"].keys()
    # kernels of the .npz files are HWIO as ours, PyTorch's OIHW
    kernel = random(3, 3, 2, 5)
    conv = "params/stage1/block1/conv2/kernel"
    assert names["npz"][conv].layout.to_theirs(kernel)[0].shape == (3, 3, 2, 5)
    assert names["timm"][conv].layout.to_theirs(kernel)[0].shape == (5, 2, 3, 3)


def test_numbers_of_convolutions_are_dropped():
    for old in ("standardized_conv2d_12", "standardized_conv2d"):
        found = convert.plain_names({f"resnet/block1/unit01/a/{old}/kernel": 1})
        assert found == {"resnet/block1/unit01/a/standardized_conv2d/kernel": 1}


@pytest.mark.parametrize("naming", convert.NAMINGS)
def test_export_and_import_are_bit_equal(naming):
    model = bit.Model(17)
    leaves = tree.flatten(random_variables(model))
    entries = convert.entries(model, naming)
    tensors = mapping.to_theirs(leaves, entries)
    assert len(tensors) == len(leaves)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    found, left_over, fresh = mapping.to_ours(tensors, entries, shapes)
    assert not left_over and not fresh
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(found[name], leaf)


def abstract(model, channels=3):
    return parity.abstract_leaves(model, parity.image_spec(32, channels))


def random_variables(model):
    """Values such that no branch is dead."""
    rng = np.random.default_rng(1)
    leaves = {}
    for name, leaf in abstract(model).items():
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        leaves[name] = (
            noise if name.endswith("kernel") else name.endswith("scale") + np.float32(0.1) * noise
        )
    return tree.unflatten(leaves)


def test_remat_changes_neither_names_nor_gradients():
    model = bit.Model(8)
    remat = model.clone(remat=True)
    assert abstract(remat) == abstract(model)
    variables, x = random_variables(model), random(2, 32, 32, 3)

    def grads(model):
        def loss(variables):
            return jnp.mean(jnp.sin(3 * model.apply(variables, x, train=True)[0]))

        return tree.flatten(jax.jit(jax.grad(loss))(variables))

    found, expected = grads(remat), grads(model)
    assert found.keys() == expected.keys() == abstract(model).keys()
    for name, gradient in expected.items():
        scale = np.max(np.abs(gradient))
        assert scale > 0, name
        np.testing.assert_allclose(found[name], gradient, atol=1e-4 * scale, err_msg=name)


def kernels_and_norms(depth, width):
    """Parameters of a BiT, written out from the paper: its kernels, and the scales and biases."""
    stages = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    inputs = 64 * width
    kernels, norms = 7 * 7 * 3 * inputs, 2 * 2048 * width
    for stage, blocks in enumerate(stages):
        c = 64 * width * 2**stage
        for block in range(blocks):
            kernels += inputs * c + 9 * c * c + c * 4 * c + (inputs * 4 * c if block == 0 else 0)
            norms += 2 * (inputs + c + c)
            inputs = 4 * c
    return kernels + norms


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    section = dict(bit.NAMED[name])
    assert section.pop("name") == "bit"
    model = bit.Model(**section)
    leaves = abstract(model)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
    found = sum(leaf.size for leaf in leaves.values())
    assert found == kernels_and_norms(model.depth, model.width)
    classifier = (2048 * model.width + 1) * 1000
    assert (found + classifier) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.005)
    if name == "bit_r50x1":  # with the 21843 classes of ImageNet-21k, from the same table
        assert found == 23_500_352
        assert (found + 2049 * 21843) / 1e6 == pytest.approx(68.26, abs=0.005)


def test_outputs_and_bfloat16():
    for dtype in (jnp.float32, jnp.bfloat16):
        model = bit.Model(8, dtype=dtype)
        x = random(2, 33, 40, 3)
        features, aux = jax.jit(lambda v, x, model=model: model.apply(v, x, train=False))(
            random_variables(model), x
        )
        assert features.shape == (2, 2048) and features.dtype == jnp.float32
        assert aux["feature_map"].shape == (2, 5, 5, 2048) and aux["feature_map"].dtype == dtype
        if dtype == jnp.float32:
            expected = features
    difference = np.max(np.abs(features - expected)) / np.max(np.abs(expected))
    assert 0 < difference < 0.05  # two to three digits


def test_standardised_kernels():
    kernel = 3 + 2 * np.random.default_rng(0).standard_normal((3, 3, 4, 5)).astype(np.float32)
    found = np.asarray(bit.standardise(kernel))
    flat = kernel.astype(np.float64).reshape(36, 5)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-10)
    np.testing.assert_allclose(found.reshape(36, 5), expected, rtol=1e-4, atol=1e-5)
    assert not np.any(bit.standardise(np.full((1, 1, 4, 2), 7, np.float32)))  # no 0 / 0


def test_descriptions():
    for depth, width in ((50, 1), (101, 3), (152, 4)):
        section = {"name": "bit", "depth": depth, "width": width}
        for naming in convert.NAMINGS:
            config = convert.describe(bit.Model(depth, width), naming, STEM)
            assert convert.from_description(config) == section
    for name in ("BiT-M-R50x1", "BiT-S-R50x1-ILSVRC2012", "resnetv2_50x1_bit.goog_in21k_ft_in1k"):
        assert convert.from_description({"architecture": name}) == bit.NAMED["bit_r50x1"]
    # what a config.json may leave out is BitConfig's default
    assert convert.from_description({"model_type": "bit"}) == bit.NAMED["bit_r50x1"]


def test_an_exported_folder_loads_in_transformers(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is in the extra 'bench'")
    import json

    from safetensors.numpy import save_file
    from transformers import BitModel

    model = bit.Model(14)
    variables = random_variables(model)
    tensors = mapping.to_theirs(tree.flatten(variables), convert.entries(model, "huggingface"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = convert.describe(model, "huggingface", STEM)
    (tmp_path / "config.json").write_text(json.dumps(config))
    module, report = BitModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, direction = random(2, 33, 33, 3), random(2048, seed=1)
    expected, _, _ = torch_features(module.eval(), x, direction)
    found = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])(variables, x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnetv2_50x1"}, "architecture 'resnetv2_50x1': valid: .*BiT-R50x1"),
        ({"architecture": "resnetv2_34x1_bit"}, "valid: .*BiT-R101x1"),
        ({}, "architecture 'None'"),
        ({"model_type": "bit", "layer_type": "bottleneck"}, "BitConfig.layer_type=bottleneck"),
        ({"model_type": "bit", "global_padding": "SAME"}, "BitConfig.global_padding=SAME"),
        ({"model_type": "bit", "width_factor": 3}, "BitConfig.width_factor=3: valid here: 1"),
        ({"model_type": "bit", "depths": [2, 2, 2, 2]}, r"depths=\[2, 2, 2, 2\]: .*3, 8, 36, 3"),
        ({"model_type": "bit", "embedding_size": 128}, "embedding_size=128 with hidden_sizes="),
    ],
)
def test_other_descriptions_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        convert.from_description(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (bit.Model(18), "config.model.depth=18: valid: 50, 101, 152"),
        (bit.Model(width=0), "config.model.width=0"),
        (bit.Model(width=1.5), "config.model.width=1.5"),
    ],
)
def test_mistakes_are_named(model, message):
    for use in (
        lambda: model.feature_dim,
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False),
    ):
        with pytest.raises(UserError, match=message):
            use()
    with pytest.raises(UserError, match="no BiT of config.model.depth=50 and width=2; .*152x2"):
        convert.describe(bit.Model(50, 2), "timm", STEM)
