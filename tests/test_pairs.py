"""Which records make up a batch: orders, mixtures, pairs of a case."""

import collections

import grain
import numpy as np
import pytest

from bigmed.data.pairs import (
    EveryUnit,
    Plan,
    Units,
    epoch_order,
    hash64,
    integer_proportions,
    interleave,
)
from bigmed.errors import UserError

CASES = np.array([5, 2, 5, 9, 2, 5, 7])  # sizes: 2 -> 2, 5 -> 3, 7 -> 1, 9 -> 1


def _plan(units, *, seed=0, batch_size=4, rows=slice(None), pairs=False, proportions=(1,)):
    return Plan(
        units, proportions, seed=seed, batch_size=batch_size, rows=slice(*rows.indices(batch_size)),
        pairs=pairs,
    )  # fmt: skip


def test_hash_is_splitmix_chained_over_the_parts():
    mask = (1 << 64) - 1

    def oracle(*parts):
        state = 0x9E3779B97F4A7C15
        for part in parts:
            state = ((state ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
            state ^= state >> 31
        return state

    got = hash64(7, np.array([0, 1, 2**63 - 1]), 3)
    assert got.dtype == np.uint64
    assert got.tolist() == [oracle(7, x, 3) for x in (0, 1, 2**63 - 1)]


def test_epoch_orders_are_different_permutations_and_never_change():
    orders = [epoch_order(seed, epoch, 500) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(500))
    assert len({tuple(order.tolist()) for order in orders}) == 6
    # A resumed run of an older version must see the same order: these are the promised values.
    assert epoch_order(0, 0, 8).tolist() == [4, 2, 7, 0, 3, 6, 1, 5]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1)])
def test_mixtures_are_those_of_grain(weights):
    proportions = integer_proportions(weights)
    parents = [grain.MapDataset.range(i * 10**6, (i + 1) * 10**6) for i in range(len(weights))]
    mixed = grain.MapDataset.mix(parents, weights)
    source, place = interleave(np.arange(3000), proportions)
    expected = np.array([mixed[k] for k in range(3000)])
    assert np.array_equal(source * 10**6 + place, expected)
    shares = np.bincount(source) / 3000
    assert np.allclose(shares, np.array(weights) / sum(weights), atol=2 / 3000 * len(weights))


def test_an_epoch_visits_every_case_once_however_many_images_it_has():
    units = Units.cases(CASES, "augment")
    plan = _plan([units], batch_size=2, pairs=True)
    for epoch in range(5):
        seen = [CASES[plan[2 * epoch + i][1][:, 0]] for i in range(2)]
        assert sorted(np.concatenate(seen).tolist()) == [2, 5, 7, 9]


def test_pairs_are_distinct_images_of_one_case_drawn_uniformly_and_anew():
    units = Units.cases(CASES, "augment")
    visits = np.arange(6000)
    case_of_five = int(np.flatnonzero(np.unique(CASES) == 5)[0])
    pairs = units.draw_pair(np.full(6000, case_of_five), 11, visits)
    assert np.all(CASES[pairs] == 5)
    assert np.all(pairs[:, 0] != pairs[:, 1])
    counts = collections.Counter(map(tuple, pairs.tolist()))
    assert len(counts) == 6  # ordered pairs of 3 images
    # Six cells of expectation 1000: the chi-square statistic has 5 degrees of freedom.
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # p = 0.001
    again = units.draw_pair(np.full(6000, case_of_five), 12, visits)
    assert 0.1 < np.mean(np.all(again == pairs, axis=1)) < 0.24  # another key: 1 in 6 by chance


def test_a_case_of_one_image_is_paired_with_itself_or_left_out():
    kept = Units.cases(CASES, "augment")
    assert len(kept) == 4
    plan = _plan([kept], pairs=True)
    records = np.concatenate([plan[step][1] for step in range(10)])
    single = np.isin(CASES[records[:, 0]], [7, 9])
    assert np.all(records[single, 0] == records[single, 1])
    assert np.all(records[~single, 0] != records[~single, 1])
    left = Units.cases(CASES, "drop")
    assert len(left) == 2
    assert set(CASES[left.members].tolist()) == {2, 5}
    with pytest.raises(UserError, match="single_image is 'dropp'; valid: augment, drop"):
        Units.cases(CASES, "dropp")


