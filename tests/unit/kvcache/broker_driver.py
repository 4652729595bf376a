"""A broker core driven by hand: peers say messages, and what it sends is read back as messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from bus import messages as m
from bus import wire
from bus.wire import Buffer
from kvcache.broker.core import BrokerCore
from kvcache.broker.sends import Port, Send
from kvcache.config import BrokerConfig

USER = "default"


class Heard(NamedTuple):
    """What one peer hears: the message, or for an envelope the message and what is inside it, byte for byte."""

    port: Port
    link: bytes
    message: Any
    inner: tuple[bytes, ...] = ()


def read(sends: list[Send]) -> list[Heard]:
    """Sends as messages. A relayed answer has no envelope and is read as itself."""
    heard = []
    for send in sends:
        frames = [bytes(frame) for frame in send.frames]
        message = wire.decode_envelope(frames)
        inner = tuple(frames[1:]) if isinstance(message, m.Assign | m.Forward | m.Relay) else ()
        if not inner:
            message = wire.decode(frames).message
        heard.append(Heard(send.port, send.link, message, inner))
    return heard


def frames_of(message: m.Message, *payload: bytes) -> list[Buffer]:
    return [wire.encode(message), *payload]


class Driver:
    """One core and its clock. Ids that the core makes count up, so that a test can name them."""

    def __init__(self, **config: Any) -> None:
        self.now = 1000.0
        ids = itertools.count(1)
        is_tracing = bool(config.pop("is_tracing", False))
        fields: dict[str, Any] = {"settle_ms": 0, "policy": "round_robin"} | config
        self.core = BrokerCore(
            BrokerConfig(**fields),
            incarnation=42,
            now=self.now,
            new_id=lambda: next(ids).to_bytes(16, "big"),
            is_tracing=is_tracing,
        )

    def client(self, link: bytes, message: m.Message, *payload: bytes, user: str = USER) -> list[Heard]:
        return self.client_frames(link, frames_of(message, *payload), user=user)

    def client_frames(self, link: bytes, frames: Sequence[Buffer], *, user: str = USER) -> list[Heard]:
        return read(self.core.on_client(link, frames, self.now, user))

    def client_bulk(self, link: bytes, message: m.Message, *payload: bytes, user: str = USER) -> list[Heard]:
        return read(self.core.on_client_bulk(link, frames_of(message, *payload), self.now, user))

    def worker(self, link: bytes, message: m.Message, *payload: bytes, user: str = USER) -> list[Heard]:
        return read(self.core.on_worker(link, frames_of(message, *payload), self.now, user))

    def worker_bulk(self, link: bytes, message: m.Message, *payload: bytes, user: str = USER) -> list[Heard]:
        return read(self.core.on_worker_bulk(link, frames_of(message, *payload), self.now, user))

    def reply(self, link: bytes, call: int, answer: m.Message, *payload: bytes, final: bool = True) -> list[Heard]:
        return self.worker(link, m.Reply(call=call, final=final), wire.encode(answer), *payload)

    def tick(self, seconds: float = 0.0, *, step: float = 0.25) -> list[Heard]:
        """Let time pass as the shell does, in small steps."""
        end, heard = self.now + seconds, list[Heard]()
        while True:
            self.now = min(end, self.now + step)
            heard += read(self.core.tick(self.now))
            if self.now >= end:
                return heard

    # --- peers that behave -----------------------------------------------------------------------

    def join_client(self, link: bytes = b"c1", instance: bytes = bytes(16), user: str = USER) -> m.Welcome:
        (heard,) = self.client(link, hello(instance), user=user)
        assert isinstance(heard.message, m.Welcome)
        return heard.message

    def join_worker(self, link: bytes, worker_id: str, incarnation: int = 1, **fields: Any) -> m.Welcome:
        """It holds nothing yet, and says so."""
        (heard,) = self.worker(link, worker_hello(worker_id, incarnation, **fields))
        assert isinstance(heard.message, m.Welcome)
        assert self.worker(link, nodes_held(), b"") == []
        return heard.message

    def open_stream(self, link: bytes = b"c1") -> bytes:
        (heard,) = self.client(link, m.OpenStream(req_id=b"o" * 16))
        assert isinstance(heard.message, m.StreamOpened)
        return heard.message.stream_id

    def stats(self) -> Any:
        return self.core.cluster_stats(self.now, m.QueryKind.STATS).broker


def hello(instance: bytes = bytes(16), major: int = wire.MAJOR) -> m.Hello:
    return m.Hello(instance=instance, major=major, minor=0, software="test")


def worker_hello(worker_id: str, incarnation: int = 1, major: int = wire.MAJOR, **fields: Any) -> m.WorkerHello:
    return m.WorkerHello(worker_id=worker_id, incarnation=incarnation, major=major, minor=0, **fields)


def nodes_held(*nodes: bytes, after: int = 0, tenant: str = USER) -> m.NodesHeld:
    """All that a worker holds, in one part; comes with the nodes joined as its payload."""
    runs = (m.NodeRun(tenant, True, len(nodes)),) if nodes else ()
    return m.NodesHeld(after=after, part=0, is_last=True, runs=runs, payload=wire.describe([b"".join(nodes)]))


def rid(number: int) -> bytes:
    return number.to_bytes(16, "little")


def length(number: int = 1, seq_id: str = "s", deadline_ms: int = 5000, attempt: int = 0) -> m.Length:
    return m.Length(req_id=rid(number), attempt=attempt, deadline_ms=deadline_ms, seq_id=seq_id, layer=0)


PROMPT = b"hello"


def generate(stream_id: bytes, number: int = 1, **fields: Any) -> m.Generate:
    """Comes with `PROMPT` as its payload."""
    return m.Generate(
        **{
            "req_id": rid(number),
            "attempt": 0,
            "deadline_ms": 60_000,
            "stream_id": stream_id,
            "epoch": 0,
            "kind": m.PromptKind.TEXT,
            "sampling": m.Sampling(),
            "payload": wire.describe([PROMPT]),
            **fields,
        }
    )


def done(number: int = 1) -> m.KvDone:
    return m.KvDone(req_id=rid(number), length=3)


def stream_end(number: int = 1) -> m.StreamEnd:
    return m.StreamEnd(
        req_id=rid(number),
        epoch=0,
        num_tokens=0,
        digest=bytes(32),
        finish_reason=m.FinishReason.STOP,
        prompt_tokens=1,
        cached_tokens=0,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
    )


def beat(number: int = 1, state: m.WorkerState = m.WorkerState.READY, **fields: int) -> m.WorkerBeat:
    figures: dict[str, Any] = {"running": 0, "waiting": 0, "progress": 0, "kv_used_bytes": 0, "kv_total_bytes": 0}
    figures |= fields
    return m.WorkerBeat(beat=number, state=state, **figures)
