"""Small charts as inline SVG. Colours are the page's CSS variables, so that they follow its light or dark scheme.

Every text is escaped here: what is returned is markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_PLOT_WIDTH, _PLOT_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_BINS = 24


def histogram(values: Sequence[float], *, label: str) -> Markup:
    """Return a histogram of the values; whole numbers get bins of whole width."""
    array = np.asarray(values, dtype=float)
    low, high = float(array.min()), float(array.max())
    whole = bool((array == np.rint(array)).all())
    width = max((high - low) / _BINS, 1e-9)
    if whole:
        width = float(max(1, np.ceil((high - low + 1) / _BINS)))
        low -= 0.5
    number = max(1, int(np.ceil((high - low) / width)))
    counts, edges = np.histogram(array, bins=number, range=(low, low + number * width))
    x, y = _Axis(edges[0], edges[-1], _LEFT, _LEFT + _PLOT_WIDTH), _Axis(0, counts.max(), _TOP + _PLOT_HEIGHT, _TOP)
    bars = [
        f'<rect class="mark" x="{x(a):.1f}" y="{y(n):.1f}" width="{max(0.5, x(b) - x(a) - 1):.1f}"'
        f' height="{y(0) - y(n):.1f}"><title>{_number(a + 0.5 * whole)} to {_number(b - 0.5 * whole)}: {n:,}</title></rect>'
        for a, b, n in zip(edges[:-1], edges[1:], counts.tolist())
    ]
    return _chart("".join(bars), x, y, label)


def line(points: Sequence[tuple[float, float]], *, label: str) -> Markup:
    """Return a line through points with ascending x, from y = 0."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x, y = _Axis(min(xs), max(xs), _LEFT, _LEFT + _PLOT_WIDTH), _Axis(0, max(ys), _TOP + _PLOT_HEIGHT, _TOP)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    dots = "".join(f'<circle class="mark" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2"/>' for a, b in points[:200])
    return _chart(f'<polyline class="line" points="{path}"/>{dots}', x, y, label)


def means(groups: Mapping[str, Sequence[tuple[float, float, float]]], *, label: str) -> Markup:
    """Return (x, mean, standard deviation) of several named series as lines with error bars."""
    every = [point for points in groups.values() for point in points]
    xs = [p[0] for p in every]
    x = _Axis(min(xs), max(xs), _LEFT + 8, _LEFT + _PLOT_WIDTH - 8)
    highest = max(mean + deviation for _, mean, deviation in every)
    y = _Axis(0, 1.35 * highest, _TOP + _PLOT_HEIGHT, _TOP)  # the names stand above the lines
    drawn = []
    for index, points in enumerate(groups.values()):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in points)
        drawn.append(f'<polyline class="line s{index}" points="{path}"/>')
        drawn += [
            f'<line class="error s{index}" x1="{x(a):.1f}" x2="{x(a):.1f}" y1="{y(max(0.0, b - d)):.1f}" y2="{y(b + d):.1f}"/>'
            f'<circle class="mark s{index}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'
            for a, b, d in points
        ]
    return _chart("".join(drawn), x, y, label, tuple(groups))


def scatter(groups: Mapping[str, Sequence[tuple[float, float]]], *, label: str) -> Markup:
    """Return points of several named groups."""
    every = [point for points in groups.values() for point in points]
    xs, ys = [p[0] for p in every], [p[1] for p in every]
    x = _Axis(min(xs), max(xs), _LEFT + 4, _LEFT + _PLOT_WIDTH - 4)
    y = _Axis(min(ys), max(ys), _TOP + _PLOT_HEIGHT - 4, _TOP + 4)
    dots = "".join(
        f'<circle class="dot s{index}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>'
        for index, points in enumerate(groups.values())
        for a, b in points
    )
    return _chart(dots, x, y, label)


class _Axis:
    """A linear scale from values to the chart's coordinates."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = float(low), float(high) if high > low else float(low) + 1.0
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)


def _chart(body: str, x: _Axis, y: _Axis, label: str, names: Sequence[str] = ()) -> Markup:
    bottom = _TOP + _PLOT_HEIGHT
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in np.linspace(y.low, y.high, 3):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value, anchor in ((x.low, "start"), (x.high, "end")):
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 14}" text-anchor="{anchor}">{_number(value)}</text>')
    parts.append(f'<text x="{_LEFT + _PLOT_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>')
    for index, name in enumerate(names):
        parts.append(f'<text class="name s{index}" x="{_LEFT + 8}" y="{_TOP + 12 + 14 * index}">{escape(name)}</text>')
    return Markup("".join([*parts, body, "</svg>"]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
