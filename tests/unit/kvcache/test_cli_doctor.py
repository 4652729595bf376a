"""What the command prints and how it ends, and the facts that can be had without torch."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from bus.errors import ConnectionLost
from bus.stats import BrokerStats, ClusterStats
from kvcache.checkup import Examination, ExaminedModel, Finding, Verdict, ok
from kvcache.cli import main, probes

EXAMINED = Examination(
    torch="2.13", gpus=("H200",), model=ExaminedModel(dtype="float32", weights_bytes=1, max_model_len=9)
)
FIGURES = ClusterStats(healthy=True, broker=BrokerStats(incarnation=1, state="serving", policy="prefix"))


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all is well and no broker runs."""
    monkeypatch.setattr(probes, "examine", lambda source, load: EXAMINED)
    monkeypatch.setattr(probes, "loopback", lambda: ok("loopback", "answers"))
    monkeypatch.setattr(probes, "ask_broker", lambda url: ConnectionLost("nobody listens"))
    monkeypatch.setattr(probes, "taken_ports", lambda: {5555: False, 5556: False, 8000: False})
    monkeypatch.setattr(probes, "free_memory", lambda: 1 << 36)
    monkeypatch.setattr(probes, "free_disk", lambda home: 1 << 40)
    monkeypatch.setattr(probes, "load", lambda: 0.5)
    for name in ("KVCACHE_URL", "KVCACHE_BROKER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_whole_installation_is_well(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "0 failed" in out
    for check in ("python", "packages", "devices", "model", "ports", "loopback", "clock", "memory", "disk", "cores"):
        assert f" {check} " in out


def test_a_broker_that_is_named_must_answer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model), "--url", "tcp://h:1"]) == 1
    out = capsys.readouterr().out
    assert "fail broker     tcp://h:1: nobody listens" in out
    assert "1 failed" in out


def test_json_has_every_finding(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "ask_broker", lambda url: (FIGURES, 0.001))
    assert main(["doctor", "--model", str(model), "--url", "tcp://h:1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["model"]["verdict"] == "ok"
    assert found["broker"]["verdict"] == "warn"  # it does not tell its version
    assert found["broker"]["advice"]


def test_a_model_that_was_not_fetched_says_how_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--home", str(tmp_path)]) == 0
    assert "kvcache models pull smollm2" in capsys.readouterr().out


def test_a_model_that_nobody_knows_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--home", str(tmp_path), "--model", "no model at all"]) == 1
    assert "fail model" in capsys.readouterr().out


class TestProbes:
    """Of this machine as it is."""

    @pytest.fixture(autouse=True)
    def facts(self) -> None:
        """None are made up."""

    def test_a_taken_port_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            monkeypatch.setattr(probes, "GATEWAY_PORT", port)
            assert probes.taken_ports()[port] is True
        assert probes.taken_ports()[port] is False

    def test_a_unix_socket_is_taken_while_somebody_listens(self, tmp_path: Path) -> None:
        path = tmp_path / "bus.0"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            assert probes.is_taken(f"ipc://{path}") is False  # left behind by one that ended
            listener.listen()
            assert probes.is_taken(f"ipc://{path}") is True

    @pytest.mark.parametrize("endpoint", ["tcp://203.0.113.1:80", "tcp://[::2]:80", "ipc:///no/such/bus.0"])
    def test_what_cannot_be_listened_at_is_not_taken(self, endpoint: str) -> None:
        assert probes.is_taken(endpoint) is False

    def test_memory_and_disk_are_there(self, tmp_path: Path) -> None:
        assert probes.free_memory() > 0
        assert probes.free_disk(tmp_path / "not" / "yet") > 0

    def test_a_control_groups_limit_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(probes, "_CGROUP", tmp_path)
        (tmp_path / "memory.max").write_text("5000\n")
        (tmp_path / "memory.current").write_text("3000\n")
        assert probes.free_memory() == 2000
        (tmp_path / "memory.stat").write_text("anon 1\nactive_file 200\ninactive_file 300\n")
        assert probes.free_memory() == 2500
        (tmp_path / "memory.max").write_text("max\n")
        assert probes.free_memory() > 5000

    def test_a_child_that_says_nothing_of_use_is_a_failure_that_quotes_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/echo")
        finding = probes.examine(None, load=False)
        assert isinstance(finding, Finding)
        assert finding.verdict is Verdict.FAIL

    def test_a_round_trip_over_real_sockets_is_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probes, "BROKER_S", 50.0)
        finding = probes.loopback()
        assert finding.verdict is Verdict.OK, finding
        assert finding.found.endswith(" ms")
