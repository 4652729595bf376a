"""transformers' names for how to generate, as ours.

A `GenerationConfig` can ask for more than is done here, and what it asks for must not be lost without a word: every
setting is translated, harmless, or refused by name. transformers itself is not needed for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bus.errors import BadArgument

_RENAMED = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "num_return_sequences": "n",
    "stop_strings": "stop",
}
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_DEFAULT_TOP_K = 50  # what `generate` takes when it samples and nobody said
_TRANSLATED = frozenset(
    {*_RENAMED, *_OF_SAMPLING, "do_sample", "eos_token_id", "sequence_bias", "transformers_version"}
)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "max_length": (20,),  # what older versions write when nobody set it
}
"""Values with which a setting changes nothing."""
_HARMLESS = frozenset(
    {
        *("pad_token_id", "bos_token_id", "use_cache", "remove_invalid_values", "low_memory", "disable_compile"),
        *("cache_implementation", "cache_config", "max_cache_len", "compile_config", "continuous_batching_config"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "is_assistant"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "prefill_chunk_size"),
        *("decoder_start_token_id", "early_stopping", "renormalize_logits", "assistant_early_exit"),
        *("assistant_ensemble_weight", "_from_model_config"),
    }
)
"""How it is computed, or parts that another setting, refused by itself, would turn on."""


def as_sampling_fields(config: object) -> dict[str, Any]:
    """The keywords of `SamplingParams` that a `GenerationConfig`, or a mapping with its names, stands for.

    Their ranges are not checked here. Raises BadArgument for a setting without a counterpart.
    """
    settings = {name: value for name, value in _settings(config).items() if value is not None}
    for name, value in settings.items():
        if name not in _TRANSLATED and name not in _HARMLESS and not _is_neutral(name, value):
            raise BadArgument(f"the generation config sets {name} to {value!r:.60}, which has no counterpart here")
    fields = {ours: settings[theirs] for theirs, ours in _RENAMED.items() if theirs in settings}
    if settings.get("do_sample", False):
        fields |= {"top_k": _DEFAULT_TOP_K} | {name: settings[name] for name in _OF_SAMPLING if name in settings}
    else:
        fields["temperature"] = 0.0
    if "eos_token_id" in settings:
        ids = settings["eos_token_id"]
        fields["stop_token_ids"] = list(ids) if isinstance(ids, list | tuple) else [ids]
    if "sequence_bias" in settings:
        fields["logit_bias"] = _logit_bias(settings["sequence_bias"])
    return fields


def _settings(config: object) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    to_dict = getattr(config, "to_dict", None)
    settings = to_dict() if callable(to_dict) else None
    if not isinstance(settings, Mapping):
        raise BadArgument(f"a GenerationConfig or a mapping is needed, not {type(config).__name__}")
    return settings


def _is_neutral(name: str, value: object) -> bool:
    return value is False or any(value == neutral for neutral in _NEUTRAL.get(name, ()))


def _logit_bias(biases: object) -> dict[int, float]:
    """`sequence_bias` biases the last token of a sequence; only sequences of one token have a counterpart."""
    pairs: Any = biases.items() if isinstance(biases, Mapping) else biases
    try:
        return {token_id: bias for (token_id,), bias in pairs}
    except (TypeError, ValueError):
        raise BadArgument("sequence_bias has a counterpart here only for sequences of a single token") from None
