"""scripts/local_dev.sh from start to stop, with real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvcache.local import free_url

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
BLOCK = 32


class LocalDev:
    """The script with a run folder and ports of its own."""

    def __init__(self, run_dir: Path, model: Path) -> None:
        self.run_dir = run_dir
        self.env = os.environ | {
            "KVCACHE_RUN_DIR": str(run_dir),
            "KVCACHE_PORT": free_url().rpartition(":")[2],
            "KVCACHE_PYTHON": sys.executable,
            "KVCACHE_KV_BYTES": "64MiB",
            "KVCACHE_MODEL": str(model),
        }

    def __call__(self, *arguments: str, code: int = 0, **env: str) -> str:
        """Both outputs of one command, which must end with `code`."""
        command = [str(ROOT / "scripts" / "local_dev.sh"), *arguments]
        done = subprocess.run(
            command, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    @property
    def services(self) -> list[str]:
        return sorted(file.stem for file in self.run_dir.glob("*.pid"))


@pytest.fixture
def local_dev(tmp_path: Path, tiny_model: Path) -> LocalDev:
    return LocalDev(tmp_path / "run", tiny_model)


def test_start_scale_restart_and_stop(local_dev: LocalDev) -> None:
    try:
        assert "1 workers serve" in local_dev("start", "1")
        pids = {file.stem: file.read_text() for file in local_dev.run_dir.glob("*.pid")}
        assert "started" not in local_dev("start", "1"), "what runs is not started again"

        local_dev("scale", "2")
        assert local_dev.services == ["broker", "worker-1", "worker-2"]
        local_dev("scale", "1")
        assert local_dev.services == ["broker", "worker-1"]
        assert {file.stem: file.read_text() for file in local_dev.run_dir.glob("*.pid")} == pids

        status = local_dev("status")
        assert "broker" in status
        assert "worker-1  ready" in status

        local_dev("restart")
        assert local_dev.services == ["broker", "worker-1"]
        assert {file.stem: file.read_text() for file in local_dev.run_dir.glob("*.pid")} != pids
    finally:
        stopped = local_dev("stop")
    assert stopped.splitlines()[-2:] == ["stopped worker-1", "stopped broker"]
    assert "nothing is running" in local_dev("status", code=3)


def test_worker_that_cannot_start_shows_its_log(local_dev: LocalDev) -> None:
    try:
        shown = local_dev("start", "1", code=1, KVCACHE_KV_BYTES="lots")
        assert "worker-1 ended while starting" in shown
        assert "kv-cache-memory-bytes" in shown, "the log says why"
    finally:
        local_dev("stop")


def test_demo_shows_what_the_second_turn_did_not_compute(local_dev: LocalDev) -> None:
    *shown, last = local_dev("demo", "--json").splitlines()
    first, second = json.loads(last)["turns"]
    assert first["cached_tokens"] == 0
    full_blocks = first["prompt_tokens"] // BLOCK * BLOCK
    assert full_blocks <= second["cached_tokens"] < second["prompt_tokens"]
    assert second["worker"] == first["worker"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown if line.startswith("│")]
    assert [row[:4] for row in rows] == [
        [str(number), turn["worker"], str(turn["prompt_tokens"]), str(turn["cached_tokens"])]
        for number, turn in enumerate((first, second), 1)
    ]
    assert f"why {second['worker']}: {second['reason']}" in shown
    assert local_dev.services == [], "its services were its own"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("nosuch",), 2, "unknown command 'nosuch'"),
        (("start", "many"), 2, "must be a whole number, not 'many'"),
        (("scale", "2"), 1, "nothing is running; start it"),
        (("scale",), 2, "must be a whole number"),
        (("logs",), 1, "no logs"),
    ],
)
def test_wrong_use_is_told(local_dev: LocalDev, arguments: tuple[str, ...], code: int, complaint: str) -> None:
    assert complaint in local_dev(*arguments, code=code)
    assert local_dev.services == []


def test_port_in_use_is_named(local_dev: LocalDev) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(local_dev.env["KVCACHE_PORT"]) + 3))
        taken.listen()
        assert f"port {taken.getsockname()[1]} cannot be used" in local_dev("start", code=1)
