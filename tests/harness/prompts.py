"""Prompts that tests share; token ids are of the tiny model's vocabulary and never its end."""

from __future__ import annotations

import random

from tests.unit.workers.conftest import EOS_ID

PROMPT = "hello hello, the cache said to the worker; hello again"


def token_prompt(seed: int, num_tokens: int) -> list[int]:
    """Random tokens that depend on nothing but the arguments, and no prefix of which another seed has."""
    draw = random.Random(f"prompt {seed}")
    return [draw.randrange(EOS_ID) for _ in range(num_tokens)]
