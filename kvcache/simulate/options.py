"""What `kvcache simulate` can be asked: flags to a setup, each checked where it is read."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from msgspec.structs import replace as replace_struct

from bus.errors import BadArgument
from kvcache.routing.policies import POLICIES
from kvcache.simulate.costs import Costs, read_costs
from kvcache.simulate.rivals import rivals
from kvcache.simulate.simulation import Change, Setup
from kvcache.simulate.synthetic import KINDS, multiplied, synthetic, with_prefixes
from kvcache.simulate.traces import Arrival, faster, read_trace

SYNTHETIC = "synthetic:"
RIVALS = tuple(rivals(0, 0))
CHANGES = "T:add  T:remove:WORKER  T:slow:WORKER:FACTOR  T:restart  T:restart:blind"
SWEPT = ("workers", "cache-tokens", "speed", "scale")
MAX_SCALE = 65_535
EPILOG = f"""\
TRACE is a file (Mooncake JSONL, Azure or BurstGPT CSV, or what `kvcache record` wrote) or {SYNTHETIC}KIND, KIND one of
{", ".join(KINDS)}.
Policies: {", ".join(POLICIES)};
rivals, for comparison: {", ".join(RIVALS)}; or all.
Changes: {CHANGES}
(T in seconds, WORKER a number from 0).
A JSONL trace whose timestamps are seconds and not milliseconds: --speed 0.001.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to simulate. sweep: the option that varies, and its values; empty for none."""

    trace: list[Arrival]
    setup: Setup
    policies: list[str]
    seeds: int
    slo_s: float
    sweep: tuple[str, tuple[float, ...]]


def parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    made = argparse.ArgumentParser(
        prog="kvcache simulate",
        description="Replay a trace through the broker's own routing code, against modelled workers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("trace", metavar="TRACE", nargs="?", help="see below")
    add("--policy", default="prefix", metavar="NAMES", help="one or more, by commas, or all [prefix]")
    add("--workers", type=int, metavar="N", help="how many workers [8; 2 with --check]")
    add("--cache-tokens", type=int, default=3_000_000, metavar="N", help="tokens that each can cache [3000000]")
    add("--speed", type=float, default=1.0, metavar="X", help="replay the trace this many times faster [1]")
    add("--until", type=float, metavar="S", help="only what arrives in the first S seconds of the trace")
    add("--scale", type=int, default=1, metavar="N", help="N times the workers, and users, who share nothing [1]")
    add("--seeds", type=int, default=1, metavar="N", help="run so many times, each with other workers' names [1]")
    add("--costs", type=Path, metavar="FILE", help="what work costs, as --calibrate wrote it [a 70B model on 8 GPUs]")
    add("--link", type=float, metavar="X", help="tokens of KV a second that one worker can fetch; 0: no pulls")
    add("--order", choices=["fifo", "shortest"], default="shortest", help="of prefills within a worker [shortest]")
    add("--brokers", type=int, default=1, metavar="N", help="so many, that do not talk to each other [1]")
    add("--event-loss", type=float, default=0.0, metavar="X", help="share of block events lost and never repaired [0]")
    add("--change", action="append", default=[], metavar="CHANGE", help="something happens; may be repeated")
    add("--sweep", metavar="OPTION=A,B,..", help=f"once for each value; OPTION one of {', '.join(SWEPT)}")
    add("--slo", type=float, default=5.0, metavar="S", help="a first token is in time within so many seconds [5]")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--plots", type=Path, metavar="FOLDER", help="draw the figures there, as SVG")
    add("--calibrate", type=Path, metavar="FILE", help="measure a running worker's costs, write them there, and end")
    add("--check", type=float, metavar="S", help="replay the trace for S seconds on real workers, and compare")
    add("--divide", type=int, default=32, metavar="N", help="all lengths by this, with --check [32]")
    add("--url", metavar="URL", help="the broker to calibrate on")
    add("--model", metavar="NAME", help="the model to calibrate with")
    return made


def plan(given: argparse.Namespace) -> Plan:
    """Raises BadArgument for a value that means nothing."""
    costs = read_costs(given.costs) if given.costs else Costs()
    if given.link is not None:
        if given.link < 0:
            raise BadArgument(f"--link is tokens a second, 0 or more, not {given.link}")
        costs = replace_struct(costs, pull_s=1 / given.link if given.link else None)
    for name, least in (("seeds", 1), ("speed", 1e-9), ("slo", 0), ("divide", 1), ("check", 1), ("until", 0)):
        if getattr(given, name) is not None and getattr(given, name) < least:
            raise BadArgument(f"--{name} must be more than that: {getattr(given, name)}")
    if given.workers is None:
        given.workers = 8 if given.check is None else 2
    setup = Setup(
        num_workers=given.workers,
        cache_tokens=given.cache_tokens,
        costs=costs,
        order=given.order,
        num_brokers=given.brokers,
        event_loss=given.event_loss,
        changes=tuple(parse_change(text, given.workers) for text in given.change),
    )
    trace = faster(_trace(given.trace, inf if given.until is None else given.until), given.speed)
    chosen = Plan(trace, setup, _policies(given.policy), given.seeds, given.slo, _sweep(given.sweep))
    return scaled(chosen, given.scale)


def swept(chosen: Plan, value: float) -> Plan:
    """The plan with its swept option set to `value`."""
    match chosen.sweep[0]:
        case "workers":
            return replace(chosen, setup=replace(chosen.setup, num_workers=int(value)))
        case "cache-tokens":
            return replace(chosen, setup=replace(chosen.setup, cache_tokens=int(value)))
        case "scale":
            return scaled(chosen, int(value))
        case _:
            return replace(chosen, trace=faster(chosen.trace, value))


def scaled(chosen: Plan, times: int) -> Plan:
    """The plan for a cluster that is so many times as large, with as many times the users. Raises BadArgument."""
    if not 1 <= times <= MAX_SCALE:
        raise BadArgument(f"a scale is from 1 to {MAX_SCALE}, not {times}")
    setup = replace(chosen.setup, num_workers=chosen.setup.num_workers * times)
    return replace(chosen, setup=setup, trace=multiplied(chosen.trace, times))


def parse_change(text: str, num_workers: int) -> Change:
    """Raises BadArgument that says how changes are written."""
    match text.split(":"):
        case [at, "add"]:
            return Change(_number(at, text), "add")
        case [at, "remove", worker]:
            return Change(_number(at, text), "remove", _worker(worker, num_workers, text))
        case [at, "slow", worker, factor]:
            slowness = _number(factor, text)
            if slowness == 0.0:
                raise BadArgument(f"in change {text!r} the factor must be above 0")
            return Change(_number(at, text), "slow", _worker(worker, num_workers, text), slowness)
        case [at, "restart", *how] if how in ([], ["blind"]):
            return Change(_number(at, text), "restart", replay=not how)
    raise BadArgument(f"change {text!r} is none of: {CHANGES}")


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise BadArgument(f"in {whole!r}, {text!r} is not a number") from None
    if not 0.0 <= number < float("inf"):
        raise BadArgument(f"in {whole!r}, {text!r} must be 0 or more")
    return number


def _worker(text: str, num_workers: int, whole: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= num_workers:
        raise BadArgument(f"in change {whole!r}, {text!r} is not a worker from 0 to {num_workers - 1}")
    return int(text)


def _trace(name: str | None, until_s: float) -> list[Arrival]:
    if name is None:
        raise BadArgument(f"name a trace: a file, or {SYNTHETIC} and one of {', '.join(KINDS)}")
    if name.startswith(SYNTHETIC):
        return [arrival for arrival in synthetic(name.removeprefix(SYNTHETIC)) if arrival.at <= until_s]
    path = Path(name)
    trace = read_trace(path, until_s)
    return trace if trace.tells_prefixes else with_prefixes(trace)


def _policies(text: str) -> list[str]:
    known = [*RIVALS, *POLICIES]
    names = known if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise BadArgument(f"there is no policy {name!r}; use one or more of {', '.join(known)}, or all")
    if not names:
        raise BadArgument("name at least one policy")
    return names


def _sweep(text: str | None) -> tuple[str, tuple[float, ...]]:
    if text is None:
        return "", ()
    name, _, values = text.partition("=")
    if name not in SWEPT or not values:
        raise BadArgument(f"sweep {text!r} is not OPTION=A,B,.. with OPTION one of {', '.join(SWEPT)}")
    numbers = tuple(_number(value, text) for value in values.split(","))
    if not all(numbers):
        raise BadArgument(f"in sweep {text!r} every value must be above 0")
    return name, numbers
