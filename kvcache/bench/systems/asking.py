"""How a client asks: by the bus, or by OpenAI's streamed completions over HTTP. Both are timed alike, from outside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from bus.errors import KVCacheError
from kvcache.bench.systems.workloads import Answer, Outcome, Prompt, Workload, sum_up
from kvcache.client import AsyncClient
from kvcache.client.results import Done, Token

REQUEST_S = 180.0
Ask = Callable[[Prompt, int], Awaitable[Answer]]
"""(prompt, tokens wanted) -> what came. Never raises for what the system did."""


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """As much of an event as is looked at."""

    choices: list[_Choice] = []
    error: Any = None


_chunk = msgspec.json.Decoder(_Chunk)


async def put(workload: Workload, ask: Ask) -> Outcome:
    """All conversations of a workload side by side. One whose request fails goes on with the next."""
    answers: list[Answer] = []

    async def converse(prompts: tuple[Prompt, ...]) -> None:
        answers.extend([await ask(prompt, workload.max_tokens) for prompt in prompts])

    begun = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for prompts in workload.conversations:
            group.create_task(converse(prompts))
    return sum_up(answers, time.monotonic() - begun)


def by_bus(client: AsyncClient, limit_s: float = REQUEST_S) -> Ask:
    async def ask(prompt: Prompt, max_tokens: int) -> Answer:
        begun, first_s, num_tokens = time.monotonic(), 0.0, 0
        try:
            generation = client.generate(
                token_ids=prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, deadline=limit_s
            )
            is_done = False
            while batch := await generation.next_batch():
                tokens = sum(isinstance(event, Token) for event in batch)
                first_s = first_s or (time.monotonic() - begun if tokens else 0.0)
                num_tokens += tokens
                is_done = is_done or any(isinstance(event, Done) for event in batch)
        except KVCacheError as error:
            return Answer(failure=str(error))
        if not is_done or num_tokens != max_tokens:
            return Answer(failure=f"{num_tokens} tokens came of {max_tokens}")
        return Answer(first_s, num_tokens)

    return ask


def by_http(place: str, model: str, limit_s: float = REQUEST_S) -> Ask:
    """place: HOST:PORT. A connection for each request, as most clients have it."""
    host, _, port = place.rpartition(":")

    async def ask(prompt: Prompt, max_tokens: int) -> Answer:
        try:
            async with asyncio.timeout(limit_s):
                return await _complete(host, int(port), model, prompt, max_tokens)
        except TimeoutError:
            return Answer(failure=f"no answer within {limit_s:.0f} s")
        except (OSError, EOFError, ValueError) as error:
            return Answer(failure=f"{type(error).__name__}: {error}")

    return ask


async def _complete(host: str, port: int, model: str, prompt: Prompt, max_tokens: int) -> Answer:
    """The first event is the first token; the last choice says `length`, since nothing else may end an answer here."""
    begun, first_s, reason = time.monotonic(), 0.0, None
    fields = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body = msgspec.json.encode(fields | {"ignore_eos": True, "stream": True})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + body)
        is_ended = False
        async with aclosing(_events(reader)) as events:
            async for event in events:
                if event == b"[DONE]":
                    is_ended = True
                    break
                chunk = _chunk.decode(event)
                if chunk.error is not None:
                    return Answer(failure=str(chunk.error))
                if chunk.choices:
                    first_s = first_s or time.monotonic() - begun
                    reason = chunk.choices[0].finish_reason or reason
    finally:
        writer.close()
    if not is_ended or reason != "length":
        return Answer(failure=f"the stream ended early ({reason or 'no reason given'})")
    return Answer(first_s, max_tokens)


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """The data of each server-sent event of one line. Raises ValueError for an answer other than 200."""
    status = await reader.readline()
    is_chunked = False
    while (line := await reader.readline()) not in {b"\r\n", b""}:
        name, _, value = line.lower().partition(b":")
        is_chunked = is_chunked or (name == b"transfer-encoding" and value.strip() == b"chunked")
    if b" 200 " not in status:
        said = (await reader.read(500)).decode(errors="replace")
        raise ValueError(f"{status.decode(errors='replace').strip()}: {said}")
    pieces = _chunks(reader) if is_chunked else _lines(reader)
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    async for line in reader:
        yield line
