"""The frames of `kvcache top`, and the command with a client that answers from memory."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import kvcache
from bus.errors import ConnectionLost
from bus.stats import BrokerStats, ClusterStats, WorkerView
from kvcache.cli import main, top
from kvcache.trends import BrokerRow, Point, Snapshot, WorkerRow

BROKER = BrokerRow(
    state="serving", policy="prefix", uptime_s=12.0, clients=1, streams=0, inflight=0, requests=9, workers_lost=0,
    indexed_nodes=3, queued_messages=0, loop_lag_ms=0.1, rss_bytes=1, hit_rate=0.5, reasons={}, failed={},
)  # fmt: skip
READY = WorkerRow(
    worker_id="worker-1", status="ready", share=0.5, running=3, waiting=2, num_blocks=100, held_blocks=25,
    cached_blocks=50, kv_used_bytes=3 << 20, kv_total_bytes=4 << 20, index="exact", indexed_nodes=7,
    tokens_per_s=42.0, hit_rate=0.75, models="tiny ready",
)  # fmt: skip
LOST = WorkerRow(worker_id="worker-2", status="lost", gone_at=100.0)
POINT = Point(at=107.0, hit_rate=0.75, tokens_per_s=42.0, requests_per_s=1.5, running=3, waiting=2)


def text_of(snapshot: Snapshot, *history: Point) -> str:
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(top.frame(snapshot, history, "tcp://h:1"))
    return out.getvalue()


def test_a_frame_shows_the_cluster_its_workers_and_who_is_lost() -> None:
    text = text_of(Snapshot(point=POINT, broker=BROKER, workers=(READY, LOST)), POINT)
    head, *_ = text.splitlines()
    assert head.startswith("kvcache top  tcp://h:1  1 worker serves, lost: worker-2  policy prefix, up 12 s")
    assert "hit rate    75%" in text
    assert "50% since start" in text
    first = next(line for line in text.splitlines() if line.startswith("worker-1"))
    for part in ("ready", "50%", "42", "███▓▓▓▓▓▓░░░  75%", "3.0 MiB of 4.0 MiB", "exact, 7 nodes", "tiny ready"):
        assert part in first
    assert "lost 7 s ago" in text


def test_a_broker_that_does_not_answer_is_the_headline() -> None:
    missed = Snapshot(point=Point(at=107.0, is_known=False), problem="gone", heard_at=100.0, workers=(READY,))
    assert "broker lost: gone, last heard 7 s ago" in text_of(missed)
    assert "worker-1" in text_of(missed)


def test_a_cluster_without_workers_says_what_to_do() -> None:
    assert "kvcache worker" in text_of(Snapshot(point=POINT, broker=BROKER))


def test_a_name_cannot_move_the_cursor() -> None:
    rude = WorkerRow(worker_id="a\x1b[2Jb", status="lost", gone_at=100.0)
    assert "\x1b" not in text_of(Snapshot(point=POINT, broker=BROKER, workers=(rude,)))


def test_a_sparkline_goes_from_nothing_to_the_most_and_leaves_what_is_not_known_blank() -> None:
    assert top.sparkline([0.0, None, 5.0, 10.0]) == "▁ ▅█"
    assert top.sparkline([0.5], most=1.0) == "▅"
    assert top.sparkline([]) == ""
    assert len(top.sparkline([1.0] * 500)) == top.NUM_BARS


class FakeClient:
    """Answers with one worker, or not at all."""

    is_away = False

    def __init__(self, url: str | None, timeout: float) -> None:
        self.url = url or "tcp://default"

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def stats(self) -> ClusterStats:
        if self.is_away:
            raise ConnectionLost("nobody listens there")
        worker = WorkerView(
            worker_id="worker-1", status="ready", weight=100, share=1.0, inflight=0, dispatched=0, last_heard_s=0.1,
            lease_s=2.0,
        )  # fmt: skip
        broker = BrokerStats(incarnation=1, state="serving", policy="prefix")
        return ClusterStats(healthy=True, broker=broker, workers=(worker,))


@pytest.mark.parametrize("flags", [["--once"], []])
def test_into_a_pipe_goes_one_frame(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvcache, "AsyncClient", FakeClient)
    monkeypatch.setattr(top, "ONCE_S", 0.0)
    assert main(["top", "--url", "tcp://h:1", *flags]) == 0
    out = capsys.readouterr().out
    assert "worker-1" in out
    assert "\x1b" not in out


def test_one_frame_of_nobody_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kvcache, "AsyncClient", FakeClient)
    monkeypatch.setattr(FakeClient, "is_away", True)
    assert main(["top", "--once"]) == 3
    assert "nobody listens there" in capsys.readouterr().err
