"""The gateway's configuration, parsed once from flags and environment.

Each flag `--some-name` may also be given as `KVCACHE_GATEWAY_SOME_NAME`, lists with commas; the flag wins. A value that
cannot be read is an error that names it, never a default.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bus.endpoints import DEFAULT_URL, endpoints
from bus.errors import BadArgument

ENV_PREFIX = "KVCACHE_GATEWAY_"

HELPS = {
    "broker": "the broker's address",
    "host": "the address to listen on",
    "port": "the port to listen on; 0 takes a free one",
    "api_key": "a key that callers must send as a bearer; may be repeated; better kept in a file",
    "api_key_file": "keys, one a line, plain or as sha256:HEX (see --new-api-key)",
    "cors_origin": "a web origin whose pages may call; may be repeated; none by default",
    "default_max_tokens": "tokens of a chat answer that names no limit",
    "max_body_bytes": "size of one request; larger ones are refused (413)",
    "body_timeout_s": "seconds in which a request's head, and then its body, must arrive (408)",
    "request_timeout_s": "seconds that a generation may take in all (504)",
    "write_timeout_s": "seconds for which a reader may take nothing before its stream is given up",
    "dashboard": "on or off: off leaves /dashboard out, where callers must not see each other's figures",
    "max_requests": "generations at a time; more are refused (429)",
    "ping_s": "seconds between comments that keep a silent stream open",
    "metrics_compat": "vllm: show metrics under vLLM's names too",
    "metrics_public": "show /metrics without a key",
    "drain_s": "seconds that running answers are given when the gateway is told to stop",
    "log_level": "debug, info, warning or error",
    "log_format": "text, or json: an object a line",
}


_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What `HELPS` says of each. Raises BadArgument for a value out of its range."""

    broker: str = DEFAULT_URL
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    api_key_file: str = ""
    cors_origin: tuple[str, ...] = ()
    default_max_tokens: int = 2048
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 10.0
    request_timeout_s: float = 600.0
    write_timeout_s: float = 60.0
    dashboard: str = "on"
    max_requests: int = 1024
    ping_s: float = 15.0
    drain_s: float = 10.0
    metrics_compat: str = ""
    metrics_public: bool = False
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        endpoints(self.broker)
        _check_range("port", self.port, 0, 65_535)
        _check_range("default_max_tokens", self.default_max_tokens, 1, 1_000_000)
        _check_range("max_body_bytes", self.max_body_bytes, 1024, 1 << 30)
        _check_range("max_requests", self.max_requests, 1, 4096)
        for name in ("body_timeout_s", "request_timeout_s", "write_timeout_s", "ping_s"):
            _check_range(name, getattr(self, name), 0.05, 7 * 24 * 3600.0)
        _check_range("drain_s", self.drain_s, 0, 3600.0)
        if self.metrics_compat not in {"", "vllm"}:
            raise BadArgument(f"metrics can be compatible with 'vllm', not with {self.metrics_compat!r}")
        if self.dashboard not in {"on", "off"}:
            raise BadArgument(f"dashboard {self.dashboard!r} is neither 'on' nor 'off'")
        if self.log_format not in {"text", "json"}:
            raise BadArgument(f"log format {self.log_format!r} is neither 'text' nor 'json'")


def public_view(config: GatewayConfig) -> dict[str, Any]:
    """The configuration without its secrets, as plain data."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return values | {"api_key": f"{len(config.api_key)} keys"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    for field in fields(GatewayConfig):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            parser.add_argument(flag, default=None, action="store_const", const="true", help=HELPS[field.name])
            continue
        action = "append" if default == () else "store"
        shown = "none" if default in ((), "") else default
        parser.add_argument(flag, default=None, metavar="X", action=action, help=f"{HELPS[field.name]} [{shown}]")


def config_from(given: Mapping[str, Any], env: Mapping[str, str] | None = None) -> GatewayConfig:
    """Parsed flags over environment over defaults. Raises BadArgument."""
    environ = os.environ if env is None else env
    values: dict[str, Any] = {}
    for field in fields(GatewayConfig):
        variable = ENV_PREFIX + field.name.upper()
        if given.get(field.name) is not None:
            values[field.name] = _parse("--" + field.name.replace("_", "-"), given[field.name], field.default)
        elif variable in environ:
            text = environ[variable]
            values[field.name] = _parse(variable, text.split(",") if field.default == () else text, field.default)
    return GatewayConfig(**values)


def _parse(source: str, given: str | list[str], default: object) -> object:
    if isinstance(given, list):
        return tuple(part.strip() for part in given if part.strip())
    if isinstance(default, bool):
        if given.lower() not in _WORDS:
            raise BadArgument(f"{source} must be true or false, not {given!r}")
        return _WORDS[given.lower()]
    try:
        return type(default)(given) if isinstance(default, int | float) else given
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise BadArgument(f"{source} must be {kind}, not {given!r}") from None


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not math.isfinite(value) or not least <= value <= most:
        raise BadArgument(f"{name} must be from {least} to {most}, not {value}")
