"""The prefix policy: the cheapest worker for all, and among equals what is lasting."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kvcache.ring import HashRing
from kvcache.routing.keys import NO_KEY, RoutingKey
from kvcache.routing.links import PULL_SHARE
from kvcache.routing.prefix import LEAST_BUDGET_S, NEAR, NEAR_BLIND, NEAR_S, PULL_START_S, estimate_one, prefix
from kvcache.routing.views import Belief, Choice, IndexState, Pull, Rates, Refusal, Request

RATES = Rates(token_s=1e-3, is_learned=True)
LINKED = Rates(token_s=1e-3, pull_s=1e-4, is_learned=True)
KEY = RoutingKey(b"key", "node")
RING = HashRing(dict.fromkeys("abcd", 100))
STATES = st.sampled_from(list(IndexState))
SECONDS = st.floats(0, 100)
BELIEFS = st.builds(
    lambda up, busy, index, pull_s, decodes: Belief(
        1,
        100,
        0.0,
        up,
        busy_until=busy,
        index=index,
        decodes=decodes,
        rates=Rates(token_s=1e-3, context_s=1e-8, decode_s=1e-5, pull_s=pull_s, is_learned=True),
    ),
    st.booleans(),
    SECONDS,
    STATES,
    st.sampled_from([inf, 1e-2, 1e-4]),
    st.integers(0, 9),
)
CLUSTERS = st.fixed_dictionaries(dict.fromkeys("abcd", BELIEFS))
REQUESTS = st.builds(
    lambda key, num_tokens, hits, held, price, due_tokens: Request(
        key,
        now=1.0,
        num_tokens=num_tokens,
        hits={w: min(h, num_tokens) for w, h in hits.items()},
        held={w: min(h, num_tokens) for w, h in hits.items() if w in held},
        delay_price=price,
        due_tokens=due_tokens,
    ),
    st.sampled_from([KEY, NO_KEY]),
    st.integers(0, 100_000),
    st.dictionaries(st.sampled_from("abcdx"), st.integers(0, 100_000)),
    st.sets(st.sampled_from("abcdx")),
    st.floats(0, 20),
    st.integers(0, 100_000),
)


def believe(busy_s: float = 0.0, rates: Rates = RATES, index: IndexState = IndexState.EXACT, up: bool = True) -> Belief:
    return Belief(0, 100, 0.0, up, busy_until=busy_s, index=index, rates=rates)


def choose(request: Request, **beliefs: Belief) -> Choice:
    choice = prefix(request, RING, dict.fromkeys("abcd", believe(50.0)) | beliefs)
    assert isinstance(choice, Choice)
    return choice


def idle(**beliefs: Belief) -> dict[str, Belief]:
    return dict.fromkeys("abcd", believe()) | beliefs


@given(REQUESTS, CLUSTERS)
def test_only_an_available_worker_serves_and_only_a_live_one_is_pulled_from(
    request: Request, beliefs: dict[str, Belief]
) -> None:
    choice = prefix(request, RING, beliefs)
    assert choice == prefix(request, RING, beliefs)
    if not any(belief.is_available for belief in beliefs.values()):
        assert isinstance(choice, Refusal)
        return
    assert isinstance(choice, Choice)
    assert beliefs[choice.worker_id].is_available
    if choice.pull is not None:
        assert choice.pull.source in beliefs
        assert choice.pull.source != choice.worker_id
        assert choice.pull.num_tokens == request.held[choice.pull.source]
        assert choice.pull.num_tokens > request.hits.get(choice.worker_id, 0)


@given(REQUESTS, CLUSTERS)
def test_no_choice_costs_more_than_its_bound_above_the_cheapest(request: Request, beliefs: dict[str, Belief]) -> None:
    choice = prefix(request, RING, beliefs)
    if isinstance(choice, Refusal):
        return
    totals = {estimate.worker_id: estimate.total_s for estimate in choice.estimates}
    least = min(totals.values())
    exact = all(beliefs[worker].index is IndexState.EXACT for worker in totals)
    assert totals[choice.worker_id] <= least + max(NEAR_S, (NEAR if exact else NEAR_BLIND) * least)


@given(REQUESTS, CLUSTERS)
def test_a_pull_costs_at_most_its_share_of_what_it_saves(request: Request, beliefs: dict[str, Belief]) -> None:
    choice = prefix(request, RING, beliefs)
    if isinstance(choice, Choice) and choice.pull is not None:
        rates, decodes = beliefs[choice.worker_id].rates, beliefs[choice.worker_id].decodes
        own, pulled = request.hits.get(choice.worker_id, 0), min(choice.pull.num_tokens, request.num_tokens)
        saved = rates.prefill_s(request.num_tokens, own, decodes) - rates.prefill_s(request.num_tokens, pulled, decodes)
        assert PULL_START_S + rates.pull_s * (pulled - own) <= PULL_SHARE * saved + 1e-9
        assert choice.pull.budget_s == pytest.approx(max(LEAST_BUDGET_S, saved))


@given(st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=30, unique=True), st.sampled_from("abcd"))
def test_when_a_worker_leaves_only_its_prompts_move(keys: list[bytes], gone: str) -> None:
    """Cold prompts on an idle cluster; read backwards it says the same of a worker that joins."""
    beliefs = idle()
    rest = HashRing({worker: 100 for worker in "abcd" if worker != gone})
    for key in keys:
        request = Request(RoutingKey(key, "it"), num_tokens=1000)
        before = prefix(request, RING, beliefs)
        after = prefix(request, rest, {worker: beliefs[worker] for worker in rest.workers})
        assert isinstance(before, Choice)
        assert isinstance(after, Choice)
        if before.worker_id != gone:
            assert after.worker_id == before.worker_id


def test_the_worker_that_has_the_prefix_serves_while_it_is_not_too_busy() -> None:
    request = Request(KEY, num_tokens=10_000, hits={"c": 8000})
    assert choose(request, **idle(c=believe(4.0))).worker_id == "c"
    assert choose(request, **idle(c=believe(4.0))).reason == "prefix: has 8000 of 10000 tokens"
    assert choose(request, **idle(c=believe(12.0))).worker_id != "c"


def test_work_that_is_saved_counts_for_more_when_others_wait_for_it() -> None:
    """c would answer later, but has less to do: worth it only where somebody else wants the time."""
    calm = Request(KEY, num_tokens=10_000, hits={"c": 8000})
    busy = Request(KEY, num_tokens=10_000, hits={"c": 8000}, delay_price=2.0)
    beliefs = idle(c=believe(12.0))
    assert choose(calm, **beliefs).worker_id != "c"
    assert choose(busy, **beliefs).worker_id == "c"


def test_a_copy_that_is_due_is_made_on_a_worker_that_is_idle() -> None:
    """Elsewhere it is a burden on those who come next; where it is due they have it too."""
    request = Request(KEY, num_tokens=10_000, hits={"c": 8000}, delay_price=2.0)
    due = replace(request, due_tokens=8000)
    assert choose(request, **idle(c=believe(12.0))).worker_id == "c"
    assert choose(due, **idle(c=believe(12.0))).worker_id != "c"
    assert choose(due, **idle(c=believe(0.5))).worker_id == "c"  # which is sooner
    assert choose(due, **dict.fromkeys("abd", believe(3.0)), c=believe(12.0)).worker_id == "c"  # others wait there


@pytest.mark.parametrize(
    ("due_tokens", "hit_tokens", "own_s"),
    [(0, 0, 10.0), (8000, 0, 2.0), (8000, 8000, 2.0), (8000, 9000, 1.0), (20_000, 0, 0.0)],
)
def test_of_a_prefill_only_what_no_due_copy_holds_delays_those_who_come_next(
    due_tokens: int, hit_tokens: int, own_s: float
) -> None:
    request = Request(KEY, num_tokens=10_000, hits={"a": hit_tokens}, delay_price=0.5, due_tokens=due_tokens)
    estimate = estimate_one(request, "a", idle(a=believe(3.0)))
    prefill_s = (10_000 - hit_tokens) * RATES.token_s
    assert estimate.delay_s == pytest.approx(0.5 * (prefill_s * 3.0 + own_s**2 / 2))


def test_what_is_pulled_of_a_due_copy_leaves_the_rest_of_it_due() -> None:
    request = Request(KEY, num_tokens=10_000, hits={"c": 6000}, held={"c": 6000}, delay_price=0.5, due_tokens=8000)
    estimate = estimate_one(request, "a", idle(a=believe(0.0, LINKED), c=believe()))
    assert estimate.pull is not None
    assert estimate.prefill_s == pytest.approx(4.0)
    assert estimate.delay_s == pytest.approx(0.5 * 2.0**2 / 2)


def test_a_busy_holder_is_pulled_from_where_the_link_is_quick() -> None:
    request = Request(KEY, num_tokens=10_000, hits={"c": 8000}, held={"c": 8000})
    quick = {worker: believe(rates=LINKED) for worker in "abd"} | {"c": believe(30.0, LINKED)}
    choice = choose(request, **quick)
    assert choice.worker_id != "c"
    assert choice.pull == Pull("c", 8000, budget_s=8.0)
    assert choice.reason == "prefix: pulls 8000 tokens from c"
    slow = Rates(token_s=1e-3, pull_s=PULL_SHARE * 1e-3 * 1.01, is_learned=True)
    assert choose(request, **{w: believe(b.busy_until, slow) for w, b in quick.items()}).pull is None


def test_what_is_still_being_computed_cannot_be_pulled() -> None:
    request = Request(KEY, num_tokens=10_000, hits={"c": 8000}, held={"c": 3000})
    choice = choose(request, c=believe(30.0), a=believe(0.0, LINKED))
    assert (choice.worker_id, choice.pull) == ("a", Pull("c", 3000, budget_s=3.0))


def test_a_pull_runs_while_others_are_served() -> None:
    request = Request(KEY, num_tokens=10_000, hits={"c": 8000}, held={"c": 8000})
    choice = choose(request, c=believe(30.0), a=believe(5.0, LINKED))
    chosen = next(estimate for estimate in choice.estimates if estimate.worker_id == "a")
    assert chosen.first_token_s == pytest.approx(5.0 + 2.0)


def test_cold_prompts_go_where_the_ring_says_as_long_as_nobody_waits() -> None:
    order = list(RING.preference(KEY.key))
    request = Request(KEY, num_tokens=1000)
    assert choose(request, **idle()).worker_id == order[0]
    assert choose(request, **idle(**{order[0]: believe(3.0)})).worker_id == order[1]


def test_while_an_index_is_blind_the_ring_may_cost_more() -> None:
    first, *_ = RING.preference(KEY.key)
    request = Request(KEY, num_tokens=1000)
    assert choose(request, **idle(**{first: believe(0.4)})).worker_id != first
    assert choose(request, **idle(**{first: believe(0.4, index=IndexState.BLIND)})).worker_id == first


def test_a_prompt_that_nobody_can_begin_in_time_is_refused_with_when_to_ask_again() -> None:
    beliefs = dict.fromkeys("abcd", believe(10.0))
    late = prefix(Request(KEY, num_tokens=1000, deadline_s=5.0), RING, beliefs)
    assert isinstance(late, Refusal)
    assert late.retry_after_s == pytest.approx(6.0)
    assert isinstance(prefix(Request(KEY, num_tokens=1000, deadline_s=11.5), RING, beliefs), Choice)


def test_a_guess_refuses_nobody() -> None:
    guessed = dict.fromkeys("abcd", believe(10.0, Rates(token_s=1e-3)))
    assert isinstance(prefix(Request(KEY, num_tokens=1000, deadline_s=5.0), RING, guessed), Choice)


def test_without_a_key_the_least_to_wait_for_serves() -> None:
    choice = choose(Request(NO_KEY, num_tokens=10), **idle(b=believe(-1.0)))
    assert choice.reason == "prefix: least to wait for"


def test_estimates_add_up() -> None:
    request = Request(KEY, num_tokens=1000, delay_price=2.0)
    for estimate in choose(request, **idle(b=believe(3.0))).estimates:
        assert estimate.total_s == estimate.first_token_s + estimate.delay_s
        assert estimate.delay_s == pytest.approx(2.0 * 1.0 * (estimate.queue_s + 0.5))
