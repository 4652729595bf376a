"""The book of open streams: which topics exist, whose they are, and for how long.

A stream is opened for one generation and is gone when that ends, is refused, or has not come within a
minute. Its id is random and secret; to know it is to be allowed to subscribe.
"""

from __future__ import annotations

from collections.abc import Callable

from bus.errors import BadArgument, Overloaded
from kvcache.broker.deadlines import Deadlines
from kvcache.broker.members import Call, Client, Stream

IDLE_S = 60.0
MAX_PER_CLIENT = 4096


class Streams:
    """`new_id` makes 16 secret random bytes."""

    def __init__(self, new_id: Callable[[], bytes]) -> None:
        self._new_id = new_id
        self._open: dict[bytes, Stream] = {}
        self._idle: Deadlines[Stream] = Deadlines()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, stream_id: bytes) -> bool:
        return stream_id in self._open

    def open(self, client: Client, now: float) -> Stream:
        """A new stream for `client`. Raises Overloaded if it has too many."""
        if len(client.streams) >= MAX_PER_CLIENT:
            raise Overloaded(f"this client has {MAX_PER_CLIENT} streams open", retry_after_ms=1000)
        stream = Stream(self._new_id(), client, now + IDLE_S)
        self._open[stream.id] = client.streams[stream.id] = stream
        self._idle.add(stream, stream.expires_at)
        return stream

    def unused(self, client: Client, stream_id: bytes) -> Stream:
        """The client's stream of this id, which no generation has yet. Raises BadArgument if there is none."""
        stream = client.streams.get(stream_id)
        if stream is None:
            raise BadArgument("the stream is not open, or not this client's; send OpenStream first")
        if stream.call is not None:
            raise BadArgument("the stream carries another generation; send OpenStream for one of its own")
        return stream

    def use(self, stream: Stream, call: Call) -> None:
        """The stream carries this call from now on."""
        stream.call = call
        self._idle.discard(stream, stream.expires_at)

    def close(self, stream: Stream) -> None:
        """No new subscription to it is allowed."""
        self._open.pop(stream.id, None)
        stream.client.streams.pop(stream.id, None)
        self._idle.discard(stream, stream.expires_at)

    def expire(self, now: float) -> None:
        """Close those that were opened and not used."""
        for stream in self._idle.due(now):
            self.close(stream)

    def check(self) -> None:
        """Assert that a stream is its client's, and either idle or carries a call that is in flight."""
        idle = 0
        for stream_id, stream in self._open.items():
            assert stream.id == stream_id
            assert stream.client.streams.get(stream_id) is stream
            assert all(stream_id in self for stream_id in stream.client.streams)
            if stream.call is None:
                idle += 1
            else:
                assert stream.call.stream is stream
                assert stream.client.calls.get(stream.call.req_id) is stream.call
        assert len(self._idle) == idle
