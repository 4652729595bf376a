"""What the suites with real processes share: the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
