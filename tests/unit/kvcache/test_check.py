"""A trace made small for real workers: what it shares it shares still, and it comes at the pace they can take."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from rich.console import Console

from bus.errors import BadArgument
from kvcache.routing.prefix import prefix
from kvcache.simulate.check import ENGINE, LOAD, Figures, Prompt, Report, divided, paced, show
from kvcache.simulate.costs import Costs
from kvcache.simulate.routers import PolicyRouter
from kvcache.simulate.simulation import Setup, Simulation
from kvcache.simulate.synthetic import chain_of
from kvcache.simulate.traces import Arrival, block_ends

COSTS = Costs(token_s=1e-3, context_s=0.0)


def ask(at: float, *parts: tuple[int, int]) -> Arrival:
    num_tokens = sum(tokens for _, tokens in parts)
    return Arrival(at, num_tokens, 100, chain_of(parts), block_ends(num_tokens, 512))


def shared(one: Prompt, other: Prompt) -> int:
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_what_prompts_share_they_share_when_their_lengths_are_divided() -> None:
    one, two = divided(ask(0.0, (1, 4096), (2, 1000)), 16), divided(ask(1.0, (1, 4096), (3, 3000)), 16)
    assert (one.arrival.num_tokens, len(one.token_ids)) == (round(5096 / 16), round(5096 / 16))
    assert shared(one, two) == 4096 // 16
    assert one.arrival.output_tokens == 6
    common = [node for node, other in zip(one.arrival.chain, two.arrival.chain, strict=False) if node == other]
    assert one.arrival.ends[len(common) - 1] == 4096 // 16
    assert one.arrival.ends[-1] == one.arrival.num_tokens
    assert one == divided(ask(0.0, (1, 4096), (2, 1000)), 16)


def test_what_a_worker_finds_again_is_modelled_to_the_token() -> None:
    one, two = divided(ask(0.0, (1, 5120), (2, 4000)), 100), divided(ask(1.0, (1, 5120), (3, 6000)), 100)
    assert shared(one, two) == 51
    alike = [node for node, other in zip(one.arrival.fine, two.arrival.fine, strict=False) if node == other]
    assert alike == list(one.arrival.fine[:51])
    assert (len(one.token_ids), len(one.arrival.fine)) == (91, 91)
    named = dict(zip(one.arrival.ends, one.arrival.chain, strict=True))
    assert {end: one.arrival.fine[end - 1] for end in named} == named

    assert hits(one, two) == [0, 51]


def test_the_beginning_of_a_block_is_found_on_arrival_only_because_then_it_is_copied() -> None:
    """Of requests that come together none finds it, as real workers admit them all before one is computed."""
    one, two, three = (divided(ask(at, (1, 1536), (2 + who, 4000)), 96) for who, at in enumerate((0.0, 0.001, 5.0)))
    assert shared(one, three) == 16
    assert hits(one, two, three) == [0, 0, 16]


def test_whole_blocks_are_found_by_who_waits_for_them() -> None:
    """The first takes two steps, and the second one comes during the first of them."""
    one, two = (divided(ask(0.001 * who, (1, 6144), (2 + who, own)), 96) for who, own in enumerate((40_000, 4000)))
    assert shared(one, two) == 64
    assert ENGINE.step_tokens < len(one.token_ids) < 2 * ENGINE.step_tokens
    assert hits(one, two) == [0, 64]


def test_only_prompts_that_fill_a_block_are_found_again() -> None:
    one, two = divided(ask(0.0, (1, 2800)), 100), divided(ask(1.0, (1, 2800), (2, 200)), 100)
    assert (len(one.token_ids), hits(one, two)) == (28, [0, 0])


def hits(*prompts: Prompt) -> list[int]:
    trace = [prompt.arrival for prompt in prompts]
    setup = Setup(num_workers=1, costs=COSTS, engine=ENGINE)
    return [outcome.hit_tokens for outcome in Simulation(trace, setup, lambda: PolicyRouter(prefix)).run().outcomes]


def test_very_short_prompts_have_a_token_left() -> None:
    assert divided(ask(0.0, (1, 3)), 1000).arrival.num_tokens == 1
    assert divided(replace(ask(0.0, (1, 3)), chain=(), ends=()), 1000).arrival.num_tokens == 1


def test_a_prompt_that_the_model_could_not_take_is_refused() -> None:
    with pytest.raises(BadArgument, match="--divide by more than 2"):
        divided(ask(0.0, (1, 100_000)), 2)


def test_as_many_are_taken_as_keep_the_workers_at_the_load_for_that_time() -> None:
    prompts = [divided(ask(3.0 + 0.01 * number, (number, 16_000)), 16) for number in range(500)]
    taken = paced(prompts, COSTS, 60.0, 2)
    assert taken[0].arrival.at == 0.0
    span_s = taken[-1].arrival.at
    assert span_s == pytest.approx(60.0, rel=0.03)
    assert len(taken) * 1.0 / span_s / 2 == pytest.approx(LOAD)
    gaps = {round(b.arrival.at - a.arrival.at, 6) for a, b in itertools.pairwise(taken)}
    assert len(gaps) == 1, "the rhythm of the trace is kept"


@pytest.mark.parametrize("ats", [[], [0.0], [0.0, 0.0]])
def test_a_trace_of_one_moment_has_no_pace(ats: list[float]) -> None:
    with pytest.raises(BadArgument, match="too short"):
        paced([divided(ask(at, (1, 512)), 16) for at in ats], COSTS, 60.0, 2)


def test_the_error_is_that_of_the_prediction() -> None:
    predicted = Figures(hit=0.3, pulled=0.1, mean_s=1.2, p50_s=1.0, p90_s=2.0)
    measured = Figures(hit=0.4, pulled=0.0, mean_s=1.0, p50_s=1.0, p90_s=4.0)
    report = Report(
        num_requests=9,
        num_tokens=12_345,
        num_workers=2,
        divide=32,
        span_s=60.0,
        busy=0.6,
        costs=COSTS,
        predicted=predicted,
        measured=measured,
    )
    console = Console(record=True, width=120)
    with console.capture() as captured:
        show(report, console)
    cells = [line.replace("│", " ").split() for line in captured.get().splitlines()]
    rows = {row[0].rstrip(","): row for row in cells if len(row) > 3}
    assert rows["hit"][-1] == "-25%"
    assert rows["pulled"][-1] == "-"
    assert rows["mean"][-1] == "+20%"
    assert rows["p90"][-1] == "-50%"


def test_names_must_be_as_many_as_workers() -> None:
    assert Setup(num_workers=2, names=("a", "b")).names == ("a", "b")
    with pytest.raises(BadArgument, match="as many names"):
        Setup(num_workers=2, names=("a", "a"))
