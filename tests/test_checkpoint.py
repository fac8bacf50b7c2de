"""Checkpoints: exact, on another mesh, torn ones noticed, other models refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from processes import run_two

from bigmed import checkpoint, sharding, tree
from bigmed.checkpoint import Checkpointer
from bigmed.errors import UserError


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "params": {
            "kernel": jax.random.normal(keys[0], (64, 32)),
            "half": jax.random.normal(keys[1], (8, 8), jnp.bfloat16),
            "zeros": jnp.zeros((16,)),
        },
        "key": jax.random.key_data(keys[2]),
    }


def abstract_of(state, mesh_shape=None):
    if mesh_shape is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = jax.tree.map(lambda _: place, state)
    else:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, mesh_shape, strict=True)))
        where = jax.tree.map(
            lambda leaf: NamedSharding(
                mesh, PartitionSpec("fsdp" if leaf.ndim and leaf.shape[0] % 8 == 0 else None)
            )
            if leaf.ndim
            else NamedSharding(mesh, PartitionSpec()),
            state,
        )
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, where
    )


def assert_same(got, want):
    for (name, g), w in zip(tree.flatten(got).items(), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w), err_msg=name)


def saved(directory, steps=(1, 2)):
    with_steps = {step: make_state(step) for step in steps}
    checkpointer = Checkpointer(directory, keep=3)
    for step, state in with_steps.items():
        checkpointer.save(step, state, {"note": f"at {step}"})
    checkpointer.close()
    return with_steps


def restore(directory, abstract):
    checkpointer = Checkpointer(directory)
    try:
        return checkpointer.restore_latest(abstract)
    finally:
        checkpointer.close()


def test_round_trip_is_exact_and_keeps_meta(tmp_path):
    states = saved(tmp_path)
    state, meta = restore(tmp_path, abstract_of(states[2]))
    assert_same(state, states[2])
    assert meta["note"] == "at 2" and meta["step"] == 2


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path, abstract_of(make_state())) is None


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_restores_on_another_mesh(tmp_path, mesh):
    states = saved(tmp_path, steps=(3,))
    state, _ = restore(tmp_path, abstract_of(states[3], mesh))
    assert_same(state, states[3])
    if mesh[1] > 1:
        assert not state["params"]["kernel"].sharding.is_fully_replicated


def data_files(directory: pathlib.Path):
    found = [p for p in directory.rglob("*") if p.is_file()]
    return sorted(found, key=lambda p: p.stat().st_size)


REPO = pathlib.Path(__file__).resolve().parent.parent


def damage_truncate(path):
    biggest = data_files(path / "state")[-1]
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])


def damage_delete(path):
    data_files(path / "state")[-1].unlink()


def damage_flip(path):
    biggest = data_files(path / "state")[-1]
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 0x10
    biggest.write_bytes(bytes(content))


def damage_meta(path):
    data_files(path / "meta")[-1].write_bytes(b"{")


@pytest.mark.parametrize("damage", [damage_truncate, damage_delete, damage_flip, damage_meta])
def test_a_torn_newest_falls_back_with_a_line(tmp_path, capsys, damage):
    states = saved(tmp_path)
    damage(tmp_path / "2")
    state, meta = restore(tmp_path, abstract_of(states[1]))
    assert_same(state, states[1])
    assert meta["step"] == 1
    assert "checkpoint 2" in capsys.readouterr().out
    assert (tmp_path / "2.torn").is_dir()


def test_load_flat_gives_the_newest_whole_one(tmp_path, capsys):
    states = saved(tmp_path)
    flat, meta = checkpoint.load_flat(tmp_path)
    assert meta["step"] == 2
    params = {name for name in flat if name.startswith("params/")}
    assert params == {"params/kernel", "params/half", "params/zeros"}
    np.testing.assert_array_equal(flat["params/kernel"], states[2]["params"]["kernel"])
    damage_truncate(tmp_path / "2")
    assert checkpoint.load_flat(tmp_path)[1]["step"] == 1
    assert "torn" in capsys.readouterr().out


def test_all_torn_is_said(tmp_path):
    states = saved(tmp_path, steps=(1,))
    damage_truncate(tmp_path / "1")
    with pytest.raises(UserError, match="every checkpoint"):
        restore(tmp_path, abstract_of(states[1]))


def test_another_model_is_refused_with_both_sides(tmp_path):
    saved(tmp_path)
    other = make_state()
    other["params"]["kernel"] = jnp.zeros((64, 48))
    with pytest.raises(UserError, match=r"\(64, 48\).*here but \(64, 32\).*there"):
        restore(tmp_path, abstract_of(other))


def test_saved_state_may_be_donated_at_once(tmp_path):
    """The step after a save reuses its buffers while the files are still being written."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    state = {"w": jnp.arange(2_000_000, dtype=jnp.float32)}
    want = np.asarray(state["w"]).copy()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {})
    for _ in range(5):
        state = step(state)
    checkpointer.close()
    got, _ = restore(tmp_path, abstract_of(state))
    np.testing.assert_array_equal(got["w"], want)


def test_fingerprint_sees_bits_and_places_but_not_sharding():
    a = jnp.arange(64, dtype=jnp.float32)
    changed = a.at[5].set(5.0000005)
    swapped = a.at[5].set(6.0).at[6].set(5.0)
    prints = [checkpoint.fingerprints({"a": x})["a"] for x in (a, changed, swapped)]
    assert len(set(prints)) == 3
    mesh = sharding.make_mesh({"data": -1})
    spread = jax.device_put(a, NamedSharding(mesh, PartitionSpec("data")))
    assert checkpoint.fingerprints({"a": spread})["a"] == prints[0]


TWO_HOSTS = """
import pathlib
import jax.numpy as jnp
from jax.experimental import multihost_utils
from bigmed import checkpoint, sharding
mesh = sharding.make_mesh({"data": 1, "fsdp": 2})
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
state = {"w": jax.jit(lambda: jnp.arange(1 << 16, dtype=jnp.float32) ** 1.5, out_shardings=rows)()}
folder = pathlib.Path(sys.argv[1])
saver = checkpoint.Checkpointer(folder)
for step in (1, 2):
    saver.save(step, state, {})
    saver.wait()
saver.close()
multihost_utils.sync_global_devices("saved")
if jax.process_index() == 1:
    own = folder / "2" / "state" / "ocdbt.process_1" / "d"
    assert list(own.iterdir())
    for path in own.iterdir():
        path.write_bytes(path.read_bytes()[:100])
multihost_utils.sync_global_devices("torn")
state, meta = checkpoint.Checkpointer(folder).restore_latest(
    {"w": jax.ShapeDtypeStruct((1 << 16,), jnp.float32, sharding=rows)}
)
print("restored", meta["step"])
"""


def test_a_checkpoint_torn_for_one_host_is_torn_for_all(tmp_path):
    for i, out in enumerate(run_two(TWO_HOSTS, tmp_path)):
        assert "checkpoint 2" in out and out.splitlines()[-1] == "restored 1"
        assert ("another process cannot read it" in out) == (i == 0)
