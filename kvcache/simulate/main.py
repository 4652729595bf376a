"""`kvcache simulate TRACE`: run the policies, show the table, keep the figures and the plots."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bus.errors import KVCacheError
from kvcache.client import Client
from kvcache.plots import distribution, plot
from kvcache.routing.policies import POLICIES
from kvcache.simulate.calibrate import calibrate
from kvcache.simulate.check import check
from kvcache.simulate.check import show as show_check
from kvcache.simulate.options import Plan, parser, plan, swept
from kvcache.simulate.report import Figures, PolicyReport, figures, mean, optimum, shared_queue_s, show
from kvcache.simulate.rivals import rivals
from kvcache.simulate.routers import PolicyRouter, Router
from kvcache.simulate.simulation import Result, Simulation


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """All policies in one setup. at: the swept value; None without a sweep. ttft_s: of the first seed, by policy.
    bound_s: see `shared_queue_s`.
    """

    at: float | None
    optimum: float
    policies: list[PolicyReport]
    ttft_s: dict[str, list[float]]
    bound_s: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when done, 1 when something could not be done, 2 for wrong usage, 130 for Ctrl-C."""
    given = parser().parse_args(argv)
    console, status = _console(), _console(stderr=True)
    try:
        if given.calibrate:
            return _calibrate(given, status)
        chosen = plan(given)
        if given.check is not None:
            return _check(given, chosen, console, status)
        scenes = [_scene(swept(chosen, value), value, status) for value in chosen.sweep[1]]
        scenes = scenes or [_scene(chosen, None, status)]
        for scene in scenes:
            show(scene.policies, _title(given, chosen, scene), scene.bound_s, console)
        if given.json:
            given.json.write_bytes(msgspec.json.format(_as_json(scenes), indent=2) + b"\n")
        if given.plots:
            _draw(given.plots, chosen, scenes)
    except KVCacheError as error:
        sys.stderr.write(f"simulate: {error}\n")
        return 2
    except RuntimeError as error:  # the workers did not start
        sys.stderr.write(f"simulate: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"simulate: {f'{error.filename}: ' if error.filename else ''}{error.strerror}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("simulate: interrupted\n")
        return 130
    return 0


def _console(*, stderr: bool = False) -> Console:
    """Piped output is not wrapped at 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else 120)


def simulate(chosen: Plan, policy: str, seed: int, progress: Callable[[int], None]) -> Result:
    """One policy, one seed."""
    setup = replace(chosen.setup, seed=seed)
    others = rivals(seed, setup.cache_tokens)

    def make() -> Router:
        return others[policy]() if policy in others else PolicyRouter(POLICIES[policy])

    return Simulation(chosen.trace, setup, make).run(progress)


def _scene(chosen: Plan, at: float | None, status: Console) -> Scene:
    best = optimum(chosen.trace)
    reports, ttft = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=status, disable=not status.is_terminal) as bar:
        for policy in chosen.policies:
            task = bar.add_task(policy, total=chosen.seeds * len(chosen.trace))
            runs: list[Figures] = []
            reasons: Counter[str] = Counter()
            for seed in range(chosen.seeds):
                result = simulate(chosen, policy, seed, partial(_advance, bar, task, seed * len(chosen.trace)))
                runs.append(figures(result, best, chosen.slo_s))
                reasons.update(result.reasons)
                if not seed:
                    ttft[policy] = sorted(o.ttft_s for o in result.outcomes if o.ttft_s is not None)
            bar.update(task, completed=chosen.seeds * len(chosen.trace))
            reports.append(PolicyReport(policy=policy, mean=mean(runs), runs=runs, reasons=dict(reasons)))
    bound = shared_queue_s(chosen.trace, chosen.setup.costs, chosen.setup.num_workers)
    return Scene(at=at, optimum=best, policies=reports, ttft_s=ttft, bound_s=bound)


def _advance(bar: Progress, task: TaskID, before: int, done: int) -> None:
    bar.update(task, completed=before + done)


def _title(given: argparse.Namespace, chosen: Plan, scene: Scene) -> str:
    where = f", {chosen.sweep[0]} {scene.at:g}" if scene.at is not None else ""
    seeds = f"{chosen.seeds} seeds" if chosen.seeds > 1 else "1 seed"
    return (
        f"{Path(given.trace).name}: {len(chosen.trace)} requests, {seeds}, optimum hit rate {scene.optimum:.3f}{where}"
    )


def _as_json(scenes: Sequence[Scene]) -> bytes:
    plain = [{"at": scene.at, "optimum": scene.optimum, "policies": scene.policies} for scene in scenes]
    return msgspec.json.encode(plain)


def _draw(folder: Path, chosen: Plan, scenes: Sequence[Scene]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first = scenes[0]
    balance = {report.policy: [(report.mean.imbalance, report.mean.hit)] for report in first.policies}
    pictures = {
        "hits.svg": plot("Hits against imbalance", "max/mean busy", "token hit rate", balance, as_points=True),
        "ttft.svg": plot(
            "Time to first token",
            "seconds",
            "share of requests above it",
            {name: distribution(seconds) for name, seconds in first.ttft_s.items() if seconds},
            log_x=True,
            log_y=True,
        ),
    }
    if len(scenes) > 1:
        varied = chosen.sweep[0]
        p90 = _by_policy(scenes, lambda mean: mean.p90_s)
        title = "Time to first token, 90th percentile"
        pictures["sweep_ttft.svg"] = plot(title, varied, "seconds", p90, log_x=True, log_y=True)
        hits = _by_policy(scenes, lambda mean: mean.hit)
        pictures["sweep_hits.svg"] = plot("Hits", varied, "token hit rate", hits, log_x=True)
    for name, picture in pictures.items():
        (folder / name).write_text(picture, encoding="utf-8")


def _by_policy(scenes: Sequence[Scene], value: Callable[[Figures], float]) -> dict[str, list[tuple[float, float]]]:
    return {
        report.policy: [(scene.at or 0.0, value(scene.policies[index].mean)) for scene in scenes]
        for index, report in enumerate(scenes[0].policies)
    }


def _check(given: argparse.Namespace, chosen: Plan, console: Console, status: Console) -> int:
    report = check(chosen.trace, given.check, given.divide, chosen.setup.num_workers, lambda what: status.print(what))
    show_check(report, console)
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return 0


def _calibrate(given: argparse.Namespace, status: Console) -> int:
    with Client(given.url, timeout=300.0) if given.url else Client(timeout=300.0) as client:
        costs = calibrate(client, model=given.model, say=lambda what: status.print(what))
    given.calibrate.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")
    status.print(f"{1 / costs.token_s:,.0f} tokens a second, {1000 * costs.step_s:.1f} ms a step: {given.calibrate}")
    return 0
