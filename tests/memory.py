"""Data sets in memory for tests of evaluators: 4 x 4 images that carry their classes."""

import itertools
import types

import jax.numpy as jnp
import numpy as np

from bigmed.errors import UserError
from bigmed.evaluators import features, scored, zero_shot

KEY = b"secret of the workdir"


class MemorySource:
    """A `Source` whose 4x4 images carry their class in their first pixels."""

    def __init__(self, split, n, *, task="multi_label", num_classes=3, seed=0, first_patient=0):
        rng = np.random.default_rng(seed)
        self.name, self.task = f"toy/{split}", task
        self.class_names = tuple("abcdefgh"[:num_classes])
        actual = rng.integers(num_classes, size=n)
        self.labels = np.eye(num_classes, dtype=np.int8)[actual]
        if task == "multi_label":
            self.labels |= (rng.random(self.labels.shape) < 0.2).astype(np.int8)
            self.labels[rng.random(self.labels.shape) < 0.1] = -1
            self.labels[rng.random(self.labels.shape) < 0.05] = -2
        self.images = rng.integers(0, 90, size=(n, 4, 4, 1), dtype=np.uint8)
        signal = 60 * (self.labels == 1) + rng.integers(0, 90, size=self.labels.shape)
        self.images.reshape(n, 16)[:, :num_classes] = signal
        self.patients = np.sort(rng.integers(max(n // 2, 1), size=n)).astype(np.int32)
        self.cases, self.case_key = self.patients, "patient_id"
        self.patient_keys = [f"patient-{first_patient + i}" for i in range(max(n // 2, 1))]
        self.split_sha256, self.fingerprint = f"sha-{split}", f"print-{split}-{seed}-{n}"
        self.synthetic, self.has_patients = True, True
        self.records = types.SimpleNamespace(keys={"image": "image", "image_id": "image_id"})

    def __len__(self):
        return len(self.labels)

    def read_field(self, name, ids):
        assert name == "image_id"
        return [f"image-{self.name}-{i}" for i in ids]


def memory_batches(source, *, canvas, channels, batch_size, block, num_blocks):
    """`evaluation_batches` of a `MemorySource`; the last one is padded."""
    assert (canvas, channels) == (4, 1) and (block, num_blocks) == (0, 1)
    source.passes = getattr(source, "passes", 0) + 1
    for start in range(0, len(source), batch_size):
        record = np.arange(start, start + batch_size, dtype=np.int32)
        rows = np.minimum(record, len(source) - 1)
        yield {
            "image": source.images[rows][:, None],
            "box": np.tile(np.array([0, 0, 4, 4], np.int32), (batch_size, 1, 1)),
            "labels": source.labels[rows],
            "patient": source.patients[rows],
            "mask": record < len(source),
            "record": rows.astype(np.int32),
        }


def refuse_shared_patients(*opened):
    for one, other in itertools.combinations(opened, 2):
        if set(one.patient_keys) & set(other.patient_keys):
            raise UserError(f"{one.name} and {other.name} share patients")


def pixels(state, batch):
    """A stand-in for an encoder: 16 scaled pixels."""
    image = batch["image"][:, 0].reshape(-1, 16).astype(jnp.float32) / 255
    return image * state["scale"]


def install(monkeypatch):
    """Makes sources openable by config; returns a function that fills the table of them."""
    sources = {}
    monkeypatch.setattr(features, "evaluation_batches", memory_batches)
    for module in (scored, zero_shot):
        monkeypatch.setattr(
            module, "open_source", lambda config: sources[config["dir"], config["split"]]
        )
    monkeypatch.setattr(scored, "check_disjoint", refuse_shared_patients)

    def fill(task="multi_label", sizes=(120, 60, 90), num_classes=3):
        for i, (split, n) in enumerate(zip(scored.SPLITS, sizes, strict=True)):
            sources["toy", split] = MemorySource(
                split, n, task=task, num_classes=num_classes, seed=i, first_patient=1000 * i
            )
        return sources

    return fill


def settings(**overrides):
    """Arguments of a probe on the toy data."""
    splits = {split: {"dir": "toy", "split": split} for split in scored.SPLITS}
    form = {"canvas": 4, "channels": 1, "preprocessing": {"size": 4}, "batch_size": 30}
    return {**splits, **form, "num_resamples": 50, "hash_key": KEY, **overrides}
