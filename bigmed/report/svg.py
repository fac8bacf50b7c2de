"""Charts as inline SVG: dots, curves, points, matrices. Colours come from the page's CSS.

Every chart is text; names pass through `html.escape`. Series take the classes s0, s1, ... in order.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUM_COLOURS = 10  # classes s0 ... s9 of the page's CSS
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


class Frame:
    """The axes of a chart, and where a value stands in it.

    Args:
      title: above the chart.
      x_range, y_range: (low, high) of the axes.
      axes: names of the axes; '' for none.
      logarithmic: of x.
      x_ticks: numbers on the x axis, where they are not to be round ones.
      large: twice as wide.
    """

    def __init__(
        self,
        title: str,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        axes: tuple[str, str] = ("", ""),
        logarithmic: bool = False,
        x_ticks: Sequence[float] | None = None,
        large: bool = False,
    ):
        self._title, self._logarithmic = title, logarithmic
        self._x, self._y = x_range, y_range
        self._width, height = (700.0, 340.0) if large else (340.0, 190.0)
        self._left, self._top = 58.0, 26.0
        self._plot = self._width - self._left - 12
        self._bottom = height - 26
        self._height = height + (16 if axes[0] else 0)
        self.parts = [_text(self._left, 14, f"{title}{_upright(axes[1])}", "title")]
        for tick in ticks(*y_range, 4):
            y = self.y_of(tick)
            self.parts.append(_line(self._left, y, self._left + self._plot, y, "grid"))
            self.parts.append(_text(self._left - 6, y + 4, number(tick), "soft", "end"))
        for tick in ticks(*x_range, 4) if x_ticks is None else x_ticks:
            x = self.x_of(tick)
            self.parts.append(_text(x, self._bottom + 16, number(tick), "soft", "middle"))
        if axes[0]:
            middle = self._left + self._plot / 2
            self.parts.append(_text(middle, self._bottom + 32, axes[0], "soft", "middle"))

    def x_of(self, value: float) -> float:
        low, high = self._x
        if self._logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        across = (value - low) / (high - low) if high > low else 0.5
        return self._left + self._plot * across

    def y_of(self, value: float) -> float:
        low, high = self._y
        return self._bottom - (self._bottom - self._top) * (value - low) / (high - low)

    def points(self, x: np.ndarray, y: np.ndarray) -> str:
        """For a polyline."""
        return " ".join(f"{self.x_of(a):.1f},{self.y_of(b):.1f}" for a, b in zip(x, y, strict=True))

    def drawn(self) -> str:
        return _svg(self._width, self._height, self._title, self.parts)


def _upright(axis: str) -> str:
    return f" ({axis})" if axis else ""


def curves(
    title: str,
    series: Mapping[str, Sequence[Any]],
    *,
    chance: tuple[np.ndarray, np.ndarray] | None = None,
    unit: bool = False,
    **frame: Any,
) -> str:
    """Lines in a frame.

    Args:
      title: above the chart.
      series: {name: (x [n], rising, y [n], colour index)}, and after them (low [n], high [n]) for a
        band; values that are not finite are left out.
      chance: a reference, drawn as a broken line.
      unit: whether both axes go from 0 to 1.
      **frame: see `Frame`.
    """
    lines = {}
    for name, (x, y, colour, *band) in series.items():
        finite = np.isfinite(y)
        if finite.any():
            x, y = x[finite].astype(float), y[finite].astype(float)
            band = [limit[finite] for limits in band if limits is not None for limit in limits]
            lines[name] = (*(thin(x, y) if not band else (x, y)), colour, band)
    if not lines:
        return ""
    x_high = max(x[-1] for x, *_ in lines.values())
    x_low = min(min(x[0] for x, *_ in lines.values()), x_high)
    shown = [v for _, y, _, band in lines.values() for v in (y, *band)]
    low, high = (f([f(values) for values in shown]) for f in (min, max))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    ranges = ((0.0, 1.0),) * 2 if unit else ((x_low, x_high), (low - margin, high + margin))
    made = Frame(title, *ranges, **frame)
    if chance is not None:
        made.parts.append(f'<polyline points="{made.points(*chance)}" fill="none" class="chance"/>')
    for x, _, colour, band in lines.values():
        if band:
            outline = f"{made.points(x, band[0])} {made.points(x[::-1], band[1][::-1])}"
            made.parts.append(f'<polygon points="{outline}" class="band {colour_class(colour)}"/>')
    for name, (x, y, colour, _) in lines.items():
        points, kind = made.points(x, y), colour_class(colour)
        note = html.escape(f"{name}: {number(y[-1])} at the end")
        if len(x) == 1:
            at_x, at_y = points.split(",")
            mark = f'<circle cx="{at_x}" cy="{at_y}" r="3" class="dot {kind}">'
            made.parts.append(f"{mark}<title>{note}</title></circle>")
        else:
            mark = f'<polyline points="{points}" class="curve {kind}">'
            made.parts.append(f"{mark}<title>{note}</title></polyline>")
    return made.drawn()


def scatter(title: str, x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> str:
    """Points [n] without axes, in the colours of their groups, int [n]."""
    width, height, margin = 340.0, 340.0, 12.0

    def placed(values: np.ndarray, low: float, high: float) -> np.ndarray:
        spread = np.ptp(values) or 1.0
        return low + (high - low) * (values - values.min()) / spread

    across, down = placed(x, margin, width - margin), placed(-y, 28, height - margin)
    marks = [
        f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2.6" class="point {colour_class(int(g))}"/>'
        for a, d, g in zip(across, down, groups, strict=True)
    ]
    return _svg(width, height, title, [_text(margin, 14, title, "title"), *marks])


def matrix(title: str, counts: np.ndarray, names: Sequence[str], axes: tuple[str, str]) -> str:
    """Counts [L, L] as shaded cells, the darker the larger the share of its row.

    Args:
      title: above the chart.
      counts: of rows (the second axis) and columns (the first).
      names: of the L rows and columns.
      axes: what columns and rows are.
    """
    cell, top = 44.0, 60.0
    left = 24 + 6.7 * max(len(name) for name in names)
    parts = [_text(8, 14, f"{title} (rows: {axes[1]}, columns: {axes[0]})", "title")]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for i, name in enumerate(names):
        short = name if len(name) <= 7 else f"{name[:6]}…"
        parts.append(_text(left + cell * (i + 0.5), top - 8, short, "soft", "middle"))
        parts.append(_text(left - 8, top + cell * (i + 0.5) + 4, name, "", "end"))
        for j in range(len(names)):
            x, y = left + cell * j, top + cell * i
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.0f}" height="{cell - 2:.0f}" '
                f'class="cell" fill-opacity="{0.06 + 0.6 * shares[i, j]:.2f}"/>'
            )
            middle = x + cell / 2 - 1
            parts.append(_text(middle, y + cell / 2 + 3, str(counts[i, j]), "value", "middle"))
    width = max(left + cell * len(names) + 8, 16 + 7.2 * len(title) + 190)
    return _svg(width, top + cell * len(names) + 8, title, parts)
