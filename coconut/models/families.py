"""Families of models: which can be fed their own hidden states, and where they differ. docs/models.md lists them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from coconut.data.tokenization import SpecialIds
from coconut.utils.torch_utils import eval_mode

REQUIRED_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids")
CACHE_ARGUMENTS = ("cache", "past_key_values")  # from transformers 5.24 on, and up to 5.23
RECURRENT_ARGUMENTS = ("state", "cache_params")  # in which models take a recurrent state
CACHE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # that keep keys and values, or nothing
TRIAL_TOKENS = SpecialIds(bot=7, eot=9, latent=8, pause=10, eos=10, pad=10)  # of `check_feedback`
TESTED = frozenset({
    "cohere", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2",
    "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
})  # fmt: skip


def text_config(base: PreTrainedModel) -> Any:
    return base.config.get_text_config(decoder=True)


def thought_size(base: PreTrainedModel) -> int:
    """The width of a word's embedding and of a last hidden state. OPT 350M has wider layers between them."""
    return base.get_input_embeddings().embedding_dim  # pyright: ignore


def is_tested(base: PreTrainedModel) -> bool:
    """Whether the tests of this project cover the model's family."""
    return text_config(base).model_type in TESTED


def check_base(base: PreTrainedModel) -> None:
    """Raise ValueError if a model cannot be fed its own hidden states, or its logits cannot be reproduced."""
    check_family(base)
    check_head(base)


def check_family(base: PreTrainedModel) -> None:
    """Raise ValueError, with the family's name and the reason, if a model cannot be fed its own states."""
    config = text_config(base)
    name = config.model_type
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; LatentLM takes models with a decoder alone.")
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head. Load it with AutoModelForCausalLM.")
    arguments = inspect.signature(base.base_model.forward).parameters
    if recurrent := next((name for name in RECURRENT_ARGUMENTS if name in arguments), None):
        raise ValueError(
            f"{name} cannot be fed its own states in batches: it keeps a recurrent state (`{recurrent}`), "
            "through which the padding between a row's tokens would run."
        )
    missing = [name for name in REQUIRED_ARGUMENTS if name not in arguments]
    if not any(name in arguments for name in CACHE_ARGUMENTS):
        missing.append(f"KV cache ({' or '.join(CACHE_ARGUMENTS)})")
    if missing:
        raise ValueError(
            f"{name} cannot be fed its own states: {type(base.base_model).__name__}.forward takes no "
            f"{', '.join(missing)}. transformers {transformers.__version__} is installed; docs/models.md lists the "
            "families that work."
        )
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in CACHE_LAYERS:
            raise ValueError(
                f"{name} cannot be fed its own states in batches: it keeps a {type(layer).__name__}, through which the "
                "padding between a row's tokens would run."
            )
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise ValueError(f"{name} cannot be fed its own states in batches: its windows count columns, padding too.")
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(f"{name} with use_bidirectional_attention is no causal model: tokens see what comes later.")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{name} cannot be fed its own states in batches: its chunks count columns, padding too.")


@torch.no_grad()
def check_head(base: PreTrainedModel) -> None:
    """Raise ValueError if `postprocess_logits` does not reproduce the model's own logits."""
    table: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    if not weights_materialized(base):
        return
    ids = torch.arange(4, device=table.weight.device)[None] % table.num_embeddings
    shared: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with eval_mode(base):
        expected = base(input_ids=ids, **shared).logits.float()
        hidden_states = base.base_model(inputs_embeds=table(ids), **shared).last_hidden_state
    logits = postprocess_logits(text_config(base), head(hidden_states)).float()
    difference = float((logits - expected).norm() / expected.norm().clamp(min=1e-6))
    if difference > (0.05 if table.weight.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        raise ValueError(
            f"{text_config(base).model_type} makes other logits from its last hidden states than its head alone "
            f"({difference:.1g} apart, relative to their norm), in a way that coconut/models/families.py does not know."
        )


@torch.no_grad()
def check_feedback(lm: nn.Module, base: PreTrainedModel, num_tokens: int) -> None:
    """Raise ValueError if two rows with different numbers of thoughts get other logits in a batch than alone.

    `lm` is a LatentLM of the base with TRIAL_TOKENS. Alone means recomputed without the cache. Nothing is checked if
    the model has no weights yet, or the tokenizer has too few tokens for the trial.
    """
    if not weights_materialized(base) or num_tokens <= TRIAL_TOKENS.pad:
        return
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [3, 4, 5, 7, 8, 8, 8, 9, 0, 1, 2, 3, 4]]
    ids = torch.tensor(rows, device=base.device)
    with eval_mode(lm):
        batched = lm(ids, return_logits=True).logits.float()
        alone = torch.cat([lm(row[None], return_logits=True, use_cache=False).logits.float() for row in ids])
    difference = float((batched - alone).norm() / (alone - alone.mean(-1, keepdim=True)).norm().clamp(min=1e-6))
    if difference > (0.3 if base.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        raise ValueError(
            f"{text_config(base).model_type} cannot be fed its own states: this project has not tested the family, and "
            "two short rows in a batch with its cache give other logits than each of them recomputed "
            f"({difference:.1g} apart, relative to their norm)."
        )


def weights_materialized(base: PreTrainedModel) -> bool:
    """Whether this process holds all weights of the model, and not a part of them or their shapes alone."""
    weight: Any = base.get_input_embeddings().weight
    return weight.device.type != "meta" and weight.numel() > 0


def cache_argument(base: PreTrainedModel) -> str:
    """The name of the argument in which a model takes its KV cache."""
    arguments = inspect.signature(base.base_model.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in arguments)


def max_sequence_length(config: Any) -> int:
    """The longest sequence that a model of this config takes, in tokens.

    longrope (Phi-3 and others) rotates all positions by other angles once a row exceeds the original context length.
    Keys in the cache would keep the old angles, so such a model is used up to that length.
    """
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    original = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(min([longest, *filter(None, original)]))


def postprocess_logits(config: Any, logits: Tensor) -> Tensor:
    """Scale or cap the output of the head, as some families do."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap
