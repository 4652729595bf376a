"""The ring: the same everywhere, even, and moving no more keys than it must."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.ring import HashRing, key_hash

FOUR = {f"worker-{index}": 100 for index in range(4)}
KEYS = [b"s\x00default\x00seq-%d" % index for index in range(5000)]
WEIGHTS = st.dictionaries(st.text(max_size=6), st.integers(1, 300), min_size=1, max_size=5)

# Published: whatever speaks for this ring in another process, version or language must agree with these.
HASHES = {
    b"": 0xCD93A78621DF7100,
    b"a": 0xD36B00D7C88EA191,
    b"s\x00default\x00chat-1": 0xCB5B0E495975EB98,
    bytes(32): 0xBA15EEA1255B91F5,
}
PREFERENCES = {
    b"": "0123",
    b"a": "3021",
    b"sequence": "3012",
    b"s\x00default\x00chat-1": "3021",
    bytes(32): "2031",
}


@pytest.mark.parametrize(("key", "expected"), HASHES.items())
def test_a_key_lies_where_the_published_vector_says(key: bytes, expected: int) -> None:
    assert key_hash(key) == expected


@pytest.mark.parametrize(("key", "expected"), PREFERENCES.items())
def test_workers_take_over_in_the_published_order(key: bytes, expected: str) -> None:
    assert list(HashRing(FOUR).preference(key)) == [f"worker-{digit}" for digit in expected]


def test_weighted_workers_take_over_in_the_published_order() -> None:
    ring = HashRing({"a": 100, "b": 200, "c": 50})
    assert ["".join(ring.preference(b"key-%d" % index)) for index in range(4)] == ["bca", "bac", "bac", "acb"]


def test_the_epoch_names_the_live_set_however_it_was_built() -> None:
    assert HashRing(FOUR).epoch == HashRing(dict(reversed(FOUR.items()))).epoch == "175bc9e3cd2d"
    assert HashRing({**FOUR, "worker-0": 99}).epoch != HashRing(FOUR).epoch


@given(WEIGHTS, st.binary(max_size=20))
def test_the_preference_lists_every_worker_once_and_the_owner_first(weights: dict[str, int], key: bytes) -> None:
    ring = HashRing(weights)
    order = list(ring.preference(key))
    assert sorted(order) == sorted(weights)
    assert order[0] == ring.owner(key)
    assert order == list(HashRing(dict(reversed(weights.items()))).preference(key))


@given(WEIGHTS, st.lists(st.binary(max_size=8), max_size=20), st.data())
def test_a_worker_that_leaves_moves_its_own_keys_and_no_others(
    weights: dict[str, int], keys: list[bytes], data: st.DataObject
) -> None:
    """And each to the next in its order; read the other way round, one that joins takes keys only to itself."""
    gone = data.draw(st.sampled_from(sorted(weights)))
    before = HashRing(weights)
    after = HashRing({worker: weight for worker, weight in weights.items() if worker != gone})
    for key in keys:
        assert list(after.preference(key)) == [worker for worker in before.preference(key) if worker != gone]


@given(
    st.lists(st.dictionaries(st.text("abcdefgh", max_size=2), st.integers(1, 5), max_size=6), min_size=2, max_size=4),
    st.lists(st.binary(max_size=8), max_size=20),
)
def test_a_ring_made_from_another_is_the_ring_that_is_made_from_nothing(
    steps: list[dict[str, int]], keys: list[bytes]
) -> None:
    """Whoever joined, left or has another weight meanwhile, and however often that was."""
    ring = HashRing({})
    for weights in steps:
        ring, anew = HashRing(weights, before=ring), HashRing(weights)
        assert (ring.workers, ring.weights, ring.epoch) == (anew.workers, anew.weights, anew.epoch)
        assert [ring.share(worker) for worker in weights] == [anew.share(worker) for worker in weights]
        assert [list(ring.preference(key)) for key in keys] == [list(anew.preference(key)) for key in keys]


def test_a_ring_is_what_it_was_after_another_was_made_from_it() -> None:
    ring = HashRing(FOUR)
    owners = [ring.owner(key) for key in KEYS]
    HashRing({**FOUR, "worker-2": 30, "another": 100}, before=ring)
    assert [ring.owner(key) for key in KEYS] == owners


def test_five_thousand_sequences_spread_evenly_over_four_workers() -> None:
    ring = HashRing(FOUR)
    loads = Counter(ring.owner(key) for key in KEYS)
    assert max(loads.values()) / (len(KEYS) / 4) <= 1.05


@pytest.mark.parametrize("num_workers", [2, 4, 10, 32])
def test_shares_stay_close_to_even(num_workers: int) -> None:
    ring = HashRing({f"w{index}": 100 for index in range(num_workers)})
    assert max(ring.share(worker) for worker in ring.workers) <= 1.05 / num_workers


def test_shares_follow_the_weights_and_add_up() -> None:
    ring = HashRing({"half": 50, "one": 100, "two": 200})
    assert sum(map(ring.share, ring.workers)) == pytest.approx(1.0)
    assert ring.share("two") == pytest.approx(200 / 350, rel=0.05)
    assert ring.share("half") == pytest.approx(50 / 350, rel=0.05)
    assert ring.share("nobody") == 0.0


def test_a_share_is_the_part_of_keys_that_a_worker_owns() -> None:
    ring = HashRing({"a": 30, "b": 100})
    owned = sum(ring.owner(key) == "a" for key in KEYS) / len(KEYS)
    assert owned == pytest.approx(ring.share("a"), abs=0.02)


@pytest.mark.parametrize("direction", ["joins", "leaves"])
def test_one_worker_more_or_less_of_ten_moves_about_an_eleventh_of_the_keys(direction: str) -> None:
    ten = HashRing({f"w{index}": 100 for index in range(10)})
    eleven = HashRing({f"w{index}": 100 for index in range(11)})
    before, after = (ten, eleven) if direction == "joins" else (eleven, ten)
    moved = sum(before.owner(key) != after.owner(key) for key in KEYS)
    assert moved / len(KEYS) <= 1.2 / 11


def test_an_empty_ring_owns_nothing() -> None:
    ring = HashRing({})
    assert len(ring) == 0
    assert list(ring.preference(b"x")) == []
    with pytest.raises(LookupError):
        ring.owner(b"x")


def test_one_worker_owns_everything() -> None:
    ring = HashRing({"only": 1})
    assert {ring.owner(key) for key in KEYS[:100]} == {"only"}
    assert ring.share("only") == pytest.approx(1.0)


@pytest.mark.parametrize("weight", [0, -5])
def test_a_weight_below_one_is_refused(weight: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        HashRing({"a": weight})
