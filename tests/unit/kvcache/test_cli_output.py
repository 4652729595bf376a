"""How the command writes: units, tables, generated text, and the live board's rows."""

from __future__ import annotations

import io
import json
import sys
from datetime import datetime

import msgspec
import pytest

from bus.stats import BrokerStats, ClusterStats, ModelStats, WorkerStats, WorkerView
from kvcache.cli.board import PlainBoard, describe, open_board, status_table
from kvcache.cli.options import LogFormat
from kvcache.cli.output import complain, console, human_bytes, human_seconds, print_table, say
from kvcache.model_words import describe_models
from kvcache.supervisor import Service, ServiceState, ServiceStatus


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (1536 << 20, "1.5 GiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_bytes_get_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (0.999, "999 ms"), (1.0, "1.00 s"), (83.2, "83.20 s")]
)
def test_short_times_are_in_milliseconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\td\ne\x9bf"


def test_generated_text_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    say(HOSTILE)
    assert screen.getvalue() == "a]0;titleb[2Jc\td\nef"


def test_generated_text_reaches_a_pipe_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    assert capsys.readouterr().out == HOSTILE


def test_names_and_errors_can_neither_drive_the_terminal_nor_be_read_backwards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_table(["ID"], [("safe\u202exe.\x1b[2Jname",)])
    complain("no model \u202exyz\x1b]0;t\x07 here")
    shown, complaint = capsys.readouterr()
    assert shown.split() == ["ID", "safexe.[2Jname"]
    assert complaint == "error: no model xyz]0;t here\n"


def test_generated_text_keeps_its_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    say("\u05d0\u200f!")
    assert screen.getvalue() == "\u05d0\u200f!"


def test_brackets_in_cells_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["ID", "#N"], [("[red]x[/red]", 1), (None, 22)], title="[bold]t")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "[bold]t",
        "ID             N",
        "[red]x[/red]   1",
        "              22",
    ]


def status(name: str, state: ServiceState, pid: int | None = None, exit_code: int | None = None) -> ServiceStatus:
    return ServiceStatus(Service(name=name, command=()), state=state, pid=pid, exit_code=exit_code)


@pytest.mark.parametrize(
    ("state", "pid", "exit_code", "text"),
    [
        (ServiceState.RUNNING, 12, None, "started, pid 12"),
        (ServiceState.WAITING, None, -9, "waiting to restart, exit code -9"),
        (ServiceState.GAVE_UP, None, 1, "gave up, exit code 1"),
        (ServiceState.STOPPED, None, 0, "stopped, exit code 0"),
        (ServiceState.STOPPED, None, None, "stopped"),
    ],
)
def test_changes_are_told_in_words(state: ServiceState, pid: int | None, exit_code: int | None, text: str) -> None:
    assert describe(status("worker-1", state, pid, exit_code)) == text


def test_plain_board_writes_one_line_for_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    board = PlainBoard()
    board.line("broker", "x" * 500)
    board.changed(status("worker-1", ServiceState.RUNNING, 12))
    board.figures(None)
    assert capsys.readouterr().out.splitlines() == [f"[broker] {'x' * 500}", "[worker-1] started, pid 12"]


def test_json_board_writes_one_object_for_each_event_with_the_services_name(capsys: pytest.CaptureFixture[str]) -> None:
    with open_board(LogFormat.JSON) as board:
        board.line("worker-1", '{"time": "t", "level": "info", "message": "ready", "request_id": "r"}')
        board.line("worker-1", "a library's \x1b[31mcry")
        board.line("worker-1", "[1, 2]")
        board.changed(status("broker", ServiceState.RUNNING, 12))
        board.figures(None)
    logged, cried, listed, started = map(json.loads, capsys.readouterr().out.splitlines())
    assert logged == {
        "service": "worker-1",
        "time": "t",
        "level": "info",
        "message": "ready",
        "request_id": "r",
    }
    assert (cried["service"], cried["level"], cried["message"]) == ("worker-1", "info", "a library's \x1b[31mcry")
    assert datetime.fromisoformat(cried["time"]).utcoffset() is not None
    assert (listed["message"], started["service"], started["message"]) == ("[1, 2]", "broker", "started, pid 12")


def test_live_table_joins_processes_with_what_the_broker_says() -> None:
    view = WorkerView(
        worker_id="worker-1",
        status="ready",
        weight=100,
        share=1.0,
        inflight=0,
        dispatched=3,
        last_heard_s=0.0,
        lease_s=2.0,
        kv_total_bytes=1 << 30,
        models=(("smollm2", "absent"),),
    )
    figures = ClusterStats(
        healthy=True,
        broker=BrokerStats(incarnation=1, state="serving", policy="p", requests=5, inflight=1),
        workers=(view,),
    )
    statuses = [
        status("broker", ServiceState.RUNNING, 1),
        status("worker-1", ServiceState.RUNNING, 2),
        status("worker-2", ServiceState.WAITING, None, 1),
    ]
    terminal = console()
    with terminal.capture() as capture:
        terminal.print(status_table(statuses, figures))
    _, *rows = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert rows == [
        "broker running 1 0 serving 1 5",
        "worker-1 running 2 0 ready 0 0 3 0 B of 1.0 GiB smollm2 absent",
        "worker-2 waiting to restart 0",
    ]


def view_with(*models: ModelStats) -> WorkerView:
    return WorkerView(
        worker_id="w",
        status="ready",
        weight=100,
        share=1.0,
        inflight=0,
        dispatched=0,
        last_heard_s=0.0,
        lease_s=1.0,
        models=tuple((model.name, model.state) for model in models),
        stats=WorkerStats(worker_id="w", incarnation=1, state="ready", models=models),
    )


def test_a_model_that_loads_says_how_far_it_is() -> None:
    view = view_with(
        ModelStats(name="a", state="ready"),
        ModelStats(name="b", state="loading", stage="checking weights", progress=0.4),
        ModelStats(name="c", state="loading", stage="waiting for room"),
        ModelStats(name="d", state="absent"),
    )
    assert describe_models(view) == ("a ready, b loading (checking weights 40%), c loading (waiting for room)")


def test_where_nothing_was_asked_for_all_models_are_named() -> None:
    view = view_with(ModelStats(name="a", state="absent"), ModelStats(name="b", state="absent"))
    assert describe_models(view) == "a absent, b absent"


def test_a_status_older_than_the_beat_is_not_believed() -> None:
    old = view_with(ModelStats(name="a", state="loading", stage="reading weights"))
    assert describe_models(msgspec.structs.replace(old, models=(("a", "ready"),))) == "a ready"
