"""One cluster for all tests that do it no harm: a broker and two workers with the tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvcache import AsyncClient
from tests.harness.cluster import Cluster, running_cluster
from tests.harness.fixtures import TINY_FLAGS, reference, tiny_model
from tests.harness.logs import spans_in_logs

__all__ = ["reference", "tiny_model"]


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        logs = ("--log-level", "debug", "--log-format", "json")
        with spans_in_logs():
            cluster.add_broker(*logs)
            for name in ("worker-1", "worker-2"):
                cluster.add_worker(name, "--model", str(tiny_model), *TINY_FLAGS, *logs)
        cluster.wait_ready()
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The shared cluster, whose log begins with this test."""
    shared_cluster.mark()
    return shared_cluster


@pytest_asyncio.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.url, timeout=30.0) as client:
        yield client
