"""How tokens are drawn and when generation stops: the public parameters, by the names that vLLM has for them.

What they may be is in `kvcache.sampling_checks`; here they become the message that travels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypedDict, TypeVar

import msgspec

from bus.errors import BadArgument
from bus.messages import Sampling
from kvcache.generation_config import as_sampling_fields
from kvcache.sampling_checks import MAX_N, MAX_SEED, brief, check_int, check_sampling

T = TypeVar("T")


class SamplingFields(TypedDict, total=False):
    """`SamplingParams` as keywords of another function."""

    n: int
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of a generation.

    n: how many outputs to draw for the prompt. seed: None draws a random one; output number `i` uses seed + i.
    temperature: 0 (or below 1e-5) takes the likeliest token. top_k: this many likeliest tokens, 0 for all. top_p: of
    these, the fewest that hold this much of the probability. min_p: of these, those at least this often as probable as
    the likeliest.
    logit_bias: added to the logits of single tokens, before any penalty. repetition_penalty: of the tokens in prompt
    and output, positive logits are divided by it and negative ones multiplied. presence_penalty, frequency_penalty:
    taken from the logits of tokens in the output, once, and as often as they are there.
    stop: text that ends the output and is not part of it; one string or several. stop_token_ids: tokens that end it
    too. min_tokens: until there are so many, nothing ends it but max_tokens. ignore_eos: the model does not end it.
    logprobs: None for none; else tell the logarithm of each token's probability, and of so many likeliest tokens',
    in the model's own distribution: before logit_bias, penalties and temperature. prompt_logprobs: the same of the
    prompt's tokens, each output by itself; the prompt is computed anew for it, whatever is cached.
    Raises BadArgument, naming the parameter and its range.
    """

    n: int = 1
    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self.messages(0)

    @classmethod
    def from_generation_config(cls, config: object) -> Self:
        """From a `transformers.GenerationConfig`, or a mapping with its names.

        What is not set there is as `generate` has it (no sampling unless `do_sample`, then top_k 50), but for the
        length. Raises BadArgument for a setting that has no counterpart here, such as `num_beams`.
        """
        return cls(**as_sampling_fields(config))

    def messages(self, random_seed: int) -> tuple[Sampling, ...]:
        """The parameters of each output as they travel; `random_seed` is used if none was asked for."""
        check_int("n", self.n, 1, MAX_N)
        first = self._first(random_seed if self.seed is None else self.seed)
        check_sampling(first)
        return tuple(_with_seed(first, (first.seed + index) % (MAX_SEED + 1)) for index in range(self.n))

    def _first(self, seed: int) -> Sampling:
        return Sampling(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=_as_float("temperature", self.temperature),
            top_p=_as_float("top_p", self.top_p),
            top_k=self.top_k,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop),
            stop_token_ids=_as_tuple("stop_token_ids", self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_p=_as_float("min_p", self.min_p),
            repetition_penalty=_as_float("repetition_penalty", self.repetition_penalty),
            presence_penalty=_as_float("presence_penalty", self.presence_penalty),
            frequency_penalty=_as_float("frequency_penalty", self.frequency_penalty),
            logit_bias=_as_pairs(self.logit_bias),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


def sampling_params(params: SamplingParams | None, fields: SamplingFields) -> SamplingParams:
    """Parameters given as an object, as keywords, or both: keywords then replace the object's. Raises BadArgument."""
    if params is None:
        return SamplingParams(**fields)
    if not isinstance(params, SamplingParams):
        raise BadArgument(f"params must be a SamplingParams, not {brief(params)}")
    return dataclasses.replace(params, **fields)


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    return sampling if seed == sampling.seed else msgspec.structs.replace(sampling, seed=seed)


def _as_float(name: str, value: object) -> float:
    """Integers are numbers too, and True is not one; what is too large for a float is out of range anyway."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadArgument(f"{name} must be a number, not {brief(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_tuple(name: str, values: Sequence[T]) -> tuple[T, ...]:
    if isinstance(values, list | tuple):
        return tuple(values)
    raise BadArgument(f"{name} must be a list or a tuple, not {brief(values)}")


def _as_pairs(biases: Mapping[int, float] | None) -> tuple[tuple[int, float], ...]:
    if biases is None:
        return ()
    if not isinstance(biases, Mapping):
        raise BadArgument(f"logit_bias must map token ids to numbers, not {brief(biases)}")
    return tuple((token_id, _as_float("logit_bias", bias)) for token_id, bias in biases.items())
