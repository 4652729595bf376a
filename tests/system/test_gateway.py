"""The gateway as its callers know it: OpenAI's own client, unchanged, against real processes with the tiny model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from bus.errors import BadArgument, ModelNotFound
from kvcache import AsyncClient
from tests.harness.cluster import Cluster
from tests.harness.gateway import gateway
from tests.harness.logs import said_of, spans_in_logs, spans_of
from tests.harness.waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello hello hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="session")
def gateway_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway") / "log"


@pytest.fixture(scope="session")
def url(shared_cluster: Cluster, gateway_log: Path) -> Iterator[str]:
    with ExitStack() as stack:
        with spans_in_logs():
            flags = ("--body-timeout-s", "1", "--log-format", "json")
            url = stack.enter_context(gateway(shared_cluster.url, gateway_log, *flags))
        yield url


@pytest.fixture
def sync(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest_asyncio.fixture
async def api(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def web(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20.0) as client:
        yield client


def test_models_are_listed_and_shown(sync: openai.OpenAI) -> None:
    (model,) = sync.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert sync.models.retrieve("tiny").id == model.id
    with pytest.raises(openai.NotFoundError, match="known: tiny"):
        sync.models.retrieve("org/unknown")


def test_a_chat_is_answered_and_its_second_turn_is_cached(sync: openai.OpenAI) -> None:
    first = sync.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=40, **GREEDY)
    (choice,) = first.choices
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert first.usage is not None
    assert first.usage.completion_tokens == 40
    assert first.usage.total_tokens == first.usage.prompt_tokens + 40
    again = sync.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=40, **GREEDY)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens is not None
    assert again.usage.prompt_tokens_details.cached_tokens > 0


async def test_a_streamed_chat_is_the_whole_one_in_pieces(api: openai.AsyncOpenAI) -> None:
    whole = await api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, **GREEDY)
    text, roles, reasons, usage = "", [], [], None
    options: Any = {"include_usage": True}
    stream = await api.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=30, stream=True, stream_options=options, **GREEDY
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert (roles, reasons) == (["assistant"], ["length"])
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 30)


def test_a_streamed_completion_is_the_whole_one_in_pieces(sync: openai.OpenAI) -> None:
    whole = sync.completions.create(model="tiny", prompt="hello", max_tokens=20, **GREEDY)
    stream = sync.completions.create(model="tiny", prompt="hello", max_tokens=20, stream=True, **GREEDY)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


def test_each_chunk_may_tell_the_usage_so_far(web: httpx.Client) -> None:
    body = {
        "model": "tiny", "prompt": "hello", "max_tokens": 12, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    lines = [line for line in web.post("/v1/completions", json=body).text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    usages = [httpx.Response(200, content=line[6:]).json()["usage"] for line in lines[:-1]]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert all(usage["prompt_tokens"] == usages[0]["prompt_tokens"] > 0 for usage in usages)


def test_n_prompts_and_n_outputs_come_in_the_order_of_the_prompts(sync: openai.OpenAI) -> None:
    made = sync.completions.create(model="tiny", prompt=["hello", [5, 6, 7]], n=2, seed=4, max_tokens=6)  # type: ignore[arg-type]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    again = sync.completions.create(model="tiny", prompt=["hello", [5, 6, 7]], n=2, seed=4, max_tokens=6)  # type: ignore[arg-type]
    assert [choice.text for choice in again.choices] == [choice.text for choice in made.choices]
    assert made.choices[0].text != made.choices[1].text
    one = sync.completions.create(model="tiny", prompt=[5, 6, 7], seed=4, max_tokens=6)
    assert one.choices[0].text == made.choices[2].text


async def test_logprobs_name_tokens_and_add_up_to_the_text(api: openai.AsyncOpenAI) -> None:
    made = await api.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY
    )
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob <= 0  # greedy: the likeliest came
        assert token.top_logprobs[0].token == token.token
    legacy = await api.completions.create(model="tiny", prompt="hello", max_tokens=8, logprobs=2, **GREEDY)
    found = legacy.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    assert len(found.tokens) == len(found.text_offset) == 8


def test_stops_biases_and_echo_do_what_they_say(sync: openai.OpenAI) -> None:
    whole = sync.completions.create(model="tiny", prompt="hello", max_tokens=30, **GREEDY).choices[0].text
    stop = whole[10:13]
    cut = sync.completions.create(model="tiny", prompt="hello", max_tokens=30, stop=[stop], **GREEDY).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    forced = sync.completions.create(model="tiny", prompt="hello", max_tokens=3, logit_bias={"65": 100}, **GREEDY)
    spelled = sync.completions.create(model="tiny", prompt=[65, 65, 65], max_tokens=1, echo=True, **GREEDY)
    assert spelled.choices[0].text.startswith(forced.choices[0].text)
    echoed = sync.completions.create(model="tiny", prompt="hello", max_tokens=30, echo=True, **GREEDY)
    assert echoed.choices[0].text == "hello" + whole


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_are_scored_as_evaluation_harnesses_ask_for_it(sync: openai.OpenAI, max_tokens: int) -> None:
    prompts: Any = [[40, 45, 50, 260], [40, 45, 50, 55, 60]]
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True}
    made = sync.completions.create(**asked, n=2, **GREEDY)
    again = sync.completions.create(**asked, stream=True, n=2, **GREEDY)
    streamed: dict[int, list[Any]] = {index: [] for index in range(4)}
    for chunk in again:
        streamed[chunk.choices[0].index].append(chunk.choices[0])
    assert made.usage is not None
    assert made.usage.completion_tokens == 4 * max_tokens
    for choice, prompt in zip(made.choices, [prompt for prompt in prompts for _ in range(2)], strict=True):
        found: Any = choice.logprobs
        assert choice.finish_reason == "length"
        assert len(found.tokens) == len(found.text_offset) == len(prompt) + max_tokens
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert logprob in top.values()
            assert logprob <= max(top.values()) <= 1e-5
        assert choice.text.startswith("".join(found.tokens[: len(prompt)]))
        places = zip(found.text_offset, found.tokens[: len(prompt)], strict=False)
        assert all(choice.text.startswith(token, at) for at, token in places)
        parts = streamed[choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [token for part in parts for token in part.logprobs.tokens] == found.tokens
        offsets = [at for part in parts for at in part.logprobs.text_offset]
        assert offsets == found.text_offset
        assert len(parts[0].logprobs.tokens) >= len(prompt), "the prompt comes first, and all at a time"


def test_tokenize_and_detokenize_are_inverse(web: httpx.Client) -> None:
    found = web.post("/tokenize", json={"prompt": "hello world"}).json()
    assert found["count"] == len(found["tokens"]) > 1
    assert found["max_model_len"] > 1000
    assert web.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "hello world"}
    chat = web.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert "hello hello hello" in web.post("/detokenize", json={"tokens": chat}).json()["prompt"]


def test_health_versions_and_information_are_there(web: httpx.Client) -> None:
    assert web.get("/health").json() == {"status": "ok"}
    assert web.get("/ready").status_code == 200
    assert web.get("/version").json()["version"]
    info = web.get("/server_info").json()
    assert len(info["cluster"]["workers"]) == 2
    assert info["config"]["api_key"] == "0 keys"


async def test_a_request_is_found_in_every_log_by_its_id(
    api: openai.AsyncOpenAI, gateway_log: Path, shared_cluster: Cluster
) -> None:
    request_id = f"find me {secrets.token_hex(4)}"
    named = {"X-Request-ID": request_id}
    await api.completions.create(model="tiny", prompt="a secret sentence", max_tokens=2, extra_headers=named)

    workers = [worker.log for worker in shared_cluster.workers.values()]
    broker = shared_cluster.broker.log
    await until(lambda: len(said_of(broker, request_id)) == 2, "the broker tells of it")
    await until(lambda: len(said_of(gateway_log, request_id)) == 1, "the gateway tells of it")
    went, ended = said_of(broker, request_id)
    assert (went.startswith("Generate goes to worker-"), ended.endswith(": done")) == (True, True)
    assert said_of(gateway_log, request_id)[0].startswith("POST /v1/completions: 200, ")
    ((begins, ends),) = [lines for lines in (said_of(log, request_id) for log in workers) if lines]
    assert begins.startswith("Generate begins, ")
    assert ends.startswith("Generate ends: length, 2 tokens, ")
    assert not any("secret" in log.read_text("utf-8") for log in (broker, gateway_log, *workers))


async def test_a_trace_of_the_callers_goes_through_all_processes(
    api: openai.AsyncOpenAI, gateway_log: Path, shared_cluster: Cluster
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    for flags in ("00", "01"):  # of the first nobody records anything
        traced = {"traceparent": f"00-{trace_id}-{caller}-{flags}"}
        await api.completions.create(model="tiny", prompt="hello", max_tokens=2, extra_headers=traced)

    workers = [worker.log for worker in shared_cluster.workers.values()]
    logs = [gateway_log, shared_cluster.broker.log, *workers]

    def parents() -> dict[str, str]:
        spans = [span for log in logs for span in spans_of(log, trace_id)]
        names = {span["context"]["span_id"]: span["name"] for span in spans} | {f"0x{caller}": "the caller"}
        return {span["name"]: names.get(span["parent_id"], "somebody") for span in spans}

    await until(lambda: len(parents()) == 6, "all spans are exported")
    assert parents() == {
        "POST /v1/completions": "the caller",
        "kvcache.broker": "POST /v1/completions",
        "kvcache.worker": "kvcache.broker",
        "queue": "kvcache.worker",
        "prefill": "kvcache.worker",
        "decode": "kvcache.worker",
    }
    assert sum(len(spans_of(log, trace_id)) for log in logs) == 6


def test_a_request_id_is_echoed_or_made(web: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 1}
    answer = web.post("/v1/completions", json=body, headers={"X-Request-ID": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    assert answer.json()["id"] == "cmpl-mine-7"
    assert len(web.get("/nothing", headers={"X-Request-ID": "x" * 200}).headers["x-request-id"]) == 32


async def test_a_caller_that_leaves_ends_its_work(url: str, client: AsyncClient) -> None:
    async def running() -> int:
        return sum(worker.running + worker.waiting for worker in (await client.stats()).workers)

    async def is_busy() -> bool:
        return await running() == 2

    async def is_idle() -> bool:
        return await running() == 0

    body = {"prompt": "hello", "max_tokens": 15_000, "ignore_eos": True, "n": 2}
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as web:
        async with web.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            assert answer.status_code == 200
            await until(is_busy, "both outputs run")
        await until(is_idle, "the work of a stream that was left is given up", 5.0)
        waiting = asyncio.create_task(web.post("/v1/completions", json=body))
        await until(is_busy, "both outputs run")
        waiting.cancel()
        await until(is_idle, "the work of an answer that nobody waits for is given up", 5.0)


async def test_a_session_stays_on_its_worker_whatever_it_asks(url: str, client: AsyncClient) -> None:
    """Its prompts have nothing in common, and neither have the sessions: only the name can bring them together."""

    async def dispatched() -> dict[str, int]:
        return {worker.worker_id: worker.dispatched for worker in await client.workers()}

    async with httpx.AsyncClient(base_url=url) as web:
        before = await dispatched()
        for number in range(8):
            body = {"prompt": f"{number} is a prompt of its own", "max_tokens": 1}
            answer = await web.post("/v1/completions", json=body, headers={"X-Session-Affinity": "one"})
            assert answer.status_code == 200
        after = await dispatched()
    assert sorted(after[name] - before[name] for name in after) == [0, 8]


async def test_tokens_and_text_are_also_the_python_clients(client: AsyncClient) -> None:
    found = await client.tokenize("hello hello")
    assert found.model == "tiny"
    assert "".join(await client.spell(found.token_ids)) == await client.detokenize(found.token_ids) == "hello hello"
    with pytest.raises(ModelNotFound):
        await client.tokenize("hello", model="nobody")
    with pytest.raises(BadArgument, match="token id 300"):
        await client.detokenize([300])
    with pytest.raises(BadArgument, match="0 token ids"):
        await client.spell([])
