"""Answers that generate, as HTTP responses: whole, or as server-sent events.

The status is sent when the first event of the bus is there, so that what is wrong with a request, or with us, still
has its own. A caller that leaves, or takes nothing for too long, ends its generations within one step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from bus.errors import KVCacheError
from kvcache.client import AsyncClient
from kvcache.gateway.asks import Ask
from kvcache.gateway.chunks import Chunks
from kvcache.gateway.config import GatewayConfig
from kvcache.gateway.measuring import Measured
from kvcache.gateway.problems import problem_of
from kvcache.gateway.replies import Outputs, Piece, Texts, token_ids
from kvcache.gateway.shapes import Head, Shape
from kvcache.gateway.slowest import Progress, Slowest
from kvcache.gateway.vocabulary import Vocabulary
from kvcache.metrics.traffic import Traffic

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

_encode = msgspec.json.Encoder().encode

LOOKS = 8
"""How often within the time that a write may take somebody looks whether it is over."""

STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
"""The second is nginx's, which else keeps events back until it has some kilobytes of them."""

OnPieces = Callable[[list[Piece]], Awaitable[None]]


class Answer(Response):
    """One request's generations, and how they are told."""

    def __init__(
        self,
        ask: Ask,
        shape: Shape,
        client: AsyncClient,
        vocabulary: Vocabulary,
        config: GatewayConfig,
        traffic: Traffic,
        slowest: Slowest,
    ) -> None:
        self._ask = ask
        self._shape = shape
        self._client = client
        self._vocabulary = vocabulary
        self._config = config
        self._traffic = traffic
        self._slowest = slowest
        self._progress = Progress(time.monotonic())
        self._head: Head | None = None
        self._outputs = Outputs(
            len(ask.prompts),
            ask.params.n,
            has_logprobs=ask.params.logprobs is not None,
            waits_for_prompt=ask.params.prompt_logprobs is not None,
            is_prompt_only=ask.is_prompt_only,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what is wrong as long as nothing was sent."""
        request_id, created = scope["state"]["request_id"], int(time.time())
        if self._ask.is_echo:
            self._outputs.echoes = await self._echoes()
        head = Head(request_id=request_id, created=created, model=self._ask.model or "")
        tell = self._stream if self._ask.is_stream else self._whole
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(until_gone(receive))
                async with self._generations(request_id, scope["state"].get("traceparent")) as generations:
                    with self._remembered(request_id):
                        await tell(head, generations, send)
                watcher.cancel()
        except BaseExceptionGroup as errors:
            if errors.subgroup(ClientDisconnect) is None:
                raise _first(errors) from None  # else nobody is left to tell

    @asynccontextmanager
    async def _generations(self, request_id: str, traceparent: str | None) -> AsyncIterator[list[Measured]]:
        """All of them, begun; those that have not ended are stopped when the block is left, however that is."""
        ask = self._ask
        begun: list[Measured] = []
        is_watched = self._slowest.is_watched(time.time())
        try:
            for prompt in ask.prompts:
                raw = self._client.generate(
                    **prompt,
                    params=ask.params,
                    model=ask.model,
                    session=ask.session,
                    cache_salt=ask.cache_salt,
                    priority=ask.priority,
                    deadline=self._config.request_timeout_s,
                    explain=is_watched,
                    label=request_id,
                    traceparent=traceparent,
                )
                # Not a comprehension: those before one that is refused must be stopped.
                watch = self._traffic.watch(ask.params.n, time.monotonic())
                begun.append(Measured(raw, watch, self._progress))
            yield begun
        finally:
            for generation in begun:
                await generation.cancel()

    @contextmanager
    def _remembered(self, request_id: str) -> Iterator[None]:
        """However the block ends, the request may have been among the slowest."""
        try:
            yield
        finally:
            now, at = time.monotonic(), time.time()
            self._slowest.add(self._progress.sum_up(request_id, self._ask.num_outputs, now, at))

    async def _follow(self, generations: list[Measured], on_pieces: OnPieces) -> None:
        """Hand on what comes, one batch at a time, until all have ended. Raises the first error."""

        if len(generations) == 1:
            while batch := await generations[0].next_batch():
                await on_pieces(self._outputs.fold(0, batch))
            return
        turn = asyncio.Lock()

        async def follow(prompt: int, generation: Measured) -> None:
            while batch := await generation.next_batch():
                async with turn:
                    await on_pieces(self._outputs.fold(prompt, batch))

        async with asyncio.TaskGroup() as group:
            for prompt, generation in enumerate(generations):
                group.create_task(follow(prompt, generation))

    async def _whole(self, head: Head, generations: list[Measured], send: Send) -> None:
        outputs = [Piece(number) for number in range(self._ask.num_outputs)]

        async def join(pieces: list[Piece]) -> None:
            for piece in pieces:
                output = outputs[piece.number]
                output.echo += piece.echo
                output.prompt = output.prompt or piece.prompt
                output.text += piece.text
                output.tokens += piece.tokens
                output.finish_reason = piece.finish_reason

        await self._follow(generations, join)
        texts = await self._texts(outputs)
        body = _encode(self._shape.whole(self._named(head), outputs, self._outputs.usage(), texts))
        await send(_start(b"application/json", (b"content-length", b"%d" % len(body))))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, head: Head, generations: list[Measured], send: Send) -> None:
        events = EventStream(send, self._config.write_timeout_s, self._config.ping_s)
        ask = self._ask
        chunks = Chunks(self._shape, has_plain=ask.params.logprobs is None and not ask.wants_usage_always)

        async def pass_on(pieces: list[Piece]) -> None:
            texts = await self._texts(pieces)
            usage = self._outputs.usage() if ask.wants_usage_always else None if ask.wants_usage else UNSET
            named = self._named(head)
            encoded = [chunks.encode(named, piece, usage, texts) for piece in pieces]
            await events.write([chunk for chunk in encoded if chunk is not None])

        try:
            async with asyncio.TaskGroup() as group:
                keeper = group.create_task(events.keep_open())
                # A task of its own, since each token wakes it: here a dozen coroutines of the server come first.
                await group.create_task(self._follow(generations, pass_on))
                keeper.cancel()
            last = [self._shape.usage_chunk(self._named(head), self._outputs.usage())] if ask.wants_usage else []
            await events.end([*map(_encode, last), b"[DONE]"])
        except ExceptionGroup as errors:
            error = _first(errors)
            if not events.has_begun or not isinstance(error, KVCacheError):
                raise
            await events.end([problem_of(error).body()])

    async def _texts(self, pieces: list[Piece]) -> Texts | None:
        """How the tokens are spelled whose logprobs are to be told; None if none are."""
        if self._ask.params.logprobs is None:
            return None
        wanted = {token_id for piece in pieces for token_id in token_ids([*piece.prompt, *piece.tokens])}
        return await self._vocabulary.texts(self._outputs.model, wanted) if wanted else {}

    async def _echoes(self) -> dict[int, str]:
        """The text that each output begins with."""
        found: dict[int, str] = {}
        for index, prompt in enumerate(self._ask.prompts):
            text = prompt.get("prompt")
            if text is None:
                text = await self._client.detokenize(prompt["token_ids"], model=self._ask.model)
            found |= {index * self._ask.params.n + offset: text for offset in range(self._ask.params.n)}
        return found

    def _named(self, head: Head) -> Head:
        """With the model that a request without one was served by."""
        if head.model:
            return head
        if self._head is None or not self._head.model:  # made once, for all chunks
            self._head = replace(head, model=self._outputs.model)
        return self._head


class EventStream:
    """Server-sent events. One writer at a time, but for the pings between; what is sent is sent whole.

    `keep_open` runs beside the writer and gives up a reader that takes nothing, so that a write need not set a timer.
    """

    def __init__(self, send: Send, write_timeout_s: float, ping_s: float) -> None:
        self._send = send
        self._write_timeout_s = write_timeout_s
        self._ping_s = ping_s
        self._written_at = time.monotonic()
        self._writing_since: float | None = None
        self.has_begun = False

    async def write(self, events: list[bytes]) -> None:
        """Send events in one go. Ends when the reader takes them, or `keep_open` loses its patience."""
        self._writing_since = time.monotonic()
        if not self.has_begun:
            await self._begin()
        if events:
            body = b"data: " + b"\n\ndata: ".join(events) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self._written_at, self._writing_since = time.monotonic(), None

    async def end(self, events: list[bytes]) -> None:
        """Send the last events. Raises ClientDisconnect if the reader takes nothing for too long."""
        await self._put(b"".join(b"data: %b\n\n" % event for event in events), is_last=True)

    async def keep_open(self) -> None:
        """Send a comment whenever nothing was sent for a while, for proxies' sake; never returns.

        Raises ClientDisconnect if the reader takes nothing for too long.
        """
        while True:
            now = time.monotonic()
            if self._writing_since is not None:
                due = self._writing_since + self._write_timeout_s
                if now >= due:
                    raise ClientDisconnect
            elif not self.has_begun:  # the status is not sent before the first event, so nothing can be kept open
                due = now + self._ping_s
            else:
                due = self._written_at + self._ping_s
                if now >= due:
                    await self._put(b": ping\n\n", is_last=False)
                    continue
            await asyncio.sleep(min(max(0.01, due - now), self._write_timeout_s / LOOKS))

    async def _put(self, data: bytes, *, is_last: bool) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                if not self.has_begun:
                    await self._begin()
                await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
        except TimeoutError:
            raise ClientDisconnect from None
        self._written_at = time.monotonic()

    async def _begin(self) -> None:
        self.has_begun = True
        await self._send(_start(b"text/event-stream; charset=utf-8", *STREAM_HEADERS))


def _start(content_type: bytes, *more: tuple[bytes, bytes]) -> dict[str, object]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type), *more]}


async def until_gone(receive: Receive) -> None:
    """Raises ClientDisconnect when the caller leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of what went wrong together; mostly there is one."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
