"""The live system that the suites named for the whole project talk to, and their fixtures.

KVCACHE_BROKER names a broker that runs already; without it two brokers and two workers with SmolLM2 are started when
the first test asks for them, and ended after the last. Ours compute in float32, where a token does not depend on who
else is in its batch. Tests that harm or change the services take `cluster`, which is always ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from kvcache import AsyncClient, Client
from kvcache.models import ModelRegistry
from tests.harness.cluster import ROOT, Cluster, running_cluster
from tests.test_utils import Sequences

MODEL = "smollm2"
WORKER_FLAGS = ("--model", MODEL, "--dtype", "float32", "--threads", "1", "--kv-cache-memory-bytes", "512MiB")
SECOND_BROKER_INFLIGHT = 16
"""What the second of our brokers lets each worker have, few enough that a test can ask for more."""


@dataclass(frozen=True)
class Services:
    """A broker with workers that serve. cluster: the processes, if they are ours."""

    url: str
    cluster: Cluster | None


@pytest.fixture(scope="session")
def own_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    _need_model()
    with running_cluster(tmp_path_factory.mktemp("services")) as cluster:
        cluster.add_broker()
        cluster.add_broker("--max-inflight", str(SECOND_BROKER_INFLIGHT))
        for name in ("worker-1", "worker-2"):
            cluster.add_worker(name, *WORKER_FLAGS)
        yield cluster


@pytest.fixture
def cluster(own_cluster: Cluster) -> Cluster:
    """Services of our own, whole whatever the test before did to them; their logs begin with this test."""
    own_cluster.heal()
    own_cluster.mark()
    return own_cluster


@pytest.fixture
def services(request: pytest.FixtureRequest) -> Services:
    """Those that KVCACHE_BROKER names, else our own."""
    url = os.environ.get("KVCACHE_BROKER")
    if not url:
        cluster: Cluster = request.getfixturevalue("cluster")
        return Services(cluster.url, cluster)
    with Client(url, timeout=10.0) as client:
        if not client.health():
            pytest.fail(
                f"KVCACHE_BROKER is {url}, where no broker with a ready worker answers:"
                " run `scripts/local_dev.sh start`, or unset it to have services started",
                pytrace=False,
            )
    return Services(url, None)


@pytest_asyncio.fixture
async def client(services: Services) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(services.url, timeout=180.0) as client:
        yield client


@pytest_asyncio.fixture
async def sequences(client: AsyncClient) -> AsyncIterator[Sequences]:
    """Ids for this test alone, deleted after it."""
    sequences = Sequences(client)
    yield sequences
    await sequences.delete_all()


@pytest_asyncio.fixture
async def exact(client: AsyncClient) -> None:
    """Skip where the same request may be answered in other words depending on who else is served."""
    dtypes = {
        model.dtype
        for worker in (await client.stats()).workers
        for model in (worker.stats.models if worker.stats else ())
        if model.state == "ready"
    }
    if dtypes - {"float32"}:
        pytest.skip(
            f"these workers compute in {', '.join(sorted(dtypes))}; for this test start them in float32:"
            " KVCACHE_DTYPE=float32 scripts/local_dev.sh start"
        )


def _need_model() -> None:
    """Fetch the model if it is not there. Fails the test, with what the command said, if that does not work."""
    if ModelRegistry().find(MODEL).is_present:
        return
    command = [sys.executable, "-m", "kvcache.cli", "models", "pull", MODEL]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{MODEL} is not on this machine and could not be fetched:\n{done.stdout}", pytrace=False)
