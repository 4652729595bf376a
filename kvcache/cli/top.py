"""`kvcache top`: the cluster in a terminal, once a second, until q or Ctrl-C; the figures are the dashboard's."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

import kvcache
from bus.errors import KVCacheError
from kvcache.cli.options import Timeout, Url
from kvcache.cli.output import console, human_bytes, make_table, plain
from kvcache.trends import Point, Snapshot, Trends, WorkerRow

POLL_S = 1.0
ONCE_S = 2.0
"""Between the two answers that one frame's rates are taken from."""
ANSWER_S = 2.0
NUM_BARS = 60
METER_CELLS = 12
QUIT_KEYS = frozenset(b"qQ\x04")

_BARS = " ▁▂▃▄▅▆▇█"
_TONES = {"ready": "green", "lost": "bold red", "left": "dim"}
_COLUMNS = (
    *("WORKER", "STATUS", "#SHARE", "#RUNNING", "#WAITING", "#TOKENS/S", "#HITS", "CACHE", "#KV MEMORY"),
    *("INDEX", "MODELS"),
)


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    url: Url = None,
    timeout: Timeout = 10.0,
) -> None:
    """Watch each worker's load and cache, live.

    Ends with q or Ctrl-C. Into a pipe it prints one frame, as with --once.
    """
    terminal = console()
    if once or not sys.stdout.isatty():  # rich takes a pipe for a terminal where FORCE_COLOR is set
        terminal.print(asyncio.run(_one_frame(url, timeout)))
    else:
        asyncio.run(_watch(url, terminal))


def frame(snapshot: Snapshot, history: Sequence[Point], url: str) -> RenderableType:
    """All that is shown."""
    rows = [_worker_cells(row, snapshot.point.at) for row in snapshot.workers]
    workers = make_table(_COLUMNS, rows) if rows else Text("no workers; start one: kvcache worker", style="dim")
    return Group(_headline(snapshot, url), Text(), *_figures(snapshot, history), Text(), workers)


async def _one_frame(url: str | None, seconds: float) -> RenderableType:
    """Raises KVCacheError if the broker does not answer."""
    trends = Trends()
    async with kvcache.AsyncClient(url, timeout=seconds) as client:
        trends.fold(await client.stats(), time.monotonic(), time.time())
        await asyncio.sleep(ONCE_S)
        snapshot = trends.fold(await client.stats(), time.monotonic(), time.time())
        return frame(snapshot, trends.history, client.url)


async def _watch(url: str | None, terminal: Console) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with kvcache.AsyncClient(url, timeout=ANSWER_S) as client:
        with Live(console=terminal, screen=True, auto_refresh=False) as live, _keys(stop.set):
            async with asyncio.TaskGroup() as group:
                # Apart, so that a broker that does not answer keeps nobody from leaving.
                showing = group.create_task(_show(client, live))
                await stop.wait()
                showing.cancel()


async def _show(client: kvcache.AsyncClient, live: Live) -> None:
    """Never returns."""
    trends = Trends()
    while True:
        try:
            figures = await client.stats()
            snapshot = trends.fold(figures, time.monotonic(), time.time())
        except KVCacheError as error:
            snapshot = trends.miss(str(error), time.monotonic(), time.time())
        live.update(frame(snapshot, trends.history, client.url), refresh=True)
        await asyncio.sleep(POLL_S)


@contextmanager
def _keys(leave: Callable[[], None]) -> Iterator[None]:
    """Have single keys heard at once, and the terminal as it was afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def heard() -> None:
        typed = os.read(descriptor, 64)
        if not typed or QUIT_KEYS & set(typed):
            leave()

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, heard)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _headline(snapshot: Snapshot, url: str) -> Text:
    now, line = snapshot.point.at, Text.assemble(("kvcache top", "bold"), f"  {url}  ")
    if snapshot.problem:
        heard = "" if snapshot.heard_at is None else f", last heard {now - snapshot.heard_at:.0f} s ago"
        return line.append(f"broker lost: {plain(snapshot.problem)}{heard}", style="bold red")
    lost = [row.worker_id for row in snapshot.workers if row.status == "lost"]
    serving = sum(row.status == "ready" for row in snapshot.workers)
    line.append(
        f"{serving} {'worker serves' if serving == 1 else 'workers serve'}", style="green" if serving else "red"
    )
    if lost:
        line.append(f", lost: {plain(', '.join(lost))}", style="bold red")
    if snapshot.broker is not None:
        broker = snapshot.broker
        line.append(f"  policy {broker.policy}, up {broker.uptime_s:.0f} s, {broker.requests} requests", style="dim")
    return line


def _figures(snapshot: Snapshot, history: Sequence[Point]) -> list[RenderableType]:
    """What is of the whole cluster: each figure, and its way here."""
    point, broker = snapshot.point, snapshot.broker
    since_start = f"{broker.hit_rate:.0%} since start" if broker and broker.hit_rate is not None else ""
    prompts = point.cached_per_s + point.computed_per_s
    rows = [
        ("hit rate", _percent(point.hit_rate), sparkline([it.hit_rate for it in history], most=1.0), since_start),
        (
            "tokens/s", f"{point.tokens_per_s:.0f}", sparkline([it.tokens_per_s for it in history]),
            f"and {prompts:.0f} of prompts",
        ),
        ("running", point.running, sparkline([it.running for it in history]), f"{point.waiting} waiting"),
        ("requests/s", f"{point.requests_per_s:.1f}", sparkline([it.requests_per_s for it in history]), ""),
    ]  # fmt: skip
    return [make_table(["", "#", "", ""], rows)]


def sparkline(values: Sequence[float | None], most: float | None = None) -> str:
    """The last values as bars from 0 to `most`, or to the greatest of them; blank where one is not known."""
    shown = values[-NUM_BARS:]
    top = most or max((value for value in shown if value is not None), default=0.0) or 1.0
    return "".join(" " if value is None else _BARS[1 + round(min(1.0, value / top) * 7)] for value in shown)


def _worker_cells(row: WorkerRow, now: float) -> tuple[object, ...]:
    if row.gone_at is not None:
        return (row.worker_id, _status(f"{row.status} {now - row.gone_at:.0f} s ago", row.status))
    blocks = max(1, row.num_blocks)
    return (
        row.worker_id,
        _status(row.status, row.status),
        f"{row.share:.0%}",
        row.running,
        row.waiting,
        f"{row.tokens_per_s:.0f}",
        _percent(row.hit_rate),
        _meter(row.held_blocks / blocks, row.cached_blocks / blocks),
        f"{human_bytes(row.kv_used_bytes)} of {human_bytes(row.kv_total_bytes)}",
        f"{row.index or '-'}, {row.indexed_nodes} nodes",
        row.models,
    )


def _status(text: str, status: str) -> Text:
    return Text(text, style=_TONES.get(status, "yellow"))


def _meter(held: float, cached: float) -> Text:
    """Blocks in use, blocks kept for reuse, and free ones."""
    num_held = round(min(1.0, held) * METER_CELLS)
    num_full = max(num_held, round(min(1.0, held + cached) * METER_CELLS))
    bar = Text("█" * num_held, style="green").append("▓" * (num_full - num_held), style="cyan")
    return bar.append("░" * (METER_CELLS - num_full), style="dim").append(f" {held + cached:4.0%}")


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.0%}"
