"""Charts as inline SVG: dots with whiskers, and curves. Colours come from the page's CSS.

Every chart is text; names pass through `html.escape`. Series take the classes s0, s1, ... in order.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

NUM_COLOURS = 6  # classes s0 ... s5 of the page's CSS
MAX_POINTS = 300  # of a curve; longer ones are averaged


def colour_class(index: int) -> str:
    return f"s{index % NUM_COLOURS}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick or value in few characters: 0.75, 1.2e-05, 12,000."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}" style="max-width:{width:.0f}px">'
        f"{''.join(parts)}</svg>"
    )


def dots(
    label: str,
    rows: Sequence[tuple[str, float | None, float | None, float | None, Sequence[float], str]],
    chance: float | None = None,
) -> str:
    """A dot with a whisker for each row, seeds as small rings, the value in words at the right.

    Args:
      label: what is shown, for readers who cannot see it.
      rows: (name, mean, low, high, values of the seeds, text); None where missing.
      chance: a reference drawn as a broken line if it is near the data.
    """
    known = [v for _, *limits, values, _ in rows for v in (*limits, *values) if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    if chance is not None and low - chance < 0.6 * (high - low) + 0.05:
        low, high = min(low, chance), max(high, chance)
    margin = max(0.05 * (high - low), 0.005)
    low, high = low - margin, high + margin
    left = 24 + 6.7 * max(len(name) for name, *_ in rows)
    plot, right, row_height, top = 380.0, 24 + 6.3 * max(len(row[5]) for row in rows), 30.0, 8.0
    bottom = top + row_height * len(rows)

    def x_of(value: float) -> float:
        return left + plot * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        parts.append(_line(x_of(tick), top, x_of(tick), bottom, "grid"))
        parts.append(_text(x_of(tick), bottom + 16, number(tick), "soft", "middle"))
    if chance is not None and low <= chance <= high:
        parts.append(_line(x_of(chance), top, x_of(chance), bottom, "chance"))
        parts.append(_text(x_of(chance), bottom + 30, "chance", "soft", "middle"))
    for i, (name, mean, ci_low, ci_high, values, text) in enumerate(rows):
        y, kind = top + row_height * (i + 0.5), colour_class(i)
        parts.append(_text(left - 12, y + 4, name, "", "end"))
        parts.append(_text(left + plot + 14, y + 4, text, "value"))
        if ci_low is not None and ci_high is not None:
            parts.append(_line(x_of(ci_low), y, x_of(ci_high), y, f"whisker {kind}"))
        if len(values) > 1:
            parts += [
                f'<circle cx="{x_of(v):.1f}" cy="{y + 9:.1f}" r="2.5" class="ring {kind}"/>'
                for v in values
            ]
        if mean is not None:
            parts.append(f'<circle cx="{x_of(mean):.1f}" cy="{y:.1f}" r="5" class="dot {kind}"/>')
    return _svg(left + plot + right, bottom + 36, label, parts)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: means over runs of neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def curves(title: str, series: Mapping[str, tuple[np.ndarray, np.ndarray, int]]) -> str:
    """Lines over training steps.

    Args:
      title: above the chart.
      series: {name: (steps [n], values [n], colour index)}; values that are not finite are left
        out.
    """
    lines = {}
    for name, (x, y, colour) in series.items():
        finite = np.isfinite(y)
        if finite.any():
            lines[name] = (*thin(x[finite].astype(float), y[finite].astype(float)), colour)
    if not lines:
        return ""
    x_high = max(x[-1] for x, *_ in lines.values())
    x_low = min(min(x[0] for x, *_ in lines.values()), x_high)
    low, high = (f([f(y) for _, y, _ in lines.values()]) for f in (min, max))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    width, height, left, top = 340.0, 190.0, 58.0, 26.0
    plot, bottom = width - left - 12, height - 26

    def point(x: float, y: float) -> str:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return (
            f"{left + plot * across:.1f},{bottom - (bottom - top) * (y - low) / (high - low):.1f}"
        )

    parts = [_text(left, 14, title, "title")]
    for tick in ticks(low, high, 4):
        y = float(point(x_low, tick).split(",")[1])
        parts.append(_line(left, y, left + plot, y, "grid"))
        parts.append(_text(left - 6, y + 4, number(tick), "soft", "end"))
    for tick in ticks(x_low, x_high, 4):
        x = float(point(tick, low).split(",")[0])
        parts.append(_text(x, bottom + 16, number(tick), "soft", "middle"))
    for name, (x, y, colour) in lines.items():
        points = " ".join(map(point, x, y))
        kind, note = colour_class(colour), html.escape(f"{name}: {number(y[-1])} at the end")
        if len(x) == 1:
            at_x, at_y = points.split(",")
            mark = f'<circle cx="{at_x}" cy="{at_y}" r="3" class="dot {kind}">'
            parts.append(f"{mark}<title>{note}</title></circle>")
        else:
            mark = f'<polyline points="{points}" class="curve {kind}">'
            parts.append(f"{mark}<title>{note}</title></polyline>")
    return _svg(width, height, title, parts)