def test_one_id_an_image_never_makes_a_pair():
    ids = np.arange(50)  # as breast ultrasound sets without patient ids have them
    assert len(Units.cases(ids, "drop")) == 0
    plan = _plan([Units.cases(ids, "augment")], batch_size=25, pairs=True)
    for step in range(4):
        assert np.all(plan[step][1][:, 0] == plan[step][1][:, 1])


def test_no_image_meets_itself_in_a_batch_and_leftovers_change():
    plan = _plan([Units.images(10)], batch_size=4)
    epochs = []
    for epoch in range(40):
        seen = np.concatenate([plan[2 * epoch + i][1][:, 0] for i in range(2)])
        assert len(set(seen.tolist())) == 8
        epochs.append(set(seen.tolist()))
    visits = collections.Counter(record for seen in epochs for record in seen)
    assert min(visits.values()) > 20  # of 32 expected: nobody is left out for good
    assert len({tuple(sorted(seen)) for seen in epochs}) > 5


@pytest.mark.parametrize("num_sources", [1, 2])
def test_a_batch_depends_on_seed_and_step_alone_and_hosts_make_its_blocks(num_sources):
    units = [Units.cases(np.arange(40) // 3, "augment"), Units.cases(np.arange(9) // 2, "augment")]
    units, proportions = units[:num_sources], (3, 1)[:num_sources]
    options = {"batch_size": 6, "pairs": True, "proportions": proportions}
    in_order = _plan(units, **options)
    forward = [in_order[step] for step in range(30)]
    shuffled = _plan(units, **options)
    for step in (17, 3, 29, 0, 18):
        for got, expected in zip(shuffled[step], forward[step], strict=True):
            assert np.array_equal(got, expected)
    blocks = [_plan(units, rows=slice(3 * p, 3 * p + 3), **options)[7] for p in range(2)]
    for whole, *parts in zip(forward[7], *blocks, strict=True):
        assert np.array_equal(whole, np.concatenate(parts))
    other = _plan(units, seed=1, **options)
    assert not all(np.array_equal(other[s][1], forward[s][1]) for s in range(5))


def test_mixed_sources_each_pass_through_all_their_units():
    plan = _plan([Units.images(30), Units.images(10)], batch_size=8, proportions=(3, 1))
    seen = collections.defaultdict(list)
    for step in range(15):  # 120 rows: 90 and 30
        source, records, _ = plan[step]
        for number in (0, 1):
            seen[number] += records[source == number, 0].tolist()
    for number, size in ((0, 30), (1, 10)):
        for epoch in range(3):
            part = seen[number][epoch * size : (epoch + 1) * size]
            assert sorted(part) == list(range(size))


@pytest.mark.parametrize("sizes", [(7,), (5, 9, 1)])
def test_every_unit_of_all_sources_is_visited_once_a_round_and_none_twice_in_a_batch(sizes):
    units, total = [Units.images(size) for size in sizes], sum(sizes)
    plan = EveryUnit(units, (1,) * len(sizes), seed=3, batch_size=4, rows=slice(0, 4), pairs=False)
    visited = []
    for step in range(total):  # four rounds
        source, records, _ = plan[step]
        batch = list(zip(source.tolist(), records[:, 0].tolist(), strict=True))
        assert len(set(batch)) == 4
        visited += batch
    everything = [(n, record) for n, size in enumerate(sizes) for record in range(size)]
    for start in range(0, 4 * total, total):
        assert sorted(visited[start : start + total]) == everything
    assert visited[:total] != everything
    half = EveryUnit(units, (1,) * len(sizes), seed=3, batch_size=4, rows=slice(2, 4), pairs=False)
    np.testing.assert_array_equal(half[1][1], plan[1][1][2:])
