"""The pictures of a report, from what `bigmed.pictures` left in the workdir."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bigmed.report import page, runs, svg

ABOUT = {
    "views": "Each row is one item of a batch: its images as stored, then pairs of views of them.",
    "neighbours": (
        "Each row is a test image, then what lies nearest to it by cosine similarity; in a green "
        "frame what shares a class with it, in an orange one what does not."
    ),
    "map": "t-SNE of the test images' features, in the colour of each image's first class.",
}


def section(run: runs.Run) -> str:
    """All pictures by kind, those of each stage folded but the last; '' of none."""
    parts = []
    for kind, said in ABOUT.items():
        of_kind = [about for about in run.pictures if about.get("kind") == kind]
        if not of_kind:
            continue
        parts.append(page.soft(said))
        if kind == "map":
            parts.append(_maps(of_kind))
            continue
        *earlier, last = [_picture(run, about) for about in of_kind]
        parts += [last, page.folded(f"{len(earlier)} more", "".join(earlier))]
    return "\n".join(filter(None, parts))


def _picture(run: runs.Run, about: Mapping[str, Any]) -> str:
    path = run.workdir / "pictures" / about["file"]
    if not path.is_file():
        return ""
    return page.picture(f"{about['stage']}: {about['title']}", path.read_bytes())


def _maps(found: list[Mapping[str, Any]]) -> str:
    by_title: dict[str, list[Mapping[str, Any]]] = {}
    for about in found:
        by_title.setdefault(about["title"], []).append(about)
    parts = []
    for title, of_title in by_title.items():
        charts = [
            svg.scatter(
                about["stage"], *(np.array(about[key]) for key in ("x", "y", "group"))
            )
            for about in of_title
        ]
        names = max((about["names"] for about in of_title), key=len)
        parts += [page.soft(page.escape(title)), page.legend(names), page.panels(charts)]
    return "".join(parts)
