"""How tokens are drawn and when generation stops: the public parameters, and the one check of their ranges.

Every way in uses `check_sampling`: the client before it sends, the worker on what it receives. So a request is
refused with the same words wherever it comes from, and nothing behind this file meets a NaN or a negative length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from bus.errors import BadArgument
from bus.messages import Sampling

T = TypeVar("T")

MAX_TOKENS = 1_000_000
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 1_000_000
MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_BYTES = 4096
MAX_STOP_TOKEN_IDS = 64
MAX_TOKEN_ID = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one generation, by the names that vLLM has for them.

    temperature: 0 takes the likeliest token. top_k: 0 takes all tokens into account. seed: None draws a random one.
    stop: text that ends the output and is not part of it; one string or several.
    Raises BadArgument, naming the parameter and its range.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self.with_seed(0 if self.seed is None else self.seed)

    def with_seed(self, random_seed: int) -> Sampling:
        """The parameters as they travel; `random_seed` is used if none was asked for."""
        sampling = Sampling(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=_as_float("temperature", self.temperature),
            top_p=_as_float("top_p", self.top_p),
            top_k=self.top_k,
            seed=random_seed if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop),
            stop_token_ids=_as_tuple("stop_token_ids", self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )
        check_sampling(sampling)
        return sampling


def check_sampling(sampling: Sampling) -> None:
    """Raise BadArgument, naming the parameter and its range, unless every one is in its range."""
    _check_int("max_tokens", sampling.max_tokens, 1, MAX_TOKENS)
    _check_int("min_tokens", sampling.min_tokens, 0, MAX_TOKENS)
    if sampling.min_tokens > sampling.max_tokens:
        raise BadArgument(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    _check_float("temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    _check_float("top_p", sampling.top_p, 0.0, 1.0)
    if sampling.top_p == 0.0:
        raise BadArgument("top_p must be more than 0 and at most 1; use temperature=0 for the likeliest token")
    _check_int("top_k", sampling.top_k, 0, MAX_TOP_K, "0 turns it off")
    _check_int("seed", sampling.seed, 0, MAX_SEED)
    _check_stop(sampling.stop)
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise BadArgument(f"{len(sampling.stop_token_ids)} stop_token_ids were given, at most {MAX_STOP_TOKEN_IDS}")
    for token_id in sampling.stop_token_ids:
        _check_int("stop_token_ids", token_id, 0, MAX_TOKEN_ID)
    if type(sampling.ignore_eos) is not bool:
        raise BadArgument(f"ignore_eos must be True or False, not {sampling.ignore_eos!r:.100}")


def _check_stop(stop: tuple[object, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise BadArgument(f"{len(stop)} stop strings were given, at most {MAX_STOP_STRINGS}")
    num_bytes = 0
    for text in stop:
        if not isinstance(text, str):
            raise BadArgument(f"stop must hold strings, not {type(text).__name__}")
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise BadArgument(f"a stop string has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed")
        try:
            num_bytes += len(text.encode())
        except UnicodeEncodeError:
            raise BadArgument("a stop string is not valid Unicode text") from None
    if num_bytes > MAX_STOP_BYTES:
        raise BadArgument(f"the stop strings are {num_bytes} bytes together, at most {MAX_STOP_BYTES}")


def _check_int(name: str, value: object, least: int, most: int, hint: str = "") -> None:
    if type(value) is not int or not least <= value <= most:
        note = f" ({hint})" if hint else ""
        raise BadArgument(f"{name} must be an integer from {least} to {most}{note}, not {_brief(value)}")


def _check_float(name: str, value: object, least: float, most: float) -> None:
    if type(value) is not float or not math.isfinite(value) or not least <= value <= most:
        raise BadArgument(f"{name} must be a number from {least:g} to {most:g}, not {_brief(value)}")


def _as_float(name: str, value: object) -> float:
    """Integers are numbers too, and True is not one; what is too large for a float is out of range anyway."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadArgument(f"{name} must be a number, not {_brief(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_tuple(name: str, values: Sequence[T]) -> tuple[T, ...]:
    if isinstance(values, list | tuple):
        return tuple(values)
    raise BadArgument(f"{name} must be a list or a tuple, not {_brief(values)}")


def _brief(value: object) -> str:
    """A value as it was written, but never pages of it (a huge integer cannot even be printed)."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
