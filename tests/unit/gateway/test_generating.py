"""How an answer is told, event by event, with the bus and the caller played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from bus.errors import InternalError, KVCacheError, Overloaded
from kvcache.client.results import Done, Event, Start, Timings, Token, Usage
from kvcache.gateway.asks import Caller, completion_ask
from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.generating import Answer
from kvcache.gateway.schema import CompletionRequest, parse
from kvcache.gateway.shapes import CompletionShape
from kvcache.gateway.slowest import Slowest
from kvcache.metrics.traffic import Traffic

START = Start("w", "because", "m", 10, 4)
DONE = Done("ab", "stop", Usage(10, 4, 2), Timings(0.1, 0.2, 1.0, 0.0, 0.0, 0.0, 0), "w", "because", "r")
NEVER = "never"

Said = list[dict[str, Any]]


def token(text: str, seq: int = 0) -> Token:
    return Token(seq, seq, text)


class FakeGeneration:
    """Gives its batches one by one; an error is raised, NEVER waits for ever."""

    def __init__(self, batches: list[list[Event] | KVCacheError | str]) -> None:
        self._batches = batches
        self.is_cancelled = False

    async def next_batch(self) -> list[Event]:
        batch = self._batches.pop(0) if self._batches else []
        if isinstance(batch, str):
            await asyncio.Event().wait()
        if isinstance(batch, KVCacheError):
            raise batch
        assert isinstance(batch, list)
        return batch

    async def cancel(self) -> None:
        self.is_cancelled = True


class FakeClient:
    """Gives out these generations, in order."""

    def __init__(self, *generations: FakeGeneration) -> None:
        self._left = list(generations)

    def generate(self, **_: object) -> FakeGeneration:
        return self._left.pop(0)


async def stays() -> dict[str, Any]:
    """A caller that waits."""
    await asyncio.Event().wait()
    raise AssertionError


async def tell(
    *generations: FakeGeneration,
    receive: Callable[[], Awaitable[dict[str, Any]]] = stays,
    send: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    config: GatewayConfig = GatewayConfig(),
    traffic: Traffic | None = None,
    **fields: object,
) -> Said:
    """Run one streamed completion with a prompt for each generation; what was sent."""
    said: Said = []

    async def keep(message: dict[str, Any]) -> None:
        said.append(message)

    body = msgspec.json.encode({"prompt": ["a"] * len(generations), "stream": True} | fields)
    ask = completion_ask(parse(body, CompletionRequest), Caller())
    client: Any = FakeClient(*generations)
    vocabulary: Any = None
    answer = Answer(ask, CompletionShape(), client, vocabulary, config, traffic or Traffic(), Slowest())
    scope: Any = {"type": "http", "state": {"request_id": "r"}}
    async with asyncio.timeout(30):
        await answer(scope, receive, send or keep)  # type: ignore[arg-type]  # ASGI's messages are dicts
    return said


def events(said: Said) -> list[Any]:
    """The data of all events; JSON is decoded."""
    text = b"".join(message.get("body", b"") for message in said).decode()
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [event if event == "[DONE]" else msgspec.json.decode(event) for event in found]


async def test_a_stream_has_chunks_an_end_and_one_status() -> None:
    generation = FakeGeneration([[START], [token("a"), token("b", 1)], [DONE]])
    said = await tell(generation)
    assert [message.get("status") for message in said if message["type"] == "http.response.start"] == [200]
    assert (b"x-accel-buffering", b"no") in said[0]["headers"]
    *chunks, end = events(said)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["ab", ""]
    assert (chunks[-1]["choices"][0]["finish_reason"], end) == ("stop", "[DONE]")
    assert said[-1]["more_body"] is False


async def test_an_error_before_the_first_event_is_not_told_as_a_stream() -> None:
    generation = FakeGeneration([Overloaded("full", retry_after_ms=900)])
    with pytest.raises(Overloaded, match="full"):
        await tell(generation)
    assert generation.is_cancelled


async def test_an_error_in_the_middle_is_the_last_event_and_nothing_is_done() -> None:
    failing, other = FakeGeneration([[START, token("a")], InternalError("broken")]), FakeGeneration([NEVER])
    said = await tell(failing, other)
    assert events(said)[-1]["error"]["message"] == "broken"
    assert "[DONE]" not in events(said)
    assert said[-1]["more_body"] is False
    assert other.is_cancelled


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_caller_that_leaves_ends_all_its_generations(is_stream: bool) -> None:
    async def leaves() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    generations = FakeGeneration([[START], NEVER]), FakeGeneration([NEVER])
    await tell(*generations, receive=leaves, stream=is_stream)
    assert all(generation.is_cancelled for generation in generations)


async def test_a_reader_that_takes_nothing_is_given_up() -> None:
    async def blocks(message: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    generation = FakeGeneration([[START, token("a")], NEVER])
    await tell(generation, send=blocks, config=GatewayConfig(write_timeout_s=0.05))
    assert generation.is_cancelled


async def test_a_reader_that_takes_no_more_is_given_up_though_pings_are_rare() -> None:
    async def takes_the_head(message: dict[str, Any]) -> None:
        if message.get("body"):
            await asyncio.Event().wait()

    generation = FakeGeneration([[START], [token("a")], NEVER])
    await tell(generation, send=takes_the_head, config=GatewayConfig(write_timeout_s=0.05, ping_s=1000.0))
    assert generation.is_cancelled


async def test_a_silent_stream_is_kept_open_by_comments() -> None:
    pings = 0

    async def leaves_after_two_pings(message: dict[str, Any]) -> None:
        nonlocal pings
        pings += message.get("body", b"").startswith(b": ping")
        if pings == 2:
            left.set()

    async def until_left() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    left = asyncio.Event()
    generation = FakeGeneration([[START, token("a")], NEVER])
    await tell(generation, receive=until_left, send=leaves_after_two_pings, config=GatewayConfig(ping_s=0.05))
    assert pings == 2


async def test_generations_are_counted_however_they_end() -> None:
    traffic = Traffic()
    await tell(FakeGeneration([[START], [token("a"), token("b", 1)], [DONE]]), traffic=traffic)
    with pytest.raises(Overloaded):
        await tell(FakeGeneration([Overloaded("full", retry_after_ms=900)]), traffic=traffic)

    async def leaves() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    await tell(FakeGeneration([[START], NEVER]), traffic=traffic, receive=leaves)
    found = {family.name: dict(family.samples) for family in traffic.families()}
    assert found["request_success"]["m", "stop"] == 1
    assert found["request_failures"]["OVERLOADED",] == 1
    assert found["request_failures"]["CANCELLED",] == 1
    assert found["generation_tokens"]["m",] == 2
    assert found["gateway_outputs_running"][()] == 0
