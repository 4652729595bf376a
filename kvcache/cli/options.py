"""Options that several commands share: one spelling, one help text, one environment variable."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="KVCACHE_URL",
        help="The broker: tcp://HOST:PORT or ipc:///PATH.",
        show_default="tcp://127.0.0.1:5555",
        metavar="URL",
    ),
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.1, help="Give up after this many seconds.", metavar="SECONDS")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of a table.")]
SeqId = Annotated[str, typer.Argument(help="The sequence's id.", metavar="SEQ", show_default=False)]
Layer = Annotated[int, typer.Option("--layer", min=0, help="The layer's index.", metavar="N")]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy", help="Route by this policy instead of the broker's own.", show_default=False, metavar="NAME"
    ),
]
Home = Annotated[
    str,
    typer.Option("--home", envvar="KVCACHE_HOME", help="The folder that holds downloaded models.", metavar="FOLDER"),
]

# Of the commands that run services here.


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


Logs = Annotated[
    LogFormat, typer.Option("--log-format", help="Of all processes; json: an object a line.", metavar="text|json")
]
NumWorkers = Annotated[
    int, typer.Option("--workers", "-n", min=1, max=64, help="How many workers to run.", metavar="N")
]
KvMemory = Annotated[str, typer.Option("--kv-cache-memory-bytes", help="KV memory of each worker.", metavar="SIZE")]
BrokerPolicy = Annotated[
    str | None, typer.Option("--policy", help="How the broker places requests.", show_default=False, metavar="NAME")
]
WorkerFlags = Annotated[
    list[str] | None,
    typer.Argument(
        help="After --: more flags for every worker (kvcache worker --help).",
        show_default=False,
        metavar="WORKER_FLAGS",
    ),
]
