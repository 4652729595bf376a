"""Pages of the KV store's region: which are free, and byte runs made of pages that need not be neighbours.

Neighbouring free pages are kept together and handed out together, so that what was written at once can be
read at once, as one window. This file moves no bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple


class Extent(NamedTuple):
    """`size` neighbouring pages from page `start`."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class PagePool:
    """The free pages among `num_pages`, as extents in the order of their addresses."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._free = [Extent(0, num_pages)]

    def allocate(self, num: int, after: int | None = None) -> list[Extent] | None:
        """Take `num` pages, from page `after` on if that is free, then from the first extent that is large enough,
        else from the largest ones. None, and nothing changed, if fewer are free."""
        if num > self.num_free:
            return None
        taken: list[Extent] = []
        while num > 0:
            index = self._pick(num, after)
            extent = self._free[index]
            part = Extent(extent.start, min(num, extent.size))
            rest = Extent(part.stop, extent.size - part.size)
            self._free[index : index + 1] = [rest] if rest.size else []
            taken.append(part)
            num -= part.size
            self.num_free -= part.size
            after = part.stop
        return taken

    def free(self, extents: Iterable[Extent]) -> None:
        """Give pages back; neighbours grow together."""
        for extent in extents:
            self.num_free += extent.size
            index = bisect_left(self._free, extent)
            if index < len(self._free) and self._free[index].start == extent.stop:
                extent = Extent(extent.start, extent.size + self._free.pop(index).size)
            if index > 0 and self._free[index - 1].stop == extent.start:
                index -= 1
                extent = Extent(self._free[index].start, self._free.pop(index).size + extent.size)
            self._free.insert(index, extent)

    def check(self, used: Iterable[Extent]) -> None:
        """Assert that free and `used` extents together are every page exactly once, and that neighbours are joined."""
        pages = sorted([*self._free, *used])
        assert sum(extent.size for extent in pages) == self.num_pages, "pages were lost or are in two places"
        assert all(one.stop <= two.start for one, two in pairwise(pages)), "extents overlap"
        assert all(one.stop < two.start for one, two in pairwise(self._free))
        assert self.num_free == sum(extent.size for extent in self._free), "the count of free pages is wrong"

    def _pick(self, num: int, after: int | None) -> int:
        if after is not None:
            index = bisect_left(self._free, Extent(after, 0))
            if index < len(self._free) and self._free[index].start == after:
                return index
        enough = (index for index, extent in enumerate(self._free) if extent.size >= num)
        largest = range(len(self._free))
        first = next(enough, None)
        return max(largest, key=lambda index: self._free[index].size) if first is None else first


class ByteRun:
    """A growing row of bytes over whole pages of `page_bytes`: where in the region each byte is."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._extents: list[Extent] = []
        self._ends: list[int] = []  # number of pages up to the end of each extent

    @property
    def num_pages(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def extents(self) -> tuple[Extent, ...]:
        return tuple(self._extents)

    @property
    def next_page(self) -> int | None:
        """The page that would lengthen the last extent."""
        return self._extents[-1].stop if self._extents else None

    def pages_to_hold(self, nbytes: int) -> int:
        """How many more pages are needed to hold `nbytes` bytes."""
        return max(0, -(-nbytes // self._page_bytes) - self.num_pages)

    def extend(self, extents: Iterable[Extent]) -> None:
        """Add pages at the end."""
        for extent in extents:
            if extent.start == self.next_page:
                extent = Extent(self._extents[-1].start, self._extents.pop().size + extent.size)
                self._ends.pop()
            self._ends.append(self.num_pages + extent.size)
            self._extents.append(extent)

    def trim(self, nbytes: int) -> list[Extent]:
        """Drop the pages behind the first `nbytes` bytes and return them."""
        surplus = self.num_pages - -(-nbytes // self._page_bytes)
        dropped: list[Extent] = []
        while surplus > 0:
            last = self._extents.pop()
            self._ends.pop()
            kept = max(0, last.size - surplus)
            dropped.append(Extent(last.start + kept, last.size - kept))
            surplus -= last.size - kept
            if kept:
                self.extend([Extent(last.start, kept)])
        return dropped

    def locate(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Where bytes `offset .. offset + nbytes` are: (offset in the region, length), one per extent touched."""
        index = bisect_right(self._ends, offset // self._page_bytes)
        while nbytes > 0:
            extent = self._extents[index]
            before = (self._ends[index] - extent.size) * self._page_bytes
            inside = offset - before
            length = min(nbytes, extent.size * self._page_bytes - inside)
            yield extent.start * self._page_bytes + inside, length
            offset += length
            nbytes -= length
            index += 1
