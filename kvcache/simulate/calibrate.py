"""A worker's costs, measured on the real engine: the figures that `--costs` reads."""

from __future__ import annotations

import random
from collections.abc import Callable

from bus.errors import InternalError
from kvcache.client import Client
from kvcache.routing.rates import RateLearner
from kvcache.routing.views import UNKNOWN_RATES
from kvcache.simulate.costs import Costs

LENGTHS = (128, 256, 512, 1024, 1536)
CACHED_SHARES = (0.0, 0.5)
OUTPUT_TOKENS = 16
VOCABULARY = range(1000, 30_000)


def calibrate(client: Client, *, model: str | None = None, seed: int = 0, say: Callable[[str], None]) -> Costs:
    """Time random prompts of several lengths, alone, cold and half cached, by the worker's own clock.

    One generation at a time, so what decodes cost prefills is not measured and stays 0.
    Raises what the client raises, and InternalError if no prefill could be timed.
    """
    draw, steps = random.Random(seed), [0.0, 0.0]
    learner = RateLearner(UNKNOWN_RATES, start_tokens=0)  # for long prompts, whose steps are full
    _time(client, model, draw.choices(VOCABULARY, k=64), RateLearner(UNKNOWN_RATES), [0.0, 0.0])  # loads the model
    for length in LENGTHS:
        say(f"prompts of {length} tokens")
        for _ in range(2):
            prompt = draw.choices(VOCABULARY, k=length)
            for share in CACHED_SHARES:
                kept = int(share * length)
                _time(client, model, prompt[:kept] + draw.choices(VOCABULARY, k=length - kept), learner, steps)
    rates = learner.rates
    if not rates.is_learned or not steps[1]:
        raise InternalError("the worker reported no prefill that took time")
    return Costs(token_s=rates.token_s, context_s=rates.context_s, step_s=steps[0] / steps[1])


def _time(client: Client, model: str | None, prompt: list[int], learner: RateLearner, steps: list[float]) -> None:
    stream = client.generate(token_ids=prompt, model=model, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    done = stream.result()
    learner.prefilled(done.usage.prompt_tokens, done.usage.cached_tokens, 0, done.timings.prefill_ms / 1000)
    steps[0] += done.timings.decode_ms / 1000
    steps[1] += done.usage.completion_tokens - 1
