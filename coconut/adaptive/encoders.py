"""Frozen encoders of questions, the input of a configuration policy.

Shapes: Q questions, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

from coconut.data.tokenization import encode_questions
from coconut.generation.generate import longest_first
from coconut.models.latent_lm import LatentLM
from coconut.utils.pretrained import explain_load_errors, load_pretrained
from coconut.utils.torch_utils import eval_mode

POOLINGS = ("mean", "last")

Encoder = Callable[[Sequence[str]], Tensor]
"""From questions to (Q, D), float32, on the CPU. An embedding does not depend on the other questions of the batch."""


def latent_encoder(lm: LatentLM, pooling: str, batch_size: int = 64) -> Encoder:
    """An encoder by a LatentLM: the mean of its last-layer hidden states over the question, or the last one."""

    def rows_of(questions: list[str]) -> list[list[int]]:
        return encode_questions(lm.tokenizer, questions, lm.reasoning.format)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with eval_mode(lm):
            return lm.hidden_states(lm.base.get_input_embeddings()(ids), mask.bool(), positions)

    return partial(_pooled, rows_of, states, lm.special.pad, lm.device, pooling, batch_size)


def model_encoder(model: Any, tokenizer: Any, pooling: str, batch_size: int = 64) -> Encoder:
    """An encoder by a Hugging Face model without head: the mean of its last-layer hidden states, or the last one."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def rows_of(questions: list[str]) -> list[list[int]]:
        return tokenizer(questions, truncation=True)["input_ids"]

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return partial(_pooled, rows_of, states, pad, model.device, pooling, batch_size)


def load_encoder(
    name: str, device: torch.device, batch_size: int = 64, own: Callable[[str, int], Encoder] | None = None
) -> Encoder:
    """An encoder by a Hugging Face sentence encoder, named or in a folder: the mean of its hidden states.

    `own`: makes the encoder by the answering model itself from one of POOLINGS, if that is the name, and a batch size.
    """
    if own and name in POOLINGS:
        return own(name, batch_size)
    with explain_load_errors(name, "embedding"):
        model, tokenizer = load_pretrained(AutoModel, name).to(device).eval(), load_pretrained(AutoTokenizer, name)
    return model_encoder(model, tokenizer, "mean", batch_size)


@torch.no_grad()
def _pooled(
    rows_of: Callable[[list[str]], list[list[int]]], states_of: Callable[[Tensor, Tensor], Tensor], pad: int,
    device: torch.device, pooling: str, batch_size: int, questions: Sequence[str],
) -> Tensor:  # fmt: skip
    rows, pooled = rows_of(list(questions)), dict[int, Tensor]()
    for indices in longest_first(rows, batch_size):
        padded = [torch.tensor(rows[i]) for i in indices]
        ids_BT = pad_sequence(padded, batch_first=True, padding_value=pad).to(device)  # on the right
        lengths_B = torch.tensor([len(row) for row in padded], device=device)
        mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
        states_BTD = states_of(ids_BT, mask_BT).float()
        if pooling == "last":
            pooled_BD = states_BTD[torch.arange(len(indices), device=device), lengths_B - 1]
        else:
            pooled_BD = (states_BTD * mask_BT[..., None]).sum(1) / lengths_B[:, None]
        pooled |= zip(indices, pooled_BD.cpu(), strict=True)
    return torch.stack([pooled[i] for i in range(len(rows))])
