"""What can be asked of the gateway besides generations: models, health, versions, tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import msgspec

from bus.errors import ConnectionLost, ModelNotFound
from bus.stats import ClusterStats, WorkerView
from kvcache.client import AsyncClient
from kvcache.gateway.config import GatewayConfig, public_view
from kvcache.gateway.replies import ModelCard

HEALTH_S = 2.0
FRESH_S = 0.25
_PROBE = (0,)


class Queries:
    """Asks the broker and the workers on behalf of callers. created: Unix seconds, told as each model's age."""

    def __init__(self, client: AsyncClient, config: GatewayConfig, created: int) -> None:
        self._client = client
        self._config = config
        self._created = created
        self._probing = asyncio.Lock()
        self._probed_at = 0.0
        self._is_healthy = False

    async def models(self) -> list[ModelCard]:
        """Every model that a live worker serves or would load, by name."""
        workers = _ready((await self._stats()).workers)
        # Beats tell names at once; figures, which come each second, tell the rest.
        names = {name for worker in workers for name, state in worker.models if state != "failed"}
        lengths = {
            model.name: model.max_model_len
            for worker in workers
            for model in (worker.stats.models if worker.stats else ())
            if model.max_model_len
        }
        return [
            ModelCard(id=name, created=self._created, root=name, max_model_len=lengths.get(name))
            for name in sorted(names)
        ]

    async def model(self, name: str) -> ModelCard:
        """Raises ModelNotFound."""
        cards = await self.models()
        found = next((card for card in cards if card.id == name), None)
        if found is None:
            known = ", ".join(card.id for card in cards) or "none"
            raise ModelNotFound(f"no model named {name!r:.100}; known: {known}")
        return found

    async def is_healthy(self) -> bool:
        """Whether a worker answered just now: its tokenizer, if it has a model, by way of broker and engine.

        Callers that come together share one question, so probes cost the workers nothing worth counting.
        """
        async with self._probing:
            if time.monotonic() - self._probed_at > FRESH_S:
                self._is_healthy = await self._probe()
                self._probed_at = time.monotonic()
            return self._is_healthy

    async def is_ready(self) -> bool:
        """Whether a worker has a model loaded."""
        return any(_loaded(worker) for worker in _ready((await self._stats()).workers))

    async def server_info(self) -> dict[str, Any]:
        """The configuration in force, and the cluster as the broker sees it."""
        figures = await self._stats()
        return {
            "version": version("kvcache"),
            "config": public_view(self._config),
            "cluster": msgspec.to_builtins(figures),
        }

    async def _stats(self) -> ClusterStats:
        """Raises ConnectionLost soon, where the client would wait for a broker as long as a generation may take."""
        try:
            async with asyncio.timeout(HEALTH_S):
                return await self._client.stats()
        except TimeoutError:
            raise ConnectionLost(f"the broker has not answered for {HEALTH_S:g} s") from None

    async def _probe(self) -> bool:
        try:
            async with asyncio.timeout(HEALTH_S):
                workers = _ready((await self._client.stats()).workers)
                loaded = next((name for worker in workers for name in _loaded(worker)), None)
                if loaded is not None:
                    await self._client.spell(_PROBE, model=loaded)
                return bool(workers)
        except Exception:  # noqa: BLE001  # whatever it is, nobody answered
            return False


def _ready(workers: Iterable[WorkerView]) -> list[WorkerView]:
    return [worker for worker in workers if worker.status == "ready"]


def _loaded(worker: WorkerView) -> list[str]:
    return [name for name, state in worker.models if state == "ready"]
