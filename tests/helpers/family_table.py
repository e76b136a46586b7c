"""The families of models that are tested, small, and the table of docs/models.md.

PYTHONPATH=tests python -m helpers.family_table writes the table anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from coconut.data.tokenization import build_word_tokenizer
from helpers import ROOT
from helpers.models import WORDS

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/helpers/family_table.py -->", "<!-- end -->"

LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 96}  # fmt: skip
FUSED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}


@dataclass(frozen=True)
class Family:
    """`special`: what matters when it is fed its own states. `float64`: whether transformers computes in it."""

    name: str
    model_type: str
    special: str
    sizes: dict[str, Any] = field(default_factory=lambda: LLAMA)
    float64: bool = True


FAMILIES = [
    Family("GPT-2", "gpt2", "learned positions, tied tables; its GELU is computed in one kernel",
           {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    Family("GPT-NeoX, Pythia", "gpt_neox", "rotary positions on a part of each head, parallel layers",
           {**FUSED, "intermediate_size": 48}),
    Family("OPT", "opt", "learned positions that begin at 2",
           {**FUSED, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    Family("OPT 350M", "opt", "embeddings narrower than the layers: a thought is projected as a word is",
           {**FUSED, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0, "do_layer_norm_before": False}),
    Family("Llama 2, 3; DeepSeek distillations", "llama", "grouped queries"),
    Family("Llama 3.2, tied", "llama", "tied tables", {**LLAMA, "tie_word_embeddings": True}),
    Family("Mistral", "mistral", "a sliding window in every layer", {**LLAMA, "head_dim": 8, "sliding_window": 5}),
    Family("Qwen2, DeepSeek distillations", "qwen2", "biases in attention"),
    Family("Qwen2 with windows", "qwen2", "sliding windows in some layers",
           {**LLAMA, **MIXED, "use_sliding_window": True}),
    Family("Qwen3", "qwen3", "norms of queries and keys", {**LLAMA, "head_dim": 8}),
    Family("Qwen3-MoE", "qwen3_moe", "experts", {**LLAMA, **EXPERTS, "head_dim": 8, "num_experts": 4,
                                                 "moe_intermediate_size": 16}),
    Family("Mixtral", "mixtral", "experts", {**LLAMA, **EXPERTS, "num_local_experts": 4}),
    Family("Gemma 2", "gemma2", "scaled embeddings, soft caps, sliding windows in some layers",
           {**LLAMA, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 8}, float64=False),
    Family("Gemma 3", "gemma3_text", "scaled embeddings, sliding windows in some layers, two kinds of positions",
           {**LLAMA, **MIXED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    Family("Phi-3", "phi3", "queries, keys and values in one matrix", {**LLAMA, "pad_token_id": 0}),
    Family("Falcon", "falcon", "one key for all queries, parallel layers",
           {**FUSED, "ffn_hidden_size": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    Family("OLMo-2", "olmo2", "norms after the layers"),
    Family("SmolLM3", "smollm3", "some layers without positions", {**LLAMA, "no_rope_layers": [1, 0]}),
    Family("Granite", "granite", "scaled embeddings, residuals and logits: a thought is scaled as a word is",
           {**LLAMA, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    Family("Cohere", "cohere", "scaled logits, parallel layers", {**LLAMA, "logit_scale": 0.5}),
]  # fmt: skip

REFUSED = [
    Family("Mamba", "mamba", "a recurrent state", {"hidden_size": 16, "num_hidden_layers": 1}),
    Family("RWKV", "rwkv", "a recurrent state", {"hidden_size": 16, "num_hidden_layers": 2}),
    Family("LFM2", "lfm2", "a recurrent state",
           {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    Family("Qwen3-Next", "qwen3_next", "a recurrent state",
           {**LLAMA, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0}),
    Family("BLOOM", "bloom", "positions that cannot be given", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    Family("GPT-Neo", "gpt_neo", "windows that count columns",
           {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
            "window_size": 4}),
    Family("CTRL", "ctrl", "changes the embeddings that it is given",
           {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}),
    Family("BERT, as generation", "bert-generation", "attention in both directions, unless told otherwise",
           {**FUSED, "intermediate_size": 48}),
    Family("Gemma 3, both ways", "gemma3_text", "attention in both directions",
           {**LLAMA, **MIXED, "head_dim": 8, "use_bidirectional_attention": True}),
    Family("T5", "t5", "an encoder", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
]  # fmt: skip


def table() -> str:
    lines = ["| family | model_type | what matters | all equivalences |", "| --- | --- | --- | --- |"]
    lines += [f"| {f.name} | `{f.model_type}` | {f.special} | hold |" for f in FAMILIES]
    lines += [f"| {f.name} | `{f.model_type}` | {f.special} | refused, by name |" for f in REFUSED]
    return "\n".join([BEGIN, *lines, END])


def page(text: str) -> str:
    """The text of the page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + table() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))


def new_tokenizer() -> Any:
    return build_word_tokenizer(WORDS)


def base_of(family: Family) -> Any:
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family.model_type, vocab_size=len(new_tokenizer()), **{**special, **family.sizes})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config, experts_implementation="eager")  # the grouped one knows no float64
