"""How tokens are spelled, asked of the workers once and remembered: logprobs name many tokens, and mostly the same."""

from __future__ import annotations

from collections.abc import Mapping, Set

from kvcache.client import AsyncClient

MAX_REMEMBERED = 300_000
"""Token ids of all models together; more than one large vocabulary, some 30 MB."""


class Vocabulary:
    """Texts of single tokens, by model."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._texts: dict[str, dict[int, str]] = {}

    async def texts(self, model: str, token_ids: Set[int]) -> Mapping[int, str]:
        """The text of each. Raises as `AsyncClient.spell`."""
        known = self._texts.setdefault(model, {})
        missing = sorted(token_ids - known.keys())
        if missing:
            spelled = await self._client.spell(missing, model=model)
            if sum(map(len, self._texts.values())) > MAX_REMEMBERED:
                self._texts = {model: known}
                known.clear()
                return await self.texts(model, token_ids)
            known.update(zip(missing, spelled, strict=True))
        return known
