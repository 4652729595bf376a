"""What this worker has to do with other workers: those that copy from it, and those that it copies from.

Blocks of prompts and whole named sequences are copied by parts of their own, over the same connections. The id of a
copy says which: those of sequences begin with `workers.sequence_taker.ID`. Who cannot be reached directly is copied
from through the broker (`workers.relays`).
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from bus import wire
from bus.messages import Assign, CopySequence, Grant, Relay
from bus.stats import PeerStats
from bus.wire import Frames
from workers.calls import Action, ToPeer
from workers.copy_api import BlocksRead, CopyBroke, CopyEvent, Filled, Lent, Wanted
from workers.peer_holder import Holder
from workers.peer_puller import Puller
from workers.relays import Reach, relayed
from workers.sequence_giver import Giver
from workers.sequence_taker import ID, Taker


class Peers:
    """Both sides of copying. Only what the broker ordered or granted is ever copied."""

    def __init__(self, worker_id: str, giver: Giver, taker: Taker) -> None:
        self._holder = Holder()
        self._puller = Puller(worker_id, taker.uses)
        self._giver = giver
        self._taker = taker
        self._reach = Reach()

    @property
    def malformed(self) -> int:
        """Unreadable messages at our own endpoint."""
        return self._holder.malformed + self._giver.malformed

    def stats(self) -> PeerStats:
        return msgspec.structs.replace(
            self._puller.stats(),
            served=self._holder.num_served,
            served_bytes=self._holder.served_bytes,
            sequences_given=self._giver.num_given,
            sequences_taken=self._taker.num_taken,
        )

    def granted(self, grant: Grant, now: float) -> list[Action]:
        return self._giver.granted(grant, now) if grant.seq_id else self._holder.granted(grant, now)

    def ordered(self, link: int, order: CopySequence, now: float, *, is_closed: bool) -> list[Action]:
        """A broker has us copy a sequence. is_closed: nothing new is taken any more."""
        url = self._reach.address(link, order.url, order.worker_id, now)
        self._puller.use(url, now)
        actions = self._taker.ordered(link, msgspec.structs.replace(order, url=url), now, is_closed=is_closed)
        return self._note_asked(actions, now)

    def route(self, link: int, assign: Assign, now: float) -> Assign:
        """The same assignment, with the address at which to ask whom it says to pull from."""
        if assign.pull is None:
            return assign
        url = self._reach.address(link, assign.pull.url, assign.pull.worker_id, now)
        return msgspec.structs.replace(assign, pull=msgspec.structs.replace(assign.pull, url=url))

    def on_relay(self, link: int, relay: Relay, frames: Frames, now: float) -> list[Action]:
        """What another worker says by way of a broker."""
        address = relayed(link, relay.worker_id)
        if relay.is_answer:
            return self.on_answer(address, frames, now)
        return self.on_request(address.encode(), frames, now)

    def lose_session(self, link: int) -> list[Action]:
        return self._taker.lose_session(link)

    def replace_session(self, link: int) -> list[Action]:
        return self._taker.replace_session(link)

    def regain_session(self, link: int) -> list[Action]:
        return self._taker.regain_session(link)

    def on_request(self, peer: bytes, frames: Frames, now: float) -> list[Action]:
        """A message at our own endpoint, from whoever can reach it."""
        party = self._giver if _is_of_sequence(frames) else self._holder
        return party.on_message(peer, frames, now)

    def on_answer(self, url: str, frames: Frames, now: float) -> list[Action]:
        """A message of a worker that we copy from."""
        self._reach.heard(url)
        if not _is_of_sequence(frames):
            return self._puller.on_message(url, frames, now)
        self._puller.use(url, now)
        return self._taker.on_message(url, frames, now)

    def lose_caller(self, peer: bytes) -> list[Action]:
        return [*self._holder.lose(peer), *self._giver.lose(peer)]

    def lose_peer(self, url: str, now: float) -> list[Action]:
        self._reach.lost(url, now)
        return [*self._puller.lose(url), *self._taker.lose(url)]

    def on_engine(self, event: CopyEvent, now: float) -> list[Action]:
        match event:
            case Wanted():
                return self._note_asked(self._puller.begin(event, now), now)
            case Filled():
                return self._puller.on_engine(event, now)
            case Lent() | BlocksRead():
                return self._holder.on_engine(event, now)
            case CopyBroke():  # the names of loans and generations are never alike, so one of the two knows it
                return [*self._holder.on_engine(event, now), *self._puller.on_engine(event, now)]
            case _:
                assert_never(event)

    def tick(self, now: float) -> list[Action]:
        self._reach.tick(now)
        parts = (self._holder, self._puller, self._giver, self._taker)
        return [action for part in parts for action in part.tick(now)]

    def _note_asked(self, actions: list[Action], now: float) -> list[Action]:
        """The same actions. Who is asked in them owes an answer; what was refused here nobody hears of."""
        for action in actions:
            if isinstance(action, ToPeer):
                self._reach.asked(action.url, now)
        return actions


def _is_of_sequence(frames: Frames) -> bool:
    return bool(frames) and wire.request_id_of(frames[0]).startswith(ID)
