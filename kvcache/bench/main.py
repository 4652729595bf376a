"""`kvcache bench NAME`: run one benchmark or all, show the tables, keep the figures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
from rich.console import Console

from bus.errors import KVCacheError
from kvcache.bench import bus, engine, gateway, pull, reuse, ring, router, tensors
from kvcache.bench.report import Report, show
from kvcache.bench.systems import run as systems


class Benchmark(Protocol):
    def __call__(self, *, quick: bool, progress: Callable[[str], None]) -> Report: ...


BENCHMARKS: dict[str, tuple[Benchmark, str]] = {
    "bus": (bus.run, "round trips, throughput and token relay, against zmq.proxy"),
    "tensors": (tensors.run, "put and get of tensors, against raw frames, safetensors and JSON over HTTP"),
    "reuse": (reuse.run, "time to first token, cold and cached, with SmolLM2"),
    "pull": (pull.run, "time to first token from another worker's KV, against computing it"),
    "engine": (engine.run, "decode, prefill, first tokens and chats, against other engines, with SmolLM2"),
    "peers": (systems.run, "the whole system against other servers, with SmolLM2, and stores of tensors"),
    "gateway": (gateway.run, "HTTP over the bus client: first token, throughput, many streams"),
    "ring": (ring.run, "balance, lookups and movement of the consistent hash"),
    "router": (router.run, "what one placement costs, and memory of the index"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every benchmark ran (goals met or not), 1 when one could not, 2 for wrong usage, 130 for Ctrl-C.

    The others run all the same, and their figures are kept; those from before a Ctrl-C too.
    """
    parser = argparse.ArgumentParser(
        prog="kvcache bench",
        description="Measure a part of the system against its reference, side by side in one run.",
        epilog="\n".join(f"  {name:8} {what}" for name, (_, what) in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*BENCHMARKS, "all"], help="which one, or all")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions in each run")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there; with all, a list of them")
    own = parser.add_argument_group("of engine and peers")
    own.add_argument(
        "--peers",
        nargs="*",
        choices=sorted({*engine.PEERS, *systems.NAMES}),
        help="which other engines, servers and stores; default all, but none of `all`",
    )
    own.add_argument("--install", action="store_true", help="make the environments of peers that have none")
    own.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="what all compute in")
    own.add_argument("--plot", metavar="FILE", type=Path, help="also draw a plot, as SVG: of engine, a step's time")
    own.add_argument("--markdown", metavar="FILE", type=Path, help="of peers: also write the tables there")
    given = parser.parse_args(argv)
    for file in filter(None, (given.json, given.plot, given.markdown)):
        try:
            file.open("ab").close()  # now, and not when all has been measured
        except OSError as error:
            parser.error(f"cannot write {file}: {error.strerror}")
    names = list(BENCHMARKS) if given.name == "all" else [given.name]
    benchmarks = {name: what for name, (what, _) in BENCHMARKS.items()} | _with_options(given)
    console, status = Console(highlight=False), Console(stderr=True, highlight=False)
    reports: list[Report] = []
    is_interrupted = False
    for name in names:
        started = time.monotonic()

        def progress(what: str, name: str = name, started: float = started) -> None:
            status.print(f"[dim]{name} {time.monotonic() - started:5.0f} s  {what}[/dim]")

        try:
            reports.append(benchmarks[name](quick=given.quick, progress=progress))
        except (KVCacheError, RuntimeError) as error:
            sys.stderr.write(f"bench {name}: {error}\n")
            continue
        except KeyboardInterrupt:
            sys.stderr.write(f"bench {name}: interrupted\n")
            is_interrupted = True
            break
        show(reports[-1], console)
    if given.json and reports:
        result = reports if given.name == "all" else reports[0]
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return 130 if is_interrupted else 0 if len(reports) == len(names) else 1


def _with_options(given: argparse.Namespace) -> dict[str, Benchmark]:
    """The benchmarks that know other engines. `all` measures only ours, and draws nothing: both would take the file."""
    is_all = given.name == "all"
    wanted = given.peers if given.peers is not None else () if is_all else (*engine.PEERS, *systems.NAMES)
    common = {"install": given.install, "dtype": given.dtype, "plot": None if is_all else given.plot}
    engines = engine.Options(peers=tuple(name for name in engine.PEERS if name in wanted), **common)
    servers = systems.Options(
        peers=tuple(name for name in systems.NAMES if name in wanted), markdown=given.markdown, **common
    )
    return {
        "engine": partial(engine.run, options=engines),
        "peers": partial(systems.run, options=servers),
    }
