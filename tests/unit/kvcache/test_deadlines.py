"""Deadlines: everything that is due, once, in order, and nothing that was discarded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.broker.deadlines import BUCKET_S, Deadlines


class Entry:
    def __init__(self, at: float) -> None:
        self.at = at


TIMES = st.floats(0, 20)


@given(st.lists(TIMES), st.sets(st.integers(0, 30)), st.lists(st.floats(0, 30), min_size=1))
def test_each_entry_is_told_back_once_within_a_bucket_of_its_time(
    times: list[float], discarded: set[int], looks: list[float]
) -> None:
    deadlines, entries = Deadlines[Entry](), [Entry(at) for at in times]
    for entry in entries:
        deadlines.add(entry, entry.at)
    for index in discarded & set(range(len(entries))):
        deadlines.discard(entries[index], entries[index].at)
    waiting = [entry for index, entry in enumerate(entries) if index not in discarded]

    for now in sorted(looks):
        due = list(deadlines.due(now))
        assert all(entry.at <= now for entry in due)
        assert all(entry in waiting for entry in due)
        assert len(set(map(id, due))) == len(due)
        waiting = [entry for entry in waiting if entry not in due]
        assert all(entry.at > now - BUCKET_S for entry in waiting)
        assert [int(entry.at / BUCKET_S) for entry in due] == sorted(int(entry.at / BUCKET_S) for entry in due)
        assert len(deadlines) == len(waiting)


def test_entries_may_be_discarded_while_they_are_told_back() -> None:
    """Which is what ending a call does."""
    deadlines, entries = Deadlines[Entry](), [Entry(1.0), Entry(1.0), Entry(2.0)]
    for entry in entries:
        deadlines.add(entry, entry.at)
    for entry in deadlines.due(3.0):
        deadlines.discard(entry, entry.at)
    assert len(deadlines) == 0


def test_what_is_not_there_may_be_discarded() -> None:
    deadlines, entry = Deadlines[Entry](), Entry(1.0)
    deadlines.discard(entry, 1.0)
    deadlines.add(entry, 1.0)
    deadlines.discard(entry, 1.0)
    deadlines.discard(entry, 1.0)
    assert list(deadlines.due(9.0)) == []
