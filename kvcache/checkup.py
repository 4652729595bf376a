"""What `kvcache doctor` makes of what it finds: each fact judged, with what to do about it. Core: facts come in."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bus.stats import ClusterStats

GIB = 1 << 30
TESTED_PYTHONS = ((3, 11), (3, 13))
USER_EXTRAS = ("gateway", "openvino")
CLOCK_STEP_S = 0.5


class Verdict(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report. advice: what to do, empty if nothing."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


class ExaminedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose files are whole and of a family that is served. is_loaded: whether it was also loaded."""

    dtype: str
    weights_bytes: int
    max_model_len: int
    is_loaded: bool = False


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """What only a process with torch can tell. gpus, openvino_devices: by their names.

    openvino: its version, empty if it is not installed; model_error: why the model asked about cannot be served.
    """

    torch: str
    gpus: tuple[str, ...] = ()
    openvino: str = ""
    openvino_devices: tuple[str, ...] = ()
    openvino_error: str = ""
    model: ExaminedModel | None = None
    model_error: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, verdict=Verdict.OK, found=found)


def warn(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, verdict=Verdict.WARN, found=found, advice=advice)


def fail(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, verdict=Verdict.FAIL, found=found, advice=advice)


def judge_python(version: tuple[int, int, int], system: str) -> list[Finding]:
    low, high = TESTED_PYTHONS
    text = ".".join(map(str, version))
    if version[:2] < low:
        python = fail("python", text, f"install Python {low[0]}.{low[1]} or newer")
    elif version[:2] > high:
        python = warn("python", f"{text}, newer than what was tested", f"{high[0]}.{high[1]} is the newest tested")
    else:
        python = ok("python", text)
    advice = "workers and brokers are tested on Linux only"
    return [python, ok("system", system) if system == "Linux" else warn("system", system, advice)]


def judge_packages(requirements: Sequence[str], installed: Callable[[str], str | None]) -> list[Finding]:
    """requirements: as the package states them; installed: the version of a package, None if it is not there."""
    parsed = [Requirement(text) for text in requirements]
    found = []
    missing = _missing((it for it in parsed if not it.marker or it.marker.evaluate({"extra": ""})), installed)
    if missing:
        found.append(fail("packages", "; ".join(missing), "run scripts/setup.sh, or: pip install -e ."))
    else:
        found.append(ok("packages", ", ".join(f"{it} {installed(it)}" for it in ("torch", "transformers", "pyzmq"))))
    for extra in USER_EXTRAS:
        wanted = [it for it in parsed if it.marker and _is_of(it, extra)]
        missing = _missing(wanted, installed)
        names = ", ".join(f"{it.name} {installed(it.name)}" for it in wanted)
        advice = f"{_WITHOUT[extra]}; pip install -e '.[{extra}]'"
        found.append(warn(extra, "; ".join(missing), advice) if missing else ok(extra, names))
    return found


_WITHOUT = {
    "gateway": "kvcache serve and the dashboard need it",
    "openvino": "without it models run on torch, slower on a CPU",
}


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return bool(marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}))


def _missing(requirements: Iterable[Requirement], installed: Callable[[str], str | None]) -> list[str]:
    """In words, what is not there or of another version."""
    words = []
    for it in requirements:
        version = installed(canonicalize_name(it.name))
        if version is None:
            words.append(f"{it.name} is missing")
        elif not it.specifier.contains(version, prereleases=True):
            words.append(f"{it.name} {version} is not {it.specifier}")
    return words


