"""Policies: never a worker that is not available, and each what its name promises."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadArgument
from kvcache.ring import HashRing
from kvcache.routing.keys import NO_KEY, RoutingKey
from kvcache.routing.policies import (
    DEFAULT_POLICY,
    LOAD_BOUND,
    POLICIES,
    Policy,
    bounded_load,
    consistent_hash,
    least_loaded,
    load_limit,
    policy_by_name,
    round_robin,
)
from kvcache.routing.views import Belief, Choice, Refusal, Request

LOADS = st.builds(Belief, st.integers(0, 50), st.integers(1, 1000), st.floats(0, 1000), st.booleans())
CLUSTERS = st.dictionaries(st.sampled_from("abcdef"), LOADS, max_size=5)
KEYS = st.one_of(st.just(NO_KEY), st.binary(min_size=1, max_size=8).map(lambda key: RoutingKey(key, "it")))
EVEN = {name: Belief(0, 100, 0.0, True) for name in "abcd"}


def ring_over(loads: dict[str, Belief]) -> HashRing:
    return HashRing({name: min(load.weight, 50) for name, load in loads.items()})


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(key=KEYS, loads=CLUSTERS)
def test_an_available_worker_is_chosen_if_there_is_one(
    policy: Policy, key: RoutingKey, loads: dict[str, Belief]
) -> None:
    choice = policy(Request(key), ring_over(loads), loads)
    available = {name for name, load in loads.items() if load.is_available}
    assert isinstance(choice, Choice) == bool(available)
    if isinstance(choice, Choice):
        assert choice.worker_id in available
        assert choice == policy(Request(key), ring_over(loads), loads)


@given(st.binary(min_size=1), CLUSTERS)
def test_the_owner_serves_its_keys_and_the_next_in_order_while_it_cannot(key: bytes, loads: dict[str, Belief]) -> None:
    choice = consistent_hash(Request(RoutingKey(key, "it")), ring_over(loads), loads)
    order = [name for name in ring_over(loads).preference(key) if loads[name].is_available]
    assert (choice.worker_id if isinstance(choice, Choice) else None) == next(iter(order), None)


def test_a_choice_says_why() -> None:
    key = RoutingKey(b"a", "sequence 'x'")
    ring = HashRing({f"worker-{index}": 100 for index in range(4)})  # b"a" prefers 3, 0, 2, 1
    loads = {name: Belief(0, 100, 0.0, name not in {"worker-3", "worker-0"}) for name in ring.workers}
    free = dict.fromkeys(ring.workers, Belief(0, 100, 0.0, True))

    def reason(policy: Policy, loads: dict[str, Belief]) -> str:
        choice = policy(Request(key), ring, loads)
        assert isinstance(choice, Choice)
        return choice.reason

    assert reason(consistent_hash, free) == "consistent_hash: owner of sequence 'x'"
    assert reason(consistent_hash, loads) == "consistent_hash: successor 2 of sequence 'x'"
    assert reason(bounded_load, loads) == "bounded_load: successor 2 of sequence 'x'"
    assert reason(least_loaded, free) == "least_loaded: 0 in flight"
    assert reason(round_robin, free) == "round_robin: its turn"


@given(st.binary(min_size=1), CLUSTERS)
def test_bounded_load_takes_the_first_in_order_that_is_within_its_bound(key: bytes, loads: dict[str, Belief]) -> None:
    """A worker may have 1.25 of its share, by weight, of all requests with this one."""
    choice = bounded_load(Request(RoutingKey(key, "it")), ring_over(loads), loads)
    if isinstance(choice, Refusal):
        return
    available = {name: load for name, load in loads.items() if load.is_available}
    total = 1 + sum(load.inflight for load in available.values())
    weights = sum(load.weight for load in available.values())
    limits = {name: LOAD_BOUND * total * load.weight / weights for name, load in available.items()}
    within = [
        name for name in ring_over(loads).preference(key) if name in limits and loads[name].inflight < limits[name]
    ]
    assert choice.worker_id == within[0]
    assert load_limit(available, choice.worker_id) == pytest.approx(limits[choice.worker_id])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 200))
def test_one_hot_key_never_loads_a_worker_beyond_the_bound(weights: list[int], num_requests: int) -> None:
    names = "abcd"[: len(weights)]
    ring = HashRing({name: 100 * weight for name, weight in zip(names, weights, strict=True)})
    inflight = Counter[str]()
    for _ in range(num_requests):
        loads = {name: Belief(inflight[name], ring.weights[name], 0.0, True) for name in names}
        choice = bounded_load(Request(RoutingKey(b"hot", "it")), ring, loads)
        assert isinstance(choice, Choice)
        inflight[choice.worker_id] += 1
    for name, weight in zip(names, weights, strict=True):
        assert inflight[name] < LOAD_BOUND * num_requests * weight / sum(weights) + 1


@given(CLUSTERS)
def test_least_loaded_leaves_no_worker_with_fewer_for_its_weight(loads: dict[str, Belief]) -> None:
    choice = least_loaded(Request(NO_KEY), ring_over(loads), loads)
    if isinstance(choice, Choice):
        least = min(load.per_weight for load in loads.values() if load.is_available)
        assert loads[choice.worker_id].per_weight == least


def test_among_equals_the_one_whose_turn_it_is_serves() -> None:
    loads = {"a": Belief(1, 100, 8.0, True), "b": Belief(1, 100, 7.0, True), "c": Belief(2, 100, 0.0, True)}
    choice = least_loaded(Request(NO_KEY), ring_over(loads), loads)
    assert isinstance(choice, Choice)
    assert choice.worker_id == "b"


@pytest.mark.parametrize("policy", [consistent_hash, bounded_load])
def test_a_request_without_a_key_goes_where_there_is_room(policy: Policy) -> None:
    loads = EVEN | {"c": Belief(0, 400, 0.0, True), "a": Belief(3, 100, 0.0, True)}
    choice = policy(Request(NO_KEY), ring_over(loads), loads)
    assert isinstance(choice, Choice)
    assert choice.reason.startswith("least_loaded")


def test_policies_are_found_by_name_and_others_are_refused_with_those_there_are() -> None:
    assert policy_by_name(DEFAULT_POLICY) is POLICIES["prefix"]
    with pytest.raises(
        BadArgument, match="use one of consistent_hash, bounded_load, prefix, least_loaded, round_robin"
    ):
        policy_by_name("random")
