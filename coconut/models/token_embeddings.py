"""Embeddings of added tokens: room for them in the tables, and what they start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut.data.tokenization import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def resize_tables(base: PreTrainedModel, tokens: int) -> None:
    table: Any = base.get_input_embeddings()
    if tokens > table.num_embeddings:
        base.resize_token_embeddings(tokens, mean_resizing=False)


def initialize_tokens(
    base: PreTrainedModel, ids: list[int], old: int, init: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    both: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    for weight in {id(table.weight): table.weight for table in both}.values():
        initialize_rows(weight, ids, old, init, tokenizer)


def initialize_rows(weight: Tensor, ids: list[int], old: int, init: str, tokenizer: PreTrainedTokenizerFast) -> None:
    if not ids:
        return
    with torch.no_grad():
        known = weight[:old].float()
        if init == "mean":
            rows = known.mean(0).expand(len(ids), -1)
        elif init == "random":
            rows = torch.randn(len(ids), weight.shape[1], device=weight.device) * known.std()
        else:
            rows = known[token_ids(tokenizer, [init])[0]].expand(len(ids), -1)
        weight[ids] = rows.to(weight.dtype)
