"""The mesh, where leaves live, and what does not divide."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from bigmed import sharding
from bigmed.errors import UserError

RULES = ((r"mlp/up/kernel", (None, "tensor")), (r"mlp/down/kernel", ("tensor", None)))


def mesh(*sizes):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def test_one_size_may_be_the_rest():
    assert dict(mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (16, 1, 1), (-1, 3, 1), (0, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        mesh(*sizes)


def test_a_batch_that_does_not_divide_is_refused():
    sharding.check_batch_size(16, mesh(4, 2, 1))
    with pytest.raises(UserError, match="use a multiple of 8"):
        sharding.check_batch_size(12, mesh(4, 2, 1))


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("params/block/mlp/up/kernel", (64, 256), (None, "tensor")),
        ("opt_state/0/trace/block/mlp/up/kernel", (64, 256), (None, "tensor")),
        ("params/block/mlp/up/kernel", (64, 255), (None, None)),
        ("params/conv/kernel", (3, 3, 64, 256), (None, None, None, "fsdp")),
        ("params/conv/kernel", (3, 3, 512, 255), (None, None, "fsdp", None)),
        ("params/norm/scale", (256,), ()),
    ],
)
def test_where_a_leaf_lives(name, shape, spec):
    assert sharding.leaf_spec(name, shape, mesh(2, 2, 2), RULES) == PartitionSpec(*spec)


def test_a_tree_and_its_momentum_are_placed_alike():
    params = {"mlp": {"up": {"kernel": jnp.zeros((64, 256))}}, "conv": jnp.zeros((128, 256))}
    where = sharding.tree_shardings({"params": params, "mu": params}, mesh(2, 2, 2), RULES)
    assert jax.tree.leaves(where["params"]) == jax.tree.leaves(where["mu"])
    assert where["params"]["conv"].spec == PartitionSpec(None, "fsdp")


def test_the_block_of_rows_that_a_process_makes(monkeypatch):
    assert sharding.host_block(mesh(4, 2, 1)) == (0, 1)
    shape = mesh(2, 2, 2)

    def block(devices):
        """Of a process that has only these of the eight devices."""
        indices = sharding.batch_sharding(shape).devices_indices_map((4,))
        mine = {d: i for d, i in indices.items() if d.id in devices}
        monkeypatch.setattr(
            sharding, "batch_sharding",
            lambda _: type("Stub", (), {"addressable_devices_indices_map": lambda *_: mine})(),
        )  # fmt: skip
        try:
            return sharding.host_block(shape)
        finally:
            monkeypatch.undo()

    assert block({0, 1, 2, 3}) == (0, 2) and block({4, 5, 6, 7}) == (1, 2)
    assert block({4, 5}) == (2, 4)
    assert block({4}) == (2, 4)  # the tensor axis spans processes: both make the same rows
    with pytest.raises(UserError, match=r"this one: \[0, 3\] of 4"):
        block({0, 6})
