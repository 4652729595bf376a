"""scripts/services.sh: background processes with pid files, as scripts/local_dev.sh uses it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
STUBBORN = """bash -c 'trap "" TERM; echo deaf; while true; do sleep 0.05; done'"""


class Shell:
    """Runs snippets with services.sh loaded, over one run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self, snippet: str, grace_s: int = 5) -> str:
        script = f"set -euo pipefail; source scripts/environment.sh; source scripts/services.sh\n{snippet}"
        env = os.environ | {"KVCACHE_RUN_DIR": str(self.run_dir), "KVCACHE_GRACE_S": str(grace_s)}
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def pid_file(self, name: str) -> Path:
        return self.run_dir / f"{name}.pid"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "run")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_spawned_service_outlives_its_shell_and_is_found_by_the_next(shell: Shell) -> None:
    shell("spawn broker sleep 60")
    pid = int(shell("running_pid broker"))
    assert is_alive(pid)
    assert shell("running_services") == "broker"
    shell("terminate broker")
    assert not is_alive(pid)
    assert shell("running_services") == ""
    assert not shell.pid_file("broker").exists()


def test_service_that_runs_is_not_started_twice(shell: Shell) -> None:
    shell("spawn broker sleep 60; spawn broker sleep 60")
    pid = shell("running_pid broker")
    shell("spawn broker sleep 60")
    assert shell("running_pid broker") == pid
    shell("terminate broker")


def test_output_goes_to_the_log(shell: Shell) -> None:
    shell("spawn talker bash -c 'echo out; echo err >&2; exec sleep 60'")
    log = shell("while (($(wc -l <$(log_file talker)) < 2)); do sleep 0.02; done; cat $(log_file talker)")
    assert sorted(log.splitlines()) == ["err", "out"]
    shell("terminate talker")


def test_pid_file_of_another_process_with_that_id_is_stale(shell: Shell) -> None:
    shell("spawn broker sleep 60")
    file = shell.pid_file("broker")
    pid = int(file.read_text().splitlines()[0])
    file.write_text(f"{pid}\nMon Jan  1 00:00:00 2001\n")
    assert shell("running_pid broker; terminate broker") == ""
    assert is_alive(pid), "it was not ours to kill"
    assert not file.exists()
    os.kill(pid, 15)


@pytest.mark.parametrize("content", ["", "garbage\n", "999999999\nMon Jan  1 00:00:00 2001\n", "1\n"])
def test_broken_or_outdated_pid_file_is_removed(shell: Shell, content: str) -> None:
    shell.run_dir.mkdir()
    shell.pid_file("broker").write_text(content)
    assert shell("running_services") == ""
    assert not shell.pid_file("broker").exists()


def test_process_that_ignores_sigterm_is_killed_after_the_grace(shell: Shell) -> None:
    shell(f"spawn deaf {STUBBORN}; until grep -q deaf $(log_file deaf); do sleep 0.02; done")
    pid = int(shell("running_pid deaf"))
    shell("terminate deaf", grace_s=1)
    assert not is_alive(pid)


def test_workers_are_listed_by_number(shell: Shell) -> None:
    shell("for n in 10 2 1; do spawn worker-$n sleep 60; done")
    assert shell("running_services").split() == ["worker-1", "worker-2", "worker-10"]
    shell("terminate worker-1 worker-2 worker-10")
