"""Data sets as random-access sources: our own, any TFDS directory, any TFDS catalogue name.

Opening one reads no image: labels and patients come from the side-car index that ingest writes, or
from one pass over the records whose result is kept in a cache folder ($BIGMED_CACHE, else
~/.cache/bigmed).
"""

import dataclasses
import importlib.util
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bigmed import statistics
from bigmed.data import schema
from bigmed.data.indexing import build_index, digest, labels_of, text_of
from bigmed.data.records import Chosen, Records, Shard
from bigmed.errors import UserError, did_you_mean

CASES = ("patient_id", "study_id")
_KEYS = (
    *("dir", "name", "split", "fields", "classes", "case", "id_space", "weight"),
    *("labelled", "fraction", "fraction_seed"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
      name: the data set's name and split, for messages: 'cxr_nih/train'.
      class_names: names of the L label columns.
      task: 'single_label' (one-hot labels), 'multi_label' or 'none'.
      split_sha256: hash of the set of patients in the split.
      fingerprint: hash of what the split holds, wherever it lies.
      bits: 8 or 16, of the stored pixels.
      patients: int32 [N], codes into `patient_keys`.
      cases: int32 [N], code of the case of each image.
      case_key: what a case is, 'patient_id' or 'study_id' (`case` of the config).
      labels: int8 [N, L], label codes of `bigmed.data.schema`.
      patient_keys: patient id of each code. Never logged.
      has_patients: False where the data set names no patients and each image counts as its own.
      id_space: patients of sources with one id space are the same people if their ids are equal.
      synthetic: True where a program made the images.
      records: the encoded records.
    """

    name: str
    class_names: tuple[str, ...]
    task: str
    split_sha256: str
    fingerprint: str
    bits: int
    patients: np.ndarray
    cases: np.ndarray
    case_key: str
    labels: np.ndarray
    patient_keys: tuple[str, ...]
    has_patients: bool
    id_space: str
    synthetic: bool
    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def only(self, rows: np.ndarray) -> "Source":
        """The source of these of its records, int [n], in their order."""
        codes, patients = np.unique(self.patients[rows], return_inverse=True)
        keys = tuple(self.patient_keys[code] for code in codes)
        records = self.records
        return dataclasses.replace(
            self,
            split_sha256=schema.split_sha256({"some": keys})["some"],
            fingerprint=digest(self.fingerprint, rows),
            patients=patients.astype(np.int32),
            cases=self.cases[rows],
            labels=self.labels[rows],
            patient_keys=keys,
            records=Chosen(records.dataset, records.shards, records.keys, rows),
        )

    def read(self, ids: Sequence[int]) -> list[bytes]:
        """Encoded images of these records, in order; UserError names one that cannot be read."""
        return self.records.read("image", ids)

    def read_field(self, name: str, ids: Sequence[int]) -> list:
        """Another field of these records, in order: bytes (masks), str (texts) or int64 arrays.

        Raises:
          UserError: the data set has no such field.
        """
        if name not in self.records.keys:
            raise UserError(
                f"data set '{self.name}' has no field '{name}'; "
                f"{did_you_mean(name, self.records.keys)}"
            )
        values = self.records.read(name, ids)
        if name in schema.TEXT_FIELDS:
            return [text_of(value) for value in values]
        return values

    def describe(self) -> str:
        """One line about the source, without patient identifiers."""
        people = f"{len(self.patient_keys)} patients"
        if not self.has_patients:
            people = "no patient ids: each image counts as its own patient"
        labels = (
            f"{len(self.class_names)} classes ({self.task})" if self.class_names else "no labels"
        )
        made = "synthetic, " if self.synthetic else ""
        return f"{self.name}: {made}{len(self)} images of {self.bits} bits, {people}, {labels}"


def open_source(config: Mapping[str, Any]) -> Source:
    """Opens one split of a data set.

    Args:
      config: `dir`, a TFDS directory in ArrayRecord form (or TFDS's folder of data sets where
        `name` is given); `name`, a data set of the TFDS catalogue; `split`, TFDS's syntax
        ('train', 'train[:10%]'); `fields`, our field names -> the data set's, where they differ;
        `classes`, the label columns to keep, in order; `case`, 'patient_id' or 'study_id', what
        images are grouped by for pairs; `id_space`, set it to keep the patient ids apart from
        those of other sources. A `weight` is the pipeline's. Of the records, all are taken or:
        `labelled`, a label policy, only those that can be learnt from under it (`learnable_rows`);
        `fraction` and `fraction_seed`, only those of so many patients (`drawn_patients`).

    Raises:
      UserError: a key, directory, split, field or class that is not there; labels that are none.
    """
    config = {key: value for key, value in config.items() if value is not None}
    for key in config:
        if key not in _KEYS:
            raise UserError(f"data source has no key '{key}'; {did_you_mean(key, _KEYS)}")
    split = str(config.get("split", ""))
    if not split:
        raise UserError("data source: give split, e.g. 'train'")
    info, directory = _open_info(config)
    facts = _facts(directory)
    dataset = facts.name if facts else info.name
    keys = _field_map(dict(config.get("fields", {})), list(info.features), dataset)
    records = Records(dataset, _shards(info, split, dataset), keys)
    read_labels, class_names, task = labels_of(info.features, keys, facts)
    whole = {
        part: Records(dataset, _shards(info, part, dataset), keys)
        for part in dict.fromkeys(shard.split for shard in records.shards)
    }
    index = build_index(records, whole, directory if facts else None, read_labels)
    if index.labels.shape[1] != len(class_names):
        raise UserError(
            f"data set '{dataset}': labels are {index.labels.shape[1]} wide but there are "
            f"{len(class_names)} class names; prepare the data set again"
        )
    case_key = str(config.get("case", CASES[0]))
    labels, class_names = _keep_classes(index.labels, class_names, config.get("classes"), dataset)
    files = [
        (os.path.basename(shard.path), os.path.getsize(shard.path), shard.skip, shard.take)
        for shard in records.shards
    ]
    source = Source(
        name=f"{dataset}/{split}",
        class_names=class_names,
        task=task if class_names else "none",
        split_sha256=schema.split_sha256({split: index.patient_keys})[split],
        fingerprint=digest(info.full_name, files, keys, class_names, labels, index.patients),
        bits=_bits(info.features[keys["image"]], keys["image"], dataset),
        patients=index.patients,
        cases=_cases(index, case_key, dataset),
        case_key=case_key,
        labels=labels,
        patient_keys=index.patient_keys,
        has_patients="patient_id" in keys,
        id_space=str(config.get("id_space", "")),
        synthetic=bool(facts and facts.synthetic),
        records=records,
    )
    return _only_some(source, config)


def split_names(config: Mapping[str, Any]) -> list[str]:
    """The splits that the data set of a config as `open_source` takes it has."""
    return list(_open_info(config)[0].splits)


def _only_some(source: Source, config: Mapping[str, Any]) -> Source:
    fraction, policy = float(config.get("fraction", 1.0)), config.get("labelled")
    keep = np.ones(len(source), bool)
    if policy:
        keep &= learnable_rows(source.labels, source.task, policy)
    if fraction < 1:
        seed = int(config.get("fraction_seed", 0))
        keep &= drawn_patients(source.patient_keys, fraction, seed)[source.patients]
    if keep.all():
        return source
    if not keep.any():
        raise UserError(f"'{source.name}' has no record that it is asked for: {config}")
    return source.only(np.flatnonzero(keep))


def learnable_rows(labels: np.ndarray, task: str, uncertain: str) -> np.ndarray:
    """bool [N]: the images that can be learnt from under a label policy (`statistics`)."""
    labels = statistics.apply_label_policy(labels, uncertain)
    if uncertain in statistics.TRAINING_POLICIES:  # an uncertain label is a target there
        labels = np.where(labels == schema.UNCERTAIN, schema.PRESENT, labels)
    return statistics.usable(labels, task)


def drawn_patients(patient_keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """bool [P]: a share of the patients, a pure function of (seed, fraction, patient).

    Smaller shares are subsets of larger ones of the same seed, and independent of how the splits
    were drawn.
    """
    uniform = [schema.patient_uniform(f"fraction/{key}", seed) for key in patient_keys]
    return np.array(uniform) < fraction


def shared_patients(one: Source, other: Source) -> int | None:
    """How many patients two sources share: the ids themselves are compared.

    Those of different id spaces are other people. Where one of the sources names no patients, each
    image counts as its own: the number of records that are in both, or None if there are none, as
    then it is not known whose the images are.
    """
    if one.has_patients and other.has_patients:
        same_space = one.id_space == other.id_space
        return len(set(one.patient_keys) & set(other.patient_keys)) if same_space else 0
    return len(one.records.places() & other.records.places()) or None


def check_disjoint(*sources: Source) -> None:
    """Checks that no two of the sources share patients (`shared_patients`), as far as is known.

    Raises:
      UserError: patients are shared; says of which two sources and how many, never who.
    """
    for one, other in itertools.combinations(sources, 2):
        shared = shared_patients(one, other)
        if shared:
            raise UserError(
                f"'{one.name}' and '{other.name}' share {shared} patients; splits must be disjoint "
                "by patient: split again, or give one an id_space if equal ids are other people"
            )


def joined_patients(sources: Sequence[Source]) -> list[np.ndarray]:
    """Patient codes of each source, int32 [N], equal for equal people only."""
    codes: dict[tuple, int] = {}
    joined = []
    for source in sources:
        # Without patient ids the keys mean nothing outside their source.
        named = source.has_patients
        space = source.id_space if named else source.fingerprint
        table = [codes.setdefault((named, space, k), len(codes)) for k in source.patient_keys]
        joined.append(np.array(table, np.int32)[source.patients])
    return joined


# --------------------------------------------------------------------------------- TFDS directories


def _open_info(config: Mapping[str, Any]) -> tuple[tfds.core.DatasetInfo, pathlib.Path]:
    """TFDS's description of the data set, and the directory it lies in."""
    if config.get("name"):
        directory = _prepare_from_catalogue(str(config["name"]), config.get("dir"))
    elif config.get("dir"):
        directory = pathlib.Path(str(config["dir"])).expanduser()
    else:
        raise UserError("data source: give dir, a TFDS directory, or name, of the TFDS catalogue")
    if not directory.is_dir():
        raise UserError(f"data directory not found: {directory}")
    if not (directory / "dataset_info.json").is_file():
        below = [*directory.glob("*/dataset_info.json"), *directory.glob("*/*/dataset_info.json")]
        hint = f"did you mean {below[0].parent}?" if below else "prepare it first"
        raise UserError(f"{directory} is no TFDS directory (no dataset_info.json); {hint}")
    info = tfds.builder_from_directory(str(directory)).info
    if info.file_format.value != "array_record":
        raise UserError(
            f"{directory} is stored as {info.file_format.value}, which has no random access; "
            "write it again with file_format='array_record'"
        )
    return info, directory


def _prepare_from_catalogue(name: str, data_dir: str | None) -> pathlib.Path:
    """Downloads and prepares a TFDS catalogue data set (once); its directory."""
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"'{name}' of the TFDS catalogue needs TensorFlow: pip install 'bigmed[tf]'; "
            "a data set that is prepared already opens with dir=..."
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        guess = did_you_mean(name, known).split("valid:")[0]
        raise UserError(f"the TFDS catalogue has no '{name}'; {guess}see its web page") from None
    try:
        builder.download_and_prepare()
    except Exception as error:  # a data set's own code: no network, no files placed by hand, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"'{name}' of the TFDS catalogue cannot be prepared: {reason}") from error
    return pathlib.Path(builder.data_path)


def _facts(directory: pathlib.Path) -> schema.DatasetFacts | None:
    """bigmed.json, or None for a TFDS directory of other origin."""
    try:
        return schema.DatasetFacts.read(directory)
    except FileNotFoundError:
        return None


def _shards(info: tfds.core.DatasetInfo, split: str, dataset: str) -> tuple[Shard, ...]:
    """The files (or parts of files) that a split expression stands for."""
    whole = {}  # file -> (its split, the number of its first record there)
    for name in info.splits:
        first = 0
        for part in info.splits[name].file_instructions:
            whole[str(part.filename)] = name, first
            first += part.examples_in_shard
    try:
        parts = info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError):  # all of which TFDS raises for a bad expression
        raise UserError(
            f"data set '{dataset}' has no split '{split}'; {did_you_mean(split, info.splits)}"
        ) from None
    if not parts:
        raise UserError(f"split '{split}' of data set '{dataset}' is empty")
    shards = []
    for part in parts:
        path = str(part.filename)
        if not os.path.isfile(path):
            raise UserError(f"data set '{dataset}', split '{split}': file not found: {path}")
        shards.append(Shard(path, part.skip, part.take, *whole[path]))
    return tuple(shards)


def _field_map(given: dict[str, str], features: list[str], dataset: str) -> dict[str, str]:
    """Our field name -> feature, for all the fields that the data set has."""
    for ours, theirs in given.items():
        if ours not in schema.FIELDS:
            raise UserError(f"fields.{ours}: no such field; {did_you_mean(ours, schema.FIELDS)}")
        if theirs not in features:
            raise UserError(
                f"fields.{ours}='{theirs}': data set '{dataset}' has no such feature; "
                f"{did_you_mean(theirs, features)}"
            )
    keys = {name: name for name in schema.FIELDS if name in features} | given
    if "image" not in keys:
        raise UserError(
            f"data set '{dataset}' has no feature 'image'; set fields.image to one of: "
            f"{', '.join(sorted(features))}"
        )
    return keys


def _bits(feature: Any, key: str, dataset: str) -> int:
    """Bits of the stored pixels: 8 or 16."""
    if isinstance(feature, tfds.features.Image):
        return 16 if feature.np_dtype == np.uint16 else 8
    if isinstance(feature, tfds.features.Text):
        return 8  # encoded bytes under another name
    raise UserError(
        f"feature '{key}' of data set '{dataset}' is a {type(feature).__name__}; "
        "valid for an image: tfds.features.Image, or Text holding an encoded image"
    )


def _keep_classes(
    labels: np.ndarray, names: tuple[str, ...], wanted: Sequence[str] | None, dataset: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The wanted label columns, in the order that they are wanted."""
    if wanted is None:
        return labels, names
    for name in wanted:
        if name not in names:
            raise UserError(
                f"classes: data set '{dataset}' has no class '{name}'; {did_you_mean(name, names)}"
            )
    return labels[:, [names.index(name) for name in wanted]], tuple(wanted)


def _cases(index: schema.Index, case: str, dataset: str) -> np.ndarray:
    if case not in CASES:
        raise UserError(f"case='{case}': {did_you_mean(case, CASES)}")
    if case == "patient_id":
        return index.patients
    if index.studies is None:
        raise UserError(f"case='study_id': data set '{dataset}' has no field study_id")
    return index.studies
