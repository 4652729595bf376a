"""What the core has the shell send, and on which socket. Values only."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from bus import messages as m
from bus import wire
from bus.wire import Buffer
from kvcache.broker.members import Call, Client, Worker


class Port(enum.Enum):
    """The sockets a core may send on."""

    CLIENT = "client"
    CLIENT_BULK = "client bulk"
    WORKER = "worker"
    WORKER_BULK = "worker bulk"


class Send(NamedTuple):
    """One message for one peer. `call` is the request that suffers if it cannot be sent, if any."""

    port: Port
    link: bytes
    frames: Sequence[Buffer]
    call: Call | None = None


def to_client(client: Client, message: m.Message, *payload: Buffer) -> Send:
    return Send(Port.CLIENT, client.link, [wire.encode(message), *payload])


def to_worker(worker: Worker, message: m.Message) -> Send:
    return Send(Port.WORKER, worker.link, [wire.encode(message)])
