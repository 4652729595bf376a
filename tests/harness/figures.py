"""Figures for the person who runs the suites; seen with `pytest -s`, and in the report of a test that fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import quantiles


def show(title: str, figures: Mapping[str, object]) -> None:
    """One line of figures."""
    sys.stdout.write(f"\n  {title}: {', '.join(f'{name} {_text(value)}' for name, value in figures.items())}\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A row of figures for each case."""
    lines = [list(columns), *([_text(value) for value in row] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    sys.stdout.write(f"\n  {title}\n")
    for line in lines:
        cells = "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(f"    {cells}\n")


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, str]:
    """The median and the ninth decile of some durations, in milliseconds; nothing if there are none."""
    if not seconds:
        return {}
    deciles = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [*seconds] * 9
    return {f"{name} p50": ms(deciles[4]), f"{name} p90": ms(deciles[8])}


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _text(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
