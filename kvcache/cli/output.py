"""How the command speaks: tables for people or JSON for programs on stdout, everything else on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

import msgspec
import typer
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from kvcache.logs import DIRECTIONS

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TURNING = re.compile(f"[{DIRECTIONS}]")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    typer.echo(f"error: {plain(' '.join(message.split()))}", err=True)


def note(message: str) -> None:
    """Something worth knowing that is not the result."""
    typer.secho(message, err=True, dim=True)


def print_json(value: object) -> None:
    """Any plain data or msgspec struct, indented, keys as they are."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Columns named `#...` hold numbers, aligned right; only the last column wraps."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith("#") else "left"
        table.add_column(column.removeprefix("#"), justify=justify, no_wrap=column is not columns[-1])
    for row in rows:
        table.add_row(*("" if cell is None else cell if isinstance(cell, Text) else plain(str(cell)) for cell in row))
    return table


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, *, to_stderr: bool = False
) -> None:
    terminal = console(to_stderr)
    if title:
        terminal.print(title, soft_wrap=True)
    terminal.print(make_table(columns, rows))


def console(stderr: bool = False) -> Console:
    """Plain text, never markup: ids and model output may hold brackets. Piped output is not wrapped at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=None if stream.isatty() else 200)


def say(text: str) -> None:
    """A piece of generated text, as it is; for a terminal without what could move its cursor or change its title."""
    sys.stdout.write(_UNPRINTABLE.sub("", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def plain(text: str) -> str:
    """A name or an error without what could move a terminal's cursor, change its title, or have it read backwards."""
    return _TURNING.sub("", _UNPRINTABLE.sub("", text))


def human_bytes(count: int) -> str:
    """Three or four figures and a binary unit."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {_UNITS[power]}"


def human_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
