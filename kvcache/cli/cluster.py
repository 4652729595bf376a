"""`kvcache route`, `workers`, `stats` and `reset-prefix-cache`: what the cluster knows, and may forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import kvcache
from bus.stats import BrokerStats, ClusterStats, Explanation, WorkerStats, WorkerView
from kvcache.cli.options import AsJson, Policy, Timeout, Url
from kvcache.cli.output import human_bytes, note, print_json, print_table
from kvcache.model_words import describe_models

WORKER_COLUMNS = ("WORKER", "STATUS", "#SHARE", "#RUNNING", "#WAITING", "#DISPATCHED", "KV MEMORY", "INDEX", "MODELS")


def route(
    seq_id: Annotated[str | None, typer.Argument(help="A sequence's id.", metavar="SEQ", show_default=False)] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Route this prompt by its prefix instead.", show_default=False, metavar="TEXT"),
    ] = None,
    policy: Policy = None,
    url: Url = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> None:
    """Say which worker would serve a request now, and why."""
    if (seq_id is None) == (prompt is None):
        raise typer.BadParameter("give either a sequence id or --prompt TEXT")
    with kvcache.Client(url, timeout=timeout) as client:
        explanation = client.route(seq_id, prompt=prompt, policy=policy)
    if as_json:
        print_json(explanation)
        return
    print_table(*explained(explanation))


def workers(url: Url = None, timeout: Timeout = 10.0, as_json: AsJson = False) -> None:
    """List the workers, their load, memory and models."""
    with kvcache.Client(url, timeout=timeout) as client:
        views = client.workers()
    if as_json:
        print_json(views)
    elif views:
        print_table(WORKER_COLUMNS, map(worker_row, views))
    else:
        note("no workers; start one: kvcache worker")


def stats(url: Url = None, timeout: Timeout = 10.0, as_json: AsJson = False) -> None:
    """Show the figures of the broker and of every worker.

    Counts are totals since each of them started.
    """
    with kvcache.Client(url, timeout=timeout) as client:
        figures = client.stats()
    if as_json:
        print_json(figures)
        return
    _print_stats(figures)


def reset_prefix_cache(
    cache_salt: Annotated[
        str | None,
        typer.Option("--cache-salt", help="Only prefixes of this salt.", show_default="all", metavar="SALT"),
    ] = None,
    url: Url = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> None:
    """Forget your cached prefixes, on all workers.

    What runs keeps what it uses; what is kept under a sequence's id stays.
    """
    with kvcache.Client(url, timeout=timeout) as client:
        num_blocks = client.flush_prefix_cache(cache_salt=cache_salt)
    if as_json:
        print_json({"blocks": num_blocks})
    else:
        note(f"forgot {num_blocks} {'block' if num_blocks == 1 else 'blocks'}")


def explained(explanation: Explanation) -> tuple[Sequence[str], list[Sequence[object]], str]:
    """Columns, rows and title of a table that shows each candidate, in the order of preference."""
    rows: list[Sequence[object]] = [
        (
            "*" if it.worker_id == explanation.worker_id else "",
            it.worker_id,
            it.load,
            f"{it.limit:.1f}",
            it.weight,
            it.hit_tokens,
            f"{it.queue_s:.3f}",
            _seconds(it.prefill_s),
            _seconds(it.total_s),
            it.index,
            it.note,
        )
        for it in explanation.candidates
    ]
    title = f"{explanation.worker_id}: {explanation.reason} (policy {explanation.policy})"
    columns = (
        "",
        "WORKER",
        "#LOAD",
        "#LIMIT",
        "#WEIGHT",
        "#HIT",
        "#QUEUE S",
        "#PREFILL S",
        "#TOTAL S",
        "INDEX",
        "NOTE",
    )
    return columns, rows, title


def worker_row(view: WorkerView) -> tuple[object, ...]:
    """One worker under WORKER_COLUMNS."""
    return (
        view.worker_id,
        view.status,
        f"{view.share:.0%}",
        view.running,
        view.waiting,
        view.dispatched,
        f"{human_bytes(view.kv_used_bytes)} of {human_bytes(view.kv_total_bytes)}",
        f"{view.index or '-'}, {view.indexed_nodes} nodes",
        describe_models(view),
    )


def _print_stats(figures: ClusterStats) -> None:
    print_table(["BROKER", "VALUE"], _broker_rows(figures.broker))
    known = [view.stats for view in figures.workers if view.stats is not None]
    if figures.workers:
        print_table(["INDEX", *(f"#{it.worker_id}" for it in figures.workers)], _index_rows(figures.workers))
    if known:
        print_table(["", *(f"#{it.worker_id}" for it in known)], _worker_rows(known))


def _broker_rows(broker: BrokerStats) -> list[tuple[object, ...]]:
    return [
        ("state", broker.state),
        ("policy", broker.policy),
        ("up", f"{broker.uptime_s:.0f} s"),
        ("memory", human_bytes(broker.rss_bytes)),
        ("clients, streams, in flight", f"{broker.clients}, {broker.streams}, {broker.inflight}"),
        ("requests", broker.requests),
        ("routed", _counts(broker.reasons)),
        ("failed", _counts(broker.failed)),
        ("nodes indexed", broker.indexed_nodes),
        ("prompt tokens", broker.prompt_tokens),
        ("  of them foreseen to be cached", _part(broker.foreseen_tokens, broker.prompt_tokens)),
        ("  of them cached", _part(broker.cached_tokens, broker.prompt_tokens)),
        ("tokens relayed", broker.tokens_relayed),
        ("workers lost", broker.workers_lost),
        ("malformed, unwelcome", f"{broker.malformed}, {broker.unwelcome}"),
    ]


def _index_rows(views: Sequence[WorkerView]) -> list[tuple[object, ...]]:
    """What the broker believes of its workers."""
    return [
        ("known", *(it.index for it in views)),
        ("nodes", *(it.indexed_nodes for it in views)),
        ("lost reports", *(it.index_gaps for it in views)),
        ("queue, s", *(f"{it.queue_s:.3f}" for it in views)),
        ("prefill tokens/s", *(f"{it.prefill_tokens_per_s:.0f}" if it.prefill_tokens_per_s else "-" for it in views)),
        ("pull tokens/s", *(f"{it.pull_tokens_per_s:.0f}" if it.pull_tokens_per_s else "-" for it in views)),
    ]


def _worker_rows(workers: list[WorkerStats]) -> list[tuple[object, ...]]:
    return [
        ("up, s", *(f"{it.uptime_s:.0f}" for it in workers)),
        ("models loaded, unloaded", *(_comings_and_goings(it) for it in workers)),
        ("models run on", *(_runners(it) for it in workers)),
        ("memory", *(human_bytes(it.rss_bytes) for it in workers)),
        ("finished", *(it.engine.finished for it in workers)),
        ("failed", *(it.engine.failed for it in workers)),
        ("prompt tokens", *(it.engine.prompt_tokens for it in workers)),
        ("  of them cached", *(_part(it.engine.cached_tokens, it.engine.prompt_tokens) for it in workers)),
        ("completion tokens", *(it.engine.completion_tokens for it in workers)),
        ("blocks held", *(sum(model.pool.held_blocks for model in it.models) for it in workers)),
        ("blocks cached", *(sum(model.pool.cached_blocks for model in it.models) for it in workers)),
        ("blocks free", *(sum(model.pool.free_blocks for model in it.models) for it in workers)),
        ("blocks evicted", *(sum(model.pool.evictions for model in it.models) for it in workers)),
        ("audits passed, failed", *(_audits(it) for it in workers)),
        ("KV plane sequences", *(it.store.sequences for it in workers)),
        ("KV plane bytes", *(human_bytes(it.store.used_bytes) for it in workers)),
        ("KV plane evictions", *(it.store.evictions for it in workers)),
    ]


def _comings_and_goings(worker: WorkerStats) -> str:
    return f"{sum(it.loads for it in worker.models)}, {sum(it.unloads for it in worker.models)}"


def _runners(worker: WorkerStats) -> str:
    """What computes its loaded models, and why it is not the faster one."""
    return "; ".join(
        f"{model.name}: {_with_reason(model.runner, model.runner_reason)}"
        + (f", {_with_reason(model.attention, model.attention_reason)}" if model.attention else "")
        for model in worker.models
        if model.runner
    )


def _with_reason(name: str, reason: str) -> str:
    return f"{name} ({reason})" if reason else name


def _audits(worker: WorkerStats) -> str:
    """Found blocks that were computed again, and those among them that were wrong."""
    pools = [model.pool for model in worker.models]
    return f"{sum(pool.audits_passed for pool in pools)}, {sum(pool.audits_failed for pool in pools)}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _part(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else str(part)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "-"
