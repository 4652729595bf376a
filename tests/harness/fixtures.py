"""What the suites with real processes share: the tiny model, and the logs of a cluster whose test failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.harness.cluster import Cluster
from tests.harness.models import Reference, save_tiny_llama

TINY_FLAGS = (
    "--dtype", "float32", "--threads", "1",
    "--kv-cache-memory-bytes", "192MiB", "--kv-plane-bytes", "128MiB",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama, called `tiny`."""
    torch.set_num_threads(1)
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    """The tiny model as transformers runs it."""
    return Reference(tiny_model)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the processes wrote during a test that failed."""
    report = yield
    clusters = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Cluster)]
    if report.failed:  # type: ignore[attr-defined]
        for cluster in clusters:
            report.sections.extend((f"log of {name}", text) for name, text in cluster.fresh_logs())  # type: ignore[attr-defined]
    return report
