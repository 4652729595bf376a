"""What is asked of every system, and what is made of the answers: no clock, no sockets, no randomness but the seed's.

A workload is conversations that go on side by side, each a list of prompts of which one is asked when the one before it
is answered. Prompts are token ids drawn by a seed, so no two workloads of different seeds share anything. What an
engine is taken to have answered in a chat is drawn as well: every system goes on from the same history.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

VOCABULARY = range(1000, 40_000)
Prompt = list[int]


@dataclass(frozen=True, slots=True)
class Workload:
    """conversations: their prompts in order. max_tokens: of each answer, which has exactly so many."""

    name: str
    conversations: tuple[tuple[Prompt, ...], ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from asking to the first token, as the client saw it. failure: why there was no end."""

    first_s: float = 0.0
    num_tokens: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one workload on one system. Times are None where nothing was answered."""

    first_p50_ms: float | None
    first_p90_ms: float | None
    tokens_per_s: float
    success_percent: float
    failure: str


def chats(seed: str, *, system_tokens: int, num_chats: int, num_turns: int, turn_tokens: int, reply: int) -> Workload:
    """Conversations of many users behind one system prompt, each turn with all that was said before."""
    draw = random.Random(seed)
    system = _tokens(draw, system_tokens)
    conversations = []
    for _ in range(num_chats):
        history, prompts = list(system), []
        for _ in range(num_turns):
            history += _tokens(draw, turn_tokens)
            prompts.append(list(history))
            history += _tokens(draw, reply)
        conversations.append(tuple(prompts))
    return Workload("chats", tuple(conversations), reply)


def documents(seed: str, *, document_tokens: int, num_documents: int, num_questions: int, reply: int) -> Workload:
    """Readers with a document each, who ask one question after the other, each about the document alone."""
    draw = random.Random(seed)
    conversations = []
    for _ in range(num_documents):
        document = _tokens(draw, document_tokens)
        conversations.append(tuple([*document, *_tokens(draw, 32)] for _ in range(num_questions)))
    return Workload("documents", tuple(conversations), reply)


def unshared(seed: str, *, num_prompts: int, prompt_tokens: int, reply: int) -> Workload:
    """Prompts that have nothing in common, all at once."""
    draw = random.Random(seed)
    return Workload("no sharing", tuple((_tokens(draw, prompt_tokens),) for _ in range(num_prompts)), reply)


def sum_up(answers: Sequence[Answer], seconds: float) -> Outcome:
    """answers: all of a workload. seconds: from its first request to its last answer.

    Tokens count where the whole answer came; so a system that fails is not quick for it.
    """
    whole = [answer for answer in answers if not answer.failure]
    firsts = sorted(1000 * answer.first_s for answer in whole)
    return Outcome(
        first_p50_ms=percentile(firsts, 50) if firsts else None,
        first_p90_ms=percentile(firsts, 90) if firsts else None,
        tokens_per_s=sum(answer.num_tokens for answer in whole) / max(seconds, 1e-9),
        success_percent=100 * len(whole) / len(answers) if answers else 0.0,
        failure=next((answer.failure for answer in answers if answer.failure), ""),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The least value that at least `percent` of `ordered`, which is not empty, do not exceed (nearest rank)."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def _tokens(draw: random.Random, count: int) -> Prompt:
    return draw.choices(VOCABULARY, k=count)
