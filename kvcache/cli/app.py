"""The command tree, and the one place where errors become a line on stderr and an exit code.

Commands live in one file per group and import what is heavy (the client, tensors) when they run, so
that `kvcache --help` and a mistyped option answer at once. They raise; nobody else catches.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from bus.errors import BadArgument, ConnectionLost, DeadlineExceeded, KVCacheError, NoWorkers
from kvcache.cli import cluster, doctor, generation, kv_plane, metrics, model_files, processes, serve, top, up
from kvcache.cli.output import complain
from kvcache.supervisor import ServiceFailed

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_TIMEOUT = 0, 1, 2, 3, 4

app = typer.Typer(
    name="kvcache",
    help="A distributed KV cache for language model generation.",
    epilog="Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 nobody to serve it, 4 timed out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
kv_app = typer.Typer(help="Put, append and get KV tensors by layer.", no_args_is_help=True)
models_app = typer.Typer(help="Fetch and list models.", no_args_is_help=True)

app.command("up")(up.up)
app.command("serve")(serve.serve)
for name in processes.FORWARDED:
    app.command(name, add_help_option=False, context_settings=processes.PASS_ALL)(getattr(processes, name))
app.command("generate")(generation.generate)
app.command("chat")(generation.chat)
app.command("route")(cluster.route)
app.command("workers")(cluster.workers)
app.command("stats")(cluster.stats)
app.command("top")(top.top)
app.command("doctor")(doctor.doctor)
app.command("reset-prefix-cache")(cluster.reset_prefix_cache)
app.command("metrics")(metrics.metrics)
app.add_typer(kv_app, name="kv")
for name in kv_plane.COMMANDS:
    kv_app.command(name.removesuffix("_"))(getattr(kv_plane, name))
app.add_typer(models_app, name="models")
models_app.command("pull")(model_files.pull)
models_app.command("list")(model_files.list_)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(version("kvcache"))
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def exit_code_of(error: KVCacheError) -> int:
    match error:
        case BadArgument():
            return EXIT_USAGE
        case ConnectionLost() | NoWorkers():
            return EXIT_UNREACHABLE
        case DeadlineExceeded():
            return EXIT_TIMEOUT
        case _:
            return EXIT_FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (typer itself sees to interrupts, 130, and closed pipes)."""
    try:
        app(args=None if argv is None else list(argv), prog_name="kvcache")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_OK if end.code is None else EXIT_FAILED
    except KVCacheError as error:
        complain(str(error))
        return exit_code_of(error)
    except (ServiceFailed, OSError) as error:  # a full disk, a folder that may not be read
        complain(str(error))
        return EXIT_FAILED
    except UnicodeDecodeError as error:
        complain(f"what was typed or piped in is no {error.encoding} text: {error.reason}")
        return EXIT_USAGE
    return EXIT_OK
