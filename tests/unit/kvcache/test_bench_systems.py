"""The peer benchmark: its workloads, what is made of answers and figures, and clients and processes that go wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from kvcache.bench import main as command
from kvcache.bench.engine_goals import Figures
from kvcache.bench.main import main
from kvcache.bench.peers.contract import TOKEN_BYTES, Bytes, measure_store
from kvcache.bench.peers.environments import PeerUnavailable
from kvcache.bench.peers.processes import Processes
from kvcache.bench.report import Report
from kvcache.bench.systems import goals
from kvcache.bench.systems.asking import by_http, put
from kvcache.bench.systems.contestants import ONE, PLAIN, VLLM
from kvcache.bench.systems.goals import IN_PROCESS
from kvcache.bench.systems.workloads import Answer, Prompt, chats, documents, percentile, sum_up, unshared
from tests.harness.waiting import until

SHELL = ["/bin/sh", "-c"]


def test_turns_of_a_chat_go_on_from_all_before_and_chats_share_the_system_prompt() -> None:
    made = chats("a", system_tokens=10, num_chats=2, num_turns=3, turn_tokens=4, reply=5)
    assert [[len(prompt) for prompt in prompts] for prompts in made.conversations] == [[14, 23, 32]] * 2
    first, second = made.conversations
    assert first[1][:14] == first[0]
    assert first[2][:23] == first[1]
    assert (first[0][:10], first[0] == second[0]) == (second[0][:10], False)
    assert made.max_tokens == 5


def test_questions_share_their_document_and_nothing_else() -> None:
    made = documents("a", document_tokens=20, num_documents=2, num_questions=3, reply=5)
    for prompts in made.conversations:
        assert len({tuple(prompt[:20]) for prompt in prompts}) == 1
        assert len({tuple(prompt[20:]) for prompt in prompts}) == 3
    assert made.conversations[0][0][:20] != made.conversations[1][0][:20]


def test_another_seed_shares_nothing_and_the_same_one_everything() -> None:
    def starts(seed: str) -> set[tuple[int, ...]]:
        made = unshared(seed, num_prompts=4, prompt_tokens=32, reply=5)
        return {tuple(prompt[:8]) for (prompt,) in made.conversations}

    assert len(starts("a")) == 4
    assert starts("a") == starts("a")
    assert not starts("a") & starts("b")


@pytest.mark.parametrize(("percent", "value"), [(1, 1), (50, 5), (51, 6), (90, 9), (100, 10)])
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(percent: int, value: int) -> None:
    assert percentile(range(1, 11), percent) == value


def test_what_failed_counts_for_success_only() -> None:
    answers = [Answer(0.1, 10), Answer(0.3, 10), Answer(9.0, 9, failure="lost"), Answer(0.2, 10)]
    outcome = sum_up(answers, 2.0)
    assert [outcome.first_p50_ms, outcome.first_p90_ms] == pytest.approx([200, 300])
    assert (outcome.tokens_per_s, outcome.success_percent, outcome.failure) == (15, 75, "lost")


def test_a_system_that_answers_nothing_has_no_times() -> None:
    outcome = sum_up([Answer(failure="refused")], 1.0)
    assert (outcome.first_p50_ms, outcome.tokens_per_s, outcome.success_percent) == (None, 0, 0)


async def test_conversations_go_side_by_side_and_each_waits_for_its_answers() -> None:
    asked: list[int] = []
    both_began = asyncio.Event()

    async def ask(prompt: Prompt, max_tokens: int) -> Answer:
        asked.append(len(prompt))
        if len(asked) == 2:
            both_began.set()
        async with asyncio.timeout(30):
            await both_began.wait()
        return Answer(0.1, max_tokens)

    made = chats("a", system_tokens=10, num_chats=2, num_turns=2, turn_tokens=4, reply=5)
    outcome = await put(made, ask)
    assert asked == [14, 14, 23, 23]
    assert outcome.success_percent == 100


@asynccontextmanager
async def answering(reply: bytes) -> AsyncIterator[str]:
    """A server that says the same to everybody."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"{host}:{port}"


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENT = b'data: {"choices": [{"text": "a", "finish_reason": %b}]}\n\n'
ANSWER = EVENT % b"null" + EVENT % b'"length"' + b"data: [DONE]\n\n"


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_streamed_answer_is_read_however_it_is_cut(size: int) -> None:
    async with answering(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(ANSWER, size)) as place:
        answer = await by_http(place, "m")([1, 2], 2)
    assert (answer.failure, answer.num_tokens) == ("", 2)
    assert answer.first_s > 0


