"""What a benchmark returns, and how it is shown: rows of a value beside its reference, as a table or as JSON.

A value is the median of its runs. Where a row has a reference, both were measured in turn within each
run and the ratio is the median of the runs' ratios, so that a drifting machine disturbs both alike.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

PACKAGES = ("kvcache", "pyzmq", "msgspec", "numpy", "torch", "transformers")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. reference: what `ratio` is taken against. goal: as text; met: None where there is no goal."""

    name: str
    value: float
    unit: str
    reference: str = ""
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    runs: list[float] = []


class Report(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    machine: dict[str, str]
    versions: dict[str, str]
    rows: list[Row]
    notes: list[str] = []


def row(
    name: str,
    runs: Sequence[float],
    unit: str,
    *,
    against: Sequence[float] | None = None,
    reference: str = "",
    goal: float | None = None,
    sense: Literal[">=", "<="] = ">=",
    on: Literal["ratio", "value"] = "ratio",
) -> Row:
    """Sum up one figure. `goal` is met by the median ratio (value / reference) or by the median value itself."""
    value = statistics.median(runs)
    ratio = None
    if against is not None:
        ratio = statistics.median(mine / theirs for mine, theirs in zip(runs, against, strict=True))
    judged = ratio if on == "ratio" else value
    met = None
    if goal is not None and judged is not None:
        met = judged >= goal if sense == ">=" else judged <= goal
    text = "" if goal is None else f"{sense} {goal:g}{'x' if on == 'ratio' else ' ' + unit}"
    return Row(
        name=name,
        value=value,
        unit=unit,
        reference=reference,
        ratio=ratio,
        goal=text,
        met=met,
        runs=[round(run, 6) for run in runs],
    )


def report(name: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> Report:
    return Report(name=name, machine=_machine(), versions=_versions(), rows=list(rows), notes=list(notes))


def show(result: Report, console: Console) -> None:
    """Print the table for people."""
    table = Table(title=f"kvcache bench {result.name}", title_justify="left")
    for column in ("", "value", "ratio", "against", "goal", "met", "spread"):
        table.add_column(column, justify="left" if column in {"", "against"} else "right")
    for line in result.rows:
        spread = f"{min(line.runs):.4g} to {max(line.runs):.4g}" if len(line.runs) > 1 else ""
        met = "" if line.met is None else ("yes" if line.met else "no")
        ratio = "" if line.ratio is None else f"{line.ratio:.2f}x"
        table.add_row(line.name, f"{line.value:,.4g} {line.unit}", ratio, line.reference, line.goal, met, spread)
    console.print(table)
    for note in result.notes:
        console.print(f"  {note}")
    console.print("  " + ", ".join(f"{key} {value}" for key, value in {**result.machine, **result.versions}.items()))


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": str(os.cpu_count()), "os": platform.system(), "python": platform.python_version()}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
