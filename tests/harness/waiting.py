"""Waiting for a condition rather than for a time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

from kvcache import AsyncClient

POLL_S = 0.02


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = 30.0) -> None:
    """Come back as soon as `condition` holds. Raises AssertionError, saying `what` did not happen in time."""
    end = time.monotonic() + seconds
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(POLL_S)


async def until_serving(client: AsyncClient, worker_id: str) -> None:
    """Until a worker that was started is ready."""

    async def serves() -> bool:
        return any((view.worker_id, view.status) == (worker_id, "ready") for view in await client.workers())

    await until(serves, f"{worker_id} serves", 90.0)
