"""Traces: read whole or refused with the line that is wrong; synthetic ones as their models say."""

from __future__ import annotations

import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadArgument
from kvcache.simulate import traces
from kvcache.simulate.report import optimum
from kvcache.simulate.rivals import rivals
from kvcache.simulate.simulation import Setup, Simulation
from kvcache.simulate.synthetic import BLOCK_TOKENS, KINDS, chain_of, multiplied, synthetic, with_prefixes
from kvcache.simulate.traces import Arrival, block_ends, faster, node_of, read_trace

MOONCAKE = """\
{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 2]}
{"timestamp": 1000, "input_length": 1024, "output_length": 5, "hash_ids": [0, 1]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,1030,109
"""

BURST_GPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087.0,0,1087,API log
"""


def write(folder: Path, text: str, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_mooncake_trace_begins_at_zero_and_is_in_order(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, MOONCAKE)) == [
        Arrival(0.0, 1024, 5, (node_of(0), node_of(1)), (512, 1024)),
        Arrival(2.0, 600, 7, (node_of(0), node_of(2)), (512, 600)),
    ]


def test_an_azure_trace_has_times_and_lengths_and_shares_nothing(tmp_path: Path) -> None:
    first, second = read_trace(write(tmp_path, AZURE, "azure.csv"))
    assert (first.num_tokens, first.output_tokens, first.at) == (374, 44, 0.0)
    assert second.at == pytest.approx(4.314579, abs=1e-5)
    assert second.ends == (512, 1024, 1030)
    assert not set(first.chain) & set(second.chain)


def test_a_trace_of_burst_gpt_has_seconds_and_may_have_empty_answers(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + BURST_GPT, "burst.txt")
    first, second = read_trace(path)
    assert (first.at, first.num_tokens, first.output_tokens) == (0.0, 472, 18)
    assert (second.at, second.num_tokens, second.output_tokens) == (40.5, 1087, 0)
    assert not read_trace(path).tells_prefixes
    assert read_trace(write(tmp_path, MOONCAKE, "azure.csv")).tells_prefixes


def test_the_azure_trace_of_2024_has_zones_and_may_have_empty_prompts(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,0,1\n2024-05-10 02:00:01.009930+02:00,7,1\n2024-05-10 00:00:02.00993,7,1\n"
    trace = read_trace(write(tmp_path, f"{AZURE.splitlines()[0]}\n{rows}", "azure.csv"))
    assert [(round(it.at, 6), it.num_tokens) for it in trace] == [(0.0, 1), (1.0, 7), (2.0, 7)]


def test_blocks_without_an_id_are_shared_with_nobody(tmp_path: Path) -> None:
    line = '{"timestamp": 0, "input_length": 1500, "output_length": 0, "hash_ids": [7]}\n'
    bare = '{"timestamp": 0, "input_length": 900, "output_length": 0, "hash_ids": []}\n'
    recorded = '{"timestamp": 0, "input_length": 90, "output_length": 0, "hash_ids": [], "ends": []}\n'
    trace = read_trace(write(tmp_path, 2 * line + 2 * bare + 2 * recorded))
    assert [arrival.ends for arrival in trace] == 2 * [(512, 1024, 1500)] + 2 * [(512, 900)] + 2 * [(90,)]
    nodes = [node for arrival in trace for node in arrival.chain]
    assert len(set(nodes)) == len(nodes) - 1
    assert trace[0].chain[0] == trace[1].chain[0] == node_of(7)
    for make in rivals(0, 1000).values():
        outcomes = Simulation(trace, Setup(num_workers=2), make).run().outcomes
        assert sum(outcome.hit_tokens for outcome in outcomes) in {0, 512}


def test_only_the_beginning_is_kept_if_no_more_is_wanted(tmp_path: Path) -> None:
    """Whatever the order of the lines: the one at second 1 is the first, so 2.5 is within 2 s of it and 4 is not."""
    line = '{{"timestamp": {}, "input_length": 5, "output_length": 1, "hash_ids": [1]}}\n'
    path = write(tmp_path, "".join(map(line.format, (4000, 2500, 9000, 1000, 3001))))
    assert [arrival.at for arrival in read_trace(path, 2.0)] == [0.0, 1.5]
    assert len(read_trace(path)) == 5


def test_a_trace_beyond_its_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_REQUESTS", 1)
    path = write(tmp_path, MOONCAKE)
    with pytest.raises(BadArgument, match="more than 1 requests; --until S"):
        read_trace(path)
    monkeypatch.setattr(traces, "MAX_LINE", 80)
    with pytest.raises(BadArgument, match="line 1: it has more than 80 characters"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no requests"),
        ("\n\n", "no requests"),
        (MOONCAKE + "{}", "line 3: Object missing required field"),
        (MOONCAKE + "nonsense", "line 3: JSON is malformed"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 7, "hash_ids": [0, 1, 2]}', "2 blocks of 512, not 3"),
        (
            '{"timestamp": 0, "input_length": 90000000, "output_length": 7, "hash_ids": []}',
            "Expected `int` <= 16777216",
        ),
        ('{"timestamp": 0, "input_length": 6, "output_length": 7, "hash_ids": [-1]}', "Expected `int` >= 0"),
        ('{"input_length": 6, "output_length": 7, "hash_ids": [1]}', "missing required field `timestamp`"),
        ("[" + MOONCAKE.replace("\n", ",") + "]", "line 1: Expected `object`, got `array`"),
        (
            '{"timestamp": 0, "input_length": 6, "output_length": 7, "hash_ids": ["00ff"], "ends": [6]}',
            "hash_ids of a record must be of 8 bytes",
        ),
        ('{"timestamp": -1, "input_length": 6, "output_length": 7, "hash_ids": [0]}', "line 1: Expected `float` >= 0"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 7, "hash_ids": []}', "line 1: Expected `int` >= 1"),
        ('{"timestamp": 0, "x": ' + 100_000 * "[", "line 1: "),
        ("TIMESTAMP,Tokens\n1,2\n", "line 1: there is no column ContextTokens, GeneratedTokens"),
        (f"TIMESTAMP,{200_000 * 'x'},ContextTokens,GeneratedTokens\n", "field larger than field limit"),
        (AZURE + "yesterday,1,2\n", "line 4: Invalid isoformat string"),
        (AZURE + "2023-11-16 18:15:46,-1,2\n", "line 4: -1 is no number of tokens"),
        (AZURE + "2023-11-16 18:15:46,1.5,2\n", "line 4: 1.5 is no number of tokens"),
        (AZURE + "2023-11-16 18:15:46,nan,2\n", "line 4: nan is no number of tokens"),
        (AZURE + "2023-11-16 18:15:46,1\n", "line 4: float()"),
        (BURST_GPT + "inf,ChatGPT,1,2,3,API log\n", "line 4: inf is no time"),
        (BURST_GPT + "soon,ChatGPT,1,2,3,API log\n", "line 4: could not convert"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadArgument) as caught:
        read_trace(write(tmp_path, text))
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="No such file"):
        read_trace(tmp_path / "nowhere.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadArgument, match="is not text"):
        read_trace(tmp_path / "binary")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(AZURE,), daemon=True)
    writer.start()
    trace = read_trace(pipe)
    writer.join(30.0)
    assert (len(trace), trace.tells_prefixes) == (2, False)


def test_a_faster_trace_has_the_same_requests_in_less_time(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, MOONCAKE))
    assert [arrival.at for arrival in faster(trace, 4.0)] == [0.0, 0.5]
    assert [arrival.chain for arrival in faster(trace, 4.0)] == [arrival.chain for arrival in trace]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 1500)), min_size=1, max_size=5))
def test_a_prompt_has_a_node_for_each_block_begun(parts: list[tuple[int, int]]) -> None:
    num_tokens = sum(tokens for _, tokens in parts)
    chain = chain_of(parts)
    assert len(chain) == len(set(chain)) == len(block_ends(num_tokens, BLOCK_TOKENS))
    longer = chain_of([*parts, (9, 600)])
    assert longer[: num_tokens // BLOCK_TOKENS] == chain[: num_tokens // BLOCK_TOKENS]
    assert longer[num_tokens // BLOCK_TOKENS] not in chain


def test_copies_of_a_trace_share_within_themselves_and_with_nobody_else() -> None:
    trace = synthetic("rag")[:50]
    made = multiplied(trace, 3)
    assert [it.at for it in made] == sorted(it.at for it in made)
    assert made == multiplied(trace, 3)
    distinct = len({node for it in trace for node in it.chain})
    assert len({node for it in made for node in it.chain}) == 3 * distinct
    assert sorted(it.num_tokens for it in made) == sorted(3 * [it.num_tokens for it in trace])
    assert multiplied(trace, 1) == trace


@pytest.mark.parametrize("kind", KINDS)
def test_a_synthetic_trace_is_the_same_for_a_seed_and_another_for_another(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("kvcache.simulate.synthetic.DURATION_S", 150.0)
    trace = synthetic(kind)
    assert trace == synthetic(kind)
    assert trace[:50] != synthetic(kind, seed=1)[:50]
    assert len(trace) > 150
    assert all(a.at <= b.at for a, b in pairwise(trace))
    assert (optimum(trace) < 0.01) == (kind == "alone")


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadArgument, match="agents, rag, chat"):
        synthetic("poems")


def test_prefixes_made_up_for_a_trace_leave_its_lengths_and_times() -> None:
    bare = [Arrival(float(n), 1000 + 40 * (n % 50), 10, (), ()) for n in range(400)]
    trace = with_prefixes(bare)
    assert [(a.at, a.num_tokens, a.output_tokens) for a in trace] == [
        (a.at, a.num_tokens, a.output_tokens) for a in bare
    ]
    assert all(len(a.chain) == len(a.ends) and a.ends[-1] == a.num_tokens for a in trace)
    assert 0.2 < optimum(trace) < 0.6
    assert with_prefixes(bare) == trace
