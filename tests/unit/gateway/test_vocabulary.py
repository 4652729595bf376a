"""How tokens are spelled is asked once, and never half forgotten under whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvcache.gateway import vocabulary
from kvcache.gateway.vocabulary import Vocabulary


class Speller:
    """A client that spells a token as its number, and, while `gate` is not set, makes whoever asks wait."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def spell(self, token_ids: Sequence[int], *, model: str) -> tuple[str, ...]:
        self.asked.append((model, list(token_ids)))
        await self.gate.wait()
        return tuple(map(str, token_ids))


def made() -> tuple[Vocabulary, Speller]:
    client: Any = Speller()
    return Vocabulary(client), client


async def test_a_token_is_asked_for_once_and_for_each_model_apart() -> None:
    spelled, client = made()
    assert await spelled.texts("m", {1, 2}) == {1: "1", 2: "2"}
    assert await spelled.texts("m", {2, 3}) == {2: "2", 3: "3"}
    await spelled.texts("other", {1})
    assert client.asked == [("m", [1, 2]), ("m", [3]), ("other", [1])]


async def test_what_was_known_is_told_though_all_is_forgotten_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_REMEMBERED", 4)
    spelled, client = made()
    await spelled.texts("m", {1, 2, 3})
    client.gate.clear()
    async with asyncio.TaskGroup() as group:
        slow = [group.create_task(spelled.texts("m", {1, 10 + number})) for number in range(4)]
        await asyncio.sleep(0)
        client.gate.set()
    assert [task.result() for task in slow] == [{1: "1", 10 + number: str(10 + number)} for number in range(4)]


async def test_no_more_is_remembered_than_the_limit_and_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_REMEMBERED", 4)
    spelled, client = made()
    await spelled.texts("m", {1, 2, 3})
    await spelled.texts("other", {4, 5})
    await spelled.texts("m", {1})
    assert client.asked[-1] == ("m", [1])