def judge_machine(cores: int, load: float, memory_bytes: int, disk_bytes: int, home: str) -> list[Finding]:
    """Free memory and disk, in bytes, `disk_bytes` where models are kept; load: over the last minute."""
    busy = f"{cores} {'core' if cores == 1 else 'cores'}, load {load:.1f}"
    if load > 2 * cores:
        cpu = warn("cores", busy, "other programs are busy; what you measure now will be slow")
    else:
        cpu = ok("cores", busy)
    memory = f"{memory_bytes / GIB:.1f} GiB free"
    if memory_bytes < GIB // 2:
        room = fail(
            "memory", memory, "a worker needs its model's weights and --kv-cache-memory-bytes (1GiB unless told)"
        )
    elif memory_bytes < 2 * GIB:
        room = warn("memory", memory, "give workers less: --kv-cache-memory-bytes 256MiB")
    else:
        room = ok("memory", memory)
    disk = f"{disk_bytes / GIB:.1f} GiB free for {home}"
    if disk_bytes < GIB // 2:
        space = fail("disk", disk, "make room, or name another folder: KVCACHE_HOME")
    elif disk_bytes < 4 * GIB:
        space = warn("disk", disk, "models and their graphs take gigabytes; KVCACHE_HOME names another folder")
    else:
        space = ok("disk", disk)
    return [cpu, room, space]


def judge_examination(result: Examination) -> Finding:
    """What models would be computed on."""
    if result.gpus:
        return ok("devices", f"torch {result.torch} on {', '.join(result.gpus)}")
    if result.openvino_error:
        return warn(
            "devices", f"OpenVINO cannot be used: {result.openvino_error}", "models run on torch; reinstall openvino"
        )
    if result.openvino_devices:
        return ok("devices", f"no GPU for torch {result.torch}; OpenVINO on {', '.join(result.openvino_devices)}")
    return warn("devices", f"no GPU for torch {result.torch}, no OpenVINO", "pip install -e '.[openvino]' is faster")


def judge_model(name: str, result: Examination) -> Finding:
    """A model that is here."""
    if result.model is None:
        return fail("model", f"{name} cannot be served: {result.model_error}", "choose another, or fetch it again")
    model = result.model
    done = "loads" if model.is_loaded else "files are whole (--load also loads it)"
    size = f"{model.weights_bytes / GIB:.2f} GiB in {model.dtype}, up to {model.max_model_len} tokens"
    return ok("model", f"{name}: {done}; {size}")


def judge_ports(taken: Mapping[int, bool], *, has_broker: bool) -> list[Finding]:
    """taken: by port, those that a broker and a gateway use unless told otherwise, the gateway's last."""
    *broker, gateway = taken
    used = [port for port in broker if taken[port]]
    span = f"{broker[0]} to {broker[-1]}"
    if has_broker:
        found = [ok("ports", f"{span}: a broker runs here")]
    elif used:
        advice = "another program has them; start a broker elsewhere: kvcache up --url tcp://127.0.0.1:PORT"
        found = [warn("ports", f"taken: {', '.join(map(str, used))}", advice)]
    else:
        found = [ok("ports", f"{span} are free for a broker")]
    if taken[gateway]:
        advice = "a gateway may run here already; else choose another: kvcache serve MODEL --port PORT"
        return [*found, warn("ports", f"{gateway} is taken", advice)]
    return [*found, ok("ports", f"{gateway} is free for a gateway")]


def judge_clock(now: float, installed_at: float, step_s: float, shown: str) -> Finding:
    """Unix seconds; step_s: how far the wall clock left the steady one while we ran."""
    advice = "set it, and let NTP keep it: brokers number writes by it"
    if now < installed_at:
        return fail("clock", f"{shown}, which is before kvcache was installed", advice)
    if abs(step_s) > CLOCK_STEP_S:
        return warn("clock", f"{shown}; it was set by {step_s:+.1f} s while this ran", advice)
    return ok("clock", shown)


def judge_broker(url: str, figures: ClusterStats, round_trip_s: float, version: str) -> list[Finding]:
    """A broker that answered."""
    broker = figures.broker
    said = f"{url} answers in {round_trip_s * 1000:.1f} ms, {broker.state}, policy {broker.policy}"
    if broker.version != version:
        theirs = broker.version or "a version that it does not tell"
        advice = "their protocols agree; still, run the same version everywhere"
        found = [warn("broker", f"{said}; it runs {theirs}, here is {version}", advice)]
    else:
        found = [ok("broker", f"{said}, version {version}")]
    ready = sum(view.status == "ready" for view in figures.workers)
    workers = f"{ready} of {len(figures.workers)} ready"
    if not ready:
        return [*found, warn("workers", workers, "nobody serves; start one: kvcache worker")]
    return [*found, ok("workers", workers)]
