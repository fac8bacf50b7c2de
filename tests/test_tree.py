"""Paths, patterns, the loud merge, and late name resolution."""

import jax
import numpy as np
import pytest

from bigmed import resolve, tree
from bigmed.errors import UserError

TARGET = {
    "backbone": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)},
    "head": {"kernel": np.zeros((3, 4), np.float32)},
}
SOURCE = {
    "backbone/kernel": np.ones((2, 3), np.float32),
    "backbone/bias": np.ones(3, np.float32),
    "head/kernel": np.ones((3, 5), np.float32),
}


def test_merge_takes_what_is_asked_for_and_leaves_the_rest():
    merged, taken = tree.merge(TARGET, SOURCE, load=("backbone/.*",), skip=(".*/bias",))
    assert taken == ["backbone/kernel"]
    assert merged["backbone"]["kernel"].all() and not merged["backbone"]["bias"].any()
    assert not merged["head"]["kernel"].any()


@pytest.mark.parametrize(
    ("load", "skip", "said"),
    [
        (("head/.*",), (), r"'head/kernel' is \(3, 4\) float32 here but \(3, 5\) float32"),
        (("tail/.*",), (), "pattern 'tail/.*' matches nothing"),
        (("backbone/.*",), ("norm/.*",), "pattern 'norm/.*' matches nothing"),
    ],
)
def test_merge_fails_loudly(load, skip, said):
    with pytest.raises(UserError, match=said):
        tree.merge(TARGET, SOURCE, load, skip)


def test_merge_names_what_is_missing_and_what_has_another_dtype():
    source = {"backbone/kernel": SOURCE["backbone/kernel"].astype(np.float16)}
    with pytest.raises(UserError) as error:
        tree.merge(TARGET, source, load=("backbone/.*",))
    assert "'backbone/bias' (3,) float32 is missing" in str(error.value)
    assert "float16 in the source" in str(error.value)


def test_patterns_match_whole_paths():
    assert jax.tree.leaves(tree.mask(("bias",), TARGET)) == [False, False, False]
    assert jax.tree.leaves(tree.mask((".*/bias",), TARGET)) == [True, False, False]


def test_resolve_finds_ours_and_others():
    from bigmed.objectives.simclr import Objective

    assert resolve.resolve("simclr", "bigmed.objectives", "Objective") is Objective
    assert resolve.resolve("collections:OrderedDict", "bigmed.objectives", "Objective")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("simclrr", "did you mean 'simclr'"),
        ("no_such_module:Thing", "no 'no_such_module:Thing'"),
        ("bigmed.objectives.simclr:Objectiv", "did you mean 'Objective'"),
    ],
)
def test_resolve_says_what_exists(name, said):
    with pytest.raises(UserError, match=said):
        resolve.resolve(name, "bigmed.objectives", "Objective")
