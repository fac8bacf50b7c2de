"""Near-duplicate images within and between prepared data sets: a report to look at.

    python tools/check_overlap.py --data DATA/mine --data DATA/public --out OVERLAP

Finds the same film under another patient's id, across splits (a leak) and across data sets, also
in another size, compression, brightness or contrast, or mirrored; not cropped, turned or inverted.
--data is a folder of tools/prepare_dataset.py, whose splits are all compared. OVERLAP/overlap.html
shows the pairs side by side; overlap.csv and overlap.json list them by split and record number,
without patient or image ids. With --fail_on_leak the exit code is 1 if any pair lies across splits.
Every image is compared with every other: on one core, some minutes for 100,000.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import command  # beside this file
from absl import app, flags

from bigmed.data import overlap
from bigmed.data.sources import open_source, split_names
from bigmed.errors import EXIT_FAILURE, EXIT_OK, UserError
from bigmed.metrics import Progress
from bigmed.report import overlap as report

DATA = flags.DEFINE_multi_string("data", None, "A prepared data set; may be given several times.")
OUT = flags.DEFINE_string("out", None, "The folder to write to.")
DISTANCE = flags.DEFINE_integer("distance", overlap.DISTANCE, "Bits of 256 that may differ.")
CORRELATION = flags.DEFINE_float("correlation", overlap.CORRELATION, "Of small copies, at least.")
SHOWN = flags.DEFINE_integer("shown", 200, "Pairs of each kind on the page, the nearest.")
FAIL_ON_LEAK = flags.DEFINE_bool("fail_on_leak", False, "Exit with 1 if there is a leak.")


def _check() -> int:
    folders = [pathlib.Path(path).expanduser() for path in DATA.value]
    out = pathlib.Path(OUT.value).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from None
    configs = [
        (number, {"dir": str(folder), "split": split})
        for number, folder in enumerate(folders)
        for split in split_names({"dir": str(folder)})
    ]
    sources = [open_source(config) for _, config in configs]
    images = overlap.in_one_row(
        sources, [number for number, _ in configs], [config["split"] for _, config in configs]
    )
    parts = []
    for source in sources:
        with _told(f"hashes of {source.name}", len(source)) as tell:
            parts.append(overlap.hash_source(source, tell))
    with _told("images compared", len(images.patients)) as tell:
        pairs = overlap.near_pairs(overlap.joined(parts), DISTANCE.value, CORRELATION.value, tell)
    taken = {n: s.name.rpartition("/")[0] for (n, _), s in zip(configs, sources, strict=True)}
    taken = list(taken.values())
    names = [f"{n} ({i})" if taken.count(n) > 1 else n for i, n in enumerate(taken, start=1)]
    settings = {"distance": DISTANCE.value, "correlation": CORRELATION.value}
    found = report.write(out, images, names, pairs, settings, SHOWN.value)
    for kind, count in found["counts"].items():
        print(f"{kind}: {count} pairs")
    print(f"{found['leaks']} pairs across splits; see {out / 'overlap.html'}")
    return EXIT_FAILURE if FAIL_ON_LEAK.value and found["leaks"] else EXIT_OK


@contextlib.contextmanager
def _told(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that shows how many images are done."""
    progress, began = Progress(label, total), time.monotonic()

    def tell(done: int) -> None:
        progress.update(done, f"{done / max(time.monotonic() - began, 1e-3):.0f} images/s")

    yield tell
    progress.close()


if __name__ == "__main__":
    app.define_help_flags()
    sys.exit(command.run(sys.argv, (DATA, OUT), _check))
