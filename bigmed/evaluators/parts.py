"""The labelled images that an evaluation learns from or scores, one by one or case by case."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from bigmed import statistics
from bigmed.data.schema import MISSING
from bigmed.data.sources import Source
from bigmed.errors import UserError, did_you_mean

# Of the labels of one case: a finding on any image is the case's; 'no' needs an image that says so.
_RANK = {1: 3, statistics.UNCERTAIN: 2, 0: 1, MISSING: 0}
_BY_RANK = np.array([code for code, _ in sorted(_RANK.items(), key=lambda item: item[1])], np.int8)


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of one source, and the units that they are scored as.

    Attributes:
      name: 'train', 'val', 'test', or that of another test set.
      source: where the images lie.
      rows: int [n], their record numbers.
      image_labels: int8 [n, L], codes of `bigmed.data.schema`.
      unit_of: int [n], codes 0 to m - 1 of the case that each image belongs to; None where each
        image is a unit, m = n.
    """

    name: str
    source: Source
    rows: np.ndarray
    image_labels: np.ndarray
    unit_of: np.ndarray | None

    def average(self, values: np.ndarray, axis: int = 0) -> np.ndarray:
        """Means over the images of each unit: n becomes m along `axis`."""
        if self.unit_of is None:
            return values
        moved = np.moveaxis(values, axis, 0)
        total = np.zeros((self.num_units, *moved.shape[1:]), np.float64)
        np.add.at(total, self.unit_of, moved)
        count = np.bincount(self.unit_of).reshape(-1, *[1] * (total.ndim - 1))
        return np.moveaxis((total / count).astype(values.dtype), 0, axis)

    @property
    def num_units(self) -> int:
        return len(self.rows) if self.unit_of is None else int(self.unit_of.max()) + 1

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int8 [m, L] codes of the units."""
        if self.unit_of is None:
            return self.image_labels
        return _strongest(self.image_labels, self.unit_of, self.num_units)

    @functools.cached_property
    def patients(self) -> np.ndarray:
        """int [m] codes into `source.patient_keys`."""
        of_image = self.source.patients[self.rows]
        return of_image if self.unit_of is None else of_image[self.first]

    @functools.cached_property
    def first(self) -> np.ndarray:
        """int [m], the place in `rows` of each unit's first image."""
        if self.unit_of is None:
            return np.arange(len(self.rows))
        return np.unique(self.unit_of, return_index=True)[1]


def make_part(
    name: str, source: Source, labels: np.ndarray, keep: np.ndarray, task: str, by_case: bool
) -> Part:
    """The kept images of a source.

    Args:
      labels: int8 [N, L] of all images.
      keep: bool [N].
      task: 'single_label' or 'multi_label'.
      by_case: whether the images of a case are one unit.

    Raises:
      UserError: 'single_label' with a case whose images are of several classes.
    """
    rows = np.flatnonzero(keep)
    unit_of = np.unique(source.cases[rows], return_inverse=True)[1] if by_case else None
    part = Part(name, source, rows, labels[rows], unit_of)
    if by_case and task == "single_label":
        mixed = int(((part.labels == 1).sum(axis=1) > 1).sum())
        if mixed:
            raise UserError(
                f"{name} source '{source.name}' has {mixed} cases whose images are of several "
                "classes, so their average has no label; average nothing, or group by another case"
            )
    return part


def training_targets(labels: np.ndarray, uncertain: str) -> np.ndarray:
    """What is learnt from label codes [N, L] under a policy: int8, or float32 for 'smooth'.

    Targets are in [0, 1]; negative ones are not learnt from ('three_class' learns from the
    uncertain ones, which stay -1, as a class of their own).
    """
    labels = statistics.apply_label_policy(labels, uncertain)
    if uncertain != "smooth":
        return labels
    smooth = np.where(labels == statistics.UNCERTAIN, statistics.SMOOTH_TARGET, labels)
    return smooth.astype(np.float32)


def learnable(targets: np.ndarray) -> np.ndarray:
    """bool [L]: the classes with both positive and negative ones in targets [N, L]."""
    return (targets > 0.5).any(axis=0) & ((targets >= 0) & (targets <= 0.5)).any(axis=0)


def map_labels(
    source: Source,
    label_map: Mapping[str, str | Sequence[str]] | None,
    class_names: Sequence[str],
    where: str,
) -> np.ndarray:
    """Labels of another data set in the classes of a trained head: int8 [N, L].

    Args:
      source: of the other data set.
      label_map: of a head's class -> the data set's class, or several of which any makes it
        present; None for the classes of equal names. Classes that are not in it are missing.
      class_names: L names, of the head.
      where: the config key, for messages.

    Raises:
      UserError: a class that is not there, or nothing mapped.
    """
    if not label_map:
        label_map = {name: name for name in class_names if name in source.class_names}
    if not label_map:
        raise UserError(
            f"{where}: '{source.name}' has the classes {', '.join(source.class_names) or 'none'}, "
            f"none of which is among {', '.join(class_names)}; give a label_map"
        )
    mapped = np.full((len(source), len(class_names)), MISSING, np.int8)
    for name, others in label_map.items():
        if name not in class_names:
            raise UserError(f"{where}.label_map: '{name}': {did_you_mean(name, class_names)}")
        others = (others,) if isinstance(others, str) else tuple(others)
        for other in others:
            if other not in source.class_names:
                raise UserError(
                    f"{where}.label_map.{name}: '{source.name}' has no class '{other}'; "
                    f"{did_you_mean(other, source.class_names)}"
                )
        columns = source.labels[:, [source.class_names.index(other) for other in others]]
        rank = np.max([_ranks(column) for column in columns.T], axis=0)
        mapped[:, list(class_names).index(name)] = _BY_RANK[rank]
    return mapped


def _ranks(labels: np.ndarray) -> np.ndarray:
    ranks = np.zeros(labels.shape, np.int64)
    for code, rank in _RANK.items():
        ranks[labels == code] = rank
    return ranks


def _strongest(labels: np.ndarray, unit_of: np.ndarray, num_units: int) -> np.ndarray:
    """The label of each unit: 1 where any image has it, then -1, then 0, else missing."""
    ranks = np.zeros((num_units, labels.shape[1]), np.int64)
    np.maximum.at(ranks, unit_of, _ranks(labels))
    return _BY_RANK[ranks]
