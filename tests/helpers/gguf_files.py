"""Small Llamas and their tokenizers as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import byte_level_tokenizer, shift_weights

NAMES = {
    "model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output.", "model.layers.": "blk.",
    "self_attn.q_proj.": "attn_q.", "self_attn.k_proj.": "attn_k.", "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.", "mlp.gate_proj.": "ffn_gate.", "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.", "post_attention_layernorm.": "ffn_norm.", "input_layernorm.": "attn_norm.",
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 192}  # fmt: skip


def small_llama(tokenizer: Any, **changes: Any) -> Any:
    """With random weights, large enough that each of them matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        **SIZES | changes,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    return shift_weights(model, 0.1).eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions, transformers those half a head apart."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, model: nn.Module, tokenizer: Any, kind: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Path:
    """Write the model's matrices as `kind`, its vectors as float32, and the tokenizer."""
    config: Any = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokenizer))
    _write_tokenizer(writer, tokenizer)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        for heads, end in (
            (config.num_attention_heads, "q_proj.weight"),
            (config.num_key_value_heads, "k_proj.weight"),
        ):
            if name.endswith(end):
                values = permuted(values, heads)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        own_kind = kind if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), own_kind), raw_dtype=own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_tokenizer(writer: GGUFWriter, tokenizer: Any) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {token["content"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in special else 1 for name in names])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def llama_and_tokenizer(**changes: Any) -> tuple[Any, Any]:
    tokenizer = byte_level_tokenizer()
    return small_llama(tokenizer, **changes), tokenizer
