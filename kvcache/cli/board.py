"""What `kvcache up` shows: a live table under the log on a terminal, plain log lines anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bus.stats import ClusterStats
from kvcache.cli.options import LogFormat
from kvcache.cli.output import console, human_bytes, make_table
from kvcache.model_words import describe_models
from kvcache.supervisor import ServiceState, ServiceStatus

COLUMNS = (
    "SERVICE",
    "PROCESS",
    "#PID",
    "#RESTARTS",
    "STATUS",
    "#RUNNING",
    "#WAITING",
    "#REQUESTS",
    "KV MEMORY",
    "MODELS",
)


class Board(Protocol):
    """Where the supervisor's news and the cluster's figures go."""

    def line(self, name: str, text: str) -> None:
        """One line that a service wrote."""

    def changed(self, status: ServiceStatus) -> None:
        """A service's process started, ended or waits."""

    def figures(self, figures: ClusterStats | None) -> None:
        """The cluster as it is now; None while the broker does not answer."""


class PlainBoard:
    """Log lines, one after another."""

    def __init__(self) -> None:
        self._console = console()

    def line(self, name: str, text: str) -> None:
        self._console.print(f"[{name}] {text}", soft_wrap=True)

    def changed(self, status: ServiceStatus) -> None:
        self.line(status.service.name, describe(status))

    def figures(self, figures: ClusterStats | None) -> None:
        """Nothing: a log has no place that is always the latest."""


class JsonBoard:
    """One JSON object a line, for programs: what services log, with the service's name, and our own news likewise."""

    def line(self, name: str, text: str) -> None:
        try:
            entry = json.loads(text)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):  # ours, or what a library printed
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            entry = {"time": now, "level": "info", "logger": "kvcache.cli", "message": text}
        typer.echo(json.dumps({"service": name} | entry))

    def changed(self, status: ServiceStatus) -> None:
        self.line(status.service.name, describe(status))

    def figures(self, figures: ClusterStats | None) -> None:
        """Nothing: as in `PlainBoard`."""


class LiveBoard:
    """A table of all services that stays at the bottom, and the log above it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._statuses: dict[str, ServiceStatus] = {}
        self._figures: ClusterStats | None = None

    def line(self, name: str, text: str) -> None:
        self._live.console.print(Text(f"[{name}] {text}", style="dim"), soft_wrap=True)

    def changed(self, status: ServiceStatus) -> None:
        self._statuses[status.service.name] = status
        if status.state in {ServiceState.WAITING, ServiceState.GAVE_UP}:
            self.line(status.service.name, describe(status))
        self._live.update(status_table(self._statuses.values(), self._figures))

    def figures(self, figures: ClusterStats | None) -> None:
        self._figures = figures
        self._live.update(status_table(self._statuses.values(), figures))


@contextmanager
def open_board(log_format: LogFormat) -> Iterator[Board]:
    """The board that suits what is wanted and, for text, stdout."""
    terminal = console()
    if log_format is LogFormat.JSON:
        yield JsonBoard()
        return
    if not terminal.is_terminal:
        yield PlainBoard()
        return
    with Live(console=terminal, auto_refresh=True, transient=True, refresh_per_second=4) as live:
        yield LiveBoard(live)


def describe(status: ServiceStatus) -> str:
    """A service's process in words."""
    match status.state:
        case ServiceState.RUNNING:
            return f"started, pid {status.pid}"
        case ServiceState.WAITING | ServiceState.STOPPED | ServiceState.GAVE_UP if status.exit_code is not None:
            return f"{status.state}, exit code {status.exit_code}"
        case _:
            return str(status.state)


def status_table(statuses: Iterable[ServiceStatus], figures: ClusterStats | None) -> Table:
    """One row per service: its process, and what the broker says of it."""
    views = {view.worker_id: view for view in figures.workers} if figures else {}
    rows: list[tuple[object, ...]] = []
    for status in statuses:
        name = status.service.name
        process = (name, status.state, status.pid, status.restarts)
        if name in views:
            view = views[name]
            memory = f"{human_bytes(view.kv_used_bytes)} of {human_bytes(view.kv_total_bytes)}"
            load = (view.running, view.waiting, view.dispatched)
            rows.append((*process, view.status, *load, memory, describe_models(view)))
        elif name == "broker" and figures:
            rows.append((*process, figures.broker.state, figures.broker.inflight, None, figures.broker.requests))
        else:
            rows.append(process)
    return make_table(COLUMNS, rows)
