"""Who and what each record is: the side-car index, or one pass over the records, then cached."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from bigmed.data import schema
from bigmed.data.records import Records
from bigmed.errors import UserError

_INDEXED = ("patient_id", "study_id", "labels")  # fields that an index holds


@dataclasses.dataclass(frozen=True)
class LabelReader:
    """Turns a record's label feature into a row of label codes."""

    width: int
    numbered: bool  # the feature lists class numbers; else it is the row itself

    def __call__(self, value: np.ndarray) -> np.ndarray:
        """Label codes int8 [L]; raises ValueError where `value` is no label of that width."""
        if not self.numbered:
            if value.shape != (self.width,) or not np.isin(value, schema.LABEL_CODES).all():
                raise ValueError(
                    f"labels must be {self.width} numbers of 1, 0, -1 (uncertain), -2 (missing)"
                )
            return value.astype(np.int8)
        if (value == -1).any():  # TFDS's mark of an unlabelled example
            return np.full(self.width, schema.MISSING, np.int8)
        if (value < 0).any() or (value >= self.width).any():
            raise ValueError(f"class numbers must lie in 0..{self.width - 1}")
        row = np.full(self.width, schema.ABSENT, np.int8)
        row[value] = schema.PRESENT
        return row


def labels_of(
    features: Mapping[str, Any], keys: Mapping[str, str], facts: schema.DatasetFacts | None
) -> tuple[LabelReader | None, tuple[str, ...], str]:
    """How to read the labels, the class names and the task."""
    if "labels" not in keys:
        return None, (), "none"
    feature = features[keys["labels"]]
    if isinstance(feature, tfds.features.ClassLabel):
        return LabelReader(feature.num_classes, True), tuple(feature.names), "single_label"
    if isinstance(inner := getattr(feature, "feature", None), tfds.features.ClassLabel):
        return LabelReader(inner.num_classes, True), tuple(inner.names), "multi_label"
    shape = getattr(feature, "shape", None)
    if shape is None or len(shape) > 1 or None in shape or feature.np_dtype.kind not in "iub":
        raise UserError(
            f"fields.labels='{keys['labels']}' is a {type(feature).__name__} of shape {shape}; "
            "valid: ClassLabel, a sequence of ClassLabel, or an integer vector"
        )
    width = int(np.prod(shape))
    if facts and keys["labels"] == "labels":
        return LabelReader(width, False), facts.class_names, facts.task
    return LabelReader(width, False), tuple(f"class_{i}" for i in range(width)), "multi_label"


def build_index(
    records: Records,
    whole: Mapping[str, Records],
    side_cars: pathlib.Path | None,
    read_labels: LabelReader | None,
) -> schema.Index:
    """Index of the records, from side-cars or from scans that are cached.

    Args:
      records: the records asked for, which may be parts of splits.
      whole: all the records of each split that they come from.
      side_cars: the directory of side-car indexes, where there are any.
      read_labels: see `labels_of`; None for an unlabelled set.

    Raises:
      UserError: a record cannot be read, or is labelled with what is no label.
    """
    own_fields = all(records.keys.get(name, name) == name for name in _INDEXED)
    indexes = {}
    for split, every in whole.items():
        side_car = schema.index_path(side_cars, split) if side_cars else None
        if side_car and own_fields and side_car.is_file():
            indexes[split] = schema.Index.load(side_car)
            if len(indexes[split]) != len(every):
                raise UserError(
                    f"{side_car} is of {len(indexes[split])} records but the split has "
                    f"{len(every)}; prepare the data set again"
                )
        else:
            indexes[split] = _cached_scan(every, split, read_labels)
    if len(indexes) == 1 and len(records) == sum(map(len, whole.values())):
        return indexes.popitem()[1]
    ids, studies, labels = [], [], []
    for shard in records.shards:
        index = indexes[shard.split]
        rows = slice(shard.first + shard.skip, shard.first + shard.skip + shard.take)
        ids += [index.patient_keys[code] for code in index.patients[rows]]
        labels.append(index.labels[rows])
        if index.studies is not None:
            studies += [index.study_keys[code] for code in index.studies[rows]]
    return schema.Index.build(ids, np.concatenate(labels), studies or None)


def cache_folder() -> pathlib.Path:
    """Where what is made from data sets is kept: $BIGMED_CACHE, else ~/.cache/bigmed."""
    return pathlib.Path(os.environ.get("BIGMED_CACHE") or "~/.cache/bigmed").expanduser()


def _cached_scan(records: Records, split: str, read_labels: LabelReader | None) -> schema.Index:
    """Index of a split made by reading it through, the first time."""
    files = [(s.path, os.path.getsize(s.path), os.stat(s.path).st_mtime_ns) for s in records.shards]
    reader = dataclasses.astuple(read_labels) if read_labels else None
    key = digest(schema.FORMAT, split, files, records.keys, reader)
    folder = cache_folder()
    cached = folder / f"index-{key[:32]}.npz"
    if cached.is_file():
        with contextlib.suppress(UserError):  # torn: it is made anew
            return schema.Index.load(cached)
    index = _scan(records, split, read_labels)
    try:
        _save(index, cached)
    except OSError as error:
        print(f"bigmed: cannot keep an index in {folder}: {error}", file=sys.stderr)
    return index


def _scan(records: Records, split: str, read_labels: LabelReader | None) -> schema.Index:
    """Index of a split from its records; progress is shown on a terminal."""
    names = [name for name in _INDEXED if name in records.keys]
    ids, studies, labels = [], [], []
    title = f"indexing {records.dataset}/{split}"
    for record in tqdm.trange(len(records), desc=title, disable=not sys.stderr.isatty()):
        values = records.read_fields(names, [record])[0] if names else []
        row = dict(zip(names, values, strict=True))
        # Without patient ids each image is a patient of its own.
        ids.append(text_of(row["patient_id"]) if "patient_id" in row else f"{split}/{record}")
        if "study_id" in row:
            studies.append(text_of(row["study_id"]))
        if read_labels:
            try:
                labels.append(read_labels(row["labels"]))
            except ValueError as error:
                raise records.error(record, str(error)) from None
    table = np.array(labels, np.int8) if labels else np.empty((len(ids), 0), np.int8)
    return schema.Index.build(ids, table, studies or None)


def _save(index: schema.Index, path: pathlib.Path) -> None:
    """Writes an index whole or not at all, readable by its owner alone: it holds patient ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        part = pathlib.Path(file.name)
    try:
        index.save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def text_of(value: bytes | np.ndarray) -> str:
    """A text or number feature as text."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value.reshape(-1)[0])


def digest(*parts: Any) -> str:
    """SHA-256 of plain values and arrays; the same for equal content."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return [value.dtype.str, list(value.shape), content]
        raise TypeError(f"no digest of a {type(value).__name__}")

    text = json.dumps(parts, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
