"""Random access to the records of an ArrayRecord data set, from any thread or process."""

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence

import numpy as np
from array_record.python import array_record_module
from google.protobuf.message import DecodeError

from bigmed.data import schema
from bigmed.errors import UserError

_READ_ERRORS = (RuntimeError, ValueError, IndexError, OSError)  # what pybind makes of a bad status


@dataclasses.dataclass(frozen=True)
class Shard:
    """Records `skip` to `skip + take` of one file; its record 0 is the split's record `first`."""

    path: str
    skip: int
    take: int
    split: str
    first: int


class Records:
    """The records of a split, numbered through its shards; files are opened on first use.

    Pickles as names alone, so that a worker process opens the files itself.

    Attributes:
      dataset: name for messages.
      keys: our field name -> name of the feature in the records.
    """

    def __init__(self, dataset: str, shards: Sequence[Shard], keys: Mapping[str, str]):
        self.dataset = dataset
        self.shards = tuple(shards)
        self.keys = dict(keys)
        self._ends = np.cumsum([shard.take for shard in self.shards])
        self._starts = self._ends - np.array([shard.take for shard in self.shards])
        self._readers: list = [None] * len(self.shards)
        self._lock = threading.Lock()

    def __reduce__(self):
        return Records, (self.dataset, self.shards, self.keys)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, name: str, records: Sequence[int]) -> list:
        """One field of these records, in their order; see `read_fields`."""
        return [value for (value,) in self.read_fields((name,), records)]

    def read_fields(self, names: Sequence[str], records: Sequence[int]) -> list[list]:
        """Several fields of these records, in their order, with one read for each shard.

        Returns:
          For each record the values of `names`, of the types that `schema.decode_fields` gives.

        Raises:
          UserError: a record cannot be read or lacks a field; it is named by number.
        """
        numbers = np.asarray(records, np.int64)
        keys = [self.keys[name] for name in names]
        shard_of = np.searchsorted(self._ends, numbers, side="right")
        values: list = [None] * len(numbers)
        for shard in np.unique(shard_of).tolist():
            slots = np.flatnonzero(shard_of == shard)
            parsed = self._read_shard(shard, numbers[slots], keys)
            for slot, value in zip(slots.tolist(), parsed, strict=True):
                values[slot] = value
        return values

    def error(self, record: int, reason: str) -> UserError:
        """The error to raise about a record: names the data set, split and record number."""
        number = int(np.searchsorted(self._ends, record, side="right"))
        shard = self.shards[number]
        inside = int(record) - int(self._starts[number]) + shard.skip + shard.first
        return UserError(
            f"data set '{self.dataset}', split '{shard.split}', record {inside}: {reason}; "
            "prepare the data set again"
        )

    def _read_shard(self, number: int, numbers: np.ndarray, keys: Sequence[str]) -> list[list]:
        """Values of `keys` of each of these records, all of which lie in one shard."""
        positions = (numbers - self._starts[number] + self.shards[number].skip).tolist()
        try:
            encoded = self._reader(number).read(positions)
            values = [schema.decode_fields(record, keys) for record in encoded]
        except (*_READ_ERRORS, DecodeError) as error:
            if len(positions) == 1:
                raise self.error(numbers[0], f"cannot be read ({_first_line(error)})") from error
            # One of them is bad: find out which.
            values = [self._read_shard(number, numbers[[i]], keys)[0] for i in range(len(numbers))]
        for record, value in zip(numbers, values, strict=True):
            if any(one is None for one in value):
                raise self.error(record, f"it lacks one of the features {', '.join(keys)}")
        return values

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        """The reader of one shard, shared by the threads of this process."""
        if self._readers[number] is None:
            with self._lock:
                if self._readers[number] is None:
                    self._readers[number] = open_shard(self.shards[number], self.dataset)
        return self._readers[number]


def open_shard(shard: Shard, dataset: str) -> array_record_module.ArrayRecordReader:
    """Opens the file of a shard for random access.

    Raises:
      UserError: it is missing, torn or of another kind.
    """
    try:
        # Nothing is read ahead: every read names the records that it wants.
        reader = array_record_module.ArrayRecordReader(
            shard.path,
            options="readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=32768,
        )
        # A torn file opens without an error, and then reads as nothing.
        whole = reader.ok() and reader.num_records() >= shard.skip + shard.take
    except _READ_ERRORS:
        whole = False
    if not whole:
        raise UserError(
            f"data set '{dataset}', split '{shard.split}': file {os.path.basename(shard.path)} is "
            "missing or torn; prepare the data set again"
        )
    return reader


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
