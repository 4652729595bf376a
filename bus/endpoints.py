"""One address names a broker; its six sockets lie at fixed distances from it.

    tcp://host:p        p control, p+1 bulk, p+2 streams   (clients)
                        p+3 control, p+4 bulk, p+5 tokens  (workers)
    ipc:///path         /path.0 ... /path.5

so that users, firewalls and logs deal with one number.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus.errors import BadArgument

NUM_PORTS = 6
MAX_PORT = 65536 - NUM_PORTS
DEFAULT_URL = "tcp://127.0.0.1:5555"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses of one broker's sockets."""

    url: str
    control: str
    bulk: str
    streams: str
    worker_control: str
    worker_bulk: str
    tokens: str


def endpoints(url: str) -> Endpoints:
    """The six addresses behind `url` (`tcp://`, `ipc://`, or `kvc://`, which means tcp). Raises BadArgument."""
    scheme, sep, rest = url.partition("://")
    if not sep or scheme not in {"tcp", "ipc", "kvc"} or not rest or not url.isprintable():
        raise BadArgument(f"broker address {url!r} is not of the form tcp://HOST:PORT or ipc:///PATH")
    if scheme == "ipc":
        return Endpoints(url, *(f"ipc://{rest}.{index}" for index in range(NUM_PORTS)))
    host, _, port_text = rest.rstrip("/").rpartition(":")
    if not host or not port_text.isdecimal() or len(port_text) > 5 or not 1 <= int(port_text) <= MAX_PORT:
        raise BadArgument(f"broker address {url!r} needs a host and a port from 1 to {MAX_PORT}")
    port = int(port_text)
    return Endpoints(f"tcp://{host}:{port}", *(f"tcp://{host}:{port + index}" for index in range(NUM_PORTS)))
