"""The command tree: help, versions, exit codes, and what it costs to start."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import kvcache
from bus.errors import BadArgument, ConnectionLost, DeadlineExceeded, KVCacheError, NotFound, NoWorkers
from kvcache.cli import main
from kvcache.local import free_port, free_url

COMMANDS = ["up", "generate", "chat", "route", "workers", "stats", "models-pull", "models-list"]
COMMANDS += [f"kv-{verb}" for verb in ("put", "append", "get", "length", "delete", "pin", "unpin", "list")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split("-"), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: kvcache {command.replace('-', ' ')} ")


@pytest.mark.parametrize("group", [[], ["kv"], ["models"]])
def test_summaries_in_the_overview_are_whole_sentences(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*group, "--help"]) == 0
    _, _, commands = capsys.readouterr().out.partition("Commands:\n")
    assert commands
    assert "..." not in commands


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("kvcache")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["nosuch"], "No such command"),
        (["generate"], "Missing argument"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens must be an integer from 1"),
        (["generate", "x", "--temperature", "warm"], "--temperature"),
        (["kv", "get", "s"], "--file"),
        (["kv", "length", "s", "--layer", "-1"], "--layer"),
        (["kv", "pin", "s", "--ttl", "0"], "--ttl"),
        (["route"], "either a sequence id or --prompt"),
        (["route", "s", "--prompt", "p"], "either a sequence id or --prompt"),
        (["workers", "--timeout", "0"], "--timeout"),
        (["up", "--workers", "0"], "--workers"),
    ],
)
def test_wrong_usage_is_exit_code_2(argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert shown.out == ""


def raiser(error: BaseException) -> Callable[..., object]:
    def client(*args: object, **kwargs: object) -> object:
        raise error

    return client


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("no sequence 's'"), 1),
        (BadArgument("top_p must be in (0, 1], not 2"), 2),
        (ConnectionLost("no broker answers at tcp://127.0.0.1:1"), 3),
        (NoWorkers("no worker is ready"), 3),
        (DeadlineExceeded("10 s are over"), 4),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: KVCacheError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvcache, "Client", raiser(error))
    assert main(["workers"]) == code
    assert capsys.readouterr().err == f"error: {error.message}\n"


@pytest.mark.parametrize(
    ("error", "code", "complaint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "kv.json"), 1, "No space left on device: 'kv.json'"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "is no utf-8 text: invalid start byte"),
    ],
)
def test_what_the_system_refuses_is_one_line_too(
    error: Exception, code: int, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvcache, "Client", raiser(error))
    assert main(["workers"]) == code
    shown = capsys.readouterr().err
    assert complaint in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("command", [["up", "--model", "MODEL"], ["serve", "MODEL", "--port", str(free_port())]])
def test_no_second_cluster_starts_where_one_runs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asyncio, "run", raiser(AssertionError("services were started")))
    (tmp_path / "config.json").write_text("{}")
    url = free_url()
    port = int(url.rpartition(":")[2]) + 5  # the last of its six
    with socket.create_server(("127.0.0.1", port)):
        words = [str(tmp_path) if word == "MODEL" else word for word in command]
        assert main([*words, "--url", url]) == 1
    assert f":{port} is in use" in capsys.readouterr().err


def test_no_gateway_starts_where_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "smollm2", "--port", str(port)]) == 1
    assert capsys.readouterr().err.startswith(f"error: tcp://127.0.0.1:{port} is in use")


def test_message_of_several_lines_is_shown_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvcache, "Client", raiser(NotFound("first\nsecond")))
    main(["workers"])
    assert capsys.readouterr().err == "error: first second\n"


def test_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcache, "Client", raiser(KeyboardInterrupt()))
    assert main(["workers"]) == 130


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from kvcache.cli import main; main(['--help'])\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'zmq') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
