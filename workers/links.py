"""This worker's standing with each of its brokers: hello, beats, silence, and the lease that follows.

    JOINING  hello goes out each 250 ms until the broker welcomes us
    JOINED   a beat each heartbeat, each asking for the lease to be renewed; after 750 ms of silence hello
             goes out too: the broker may have restarted and not know us. Silent for a whole lease: JOINING

A welcome with the session we have is an echo. One with the session that we had given up means that the broker,
which did not run for a while perhaps, has kept it with all its calls. Another session means that it forgot the calls
of the old one. Whether we may publish and acknowledge writes is the lease's business, not the session's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from bus import wire
from bus.leases import WorkerLease
from bus.messages import (
    AttachBulk,
    BrokerBeat,
    Message,
    ModelState,
    Welcome,
    WorkerBeat,
    WorkerHello,
    WorkerState,
)
from bus.wire import Buffer
from workers.calls import Action, Channel, Forget, Send

HELLO_S = 0.25
SILENCE_S = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a beat says beside that we live. sequences: how many named ones we hold, for the hello."""

    running: int = 0
    waiting: int = 0
    progress: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 0
    sequences: int = 0
    models: tuple[tuple[str, ModelState], ...] = ()
    backlog_tokens: int = 0
    changes: int = 0


class Link:
    """One broker, as far as this worker is concerned. `welcome` is None until it has joined."""

    def __init__(self, number: int, hello: WorkerHello, now: float) -> None:
        self.number = number
        self.welcome: Welcome | None = None
        self.lease = WorkerLease(now)
        self._session: bytes | None = None  # the last one, which may have been given up
        self._hello = hello
        self._heard_at = now
        self._hello_due = now
        self._beat_due = now
        self._beat = 0
        self._refusal = ""
        self._hellos = 0

    def heard(self, now: float) -> None:
        """Any message is a sign of life."""
        self._heard_at = now

    def is_news(self, refusal: str) -> bool:
        """Whether the broker says something else than to our last hello: it answers each, four times a second."""
        before, self._refusal = self._refusal, refusal
        return refusal != before

    def welcomed(self, welcome: Welcome, now: float) -> bool:
        """The broker accepts us. True if this is another session than the last one, whose calls are void then."""
        self._refusal = ""
        is_new, was_away = welcome.session != self._session, self.welcome is None
        self.welcome, self._session = welcome, welcome.session
        if is_new or was_away:
            self.lease.void()
            self._beat_due = now + welcome.heartbeat_ms / 1000  # the first one goes out at once
        return is_new

    def is_void(self, call: int) -> bool:
        """Whether a call is of an earlier session than this one: the bulk lane may be behind the other."""
        return self.welcome is not None and call < self.welcome.first_call

    def attach(self) -> list[Action]:
        """Say on the bulk lane whose it is."""
        assert self.welcome is not None
        return [self._send(AttachBulk(session=self.welcome.session), channel=Channel.BULK)]

    def granted(self, answer: BrokerBeat) -> None:
        self.lease.granted(answer.beat, answer.lease_ms)

    def said_goodbye(self, now: float) -> None:
        """The broker leaves, and has forgotten the session: begin again."""
        self.left(now)
        self._session = None

    def may_be_back(self, within_s: float, now: float) -> bool:
        """Whether we have joined it, or had and heard of it so lately that it may only be restarting."""
        return self.welcome is not None or (self._session is not None and now - self._heard_at < within_s)

    def left(self, now: float) -> None:
        """It is silent, or nothing can be sent to it: begin again."""
        self.welcome = None
        self.lease.void()
        self._hello_due = now + HELLO_S

    def is_dead(self, now: float) -> bool:
        """Whether a broker that we had joined has been silent for a whole lease: it has given us up, or it is gone."""
        return self.welcome is not None and now - self._heard_at > self.welcome.lease_ms / 1000

    def tick(self, state: WorkerState, load: Callable[[], Load], now: float) -> list[Action]:
        """What time brings about: hellos and beats."""
        self.lease.tick(now)
        actions: list[Action] = []
        is_silent = now - self._heard_at > SILENCE_S
        if (self.welcome is None or is_silent) and now >= self._hello_due:
            self._hello_due = now + HELLO_S
            if self.welcome is None:
                actions.append(Forget(self.number))
            self._hellos += 1
            hello = msgspec.structs.replace(self._hello, state=state, sequences=load().sequences, number=self._hellos)
            actions.append(self._send(hello))
        if self.welcome is not None and now >= self._beat_due:
            self._beat_due = max(now, self._beat_due + self.welcome.heartbeat_ms / 1000)
            actions += self.beat(state, load(), now)
        return actions

    def beat(self, state: WorkerState, load: Load, now: float) -> list[Action]:
        """A beat, now: on time, or because the state has changed. Nothing before we have joined."""
        if self.welcome is None:
            return []
        self._beat += 1
        self.lease.sent(self._beat, now)
        beat = WorkerBeat(
            beat=self._beat,
            state=state,
            running=load.running,
            waiting=load.waiting,
            progress=load.progress,
            kv_used_bytes=load.kv_used_bytes,
            kv_total_bytes=load.kv_total_bytes,
            models=load.models,
            changes=load.changes,
            backlog_tokens=load.backlog_tokens,
        )
        return [self._send(beat)]

    def say(self, message: Message, *payload: Buffer, point: str = "") -> list[Action]:
        """A message outside any call. Nothing before we have joined. `point`: as in `Send`."""
        return [] if self.welcome is None else [self._send(message, payload, point=point)]

    def _send(
        self, message: Message, payload: Sequence[Buffer] = (), channel: Channel = Channel.CONTROL, point: str = ""
    ) -> Send:
        return Send(self.number, channel, [wire.encode(message), *payload], point=point)
