"""SimCLR's and REMEDIS's TensorFlow weights: names, order, numbers, and damaged checkpoints.

The networks are written out once more here, in PyTorch, drawing their variables in the order in
which SimCLR's code makes them. Where TensorFlow is not installed the variables come from an .npz
file under the same names; that a checkpoint reads as such a file is tested with TensorFlow.
"""

import sys

import jax
import numpy as np
import pytest
from test_tools import tool

from bigmed import tree
from bigmed.convert import read, simclr, tf_checkpoint, weights
from bigmed.errors import UserError
from bigmed.models import bit, resnet
from bigmed.models.catalogue import build, named_models

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BLOCKS |= {11: (2, 1, 1, 1)}  # not published: a bottleneck network, quick to compile


def section(depth, width=1, sk=0, **changes):
    form = {"name": "resnet", "depth": depth, "width": width, "stem": "imagenet"}
    form |= {"sk_ratio": 0.0625, "resnet_d": True} if sk else {}
    form |= {"project_first": True} if depth < 20 and depth != 11 else {}
    return form | changes


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(resnet.VARIANTS, 11, (BLOCKS[11], True))


def layers(depth, width=1, sk=0):
    """[(our convolution, our norm or None, kernel's shape)] in the order of creation."""
    w = 64 * width
    if sk:
        made = [("stem1", (3, 3, 3, w // 2)), ("stem2", (3, 3, w // 2, w // 2))]
        made += [("stem3", (3, 3, w // 2, w))]
    else:
        made = [("stem", (7, 7, 3, w))]
    made = [(f"{name}/conv", f"{name}/norm", shape) for name, shape in made]
    inputs = w
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        c = w * 2 ** (stage - 1)
        out = c if depth == 18 else 4 * c
        for block in range(1, blocks + 1):
            b = f"stage{stage}/block{block}"
            if block == 1:
                made.append((f"{b}/shortcut/conv", f"{b}/shortcut/norm", (1, 1, inputs, out)))
            if depth == 18:
                made.append((f"{b}/conv1", f"{b}/norm1", (3, 3, inputs, c)))
                made.append((f"{b}/conv2", f"{b}/norm2", (3, 3, c, c)))
                inputs = out
                continue
            made.append((f"{b}/conv1", f"{b}/norm1", (1, 1, inputs, c)))
            if sk:
                squeezed = max(c // 16, 32)
                streams, squeeze = f"{b}/sk/streams", f"{b}/sk/squeeze"
                made.append((f"{streams}/conv", f"{streams}/norm", (3, 3, c, 2 * c)))
                made.append((f"{squeeze}/conv", f"{squeeze}/norm", (1, 1, c, squeezed)))
                made.append((f"{b}/sk/mixing", None, (1, 1, squeezed, 2 * c)))
            else:
                made.append((f"{b}/conv2", f"{b}/norm2", (3, 3, c, c)))
            made.append((f"{b}/conv3", f"{b}/norm3", (1, 1, c, out)))
            inputs = out
    return made


def tf_name(kind, number):
    return f"base_model/{kind}" if number == 0 else f"base_model/{kind}_{number}"


def variables(made):
    """{our leaf: (variable of TensorFlow 1, its shape)}."""
    found, norms = {}, 0
    for i, (conv, norm, shape) in enumerate(made):
        found[f"params/{conv}/kernel"] = f"{tf_name('conv2d', i)}/kernel", shape
        if norm:
            layer, channels = tf_name("batch_normalization", norms), shape[3:]
            found[f"params/{norm}/scale"] = f"{layer}/gamma", channels
            found[f"params/{norm}/bias"] = f"{layer}/beta", channels
            found[f"batch_stats/{norm}/mean"] = f"{layer}/moving_mean", channels
            found[f"batch_stats/{norm}/var"] = f"{layer}/moving_variance", channels
            norms += 1
    return found


def random_arrays(made):
    """The variables by name, such that activations stay of order one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for ours, (name, shape) in variables(made).items():
        noise = rng.standard_normal(shape, np.float32)
        last = ours.endswith(("norm3/scale", "norm2/scale"))
        arrays[name] = {
            "kernel": noise * np.prod(shape[:3], dtype=np.float32) ** -0.5,
            "gamma": (0.3 if last else 1) + 0.1 * noise,
            "beta": 0.1 * noise,
            "moving_mean": 0.1 * noise,
            "moving_variance": 1 + 0.3 * np.abs(noise),
        }[name.rpartition("/")[2]]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def heads():
    """What stands beside an encoder: heads, optimiser slots, an averaged copy, a counter."""
    return {
        "head_contrastive/nl_0/dense/kernel": np.ones((8, 8), np.float32),
        "head_contrastive/nl_0/batch_normalization/gamma": np.ones(8, np.float32),
        "head_contrastive/nl_0/batch_normalization/moving_mean": np.ones(8, np.float32),
        "head_supervised/linear_layer/dense/bias": np.ones(4, np.float32),
        "base_model/conv2d/kernel/Momentum": np.ones((7, 7, 3, 64), np.float32),
        "ema_model/base_model/conv2d/kernel": np.full((7, 7, 3, 64), 7, np.float32),
        "ema_model/base_model/batch_normalization/gamma": np.full(64, 7, np.float32),
        "global_step": np.array(250, np.int64),
    }


def as_tf2(arrays, first=100):
    """The same under names such as TensorFlow 2 gives them, numbered on from another network's."""
    renamed = {}
    for name, array in arrays.items():
        _, layer, variable = name.split("/")
        kind, _, number = layer.rpartition("_")
        kind, number = (kind, int(number)) if number.isdigit() else (layer, 0)
        scope = "resnet/block_group1/bottleneck_block" if number % 3 else "resnet"
        kind = kind.replace("batch", "sync_batch")
        renamed[f"{scope}/fixed_{number}/{kind}_{first + number}/{variable}"] = array
    return renamed


def torch_features(made, arrays, sk, basic, x):
    """The network as SimCLR's code runs it, taking convolutions and norms in order."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    convs, norms = iter(range(len(made))), iter(range(len(made)))

    def conv(x, stride=1):
        kernel = torch.tensor(arrays[f"{tf_name('conv2d', next(convs))}/kernel"])
        before = (kernel.shape[0] - 1) // 2
        padded = f.pad(x, (before, kernel.shape[0] - 1 - before) * 2)
        return f.conv2d(padded, kernel.permute(3, 2, 0, 1), stride=stride)

    def norm(x):
        name = tf_name("batch_normalization", next(norms))
        gamma, beta, mean, variance = (
            torch.tensor(arrays[f"{name}/{v}"])[:, None, None]
            for v in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * gamma + beta

    def selective(x, stride):
        streams = torch.stack(norm(conv(x, stride)).relu().chunk(2, dim=1))
        mixing = conv(norm(conv(streams.sum(0).mean((2, 3), keepdim=True))).relu())
        return (streams * torch.stack(mixing.chunk(2, dim=1)).softmax(0)).sum(0)

    def block(x, stride, first):
        shortcut = x
        if first:
            if sk and stride == 2:
                shortcut = f.avg_pool2d(f.pad(x, (0, 1, 0, 1)), 2, 2)
            elif sk:  # windows at the end are smaller, not padded
                ones = torch.ones_like(x[:1, :1])
                shortcut = f.avg_pool2d(f.pad(x, (0, 1, 0, 1)), 2, 1)
                shortcut = shortcut / f.avg_pool2d(f.pad(ones, (0, 1, 0, 1)), 2, 1)
            shortcut = norm(conv(shortcut, 1 if sk else stride))
        if basic:
            x = norm(conv(norm(conv(x, stride)).relu()))
        else:
            x = norm(conv(x)).relu()
            x = selective(x, stride) if sk else norm(conv(x, stride)).relu()
            x = norm(conv(x))
        return (x + shortcut).relu()

    x = torch.tensor(x.transpose(0, 3, 1, 2))
    x = norm(conv(x, 2)).relu()
    for _ in range(2 if sk else 0):
        x = norm(conv(x)).relu()
    low = x.shape[2] % 2  # "SAME": an even size is padded at its end alone
    x = f.max_pool2d(f.pad(x, (low, 1, low, 1), value=-torch.inf), 3, 2)
    for name, _, _ in made:
        if name.endswith(("/conv1", "/conv1/kernel")):
            stage, number = (int(part[-1]) for part in name.split("/")[:2])
            x = block(x, 2 if stage > 1 and number == 1 else 1, number == 1)
    return x.mean((2, 3)).numpy()


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("depth", "width", "sk", "size"),
    [(18, 1, 0, 40), (11, 1, 0, 43), (11, 1, 1, 43), (11, 2, 0, 32)],
)
def test_features_are_those_of_simclrs_network(tmp_path, depth, width, sk, size):
    made = layers(depth, width, sk)
    arrays = random_arrays(made)
    path = write_npz(tmp_path / "w.npz", arrays | heads())
    model = section(depth, width, sk)
    found = weights.import_weights(path, "simclr", model, size=size)
    assert not found.fresh and set(found.left_over) == set(heads())
    x = np.random.default_rng(1).random((2, size, size, 3), np.float32)
    apply = jax.jit(lambda v, x: build(model).apply(v, x, train=False)[0])
    expected = torch_features(made, arrays, sk, depth == 18, x)
    assert expected.std() > 0.1
    np.testing.assert_allclose(
        apply(tree.unflatten(found.leaves), x), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", [name for name in resnet.NAMED if name.startswith("simclr")])
def test_the_tables_of_all_released_networks(name):
    form = named_models()[name]
    expected = variables(layers(form["depth"], form["width"], int("sk_ratio" in form)))
    model = build(form)
    table = {entry.ours: entry.theirs for entry in simclr.entries(model)}
    assert table == {ours: (theirs,) for ours, (theirs, _) in expected.items()}
    shapes = weights.abstract_leaves(model, 64, 3)
    assert {n: leaf.shape for n, leaf in shapes.items()} == {n: v[1] for n, v in expected.items()}


def assert_leaves(found, made, arrays):
    """Every leaf is its variable, bit for bit."""
    assert not found.fresh
    for ours, (name, _) in variables(made).items():
        np.testing.assert_array_equal(found.leaves[ours], arrays[name], err_msg=ours)


def test_names_of_tensorflow_2_are_put_in_order(tmp_path):
    made = layers(11, sk=1)
    arrays = random_arrays(made)
    beside = {
        "projection_head/nl_0/batch_norm_relu_9/sync_batch_normalization_990/gamma": np.ones(3),
        "projection_head/nl_0/dense/kernel": np.ones((3, 3)),
        "LARSOptimizer/resnet/fixed_0/conv2d_100/kernel/Momentum": np.ones(3),
    }
    for first in (0, 100):
        path = write_npz(tmp_path / f"{first}.npz", as_tf2(arrays, first) | beside)
        found = weights.import_weights(path, "simclr", section(11, sk=1), size=64)
        assert_leaves(found, made, arrays)
        assert set(found.left_over) == set(beside)


def test_two_layers_of_one_number_are_refused(tmp_path):
    arrays = random_arrays(layers(11))
    arrays["base_model/other/conv2d_3/kernel"] = arrays["base_model/conv2d_3/kernel"]
    path = write_npz(tmp_path / "w.npz", arrays)
    with pytest.raises(UserError, match=r"holds 'base_model/conv2d_3/kernel' twice, as 'base"):
        weights.import_weights(path, "simclr", section(11), size=64)


def test_another_architecture_is_refused(tmp_path):
    path = write_npz(tmp_path / "w.npz", random_arrays(layers(11)))
    for model, said in (
        (section(11, sk=1), r"'base_model/conv2d/kernel' \(7, 7, 3, 64\) does not fit"),
        (section(11, width=2), r"does not fit 'params/stem/conv/kernel' \(7, 7, 3, 128\)"),
        (section(50), r"'base_model/conv2d_\d+/kernel' .* does not fit 'params/stage"),
        (section(11, stem="torchvision"), "none of SimCLR's; valid: stem='imagenet'"),
        (section(11, resnet_d=True), "sk_ratio and resnet_d both or neither"),
        (section(18, project_first=False), "project_first=True for depths below 50"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            weights.import_weights(path, "simclr", model, size=64)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="none of the model's tensors is in the file"):
        weights.import_weights(path, "torchvision", named_models()["resnet18"], size=64)
    said = "naming 'simclr' of a resnet: valid: huggingface, onnx, timm, torchvision"
    with pytest.raises(UserError, match=said):
        weights.family_of(section(11), "simclr", to_write=True)


def test_the_tool_writes_nothing_of_weights_that_are_refused(tmp_path):
    arrays = random_arrays(layers(11))
    arrays["base_model/conv2d_3/kernel"][0, 0, 0, 0] = np.nan
    path = write_npz(tmp_path / "w.npz", arrays)
    done = tool("import_weights", "--from=simclr", f"--src={path}", "--model=simclr_r50_1x_sk0",
                "--normalize=none", f"--out={tmp_path / 'out'}")  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "'base_model/conv2d_3/kernel' holds values that are not finite" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def bit_variables():
    """{our leaf: (variable of BiT's, shape)} of a network of one block in each stage."""
    found = {"params/stem/kernel": ("root_block/standardized_conv2d/kernel", (7, 7, 3, 64))}
    inputs = 64
    for stage in range(1, 5):
        c = 32 * 2**stage
        ours, theirs = f"params/stage{stage}/block1", f"block{stage}/unit01"
        shapes = {"a": (1, 1, inputs, c), "b": (3, 3, c, c), "c": (1, 1, c, 4 * c)}
        for k, (part, shape) in enumerate(shapes.items(), start=1):
            for leaf, name in (("scale", "gamma"), ("bias", "beta")):
                found[f"{ours}/norm{k}/{leaf}"] = f"{theirs}/{part}/group_norm/{name}", shape[2:3]
            found[f"{ours}/conv{k}/kernel"] = f"{theirs}/{part}/standardized_conv2d/kernel", shape
        shortcut = f"{theirs}/a/proj/standardized_conv2d/kernel"
        found[f"{ours}/shortcut/kernel"] = shortcut, (1, 1, inputs, 4 * c)
        inputs = 4 * c
    found["params/norm/scale"] = "group_norm/gamma", (2048,)
    found["params/norm/bias"] = "group_norm/beta", (2048,)
    return found


@pytest.mark.parametrize("scope", ["resnet/", "base_model/module/resnet/", ""])
def test_a_network_of_remedis(tmp_path, monkeypatch, scope):
    monkeypatch.setitem(bit.VARIANTS, 14, (1, 1, 1, 1))
    rng = np.random.default_rng(0)
    expected = {
        ours: (scope + name, rng.standard_normal(shape, np.float32))
        for ours, (name, shape) in bit_variables().items()
    }
    path = write_npz(tmp_path / "w.npz", dict(expected.values()) | {"head/dense/bias": np.ones(3)})
    found = weights.import_weights(path, "remedis", {"name": "bit", "depth": 14}, size=64)
    assert not found.fresh and found.left_over == ("head/dense/bias",)
    assert found.leaves.keys() == expected.keys()
    for ours, (_, array) in expected.items():
        np.testing.assert_array_equal(found.leaves[ours], array, err_msg=ours)


# ------------------------------------------------------------------------------- TensorFlow's files


def test_without_tensorflow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    prefix = tmp_path / "model.ckpt-250"
    for ending in (".index", ".data-00000-of-00001"):
        (tmp_path / f"model.ckpt-250{ending}").write_bytes(b"")
    with pytest.raises(UserError, match=r"needs TensorFlow: pip install 'bigmed\[tf\]'"):
        read.read_tensors(prefix)


def test_what_a_path_means(tmp_path):
    names = ("a.ckpt-1.index", "a.ckpt-1.data-00000-of-00002", "a.ckpt-1.data-00001-of-00002")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    prefix = tmp_path / "a.ckpt-1"
    for path in (prefix, tmp_path / names[0], tmp_path):
        assert tf_checkpoint.prefix_of(path) == prefix
    assert tf_checkpoint.files(prefix) == [tmp_path / name for name in names]
    digest = weights.sha256(prefix)
    (tmp_path / names[2]).write_bytes(b"changed")
    assert weights.sha256(prefix) != digest
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=r"the shard a\.ckpt-1\.data-00000-of-00002, missing here"):
        read.read_tensors(prefix)
    (tmp_path / "b.index").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 checkpoints; give one: a\.ckpt-1, b"):
        read.read_tensors(tmp_path)
    assert tf_checkpoint.prefix_of(tmp_path / "absent") is None


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow", reason="TensorFlow is in the extra 'tf'")


@pytest.fixture
def checkpoints(tf, tmp_path):
    """A network's (layers, arrays, {kind: path of its checkpoint}), as TensorFlow writes them."""
    made = layers(11, sk=1)
    arrays = random_arrays(made)
    flat = arrays | heads()
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt-250"),
        tensor_names=list(flat),
        shape_and_slices=[""] * len(flat),
        tensors=list(flat.values()),
    )
    module = tf.Module()
    module.listed = [tf.Variable(array, name=name) for name, array in as_tf2(arrays).items()]
    kernel = np.ones((3, 3), np.float32)
    module.head = tf.Variable(kernel, name="projection_head/nl_0/dense/kernel")
    slots = tf.Module()
    slots.momentum = [tf.Variable(v, name=f"Lars/{v.name[:-2]}/Momentum") for v in module.listed]
    saved = tf.train.Checkpoint(model=module, optimizer=slots).save(str(tmp_path / "ckpt"))
    tf.saved_model.save(module, str(tmp_path / "saved"))
    paths = {"TF1": tmp_path / "model.ckpt-250", "TF2": saved, "SavedModel": tmp_path / "saved"}
    return made, arrays, paths


def test_tensorflows_checkpoints_read_as_the_npz_files_do(checkpoints):
    made, arrays, paths = checkpoints
    left_over = {}
    for kind, path in paths.items():
        found = weights.import_weights(path, "simclr", section(11, sk=1), size=64)
        assert_leaves(found, made, arrays)
        left_over[kind] = set(found.left_over)
    assert left_over["TF1"] == set(heads())
    assert left_over["SavedModel"] == {"projection_head/nl_0/dense/kernel"}
    slots = {name for name in left_over["TF2"] if name.endswith("/Momentum")}
    assert len(slots) == len(arrays)
    rest = {"projection_head/nl_0/dense/kernel", "save_counter"}
    assert left_over["TF2"] - slots == rest


def test_damaged_checkpoints_are_one_line(checkpoints):
    _, _, paths = checkpoints
    prefix = paths["TF1"]
    data, index = (prefix.with_name(prefix.name + e) for e in (".data-00000-of-00001", ".index"))
    whole = data.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        data.write_bytes(damaged)
        with pytest.raises(UserError, match="does not read as a TensorFlow checkpoint") as caught:
            read.read_tensors(prefix)
        assert "\n" not in str(caught.value)
    data.write_bytes(whole)
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(UserError, match="does not read as a TensorFlow checkpoint"):
        read.read_tensors(prefix)


def test_weights_that_are_not_finite_are_named(tf, tmp_path):
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "w"),
        tensor_names=["base_model/conv2d/kernel"],
        shape_and_slices=[""],
        tensors=[np.array([1, np.nan], np.float32)],
    )
    with pytest.raises(UserError, match="'base_model/conv2d/kernel' holds values that are not"):
        read.read_tensors(tmp_path / "w")
