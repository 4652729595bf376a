"""The sockets between workers: one endpoint that others connect to, and a connection to each that we copy from.

All are bulk lanes: what goes over them are requests of a few hundred bytes and chunks, and nobody's liveness hangs on
them. Connections are made when something is to be sent, and closed when the core says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from bus import sockets
from bus.errors import BadArgument, ConnectionLost
from bus.security import SecurityConfig
from bus.sockets import Context, Dealer, Message, Router, Sent
from bus.wire import Buffer

OnRequest = Callable[[bytes, Message], None]
OnAnswer = Callable[[str, Message], None]


class PeerSockets:
    """`url` is where others reach this worker. `on_request(peer, frames)`, `on_answer(url, frames)`: what came."""

    def __init__(
        self, context: Context, security: SecurityConfig, stack: ExitStack, on_request: OnRequest, on_answer: OnAnswer
    ) -> None:
        self._context = context
        self._security = security
        self._on_answer = on_answer
        self._dealers: dict[str, Dealer] = {}
        stack.callback(self._close_all)
        self._router = stack.enter_context(
            Router(context, sockets.BULK, security, lambda batch: _hand_on(batch, on_request))
        )
        self.url = self._router.bind_free_port(security.peer_host)
        self._router.start()

    def answer(self, peer: bytes, frames: Sequence[Buffer]) -> bool:
        """False if it cannot be sent: the peer is gone, or takes nothing."""
        return self._router.send(peer, frames) in {Sent.DONE, Sent.QUEUED}

    def send(self, url: str, frames: Sequence[Buffer]) -> bool:
        """False if it cannot be sent: that is no address, no socket is to be had, or who is there takes nothing."""
        dealer = self._dealers.get(url)
        if dealer is None:
            try:
                dealer = self._connect(url)
            except (BadArgument, ConnectionLost):
                return False
        return dealer.send(frames) is not Sent.FULL

    def hang_up(self, url: str) -> None:
        dealer = self._dealers.pop(url, None)
        if dealer is not None:
            dealer.close()

    def _connect(self, url: str) -> Dealer:
        def receive(batch: list[Message]) -> None:
            for frames in batch:
                self._on_answer(url, frames)

        dealer = Dealer(self._context, sockets.BULK, self._security, receive)
        try:
            dealer.connect(url)
        except BadArgument:
            dealer.close()
            raise
        dealer.start()
        self._dealers[url] = dealer
        return dealer

    def _close_all(self) -> None:
        for url in list(self._dealers):
            self.hang_up(url)


def _hand_on(batch: list[Message], on_request: OnRequest) -> None:
    for peer, *frames in batch:
        on_request(bytes(peer), frames)
