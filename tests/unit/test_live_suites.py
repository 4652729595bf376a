"""What the suites on live services promise to whoever runs them: the logs behind a failure, and figures to read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_runtest_makereport
from tests.harness.cluster import Cluster, Node
from tests.harness.figures import percentiles, show, show_table
from tests.harness.services import Services


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """One broker that has written a line before this test began, and one since."""
    cluster = Cluster(tmp_path)
    log = tmp_path / "broker-1.log"
    cluster.brokers["broker-1"] = Node("broker-1", "kvcache.broker", [], log)
    log.write_text("of an earlier test\n")
    cluster.mark()
    with log.open("a") as more:
        more.write("of this one\n")
    return cluster


def reported(*, failed: bool, **fixtures: object) -> list[tuple[str, str]]:
    """The sections of the report on a test with these fixtures."""
    hook: Any = pytest_runtest_makereport(SimpleNamespace(funcargs=fixtures))  # type: ignore[arg-type]
    next(hook)
    with pytest.raises(StopIteration) as end:
        hook.send(SimpleNamespace(failed=failed, sections=[]))
    report: Any = end.value.value
    return report.sections  # type: ignore[no-any-return]


@pytest.mark.parametrize("by", ["cluster", "services"])
def test_a_test_that_fails_shows_what_its_processes_wrote_meanwhile(cluster: Cluster, tmp_path: Path, by: str) -> None:
    fixture = cluster if by == "cluster" else Services("tcp://127.0.0.1:1", cluster)
    name = f"log of broker-1, whole in {tmp_path / 'broker-1.log'}"
    assert reported(failed=True, **{by: fixture}) == [(name, "of this one\n")]
    assert reported(failed=False, **{by: fixture}) == []


def test_a_test_on_somebody_elses_services_has_no_logs_to_show() -> None:
    assert reported(failed=True, services=Services("tcp://127.0.0.1:1", None), other=7) == []


def test_figures_are_lines_that_a_person_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    show("one", {"tokens": 12345, "rate": 2.25, "worker": "w", **percentiles("wait", [0.001, 0.002, 0.003])})
    show_table("many", ("worker", "ids"), [("w-1", 5), ("w-20", 1000)])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "  one: tokens 12,345, rate 2.2, worker w, wait p50 2 ms, wait p90 3 ms",
        "",
        "  many",
        "    worker    ids",
        "       w-1      5",
        "      w-20  1,000",
    ]
    assert percentiles("wait", []) == {}
    assert percentiles("wait", [0.5]) == {"wait p50": "500 ms", "wait p90": "500 ms"}
