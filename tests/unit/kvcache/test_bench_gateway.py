"""The HTTP driver of `kvcache bench gateway`: it must read all of an answer and take none for whole that is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from kvcache.bench.gateway import by_http

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
FIRST, SECOND, DONE = (
    b"%x\r\n%b\r\n" % (len(event), event)
    for event in (
        b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"b"}]}\n\n',
        b'data: {"choices":[{"text":"c\\n"}]}\n\n',
        b"data: [DONE]\n\n",
    )
)


@asynccontextmanager
async def gateway(*answers: Sequence[bytes]) -> AsyncIterator[tuple[int, list[int]]]:
    """Gives these answers, each in these pieces, and closes after an empty one. Yields its port and where answers went:
    the number of the connection of each."""
    left, num_connections = list(answers), 0
    went: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        number, num_connections = num_connections, num_connections + 1
        while await reader.readline():
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            went.append(number)
            for piece in left.pop(0):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if not left:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], went


async def test_an_answer_is_read_whole_however_it_is_cut_and_its_connection_kept() -> None:
    whole = HEAD + FIRST + SECOND + DONE + END
    pieces = [whole[at : at + 1] for at in range(len(whole))]
    async with gateway([HEAD, FIRST, SECOND, DONE + END], pieces) as (port, went), by_http(port) as stream:
        (first_s, text), (_, again) = await stream(0, 3), await stream(0, 3)
    assert text == again == "abc\n"
    assert first_s > 0
    assert went == [0, 0]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([b"HTTP/1.1 503 Service Unavailable\r\n\r\n"], "503"),
        ([HEAD, FIRST], "closed the connection"),
        ([HEAD, FIRST, END], "ended with"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(answer: list[bytes], words: str) -> None:
    async with gateway(answer) as (port, _), by_http(port) as stream:
        with pytest.raises(RuntimeError, match=words):
            await stream(0, 3)