async def test_a_streamed_answer_may_end_with_its_connection() -> None:
    async with answering(OK + b"\r\n" + ANSWER) as place:
        assert not (await by_http(place, "m")([1], 2)).failure


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\nloading", "503 Service Unavailable: loading"),
        (OK + b"\r\n" + EVENT % b"null", "ended early"),
        (OK + b"\r\n" + EVENT % b'"stop"' + b"data: [DONE]\n\n", r"ended early \(stop\)"),
        (OK + b'\r\ndata: {"error": {"message": "full"}}\n\n', "full"),
        (OK + b"\r\ndata: {not json\n\n", "JSON|malformed"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nffff\r\nda", "IncompleteReadError"),
        (b"", ":"),
    ],
)
async def test_every_other_answer_is_a_failure_with_its_reason(reply: bytes, said: str) -> None:
    async with answering(reply) as place:
        answer = await by_http(place, "m")([1], 2)
    with pytest.raises(RuntimeError, match=said):
        raise RuntimeError(answer.failure)


async def test_a_server_that_is_not_there_is_a_failure() -> None:
    async with answering(b"") as place:
        pass
    assert "Error" in (await by_http(place, "m")([1], 2)).failure


def figures_of(**values: list[float]) -> Figures:
    """By `workload__part__system` with the names shortened."""
    systems = {"one": ONE, "plain": PLAIN, "engine": IN_PROCESS, "ours": "ours"}
    figures = Figures()
    for key, runs in values.items():
        figure, system = key.rsplit("__", 1)
        for value in runs:
            figures.add(figure.replace("__", ", ").replace("_", " "), systems[system], value)
    return figures


def test_goals_are_judged_by_the_median_of_the_ratios_of_rounds() -> None:
    figures = figures_of(
        chats__first_token_p50__one=[10, 20, 10],
        chats__first_token_p50__plain=[110, 120, 90],
        chats__tokens__one=[50, 60],
        chats__tokens__plain=[10, 10],
        no_sharing__tokens__one=[100, 100, 100],
        no_sharing__tokens__engine=[104, 120, 103],
    )
    judged = {row.name.partition(":")[0]: row for row in goals.goals(figures)}
    first = judged["chats, first token p50"]
    assert (first.runs, first.value, first.met) == ([11, 6, 9], 9, False)
    assert (judged["chats, tokens"].value, judged["chats, tokens"].met) == (5.5, True)
    overhead = judged["no sharing, time more than our engine, in process"]
    assert overhead.value == pytest.approx(4)
    assert overhead.met


@pytest.mark.parametrize(("verb", "theirs", "is_met"), [("put", 9.9, False), ("get", 10, True), ("append", 19, False)])
def test_stores_have_a_goal_for_each_verb(verb: str, theirs: float, is_met: bool) -> None:
    figures = Figures()
    figures.add(f"KV {verb} 1 MiB", "ours", 1.0)
    figures.add(f"KV {verb} 1 MiB", PLAIN, theirs)
    (judged,) = goals.goals(figures)
    assert judged.met is is_met


def test_goals_of_what_was_not_measured_are_not_judged() -> None:
    assert not list(goals.goals(figures_of(chats__tokens__one=[1.0])))


def test_the_table_has_a_line_for_every_system_and_the_reason_where_there_are_no_figures() -> None:
    figures = figures_of(
        chats__first_token_p50__one=[10, 30, 20], chats__tokens__one=[1234.5], KV_put_1_MiB__ours=[0.5]
    )
    table = goals.markdown(figures, {VLLM: "it is not installed | yet"})
    heads, _, one, vllm = table.split("\n\n")[0].splitlines()
    assert one.startswith(f"| {ONE} | 20 |  | 1,234 |")
    assert vllm.startswith(f"| {VLLM} |  |")
    assert vllm.endswith("| it is not installed / yet |")
    assert len({line.count("|") for line in (heads, one, vllm)}) == 1
    assert "| KV put 1 MiB | 0.5 |" in table


