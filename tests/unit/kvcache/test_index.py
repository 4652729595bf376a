"""Which workers hold which nodes: leading runs, holders that come and go, shares, tenants."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcache.routing.index import Holder, NodeIndex


def node(number: int) -> bytes:
    return number.to_bytes(8, "little")


def nodes(numbers: Sequence[int]) -> list[bytes]:
    return [node(number) for number in numbers]


CHAIN = nodes(range(6))


def test_a_lookup_counts_the_leading_nodes_that_each_worker_holds() -> None:
    index = NodeIndex()
    index.stored("all", CHAIN)
    index.stored("three", CHAIN[:3])
    index.stored("hole", [CHAIN[0], CHAIN[2]])
    index.stored("tail", CHAIN[1:])
    assert index.lookup(CHAIN) == {"all": 6, "three": 3, "hole": 1}
    assert index.lookup(CHAIN[:2]) == {"all": 2, "three": 2, "hole": 1}
    assert index.lookup([node(77), *CHAIN]) == {}
    assert index.lookup([]) == {}


def test_what_is_removed_ends_the_run_and_what_is_cleared_is_gone_at_once() -> None:
    index = NodeIndex()
    for name in ("a", "b"):
        index.stored(name, CHAIN)
    index.removed("a", [CHAIN[4]])
    index.removed("a", [node(99)])
    index.removed("nobody", CHAIN)
    assert index.lookup(CHAIN) == {"a": 4, "b": 6}
    index.clear("b")
    index.clear("nobody")
    assert index.lookup(CHAIN) == {"a": 4}
    index.check()


def test_tenants_do_not_see_each_others_nodes_and_cannot_compute_how() -> None:
    index = NodeIndex(secret=b"s" * 16)
    index.stored("w", CHAIN, tenant="alice")
    assert index.lookup(CHAIN, tenant="alice") == {"w": 6}
    assert index.lookup(CHAIN, tenant="bob") == {}
    guess = NodeIndex(secret=b"t" * 16)  # another broker's secret turns nodes of one tenant into those of another
    told = [
        (a ^ b ^ int.from_bytes(plain, "little")).to_bytes(8, "little")
        for a, b, plain in zip(
            guess.keys(b"".join(CHAIN), "alice"), guess.keys(b"".join(CHAIN), "bob"), CHAIN, strict=True
        )
    ]
    assert index.lookup(told, tenant="bob") == {}


def test_a_hidden_holder_is_not_seen_until_it_takes_the_place_of_the_shown_one() -> None:
    index = NodeIndex()
    index.stored("w", CHAIN)
    holder = index.open("w")
    index.store(holder, index.keys(b"".join(CHAIN[:2])))
    assert index.lookup(CHAIN) == {"w": 6}
    index.show(holder)
    index.show(holder)  # said again, it changes nothing
    assert index.lookup(CHAIN) == {"w": 2}
    index.check()


def test_the_bits_of_closed_holders_are_swept_out_a_little_at_a_time_and_used_again() -> None:
    index = NodeIndex()
    index.stored("stays", nodes(range(500)))
    for number in range(40):
        index.stored(f"w{number}", nodes(range(1000)))
        index.clear(f"w{number}")
    assert index.num_nodes == 1000
    index.sweep(budget=100)
    assert 500 < index.num_nodes < 1000
    for _ in range(100):
        index.sweep(budget=100)
    assert index.num_nodes == 500
    assert index.lookup(nodes(range(1000))) == {"stays": 500}
    assert index.open("new").bit < 1 << 41
    index.check()


def test_no_worker_has_more_than_its_share_of_the_table() -> None:
    index = NodeIndex(max_entries=100)
    modest, greedy = index.open("modest"), index.open("greedy")
    for holder in (modest, greedy):
        index.show(holder)
    index.store(greedy, index.keys(b"".join(nodes(range(1000)))))
    index.store(modest, index.keys(b"".join(nodes(range(2000, 2050)))))
    assert (modest.num_nodes, greedy.num_nodes) == (50, 50)
    assert (modest.is_cut, greedy.is_cut) == (False, True)
    assert index.num_nodes == 100
    index.remove(greedy, index.keys(node(3)))
    index.store(greedy, index.keys(node(5000)))
    assert greedy.num_nodes == 50


@given(
    held=st.dictionaries(st.integers(0, 70), st.sets(st.integers(0, 9), max_size=10), max_size=20),
    chain=st.lists(st.integers(0, 9), unique=True, max_size=10),
)
def test_a_lookup_finds_what_looking_at_each_worker_would_find(held: dict[int, set[int]], chain: list[int]) -> None:
    index = NodeIndex()
    truth = {}
    for worker, numbers in held.items():
        index.stored(f"w{worker}", nodes(sorted(numbers)))
        run = next((at for at, number in enumerate(chain) if number not in numbers), len(chain))
        if run:
            truth[f"w{worker}"] = run
    assert index.lookup(nodes(chain)) == truth


class IndexMachine(RuleBasedStateMachine):
    """Any order of holders opened, shown, filled, emptied, closed and swept, against sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = NodeIndex()
        self.holders: list[tuple[Holder, set[int]]] = []
        self.shown: dict[str, Holder] = {}

    @rule(name=st.sampled_from("abc"))
    def opens(self, name: str) -> None:
        self.holders.append((self.index.open(name), set()))

    @rule(data=st.data(), numbers=st.sets(st.integers(0, 600)), is_stored=st.booleans())
    def changes(self, data: st.DataObject, numbers: set[int], is_stored: bool) -> None:
        if self.holders:
            holder, truth = data.draw(st.sampled_from(self.holders))
            keys = self.index.keys(b"".join(nodes(sorted(numbers))))
            if is_stored:
                self.index.store(holder, keys)
                truth |= numbers
            else:
                self.index.remove(holder, keys)
                truth -= numbers

    @rule(data=st.data())
    def shows(self, data: st.DataObject) -> None:
        if self.holders:
            holder, _ = data.draw(st.sampled_from(self.holders))
            before = self.shown.get(holder.worker_id)
            if before is not None and before is not holder:
                self.holders = [item for item in self.holders if item[0] is not before]
            self.index.show(holder)
            self.shown[holder.worker_id] = holder

    @rule(data=st.data())
    def closes(self, data: st.DataObject) -> None:
        if self.holders:
            holder, _ = data.draw(st.sampled_from(self.holders))
            self.holders = [item for item in self.holders if item[0] is not holder]
            self.index.close(holder)
            if self.shown.get(holder.worker_id) is holder:
                del self.shown[holder.worker_id]

    @rule(budget=st.integers(1, 600))
    def sweeps(self, budget: int) -> None:
        self.index.sweep(budget)

    @invariant()
    def lookups_tell_the_truth(self) -> None:
        self.index.check()
        truth = {
            name: numbers
            for holder, numbers in self.holders
            for name in [holder.worker_id]
            if self.shown.get(name) is holder
        }
        for number in (0, 1, 255, 256, 600):
            expected = {name: 1 for name, numbers in truth.items() if number in numbers}
            assert self.index.lookup([node(number)]) == expected


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestIndexMachine = IndexMachine.TestCase
