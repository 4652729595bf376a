"""The simulation: time moves as it should, every request ends once, and equal seeds give equal results."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from math import inf

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import BadArgument
from kvcache.ring import HashRing
from kvcache.routing.policies import POLICIES, Policy
from kvcache.routing.views import Belief, Choice, Request
from kvcache.simulate.costs import Costs
from kvcache.simulate.report import figures, mean, optimum, shared_queue_s
from kvcache.simulate.rivals import rivals
from kvcache.simulate.routers import PolicyRouter, Router
from kvcache.simulate.simulation import Change, Result, Setup, Simulation
from kvcache.simulate.synthetic import chain_of
from kvcache.simulate.traces import Arrival, block_ends
from kvcache.simulate.worker import Engine, Job, ModelWorker

COSTS = Costs(token_s=1e-3, context_s=0.0, step_s=0.01, pull_s=1e-4, pull_start_s=0.0)
ROUTERS: dict[str, Callable[[], Router]] = {
    **rivals(seed=3, cache_tokens=100_000),
    **{name: lambda policy=policy: PolicyRouter(policy) for name, policy in POLICIES.items()},  # type: ignore[misc]
}


def ask(at: float, *parts: tuple[int, int], output: int = 10) -> Arrival:
    num_tokens = sum(tokens for _, tokens in parts)
    return Arrival(at, num_tokens, output, chain_of(parts), block_ends(num_tokens, 512))


def run(trace: list[Arrival], router: str | Policy = "prefix", **options: object) -> Result:
    setup = Setup(**{"num_workers": 2, "cache_tokens": 100_000, "costs": COSTS, **options})  # type: ignore[arg-type]
    make = ROUTERS[router] if isinstance(router, str) else lambda: PolicyRouter(router)
    return Simulation(trace, setup, make).run()


def ttft(result: Result) -> list[float | None]:
    return [None if outcome.ttft_s is None else round(outcome.ttft_s, 6) for outcome in result.outcomes]


def traffic(count: int = 120) -> list[Arrival]:
    """Two dozen conversations of growing prompts behind one shared beginning, more than two workers like to have."""
    turns = [(number % 24, number // 24) for number in range(count)]
    return [ask(0.4 * at, (0, 600), (1 + who, 700 + 600 * turn)) for at, (who, turn) in enumerate(turns)]


def test_a_prompt_takes_the_time_of_what_is_not_cached() -> None:
    result = run([ask(0.0, (1, 1024)), ask(5.0, (1, 1024), (2, 512))], num_workers=1)
    assert ttft(result) == [1.024, 0.512]
    assert [outcome.hit_tokens for outcome in result.outcomes] == [0, 1024]
    assert sum(result.busy_s.values()) == pytest.approx(1.536)


def test_at_least_one_token_is_computed() -> None:
    assert run([ask(0.0, (1, 1024)), ask(5.0, (1, 1024))], num_workers=1).outcomes[1].hit_tokens == 1023


def test_prefills_of_one_worker_follow_each_other() -> None:
    trace = [ask(0.0, (1, 2000)), ask(0.0, (2, 1000)), ask(0.5, (3, 500))]
    assert ttft(run(trace, num_workers=1, order="fifo")) == [2.0, 3.0, 3.0]


def test_workers_on_one_machine_are_slower_while_others_are_busy() -> None:
    crowded = msgspec.structs.replace(COSTS, crowding=0.5)
    trace = [ask(0.0, (1, 1000), output=100), ask(0.0, (2, 1000)), ask(9.0, (3, 1000))]
    result = run(trace, "round_robin", costs=crowded, order="fifo")
    assert ttft(result) == [1.0, 1.5, 1.0]  # who begins first finds the other idle, and nothing runs at the end
    assert ttft(run(trace[:2], "round_robin", order="fifo")) == [1.0, 1.0]


def test_shorter_prefills_overtake_longer_ones_as_in_our_own_workers() -> None:
    trace = [ask(0.0, (1, 4000)), ask(0.1, (2, 100))]
    first, second = ttft(run(trace, num_workers=1))
    assert first == pytest.approx(4.1)
    assert second == pytest.approx(0.25)  # after the slice that was running


def test_prompts_that_share_a_step_have_their_first_tokens_together() -> None:
    """The long one came first and has the first step of 256 tokens to itself; the next one takes some of all three."""
    trace = [ask(0.0, (1, 400)), ask(0.0, (2, 100)), ask(0.0, (3, 100))]
    quick = msgspec.structs.replace(COSTS, step_s=0.001)
    result = run(trace, num_workers=1, costs=quick, engine=Engine(256, 32))
    assert ttft(result) == pytest.approx([0.6, 0.512, 0.512], abs=0.001)
    assert sum(result.busy_s.values()) == pytest.approx(0.6, abs=0.001)


def test_each_step_reads_the_weights_beside_what_it_computes() -> None:
    """As one of decodes does: 256 tokens take 0.256 s, of which 0.128 for the weights."""
    costs = msgspec.structs.replace(COSTS, step_s=0.128)
    trace = [ask(0.0, (1, 10)), ask(9.0, (2, 256)), ask(18.0, (3, 266))]
    result = run(trace, num_workers=1, costs=costs, engine=Engine(256, 32))
    assert ttft(result) == pytest.approx([0.133, 0.256, 0.389])
    assert sum(result.busy_s.values()) == pytest.approx(0.778)


def test_a_prompt_waits_for_the_step_that_decodes_run() -> None:
    costs = msgspec.structs.replace(COSTS, step_s=0.128)
    trace = [ask(0.0, (1, 256), output=4), ask(0.3, (2, 256)), ask(2.0, (3, 256))]
    result = run(trace, num_workers=1, costs=costs, engine=Engine(256, 32))
    assert ttft(result) == pytest.approx([0.256, 0.34, 0.256])  # the second one begins at 0.384; the last finds it idle


@given(st.floats(0, 1e6), st.floats(0, 1e4), st.floats(1e-4, 1))
def test_who_has_waited_for_a_step_of_decodes_begins(at: float, later: float, step_s: float) -> None:
    """Whatever is rounded: else it waits for less than the clock can tell, for ever."""
    worker = ModelWorker("w", msgspec.structs.replace(COSTS, step_s=step_s), 10_000, engine=Engine(256, 32))
    for number, now in enumerate((at, at + later)):
        worker.enqueue(Job(number, ask(now, (number, 10)), None, now))
        until = worker.start(now)
        assert until is not None
        worker.start(until)
        assert worker.start(until) is None, "it is computing"
        for job in worker.step_over():
            worker.finish_prefill(job, until)


def test_a_ring_is_built_once_however_many_workers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each that joins would take a thousand workers an hour."""
    built: list[Mapping[str, int]] = []

    def build(weights: Mapping[str, int]) -> HashRing:
        built.append(weights)
        return HashRing(weights)

    monkeypatch.setattr("kvcache.simulate.broker.HashRing", build)
    run(traffic(3), num_workers=20)
    assert [len(weights) for weights in built] == [20]


