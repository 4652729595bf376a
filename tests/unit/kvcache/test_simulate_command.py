"""`kvcache simulate`: tables, figures and plots from one command; whatever is wrong is said in one line."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from bus.errors import BadArgument
from kvcache.plots import distribution, plot
from kvcache.simulate import main as command
from kvcache.simulate.costs import Costs, read_costs
from kvcache.simulate.main import main
from kvcache.simulate.options import parse_change
from kvcache.simulate.simulation import Change


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Ten conversations of three turns; each goes on where it was."""
    lines = [
        {
            "timestamp": 500 * (10 * turn + who),
            "input_length": 512 * (turn + 2),
            "output_length": 20,
            "hash_ids": [0, *range(10 * who + 1, 10 * who + turn + 2)],
        }
        for turn in range(3)
        for who in range(10)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(msgspec.json.encode(line).decode() + "\n" for line in lines))
    return str(path)


def test_figures_are_shown_and_written(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    code = main([trace, "--workers", "2", "--policy", "prefix,random", "--seeds", "2", "--json", str(out)])
    assert code == 0
    shown = capsys.readouterr().out
    assert "30 requests, 2 seeds" in shown
    (scene,) = msgspec.json.decode(out.read_bytes())
    assert [report["policy"] for report in scene["policies"]] == ["prefix", "random"]
    prefix, random = (report["mean"] for report in scene["policies"])
    assert len(scene["policies"][0]["runs"]) == 2
    assert prefix["hit"] == pytest.approx(scene["optimum"], abs=0.05)
    assert random["hit"] < prefix["hit"]
    assert f"{prefix['hit']:.3f}" in shown


def test_a_sweep_draws_what_it_varied(trace: str, tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    assert main([trace, "--policy", "prefix,hash_2", "--sweep", "workers=1,2,4", "--plots", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"hits.svg", "ttft.svg", "sweep_ttft.svg", "sweep_hits.svg"}
    for path in folder.iterdir():
        assert ET.fromstring(path.read_text()).tag.endswith("svg")


def test_a_larger_cluster_has_as_many_more_users_who_find_as_much(trace: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = ["--workers", "2", "--sweep", "scale=1,5", "--until", "1000000", "--json", str(figures)]
    assert main([trace, *flags]) == 0
    small, large = msgspec.json.decode(figures.read_bytes())
    assert (small["at"], large["at"]) == (1.0, 5.0)
    assert large["optimum"] == pytest.approx(small["optimum"])


def test_only_the_beginning_of_a_trace_is_replayed(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace, "--until", "0"]) == 0
    assert ": 1 requests" in capsys.readouterr().out


def test_hits_after_a_change_are_told(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace, "--change", "5:restart:blind", "--change", "6:slow:1:3", "--order", "shortest"]) == 0
    assert "hit after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name a trace"),
        (["nowhere.jsonl"], "cannot be read"),
        (["synthetic:poems"], "use one of agents"),
        (["TRACE", "--policy", "best"], "there is no policy 'best'; use one or more of random"),
        (["TRACE", "--policy", ","], "at least one policy"),
        (["TRACE", "--workers", "0"], "at least one worker"),
        (["TRACE", "--seeds", "0"], "--seeds"),
        (["TRACE", "--speed", "0"], "--speed"),
        (["TRACE", "--link", "-3"], "--link is tokens a second"),
        (["TRACE", "--event-loss", "2"], "from 0 to 1"),
        (["TRACE", "--costs", "nowhere"], "cannot be read"),
        (["TRACE", "--sweep", "policy=1"], "OPTION=A,B"),
        (["TRACE", "--sweep", "workers=1,x"], "'x' is not a number"),
        (["TRACE", "--sweep", "workers=0"], "above 0"),
        (["TRACE", "--sweep", "scale=0.5"], "a scale is from 1"),
        (["TRACE", "--scale", "70000"], "a scale is from 1 to 65535, not 70000"),
        (["TRACE", "--change", "soon:restart"], "'soon' is not a number"),
        (["TRACE", "--change", "5:explode"], "is none of"),
        (["TRACE", "--change", "5:remove:8"], "not a worker from 0 to 7"),
        (["TRACE", "--change", "5:slow:1:0"], "factor must be above 0"),
        (["TRACE", "--change", "nan:add"], "must be 0 or more"),
    ],
)
def test_wrong_usage_is_one_line_and_a_code(
    trace: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([trace if flag == "TRACE" else flag for flag in flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_changes_are_read() -> None:
    assert parse_change("1.5:add", 2) == Change(1.5, "add")
    assert parse_change("2:remove:1", 2) == Change(2.0, "remove", 1)
    assert parse_change("2:slow:0:2.5", 2) == Change(2.0, "slow", 0, 2.5)
    assert parse_change("3:restart", 2) == Change(3.0, "restart")
    assert parse_change("3:restart:blind", 2) == Change(3.0, "restart", replay=False)


def test_a_file_that_cannot_be_written_is_named(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([trace, "--json", str(tmp_path / "no" / "folder.json")]) == 1
    assert "folder.json: No such file" in capsys.readouterr().err


def test_an_interrupt_ends_it_without_a_traceback(
    trace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "simulate", interrupt)
    assert main([trace]) == 130
    assert capsys.readouterr().err == "simulate: interrupted\n"


def test_costs_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(msgspec.json.encode(Costs(token_s=0.5, pull_s=None)))
    assert read_costs(path) == Costs(token_s=0.5, pull_s=None)
    for wrong, message in (
        (b"{", "no file of costs"),
        (b'{"tokens": 1}', "unknown field"),
        (b'{"token_s": 0}', "above 0"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(BadArgument, match=message):
            read_costs(path)


def test_a_distribution_says_how_many_are_above() -> None:
    points = distribution([float(value) for value in range(1, 1001)])
    assert points[0] == (51.0, 0.95)
    assert points[-1][0] == 1000.0
    assert points[-1][1] == pytest.approx(0.001)
    assert all(share == pytest.approx((1001.0 - value) / 1000.0, abs=0.002) for value, share in points)


def test_a_plot_of_nothing_or_of_one_point_is_still_a_plot() -> None:
    for series in ({}, {"a<b": [(1.0, 0.0)]}, {"c": [(3.0, 5.0), (3.0, 5.0)]}):
        for log in (True, False):
            assert ET.fromstring(plot("t & u", "x", "y", series, log_x=log, log_y=log)) is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--check", "0"), "--check must be more"),
        (("--divide", "0"), "--divide must be more"),
        (("--seeds", "0"), "--seeds must be more"),
    ],
)
def test_numbers_that_are_too_small_are_refused(
    trace: str, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([trace, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_trace_that_the_real_model_cannot_take_is_refused_before_any_worker_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    line = {"timestamp": 0, "input_length": 51_200, "output_length": 1, "hash_ids": list(range(100))}
    path.write_bytes(msgspec.json.encode(line) + b"\n")
    assert main([str(path), "--check", "10", "--divide", "2"]) == 2
    assert "--divide by more than 2" in capsys.readouterr().err
