"""What differs between families of models, as far as feeding a model its own states goes. docs/models.md lists them.

Shapes: B rows, Q columns of one pass, S columns of it and of all before it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from coconut.acceleration.linear import FusedGelu
from coconut.utils.torch_utils import eval_mode

NEEDED = ("inputs_embeds", "attention_mask", "position_ids")
CACHE_ARGUMENTS = ("cache", "past_key_values")  # since transformers 5.24, and before
RECURRENT_ARGUMENTS = ("state", "cache_params")  # in which models take a recurrent state
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call how many there are
REMEMBERED = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
TESTED = frozenset({
    "cohere", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2",
    "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
})  # fmt: skip


def text_config(base: PreTrainedModel) -> Any:
    return base.config.get_text_config(decoder=True)


def check_family(base: PreTrainedModel) -> None:
    """Raises ValueError, with the family's name and the reason, if a model cannot be fed its own states."""
    config = text_config(base)
    name = config.model_type
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; LatentLM takes models with a decoder alone.")
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head. Load it with AutoModelForCausalLM.")
    taken = inspect.signature(base.base_model.forward).parameters
    if recurrent := next((argument for argument in RECURRENT_ARGUMENTS if argument in taken), None):
        raise ValueError(
            f"{name} cannot be fed its own states in batches: it keeps a recurrent state (`{recurrent}`), "
            "through which the padding between a row's tokens would run."
        )
    missing = [argument for argument in NEEDED if argument not in taken]
    if not any(argument in taken for argument in CACHE_ARGUMENTS):
        missing.append(f"KV cache ({' or '.join(CACHE_ARGUMENTS)})")
    if missing:
        raise ValueError(
            f"{name} cannot be fed its own states: {type(base.base_model).__name__}.forward takes no "
            f"{', '.join(missing)}. transformers {transformers.__version__} is installed; docs/models.md lists the "
            "families that work."
        )
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in REMEMBERED:
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
    """Raises ValueError if `finish` does not know how this family gets from its head to its logits."""
    table: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    if not weights_materialized(base):
        return
    ids = torch.arange(4, device=table.weight.device)[None] % table.num_embeddings
    shared: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with eval_mode(base):
        theirs = base(input_ids=ids, **shared).logits.float()
        states = base.base_model(inputs_embeds=table(ids), **shared).last_hidden_state
    ours = postprocess_logits(text_config(base), head(states)).float()
    apart = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))
    if apart > (0.05 if table.weight.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        raise ValueError(
            f"{text_config(base).model_type} makes other logits from its last hidden states than its head alone "
            f"({apart:.1g} apart, relative to their norm), in a way that coconut/models/families.py does not know."
        )


def weights_materialized(base: PreTrainedModel) -> bool:
    """Whether it has weights, and this process all of them."""
    weight: Any = base.get_input_embeddings().weight
    return weight.device.type != "meta" and weight.numel() > 0


def cache_argument(base: PreTrainedModel) -> str:
    """The name of the argument in which a model takes its KV cache: `cache` since transformers 5.24."""
    taken = inspect.signature(base.base_model.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in taken)


def max_sequence_length(config: Any) -> int:
    """The longest sequence that a model of this config takes, in tokens.

    Phi-3's and other models' longrope turns all positions by other angles once a row is longer than at first; keys that
    are in the cache would not turn with it, so such a model is used up to there.
    """
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    first = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(min([longest, *filter(None, first)]))


def postprocess_logits(config: Any, logits: Tensor) -> Tensor:
    """What a family still does to what its head gives."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap


def fuse_gelu(base: PreTrainedModel) -> None:
    """GPT-2's GELU in one kernel: transformers spells it out in eight (docs/performance.md)."""
    for module in list(base.modules()):
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation):
                setattr(module, name, FusedGelu())


@dataclass(frozen=True)
class SlidingWindow:
    """Sliding windows of `size` tokens: of every layer, or (`mixed`) of those that config.layer_types says.

    transformers counts a window in columns. Where padding stands between a row's tokens that is not in tokens, and
    masks are made here instead.
    """

    size: int
    mixed: bool

    @classmethod
    def of(cls, base: PreTrainedModel) -> SlidingWindow | None:
        """None if no layer has one."""
        layers = DynamicCache(config=text_config(base)).layers
        sizes = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
        if not sizes:
            return None
        mixed = not all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
        return cls(min(sizes), mixed)

    def matter(self, is_token: Tensor) -> bool:
        """Whether a row is longer than the window and has padding between its tokens, or on a GPU begins with padding
        (`coconut.acceleration.attention`).
        """
        columns = torch.arange(is_token.shape[1], device=is_token.device)
        last = torch.where(is_token, columns, -1).amax(1)
        first = torch.where(is_token, columns, len(columns)).amin(1)
        padded = (last - first + 1 > is_token.sum(1)).any()
        blind = is_token.device.type == "cuda" and not is_token[:, 0].all()
        return bool(blind) or (is_token.shape[1] > self.size and bool(padded))

    def masks(self, is_token: Tensor, positions: Tensor, start: int, dtype: torch.dtype) -> Any:
        """What the base takes as the mask of the columns from `start` on; `is_token` and `positions` (B, S) of all."""
        columns = torch.arange(is_token.shape[1], device=is_token.device)
        seen = is_token[:, None, :] & (columns <= columns[start:, None])
        near = positions[:, start:, None] - positions[:, None, :] < self.size
        kinds = {"full_attention": seen, "sliding_attention": seen & near}
        nothing = torch.zeros((), dtype=dtype, device=is_token.device)
        made = {kind: nothing.where(allowed, torch.finfo(dtype).min)[:, None] for kind, allowed in kinds.items()}
        return made if self.mixed else made["sliding_attention"]
