"""From a cluster's figures to the text that Prometheus reads."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from bus.errors import ConnectionLost
from bus.stats import (
    BrokerStats,
    ClusterStats,
    EngineStats,
    ModelStats,
    PeerStats,
    PoolStats,
    WorkerStats,
    WorkerView,
)
from kvcache.client.results import Done, Start, Timings, Token, Usage
from kvcache.metrics.cluster import cluster_families
from kvcache.metrics.exposition import Page
from kvcache.metrics.families import Family, Kind
from kvcache.metrics.latest import FRESH_S, LatestStats
from kvcache.metrics.traffic import Traffic

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

POOL = PoolStats(
    num_blocks=10, free_blocks=3, held_blocks=2, cached_blocks=5, block_size=32, evictions=7,
    lookup_tokens=100, hit_tokens=60, preemptions=1, eviction_policy="lru", sequence_evictions=4,
)  # fmt: skip


def view(name: str, index: str = "exact") -> WorkerView:
    worker = WorkerStats(
        worker_id=name,
        incarnation=1,
        state="ready",
        loop_lag_ms=1.5,
        engine=EngineStats(gaps_replayed=3),
        peers=PeerStats(pulls=2, failures={"CORRUPT": 1}),
        models=(
            ModelStats(name="tiny", state="ready", running=2, waiting=1, kv_dtype="float32", runner="torch", pool=POOL),
            ModelStats(name="unloaded", state="absent"),
        ),
    )
    return WorkerView(
        worker_id=name, status="ready", weight=100, share=0.5, inflight=3, dispatched=9, last_heard_s=0.1,
        lease_s=1.0, index=index, index_gaps=2, stats=worker,
    )  # fmt: skip


def cluster(*workers: WorkerView) -> ClusterStats:
    broker = BrokerStats(
        incarnation=1,
        state="serving",
        policy="prefix",
        failed={"OVERLOADED": 5},
        reasons={"prefix: hit": 8, "all": 1},
        queued_messages=4,
        loop_lag_ms=2.0,
        workers_lost=1,
    )
    return ClusterStats(healthy=True, broker=broker, workers=workers)


def read(page: Page) -> Samples:
    text, content_type = page.encode("")
    assert content_type.startswith("text/plain")
    found: Samples = {}
    for family in parse_text(text.decode()):
        for sample in family.samples:
            at = sample.name, frozenset(sample.labels.items())
            assert at not in found, f"{at} is there twice"
            found[at] = sample.value
    return found


def at(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def page(stats: ClusterStats | None, *more: Family, is_vllm_compatible: bool = False) -> Page:
    return Page([*cluster_families(stats), *more], is_vllm_compatible=is_vllm_compatible)


def traffic() -> Traffic:
    seen = Traffic()
    done = Done("", "stop", Usage(10, 4, 1), Timings(0, 0, 0, 1, 2, 3, 0), "w", "because", "r")
    seen.watch(1, 0.0).saw([Start("w", "because", "tiny", 10, 4), Token(0, 1, "a"), done], 0.03)
    return seen


def test_figures_of_broker_workers_and_pools_are_there_with_their_labels() -> None:
    found = read(page(cluster(view("a"), view("b", "blind"))))
    of_pool = {"worker": "a", "model_name": "tiny"}
    expected = {
        at("kvcache_up"): 1,
        at("kvcache_healthy"): 1,
        at("kvcache_workers", status="ready"): 2,
        at("kvcache_workers", status="suspect"): 0,
        at("kvcache_broker_queued_messages"): 4,
        at("kvcache_broker_loop_lag_seconds"): 0.002,
        at("kvcache_broker_refusals_total", code="OVERLOADED"): 5,
        at("kvcache_broker_refusals_total", code="NO_WORKERS"): 0,
        at("kvcache_routing_decisions_total", policy="prefix", reason="hit"): 8,
        at("kvcache_routing_decisions_total", policy="all", reason=""): 1,
        at("kvcache_workers_lost_total"): 1,
        at("kvcache_index_state", worker="a", state="exact"): 1,
        at("kvcache_index_state", worker="b", state="exact"): 0,
        at("kvcache_index_state", worker="b", state="blind"): 1,
        at("kvcache_index_gaps_total", worker="a"): 2,
        at("kvcache_stream_replays_total", worker="a"): 3,
        at("kvcache_peer_pulls_total", worker="b"): 2,
        at("kvcache_peer_pull_failures_total", worker="b", code="CORRUPT"): 1,
        at("kvcache_worker_loop_lag_seconds", worker="a"): 0.0015,
        at("kvcache_models", worker="a", state="absent"): 1,
        at("kvcache_num_requests_running", **of_pool): 2,
        at("kvcache_num_requests_waiting", **of_pool): 1,
        at("kvcache_kv_cache_usage_perc", **of_pool): 0.2,
        at("kvcache_prefix_cache_queries_total", **of_pool): 100,
        at("kvcache_prefix_cache_hits_total", **of_pool): 60,
        at("kvcache_evicted_blocks_total", **of_pool, tier="device"): 7,
        at("kvcache_evicted_sequences_total", **of_pool): 4,
        at("kvcache_blocks", **of_pool, state="cached"): 5,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not any(("model_name", "unloaded") in labels for _, labels in found)
    assert not any(name.startswith("vllm:") for name, _ in found)


def test_vllm_names_carry_the_same_numbers_under_vllms_labels() -> None:
    found = read(page(cluster(view("a")), *traffic().families(), is_vllm_compatible=True))
    assert found[at("vllm:num_requests_waiting", engine="a", model_name="tiny")] == 1
    assert found[at("vllm:prefix_cache_hits_total", engine="a", model_name="tiny")] == 60
    assert found[at("vllm:gpu_prefix_cache_hits_total", engine="a", model_name="tiny")] == 60
    assert found[at("vllm:request_success_total", model_name="tiny", finished_reason="stop")] == 1
    assert found[at("vllm:time_to_first_token_seconds_bucket", model_name="tiny", le="0.02")] == 0
    assert found[at("vllm:time_to_first_token_seconds_bucket", model_name="tiny", le="0.04")] == 1
    assert found[at("vllm:time_to_first_token_seconds_count", model_name="tiny")] == 1
    info = {key: value for key, value in found.items() if key[0] == "vllm:cache_config_info"}
    ((_, labels),) = info
    assert {("block_size", "32"), ("num_gpu_blocks", "10"), ("engine", "a")} <= labels


def test_a_broker_that_does_not_answer_is_told_as_such_beside_what_is_known() -> None:
    found = read(page(None, *traffic().families()))
    assert found[at("kvcache_up")] == 0
    assert found[at("kvcache_generation_tokens_total", model_name="tiny")] == 1
    assert at("kvcache_healthy") not in found


def test_of_very_many_workers_the_rest_is_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.metrics.cluster.MAX_WORKERS", 3)
    found = read(page(cluster(*(view(f"{number:04}") for number in range(8)))))
    assert found[at("kvcache_workers", status="ready")] == 8
    assert found[at("kvcache_workers_not_shown")] == 5
    assert sum(name == "kvcache_worker_queue_seconds" for name, _ in found) == 3


def test_names_of_workers_may_be_anything_printable() -> None:
    name = 'a"b\\c{d}=é\u2028'
    assert read(page(cluster(view(name))))[at("kvcache_worker_requests_total", worker=name)] == 9


def test_openmetrics_is_spoken_to_whoever_asks_for_it() -> None:
    whole = page(cluster(view("a")), *traffic().families(), is_vllm_compatible=True)
    text, content_type = whole.encode("application/openmetrics-text; version=1.0.0,text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(text.decode())}  # type: ignore[no-untyped-call]
    assert {"kvcache_up", "kvcache_time_to_first_token_seconds", "vllm:prefix_cache_hits"} <= names


@pytest.mark.parametrize(
    "accept",
    ["*/*", "text/plain; version=x", "application/openmetrics-text; version=9.a.1", "a;b=c;;,=,", "\x00", "," * 9000],
)
def test_whatever_is_accepted_gets_text(accept: str) -> None:
    text, _ = page(None).encode(accept)
    assert b"kvcache_up 0.0" in text


def test_a_number_without_samples_is_still_described() -> None:
    family = Family("nothing", Kind.COUNTER, "Nothing yet.", ("code",))
    text, _ = Page([family], is_vllm_compatible=False).encode("")
    assert b"# TYPE kvcache_nothing_total counter" in text


class Broker:
    """Answers when it is let, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.is_away = False

    async def stats(self) -> ClusterStats:
        self.asked += 1
        await self.may_answer.wait()
        if self.is_away:
            raise ConnectionLost("nobody is there")
        return cluster()


async def test_scrapes_that_come_together_share_one_question() -> None:
    now, broker = 100.0, Broker()
    latest = LatestStats(broker.stats, lambda: now)
    scrapes = asyncio.gather(*(latest.get() for _ in range(5)))
    await asyncio.sleep(0)
    broker.may_answer.set()
    assert [report.stats for report in await scrapes] == [cluster()] * 5
    assert broker.asked == 1


async def test_an_answer_serves_for_a_second_and_so_does_silence() -> None:
    now, broker = 100.0, Broker()
    broker.may_answer.set()
    latest = LatestStats(broker.stats, lambda: now)
    assert (await latest.get()).stats is not None
    broker.is_away, now = True, now + FRESH_S / 2
    assert (await latest.get()).stats is not None
    now += FRESH_S
    assert (await latest.get()).stats is None
    broker.is_away = False
    assert (await latest.get()).stats is None
    assert broker.asked == 2
    now += FRESH_S
    assert (await latest.get()).stats is not None


async def test_a_broker_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.metrics.latest.ANSWER_S", 0.01)
    report = await LatestStats(Broker().stats).get()
    assert (report.stats, "has not answered" in report.problem) == (None, True)
