"""A worker's core with its brokers and its engine played by the test: events in, decoded actions out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from bus import wire
from bus.messages import (
    Assign,
    BrokerBeat,
    Forward,
    Generate,
    Message,
    PromptKind,
    PullOrder,
    Reply,
    Sampling,
    Welcome,
    WorkerBeat,
    WorkerHello,
)
from bus.stats import ModelStats
from bus.streams import token_bytes
from bus.wire import Buffer, Frames
from workers.calls import Action, Channel, Publish, Send, Tell
from workers.core import WorkerCore
from workers.engine_api import Command, EngineFigures, Event, Start
from workers.memory import HostMemory
from workers.store import KVStore

M = TypeVar("M", bound=Message)
C = TypeVar("C")

CLIENT = b"c" * 16
HELLO = WorkerHello(worker_id="w", incarnation=7, major=wire.MAJOR, minor=0)
STREAM = b"s" * 16


@dataclass(frozen=True)
class Said:
    """An answer within a call."""

    call: int
    final: bool
    message: Any
    payload: Sequence[Buffer]
    channel: Channel


def welcome(session: bytes, **limits: int) -> Welcome:
    values = {
        "incarnation": 1,
        "major": wire.MAJOR,
        "minor": 0,
        "heartbeat_ms": 250,
        "lease_ms": 2000,
        "max_inline_bytes": 1 << 18,
        "max_prompt_bytes": 1 << 20,
        "max_tensor_bytes": 1 << 32,
        "chunk_bytes": 1 << 20,
        "window_tokens": 1024,
    }
    return Welcome(session=session, **(values | limits))


class CoreBench:
    """One core. `now` is the test's to move, with `pass_time` where the loop is to have run all the while.

    bulk_room: by link, how many messages a lane for bulk data takes whenever the core has something to say.
    """

    def __init__(self, *, num_links: int = 1, preloading: Sequence[str] = (), nbytes: int = 4 << 20) -> None:
        self.now = 100.0
        self.figures = EngineFigures()
        self.store = KVStore(HostMemory(nbytes))
        self.bulk_room: dict[int, int] = {}
        self.core = WorkerCore(
            HELLO,
            self.store,
            num_links=num_links,
            preloading=preloading,
            bulk_room=lambda link: self.bulk_room.get(link, 64),
            now=self.now,
        )
        self._calls = itertools.count(1)
        self._req_ids = itertools.count(1)

    # --- what brokers do ---

    def join(self, link: int = 0, session: bytes = b"S" * 16, first_call: int = 0) -> list[Action]:
        """Welcome the worker and grant its lease."""
        actions = self.control(welcome(session, first_call=first_call), link=link)
        beat = messages(actions, WorkerBeat)[-1].beat
        return actions + self.control(BrokerBeat(beat=beat, lease_ms=2000), link=link)

    def control(self, message: Message, *payload: Buffer, link: int = 0) -> list[Action]:
        return self.core.on_control(link, [wire.encode(message), *payload], self.now)

    def assign(
        self,
        message: Any,
        *payload: Buffer,
        link: int = 0,
        tenant: str = "t",
        client: bytes = CLIENT,
        deadline_ms: int = 60_000,
        newest: int = 0,
        version: int = 0,
        bulk: bool = False,
        pull: PullOrder | None = None,
    ) -> tuple[int, list[Action]]:
        """Hand a request to the worker; its payload is described if the message does not."""
        call = next(self._calls)
        if payload and not message.payload:
            message = msgspec.structs.replace(message, payload=wire.describe(payload))
        envelope = Assign(
            call=call,
            tenant=tenant,
            client=client,
            deadline_ms=deadline_ms,
            reason="because",
            pull=pull,
            newest=newest,
            version=version,
        )
        frames = [wire.encode(envelope), wire.encode(message), *payload]
        handle = self.core.on_bulk if bulk else self.core.on_control
        return call, handle(link, frames, self.now)

    def forward(self, call: int, message: Any, *payload: Buffer, link: int = 0, bulk: bool = False) -> list[Action]:
        if payload and not message.payload:
            message = msgspec.structs.replace(message, payload=wire.describe(payload))
        frames = [wire.encode(Forward(call=call)), wire.encode(message), *payload]
        handle = self.core.on_bulk if bulk else self.core.on_control
        return handle(link, frames, self.now)

    # --- what the engine and the clock do ---

    def engine(self, *events: Event) -> list[Action]:
        return [action for event in events for action in self.core.on_engine(event, self.now)]

    def tick(self) -> list[Action]:
        return self.core.tick(self.figures, self.now, rss_bytes=1, lag_s=0.0)

    def pass_time(self, seconds: float, *, answering: bool = True) -> list[Action]:
        """Tick each 1/16 s (sums of it are exact); the brokers answer beats if they are `answering`."""
        actions: list[Action] = []
        for _ in range(round(seconds * 16)):
            self.now += 1 / 16
            ticked = self.tick()
            actions += ticked
            if answering:
                for send in sends(ticked):
                    message = wire.decode_header(send.frames[0])
                    if isinstance(message, WorkerBeat):
                        self.control(BrokerBeat(beat=message.beat, lease_ms=2000), link=send.link)
        return actions

    # --- making requests ---

    def req_id(self) -> bytes:
        return next(self._req_ids).to_bytes(16, "big")

    def generate(self, **changes: Any) -> Generate:
        fields: dict[str, Any] = {
            "req_id": self.req_id(),
            "attempt": 0,
            "deadline_ms": 60_000,
            "stream_id": STREAM,
            "epoch": 0,
            "kind": PromptKind.TOKENS,
            "sampling": Sampling(max_tokens=100),
        }
        return Generate(**(fields | changes))

    def start(
        self,
        message: Generate | None = None,
        *,
        resume: Sequence[int] = (),
        **options: Any,
    ) -> tuple[int, Start]:
        """Begin a generation; returns its call and what the engine was told."""
        payload = [token_bytes([1, 2, 3]), *([token_bytes(resume)] if resume else [])]
        call, actions = self.assign(message or self.generate(), *payload, **options)
        return call, commands(actions, Start)[-1]

    def has_failed(self, actions: Sequence[Action]) -> Any:
        failures = [said.message for said in answers(actions) if said.final]
        assert len(failures) == 1, failures
        return failures[0]


def sends(actions: Sequence[Action]) -> list[Send]:
    return [action for action in actions if isinstance(action, Send)]


def answers(actions: Sequence[Action]) -> list[Said]:
    """The answers within calls, decoded and checked, in order."""
    said: list[Said] = []
    for send in sends(actions):
        if send.call is not None:
            envelope = wire.decode_header(send.frames[0])
            assert isinstance(envelope, Reply)
            assert envelope.call == send.call.number
            decoded = wire.decode(_frames(send.frames[1:]))
            said.append(Said(envelope.call, envelope.final, decoded.message, decoded.payload, send.channel))
    return said


def _frames(frames: Frames) -> list[Buffer]:
    return list(frames)


def messages(actions: Sequence[Action], kind: type[M]) -> list[M]:
    """Messages of that kind to brokers, outside calls."""
    decoded = [wire.decode_header(send.frames[0]) for send in sends(actions) if send.call is None]
    return [message for message in decoded if isinstance(message, kind)]


def commands(actions: Sequence[Action], kind: type[C]) -> list[C]:
    told: list[Command] = [action.command for action in actions if isinstance(action, Tell)]
    return [command for command in told if isinstance(command, kind)]


def published(actions: Sequence[Action]) -> list[Any]:
    return [wire.decode_header(action.frame) for action in actions if isinstance(action, Publish)]


def loaded(name: str, state: str) -> EngineFigures:
    return EngineFigures(models=(ModelStats(name=name, state=state),))
