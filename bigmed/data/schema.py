"""The data set on disk: features, records, label codes, side-car index, patient splits.

A data set is a TFDS directory in ArrayRecord form (readable by
`tfds.builder_from_directory(DIR).as_data_source(split)` without TensorFlow), with three kinds of
file beside TFDS's own:

    bigmed.json          facts about the set: classes, task, counts, hashes of the splits
    index-<split>.npz    patient and study codes and labels, so that opening reads no image
    quarantine.csv       source files that were left out: row, file, reason

Fields of a record (only `image` is always there):

    image       encoded JPEG or PNG; 1 or 3 channels; uint8, or uint16 as PNG
    mask        encoded 8-bit PNG, one channel, of the image's height and width; or `NO_MASK`
    labels      int8 [L], values PRESENT, ABSENT, UNCERTAIN, MISSING; one-hot where single-label
    image_id, patient_id, study_id, text, view, source      UTF-8 text
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import cv2
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from bigmed.errors import UserError

PRESENT, ABSENT, UNCERTAIN, MISSING = 1, 0, -1, -2
LABEL_CODES = (PRESENT, ABSENT, UNCERTAIN, MISSING)
TASKS = ("single_label", "multi_label", "none")
TEXT_FIELDS = ("image_id", "patient_id", "study_id", "text", "view", "source")
FIELDS = ("image", "mask", "labels", *TEXT_FIELDS)
# A record without a mask in a set that has masks: TFDS wants every field, so it is one pixel.
NO_MASK = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()

FORMAT = 1
INFO_FILE = "bigmed.json"
QUARANTINE_FILE = "quarantine.csv"


# ---------------------------------------------------------------------------- features and records


def features(
    fields: Iterable[str], *, num_classes: int = 0, channels: int = 1, bits: int = 8
) -> tfds.features.FeaturesDict:
    """TFDS features of a data set with these `fields` (a subset of `FIELDS`)."""
    dtype = np.uint8 if bits == 8 else np.uint16
    # TFDS decodes uint16 only when told that the encoding is PNG.
    encoding = None if bits == 8 else "png"
    made = {
        "image": tfds.features.Image(
            shape=(None, None, channels), dtype=dtype, encoding_format=encoding
        ),
        "mask": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png"),
        "labels": tfds.features.Tensor(shape=(num_classes,), dtype=np.int8),
    }
    return tfds.features.FeaturesDict(
        {
            name: made[name] if name in made else tfds.features.Text()
            for name in FIELDS
            if name in set(fields)
        }
    )


def encode_example(values: Mapping[str, bytes | str | np.ndarray]) -> bytes:
    """One record as serialised tf.train.Example bytes: the same bytes for the same values.

    Bytes and text become bytes features, integer arrays int64 features, as TFDS itself writes.
    """
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name, value in values.items():
        if isinstance(value, str):
            feature[name].bytes_list.value.append(value.encode("utf-8"))
        elif isinstance(value, bytes):
            feature[name].bytes_list.value.append(value)
        else:
            feature[name].int64_list.value.extend(np.asarray(value, np.int64).ravel().tolist())
    return example.SerializeToString(deterministic=True)


def decode_fields(record: bytes, keys: Sequence[str]) -> list:
    """Values of the named features of a serialised example; only these are converted.

    Returns:
      One value a key: bytes for a bytes feature (text too), int64 [n] or float32 [n] for a
      numeric one, None where the record has no such feature.

    Raises:
      google.protobuf.message.DecodeError: the bytes are no serialised example.
    """
    feature = tf_example_pb2.Example.FromString(record).features.feature
    values = []
    for key in keys:
        if key not in feature:  # reading an absent key of a protobuf map would add it
            values.append(None)
            continue
        one = feature[key]
        kind = one.WhichOneof("kind")
        if kind == "bytes_list":
            values.append(one.bytes_list.value[0] if one.bytes_list.value else b"")
        elif kind == "int64_list":
            values.append(np.array(one.int64_list.value, np.int64))
        elif kind == "float_list":
            values.append(np.array(one.float_list.value, np.float32))
        else:
            values.append(None)
    return values


# ---------------------------------------------------------------------------------- side-car index


@dataclasses.dataclass(frozen=True)
class Index:
    """Who and what each record of a split is, in record order, without its image.

    Attributes:
      patients: int32 [N] codes into `patient_keys`.
      labels: int8 [N, L] label codes; L is 0 for an unlabelled set.
      patient_keys: patient id of each code. Never logged.
      studies: int32 [N] codes into `study_keys`, or None where the set has no studies. A study
        belongs to one patient: the same study id under two patients makes two codes.
      study_keys: study id of each code.
    """

    patients: np.ndarray
    labels: np.ndarray
    patient_keys: tuple[str, ...]
    studies: np.ndarray | None = None
    study_keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.patients)

    @classmethod
    def build(
        cls, patient_ids: Sequence[str], labels: np.ndarray, study_ids: Sequence[str] | None = None
    ) -> "Index":
        """Codes ids by first appearance; `labels` is int8 [N, L]."""
        patients, patient_keys = _codes(patient_ids)
        labels = np.asarray(labels, np.int8).reshape(len(patients), -1)
        if study_ids is None:
            return cls(patients, labels, tuple(patient_keys))
        studies, keys = _codes(list(zip(patient_ids, study_ids, strict=True)))
        study_keys = tuple(study for _, study in keys)
        return cls(patients, labels, tuple(patient_keys), studies, study_keys)

    def save(self, path: pathlib.Path) -> None:
        """Writes the index as .npz (arrays and UTF-8 JSON only, no pickle)."""
        arrays = {
            "patients": self.patients,
            "labels": self.labels,
            "patient_keys": _json_bytes(self.patient_keys),
        }
        if self.studies is not None:
            arrays |= {"studies": self.studies, "study_keys": _json_bytes(self.study_keys)}
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Index":
        """Reads what `save` wrote.

        Raises:
          UserError: the file is missing, torn, or its arrays do not belong together.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored)
            index = cls(
                arrays["patients"],
                arrays["labels"],
                tuple(json.loads(arrays["patient_keys"].tobytes())),
                arrays.get("studies"),
                tuple(json.loads(arrays["study_keys"].tobytes())) if "studies" in arrays else (),
            )
        except FileNotFoundError:
            raise UserError(f"{path}: index not found; prepare the data set again") from None
        except Exception as error:  # a torn zip fails in many ways (zlib, struct, KeyError, ...)
            kind = type(error).__name__
            raise UserError(f"{path}: unreadable index ({kind}); prepare it again") from error
        columns = [index.labels, *([] if index.studies is None else [index.studies])]
        if any(len(column) != len(index) for column in columns):
            raise UserError(f"{path}: columns of different lengths; prepare the data set again")
        return index