def test_every_ratio_is_told_once_and_with_its_spread() -> None:
    figures = figures_of(
        chats__first_token_p50__one=[10, 10],
        chats__first_token_p50__plain=[110, 120],
        chats__tokens__one=[50, 60],
        chats__tokens__plain=[10, 10],
    )
    names = [row.name for row in goals.rows(figures)]
    assert len(names) == len(set(names))
    assert f"| {ONE} / {PLAIN} | 11.50x (11 to 12) | 5.50x (5 to 6) |  |" in goals.markdown(figures, {})


def test_the_plot_has_a_point_for_every_system_that_chatted() -> None:
    figures = figures_of(
        chats__first_token_p50__one=[10], chats__tokens__one=[100], chats__first_token_p50__plain=[200]
    )
    drawn = goals.points(figures)
    assert (ONE in drawn, PLAIN in drawn) == (True, False)


class Kept:
    """A store in this process, which may lose the last byte of what it is given."""

    def __init__(self, *, loses: int = 0) -> None:
        self._loses = loses
        self._k = self._v = b""

    def put(self, k: Bytes, v: Bytes) -> None:
        self._k, self._v = bytes(k), bytes(v)[: len(v) - self._loses]

    def get(self) -> tuple[Bytes, Bytes]:
        return self._k, memoryview(self._v)

    def append(self, k: Bytes, v: Bytes) -> None:
        self._k, self._v = self._k + k, self._v + v


def test_a_store_is_measured_by_each_verb_that_it_has() -> None:
    assert set(measure_store(Kept(), 4 * TOKEN_BYTES, 3)) == {"put", "get", "append"}


def test_a_store_that_gives_back_other_bytes_is_found_out() -> None:
    with pytest.raises(RuntimeError, match="other bytes"):
        measure_store(Kept(loses=1), 4 * TOKEN_BYTES, 1)


async def test_a_process_that_ends_is_told_with_its_last_line_and_what_the_others_started_ends(tmp_path: Path) -> None:
    processes, pid_file = Processes(), tmp_path / "pid"
    try:
        processes.start([*SHELL, f"sleep 100 & echo $! > {pid_file}; wait"], {})
        processes.start([*SHELL, "echo first; echo out of memory >&2; exit 3"], {})
        await until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "the first one has begun")
        await until(lambda: "status 3: out of memory" in failure_of(processes), "the second one has ended")
    finally:
        processes.close()
    await until(lambda: has_ended(int(pid_file.read_text())), "what the first one started has ended")


def has_ended(pid: int) -> bool:
    """Also if nobody has asked for its status yet, as where no init process does."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def failure_of(processes: Processes) -> str:
    try:
        processes.check()
    except PeerUnavailable as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("on_term", "end_s", "status"), [("exit 7", 30.0, "status 7"), ("", 0.1, "status -9")])
async def test_processes_end_even_while_they_are_stopped(
    tmp_path: Path, on_term: str, end_s: float, status: str
) -> None:
    """In their own way if they have one, and if they would not, all the same."""
    processes, begun = Processes(end_s), tmp_path / "begun"
    processes.start([*SHELL, f"trap '{on_term}' TERM; touch {begun}; while :; do sleep 0.05; done"], {})
    await until(begun.exists, "it has begun")
    with processes.awake():
        processes.check()
        assert processes.memory_bytes() > 0
    processes.close()
    assert status in failure_of(processes)


def test_a_program_that_is_not_there_is_told() -> None:
    processes = Processes()
    with pytest.raises(PeerUnavailable, match="cannot be started"):
        processes.start(["/nowhere/at/all"], {})
    processes.close()


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ring", "--json", str(tmp_path / "no" / "folder.json")])
    assert ended.value.code == 2
    assert "folder.json: No such file" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*, quick: bool, progress: Callable[[str], None]) -> Report:
        raise KeyboardInterrupt

    def measure(*, quick: bool, progress: Callable[[str], None]) -> Report:
        return Report(name="ring", machine={}, versions={}, rows=[])

    monkeypatch.setattr(command, "BENCHMARKS", {"ring": (measure, ""), "router": (interrupt, ""), "bus": (measure, "")})
    assert main(["all", "--json", str(tmp_path / "all.json")]) == 130
    assert capsys.readouterr().err.endswith("bench router: interrupted\n")
    assert len(json.loads((tmp_path / "all.json").read_text())) == 1


def test_a_peer_that_nobody_knows_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["peers", "--peers", "abacus"])
    assert ended.value.code == 2
