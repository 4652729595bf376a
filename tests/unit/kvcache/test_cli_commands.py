"""What the commands ask of the client and what they print, with a client that answers from memory."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvcache
from bus.errors import NotFound
from bus.stats import (
    BrokerStats,
    Candidate,
    ClusterStats,
    EngineStats,
    Explanation,
    LayerInfo,
    ModelStats,
    PoolStats,
    SequenceInfo,
    WorkerStats,
    WorkerView,
)
from kvcache.cli import main
from kvcache.cli.kv_files import read_layers
from kvcache.client.arrays import kv_pair, kv_tensors
from kvcache.client.results import Alternative, Done, Event, KvAck, Start, Timings, Token, Usage
from kvcache.models import ModelRegistry, ModelSource
from kvcache.pull import PullProgress, Report
from kvcache.sampling import SamplingParams

EXPLANATION = Explanation(
    policy="consistent_hash",
    key="seq:paris",
    worker_id="worker-2",
    reason="owner of the key",
    ring_epoch="ab",
    candidates=(
        Candidate(worker_id="worker-2", rank=0, load=1, weight=100, limit=2.5),
        Candidate(worker_id="worker-1", rank=1, load=0, weight=100, limit=2.5, note="draining"),
    ),
)
WORKER = WorkerView(
    worker_id="worker-1",
    status="ready",
    weight=100,
    share=0.5,
    inflight=1,
    dispatched=7,
    last_heard_s=0.1,
    lease_s=1.9,
    running=1,
    kv_used_bytes=3 << 20,
    kv_total_bytes=1 << 30,
    index="exact",
    indexed_nodes=12,
    models=(("smollm2", "ready"),),
    stats=WorkerStats(
        worker_id="worker-1",
        incarnation=1,
        state="ready",
        models=(
            ModelStats(
                name="smollm2", state="ready", runner="openvino", pool=PoolStats(audits_passed=41, audits_failed=1)
            ),
            ModelStats(
                name="tiny", state="ready", runner="torch", runner_reason="no such operator", attention="gather"
            ),
            ModelStats(name="other", state="absent"),
        ),
        engine=EngineStats(prompt_tokens=200, cached_tokens=150),
    ),
)
BROKER = BrokerStats(incarnation=1, state="serving", policy="consistent_hash", failed={"DEADLINE": 2}, requests=9)


class FakeGeneration:
    """A stream of three tokens, or several."""

    def __init__(self, explain: bool, params: SamplingParams) -> None:
        self._explain = explain
        self._params = params
        self._done = Done(
            text=" Paris. It",
            finish_reason="length",
            usage=Usage(prompt_tokens=12, cached_tokens=8, completion_tokens=3),
            timings=Timings(0.05, 0.2, 15.0, 1.0, 40.0, 150.0, 0),
            worker_id="worker-2",
            reason="owner of the key",
            request_id="00ff",
        )

    def __enter__(self) -> FakeGeneration:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[Event]:
        explanation = EXPLANATION if self._explain else None
        yield Start("worker-2", "owner of the key", "smollm2", 12, 8, explanation)
        for seq, text in enumerate([" Paris", ".", " It"]):
            yield Token(seq, 100 + seq, text)
        yield self._done

    def result(self) -> Done:
        tokens = () if self._params.logprobs is None else (Token(0, 5, " Paris", 0, -0.125, (Alternative(5, -0.125),)),)
        return replace(self._done, tokens=tokens)

    def results(self) -> list[Done]:
        return [replace(self.result(), index=index) for index in range(self._params.n)]


class FakeClient:
    """Records every call as (name, positional, keyword); holds one sequence, `paris`, of two layers."""

    def __init__(self, url: str | None, timeout: float) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [("client", (url,), {"timeout": timeout})]
        self.kv = self
        self.found = True

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _record(self, name: str, *args: object, **kwargs: object) -> None:
        self.calls.append((name, args, kwargs))

    def generate(
        self,
        prompt: str | None = None,
        params: SamplingParams | None = None,
        **kwargs: Any,
    ) -> FakeGeneration:
        # A copy of the messages: the chat goes on adding to its list.
        self._record("generate", prompt, params, **{k: list(v) if k == "messages" else v for k, v in kwargs.items()})
        return FakeGeneration(kwargs.get("explain", False), params or SamplingParams())

    def route(self, seq_id: str | None, **kwargs: object) -> Explanation:
        self._record("route", seq_id, **kwargs)
        return EXPLANATION

    def workers(self) -> tuple[WorkerView, ...]:
        return (WORKER,) if self.found else ()

    def stats(self) -> ClusterStats:
        return ClusterStats(healthy=True, broker=BROKER, workers=(WORKER,))

    def put(self, *args: object, rf: int) -> KvAck:
        self._record("put", *args, rf=rf)
        return KvAck(length=4, durability="mem1", duplicate=False)

    def append(self, *args: object, at: int | None, rf: int) -> KvAck:
        self._record("append", *args, at=at, rf=rf)
        return KvAck(length=8, durability="mem1", duplicate=False)

    def get(self, *args: object) -> object:
        self._record("get", *args)
        k, v = kv_tensors(np.full((4, 1, 2), 1.5, np.float32), np.zeros((4, 1, 2), np.float32), 1 << 20)
        return kv_pair(k.meta, v.meta, k.data, v.data)

    def flush_prefix_cache(self, **kwargs: object) -> int:
        self._record("flush", **kwargs)
        return 7

    def length(self, seq_id: str, layer: int) -> int:
        if seq_id != "paris":
            raise NotFound(f"no sequence {seq_id!r}")
        return 4 + layer

    def delete(self, *args: object) -> int:
        self._record("delete", *args)
        return 2

    def pin(self, *args: object) -> None:
        self._record("pin", *args)

    def unpin(self, *args: object) -> None:
        self._record("unpin", *args)

    def list(self, *args: object) -> list[SequenceInfo]:
        self._record("list", *args)
        layers = tuple(
            LayerInfo(layer=layer, length=4, k_shape=(4, 1, 2), v_shape=(4, 1, 2), dtype="float32") for layer in (0, 1)
        )
        return [
            SequenceInfo(seq_id=seq_id, kind="stored", nbytes=4096, pinned=False, layers=layers)
            for seq_id in ("paris-2", "paris")
        ]


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[FakeClient]:
    """The clients that the command under test made; it talks to them and to no broker."""
    made: list[FakeClient] = []

    def make(url: str | None, *, timeout: float) -> FakeClient:
        made.append(FakeClient(url, timeout))
        return made[-1]

    monkeypatch.setattr(kvcache, "Client", make, raising=False)
    monkeypatch.delenv("KVCACHE_URL", raising=False)
    return made


def calls_named(clients: list[FakeClient], name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [(args, kwargs) for client in clients for called, args, kwargs in client.calls if called == name]


def test_generate_streams_text_and_says_what_it_cost(
    clients: list[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "generate",
                "The capital is",
                "--seq-id",
                "s",
                "--stop",
                "a",
                "--stop",
                "b",
                "--top-k",
                "5",
                "--priority",
                "-3",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out == " Paris. It\n"
    assert "worker-2: owner of the key; prompt 12 tokens, 8 cached; 3 generated, length; first after 50 ms" in shown.err
    ((args, kwargs),) = calls_named(clients, "generate")
    assert args == ("The capital is", SamplingParams(temperature=0.0, stop=("a", "b"), top_k=5, logit_bias={}))
    assert (kwargs["seq_id"], kwargs["priority"]) == ("s", -3)


def test_every_sampling_option_reaches_the_parameters(clients: list[FakeClient]) -> None:
    text = """
        --max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 3 --n 2 --ignore-eos
        --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty -0.3 --logprobs 4
        --logit-bias 5=1.5 --logit-bias 6=-2 --stop-token-id 7 --stop-token-id 8
    """
    options = shlex.split(text)
    assert main(["generate", "x", *options]) == 0
    (((_, params), _),) = calls_named(clients, "generate")
    assert params == SamplingParams(
        n=2,
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={5: 1.5, 6: -2.0},
        seed=3,
        stop_token_ids=(7, 8),
        ignore_eos=True,
        logprobs=4,
    )


@pytest.mark.parametrize("bias", ["5", "=1", "5=", "a=1", "5=1=2"])
def test_a_bias_that_is_none_is_wrong_usage(
    clients: list[FakeClient], bias: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--logit-bias", bias]) == 2
    assert "TOKEN_ID=X" in capsys.readouterr().err


def test_several_outputs_are_written_one_after_the_other_or_as_a_list(
    clients: list[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--n", "3"]) == 0
    assert capsys.readouterr().out == " Paris. It\n" * 3
    assert main(["generate", "x", "--n", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_logprobs_are_a_table_or_part_of_the_json(
    clients: list[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--logprobs", "1"]) == 0
    assert "5:-0.125" in capsys.readouterr().err
    assert main(["generate", "x", "--logprobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][0]["logprob"] == -0.125


def test_generate_as_json_is_one_object(clients: list[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == " Paris. It"
    assert result["usage"] == {"prompt_tokens": 12, "cached_tokens": 8, "completion_tokens": 3}
    assert result["timings"]["ttft_s"] == 0.05


def test_prompt_of_a_dash_is_read_from_stdin(clients: list[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a file"))
    assert main(["generate", "-"]) == 0
    assert calls_named(clients, "generate")[0][0][0] == "from a file"


def test_explain_names_every_candidate_before_the_text(
    clients: list[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--explain"]) == 0
    shown = capsys.readouterr().err
    assert "worker-2" in shown
    assert "draining" in shown


def test_url_and_timeout_reach_the_client(clients: list[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["workers", "--url", "tcp://127.0.0.1:7000", "--timeout", "3"]) == 0
    monkeypatch.setenv("KVCACHE_URL", "tcp://127.0.0.1:8000")
    assert main(["workers"]) == 0
    assert [client.calls[0] for client in clients] == [
        ("client", ("tcp://127.0.0.1:7000",), {"timeout": 3.0}),
        ("client", ("tcp://127.0.0.1:8000",), {"timeout": 10.0}),
    ]


def test_each_turn_of_a_chat_sends_the_whole_conversation_under_one_id(
    clients: list[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    assert main(["chat", "--system", "be brief"]) == 0
    turns = [kwargs for _, kwargs in calls_named(clients, "generate")]
    said = [[message["content"] for message in turn["messages"]] for turn in turns]
    assert said == [
        ["be brief", "one"],
        ["be brief", "one", " Paris. It", "two"],
        ["be brief", "three"],
    ]
    first, second, third = (turn["seq_id"] for turn in turns)
    assert first == second != third
    assert calls_named(clients, "delete") == [((first,), {})]
    assert capsys.readouterr().out == " Paris. It\n" * 3


def test_workers_as_table_and_as_json(clients: list[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workers"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["WORKER", "STATUS", "SHARE"]
    assert " ".join(row.split()) == "worker-1 ready 50% 1 0 7 3.0 MiB of 1.0 GiB exact, 12 nodes smollm2 ready"
    assert main(["workers", "--json"]) == 0
    (worker,) = json.loads(capsys.readouterr().out)
    assert (worker["worker_id"], worker["status"]) == ("worker-1", "ready")


def test_stats_name_what_runs_each_model_and_why(clients: list[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats"]) == 0
    assert "smollm2: openvino; tiny: torch (no such operator), gather" in " ".join(capsys.readouterr().out.split())


def test_stats_show_the_share_of_cached_tokens(clients: list[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats"]) == 0
    shown = capsys.readouterr().out
    assert "150 (75%)" in shown
    assert "DEADLINE 2" in shown
    assert "41, 1" in shown
    assert main(["stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broker"]["requests"] == 9


def test_reset_prefix_cache_says_how_much_is_forgotten(
    clients: list[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reset-prefix-cache"]) == 0
    assert "forgot 7 blocks" in capsys.readouterr().err
    assert main(["reset-prefix-cache", "--cache-salt", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"blocks": 7}
    assert calls_named(clients, "flush") == [((), {"cache_salt": None}), ((), {"cache_salt": "mine"})]


def test_route_marks_the_chosen_worker(clients: list[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "paris"]) == 0
    title, _, chosen, other = capsys.readouterr().out.splitlines()
    assert title.startswith("worker-2: owner of the key")
    assert chosen.split()[:2] == ["*", "worker-2"]
    assert other.split()[-1] == "draining"
    assert main(["route", "--prompt", "Once", "--policy", "least_loaded", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worker_id"] == "worker-2"
    assert calls_named(clients, "route")[1] == ((None,), {"prompt": "Once", "policy": "least_loaded"})


def test_kv_goes_to_a_file_and_back(
    clients: list[FakeClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "kv.safetensors")
    assert main(["kv", "get", "paris", "--file", file, "--start", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "layers": [{"layer": 0, "length": 4}, {"layer": 1, "length": 4}],
    }
    assert calls_named(clients, "get") == [(("paris", layer, 1, None), {}) for layer in (0, 1)]
    assert read_layers(Path(file))[1][0].tolist() == [[[1.5, 1.5]]] * 4
    assert main(["kv", "put", "rome", "--file", file, "--rf", "2"]) == 0
    assert [(*args[:2], kwargs) for args, kwargs in calls_named(clients, "put")] == [
        ("rome", layer, {"rf": 2}) for layer in (0, 1)
    ]
    assert main(["kv", "append", "rome", "--file", file, "--layer", "1", "--at", "4"]) == 0
    (((seq_id, layer, *_), kwargs),) = calls_named(clients, "append")
    assert (seq_id, layer, kwargs) == ("rome", 1, {"at": 4, "rf": 1})
    assert "1 layer of 8 tokens" in capsys.readouterr().err


def test_get_of_an_unknown_sequence_writes_no_file(
    clients: list[FakeClient], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kv.safetensors"
    assert main(["kv", "get", "par", "--file", str(file)]) == 1  # a prefix of two ids, but not an id
    assert "no worker holds a sequence 'par'" in capsys.readouterr().err
    assert not file.exists()


def test_a_sequence_is_pinned_for_a_while_or_until_it_is_unpinned(
    clients: list[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", "pin", "paris", "--ttl", "2.5"]) == 0
    assert main(["kv", "pin", "paris"]) == 0
    assert calls_named(clients, "pin") == [(("paris", 2.5), {}), (("paris", None), {})]
    assert main(["kv", "unpin", "paris"]) == 0
    assert calls_named(clients, "unpin") == [(("paris",), {})]
    assert capsys.readouterr().err.splitlines() == ["pinned for 2.5 s", "pinned", "unpinned"]


def test_length_delete_and_list(clients: list[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", "length", "paris", "--layer", "1"]) == 0
    assert capsys.readouterr().out == "5\n"
    assert main(["kv", "length", "rome"]) == 1
    assert main(["kv", "delete", "paris", "--layer", "0"]) == 0
    assert calls_named(clients, "delete") == [(("paris", 0), {})]
    capsys.readouterr()
    assert main(["kv", "list", "par", "--limit", "5"]) == 0
    _, _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["paris", "stored", "2", "4", "4.0", "KiB"]
    assert calls_named(clients, "list") == [(("par", 5), {})]


def test_pull_tells_each_stage_once_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pull(registry: ModelRegistry, name: str, report: Report) -> ModelSource:
        for done in (1, 2, 3):
            report(PullProgress(stage="downloading", done=done, total=3))
        report(PullProgress(stage="ready"))
        return registry.find(name)

    monkeypatch.setattr("kvcache.cli.model_files.pull_model", pull)
    assert main(["models", "pull", "smollm2", "--home", str(tmp_path)]) == 0
    stages = capsys.readouterr().err.splitlines()
    assert stages[:2] == ["smollm2: downloading", "smollm2: ready"]
    assert stages[2].startswith("smollm2 is ready: ")


def test_models_that_are_not_here_are_listed_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--home", str(tmp_path)]) == 0
    assert "not fetched" in capsys.readouterr().out
    assert main(["models", "list", "--home", str(tmp_path), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert (model["name"], model["present"], model["bytes"]) == ("smollm2", False, 0)
    assert main(["models", "pull", "no such model", "--home", str(tmp_path)]) == 2


@pytest.mark.parametrize("args", [[], ["--bind", "tcp://127.0.0.1:5555"]])
def test_a_recording_needs_a_file_before_any_flag(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", *args]) == 2
    assert "kvcache record FILE" in capsys.readouterr().err
