"""Embeddings of added tokens: check and grow the tables, and initialize the new rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coconut.data.tokenization import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def check_tables(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, init: str) -> None:
    """Raise ValueError if the tokenizer has more entries than the model, or `init` cannot initialize a token."""
    table: Any = base.get_input_embeddings()
    if table.num_embeddings < len(tokenizer):
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries and the model's embedding table only {table.num_embeddings}: "
            "they do not belong together. Load both from the same place."
        )
    if init not in ("mean", "random") and init not in tokenizer.get_vocab():
        raise ValueError(f'init={init!r} is neither "mean", "random" nor a token of this tokenizer.')


def grow_tables(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, known: int, init: str) -> list[str]:
    """Make room for all tokens of the tokenizer, and initialize those from id `known` on. Return these tokens."""
    resize_tables(base, len(tokenizer))
    new_ids = list(range(known, len(tokenizer)))
    both: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    for weight in {id(table.weight): table.weight for table in both}.values():
        initialize_rows(weight, new_ids, known, init, tokenizer)
    return list(tokenizer.convert_ids_to_tokens(new_ids))


def resize_tables(base: PreTrainedModel, num_tokens: int) -> None:
    table: Any = base.get_input_embeddings()
    if num_tokens > table.num_embeddings:
        base.resize_token_embeddings(num_tokens, mean_resizing=False)


def initialize_rows(weight: Tensor, ids: list[int], known: int, init: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Fill the rows `ids` of a table: with the mean of its first `known` rows, random numbers, or a token's row."""
    if not ids:
        return
    with torch.no_grad():
        rows = weight[:known].float()
        if init == "mean":
            new = rows.mean(0).expand(len(ids), -1)
        elif init == "random":
            new = torch.randn(len(ids), weight.shape[1], device=weight.device) * rows.std()
        else:
            new = rows[token_ids(tokenizer, [init])[0]].expand(len(ids), -1)
        weight[ids] = new.to(weight.dtype)
