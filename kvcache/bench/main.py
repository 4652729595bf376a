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


class Benchmark(Protocol):
    def __call__(self, *, quick: bool, progress: Callable[[str], None]) -> Report: ...


BENCHMARKS: dict[str, tuple[Benchmark, str]] = {
    "bus": (bus.run, "round trips, throughput and token relay, against zmq.proxy"),
    "tensors": (tensors.run, "put and get of tensors, against raw frames, safetensors and JSON over HTTP"),
    "reuse": (reuse.run, "time to first token, cold and cached, with SmolLM2"),
    "pull": (pull.run, "time to first token from another worker's KV, against computing it"),
    "engine": (engine.run, "decode, prefill, first tokens and chats, against other engines, with SmolLM2"),
    "gateway": (gateway.run, "HTTP over the bus client: first token, throughput, many streams"),
    "ring": (ring.run, "balance, lookups and movement of the consistent hash"),
    "router": (router.run, "what one placement costs, and memory of the index"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every benchmark ran (goals met or not), 1 when one could not, 2 for wrong usage.

    The others run all the same, and their figures are kept.
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
    own = parser.add_argument_group("of engine")
    own.add_argument(
        "--peers", nargs="*", choices=engine.PEERS, help="which other engines; default all, but none of `all`"
    )
    own.add_argument("--install", action="store_true", help="make the environments of engines that have none")
    own.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="what all compute in")
    own.add_argument("--plot", metavar="FILE", type=Path, help="also draw a step's time by context and batch, as SVG")
    given = parser.parse_args(argv)
    names = list(BENCHMARKS) if given.name == "all" else [given.name]
    peers = given.peers if given.peers is not None else [] if given.name == "all" else list(engine.PEERS)
    options = engine.Options(peers=tuple(peers), install=given.install, dtype=given.dtype, plot=given.plot)
    benchmarks = {name: what for name, (what, _) in BENCHMARKS.items()}
    benchmarks["engine"] = partial(engine.run, options=options)
    console, status = Console(highlight=False), Console(stderr=True, highlight=False)
    reports: list[Report] = []
    for name in names:
        started = time.monotonic()

        def progress(what: str, name: str = name, started: float = started) -> None:
            status.print(f"[dim]{name} {time.monotonic() - started:5.0f} s  {what}[/dim]")

        try:
            reports.append(benchmarks[name](quick=given.quick, progress=progress))
        except (KVCacheError, RuntimeError) as error:
            sys.stderr.write(f"bench {name}: {error}\n")
            continue
        show(reports[-1], console)
    if given.json and reports:
        result = reports if given.name == "all" else reports[0]
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    return 0 if len(reports) == len(names) else 1
