"""The data card of a report: what each data set and split holds, label by label."""

from collections.abc import Mapping
from typing import Any

from bigmed.report import page, runs


def section(run: runs.Run) -> str:
    """A table of the splits and one of each split's labels; '' where the run left no counts."""
    if not run.data:
        return ""
    head = ["split", "used for", "images", "patients", "bits", "labels", "hash of the patients"]
    lines = [
        [
            page.escape(card["name"]),
            page.escape(", ".join(card["used_for"])),
            f"{card['n_images']:,}",
            f"{card['n_patients']:,}" if card["n_patients"] is not None else "not named",
            str(card["bits"]),
            page.escape(card["task"] if card["labels"] else "none"),
            f"<code>{page.escape(card['split_sha256'][:12])}</code>",
        ]
        for card in run.data
    ]
    counted = "".join(
        page.folded(f"Labels of {card['name']}", _labels(card))
        for card in run.data
        if card["labels"]
    )
    return page.table(head, lines) + counted


def _labels(card: Mapping[str, Any]) -> str:
    head = ["class", "positive", "negative", "uncertain", "missing"]
    lines = [
        [page.escape(name), *(f"{counts[key]:,}" for key in head[1:])]
        for name, counts in card["labels"].items()
    ]
    return page.table(head, lines)
