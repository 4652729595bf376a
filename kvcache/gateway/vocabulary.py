"""How tokens are spelled, asked of the workers once and remembered: logprobs name many tokens, and mostly the same."""

from __future__ import annotations

from collections.abc import Mapping, Set

from kvcache.client import AsyncClient

MAX_REMEMBERED = 300_000
"""Token ids of all models together; more than one large vocabulary, some 30 MB."""


class Vocabulary:
    """Texts of single tokens, by model. Too many are all forgotten at once, since most are soon asked for again."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._texts: dict[str, dict[int, str]] = {}

    async def texts(self, model: str, token_ids: Set[int]) -> Mapping[int, str]:
        """The text of each. Raises as `AsyncClient.spell`."""
        known = self._texts.get(model, {})
        found = {token_id: known[token_id] for token_id in token_ids & known.keys()}
        missing = sorted(token_ids - found.keys())
        if missing:
            found.update(zip(missing, await self._client.spell(missing, model=model), strict=True))
            # Others may have filled or cleared what is remembered meanwhile, so nothing that was seen there counts.
            if sum(map(len, self._texts.values())) + len(missing) > MAX_REMEMBERED:
                self._texts.clear()
            self._texts.setdefault(model, {}).update(found)
        return found
