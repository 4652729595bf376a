"""The sockets that block events go out by: one that publishes, and one that tells again what was missed.

A replay may be long, and the loop is the worker's: it is sent in slices, between which everything else has its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from bus import sockets
from bus.security import SecurityConfig
from bus.sockets import Context, Message, Publisher, Router, Sent
from workers.block_changes import BlockChange
from workers.kv_events import KvEventLog

MAX_REPLAYS = 64
SLICE_BATCHES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEventsConfig:
    """url: where others subscribe. replay_url: where they ask again; empty for nowhere. topic: of all that is told."""

    url: str
    replay_url: str = ""
    topic: bytes


class KvEventSockets:
    """Bound until the stack is left. Raises Forbidden or ConnectionLost if an address cannot be bound."""

    def __init__(self, context: Context, security: SecurityConfig, stack: ExitStack, config: KvEventsConfig) -> None:
        self._topic = config.topic
        self._log = KvEventLog(time.time())
        self._replays: dict[bytes, Iterator[Sequence[bytes]]] = {}
        self._is_due = False
        self._publisher = stack.enter_context(Publisher(context, sockets.KV_EVENTS, security, lambda batch: None))
        self._publisher.bind(config.url)
        if config.replay_url:
            self._replay = stack.enter_context(Router(context, sockets.KV_EVENTS, security, self._asked))
            self._replay.bind(config.replay_url)
            self._replay.start()
            stack.callback(self._replays.clear)

    def publish(self, changes: Sequence[BlockChange]) -> None:
        """Tell subscribers; those who take too little miss it, and see by the number that they have."""
        batch = self._log.add(changes, time.time())
        if batch is not None:
            self._publisher.send([self._topic, *batch])

    def _asked(self, requests: list[Message]) -> None:
        """Begin to answer; who asks again gets the newer answer only, and who is one too many asks later."""
        for peer, *frames in requests:
            if bytes(peer) in self._replays or len(self._replays) < MAX_REPLAYS:
                self._replays[bytes(peer)] = self._log.replay(frames)
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        if self._replays and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        """The next slice of each answer."""
        self._is_due = False
        for peer, answers in list(self._replays.items()):
            batches = list(islice(answers, SLICE_BATCHES))
            # One that takes nothing is given up: it asks again if it does want it.
            is_taken = all(self._replay.send(peer, batch) not in {Sent.FULL, Sent.GONE} for batch in batches)
            if not is_taken or len(batches) < SLICE_BATCHES:
                del self._replays[peer]
        self._go_on_soon()
