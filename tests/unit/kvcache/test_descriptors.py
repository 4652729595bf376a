"""How many connections a process allows itself."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from kvcache import descriptors


@pytest.fixture
def hard() -> Iterator[int]:
    """Our own hard limit; the soft one is the usual 1024 until the test is over."""
    soft, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, soft) if soft >= 0 else 1024, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_as_far_as_it_is_of_use_and_may_be(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "WANTED", 1100)
    descriptors.allow_many()
    wanted = 1100 if hard == resource.RLIM_INFINITY else min(1100, hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard)
    monkeypatch.setattr(descriptors, "WANTED", 1050)
    descriptors.allow_many()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard), "what is enough is left alone"
