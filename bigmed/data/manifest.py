"""What a data set is to be made from: a folder, or a CSV manifest, as a list of rows.

Nothing here opens an image; a row says which file, whose, and with which labels and texts.
"""

import csv
import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from bigmed.data.schema import ABSENT, MISSING, PRESENT, UNCERTAIN
from bigmed.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff")
SPLIT_ALIASES = {"valid": "val", "validation": "val"}
_SPLIT_FOLDERS = {"train", "val", "test", *SPLIT_ALIASES}
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_CELL_CODES = {1.0: PRESENT, 0.0: ABSENT, -1.0: UNCERTAIN}

LabelFn = Callable[[str, int], tuple[int, ...]]  # (cell or folder, row number) -> label codes


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where the images are and how to read the manifest: one field per flag of the command.

    `source` is a folder or a .csv / .tsv file. Columns are None where the manifest has none.
    """

    source: str
    image_column: str | None = None  # default: image_path
    image_root: str | None = None  # of relative image paths; default: the manifest's folder
    patient_column: str | None = None
    patient_regex: str | None = None
    study_column: str | None = None
    group_column: str | None = None
    split_column: str | None = None
    label_columns: tuple[str, ...] = ()
    label_column: str | None = None
    label_separator: str | None = None
    text_column: str | None = None
    view_column: str | None = None
    mask_column: str | None = None
    filter: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    folder_labels: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of the source.

    Attributes:
      number: counts from 1 in the manifest (its header not counted) or the sorted folder.
      file: the path as the source has it; also the image id.
      patient: "" where the source does not tell; such a row is left out.
      labels: one label code a class.
      texts: (field, value) of study_id, text and view, where the source has them.
      mask: path of the mask, "" for none.
      group: what a split must not tear apart: the patient unless told otherwise.
      split: the given split; "" where it is to be drawn.
    """

    number: int
    file: str
    path: str
    patient: str
    labels: tuple[int, ...]
    texts: tuple[tuple[str, str], ...]
    mask: str
    group: str
    split: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All rows of a source, in order, and what they have in common.

    Attributes:
      text_fields: which of study_id, text, view the rows have.
      notes: plain sentences that the user should read.
    """

    rows: list[Row]
    class_names: tuple[str, ...]
    task: str
    text_fields: tuple[str, ...]
    has_masks: bool
    given_splits: bool
    notes: list[str]


def read_source(config: SourceConfig) -> Manifest:
    """Reads a folder or a manifest.

    Raises:
      UserError: source missing, empty or of an unknown kind, unknown columns, impossible labels.
    """
    source = pathlib.Path(config.source)
    if source.is_dir():
        manifest = _read_folder(source, config)
    elif source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        manifest = _read_csv(source, config)
    elif source.exists():
        raise UserError(f"--source {source}: give a folder of images, or a .csv or .tsv manifest")
    else:
        raise UserError(f"--source {source}: no such file or folder")
    if not manifest.rows:
        raise UserError(f"--source {source}: nothing in it (or --filter leaves nothing)")
    return manifest


# ------------------------------------------------------------------------------------------ folder


def _read_folder(source: pathlib.Path, config: SourceConfig) -> Manifest:
    """Rows of the sorted files of [split/][class/]any/depth/name."""
    for flag in ("image_root", *_COLUMN_FLAGS, "label_columns", "label_separator", "filter"):
        if getattr(config, flag):
            raise UserError(f"--{flag}: only for a CSV manifest; --source {source} is a folder")
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    tops = {file.parts[0] for file in images if len(file.parts) > 1}
    depth = 1 if tops and tops <= _SPLIT_FOLDERS else 0
    folders = {file.parts[depth] for file in images if len(file.parts) > depth + 1}
    notes = []
    # One folder alone (say, images/) tells nothing apart, so it is no class.
    labelled = config.folder_labels and len(folders) > 1
    if labelled:
        class_names, label = _single_label(folders, config.classes, "sub-folder")
        # Their names are not said: they may be patients' after all.
        notes.append(f"{len(class_names)} sub-folders taken as classes (see --no_folder_labels)")
    elif config.classes:
        raise UserError(f"--classes: --source {source} has no class sub-folders")
    else:
        class_names, label = (), _no_label
    if not config.patient_regex:
        notes.append("no --patient_regex: each image counts as a patient of its own")
    patient_of = _patient_from_name(config.patient_regex)
    rows = []
    for number, file in enumerate(files, 1):
        name = file.as_posix().encode("utf-8", "replace").decode("utf-8")
        folder = file.parts[depth] if len(file.parts) > depth + 1 else ""
        labels = label(folder if folder in folders else "", number)
        split = file.parts[0] if depth and file.parts[0] in tops else ""
        patient = patient_of(name)
        split = SPLIT_ALIASES.get(split, split)
        path = str(source / file)
        rows.append(Row(number, name, path, patient, labels, (), "", patient, split))
    if rows and not any(row.patient for row in rows):
        raise UserError(f"--patient_regex {config.patient_regex!r}: matches no file of the source")
    task = "single_label" if labelled else "none"
    return Manifest(rows, class_names, task, (), False, bool(depth), notes)


def _patient_from_name(regex: str | None) -> Callable[[str], str]:
    """Patient id of a relative path: the first group or the whole match; "" without a match."""
    if not regex:
        return lambda name: name
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(f"--patient_regex {regex!r}: {error}") from error

    def patient(name: str) -> str:
        match = pattern.search(name)
        return (match.group(1 if pattern.groups else 0) or "") if match else ""

    return patient


# --------------------------------------------------------------------------------------------- CSV

_COLUMN_FLAGS = tuple(
    f"{name}_column"
    for name in ("image", "patient", "study", "group", "split", "label", "text", "view", "mask")
)


def _read_csv(source: pathlib.Path, config: SourceConfig) -> Manifest:
    columns, cells = _read_cells(source)
    image_column = config.image_column or "image_path"
    wanted = {flag: getattr(config, flag) for flag in _COLUMN_FLAGS} | {
        "image_column": image_column
    }
    for flag, column in [*wanted.items(), *(("label_columns", c) for c in config.label_columns)]:
        if column is not None and column not in columns:
            raise UserError(
                f"--{flag} {column!r}: no such column in {source.name}; "
                f"{did_you_mean(column, columns)}"
            )
    if not config.folder_labels:
        raise UserError("--no_folder_labels: only for a folder; the source is a manifest")
    numbered = _filtered(list(enumerate(cells, 1)), columns, config.filter)
    notes = []
    if not config.patient_column and not config.patient_regex:
        notes.append("no --patient_column: each image counts as a patient of its own")
    patient_of = _patient_from_name(config.patient_regex)
    class_names, label_of, task = _csv_labels(config, numbered, notes)
    text_columns = [
        (field, column)
        for field, column in (
            ("study_id", config.study_column),
            ("text", config.text_column),
            ("view", config.view_column),
        )
        if column
    ]
    root = pathlib.Path(config.image_root) if config.image_root else source.parent
    rows = []
    for number, row in numbered:
        file = row[image_column].strip()
        patient = row[config.patient_column].strip() if config.patient_column else patient_of(file)
        mask = row[config.mask_column].strip() if config.mask_column else ""
        split = row[config.split_column].strip() if config.split_column else ""
        if split and not _SPLIT_NAME.fullmatch(split):
            raise UserError(
                f"--split_column: row {number} has {split!r}; a split is a word such as train"
            )
        rows.append(
            Row(
                number,
                file,
                str(root / file) if file else "",
                patient,
                label_of(row, number),
                tuple((field, row[column].strip()) for field, column in text_columns),
                str(root / mask) if mask else "",
                (row[config.group_column].strip() if config.group_column else "") or patient,
                SPLIT_ALIASES.get(split, split),
            )
        )
    fields = tuple(field for field, _ in text_columns)
    has_masks, given = bool(config.mask_column), bool(config.split_column)
    return Manifest(rows, class_names, task, fields, has_masks, given, notes)


def _read_cells(source: pathlib.Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV (commas) or TSV (tabs) file, UTF-8."""
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(
                file, delimiter="\t" if source.suffix.lower() == ".tsv" else ",", strict=True
            )
            columns = list(reader.fieldnames or ())
            cells = []
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise UserError(f"{source}: row {number} has not {len(columns)} cells")
                cells.append(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from error
    except csv.Error as error:
        raise UserError(f"{source}: row {len(cells) + 1}: {error}") from error
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise UserError(f"{source}: column {repeated[0]!r} stands twice in the header")
    return columns, cells


def _filtered(
    numbered: list[tuple[int, dict]], columns: Sequence[str], filters: Iterable[str]
) -> list[tuple[int, dict]]:
    """Rows that match every filtered column; several values of one column are alternatives."""
    wanted: dict[str, set[str]] = {}
    for entry in filters:
        column, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f"--filter {entry!r}: write column=value")
        if column not in columns:
            raise UserError(f"--filter {entry!r}: no such column; {did_you_mean(column, columns)}")
        wanted.setdefault(column, set()).add(value)
    return [
        (number, row)
        for number, row in numbered
        if all(row[column].strip() in values for column, values in wanted.items())
    ]


