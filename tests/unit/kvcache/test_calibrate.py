"""Calibration: the costs that a worker's own timings show, whatever else the client saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from bus.errors import InternalError
from kvcache.client import Client
from kvcache.routing.views import Rates
from kvcache.simulate.calibrate import LENGTHS, calibrate

TRUE = Rates(token_s=2e-3, context_s=3e-7)


class Engine:
    """Answers like a client of one idle worker: it caches whole prompts and shares leading blocks of 32."""

    def __init__(self, *, is_measured: bool = True) -> None:
        self._seen: list[list[int]] = []
        self._is_measured = is_measured

    def generate(self, *, token_ids: list[int], max_tokens: int, **others: object) -> SimpleNamespace:
        cached = max((self._shared(known, token_ids) for known in self._seen), default=0) // 32 * 32
        self._seen.append(token_ids)
        prefill_ms = 1000 * TRUE.prefill_s(len(token_ids), cached) if self._is_measured else 0.0
        done = SimpleNamespace(
            usage=SimpleNamespace(prompt_tokens=len(token_ids), cached_tokens=cached, completion_tokens=max_tokens),
            timings=SimpleNamespace(prefill_ms=prefill_ms, decode_ms=40.0 * (max_tokens - 1)),
        )
        return SimpleNamespace(result=lambda: done)

    @staticmethod
    def _shared(known: list[int], asked: list[int]) -> int:
        return next((at for at, (a, b) in enumerate(zip(known, asked, strict=False)) if a != b), 0)


def test_the_costs_are_those_of_the_engine() -> None:
    said: list[str] = []
    costs = calibrate(cast("Client", Engine()), say=said.append)
    for length in LENGTHS:
        assert costs.rates.prefill_s(length, 0) == pytest.approx(TRUE.prefill_s(length, 0), rel=0.02)
        assert costs.rates.prefill_s(length, length // 2) == pytest.approx(
            TRUE.prefill_s(length, length // 2), rel=0.02
        )
    assert costs.step_s == pytest.approx(0.04)
    assert len(said) == len(LENGTHS)


def test_an_engine_that_reports_no_time_cannot_be_measured() -> None:
    with pytest.raises(InternalError, match="no prefill"):
        calibrate(cast("Client", Engine(is_measured=False)), say=lambda what: None)
