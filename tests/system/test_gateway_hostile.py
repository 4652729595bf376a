"""Callers that are wrong, slow, many or gone: each gets a typed answer in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from kvcache.gateway import openapi
from kvcache.gateway.access import hash_key
from kvcache.local import free_url
from tests.harness.cluster import Cluster
from tests.harness.gateway import gateway

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

KEY = "kvc-a-key-for-tests"
FLAGS = ("--body-timeout-s", "1", "--max-requests", "64", "--max-body-bytes", str(1 << 20), "--ping-s", "0.1")


@pytest.fixture(scope="session")
def url(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gateway(shared_cluster.url, tmp_path_factory.mktemp("hostile") / "log", *FLAGS) as url:
        yield url


@pytest.fixture
def web(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20.0) as client:
        yield client


def check(answer: httpx.Response, status: int, words: str) -> dict[str, Any]:
    """The error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


GOOD = {"model": "tiny", "prompt": "hello", "max_tokens": 2}

WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "an empty prompt": ({"prompt": ""}, 400, "empty"),
    "mixed prompts": ({"prompt": ["a", 1]}, 400, "prompt must be"),
    "a token the model has not": ({"prompt": [299_999]}, 400, "299999"),
    "text for a number": ({"temperature": "hot"}, 400, "$.temperature"),
    "a huge number": ({"n": 10**30}, 400, "n must be"),
    "too hot": ({"temperature": 1000}, 400, "temperature must be"),
    "too many outputs": ({"n": 64, "prompt": ["a", "b", "c"]}, 400, "192 outputs"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens must be"),
    "many stop strings": ({"stop": ["x"] * 200_000}, 400, "200000 stop strings"),
    "a bias for no token": ({"logit_bias": {"hello": 1}}, 400, "token ids"),
    "a bias out of range": ({"logit_bias": {"5": 1000}}, 400, "logit_bias must be"),
    "a model nobody has": ({"model": "../../etc/passwd"}, 404, "no model named"),
    "a model with an odd name": ({"model": "a\nb"}, 400, "unprintable"),
    "options without a stream": ({"stream": False, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    "a suffix": ({"suffix": "x"}, 400, "suffix 'x' is not supported"),
    "best of more": ({"best_of": 5}, 400, "best_of"),
    "too many echoed logprobs": ({"echo": True, "logprobs": 21}, 400, "logprobs must be"),
    "an odd session": ({"session_id": "a\x00"}, 400, "session"),
    "a long session": ({"session_id": "x" * 300}, 400, "session"),
    "a lone surrogate": ({"prompt": "\ud800"}, 400, ""),
}


@pytest.mark.parametrize("case", sorted(WRONG))
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_wrong_has_its_status_even_when_streamed(web: httpx.Client, case: str, is_stream: bool) -> None:
    change, status, words = WRONG[case]
    body = json.dumps(GOOD | {"stream": is_stream} | change)
    check(web.post("/v1/completions", content=body), status, words)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_as_that(web: httpx.Client, is_stream: bool) -> None:
    # Brokers that have seen prompts of a token or two alone may foretell of a long one that it cannot begin in time.
    longer = web.post("/v1/completions", json=GOOD | {"prompt": secrets.token_hex(8) + "a b " * 1500})
    assert longer.status_code == 200
    check(web.post("/v1/completions", json=GOOD | {"stream": is_stream, "prompt": "a b " * 10_000}), 400, "tokens")


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "at least one"),
    "an unknown role": ({"messages": [{"role": "pirate", "content": "x"}]}, "roles are"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
    "no content": ({"messages": [{"role": "user"}]}, "no content"),
    "a schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a template bomb": ({"chat_template": "{% for i in range(10**12) %}{% endfor %}"}, "chat_template"),
    "a forced tool": ({"tool_choice": "required"}, "tool_choice"),
    "audio": ({"modalities": ["audio"]}, "modalities"),
    "lonely top_logprobs": ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
    "deep tools": ({"tools": [json.loads("[" * 400 + "]" * 400)]}, "tools"),
}


@pytest.mark.parametrize("case", sorted(CHATS))
def test_a_wrong_chat_is_refused_by_the_name_of_what_is_wrong(web: httpx.Client, case: str) -> None:
    change, words = CHATS[case]
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1} | change
    check(web.post("/v1/chat/completions", json=body), 400, words)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"prompt": NaN}', b'{"prompt":"a",}']
)
def test_a_body_that_is_no_request_is_refused(web: httpx.Client, body: bytes) -> None:
    check(web.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400, "")
    assert web.post("/v1/completions", json=GOOD).status_code == 200


def test_numbers_that_json_does_not_have_are_refused(web: httpx.Client) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        body = f'{{"prompt": "a", "temperature": {number}}}'
        check(web.post("/v1/completions", content=body), 400, "")


def test_large_bodies_other_types_and_other_paths_have_their_status(web: httpx.Client) -> None:
    check(web.post("/v1/completions", content=b" " * (2 << 20)), 413, "1048576 bytes")
    check(web.post("/v1/completions", content=iter([b" " * (1 << 19)] * 4)), 413, "1048576 bytes")
    check(web.post("/v1/completions", data={"prompt": "a"}), 415, "application/json")
    check(web.get("/v1/completions"), 405, "Method Not Allowed")
    check(web.get("/v1/nothing"), 404, "Not Found")


