"""Sequence ids by where they live."""

from __future__ import annotations

import secrets

from kvcache import AsyncClient


async def owned_by(client: AsyncClient, worker_id: str, num: int) -> list[str]:
    """New sequence ids, in their order as text, that this worker owns."""
    found: list[str] = []
    while len(found) < num:
        name = f"{worker_id}-{secrets.token_hex(6)}"
        if (await client.route(name)).worker_id == worker_id:
            found.append(name)
    return sorted(found)
