"""Check and merge the generation settings of transformers that `LatentLM.generate` accepts."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from coconut.generation.keyed_random import KeyedSampling

SETTINGS = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "do_sample", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "max_time", "min_new_tokens", "min_p", "no_repeat_ngram_size",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias", "stop_strings",
    "suppress_tokens", "temperature", "top_h", "top_k", "top_p", "typical_p",
})  # fmt: skip
RANDOM = frozenset({
    "epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_h", "top_k", "top_p", "typical_p",
})  # fmt: skip
PASSTHROUGH = frozenset({"streamer", "stopping_criteria", "logits_processor", "prefix_allowed_tokens_fn"})
NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "return_dict_in_generate": False, "guidance_scale": 1.0}
IGNORED = (
    "cache_implementation",
    "cache_config",
    "use_cache",
    "transformers_version",
    "max_length",
)  # not what is said


def generation_settings(
    options: dict[str, Any], limit: int, questions: int, noisy: bool = False
) -> tuple[int, dict[str, Any]]:
    """The number of completions of each question, and the settings, with `max_new_tokens` (by default `limit`).

    options: single settings, and possibly a `generation_config`, over which they take precedence.
    noisy: whether noise or dropout makes the thoughts of several completions differ.
    Raises ValueError for unknown settings, for no question, and for several completions that would be identical, which
    is without sampling and without noise.
    """
    if not questions:
        raise ValueError("There is no question to answer.")
    explicit = {name: value for name, value in options.items() if value is not None and name != "generation_config"}
    settings = {**_config_settings(options.get("generation_config")), **explicit}
    settings = {"max_new_tokens": limit} | {
        name: settings[name] for name in settings if settings[name] != NEUTRAL.get(name)
    }
    samples = settings.pop("num_return_sequences", 1)
    if settings["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens is {settings['max_new_tokens']}; it must be at least 1.")
    for name in settings.keys() - SETTINGS - PASSTHROUGH - {"max_new_tokens"}:
        similar = get_close_matches(
            name, SETTINGS | PASSTHROUGH | {"num_thoughts", "thought_noise", "thought_dropout", "max_new_tokens"}, 1
        )
        raise ValueError(
            f"{name}={settings[name]!r} is not supported by generate of a LatentLM. "
            + (f"Did you mean {similar[0]}? " if similar else "")
            + "Beside num_thoughts, thoughts, thought_noise, thought_dropout, stop, soft_thinking, mode, log_probs, "
            f"max_new_tokens and num_return_sequences, generate takes {', '.join(sorted(SETTINGS | PASSTHROUGH))}."
        )
    if samples > 1 and not (settings.get("do_sample") or noisy):
        raise ValueError(
            f"num_return_sequences={samples} without do_sample=True gives identical answers. Set do_sample=True."
        )
    if "streamer" in settings and samples * questions > 1:
        raise ValueError(f"A streamer takes one answer to one question, not {samples} to {questions}.")
    return samples, settings


def refuse_unkeyed(settings: dict[str, Any], keys: int, answers: int) -> None:
    """Raise ValueError if there is not one random key for each answer, or for a setting without support for keys."""
    if keys != answers:
        raise ValueError(f"random_keys has {keys} keys, for {answers} answers. Give one for each answer.")
    if unsupported := sorted(settings.keys() & RANDOM - {*KeyedSampling.SETTINGS}):
        raise ValueError(
            f"{unsupported[0]}={settings[unsupported[0]]} is not supported with random_keys. Sampling with keys takes "
            f"{', '.join(KeyedSampling.SETTINGS)}."
        )


def _config_settings(config: Any) -> dict[str, Any]:
    """The settings of a GenerationConfig that differ from its defaults, without token ids and those IGNORED."""
    changed = {} if config is None else config.to_diff_dict()
    return {key: value for key, value in changed.items() if key not in IGNORED and not key.endswith("token_id")}
