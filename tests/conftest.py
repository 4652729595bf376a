"""Settings for every test: the order of the rings, no GPU test where there is no GPU, no wall-clock deadlines."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# An example that takes 200 ms on a busy machine has found nothing; pytest-timeout ends what hangs.
settings.register_profile("kvcache", deadline=None)
settings.load_profile("kvcache")

RINGS = ("unit", "zmq_semantics", "system", "faults")  # then the suites named for the whole project


@cache
def _has_cuda() -> bool:
    import torch  # here, because most runs collect no GPU test and need not wait for torch

    return torch.cuda.is_available()


def _ring(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return RINGS.index(folder) if folder in RINGS else len(RINGS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the inner rings first, whatever order the tests were collected or shuffled in."""
    items.sort(key=_ring)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_cuda():
        pytest.skip("needs a CUDA device")
