"""The one check of sampling parameters, and all their ranges.

Every way in uses it: the client before it sends, the worker on what it receives. So a request is refused with the
same words wherever it comes from, and nothing behind this file meets a NaN, a negative length or a token id that
the model does not have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from bus.errors import BadArgument
from bus.messages import Sampling

MAX_TOKENS = 1_000_000
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 1_000_000
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 300
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_BYTES = 4096
MAX_STOP_TOKEN_IDS = 64
MAX_TOKEN_ID = 2**32 - 1
MAX_LIST_BYTES = 6144
"""stop, stop_token_ids and logit_bias together, as they travel: a request's header is at most 8,192 bytes."""

_STRING_OVERHEAD, _TOKEN_ID_BYTES, _BIAS_BYTES = 3, 5, 15


def check_sampling(sampling: Sampling) -> None:
    """Raise BadArgument, naming the parameter and its range, unless every one is in its range."""
    check_int("max_tokens", sampling.max_tokens, 1, MAX_TOKENS)
    check_int("min_tokens", sampling.min_tokens, 0, MAX_TOKENS)
    if sampling.min_tokens > sampling.max_tokens:
        raise BadArgument(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    _check_cuts(sampling)
    _check_penalties(sampling)
    check_int("seed", sampling.seed, 0, MAX_SEED)
    if sampling.logprobs is not None:
        check_int("logprobs", sampling.logprobs, 0, MAX_LOGPROBS, "None for none")
    if sampling.prompt_logprobs is not None:
        check_int("prompt_logprobs", sampling.prompt_logprobs, 0, MAX_LOGPROBS, "None for none")
    _check_stop(sampling.stop)
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise BadArgument(f"{len(sampling.stop_token_ids)} stop_token_ids were given, at most {MAX_STOP_TOKEN_IDS}")
    for token_id in sampling.stop_token_ids:
        check_int("stop_token_ids", token_id, 0, MAX_TOKEN_ID)
    _check_logit_bias(sampling.logit_bias)
    _check_lists(sampling)
    if type(sampling.ignore_eos) is not bool:
        raise BadArgument(f"ignore_eos must be True or False, not {sampling.ignore_eos!r:.100}")


def check_vocabulary(sampling: Sampling, vocab_size: int) -> None:
    """Raise BadArgument for a token id that a model with `vocab_size` tokens does not have."""
    _check_known("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_known("logit_bias", (token_id for token_id, _ in sampling.logit_bias), vocab_size)


def check_int(name: str, value: object, least: int, most: int, hint: str = "") -> None:
    """Raise BadArgument unless `value` is an integer, and no bool, of that range."""
    if type(value) is not int or not least <= value <= most:
        note = f" ({hint})" if hint else ""
        raise BadArgument(f"{name} must be an integer from {least} to {most}{note}, not {brief(value)}")


def check_float(name: str, value: object, least: float, most: float) -> None:
    """Raise BadArgument unless `value` is a finite float of that range."""
    if type(value) is not float or not math.isfinite(value) or not least <= value <= most:
        raise BadArgument(f"{name} must be a number from {least:g} to {most:g}, not {brief(value)}")


def brief(value: object) -> str:
    """A value as it was written, but never pages of it (a huge integer cannot even be printed)."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_cuts(sampling: Sampling) -> None:
    check_float("temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    check_float("top_p", sampling.top_p, 0.0, 1.0)
    if sampling.top_p == 0.0:
        raise BadArgument("top_p must be more than 0 and at most 1; use temperature=0 for the likeliest token")
    check_int("top_k", sampling.top_k, 0, MAX_TOP_K, "0 turns it off")
    check_float("min_p", sampling.min_p, 0.0, 1.0)


def _check_penalties(sampling: Sampling) -> None:
    check_float("repetition_penalty", sampling.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    check_float("presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    check_float("frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)


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


def _check_logit_bias(biases: tuple[tuple[int, float], ...]) -> None:
    if len(biases) > MAX_LOGIT_BIASES:
        raise BadArgument(f"{len(biases)} tokens were given a logit_bias, at most {MAX_LOGIT_BIASES}")
    for token_id, bias in biases:
        check_int("a token id of logit_bias", token_id, 0, MAX_TOKEN_ID)
        check_float("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    if len({token_id for token_id, _ in biases}) < len(biases):
        raise BadArgument("a token has more than one logit_bias")


def _check_lists(sampling: Sampling) -> None:
    num_bytes = sum(len(text.encode()) + _STRING_OVERHEAD for text in sampling.stop)
    num_bytes += len(sampling.stop_token_ids) * _TOKEN_ID_BYTES + len(sampling.logit_bias) * _BIAS_BYTES
    if num_bytes > MAX_LIST_BYTES:
        raise BadArgument(
            f"stop, stop_token_ids and logit_bias are {num_bytes} bytes together, at most {MAX_LIST_BYTES}"
        )


def _check_known(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((token_id for token_id in token_ids if token_id >= vocab_size), None)
    if wrong is not None:
        raise BadArgument(f"{name} has token id {wrong}; this model's are 0 to {vocab_size - 1}")
