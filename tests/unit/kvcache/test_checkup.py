"""How each fact is judged, and that whatever is wrong comes with what to do."""

from __future__ import annotations

import pytest

from bus.stats import BrokerStats, ClusterStats, WorkerView
from kvcache.checkup import (
    GIB,
    Examination,
    ExaminedModel,
    Finding,
    Verdict,
    judge_broker,
    judge_clock,
    judge_examination,
    judge_machine,
    judge_model,
    judge_packages,
    judge_ports,
    judge_python,
)

REQUIREMENTS = (
    "torch>=2.6",
    "transformers<6,>=5.19",
    "pyzmq<28,>=27",
    'starlette<2,>=1.0; extra == "gateway"',
    'openvino<2026.5,>=2026.4; extra == "openvino"',
    'pytest>=8.4; extra == "test"',
)
VERSIONS = {
    "torch": "2.13.0+cpu", "transformers": "5.23.0", "pyzmq": "27.1.0", "starlette": "1.10.0", "openvino": "2026.4.1"
}  # fmt: skip
PORTS = {5555: False, 5556: False, 8000: False}
MODEL = ExaminedModel(dtype="float32", weights_bytes=GIB, max_model_len=2048)


def verdicts(findings: list[Finding]) -> dict[str, str]:
    """By check; all that is not well must say what to do."""
    assert all(bool(it.advice) is (it.verdict is not Verdict.OK) for it in findings)
    return {it.check: it.verdict.value for it in findings}


def words(findings: list[Finding]) -> str:
    return "\n".join(f"{it.found} {it.advice}" for it in findings)


@pytest.mark.parametrize(
    ("version", "verdict"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 2), "ok"), ((3, 15, 0), "warn")]
)
def test_pythons_are_as_good_as_they_were_tested(version: tuple[int, int, int], verdict: str) -> None:
    assert verdicts(judge_python(version, "Linux")) == {"python": verdict, "system": "ok"}


def test_another_system_is_a_warning() -> None:
    assert verdicts(judge_python((3, 12, 0), "Darwin"))["system"] == "warn"


def test_packages_that_are_there_are_named_with_their_versions() -> None:
    found = judge_packages(REQUIREMENTS, VERSIONS.get)
    assert verdicts(found) == {"packages": "ok", "gateway": "ok", "openvino": "ok"}
    assert "torch 2.13.0+cpu" in words(found)


def test_a_package_that_is_missing_or_of_the_wrong_version_is_named() -> None:
    found = judge_packages(REQUIREMENTS, (VERSIONS | {"pyzmq": "26.0"}).get)
    assert verdicts(found)["packages"] == "fail"
    assert "pyzmq 26.0 is not <28,>=27" in words(found)
    without = {name: version for name, version in VERSIONS.items() if name not in {"torch", "starlette"}}
    found = judge_packages(REQUIREMENTS, without.get)
    assert verdicts(found) == {"packages": "fail", "gateway": "warn", "openvino": "ok"}
    assert "torch is missing" in words(found)
    assert "pip install -e '.[gateway]'" in words(found)


@pytest.mark.parametrize(
    ("load", "memory", "disk", "expected"),
    [
        (1.0, 8 * GIB, 50 * GIB, ("ok", "ok", "ok")),
        (9.0, GIB, 2 * GIB, ("warn", "warn", "warn")),
        (1.0, GIB // 4, 0, ("ok", "fail", "fail")),
    ],
)
def test_a_machine_needs_room(load: float, memory: int, disk: int, expected: tuple[str, str, str]) -> None:
    found = verdicts(judge_machine(4, load, memory, disk, "/models"))
    assert (found["cores"], found["memory"], found["disk"]) == expected


@pytest.mark.parametrize(
    ("result", "verdict", "text"),
    [
        (Examination(torch="2.13", gpus=("H200",)), "ok", "on H200"),
        (Examination(torch="2.13", openvino="2026.4", openvino_devices=("CPU",)), "ok", "OpenVINO on CPU"),
        (Examination(torch="2.13", openvino_error="no such symbol"), "warn", "no such symbol"),
        (Examination(torch="2.13"), "warn", "no OpenVINO"),
    ],
)
def test_models_run_on_the_best_there_is(result: Examination, verdict: str, text: str) -> None:
    finding = judge_examination(result)
    assert verdicts([finding]) == {"devices": verdict}
    assert text in finding.found


def test_a_model_is_served_or_says_why_not() -> None:
    good = judge_model("tiny", Examination(torch="2.13", model=MODEL))
    assert (good.verdict, "1.00 GiB in float32" in good.found) == (Verdict.OK, True)
    bad = judge_model("tiny", Examination(torch="2.13", model_error="config.json is missing"))
    assert verdicts([bad]) == {"model": "fail"}
    assert "config.json is missing" in bad.found


def test_ports_are_free_or_a_brokers_or_in_somebodys_way() -> None:
    assert [it.verdict for it in judge_ports(PORTS, has_broker=False)] == [Verdict.OK, Verdict.OK]
    used = PORTS | {5556: True}
    assert "a broker runs here" in words(judge_ports(used, has_broker=True))
    taken = judge_ports(used | {8000: True}, has_broker=False)
    assert [it.verdict for it in taken] == [Verdict.WARN, Verdict.WARN]
    assert "taken: 5556" in words(taken)
    assert "8000 is taken" in words(taken)


@pytest.mark.parametrize(("now", "step_s", "verdict"), [(200.0, 0.0, "ok"), (50.0, 0.0, "fail"), (200.0, -3.0, "warn")])
def test_a_clock_that_cannot_be_right_is_noticed(now: float, step_s: float, verdict: str) -> None:
    assert verdicts([judge_clock(now, 100.0, step_s, "then")]) == {"clock": verdict}


@pytest.mark.parametrize(
    ("version", "status", "expected"),
    [("1.0", "ready", ("ok", "ok")), ("0.9", "ready", ("warn", "ok")), ("", "loading", ("warn", "warn"))],
)
def test_a_broker_of_another_version_or_without_workers_is_a_warning(
    version: str, status: str, expected: tuple[str, str]
) -> None:
    view = WorkerView(
        worker_id="w", status=status, weight=100, share=1.0, inflight=0, dispatched=0, last_heard_s=0.0, lease_s=1.0
    )
    broker = BrokerStats(incarnation=1, state="serving", policy="prefix", version=version)
    figures = ClusterStats(healthy=True, broker=broker, workers=(view,))
    found = verdicts(judge_broker("tcp://h:1", figures, 0.001, "1.0"))
    assert (found["broker"], found["workers"]) == expected
