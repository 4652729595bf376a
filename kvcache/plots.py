"""Line plots as SVG text, for reports: no drawing library, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 50
COLOURS = ("#3b7dd8", "#d9662c", "#3a9a5b", "#a04fc0", "#c9a227", "#5f6b7a", "#d04a6e", "#2aa3a3")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}"
)

Points = Sequence[tuple[float, float]]


def line_plot(title: str, x_label: str, y_label: str, lines: Mapping[str, Points], *, logarithmic: bool = False) -> str:
    """One line per name; with `logarithmic` both axes are, and every coordinate must be above 0.

    Raises ValueError if there is nothing to draw.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        raise ValueError("there is nothing to draw")
    across = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, logarithmic)
    up = _Axis([y for _, y in points] + ([] if logarithmic else [0.0]), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text x="{LEFT}" y="20" font-weight="600">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
        *_grid(across, up),
    ]
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawn = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
        top = TOP + 10 + 20 * number
        parts.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{top - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{top}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Maps values to pixels between `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, logarithmic: bool) -> None:
        self._scale = math.log10 if logarithmic else float
        self.low, self.high = min(values), max(values)
        self.start, self.end = start, end
        low, high = self._scale(self.low), self._scale(self.high)
        self._low, self._span = low, (high - low) or 1.0
        self.ticks = self._ticks(logarithmic)

    def at(self, value: float) -> float:
        return self.start + (self._scale(value) - self._low) / self._span * (self.end - self.start)

    def _ticks(self, logarithmic: bool) -> list[float]:
        if logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            marks = (factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5))
            return [mark for mark in marks if self.low <= mark <= self.high]
        if self.low == self.high:
            return [self.low]
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        while (self.high - self.low) / step < 4:
            step /= 2
        first = math.ceil(self.low / step)
        return [step * number for number in range(first, math.floor(self.high / step) + 1)]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for mark in across.ticks:
        x = across.at(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{up.start}" x2="{x:.1f}" y2="{up.end}"/>')
        parts.append(f'<text x="{x:.1f}" y="{up.start + 16}" text-anchor="middle">{mark:g}</text>')
    for mark in up.ticks:
        y = up.at(mark)
        parts.append(f'<line class="grid" x1="{across.start}" y1="{y:.1f}" x2="{across.end}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{across.start - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    parts.append(
        f'<polyline class="axis" fill="none" points="{across.start},{up.end} {across.start},{up.start} '
        f'{across.end},{up.start}"/>'
    )
    return parts
