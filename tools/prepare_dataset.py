"""Prepares a data set for bigmed from a folder of images or a CSV manifest.

    python tools/prepare_dataset.py --source radiographs/ --out data/radiographs \\
        --patient_regex '^([^_]+)_'
    python tools/prepare_dataset.py --source manifest.csv --out data/cxr \\
        --patient_column patient_id --label_column finding --label_separator '|'

Reads JPEG, PNG and TIFF (8 and 16 bits, grey and colour) and writes a TFDS directory in ArrayRecord
form. What cannot be used is listed in OUT/quarantine.csv with the reason. A run that was stopped is
continued by the same command; the data set appears at OUT when it is whole (until then it grows in
OUT.partial). Exit code 0: done, or done already; 2: a mistake in the flags or the source.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

import tqdm

from bigmed.data.images import RESIZE_POLICIES
from bigmed.data.ingest import StoreConfig, prepare
from bigmed.data.ingest_worker import available_cores
from bigmed.data.manifest import SourceConfig
from bigmed.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR, UserError

PLAIN_LINE_EVERY = 30.0  # seconds, where there is no terminal to draw a bar on


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write for example .7,.1,.2") from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share from 0 to 1")
    return share


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of SourceConfig and StoreConfig have the names of their fields."""
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, help="folder, or .csv / .tsv file with a header")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="data set to make")
    parser.add_argument(
        "--patient_regex",
        help="patient id from the relative path: the first group, or the whole match",
    )
    parser.add_argument(
        "--classes", nargs="+", default=(), help="classes in this order (default: all, sorted)"
    )
    _add_folder_flags(
        parser.add_argument_group(
            "a folder",
            "[train|val|test/][class/]any/depth/name: sub-folders named train, val and test are "
            "splits, two or more others are classes",
        )
    )
    _add_manifest_flags(parser.add_argument_group("a manifest", "columns by name"))
    _add_store_flags(parser.add_argument_group("the store"))
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--workers", type=_positive, default=available_cores(), help="processes (default: cores)"
    )
    group.add_argument(
        "--max_bad",
        type=_share,
        default=0.05,
        help="largest share of unusable rows (default %(default)s); duplicates do not count",
    )
    return parser


def _add_folder_flags(group) -> None:
    group.add_argument(
        "--no_folder_labels",
        dest="folder_labels",
        action="store_false",
        help="sub-folders are not classes (say, one folder a patient)",
    )


def _add_manifest_flags(group) -> None:
    group.add_argument("--image_column", help="path of the image (default: image_path)")
    group.add_argument("--image_root", help="where relative paths start (default: the manifest's)")
    group.add_argument("--patient_column", help="whose image it is; a blank leaves the row out")
    group.add_argument("--study_column", help="study or case within the patient")
    group.add_argument(
        "--label_columns",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help="one column a class: 1 present, 0 absent, -1 uncertain, blank missing",
    )
    group.add_argument("--label_column", help="one column with the class's name; blank: missing")
    group.add_argument(
        "--label_separator", help="--label_column lists several names parted by this, e.g. '|'"
    )
    group.add_argument("--text_column", help="report or note")
    group.add_argument("--view_column", help="projection, e.g. PA")
    group.add_argument("--mask_column", help="path of a mask; blank for none")
    group.add_argument("--split_column", help="given splits; refused if a patient is in two")
    group.add_argument(
        "--group_column",
        help="what a split keeps together where that is more than the patient, e.g. "
        "near-duplicates; blank: the patient",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="keep these rows; repeat for other values of the column and for further columns",
    )


def _add_store_flags(group) -> None:
    default = StoreConfig()
    group.add_argument("--name", default="", help="name of the data set (default: from --out)")
    group.add_argument(
        "--size", type=_positive, default=default.size, help="pixels (default %(default)s)"
    )
    group.add_argument(
        "--resize",
        choices=RESIZE_POLICIES,
        default=default.resize,
        help="the side that becomes --size: 'longer' (default) and 'shorter' keep the proportions "
        "and never enlarge; 'exact' makes a square; 'none' keeps the size",
    )
    group.add_argument(
        "--format",
        choices=("auto", "jpeg", "png"),
        default=default.format,
        help="auto: 8 bits as JPEG of quality 95, 16 bits as PNG, which loses nothing",
    )
    group.add_argument(
        "--bits",
        choices=("auto", "8", "16"),
        default=default.bits,
        help="auto: 16 if any image has 16, so nothing is lost; 8 windows each 16-bit image "
        "between its 0.5 and 99.5 percentiles, which forgets absolute intensity",
    )
    group.add_argument(
        "--channels",
        choices=("auto", "1", "3"),
        default=default.channels,
        help="auto: 3 if any image is stored in colour",
    )
    group.add_argument(
        "--fractions",
        type=_fractions,
        default=default.fractions,
        metavar="TRAIN,VAL,TEST",
        help="shares of the patients (default .7,.1,.2), drawn by a hash of seed and patient id",
    )
    group.add_argument(
        "--seed", type=int, default=default.seed, help="of the splits (default %(default)s)"
    )


def show_progress(label: str, total: int) -> Callable[[int], None]:
    """A bar on a terminal; elsewhere a plain line now and then."""
    if sys.stderr.isatty():
        bar = tqdm.tqdm(total=total, desc=label, unit="image")

        def draw(count: int) -> None:
            bar.update(count)
            if bar.n >= total:
                bar.close()

        return draw
    started = last = time.monotonic()
    done = 0

    def tell(count: int) -> None:
        nonlocal done, last
        done, now = done + count, time.monotonic()
        if now - last > PLAIN_LINE_EVERY:
            last = now
            rate = done / (now - started)
            print(f"{label}: {done}/{total} images, {rate:.0f} images/s", file=sys.stderr)

    return tell


def main(argv: list[str] | None = None) -> int:
    try:
        flags = vars(build_parser().parse_args(argv))
        out, workers, max_bad = (flags.pop(name) for name in ("out", "workers", "max_bad"))
        flags = {name: tuple(v) if isinstance(v, list) else v for name, v in flags.items()}
        store = {name: flags.pop(name) for name in StoreConfig.__dataclass_fields__}
        prepare(
            SourceConfig(**flags),
            StoreConfig(**store),
            out,
            workers=workers,
            max_bad=max_bad,
            progress=show_progress,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:  # full or read-only disk, a worker killed
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
