"""Settings for every test: the order of the rings, no GPU test where there is no GPU, no wall-clock deadlines, and
the logs of the processes whose test failed. The fixtures are those of the suites in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests.harness.cluster import Cluster
from tests.harness.services import Services, client, cluster, exact, own_cluster, sequences, services

__all__ = ["client", "cluster", "exact", "own_cluster", "sequences", "services"]

collect_ignore = ["archived"]

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the processes wrote during a test that failed."""
    report = yield
    values = getattr(item, "funcargs", {}).values()
    clusters = [value.cluster if isinstance(value, Services) else value for value in values]
    if report.failed:  # type: ignore[attr-defined]
        for each in clusters:
            if isinstance(each, Cluster):
                report.sections.extend((f"log of {name}", text) for name, text in each.fresh_logs())  # type: ignore[attr-defined]
    return report
