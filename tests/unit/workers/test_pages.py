"""Pages: allocation all or nothing, neighbours kept together, and byte runs that know where each byte is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.memory import HostMemory
from workers.pages import ByteRun, Extent, PagePool


def test_pages_come_as_one_extent_where_they_can() -> None:
    pool = PagePool(10)
    assert pool.allocate(4) == [Extent(0, 4)]
    assert pool.allocate(6) == [Extent(4, 6)]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.check([Extent(0, 4), Extent(4, 6)])


def test_freed_neighbours_grow_together_whatever_the_order() -> None:
    pool = PagePool(6)
    pool.allocate(6)
    pool.free([Extent(0, 2), Extent(4, 2), Extent(2, 2)])
    assert pool.allocate(6) == [Extent(0, 6)]


def test_scattered_pages_are_taken_largest_extent_first() -> None:
    pool = PagePool(9)
    pool.allocate(9)
    pool.free([Extent(0, 1), Extent(2, 3), Extent(6, 2)])
    assert pool.allocate(5) == [Extent(2, 3), Extent(6, 2)]
    pool.free([Extent(2, 3)])
    assert pool.allocate(2) == [Extent(2, 2)], "the first that is large enough"
    assert pool.allocate(1) == [Extent(0, 1)]


def test_pages_behind_a_given_one_are_preferred() -> None:
    pool = PagePool(9)
    pool.allocate(4)
    pool.free([Extent(0, 2)])
    assert pool.allocate(2, after=4) == [Extent(4, 2)]
    assert pool.allocate(2, after=4) == [Extent(0, 2)], "taken, so any will do"
    assert pool.allocate(1, after=9) == [Extent(6, 1)]


def test_check_finds_lost_and_doubled_pages() -> None:
    pool = PagePool(4)
    pool.allocate(2)
    for wrong in ([], [Extent(0, 1)], [Extent(1, 2)]):
        with pytest.raises(AssertionError):
            pool.check(wrong)


def test_run_joins_neighbours_and_finds_bytes_across_extents() -> None:
    run = ByteRun(10)
    run.extend([Extent(3, 1), Extent(4, 1), Extent(0, 2)])
    assert run.extents == (Extent(3, 2), Extent(0, 2))
    assert run.next_page == 2
    assert list(run.locate(5, 30)) == [(35, 15), (0, 15)]
    assert list(run.locate(20, 1)) == [(0, 1)]
    assert list(run.locate(40, 0)) == []
    assert (run.pages_to_hold(40), run.pages_to_hold(41), run.pages_to_hold(0)) == (0, 1, 0)


def test_trimming_gives_back_whole_pages_only() -> None:
    run = ByteRun(10)
    run.extend([Extent(3, 2), Extent(0, 2)])
    assert run.trim(40) == []
    assert run.trim(31) == []
    assert run.trim(11) == [Extent(0, 2)]
    assert run.trim(10) == [Extent(4, 1)]
    assert run.extents == (Extent(3, 1),)
    assert run.trim(0) == [Extent(3, 1)]
    assert (run.num_pages, run.next_page) == (0, None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_runs_that_grow_and_shrink_at_random_keep_every_page_once(work: list[tuple[int, int]]) -> None:
    pool, runs = PagePool(20), [ByteRun(4) for _ in range(4)]
    for index, num_pages in work:
        run = runs[index]
        if num_pages < run.num_pages:
            pool.free(run.trim(num_pages * 4))
        else:
            need = num_pages - run.num_pages
            extents = pool.allocate(need, after=run.next_page)
            assert (extents is None) == (need > pool.num_free + sum(e.size for e in extents or ()))
            run.extend(extents or ())
        pool.check([extent for each in runs for extent in each.extents])
        for each in runs:
            places = [start + i for start, n in each.locate(0, each.num_pages * 4) for i in range(n)]
            assert len(set(places)) == each.num_pages * 4
            assert [next(each.locate(offset, 1))[0] for offset in range(len(places))] == places


def test_host_memory_is_aligned_and_read_only_from_outside() -> None:
    memory = HostMemory(10_000)
    memory.write(9_990, memoryview(b"0123456789"))
    window = memory.read(9_995, 5)
    assert (bytes(window), window.readonly, memory.nbytes) == (b"56789", True, 10_000)
    memory.write(9_995, memoryview(b"abcde"))
    assert bytes(window) == b"abcde"
    with pytest.raises(ValueError, match="at least 1 byte, not 0"):
        HostMemory(0)
