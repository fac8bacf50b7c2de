"""Files of what result rows are computed from; image and patient ids in them are keyed hashes."""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bigmed import metrics
from bigmed.data.sources import Source
from bigmed.evaluators import features
from bigmed.evaluators.parts import Part


def file_stem(readable: Sequence[str], identity: Any) -> str:
    """A file name that people can read, and that differs where `identity`, as JSON, does."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6)
    return re.sub(r"[^\w.-]+", "-", f"{'-'.join(readable)}-{digest.hexdigest()}")


def write(
    folder: str | os.PathLike,
    stem: str,
    hash_key: bytes,
    part: Part,
    scores: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    task: str,
) -> str:
    """Writes the scores [m, L] and labels [m, L] of a part's units; the file's name.

    Arrays of the file: scores float32 [m, L], labels int8 [m, L], image_ids and patients [m]
    (hashes; a case goes by its first image), class_names [L], task and split_sha256.
    """
    file = f"{stem}.npz"
    if jax.process_index() == 0:
        source = part.source
        patients = np.array([keyed_hash(key, hash_key) for key in source.patient_keys])
        images = _image_keys(source, part.rows[part.first])
        features.write_npz(
            pathlib.Path(folder) / file,
            scores=scores.astype(np.float32),
            labels=labels,
            image_ids=np.array([keyed_hash(key, hash_key) for key in images]),
            patients=patients[part.patients],
            class_names=np.array(list(class_names)),
            task=np.array(task),
            split_sha256=np.array(source.split_sha256),
        )
    return file


def subset_sha256(train: Part) -> str:
    """Hash of which training images' labels were used, alike in every workdir.

    It is made of record numbers, and of the hash of the split's whole set of patients, so that it
    tells nothing of a single patient.
    """
    identity = [train.source.split_sha256, train.rows.tolist()]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def write_subset(folder: str | os.PathLike, hash_key: bytes, train: Part) -> None:
    """Writes the manifest `subset-<sha256>.json`: record numbers, and patients as keyed hashes."""
    path = pathlib.Path(folder) / f"subset-{subset_sha256(train)}.json"
    if jax.process_index() != 0 or path.exists():  # of another stage or evaluator
        return
    source, rows = train.source, train.rows
    patients = [source.patient_keys[code] for code in np.unique(source.patients[rows])]
    content = {
        "train_set": source.name,
        "split_sha256": source.split_sha256,
        "n_images": len(rows),
        "n_patients": len(patients),
        "records": rows.tolist(),
        "patients": sorted(keyed_hash(key, hash_key) for key in patients),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_json(path, content)


def keyed_hash(name: str, key: bytes) -> str:
    """An identifier that means nothing without the key, 32 hexadecimal digits."""
    return hashlib.blake2b(name.encode(), key=key, digest_size=16).hexdigest()


def _image_keys(source: Source, rows: np.ndarray) -> list[str]:
    """Image ids of records; their record numbers where the data set has no ids."""
    if "image_id" in source.records.keys:
        return source.read_field("image_id", rows)
    return [f"{source.fingerprint}/{row}" for row in rows]
