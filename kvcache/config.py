"""The broker's configuration, parsed once from flags and environment, and never derived from hardware.

Each flag `--some-name` may also be given as `KVCACHE_BROKER_SOME_NAME`; the flag wins. A value that
cannot be read is an error that names it, never a default.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from bus.endpoints import DEFAULT_URL, endpoints
from bus.errors import BadArgument
from bus.messages import MAX_MILLIS
from bus.security import Mode, SecurityConfig
from kvcache.routing.policies import DEFAULT_POLICY, POLICIES, policy_by_name

ENV_PREFIX = "KVCACHE_BROKER_"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """bind: the first of six endpoints. settle_s: after its start the broker waits this long for workers that
    knew an earlier one, rather than give their keys to others. max_inflight: requests one worker may have.
    record: a file to append arrivals to, see `kvcache.broker.recorder`; empty for none."""

    bind: str = DEFAULT_URL
    policy: str = DEFAULT_POLICY
    security: Mode = "none"
    heartbeat_ms: int = 250
    lease_ms: int = 1000
    worker_lost_ms: int = 1000
    client_lost_ms: int = 3000
    settle_ms: int = 1000
    drain_ms: int = 10_000
    max_inflight: int = 512
    record: str = ""
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        endpoints(self.bind)
        policy_by_name(self.policy)
        SecurityConfig(mode=self.security)
        _check_range("heartbeat_ms", self.heartbeat_ms, 1, MAX_MILLIS // 3)
        _check_range("max_inflight", self.max_inflight, 1, 1_000_000)
        for name in ("lease_ms", "worker_lost_ms", "client_lost_ms"):
            _check_range(name, getattr(self, name), 3 * self.heartbeat_ms, MAX_MILLIS, "three heartbeats, ")
        if self.lease_ms > self.worker_lost_ms:
            raise BadArgument(
                f"lease_ms {self.lease_ms} must not be above worker_lost_ms {self.worker_lost_ms}: a worker that the"
                " broker has given up must not think that it still owns anything"
            )
        for name in ("settle_ms", "drain_ms"):
            _check_range(name, getattr(self, name), 0, MAX_MILLIS)
        if self.log_format not in {"text", "json"}:
            raise BadArgument(f"log format {self.log_format!r} is neither 'text' nor 'json'")


def _check_range(name: str, value: int, least: int, most: int, because: str = "") -> None:
    if not least <= value <= most:
        raise BadArgument(f"{name} must be from {because}{least} to {most}, not {value}")


def parse_broker_config(argv: Sequence[str], env: Mapping[str, str] | None = None) -> BrokerConfig:
    """Flags over environment over defaults. Raises BadArgument; argparse ends the process for unknown flags."""
    parser = argparse.ArgumentParser(
        prog="kvcache broker", description="Route requests to workers and relay their token streams."
    )
    helps = {
        "bind": "first of six consecutive endpoints: tcp://127.0.0.1:PORT or ipc:///PATH",
        "policy": f"for requests that name no sequence: {', '.join(POLICIES)}",
        "security": "none: bind loopback or ipc only",
        "heartbeat_ms": "between signs of life",
        "lease_ms": "how long a worker may serve without hearing from the broker",
        "worker_lost_ms": "after this silence a worker is lost: its requests go elsewhere",
        "client_lost_ms": "after this silence a client is gone: its work stops",
        "settle_ms": "after start, wait this long for workers to rejoin",
        "drain_ms": "when told to stop, how long what is in flight may take",
        "max_inflight": "requests one worker may have at a time",
        "record": "append times, lengths and hashed prefixes of generations to this file, for kvcache simulate",
        "log_level": "debug, info, warning or error",
        "log_format": "text, or json: an object a line",
    }
    for field in fields(BrokerConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=None, metavar="X", help=f"{helps[field.name]} [{field.default}]")
    given = vars(parser.parse_args(argv))
    environ = os.environ if env is None else env
    values: dict[str, str | int] = {}
    for field in fields(BrokerConfig):
        flag, variable = "--" + field.name.replace("_", "-"), ENV_PREFIX + field.name.upper()
        source, text = (variable, environ.get(variable)) if given[field.name] is None else (flag, given[field.name])
        if text is not None:
            values[field.name] = _parse_int(source, text) if isinstance(field.default, int) else text
    return BrokerConfig(**values)  # type: ignore[arg-type]  # names and types follow the fields


def _parse_int(source: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadArgument(f"{source} must be a whole number, not {text!r}") from None
