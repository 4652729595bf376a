"""Keys from prompts: never the first block alone, deeper while a node is hot, and else always the same."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.routing.keys import HALF_LIFE_S, MAX_NODES, MIN_EVIDENCE, NO_KEY, PrefixKeys, sequence_key

CHAINS = st.lists(st.binary(min_size=8, max_size=8), max_size=8)


def chain(*names: str) -> list[bytes]:
    return [name.encode().ljust(8, b".") for name in names]


def depth(text: str) -> int:
    """Of the node in a key's text, `prefix node 2/5 ...`."""
    return int(text.split()[2].partition("/")[0])


def test_a_sequence_is_keyed_by_tenant_and_name() -> None:
    key = sequence_key("ann", "chat-1")
    assert key.key == b"s\x00ann\x00chat-1"
    assert key.named
    assert key != sequence_key("bob", "chat-1")


@given(st.text(), st.text(), st.binary(min_size=8, max_size=8))
def test_a_sequence_never_shares_a_key_with_a_prefix(tenant: str, seq_id: str, node: bytes) -> None:
    assert sequence_key(tenant, seq_id).key != PrefixKeys().key(tenant, [node], 4, 0.0).key


def test_a_prompt_too_short_for_a_block_has_no_key() -> None:
    keys = PrefixKeys()
    assert keys.key("t", [], 4, 0.0) == keys.peek("t", [], 4, 0.0) == NO_KEY


@given(CHAINS.filter(lambda nodes: len(nodes) >= 1), st.integers(0, 9))
def test_a_cold_prompt_is_keyed_by_its_second_node_or_the_only_one(nodes: list[bytes], num_workers: int) -> None:
    key = PrefixKeys().key("t", nodes, num_workers, 5.0)
    assert key.key == b"p\x00t\x00" + nodes[min(2, len(nodes)) - 1]
    assert not key.named


@given(st.lists(st.tuples(CHAINS, st.floats(0, 1000)), max_size=60), st.integers(1, 8))
def test_no_history_makes_the_first_node_the_key_where_there_are_two(
    arrivals: list[tuple[list[bytes], float]], num_workers: int
) -> None:
    keys, now = PrefixKeys(), 0.0
    for nodes, pause in arrivals:
        now += pause
        key = keys.key("t", nodes, num_workers, now)
        if len(nodes) > 1:
            assert depth(key.text) >= 2
            assert key.key == b"p\x00t\x00" + nodes[depth(key.text) - 1]


def test_a_shared_system_prompt_is_cut_below_it() -> None:
    """All requests share three nodes; each worker gets its part once that is known."""
    keys = PrefixKeys()
    last = [keys.key("t", chain("a", "b", "c", f"u{index}", f"v{index}"), 4, index * 0.01) for index in range(200)]
    assert depth(last[0].text) == 2
    assert [depth(key.text) for key in last[100:]] == [4] * 100
    assert len({key.key for key in last[100:]}) == 100


def test_prompts_that_are_not_hot_meet_on_what_they_share() -> None:
    keys = PrefixKeys()
    for index in range(400):  # a hundred families of four, none of them with more than a hundredth of the traffic
        family = index % 100
        key = keys.key("t", chain("all", f"family{family}", f"member{index}"), 4, index * 0.01)
        assert key.key == b"p\x00t\x00" + chain(f"family{family}")[0]


def test_few_arrivals_say_nothing() -> None:
    keys = PrefixKeys()
    texts = [keys.key("t", chain("a", "b", f"c{index}"), 64, 0.0).text for index in range(17)]
    assert [depth(text) for text in texts] == [2] * int(MIN_EVIDENCE) + [3]


def test_what_was_hot_cools_down() -> None:
    keys = PrefixKeys()
    for index in range(100):
        keys.key("t", chain("a", "b", f"c{index}"), 4, 0.0)
    hot = chain("a", "b", "new")
    assert depth(keys.peek("t", hot, 4, 0.0).text) == 3
    assert depth(keys.peek("t", hot, 4, 2 * HALF_LIFE_S).text) == 3
    assert depth(keys.peek("t", hot, 4, 3 * HALF_LIFE_S).text) == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 300)), min_size=1, max_size=80))
def test_a_peek_is_the_key_of_the_last_arrival_and_changes_nothing(arrivals: list[tuple[int, int, float]]) -> None:
    keys, now = PrefixKeys(), 0.0
    for second, third, pause in arrivals:
        now += pause
        nodes = chain("a", f"b{second}", f"c{third}")
        key = keys.key("t", nodes, 4, now)
        assert keys.peek("t", nodes, 4, now) == keys.peek("t", nodes, 4, now) == key


def test_counting_goes_on_for_years() -> None:
    """Worth doubles each minute; without scaling back it would outgrow a float within a day."""
    keys, key = PrefixKeys(), NO_KEY
    for day in range(800):
        now = day * 86_400.0
        for index in range(20):
            key = keys.key("t", chain("a", "b", f"c{index}"), 4, now)
        assert depth(key.text) == 3, day


def test_memory_is_bounded() -> None:
    keys = PrefixKeys()
    for index in range(MAX_NODES // 8 + 500):
        keys.key("t", [struct.pack("<II", index, node) for node in range(8)], 4, 0.0)
    for _ in range(20):
        keys.key("t", chain("a", "b", "c"), 4, 0.0)
    assert depth(keys.peek("t", chain("a", "b", "c"), 1_000_000, 0.0).text) == 3
    key = NO_KEY
    forgotten = [struct.pack("<II", 0, node) for node in range(8)]
    for _ in range(16):
        key = keys.key("t", forgotten, 1_000_000, 0.0)
    assert depth(key.text) == 2  # 17 arrivals in all, of which the first is no longer known


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_worker_or_none_is_no_special_case(num_workers: int) -> None:
    keys, key = PrefixKeys(), NO_KEY
    for index in range(100):
        key = keys.key("t", chain("a", "b", f"c{index}"), num_workers, 0.0)
    assert depth(key.text) == 3