def index_path(directory: pathlib.Path, split: str) -> pathlib.Path:
    """Where the side-car index of a split lies."""
    return pathlib.Path(directory) / f"index-{split}.npz"


def _codes(keys: Sequence) -> tuple[np.ndarray, list]:
    """int32 [N] codes by first appearance, and the distinct keys."""
    seen: dict = {}
    codes = np.fromiter((seen.setdefault(key, len(seen)) for key in keys), np.int32, len(keys))
    return codes, list(seen)


def _json_bytes(strings: Sequence[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(list(strings)).encode("utf-8"), np.uint8)


# ------------------------------------------------------------------------------------- bigmed.json


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    """The content of bigmed.json.

    Attributes:
      counts: at least {"images": {split: n}, "rows": n, "quarantined": {reason: n}}.
      patients: {split: n}.
      split_sha256: {split: hash, ..., "all": hash}, see `split_sha256`.
      synthetic: True where the images were made by a program.
      plan_sha256: hash of the source and the choices that the set was made from.
    """

    name: str
    class_names: tuple[str, ...]
    task: str
    split_sha256: Mapping[str, str]
    counts: Mapping
    patients: Mapping[str, int]
    synthetic: bool = False
    bits: int = 8
    channels: int = 1
    plan_sha256: str = ""

    def write(self, path: pathlib.Path) -> None:
        """Writes the content of bigmed.json to the file `path`."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        pathlib.Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: pathlib.Path) -> "DatasetFacts":
        """Reads bigmed.json.

        Raises:
          FileNotFoundError: `directory` has none (a TFDS directory of other origin).
          UserError: the file is unreadable or of another format.
        """
        path = pathlib.Path(directory) / INFO_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.pop("format")
            if found == FORMAT:
                content["class_names"] = tuple(content["class_names"])
                return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: unreadable ({type(error).__name__}: {error})") from error
        raise UserError(f"{path}: format {found}; this version reads format {FORMAT}")


# ---------------------------------------------------------------------------------- patient splits


def patient_uniform(patient_id: str, seed: int) -> float:
    """A number in [0, 1), fixed by (seed, patient id) alone: BLAKE2b keyed with the seed.

    Subsets `{p: patient_uniform(p, seed) < fraction}` are therefore nested in the fraction, and
    adding or removing other patients moves nobody.
    """
    digest = _keyed_hash(int(seed)).copy()
    digest.update(patient_id.encode("utf-8"))
    # 53 bits, as many as a float64 in [0, 1) holds exactly.
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2.0**53


@functools.lru_cache(maxsize=8)
def _keyed_hash(seed: int):
    return hashlib.blake2b(digest_size=8, key=b"bigmed-patient-" + str(seed).encode())


def patient_split(
    patient_ids: Iterable[str], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Split name of each distinct patient: a pure function of (seed, fractions, patient id).

    Args:
      fractions: split name -> share, in order, summing to 1, e.g. dict(train=.7, val=.1, test=.2).

    Raises:
      UserError: a share is negative or they do not sum to 1.
    """
    shares = np.array(list(fractions.values()), np.float64)
    if not len(shares) or np.any(shares < 0) or abs(shares.sum() - 1) > 1e-6:
        raise UserError(
            f"fractions {', '.join(f'{v:g}' for v in shares)}: give shares >= 0 that sum to 1"
        )
    names, edges = list(fractions), np.cumsum(shares)
    edges[-1] = 1.0  # a sum of 0.9999999 must leave no gap at the top
    return {
        patient: names[int(np.searchsorted(edges, patient_uniform(patient, seed), side="right"))]
        for patient in dict.fromkeys(patient_ids)
    }


def split_sha256(patients: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Hash of each split's set of patient ids, and of the whole division under "all".

    Neither the order of patients nor how many images they have matters.
    """
    hashes = {
        split: hashlib.sha256(json.dumps(sorted(set(ids))).encode("utf-8")).hexdigest()
        for split, ids in patients.items()
    }
    hashes["all"] = hashlib.sha256(json.dumps(sorted(hashes.items())).encode("utf-8")).hexdigest()
    return hashes
