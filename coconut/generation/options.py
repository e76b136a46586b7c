"""What generation takes of transformers' settings: those that say which words are chosen, and where an answer ends."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

SETTINGS = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "do_sample", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "max_time", "min_new_tokens", "min_p", "no_repeat_ngram_size",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias", "stop_strings",
    "suppress_tokens", "temperature", "top_h", "top_k", "top_p", "typical_p",
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
    """How many answers a question, and the settings, `max_new_tokens` among them, which is `limit` unless they say.

    `options`: settings one by one, or a `generation_config`, which they come before. Raises ValueError for what is not
    taken, for no question, and for several answers that would be the same: without sampling, and thoughts not
    `noisy`.
    """
    if not questions:
        raise ValueError("There is no question to answer.")
    said = {name: value for name, value in options.items() if value is not None and name != "generation_config"}
    asked = {**_config_settings(options.get("generation_config")), **said}
    asked = {"max_new_tokens": limit} | {name: asked[name] for name in asked if asked[name] != NEUTRAL.get(name)}
    samples = asked.pop("num_return_sequences", 1)
    if asked["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens is {asked['max_new_tokens']}; it must be at least 1.")
    for name in asked.keys() - SETTINGS - PASSTHROUGH - {"max_new_tokens"}:
        near = get_close_matches(
            name, SETTINGS | PASSTHROUGH | {"num_thoughts", "thought_noise", "max_new_tokens"}, n=1
        )
        raise ValueError(
            f"{name}={asked[name]!r} cannot be asked of a model that thinks. "
            + (f"Did you mean {near[0]}? " if near else "")
            + "Beside num_thoughts, thoughts, thought_noise, stop, mode, log_probs, max_new_tokens and "
            f"num_return_sequences, generate takes {', '.join(sorted(SETTINGS | PASSTHROUGH))}."
        )
    if samples > 1 and not (asked.get("do_sample") or noisy):
        raise ValueError(f"num_return_sequences={samples} without do_sample=True would be the same answer so often.")
    if "streamer" in asked and samples * questions > 1:
        raise ValueError(f"A streamer takes one answer to one question, not {samples} to {questions}.")
    return samples, asked


def _config_settings(config: Any) -> dict[str, Any]:
    """What a GenerationConfig says beyond the defaults, but for tokens (the tokenizer's) and the cache (ours)."""
    said = {} if config is None else config.to_diff_dict()
    return {key: value for key, value in said.items() if key not in IGNORED and not key.endswith("token_id")}
