"""The way to another worker: directly, or through the broker where that cannot be.

Who can be reached is found out by asking: an address from which nothing comes for `PATIENCE_S` after it was asked, or
to which nothing can be sent, counts as out of reach for `DETOUR_S`. What a broker orders to be copied from there
meanwhile goes through that broker's bulk lane, in envelopes (`Relay`) around the same messages. Both ends use an
address of a kind that no socket has, so nothing else knows the difference: tickets, credit, checksums and patience are
the same.

Such addresses are made here only. Nobody can connect to us under one, since libzmq lets no peer choose a name that
begins with a zero, and one that a worker claims to have is not believed.
"""

from __future__ import annotations

from bus import wire
from bus.messages import Relay
from workers.calls import Channel, Send, ToCaller, ToPeer

PATIENCE_S = 0.9
"""Less than whoever copies has: when they try again it is known."""
DETOUR_S = 60.0
PREFIX = "\0broker:"


def relayed(link: int, worker_id: str) -> str:
    """The address of that worker, through the broker of this link."""
    return f"{PREFIX}{link}/{worker_id}"


def through_broker(action: ToPeer | ToCaller) -> Send | None:
    """The same message in an envelope for the broker; None if it goes directly."""
    address = action.peer if isinstance(action, ToCaller) else action.url.encode()
    if not address.startswith(PREFIX.encode()):
        return None
    link, _, worker_id = address.decode().removeprefix(PREFIX).partition("/")
    envelope = wire.encode(Relay(worker_id=worker_id, is_answer=isinstance(action, ToCaller)))
    return Send(int(link), Channel.BULK, [envelope, *action.frames])


class Reach:
    """Which addresses can be reached directly."""

    def __init__(self) -> None:
        self._asked: dict[str, float] = {}  # since when they have not answered
        self._detours: dict[str, float] = {}  # out of reach, until when

    def address(self, link: int, url: str, worker_id: str, now: float) -> str:
        """Where to ask the worker that is said to be at `url`."""
        is_out_of_reach = url.startswith(PREFIX) or now < self._detours.get(url, now)
        return relayed(link, worker_id) if is_out_of_reach else url

    def asked(self, url: str, now: float) -> None:
        """Something is sent there that is to be answered."""
        if not url.startswith(PREFIX):
            self._asked.setdefault(url, now)

    def heard(self, url: str) -> None:
        """Something came from there."""
        self._asked.pop(url, None)
        self._detours.pop(url, None)

    def lost(self, url: str, now: float) -> None:
        """It cannot be reached."""
        self._asked.pop(url, None)
        if not url.startswith(PREFIX):
            self._detours[url] = now + DETOUR_S

    def tick(self, now: float) -> None:
        for url in [url for url, asked_at in self._asked.items() if now - asked_at > PATIENCE_S]:
            self.lost(url, now)
        for url in [url for url, until in self._detours.items() if now >= until]:
            del self._detours[url]