# ------------------------------------------------------------------------------------------ labels


def _csv_labels(config: SourceConfig, numbered: list[tuple[int, dict]], notes: list[str]):
    """Class names, a function (row, number) -> label codes, and the task."""
    if config.label_column and config.label_columns:
        raise UserError("--label_column and --label_columns: give one of them")
    if config.label_separator and not config.label_column:
        raise UserError("--label_separator: needs --label_column")
    if config.classes and not config.label_column:
        raise UserError("--classes: needs --label_column (--label_columns name their classes)")
    if config.label_columns:
        names = config.label_columns
        return names, lambda row, number: _codes_of(row, names, number), "multi_label"
    if not config.label_column:
        return (), lambda row, number: (), "none"
    column, separator = config.label_column, config.label_separator
    cells = {row[column].strip() for _, row in numbered}
    if separator:
        names, label = _several_labels(cells, config.classes, separator, notes)
        task = "multi_label"
    else:
        names, label = _single_label(cells - {""}, config.classes, f"--label_column {column}")
        task = "single_label"
    return names, lambda row, number: label(row[column].strip(), number), task


def _codes_of(row: dict[str, str], names: Sequence[str], number: int) -> tuple[int, ...]:
    """Label codes of one column a class: 1, 0, -1 (also 1.0, ...), blank for missing."""
    codes = []
    for name in names:
        cell = row[name].strip()
        try:
            codes.append(_CELL_CODES[float(cell)] if cell else MISSING)
        except (KeyError, ValueError):
            raise UserError(
                f"--label_columns {name!r}: row {number} has {cell!r}; "
                "valid: 1, 0, -1 (uncertain) or blank (missing)"
            ) from None
    return tuple(codes)


