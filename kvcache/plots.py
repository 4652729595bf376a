"""Plots as SVG, written by hand: points, lines and steps on linear or logarithmic axes, and no library for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 34, 46
DASHES = ("", "7 3", "2 3")
"""So that of lines that lie on each other all are seen: the first is whole and wide, and below the others."""
FEW_DECADES = 2.5
"""On an axis of no more, 2 and 5 are marked beside the powers of ten."""
COLOURS = ("#0b6e4f", "#c1121f", "#1d4e89", "#e09f3e", "#6a4c93", "#5f6368", "#2a9d8f", "#b5651d", "#d81b60", "#000000")

MOST, LEAST = 0.95, 0.001
"""Of a distribution's shares: below and above there are single values, which would take half of the axis."""
STEPS = 120
"""Of a distribution's curve."""

Points = Sequence[tuple[float, float]]


class _Axis:
    """Values to pixels. A logarithmic axis shows nothing at or below 0."""

    def __init__(self, values: Sequence[float], start: int, end: int, *, is_log: bool) -> None:
        self._start, self._end, self.is_log = start, end, is_log
        seen = [value for value in values if value > 0] if is_log else list(values)
        low, high = (min(seen), max(seen)) if seen else (1.0, 10.0)
        if is_log:
            room = 0.03 * log10(high / low) or 0.3
            self._low, self._high = log10(low) - room, log10(high) + room
        else:
            room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            self._low, self._high = low - room, high + room
        if self._low == self._high:
            self._high += 1.0

    def at(self, value: float) -> float:
        place = max(log10(value), self._low) if self.is_log and value > 0 else self._low if self.is_log else value
        return self._start + (place - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self.is_log:
            steps = (1, 2, 5) if self._high - self._low <= FEW_DECADES else (1,)
            powers = range(floor(self._low), ceil(self._high) + 1)
            marks = [step * 10.0**power for power in powers for step in steps]
            return [mark for mark in marks if self._low <= log10(mark) <= self._high]
        step = 10 ** floor(log10((self._high - self._low) / 2))
        while (self._high - self._low) / step > 8:
            step *= 2
        return [index * step for index in range(ceil(self._low / step), floor(self._high / step) + 1)]


def plot(
    title: str,
    x_name: str,
    y_name: str,
    series: Mapping[str, Points],
    *,
    as_points: bool = False,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """The SVG of one plot: a line, or points, for each of `series`, with a legend."""
    x = _Axis([p[0] for points in series.values() for p in points], LEFT, WIDTH - RIGHT, is_log=log_x)
    y = _Axis([p[1] for points in series.values() for p in points], HEIGHT - BOTTOM, TOP, is_log=log_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 18, title, size=13),
        *_grid(x, y),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name, anchor="middle"),
        f'<g transform="rotate(-90 14 {HEIGHT / 2})">{_text(14, HEIGHT / 2, y_name, anchor="middle")}</g>',
    ]
    for index, (name, points) in enumerate(series.items()):
        colour, row = COLOURS[index % len(COLOURS)], TOP + 8 + 16 * index
        places = [(round(x.at(a), 1), round(y.at(b), 1)) for a, b in points]
        if as_points:
            look = f'r="5" fill="{colour}" fill-opacity="0.5" stroke="{colour}"'
            parts += [f'<circle cx="{a}" cy="{b}" {look}/>' for a, b in places]
        else:
            path = " ".join(f"{a},{b}" for a, b in places)
            dash = DASHES[index % len(DASHES)]
            look = f'stroke-width="{1.6 if index else 3.6}"' + (f' stroke-dasharray="{dash}"' if dash else "")
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" {look}/>')
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{row - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 28, row + 1, name))
    return "\n".join([*parts, "</svg>", ""])


def distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share of values above it), from the twentieth quickest on, thinned so that the tail keeps its detail."""
    ordered = sorted(values)
    shares = [MOST * (LEAST / MOST) ** (step / STEPS) for step in range(STEPS + 1)]
    return [(ordered[min(len(ordered) - 1, int((1 - share) * len(ordered)))], share) for share in shares]


def _grid(x: _Axis, y: _Axis) -> list[str]:
    lines = []
    for value in x.ticks():
        place = round(x.at(value), 1)
        lines.append(f'<line x1="{place}" y1="{TOP}" x2="{place}" y2="{HEIGHT - BOTTOM}" stroke="#e3e3e3"/>')
        lines.append(_text(place, HEIGHT - BOTTOM + 15, f"{value:g}", anchor="middle"))
    for value in y.ticks():
        place = round(y.at(value), 1)
        lines.append(f'<line x1="{LEFT}" y1="{place}" x2="{WIDTH - RIGHT}" y2="{place}" stroke="#e3e3e3"/>')
        lines.append(_text(LEFT - 6, place + 4, f"{value:g}", anchor="end"))
    return lines


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
