"""Who may talk to us: every socket is made from a `SecurityConfig`.

Mode `none` trusts everyone who can reach the socket, so it may only bind loopback or ipc; a bind that
others could reach is refused with what to do instead. Keys (CURVE and an allow list) are the second
mode to come: a peer's user id then comes from its key, and is already a field of each link here.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from bus.errors import BadArgument, Forbidden

DEFAULT_USER = "default"
Mode: TypeAlias = Literal["none"]


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """mode: `none` for now. user_id: whom a peer counts as when nothing proves who it is."""

    mode: Mode = "none"
    user_id: str = DEFAULT_USER

    def __post_init__(self) -> None:
        if self.mode != "none":
            raise BadArgument(f"security mode {self.mode!r} does not exist; use 'none' (loopback and ipc only)")

    @property
    def peer_host(self) -> str:
        """Where a worker listens for other workers: as far as this mode lets anybody in."""
        return "127.0.0.1"

    def check_bind(self, endpoint: str) -> None:
        """Raise Forbidden if binding `endpoint` would let strangers in."""
        if not is_local(endpoint):
            raise Forbidden(
                f"refusing to bind {endpoint}: with security 'none' anybody who can reach that address may read and"
                " write the cache. Bind tcp://127.0.0.1:PORT or ipc:///PATH, and reach it from other hosts through"
                " an ssh or WireGuard tunnel"
            )


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach `endpoint`. Raises BadArgument for one we cannot judge."""
    scheme, sep, rest = endpoint.partition("://")
    if not sep or not rest:
        raise BadArgument(f"endpoint {endpoint!r} is not of the form tcp://HOST:PORT or ipc:///PATH")
    if scheme in {"ipc", "inproc"}:
        return True
    if scheme != "tcp":
        raise BadArgument(f"endpoint {endpoint!r}: transport {scheme!r} is not supported; use tcp or ipc")
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
