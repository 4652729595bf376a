"""`kvcache bench gateway`: what HTTP costs over the bus client.

A tiny random model and one worker, so that the gateway and not the model is what is measured. Both ways are driven by
this one process, in turn within each run: `AsyncClient`, and HTTP/1.1 over connections that are kept, as `openai` and
others keep theirs. All share the cores, so what the driver spends on HTTP would count as the gateway's: an answer's
bytes are kept as they come, and read when all of it is there.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kvcache.bench.report import Report, Row, report, row
from kvcache.bench.tiny_model import save_tiny_model
from kvcache.client import AsyncClient
from kvcache.client.results import Token
from kvcache.local import cluster, free_port, running, wait_for_port

RUNS = 5
STREAMS = 32
MANY_STREAMS = 200
MANY_TOKENS = 16
TTFT_GOAL_MS = 2.0
RATE_GOAL = 0.85

OK = b"HTTP/1.1 200 "
LAST_CHUNK = b"\r\n0\r\n\r\n"

Stream = Callable[[int, int], Awaitable[tuple[float, str]]]
"""(which prompt, tokens) -> (seconds to the first token, the text)."""


class Choice(msgspec.Struct):
    text: str


class Chunk(msgspec.Struct):
    """As much of a chunk as is looked at."""

    choices: list[Choice]


_chunk = msgspec.json.Decoder(Chunk)


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """Five runs, interleaved; `quick` makes each shorter, never fewer."""
    num_tokens, num_trips = (48, 15) if quick else (128, 40)
    with tempfile.TemporaryDirectory(prefix="kvcache-") as folder:
        progress("starting a broker, a worker with a tiny model and a gateway")
        model = save_tiny_model(Path(folder, "tiny"))
        flags = ("--dtype", "float32", "--kv-cache-memory-bytes", "256MiB", "--max-num-seqs", "64")
        with cluster(1, *flags, model=str(model)) as url:
            port = free_port()
            command = [sys.executable, "-m", "kvcache.gateway", "--broker", url, "--port", str(port)]
            with running([*command, "--log-level", "error"]):
                wait_for_port(f"tcp://127.0.0.1:{port}")
                return asyncio.run(_measure(url, port, num_tokens, num_trips, progress))


async def _measure(url: str, port: int, num_tokens: int, num_trips: int, progress: Callable[[str], None]) -> Report:
    async with AsyncClient(url, timeout=120.0) as client, by_http(port) as http:
        ways: dict[str, Stream] = {"bus": _by_bus(client), "http": http}
        first: dict[str, list[float]] = {"bus": [], "http": []}
        rate: dict[str, list[float]] = {"bus": [], "http": []}
        for index in range(RUNS):
            progress(f"run {index + 1} of {RUNS}")
            for name, way in ways.items():
                first[name].append(1000 * statistics.median([(await way(trip, 1))[0] for trip in range(num_trips)]))
                begun = time.monotonic()
                await asyncio.gather(*(way(stream, num_tokens) for stream in range(STREAMS)))
                rate[name].append(STREAMS * num_tokens / (time.monotonic() - begun))
        progress(f"{MANY_STREAMS} streams at once")
        lost = await _lost(ways)
    return report("gateway", _rows(first, rate, lost), ["tiny random Llama, one worker; all on this machine's cores"])


async def _lost(ways: dict[str, Stream]) -> int:
    """Of many streams at once over HTTP, those that differ from what the bus client gets for the same prompt."""
    told = [
        await asyncio.gather(*(ways[name](stream, MANY_TOKENS) for stream in range(MANY_STREAMS)))
        for name in ("bus", "http")
    ]
    return sum(mine != theirs for (_, mine), (_, theirs) in zip(*told, strict=True))


def _rows(first: dict[str, list[float]], rate: dict[str, list[float]], lost: int) -> list[Row]:
    more = [http - bus for http, bus in zip(first["http"], first["bus"], strict=True)]
    name = f"tokens of {STREAMS} streams"
    return [
        row("first token p50, bus client", first["bus"], "ms"),
        row("first token p50, HTTP", first["http"], "ms"),
        row("first token p50, HTTP's part", more, "ms", goal=TTFT_GOAL_MS, sense="<=", on="value"),
        row(f"{name}, bus client", rate["bus"], "/s"),
        row(f"{name}, HTTP", rate["http"], "/s", against=rate["bus"], reference="bus client", goal=RATE_GOAL),
        row(f"lost or changed, of {MANY_STREAMS} streams", [lost], "streams", goal=0, sense="<=", on="value"),
    ]


def _by_bus(client: AsyncClient) -> Stream:
    async def stream(which: int, num_tokens: int) -> tuple[float, str]:
        begun, first, text = time.monotonic(), 0.0, ""
        generation = client.generate(token_ids=_prompt(which), max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        while batch := await generation.next_batch():
            pieces = [event.text for event in batch if isinstance(event, Token)]
            first = first or (time.monotonic() - begun if pieces else 0.0)
            text += "".join(pieces)
        return first, text

    return stream


@asynccontextmanager
async def by_http(port: int) -> AsyncIterator[Stream]:
    """Streams by way of the gateway at this port. Each raises RuntimeError where it gets no whole answer."""
    idle: list[_Connection] = []

    async def stream(which: int, num_tokens: int) -> tuple[float, str]:
        begun = time.monotonic()
        fields = {"prompt": _prompt(which), "max_tokens": num_tokens, "temperature": 0}
        body = msgspec.json.encode(fields | {"ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        while idle and idle[-1].transport.is_closing():  # given up by the gateway meanwhile
            idle.pop()
        if idle:
            connection = idle.pop()
        else:
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
        answer = await connection.ask(head.encode() + body)
        idle.append(connection)
        return connection.first_at - begun, _text(answer)

    try:
        yield stream
    finally:
        for connection in idle:
            connection.transport.close()


class _Connection(asyncio.Protocol):
    """One connection to the gateway, for one streamed answer after another. first_at: when its first event came."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.first_at = 0.0
        self._answer = bytearray()
        self._whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def ask(self, request: bytes) -> bytes:
        """The answer, with its head and in its chunks. Raises RuntimeError if it is none that can be read."""
        self.first_at, self._answer, self._whole = 0.0, bytearray(), asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is TCP
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self.first_at and b"data: " in self._answer:
            self.first_at = time.monotonic()
        if self._answer.endswith(LAST_CHUNK):
            self._end()
        elif not OK.startswith(self._answer[: len(OK)]):
            self._end(f"the gateway answered {bytes(self._answer[:80])!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the gateway closed the connection")

    def _end(self, problem: str = "") -> None:
        if self._whole.done():
            return
        if problem:
            self._whole.set_exception(RuntimeError(problem))
            self.transport.close()
        else:
            self._whole.set_result(bytes(self._answer))


def _text(answer: bytes) -> str:
    """What a streamed answer says; each of its events came in one chunk."""
    *events, last = re.findall(rb"^data: (.*)$", answer, re.MULTILINE)
    if last != b"[DONE]":
        raise RuntimeError(f"the gateway's stream ended with {last!r}")
    return "".join(choice.text for event in events for choice in _chunk.decode(event).choices)


def _prompt(which: int) -> list[int]:
    return [3 + (which * 7 + position * position) % 500 for position in range(16)]
