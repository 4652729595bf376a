"""Where the broker is and how long to try; the one place of the client that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bus.endpoints import DEFAULT_URL, Endpoints, endpoints
from bus.errors import BadArgument
from kvcache.client.prompts import check_index, check_seconds

ENV_URLS = ("KVCACHE_URL", "KVCACHE_BROKER")
MAX_RETRIES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """timeout_s: what a request gets that names no deadline. max_retries: of one request, in a row without gain."""

    url: str = DEFAULT_URL
    timeout_s: float = 60.0
    max_retries: int = 2

    def __post_init__(self) -> None:
        check_seconds("timeout", self.timeout_s)
        check_index("max_retries", self.max_retries, MAX_RETRIES)
        endpoints(self.url)

    @property
    def endpoints(self) -> Endpoints:
        return endpoints(self.url)


def client_config(
    url: str | None, timeout: float, max_retries: int, env: Mapping[str, str] | None = None
) -> ClientConfig:
    """From what the caller said; a url that was left out comes from the environment, or is the default.

    Raises BadArgument, saying what is wrong with which value.
    """
    if url is None:
        environ = os.environ if env is None else env
        url = next((environ[name] for name in ENV_URLS if environ.get(name)), DEFAULT_URL)
    elif not isinstance(url, str):
        raise BadArgument(f"url must be text such as {DEFAULT_URL}, not {type(url).__name__}")
    return ClientConfig(url=url, timeout_s=timeout, max_retries=max_retries)
