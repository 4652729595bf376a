"""The broker's directory of sequences and its clock: the newest version is known, and what is older is told apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import MalformedMessage
from kvcache.broker.directory import Directory, Name, Place
from kvcache.broker.versions import COUNTER_BITS, Versions

S, T = Name("t", "s"), Name("t", "other")


def test_the_newest_version_is_where_it_was_written_and_older_holders_drop_theirs() -> None:
    directory = Directory()
    assert directory.find(S) == Place(0)
    assert directory.told("a", S, 5) == ()
    assert directory.told("b", S, 7) == ("a",)
    assert directory.find(S) == Place(7, ("b",))
    assert directory.told("a", S, 5) == ("a",)
    assert directory.find(S) == Place(7, ("b",))


def test_several_workers_may_hold_one_version() -> None:
    directory = Directory()
    assert directory.told("b", S, 7) == directory.told("a", S, 7) == ()
    assert directory.find(S) == Place(7, ("a", "b"))
    assert directory.told("b", S, 8) == ("a",)


def test_of_what_nobody_holds_any_more_the_version_is_remembered() -> None:
    directory = Directory()
    directory.told("a", S, 5)
    directory.told("a", T, 6)
    directory.gone("a", S, 5)
    directory.forget("a")
    assert [directory.find(name) for name in (S, T)] == [Place(5), Place(6)]
    assert directory.told("b", T, 5) == ("b",)
    assert len(directory) == 0


def test_a_deletion_outdates_every_copy_before_it_and_none_after() -> None:
    directory = Directory()
    directory.told("a", S, 5)
    directory.mark(S, 6)
    assert directory.find(S) == Place(6)
    assert directory.told("a", S, 5) == ("a",)
    directory.told("b", S, 9)
    directory.mark(S, 8)
    assert directory.find(S) == Place(9, ("b",))


def test_the_least_recently_used_are_forgotten_when_there_are_too_many() -> None:
    directory = Directory(max_held=3, max_marks=2)
    for number in range(3):
        directory.told("a", Name("t", f"s{number}"), number + 1)
    directory.use(Name("t", "s0"))
    directory.told("a", Name("t", "s3"), 4)
    assert directory.find(Name("t", "s1")) == Place(0)
    assert directory.find(Name("t", "s0")) == Place(1, ("a",))
    for number in range(5):
        directory.mark(Name("t", f"m{number}"), 1)
    assert [directory.find(Name("t", f"m{number}")).version for number in range(5)] == [0, 0, 0, 1, 1]
    directory.check()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["told", "gone", "mark", "forget", "use"]),
            st.sampled_from("abc"),
            st.integers(0, 5),
            st.integers(1, 6),
        ),
        max_size=60,
    )
)
def test_the_books_agree_after_any_news(news: list[tuple[str, str, int, int]]) -> None:
    directory, newest = Directory(max_held=4, max_marks=100), dict[Name, int]()
    for what, worker, number, version in news:
        name = Name("t", str(number))
        match what:
            case "told":
                stale = directory.told(worker, name, version)
                assert (worker in stale) == (version < newest.get(name, 0))
            case "gone":
                directory.gone(worker, name, version)
            case "mark":
                directory.mark(name, version)
            case "forget":
                directory.forget(worker)
                assert worker not in directory.workers()
            case _:
                directory.use(name)
        if what in {"told", "gone", "mark"}:
            newest[name] = max(version, newest.get(name, 0))
        if directory.find(name).version == 0:
            newest.pop(name, None)  # forgotten for room
        directory.check()
        newest = {name: version for name, version in newest.items() if directory.find(name).version}
        assert all(directory.find(name).version == version for name, version in newest.items())


def test_versions_grow_with_time_and_within_a_millisecond() -> None:
    versions = Versions(1000, now=5.0)
    first = versions.next(5.0)
    assert first == 1000 << COUNTER_BITS
    assert versions.next(5.0) == first + 1
    assert versions.next(5.5) == 1500 << COUNTER_BITS


def test_a_broker_whose_clock_is_behind_writes_after_what_it_has_heard_of() -> None:
    versions = Versions(1000, now=5.0)
    versions.saw(9000 << COUNTER_BITS, now=5.0)
    assert versions.next(5.0) == (9000 << COUNTER_BITS) + 1
    assert versions.next(20.0) == 16_000 << COUNTER_BITS


def test_a_version_that_no_clock_can_have_made_is_refused() -> None:
    versions = Versions(1000, now=5.0)
    with pytest.raises(MalformedMessage, match="a year ahead"):
        versions.saw(2**63 - 1, now=5.0)
    assert versions.next(5.0) == 1000 << COUNTER_BITS
