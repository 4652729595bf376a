"""The sockets that block events go out by: one that publishes, and one that tells again what was missed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from bus import sockets
from bus.security import SecurityConfig
from bus.sockets import Context, Message, Publisher, Router, Sent
from workers.block_changes import BlockChange
from workers.kv_events import KvEventLog


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
        self._publisher = stack.enter_context(Publisher(context, sockets.KV_EVENTS, security, lambda batch: None))
        self._publisher.bind(config.url)
        if config.replay_url:
            self._replay = stack.enter_context(Router(context, sockets.KV_EVENTS, security, self._asked))
            self._replay.bind(config.replay_url)
            self._replay.start()

    def publish(self, changes: Sequence[BlockChange]) -> None:
        """Tell subscribers; those who take too little miss it, and see by the number that they have."""
        batch = self._log.add(changes, time.time())
        if batch is not None:
            self._publisher.send([self._topic, *batch])

    def _asked(self, requests: list[Message]) -> None:
        for peer, *frames in requests:
            for answer in self._log.replay(frames):
                if self._replay.send(bytes(peer), answer) in {Sent.FULL, Sent.GONE}:
                    break  # it takes nothing, and asks again if it does want it