def test_a_second_request_for_a_prefix_in_work_joins_it() -> None:
    result = run([ask(0.0, (1, 2048)), ask(0.1, (1, 2048), (2, 100))], num_workers=2, can_pull=False)
    assert [outcome.worker for outcome in result.outcomes] == [result.outcomes[0].worker] * 2
    assert result.outcomes[1].hit_tokens == 2048


def test_a_pull_takes_the_links_time_and_saves_the_prefill() -> None:
    """The holder is busy with a long prompt; the other fetches the common beginning from it."""
    trace = [ask(0.0, (1, 10_240)), ask(20.0, (1, 10_240), (2, 60_000)), ask(20.1, (1, 10_240), (3, 1000))]
    result = run(trace)
    assert result.outcomes[2].worker != result.outcomes[1].worker
    assert result.outcomes[2].pulled_tokens == 10_240
    assert ttft(result)[2] == pytest.approx(1.024 + 1.0)
    assert run(trace, can_pull=False).outcomes[2].pulled_tokens == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_served_once_by_a_worker_that_lives(router: str) -> None:
    changes = (Change(10.0, "remove", 1), Change(20.0, "add"), Change(25.0, "slow", 0, 2.0), Change(30.0, "restart"))
    result = run(traffic(), router, num_workers=3, changes=changes)
    assert None not in ttft(result)
    draw = random.Random(0)
    removed = [f"{draw.getrandbits(32):08x}" for _ in range(3)][1]
    assert len(result.busy_s) == 4
    for outcome in result.outcomes:
        assert outcome.ttft_s is not None
        if outcome.arrival.at + outcome.ttft_s > 10.0:
            assert outcome.worker != removed


@pytest.mark.parametrize("router", ROUTERS)
def test_equal_seeds_give_equal_results(router: str) -> None:
    one, two = (run(traffic(60), router, num_brokers=2, event_loss=0.3, seed=7) for _ in range(2))
    assert one.outcomes == two.outcomes
    assert one.busy_s == two.busy_s


def test_names_and_so_the_ring_follow_the_seed() -> None:
    assert set(run(traffic(10), seed=1).busy_s) != set(run(traffic(10), seed=2).busy_s)


