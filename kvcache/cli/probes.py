"""Where `kvcache doctor` gets its facts: this process, its machine, a child with torch, sockets."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

import kvcache
from bus.endpoints import DEFAULT_URL, NUM_PORTS
from bus.errors import KVCacheError
from bus.stats import ClusterStats
from kvcache.checkup import Examination, Finding, fail, ok
from kvcache.models import ModelSource

EXAMINE_S = 600.0
BROKER_S = 5.0
NUM_ROUND_TRIPS = 5
GATEWAY_PORT = 8000
_CGROUP = Path("/sys/fs/cgroup")


def installed(name: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def load() -> float:
    """How many wanted a core, on average over the last minute."""
    return os.getloadavg()[0]


def free_memory() -> int:
    """Bytes that could be had now, within the limit of our control group."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free
    return min(free, max(0, limit - used + _reclaimable()))


def _reclaimable() -> int:
    """Bytes of files that our control group counts as used, and gives up as soon as memory is wanted."""
    try:
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(counts["active_file"]) + int(counts["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0


def free_disk(home: Path) -> int:
    """Bytes free where models are, or will be, kept; 0 if we may not write there."""
    # Not `Path.exists`, which raises below a folder that we may not enter.
    folder = next(path for path in (home, *home.parents) if os.path.exists(path))
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def installed_at() -> float:
    """When this program was put here, in Unix seconds."""
    return Path(kvcache.__file__).stat().st_mtime


def taken_ports() -> dict[int, bool]:
    """Whether each port that a broker and a gateway use by default is taken, the gateway's last."""
    first = int(DEFAULT_URL.rpartition(":")[2])
    ports = (*range(first, first + NUM_PORTS), GATEWAY_PORT)
    return {port: is_taken(f"tcp://127.0.0.1:{port}") for port in ports}


def is_taken(endpoint: str) -> bool:
    """Whether somebody listens at `tcp://HOST:PORT` or `ipc:///PATH` of this machine."""
    scheme, _, place = endpoint.partition("://")
    host, _, port = place.rpartition(":")
    is_ipc = scheme == "ipc"
    family = socket.AF_UNIX if is_ipc else socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as those who will listen there do
        try:
            if is_ipc:
                return probe.connect_ex(place) == 0
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def examine(source: ModelSource | None, *, load: bool) -> Examination | Finding:
    """What a child with torch says of it, of devices, and of a model that is here; a finding if it cannot."""
    command = [sys.executable, "-m", "workers.examine", *(["--load"] if load else [])]
    command += [source.name, str(source.path)] if source else []
    advice = "reinstall torch and transformers: scripts/setup.sh"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=EXAMINE_S, check=False)
    except subprocess.TimeoutExpired:
        return fail("devices", f"torch was not loaded within {EXAMINE_S:.0f} s", advice)
    lines = done.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1] if lines else "", type=Examination)
    except msgspec.MsgspecError:
        said = (done.stderr.splitlines() or ["nothing"])[-1]
        return fail("devices", f"a process with torch ended with {done.returncode} and said: {said}", advice)


def ask_broker(url: str) -> tuple[ClusterStats, float] | KVCacheError:
    """A broker's figures and the time of a round trip, or why there are none."""
    try:
        with kvcache.Client(url, timeout=BROKER_S) as client:
            client.stats()  # connects
            began = time.monotonic()
            return client.stats(), time.monotonic() - began
    except KVCacheError as error:
        return error


def loopback() -> Finding:
    """A broker of our own on free ports, asked over real sockets."""
    from kvcache.local import broker_process  # with the client, which `kvcache --help` must not wait for

    advice = "see what may forbid local sockets or processes: a firewall, a sandbox, a full process table"
    try:
        with broker_process() as url, kvcache.Client(url, timeout=BROKER_S) as client:
            client.stats()
            times = []
            for _ in range(NUM_ROUND_TRIPS):
                began = time.monotonic()
                client.stats()
                times.append(time.monotonic() - began)
    except (KVCacheError, RuntimeError, OSError) as error:
        return fail("loopback", f"a broker of our own did not answer: {error}", advice)
    return ok("loopback", f"a broker of our own answers in {sorted(times)[NUM_ROUND_TRIPS // 2] * 1000:.1f} ms")