async def talk(url: str, *pieces: bytes, pause_s: float = 0.0, shut: bool = False) -> bytes:
    """Send pieces over a plain socket, as far as the server takes them; what it said until it closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    said = bytearray()

    async def listen() -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                said.extend(data)

    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(listen())
            with suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
                if shut:
                    writer.write_eof()
    finally:
        writer.close()
    return bytes(said)


async def test_heads_and_bodies_that_never_end_are_given_up_and_bytes_that_are_no_http_refused(
    url: str, web: httpx.Client
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n"
    slow_head, slow_body, silent, long_head, noise = await asyncio.gather(
        talk(url, *(bytes([byte]) for byte in head[:40]), pause_s=0.05),
        talk(url, head + b"\r\n", *(b"{" for _ in range(30)), pause_s=0.05),
        talk(url),
        talk(url, head, *(b"x-%d: %b\r\n" % (number, b"y" * 2000) for number in range(60))),
        talk(url, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n"),
    )
    assert b" 408 " in slow_body
    assert b'"the body did not arrive within 1 s"' in slow_body
    for answer, code in ((slow_head, b" 408 "), (silent, b" 408 "), (long_head, b" 431 "), (noise, b" 400 ")):
        assert code in answer.splitlines()[0]
        assert b'{"error":' in answer
    figures = (await asyncio.to_thread(web.get, "/metrics")).text
    for status in ("400", "408", "431"):
        assert f'kvcache_http_requests_total{{path="other",status="{status}"}}' in figures


async def test_sockets_that_are_half_closed_or_torn_harm_nobody(url: str, web: httpx.Client) -> None:
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 5000, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    whole = head % len(body) + body
    await asyncio.gather(
        *(talk(url, whole, shut=True) for _ in range(10)), *(talk(url, whole[:-3], shut=True) for _ in range(10))
    )
    await asyncio.to_thread(_until_idle, web)


def _until_idle(web: httpx.Client) -> None:
    """Until all 64 generations that the gateway lets run could begin at once: none is still counted."""
    for _ in range(200):
        answer = web.post("/v1/completions", json=GOOD | {"n": 64, "max_tokens": 1})
        if answer.status_code == 200:
            return
        check(answer, 429, "generations run here")
    raise AssertionError("the gateway still counts generations whose callers have gone")


async def test_more_than_the_limit_is_refused_with_when_to_come_again(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=20.0) as web:
        body = GOOD | {"stream": True, "max_tokens": 10_000, "ignore_eos": True, "n": 64}
        async with web.stream("POST", "/v1/completions", json=body) as running:
            assert running.status_code == 200
            refused = await web.post("/v1/completions", json=GOOD)
            check(refused, 429, "at most 64")
            assert int(refused.headers["retry-after"]) >= 1


@pytest.fixture(scope="session")
def open_url(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway that lets more run at a time."""
    with gateway(shared_cluster.url, tmp_path_factory.mktemp("open") / "log", "--max-requests", "2000") as url:
        yield url


async def test_five_hundred_idle_readers_slow_nobody(open_url: str) -> None:
    """They ask for long streams and read nothing; whoever reads is answered all the same."""
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 3}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    async with AsyncExitStack() as stack:
        for _ in range(500):
            _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(open_url).port)
            stack.callback(writer.close)
            writer.write(head % len(body) + body)
        async with httpx.AsyncClient(base_url=open_url, timeout=30.0) as web:
            answer = await web.post("/v1/completions", json=GOOD)
            assert answer.status_code == 200
            assert (await web.get("/health")).status_code == 200


def test_keys_are_asked_for_and_part_the_caches(shared_cluster: Cluster, tmp_path: Path) -> None:
    other = "kvc-another-key"
    (tmp_path / "keys").write_text(f"# ours\n{hash_key(KEY)}\n{other}\n")
    with (
        gateway(shared_cluster.url, tmp_path / "log", "--api-key-file", str(tmp_path / "keys")) as url,
        httpx.Client(base_url=url, timeout=20.0) as web,
    ):
        for header in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "é"},
        ):
            check(
                web.get("/v1/models", headers=[(name.encode(), value.encode()) for name, value in header.items()]),
                401,
                "API key",
            )
        assert web.get("/health").status_code == 200
        prompt = "a prompt that only this test has, and that fills some blocks of the cache; " * 4
        cached = []
        for key in (KEY, KEY, other):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as api:
                usage = api.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached.append(usage.prompt_tokens_details.cached_tokens)
        assert cached[0] == 0
        assert cached[1] is not None
        assert cached[1] > 0
        assert cached[2] == 0


def test_pages_of_other_origins_are_let_in_by_name_only(
    shared_cluster: Cluster, tmp_path: Path, web: httpx.Client
) -> None:
    page = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in web.options("/v1/models", headers=page).headers
    with gateway(shared_cluster.url, tmp_path / "log", "--cors-origin", "https://app.example") as url:
        answer = httpx.options(f"{url}/v1/completions", headers=page)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = httpx.get(f"{url}/version", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_without_a_broker_health_says_so_and_requests_are_503(tmp_path: Path) -> None:
    with (
        gateway(free_url(), tmp_path / "log", "--request-timeout-s", "2") as url,
        httpx.Client(base_url=url, timeout=20.0) as web,
    ):
        assert "retry-after" in web.get("/health").headers
        check(web.get("/health"), 503, "no worker answers")
        answer = web.post("/v1/completions", json=GOOD)
        assert answer.status_code in {503, 504}
        assert answer.json()["error"]["message"]


SCHEMA = schemathesis.openapi.from_dict(openapi.document())


@SCHEMA.parametrize()
@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_no_request_by_the_document_is_a_fault_of_ours(case: schemathesis.Case[Any], url: str) -> None:
    if isinstance(case.body, dict):
        case.body |= {"max_tokens": 2, "n": 1}
    answer = case.call(base_url=url, timeout=20)
    assert answer.status_code < 500, (case.body, answer.text)
    assert answer.status_code == 200 or answer.json() is not None
