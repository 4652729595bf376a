"""What this worker has to do with other workers: those that copy from it, and those that it copies from."""

from __future__ import annotations

from typing import assert_never

import msgspec

from bus.messages import Grant
from bus.stats import PeerStats
from bus.wire import Frames
from workers.calls import Action
from workers.copy_api import BlocksRead, CopyBroke, CopyEvent, Filled, Lent, Wanted
from workers.peer_holder import Holder
from workers.peer_puller import Puller


class Peers:
    """Both sides of copying. Only what the broker ordered or granted is ever copied."""

    def __init__(self, worker_id: str) -> None:
        self._holder = Holder()
        self._puller = Puller(worker_id)

    @property
    def malformed(self) -> int:
        """Unreadable messages at our own endpoint."""
        return self._holder.malformed

    def stats(self) -> PeerStats:
        return msgspec.structs.replace(
            self._puller.stats(), served=self._holder.num_served, served_bytes=self._holder.served_bytes
        )

    def granted(self, grant: Grant, now: float) -> list[Action]:
        return self._holder.granted(grant, now)

    def on_request(self, peer: bytes, frames: Frames, now: float) -> list[Action]:
        """A message at our own endpoint, from whoever can reach it."""
        return self._holder.on_message(peer, frames, now)

    def on_answer(self, url: str, frames: Frames, now: float) -> list[Action]:
        """A message of a worker that we copy from."""
        return self._puller.on_message(url, frames, now)

    def lose_caller(self, peer: bytes) -> list[Action]:
        return self._holder.lose(peer)

    def lose_peer(self, url: str) -> list[Action]:
        return self._puller.lose(url)

    def on_engine(self, event: CopyEvent, now: float) -> list[Action]:
        match event:
            case Wanted():
                return self._puller.begin(event, now)
            case Filled():
                return self._puller.on_engine(event, now)
            case Lent() | BlocksRead():
                return self._holder.on_engine(event, now)
            case CopyBroke():  # the names of loans and generations are never alike, so one of the two knows it
                return [*self._holder.on_engine(event, now), *self._puller.on_engine(event, now)]
            case _:
                assert_never(event)

    def tick(self, now: float) -> list[Action]:
        return [*self._holder.tick(now), *self._puller.tick(now)]
