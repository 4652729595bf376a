"""`kvcache broker`, `worker`, `gateway`, `bench`, ...: other programs of this project under one name.

Each has its own `main` and flags. We become that program (exec) rather than import it: the flags stand
in one place, a worker's torch stays out of this package, and signals and exit codes need no relay.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

PASS_ALL = {"ignore_unknown_options": True, "allow_extra_args": True}
FORWARDED = ("broker", "worker", "gateway", "bench", "record", "simulate")


def broker(context: typer.Context) -> None:
    """Run a broker in the foreground."""
    _become("kvcache.broker", context)


def worker(context: typer.Context) -> None:
    """Run a worker in the foreground."""
    _become("workers", context)


def gateway(context: typer.Context) -> None:
    """Run a gateway in the foreground."""
    _become("kvcache.gateway", context)


def bench(context: typer.Context) -> None:
    """Measure a part against its reference."""
    _become("kvcache.bench", context)


def record(context: typer.Context) -> None:
    """Run a broker that records arrivals."""
    if "--help" in context.args:
        typer.echo("kvcache record FILE [FLAGS]: a broker that records arrivals to FILE. Its flags are a broker's:\n")
        _become("kvcache.broker", context)
    if not context.args or context.args[0].startswith("-"):
        raise typer.BadParameter("name the file to write, then the broker's flags: kvcache record FILE [...]")
    _become("kvcache.broker", context, "--record")


def simulate(context: typer.Context) -> None:
    """Replay a trace through the routing policies."""
    _become("kvcache.simulate", context)


def _become(module: str, context: typer.Context, *flags: str) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *flags, *context.args])