def _single_label(
    found: Iterable[str], classes: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], LabelFn]:
    """One-hot codes; a blank is missing; a name outside `classes` is refused."""
    found = sorted(found)
    names = classes or tuple(found)
    _refuse_unknown(names, found)
    strangers = sorted(set(found) - set(names))
    if strangers:
        raise UserError(
            f"{where}: {strangers[0]!r} is not among --classes; {did_you_mean(strangers[0], names)}"
        )
    codes = {
        name: tuple(PRESENT if other == name else ABSENT for other in names) for name in names
    } | {"": (MISSING,) * len(names)}
    return names, lambda name, number: codes[name]


def _several_labels(
    cells: Iterable[str], classes: tuple[str, ...], separator: str, notes: list[str]
) -> tuple[tuple[str, ...], LabelFn]:
    """Named classes are present and the others absent; a blank cell is missing throughout."""
    parts = {cell: {part.strip() for part in cell.split(separator)} - {""} for cell in cells}
    found = sorted(set().union(*parts.values()))
    names = classes or tuple(found)
    _refuse_unknown(names, found)
    strangers = [name for name in found if name not in names]
    if strangers:
        notes.append(f"labels not among --classes, left aside: {', '.join(strangers)}")

    def label(cell: str, number: int) -> tuple[int, ...]:
        if not parts[cell]:
            return (MISSING,) * len(names)
        return tuple(PRESENT if name in parts[cell] else ABSENT for name in names)

    return names, label


def _no_label(name: str, number: int) -> tuple[int, ...]:
    return ()


def _refuse_unknown(classes: Sequence[str], found: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise UserError(f"--classes: {repeated[0]!r} stands twice")
    for name in classes:
        if name not in found:
            raise UserError(f"--classes {name!r}: no row has it; {did_you_mean(name, found)}")
