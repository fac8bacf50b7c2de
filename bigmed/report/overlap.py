"""The report of near-duplicates: overlap.json, overlap.csv, and overlap.html for people to look at.

Images go by the numbers of their records, and patients by numbers of the report's own. The page
shows the images: it is to be kept like the data sets.
"""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from bigmed import metrics
from bigmed.data.decode import decode_onto
from bigmed.data.overlap import BITS, KINDS, Images, Pairs
from bigmed.report.page import document, escape, picture, table

SIDE = 256  # of the images on the page
JPEG_QUALITY = 85
EXPLAINED = (
    "Pairs of images that look the same, nearest first. Look at them: two films of one patient, "
    "or two of one machine, may look alike and be different. Copies that are cropped, turned or "
    "inverted are not searched for."
)


def write(
    folder: pathlib.Path,
    images: Images,
    names: Sequence[str],
    pairs: Pairs,
    settings: Mapping[str, Any],
    shown: int,
) -> dict[str, Any]:
    """Writes the three files.

    Args:
      folder: exists.
      images: that were compared.
      names: of the data sets.
      pairs: what was found.
      settings: how, for the record.
      shown: how many pairs of each kind the page shows at most.

    Returns:
      The content of overlap.json but for its pairs: settings, sets, counts by kind, and leaks.

    Raises:
      UserError: an image that is to be shown cannot be read.
    """
    rows = _rows(images, names, pairs)
    sets = {
        f"{names[number]}/{split}": {"images": len(source), "names_patients": source.has_patients}
        for source, number, split in zip(images.sources, images.sets, images.splits, strict=True)
    }
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    leaks = sum(row["leak"] for row in rows)
    summary = {"settings": dict(settings), "sets": sets, "counts": counts, "leaks": leaks}
    metrics.write_json(folder / "overlap.json", {**summary, "pairs": rows})
    text = io.StringIO()
    if rows:
        out = csv.DictWriter(text, rows[0])
        out.writeheader()
        out.writerows(rows)
    metrics.replace_text(folder / "overlap.csv", text.getvalue())
    metrics.replace_text(folder / "overlap.html", _page(images, pairs, rows, summary, shown))
    return summary


def _rows(images: Images, names: Sequence[str], pairs: Pairs) -> list[dict[str, Any]]:
    """A row for each pair; patients are numbered as they come."""
    numbers: dict[int, int] = {}
    kinds, leaks = images.kinds(pairs), images.leaks(pairs)
    rows = []
    sides = [(side, *images.locate(side)) for side in (pairs.a, pairs.b)]
    for i in range(len(pairs)):
        row = {"kind": KINDS[kinds[i]], "leak": bool(leaks[i])}
        row |= {"distance": int(pairs.distance[i])}
        row |= {"correlation": round(float(pairs.correlation[i]), 4)}
        row |= {"mirrored": bool(pairs.mirrored[i])}
        for letter, (image, source, record) in zip("ab", sides, strict=True):
            person = int(images.patients[image[i]])
            row |= {
                f"set_{letter}": names[images.sets[source[i]]],
                f"split_{letter}": images.splits[source[i]],
                f"record_{letter}": int(record[i]),
                f"patient_{letter}": numbers.setdefault(person, len(numbers) + 1),
            }
        rows.append(row)
    return rows


def _page(
    images: Images,
    pairs: Pairs,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    shown: int,
) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in summary["settings"].items())
    total = sum(about["images"] for about in summary["sets"].values())
    of_sets = [[escape(name), about["images"]] for name, about in summary["sets"].items()]
    body = [
        "<h1>Near-duplicate images</h1>",
        f'<p class="soft">{escape(f"{total} images, {settings}")}</p>',
        '<p class="notice">This page shows images of patients: keep it like the data sets.</p>',
        f"<p>{escape(EXPLAINED)}</p>",
        table(["images of", "images"], of_sets),
        table(["pairs", "number"], [[escape(k), n] for k, n in summary["counts"].items()]),
        f"<p>{summary['leaks']} pairs lie across splits (leaks).</p>",
    ]
    for kind in KINDS:
        mine = [i for i, row in enumerate(rows) if row["kind"] == kind]
        if mine:
            first = mine[:shown]
            more = "" if len(first) == len(mine) else f", the nearest {len(first)} are shown"
            figures = "".join(_figure(images, pairs, rows[i], i) for i in first)
            heading = f"<h2>{escape(kind.capitalize())}</h2>"
            body.append(f'{heading}<p class="soft">{len(mine)} pairs{more}</p>{figures}')
    return document("near-duplicate images", body)


def _figure(images: Images, pairs: Pairs, row: Mapping[str, Any], number: int) -> str:
    said = (
        f"{row[f'set_{s}']}/{row[f'split_{s}']}, record {row[f'record_{s}']}, "
        f"patient {row[f'patient_{s}']}"
        for s in "ab"
    )
    caption = (
        f"{' | '.join(said)}: {row['distance']} of {BITS} bits differ, correlation "
        f"{row['correlation']:.3f}{', mirrored' if row['mirrored'] else ''}"
    )
    both = [_jpeg(images, int(side[number])) for side in (pairs.a, pairs.b)]
    return picture(caption, *both)


def _jpeg(images: Images, image: int) -> bytes:
    """An image as a small JPEG, from its darkest value to its brightest."""
    (which,), (record,) = images.locate(np.array([image]))
    source = images.sources[which]
    canvas = np.zeros((SIDE, SIDE, 3), np.uint16 if source.bits == 16 else np.uint8)
    try:
        height, width = decode_onto(canvas, source.read([record])[0])
    except ValueError as error:
        raise source.records.error(record, str(error)) from None
    pixels = canvas[:height, :width, ::-1].astype(np.float32)
    pixels = (pixels - pixels.min()) * (255 / max(float(np.ptp(pixels)), 1))
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    return cv2.imencode(".jpg", np.rint(pixels).astype(np.uint8), quality)[1].tobytes()
