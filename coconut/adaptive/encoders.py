"""The frozen embedding of a question, from which a policy chooses.

Shapes: Q questions, B of them at a time, T tokens, D numbers.
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
"""From questions to (Q, D), float32, on the CPU. The same whatever questions are beside one."""


def latent_encoder(lm: LatentLM, pooling: str, batch_size: int = 64) -> Encoder:
    """The last hidden states of a LatentLM after a question, before any thought: their mean, or the last of them."""

    def encode(questions: Sequence[str]) -> Tensor:
        rows = encode_questions(lm.tokenizer, list(questions), lm.reasoning.format)
        with eval_mode(lm):
            return _pooled(rows, lm.special.pad, lm.device, batch_size, pooling, states)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return lm.hidden_states(lm.base.get_input_embeddings()(ids), mask.bool(), positions)

    return encode


def model_encoder(model: Any, tokenizer: Any, pooling: str, batch_size: int = 64) -> Encoder:
    """The last hidden states of a model of Hugging Face without its head: their mean over the question, or the last."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def encode(questions: Sequence[str]) -> Tensor:
        rows = tokenizer(list(questions), truncation=True)["input_ids"]
        return _pooled(rows, pad, model.device, batch_size, pooling, states)

    def states(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return encode


def load_encoder(name: str, device: torch.device, batch_size: int = 64) -> Encoder:
    """A sentence encoder of Hugging Face, by its name or folder; the mean of its states."""
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
    found: dict[int, Tensor] = {}
    for places in longest_first(rows, batch_size):
        padded = [torch.tensor(rows[i]) for i in places]
        ids_BT = pad_sequence(padded, batch_first=True, padding_value=pad).to(device)  # at the end, where none looks
        lengths_B = torch.tensor([len(row) for row in padded], device=device)
        mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
        states_BTD = states(ids_BT, mask_BT).float()
        if pooling == "last":
            pooled_BD = states_BTD[torch.arange(len(places), device=device), lengths_B - 1]
        else:
            pooled_BD = (states_BTD * mask_BT[..., None]).sum(1) / lengths_B[:, None]
        found |= zip(places, pooled_BD.cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(rows))])