@pytest.mark.parametrize("router", ["prefix", "consistent_hash"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), order=st.sampled_from(["fifo", "shortest"]), brokers=st.integers(1, 3))
def test_no_request_is_quicker_than_its_own_prefill(router: str, seed: int, order: str, brokers: int) -> None:
    result = run(traffic(60), router, seed=seed, order=order, num_brokers=brokers, event_loss=0.2)
    for outcome in result.outcomes:
        alone = COSTS.rates.prefill_s(outcome.arrival.num_tokens, outcome.hit_tokens)
        assert outcome.ttft_s is not None
        assert outcome.ttft_s >= alone - 1e-9
    assert sum(outcome.hit_tokens for outcome in result.outcomes) <= optimum(traffic(60)) * sum(
        arrival.num_tokens for arrival in traffic(60)
    )


def test_a_lost_worker_costs_its_own_cache_and_its_requests_go_elsewhere() -> None:
    result = run(
        [ask(0.0, (1, 4000))], changes=(Change(1.0, "remove", 0), Change(1.0, "remove", 1), Change(0.5, "add"))
    )
    assert result.outcomes[0].ttft_s is not None
    assert result.outcomes[0].ttft_s >= 5.0


@pytest.mark.parametrize("router", ROUTERS)
def test_when_nobody_is_left_requests_are_not_served(router: str) -> None:
    result = run([ask(0.0, (1, 100)), ask(5.0, (1, 100))], router, num_workers=1, changes=(Change(1.0, "remove", 0),))
    assert ttft(result) == [0.1, None]
    assert figures(result, 0.5, 1.0).unserved == 1


@pytest.mark.parametrize("replay", [True, False])
def test_a_restarted_broker_finds_the_holder_again(replay: bool) -> None:
    """By replay at once; without it by the ring, and then by what it learned from the outcome."""
    changes = (Change(10.0, "restart", replay=replay),)
    trace = [ask(0.0, (1, 5000)), ask(20.0, (1, 5000), (2, 100)), ask(30.0, (1, 5000), (3, 100))]
    result = run(trace, changes=changes)
    assert [outcome.hit_tokens // 1000 for outcome in result.outcomes] == [0, 4, 4]


def test_what_a_worker_served_is_known_even_if_all_its_events_are_lost() -> None:
    """The least estimate has no ring to lead it back: it goes to the holder only if it knows of it."""
    trace = [ask(0.0, (1, 5000)), ask(20.0, (1, 5000), (2, 100))]
    assert run(trace, "least_ttft", event_loss=1.0).outcomes[1].hit_tokens == 4608


def test_brokers_hear_of_each_others_load_from_the_workers() -> None:
    seen: list[float] = []

    def spy(request: Request, ring: HashRing, beliefs: Mapping[str, Belief]) -> Choice:
        seen.append(max(belief.queue_s(request.now) for belief in beliefs.values()))
        return Choice(ring.workers[0], "spy")

    run([ask(0.0, (1, 9000)), ask(1.0, (2, 100))], spy, num_brokers=2)
    assert seen == [0.0, pytest.approx(8.0, abs=0.3)]


def test_figures_are_those_of_the_outcomes() -> None:
    trace = [ask(0.0, (1, 1024)), ask(5.0, (1, 1024), (2, 512)), ask(700.0, (1, 1024))]
    result = run(trace, num_workers=1, changes=(Change(4.0, "restart"),))
    shown = figures(result, optimum(trace), slo_s=1.0)
    assert shown.hit == pytest.approx((1024 + 1023) / 3584)
    assert shown.hit_after == pytest.approx(1024 / 1536)  # the last came more than ten minutes after the change
    assert shown.of_optimum == pytest.approx(shown.hit / (2048 / 3584))
    assert shown.slo == pytest.approx(2 / 3)
    assert shown.imbalance == 1.0
    assert mean([shown, shown]) == shown


def test_the_bound_is_one_queue_of_all_workers_and_one_cache() -> None:
    trace = [ask(0.0, (1, 1000)), ask(0.0, (2, 4000)), ask(0.0, (3, 500)), ask(9.0, (2, 4000), (4, 1000))]
    assert shared_queue_s(trace, COSTS, 2) == pytest.approx([1.0, 4.0, 1.5, 1.416])  # of 4000 tokens 7 blocks are full
    assert shared_queue_s(trace, COSTS, 1)[2] == pytest.approx(5.5)


@pytest.mark.parametrize(
    "wrong", [{"num_workers": 0}, {"num_brokers": 0}, {"cache_tokens": -1}, {"event_loss": 1.5}, {"event_loss": -0.1}]
)
def test_setups_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadArgument):
        Setup(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"token_s": 0.0}, {"step_s": -1.0}, {"pull_s": inf}, {"context_s": float("nan")}])
def test_costs_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadArgument):
        Costs(**wrong)


def test_requests_that_come_together_do_not_all_see_the_same_idle_worker() -> None:
    together = [ask(0.0, (number, 3000)) for number in range(4)]
    workers = [outcome.worker for outcome in run(together, num_workers=4).outcomes]
    assert len(set(workers)) == 4
