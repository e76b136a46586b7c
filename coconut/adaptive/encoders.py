"""Frozen encoders of questions, the input of a configuration policy.

Shapes: Q questions, B rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coconut.data.tokenization import encode_questions
from coconut.generation.generate import longest_first
from coconut.utils.pretrained import explain_load_errors, load_pretrained
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

POOLINGS = ("mean", "last")

Encoder = Callable[[Sequence[str]], Tensor]
"""From questions to (Q, D), float32, on the CPU. An embedding does not depend on the other questions of the batch."""


def latent_encoder(lm: LatentLM, pooling: str, batch_size: int = 64) -> Encoder:
    """An encoder by a LatentLM: the mean of its last-layer hidden states over the question, or the last one."""

    def encode(questions: Sequence[str]) -> Tensor:
        rows = encode_questions(lm.tokenizer, list(questions), lm.reasoning.format)
        with eval_mode(lm):
            return _pooled(rows, lm.special.pad, lm.device, batch_size, pooling, states)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return lm.hidden_states(lm.base.get_input_embeddings()(ids), mask.bool(), positions)

    return encode


def model_encoder(model: Any, tokenizer: Any, pooling: str, batch_size: int = 64) -> Encoder:
    """An encoder by a Hugging Face model without head: the mean of its last-layer hidden states, or the last one."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def encode(questions: Sequence[str]) -> Tensor:
        rows = tokenizer(list(questions), truncation=True)["input_ids"]
        return _pooled(rows, pad, model.device, batch_size, pooling, states)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return encode


def load_encoder(name: str, device: torch.device, batch_size: int = 64) -> Encoder:
    """An encoder by a Hugging Face sentence encoder, named or in a folder: the mean of its hidden states."""
    from transformers import AutoModel, AutoTokenizer

    with explain_load_errors(name, "embedding"):
        model, tokenizer = load_pretrained(AutoModel, name).to(device).eval(), load_pretrained(AutoTokenizer, name)
    return model_encoder(model, tokenizer, "mean", batch_size)


@torch.no_grad()
def _pooled(
    rows: Sequence[list[int]],
    pad: int,
    device: torch.device,
    batch_size: int,
    pooling: str,
    states: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    pooled: dict[int, Tensor] = {}
    for indices in longest_first(rows, batch_size):
        padded = [torch.tensor(rows[i]) for i in indices]
        ids_BT = pad_sequence(padded, batch_first=True, padding_value=pad).to(device)  # on the right
        lengths_B = torch.tensor([len(row) for row in padded], device=device)
        mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
        states_BTD = states(ids_BT, mask_BT).float()
        if pooling == "last":
            pooled_BD = states_BTD[torch.arange(len(indices), device=device), lengths_B - 1]
        else:
            pooled_BD = (states_BTD * mask_BT[..., None]).sum(1) / lengths_B[:, None]
        pooled |= zip(indices, pooled_BD.cpu(), strict=True)
    return torch.stack([pooled[i] for i in range(len(rows))])
