"""The engine benchmark's peers: the contract, the process around it, environments, and what is made of the figures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.bench import engine
from kvcache.bench.engine_goals import GENAI, OPENVINO, TORCH, WARM, Figures, compare
from kvcache.bench.peers.environments import PeerUnavailable, python_of
from kvcache.bench.peers.process import PeerProcess

SCRIPT = """
import os, sys
from contract import serve

class Fake:
    extras = frozenset({"colour"})
    def load(self, model, threads, dtype):
        print("what a library says on stdout")
        return {"engine": "fake", "dtype": dtype}
    def run(self, prompts, max_tokens):
        if max_tokens == 0:
            raise ValueError("no tokens\\nsecond line")
        if max_tokens == 13:
            sys.stderr.write("out of luck")
            os._exit(3)
        return len(prompts) * max_tokens
    def colour(self): return {"colour": "green"}

serve(Fake())
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[PeerProcess]:
    script = tmp_path / "run_fake.py"
    script.write_text(SCRIPT)
    process = PeerProcess([sys.executable, str(script)], {"PYTHONPATH": str(engine.PEERS_FOLDER)})
    yield process
    process.close()


def test_an_engine_answers_line_by_line_whatever_its_libraries_print(peer: PeerProcess) -> None:
    with peer.awake():
        assert peer.ask(do="load", model="m", threads=1, dtype="float32") == {"engine": "fake", "dtype": "float32"}
        answer = peer.ask(do="run", prompts=[[1], [2]], max_tokens=3)
        assert (answer["tokens"], answer["seconds"] >= 0) == (6, True)
        assert peer.ask(do="colour") == {"colour": "green"}
        assert peer.ask(do="memory")["peak_bytes"] > 1 << 20


def test_what_an_engine_raises_is_told_and_it_goes_on(peer: PeerProcess) -> None:
    with pytest.raises(PeerUnavailable, match=r"ValueError: no tokens$"):
        peer.ask(do="run", prompts=[], max_tokens=0)
    with pytest.raises(PeerUnavailable, match="nobody knows how to do 'dance'"):
        peer.ask(do="dance")
    assert peer.ask(do="colour") == {"colour": "green"}


def test_an_engine_that_ends_is_told_with_its_last_words(peer: PeerProcess) -> None:
    with pytest.raises(PeerUnavailable, match="status 3: out of luck"):
        peer.ask(do="run", prompts=[[1]], max_tokens=13)
    with pytest.raises(PeerUnavailable, match="status 3"):
        peer.ask(do="colour")


def test_an_engine_that_was_stopped_wakes_for_its_turn(peer: PeerProcess) -> None:
    for _ in range(2):
        with peer.awake():
            assert peer.ask(do="colour") == {"colour": "green"}


def test_an_environment_is_not_made_unless_asked_for_and_half_of_one_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "bench" / "vllm-cpu" / "bin").mkdir(parents=True)
    (tmp_path / "bench" / "vllm-cpu" / "bin" / "python").touch()
    with pytest.raises(PeerUnavailable, match="--install makes"):
        python_of("vllm-cpu", tmp_path, install=False, progress=lambda what: None)


def test_goals_are_judged_by_the_rounds_that_both_engines_had() -> None:
    figures = Figures()
    for value, theirs in ((100.0, 100.0), (90.0, 100.0), (98.0, 100.0)):
        figures.add("decode, 8 streams", OPENVINO, value)
        figures.add("decode, 8 streams", GENAI, theirs)
    rows = {row.name: row for row in compare(figures)}
    goal = rows[f"decode, 8 streams: {OPENVINO} / {GENAI}"]
    assert (goal.ratio, goal.goal, goal.met) == (0.98, ">= 0.95x", True)
    assert rows[f"decode, 8 streams: {GENAI}"].value == 100.0
    assert not any("transformers" in name for name in rows)


def test_warm_first_tokens_are_held_against_the_best_of_the_peers() -> None:
    figures = Figures()
    for peer, value in ((GENAI, 24.0), ("vLLM CPU", 82.0), (OPENVINO, 30.0)):
        figures.add(WARM, peer, value)
    (goal,) = [row for row in compare(figures) if row.goal]
    assert (goal.reference, goal.ratio, goal.met) == (GENAI, 1.25, False)


def test_shares_of_the_machine_follow_from_what_it_can_do() -> None:
    figures = Figures()
    figures.add("decode, 8 streams", TORCH, 80.0)
    figures.add("prefill, 512 tokens", TORCH, 1000.0)
    figures.ceilings = {"bytes_per_s": 100.0, "flops_per_s": 8e6, "weight_bytes": 5.0, "num_weights": 1000.0}
    rows = {row.name: row.value for row in compare(figures)}
    assert rows[f"share of memory bandwidth, decode, 8 streams: {TORCH}"] == pytest.approx(50.0)
    assert rows[f"share of matrix products, prefill, 512 tokens: {TORCH}"] == pytest.approx(25.0)
