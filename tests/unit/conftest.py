"""What tests within one process must not leave to each other: how the process logs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what `kvcache.logs.configure` does, which every `main` calls. Captured warnings most of all: the logging
    module captures only once, so that the next test's would go to whoever listened before."""
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, sys.excepthook
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)
