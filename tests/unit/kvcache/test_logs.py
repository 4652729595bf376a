"""Logs: one line an event, for people or for machines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from bus.errors import BadArgument
from kvcache import logs


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


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
    written = datetime.fromisoformat(entry["ts"])
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
