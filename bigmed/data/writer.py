"""Writing a data set: shards one by one, then the facts, then all of it becomes visible at once.

A data set grows in `DIR.partial` and is renamed to `DIR` when it is whole, so that a `DIR` that
exists is complete whenever the writing process was killed.
"""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from array_record.python import array_record_module

from bigmed.data import schema
from bigmed.errors import UserError

VERSION = "1.0.0"
WORK = ".work"  # in the partial directory: pieces and notes that the finished set has not
_SPLIT_FILE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's template


@dataclasses.dataclass(frozen=True)
class Shard:
    """A written shard: its file, its number of records and their bytes."""

    path: pathlib.Path
    records: int
    bytes: int


def partial_directory(out: pathlib.Path) -> pathlib.Path:
    """Where the data set `out` grows; on the same file system, so that a rename publishes it."""
    return out.with_name(out.name + ".partial")


def dataset_name(out: pathlib.Path) -> str:
    """A name by TFDS's rules (lower case, digits, underscores) from a folder's name."""
    name = re.sub(r"[^a-z0-9]+", "_", out.name.lower()).strip("_")
    return name if name[:1].isalpha() else f"dataset_{name}".rstrip("_")


def write_atomically(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """`write(temporary path)`, then fsync and rename: `path` is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> Shard:
    """Writes serialised examples as one ArrayRecord file, atomically; no file for no records.

    Raises:
      OSError: the file does not hold what was written to it (a full disk).
    """
    count = size = 0

    def write(temporary: pathlib.Path) -> None:
        nonlocal count, size
        # One record a group makes random access cheap; encoded images do not compress again.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
            count, size = count + 1, size + len(record)
        writer.close()
        if count:
            reader = array_record_module.ArrayRecordReader(str(temporary))
            found = reader.num_records()
            reader.close()
            if found != count:
                raise OSError(f"{path}: {found} of {count} records on disk (disk full?)")

    write_atomically(path, write)
    if not count:
        path.unlink()
    return Shard(path, count, size)


def finish(
    out: pathlib.Path,
    *,
    fields: Sequence[str],
    facts: schema.DatasetFacts,
    description: str,
    shards: Mapping[str, Sequence[Shard]],
    indexes: Mapping[str, schema.Index],
    quarantine: Iterable[tuple[int, str, str]] = (),
) -> None:
    """Turns the shards in `out`'s partial directory into the data set `out`.

    May be killed and called again with the same arguments at any point.

    Args:
      fields: fields of the records, a subset of `schema.FIELDS`.
      facts: what goes into bigmed.json, the last file to be written.
      shards: split -> its shards in record order, in the partial directory.
      indexes: split -> side-car index.
      quarantine: (row number, file, reason) of what was left out.
    """
    partial = partial_directory(out)
    split_infos = []
    for split, all_shards in shards.items():
        kept = [shard for shard in all_shards if shard.records]
        for k, shard in enumerate(kept):
            name = f"{facts.name}-{split}.array_record-{k:05d}-of-{len(kept):05d}"
            if shard.path.exists():
                os.replace(shard.path, partial / name)
        split_infos.append(
            {
                "name": split,
                "filepathTemplate": _SPLIT_FILE,
                "shardLengths": [str(shard.records) for shard in kept],
                "numBytes": str(sum(shard.bytes for shard in kept)),
            }
        )
    for split, index in indexes.items():
        write_atomically(schema.index_path(partial, split), index.save)
    write_quarantine(partial, quarantine)
    features = schema.features(
        fields, num_classes=len(facts.class_names), channels=facts.channels, bits=facts.bits
    )
    features.save_config(partial)
    info = {
        "name": facts.name,
        "version": VERSION,
        "description": description,
        "fileFormat": "array_record",
        "splits": split_infos,
    }
    text = json.dumps(info, indent=2) + "\n"
    write_atomically(partial / "dataset_info.json", lambda path: path.write_text(text))
    write_atomically(partial / schema.INFO_FILE, facts.write)
    publish(out)


@contextlib.contextmanager
def working(out: pathlib.Path, *, wait: bool = False) -> Iterator[pathlib.Path]:
    """The folder for unfinished pieces of `out`, held by this process alone until the block ends.

    Raises:
      UserError: another process works on the same data set, and `wait` is False.
    """
    partial = partial_directory(out)
    work = partial / WORK
    with _open_lock(work) as lock:
        try:
            # The kernel frees the lock when the process dies, however it dies.
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{out}: another run is preparing it; wait for that one") from None
        yield work
        if (out / schema.INFO_FILE).exists():  # made while this process came too late
            shutil.rmtree(partial, ignore_errors=True)


def _open_lock(work: pathlib.Path):
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            return open(work / "lock", "w")
        except FileNotFoundError:  # another process published the data set at this very moment
            continue


def publish(out: pathlib.Path) -> None:
    """Makes a whole partial directory visible as `out`, which must be absent or empty."""
    partial = partial_directory(out)
    shutil.rmtree(partial / WORK, ignore_errors=True)
    for leftover in partial.glob(".*"):  # temporaries of a killed process
        leftover.unlink()
    os.replace(partial, out)


def write_quarantine(directory: pathlib.Path, rows: Iterable[tuple[int, str, str]]) -> None:
    """Writes quarantine.csv: row, file, reason, in row order."""

    def write(path: pathlib.Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("row", "file", "reason"))
            writer.writerows(sorted(rows))

    write_atomically(directory / schema.QUARANTINE_FILE, write)


def finished(out: pathlib.Path, plan_sha256: str) -> schema.DatasetFacts | None:
    """Facts of `out` where it is this very data set already; None where it is absent or empty.

    Raises:
      UserError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        facts = schema.DatasetFacts.read(out)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{out}: exists and is no data set of bigmed; choose another") from None
    if facts.plan_sha256 != plan_sha256:
        raise UserError(
            f"{out}: holds a data set made from another source or with other flags; "
            "choose another folder or delete it"
        )
    return facts
