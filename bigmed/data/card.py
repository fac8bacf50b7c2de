"""What a source holds, in counts: for the data card of a report. No identifier is in it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bigmed.data import schema
from bigmed.data.sources import Source

KINDS = {
    "positive": schema.PRESENT,
    "negative": schema.ABSENT,
    "uncertain": schema.UNCERTAIN,
    "missing": schema.MISSING,
}


def card(source: Source, used_for: str) -> dict[str, Any]:
    """The counts of a source as JSON; `n_patients` is None where the data set names none."""
    return {
        "name": source.name,
        "used_for": [used_for],
        "n_images": len(source),
        "n_patients": len(np.unique(source.patients)) if source.has_patients else None,
        "bits": source.bits,
        "task": source.task,
        "split_sha256": source.split_sha256,
        "synthetic": source.synthetic,
        "labels": {
            name: {kind: int((source.labels[:, c] == code).sum()) for kind, code in KINDS.items()}
            for c, name in enumerate(source.class_names)
        },
    }


def joined(
    known: Sequence[Mapping[str, Any]], more: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Cards of one split and one set of classes put together, with all that it is used for."""
    found: dict[tuple, dict[str, Any]] = {}
    for one in (*known, *more):
        key = (one["name"], one["split_sha256"], one["n_images"], *one["labels"])
        uses = found.setdefault(key, {**one, "used_for": []})["used_for"]
        uses += [use for use in one["used_for"] if use not in uses]
    return list(found.values())
