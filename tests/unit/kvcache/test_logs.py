"""Logs: one line an event, for people or for machines."""

from __future__ import annotations

import contextvars
import json
import logging
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bus.errors import BadArgument
from kvcache import logs


def test_a_line_for_people_says_what_who_and_how_bad(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("kvcache.x").info("hello %d", 3)
    logging.getLogger("kvcache.x").debug("too quiet")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO    kvcache.x: hello 3")


def test_a_line_for_machines_is_one_json_object_however_long_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning", "json")
    before = datetime.now(UTC)
    logging.getLogger("kvcache.x").warning("two\nlines %s", "\ud800é")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "two\nlines \ud800é"
    assert (entry["level"], entry["logger"]) == ("warning", "kvcache.x")
    written = datetime.fromisoformat(entry["time"])
    assert abs((written - before).total_seconds()) < 5
    assert written.utcoffset() is not None


def test_an_exception_brings_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("ERROR", "json")
    try:
        raise RuntimeError("why")
    except RuntimeError:
        logging.getLogger("kvcache.x").exception("it broke")
    entry = json.loads(capsys.readouterr().err)
    assert "RuntimeError: why" in entry["traceback"]


def test_a_line_about_a_request_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    for style in ("json", "text"):
        logs.configure("info", style)
        logging.getLogger("kvcache.x").info("it ends", extra=logs.about("req-7"))
        logging.getLogger("kvcache.x").info("nobody asked")
    named, unnamed, *text = capsys.readouterr().err.splitlines()
    assert json.loads(named)["request_id"] == "req-7"
    assert "request_id" not in json.loads(unnamed)
    assert text[0].endswith("INFO    kvcache.x: it ends [req-7]")
    assert text[1].endswith("nobody asked")


def test_what_a_task_logs_is_about_the_request_that_it_serves(capsys: pytest.CaptureFixture[str]) -> None:
    def serve() -> None:
        logs.current_request.set("req-8")
        logging.getLogger("uvicorn.error").warning("odd")

    logs.configure("info", "json")
    contextvars.copy_context().run(serve)
    logging.getLogger("uvicorn.error").warning("odd")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["request_id"], "request_id" in second) == ("req-8", False)


def test_no_message_can_begin_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("kvcache.x").info("left: %s", "bye\n2026-01-01 ERROR forged\x1b[2J\u2028x")
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.endswith(r"left: bye\n2026-01-01 ERROR forged\x1b[2J\u2028x")


def test_no_name_turns_the_line_around(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("kvcache.x").info("worker %s joined", "\u202ekcatta \u2066\u05d0\u2069")
    assert capsys.readouterr().err.endswith("worker \\u202ekcatta \\u2066\u05d0\\u2069 joined\n")


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_full_disk_under_the_log_ends_nothing(style: str) -> None:
    code = (
        "import logging; from kvcache import logs\n"
        f"logs.configure('info', {style!r})\n"
        "for number in range(3): logging.getLogger('kvcache.x').warning('lost %d', number)\n"
        "print('served')\n"
    )
    command = [sys.executable, "-c", code]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, timeout=30, check=False)
    assert done.stdout == b"served\n"


def test_warnings_and_what_ends_the_process_are_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("old", DeprecationWarning, "x.py", 3)
    error = RuntimeError("why")
    sys.excepthook(RuntimeError, error, None)
    # Beside them may be warnings of what earlier tests left to the garbage collector.
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    warned, ended = (next(line for line in lines if word in line["message"]) for word in ("x.py", "this process"))
    assert "x.py:3: DeprecationWarning: old" in warned["message"]
    assert (ended["level"], ended["message"]) == ("critical", "this process ends: RuntimeError")
    assert "RuntimeError: why" in ended["traceback"]


@pytest.mark.parametrize(
    ("level", "style", "words"),
    [
        ("loud", "text", "log level 'loud' does not exist; use one of debug, info, warning, error"),
        ("info", "xml", "log format 'xml' is neither 'text' nor 'json'"),
    ],
)
def test_what_is_no_level_or_format_is_refused(level: str, style: str, words: str) -> None:
    with pytest.raises(BadArgument, match=words):
        logs.configure(level, style)
