"""The HTML page: its style, tables, folded parts. It needs no network, no script and no file."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from bigmed.report import svg

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2229; --soft: #616b78; --rule: #d9dee5;
  --panel: #f5f7f9; --notice: #fff3d6; --notice-ink: #5c4300;
  --c0: #5b6572; --c1: #0b6bb8; --c2: #b8500b; --c3: #0f7b5f; --c4: #a03a86; --c5: #8a6d00;
  --c6: #5a4fcf; --c7: #b3263a; --c8: #4f7a28; --c9: #0d8a94; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6eaef; --soft: #9aa5b3;
  --rule: #343c46; --panel: #1c2229; --notice: #3d3010; --notice-ink: #f5dfa6;
  --c0: #a7b1be; --c1: #62b0f0; --c2: #f09a5b; --c3: #52c9a6; --c4: #e08ac9; --c5: #d9bd4f;
  --c6: #a69ff0; --c7: #f0808e; --c8: #a5cf7a; --c9: #5fd3dc; } }
body { margin: 0 auto; padding: 24px 20px 64px; max-width: 1080px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
h3 { font-size: 16px; margin: 28px 0 2px; }
p { margin: 4px 0 10px; max-width: 78ch; } .soft { color: var(--soft); }
.notice { background: var(--notice); color: var(--notice-ink); padding: 10px 14px;
  border-radius: 6px; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 12px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; }
td small, th small { display: block; font-weight: 400; color: var(--soft); font-size: 12.5px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--panel); padding: 12px; border-radius: 6px; overflow-x: auto;
  font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; }
.panels { display: flex; flex-wrap: wrap; gap: 8px 16px; }
.panels svg { flex: 0 1 340px; }
figure { margin: 12px 0; } figure img { max-width: 100%; border-radius: 4px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 12.5px; }
svg .soft { fill: var(--soft); font-size: 11px; } svg .title { font-weight: 600; }
svg .value { font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.chance { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
.whisker { stroke: var(--c); stroke-width: 2.5; stroke-linecap: round; opacity: .55; }
.dot { fill: var(--c); stroke: var(--page); stroke-width: 1.5; }
.point { fill: var(--c); opacity: .75; }
.ring { fill: none; stroke: var(--c); stroke-width: 1.2; }
.curve { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .14; }
.cell { fill: var(--c1); }
.key { display: inline-block; width: 14px; height: 3px; margin: 0 6px 4px 0; background: var(--c);
  vertical-align: middle; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; }
  figure, .panels svg, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .wide { overflow: visible; } }
""" + "\n".join(f".s{i} {{ --c: var(--c{i}); }}" for i in range(svg.NUM_COLOURS))


def document(title: str, body: Sequence[str]) -> str:
    """The whole page, of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: bigmed report</title><style>{STYLE}</style></head>\n"
        f"<body>{chr(10).join(filter(None, body))}</body></html>\n"
    )


def escape(value: Any) -> str:
    """Text as HTML, also inside quotes."""
    return html.escape(str(value))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each line is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in lines
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def soft(text: str) -> str:
    """A paragraph in the colour of what matters less; `text` is HTML already."""
    return f'<p class="soft">{text}</p>'


def folded(summary: str, inner: str) -> str:
    """HTML that opens on a click on its summary; '' of nothing."""
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>" if inner else ""


def panels(charts: Sequence[str]) -> str:
    """Small charts side by side; '' of none."""
    drawn = "".join(charts)
    return f'<div class="panels">{drawn}</div>' if drawn else ""


def legend(names: Sequence[str], first_colour: int = 0) -> str:
    """Which colour is whose; '' of one name."""
    if len(names) < 2:
        return ""
    marks = (
        f'<span class="key {svg.colour_class(i + first_colour)}"></span>{escape(name)}'
        for i, name in enumerate(names)
    )
    return soft(" &nbsp; ".join(marks))


def picture(caption: str, *jpegs: bytes) -> str:
    """A figure with pictures side by side, inside the page."""
    shown = "".join(
        f'<img alt="{escape(caption)}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        for jpeg in jpegs
    )
    return f'<figure>{shown}<figcaption class="soft">{escape(caption)}</figcaption></figure>'
