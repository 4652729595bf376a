"""The Python that the documents show, run as it stands there against a broker and two workers."""

from __future__ import annotations

import re

import pytest

from kvcache import Client
from tests.harness.cluster import ROOT, Cluster

pytestmark = pytest.mark.system

PAGES = (ROOT / "README.md", ROOT / "docs" / "QUICKSTART.md", ROOT / "docs" / "PYTHON.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(BLOCK.findall(page.read_text("utf-8")), 1)
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= len(PAGES)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCACHE_URL", cluster.url)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})  # noqa: S102 - our own documents
    with Client() as client:
        for info in client.kv.list():
            client.kv.delete(info.seq_id)
