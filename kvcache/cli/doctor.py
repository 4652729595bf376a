"""`kvcache doctor`: is everything here that is needed, does it work, and what to do where it does not."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bus.endpoints import DEFAULT_URL
from bus.errors import KVCacheError
from kvcache.checkup import (
    Examination,
    Finding,
    Verdict,
    fail,
    judge_broker,
    judge_clock,
    judge_examination,
    judge_machine,
    judge_model,
    judge_packages,
    judge_ports,
    judge_python,
    warn,
)
from kvcache.cli import probes
from kvcache.cli.options import AsJson, Home, Url
from kvcache.cli.output import console, plain, print_json
from kvcache.models import DEFAULT_HOME, ModelRegistry, ModelSource

DEFAULT_MODEL = "smollm2"

_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def doctor(
    model: Annotated[
        str, typer.Option("--model", help="Check this one: a name, a folder or a hub id.", metavar="NAME")
    ] = DEFAULT_MODEL,
    load: Annotated[bool, typer.Option("--load", help="Also load the model, which takes its memory.")] = False,
    home: Home = str(DEFAULT_HOME),
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Check the installation and say what to do.

    With --url also the broker there. Ends with 1 if anything failed; warnings leave it at 0.
    """
    found: list[Finding] = []
    for finding in examination(model, Path(home).expanduser(), url, load=load):
        found.append(finding)
        if not as_json:
            _show(finding)
    counts = {verdict: sum(it.verdict is verdict for it in found) for verdict in Verdict}
    if as_json:
        print_json({"healthy": not counts[Verdict.FAIL], "findings": found})
    else:
        typer.echo(f"{counts[Verdict.OK]} ok, {counts[Verdict.WARN]} to look at, {counts[Verdict.FAIL]} failed")
    if counts[Verdict.FAIL]:
        raise typer.Exit(1)


def examination(model: str, home: Path, url: str | None, *, load: bool) -> Iterator[Finding]:
    """All findings, the quick ones first, each as soon as it is made."""
    version, steady = sys.version_info, time.time() - time.monotonic()
    yield from judge_python((version.major, version.minor, version.micro), platform.system())
    yield from judge_packages(metadata.requires("kvcache") or (), probes.installed)
    space = probes.free_memory(), probes.free_disk(home), str(home)
    yield from judge_machine(probes.cores(), probes.load(), *space)
    yield from _network(url)
    yield probes.loopback()
    yield from _model(model, home, load=load)
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    yield judge_clock(now, probes.installed_at(), now - time.monotonic() - steady, shown)


def _network(url: str | None) -> Iterator[Finding]:
    """The broker that is named; without one the usual ports, and the broker that may be there."""
    answer = probes.ask_broker(url or DEFAULT_URL)
    has_broker = not isinstance(answer, KVCacheError)
    if url is None:
        yield from judge_ports(probes.taken_ports(), has_broker=has_broker)
    if not isinstance(answer, KVCacheError):
        yield from judge_broker(url or DEFAULT_URL, *answer, version=metadata.version("kvcache"))
    elif url is not None:
        yield fail("broker", f"{url}: {answer}", "is it running, and are its six ports reachable from here?")


def _model(name: str, home: Path, *, load: bool) -> Iterator[Finding]:
    source: ModelSource | None = None
    absent: Finding | None = None
    try:
        registry = ModelRegistry(home, named=[name])
        source = registry.find(registry.named[0])
        if not source.is_present:
            absent = warn("model", f"{source.name} was not fetched yet", f"kvcache models pull {source.name}")
            source = None
    except KVCacheError as error:
        absent = fail("model", str(error), "kvcache models list shows what there is")
    result = probes.examine(source, load=load)
    yield judge_examination(result) if isinstance(result, Examination) else result
    if absent is not None:
        yield absent
    elif source is not None and isinstance(result, Examination):
        yield judge_model(source.name, result)


def _show(finding: Finding) -> None:
    line = Text.assemble(
        (f"{finding.verdict:<5}", _STYLES[finding.verdict]), f"{finding.check:<10} {plain(finding.found)}"
    )
    terminal = console()
    terminal.print(line, soft_wrap=True)
    if finding.advice:
        terminal.print(Text(f"{'':16}{plain(finding.advice)}", style="dim"), soft_wrap=True)
