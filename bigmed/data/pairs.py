"""Which records make up a batch: a pure function of (seed, position), computed in bulk.

A unit is what a data set is sampled by: an image, or for MICLe a case, so that a case of six images
weighs as much as a case of one (arXiv 2101.05224, section 3). Everything here is integer arithmetic
on a hash of ours: the order of the data then depends on no library's version, and the plan of a
batch costs microseconds where element-wise shuffling and mixing cost a tenth of the decoding.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bigmed.errors import UserError

SINGLE_IMAGE = ("augment", "drop")
_WEIGHT_STEPS = 10_000  # weights are rounded to this many parts of the whole


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """A well-mixed uint64 of integers; arrays broadcast (splitmix64's finaliser, chained)."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in parts:
            part = np.asarray(part).astype(np.uint64)
            state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation of range(size), int32 or int64, another one in every epoch."""
    order = np.argsort(hash64(seed, epoch, np.arange(size)), kind="stable")
    return order.astype(np.int32) if size < 2**31 else order


def interleave(positions: np.ndarray, proportions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Spreads one endless stream over sources in exact proportion, as grain's `mix` does.

    Args:
      positions: int64 [N], places in the mixed stream.
      proportions: a positive integer for each source.

    Returns:
      source int64 [N] and the place within that source's own stream, int64 [N]. Among the first n
      positions a source of share w has n w elements, to within one for each source.
    """
    source = np.full(positions.shape, -1, np.int64)
    place = np.zeros(positions.shape, np.int64)
    # Each source in turn takes its share of the positions that its predecessors left.
    remaining = sum(proportions)
    here, after = positions.astype(np.int64), positions.astype(np.int64) + 1
    for number, proportion in enumerate(proportions):
        left_here = here * (remaining - proportion) // remaining
        left_after = after * (remaining - proportion) // remaining
        taken = (source < 0) & (here - left_here != after - left_after)
        source[taken] = number
        place[taken] = (here - left_here)[taken]
        here, after, remaining = left_here, left_after, remaining - proportion
    return source, place


def integer_proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers that keep their ratios to one part in 10,000 of the whole."""
    total = sum(weights)
    return tuple(max(1, round(weight / total * _WEIGHT_STEPS)) for weight in weights)


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of one source and the records of each: unit u holds members[starts[u]:starts[u+1]].

    Attributes:
      starts: int64 [U + 1].
      members: int64 [R], record numbers.
    """

    starts: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def images(cls, num_records: int) -> "Units":
        """Every image a unit of its own."""
        return cls(np.arange(num_records + 1), np.arange(num_records))

    @classmethod
    def cases(
        cls, cases: np.ndarray, single_image: str, usable: np.ndarray | None = None
    ) -> "Units":
        """Every case a unit.

        Args:
          cases: int [N], the case code of each record.
          single_image: what becomes of a case with one image: 'augment' pairs the image with
            itself, to be augmented twice; 'drop' leaves the case out.
          usable: bool [N], records that may be drawn; None for all.

        Raises:
          UserError: `single_image` is neither.
        """
        if single_image not in SINGLE_IMAGE:
            raise UserError(f"single_image is '{single_image}'; valid: {', '.join(SINGLE_IMAGE)}")
        members = np.argsort(cases, kind="stable")
        members = members if usable is None else members[usable[members]]
        _, counts = np.unique(cases[members], return_counts=True)
        if single_image == "drop":
            members = members[np.repeat(counts > 1, counts)]
            counts = counts[counts > 1]
        return cls(np.concatenate([[0], np.cumsum(counts)]), members)

    def draw_pair(self, units: np.ndarray, key: int, visits: np.ndarray) -> np.ndarray:
        """Two distinct records of each unit: int64 [N, 2], drawn anew for every (key, visit).

        Ordered pairs of distinct images are uniform; a unit of one image gives it twice.
        """
        counts = self._counts(units)
        first = hash64(key, visits, 0) % counts
        # The second is drawn among the others: skip over the first.
        second = hash64(key, visits, 1) % np.maximum(counts - np.uint64(1), np.uint64(1))
        second = np.where(counts > 1, second + (second >= first), first)
        return np.stack([self._pick(units, first), self._pick(units, second)], axis=1)

    def _counts(self, units: np.ndarray) -> np.ndarray:
        return (self.starts[units + 1] - self.starts[units]).astype(np.uint64)

    def _pick(self, units: np.ndarray, which: np.ndarray) -> np.ndarray:
        return self.members[self.starts[units] + which.astype(np.int64)]


class Plan:
    """The records of every batch: `plan[step]` is a pure function of (seed, step).

    One source: every epoch is another permutation of its units, cut into whole batches, so that no
    unit meets itself in a batch (as its own negative); what is left over at the end of an epoch
    changes from epoch to epoch. Several sources: each is an endless stream of permutations and
    they are interleaved by weight.
    """

    def __init__(
        self,
        units: Sequence[Units],
        proportions: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        rows: slice,
        pairs: bool,
    ):
        """Plans batches of `batch_size` units, of which this host makes the `rows`."""
        self._units = tuple(units)
        self._proportions = tuple(proportions)
        self._batch_size = batch_size
        self._rows = np.arange(batch_size)[rows]
        self._pairs = pairs
        self._order_keys = [int(hash64(seed, n, 0)) for n in range(len(units))]
        self._pair_keys = [int(hash64(seed, n, 1)) for n in range(len(units))]
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in units]

    def __len__(self) -> int:
        return 2**40  # endless: no run makes that many steps

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of this host's rows: source number int64 [B], record numbers int64 [B, K], and the place
        in the endless stream of rows int64 [B], a number for each visit to a unit."""
        positions = step * self._batch_size + self._rows
        source, place = self._places(step, positions)
        records = np.empty((len(positions), 2 if self._pairs else 1), np.int64)
        for number, units in enumerate(self._units):
            mine = source == number
            unit = self._permuted(number, place[mine])
            visits = positions[mine]
            drawn = units.draw_pair(unit, self._pair_keys[number], visits)
            records[mine] = drawn[:, : records.shape[1]]
        return source, records, positions

    def _places(self, step: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position and its place in that source's stream of permutations."""
        if len(self._units) > 1:
            return interleave(positions, self._proportions)
        size = len(self._units[0])
        epoch, batch = divmod(step, size // self._batch_size)
        place = epoch * size + batch * self._batch_size + self._rows
        return np.zeros(len(positions), np.int64), place

    def _permuted(self, number: int, places: np.ndarray) -> np.ndarray:
        """The units at places of one source's endless stream of permutations."""
        size = len(self._units[number])
        unit = np.empty(len(places), np.int64)
        epochs = places // size
        for epoch in np.unique(epochs).tolist():
            unit[epochs == epoch] = self._order(number, epoch)[places[epochs == epoch] % size]
        return unit

    def _order(self, number: int, epoch: int) -> np.ndarray:
        orders = self._orders[number]
        order = orders.get(epoch)
        if order is None:
            order = epoch_order(self._order_keys[number], epoch, len(self._units[number]))
            # Neighbouring epochs alone are in use at once. A new dict each time: threads share it.
            self._orders[number] = {e: o for e, o in orders.items() if abs(e - epoch) == 1}
            self._orders[number][epoch] = order
        return order


class EveryUnit(Plan):
    """Batches that visit every unit of all sources once, in mixed order, then again, and so on.

    What to measure a loss on: where the number of units is no multiple of the batch, a batch holds
    the last of them and the first again. No batch of at most all units holds one twice.
    """

    def _places(self, step: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([len(units) for units in self._units])
        # always in the same order, so that the end of one round and the next one's start differ
        unit = epoch_order(self._order_keys[0], 0, ends[-1])[positions % ends[-1]]
        source = np.searchsorted(ends, unit, side="right")
        return source, unit - np.concatenate([[0], ends])[source]
