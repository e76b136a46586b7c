"""How hidden states become the next input: the one rule of training, generation and analysis.

A thought is made in two steps: its content (`LatentLM.thought`), which may be a mixture of words, passes the projector.

Shapes: (..., D) states and thoughts of size D; V vocabulary, M words of a mixture, S words of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coconut.data.tokenization import SpecialIds
from coconut.methods import Pooling, Projector, Slot
from coconut.models.losses import at_least_float32
from coconut.models.module_files import load_module, save_module

WEIGHTS_FILE = "feedback.safetensors"  # beside a model's own weights, which AutoModel opens without it


class Words(Protocol):
    """What a head needs of a model to read and to write words: a LatentLM."""

    special: SpecialIds

    def logits(self, hidden_states: Tensor) -> Tensor: ...

    def embed(self, ids: Tensor) -> Tensor: ...


def merge(embeds: Tensor, is_word: Tensor, pooling: Pooling) -> Tensor:
    """(..., D) one thought of each group of word embeddings (..., S, D), of which those of `is_word` (..., S) exist.

    A group without words gives zeros.
    """
    count = is_word.sum(-1, keepdim=True).clamp(min=1).to(embeds)
    total = (embeds * is_word[..., None]).sum(-2)
    return total / (count.sqrt() if pooling is Pooling.sqrt else count)


def greedy_words(logits: Tensor, special: SpecialIds) -> Tensor:
    """The likeliest tokens (...) of logits (..., V). Of the added ones only `<eot>` may be among them."""
    never = [token for token in special.added if token != special.eot]
    return logits.index_fill(-1, torch.tensor(never, device=logits.device), -torch.inf).argmax(-1)


class GaussianHead(nn.Module):
    """Predicts the next merged embedding, divided by `scale`: its mean and the logarithm of its deviation, (..., D).

    In generation the mean is fed, and the thoughts end where the model's own head says `<eot>`. CoLaR, arXiv
    2505.16552, section 3; layers as in the released code, src/modules/projector.py.
    """

    scale: Tensor

    def __init__(self, slot: Slot, hidden: int):
        super().__init__()
        width = slot.width or hidden
        self.trunk = nn.Sequential(
            nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )  # fmt: skip
        self.mean, self.log_deviation = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.register_buffer("scale", torch.tensor(slot.scale or 1.0))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(states)
        return self.mean(features), self.log_deviation(features)

    def thoughts(self, states: Tensor, words: Words) -> Tensor:
        return self(states)[0] * self.scale

    def next_word(self, states: Tensor, words: Words) -> Tensor:
        return words.logits(states)


class MultiTokenHead(nn.Module):
    """Predicts the words of the next group: (..., S, D) states that the model's own head reads.

    In generation the likeliest words are merged; `<eot>` ends a group, and as the first word the thoughts. C-MTP, arXiv
    2607.16972; released code, cmtp/src/model.py.
    """

    def __init__(self, slot: Slot, hidden: int):
        super().__init__()
        width = slot.width or hidden
        self.pooling = slot.pooling
        self.layers = nn.Sequential(
            nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, slot.group * hidden),
            nn.Unflatten(-1, (slot.group, hidden)),
        )  # fmt: skip

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states)

    def thoughts(self, states: Tensor, words: Words) -> Tensor:
        ids = greedy_words(words.logits(self(states)), words.special)
        return merge(words.embed(ids), (ids != words.special.eot).long().cumprod(-1), self.pooling)

    def next_word(self, states: Tensor, words: Words) -> Tensor:
        return words.logits(self(states)[..., 0, :])


def _mlp_ln(slot: Slot, hidden: int) -> nn.Module:
    """CODI's projection (arXiv 2502.21074; released code, src/model.py), without its dropout of 0."""
    width = slot.width or hidden
    return nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, hidden), nn.LayerNorm(hidden))


PROJECTORS: dict[Projector, Callable[[Slot, int], nn.Module]] = {
    Projector.none: lambda slot, hidden: nn.Identity(),
    Projector.mlp_ln: _mlp_ln,
    Projector.gaussian: GaussianHead,
    Projector.multi_token: MultiTokenHead,
}


def mixture(
    logits: Tensor, embed: nn.Module, left_out: Sequence[int], top_k: int = 0, temperature: float = 1.0
) -> Tensor:
    """(..., D) the expectation of the words' input embeddings under softmax(logits / temperature).

    `logits` (..., V). `embed` gives the embeddings of token ids. The tokens `left_out` have no part in it. With `top_k`
    only so many of the most probable words have, and their probabilities are scaled to sum to 1; with 1 it is exactly
    the embedding of the most probable word. Computed without autocast: where many words are likely, mixtures differ by
    less than the rounding of bfloat16. Soft Thinking, Zhang et al., arXiv 2505.15778, section 3.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores_V = at_least_float32(logits).index_fill(-1, torch.tensor(left_out, device=logits.device), -torch.inf)
        if not top_k:
            weight: Any = embed._parameters.get("weight")  # which ZeRO 3 would gather if it were read as an attribute
            whole = type(embed) is nn.Embedding and embed.padding_idx is None and not hasattr(weight, "ds_id")
            table_VD = weight if whole else embed(torch.arange(logits.shape[-1], device=logits.device))
            return (scores_V / temperature).softmax(-1).to(table_VD) @ table_VD
        scores_M, ids_M = scores_V.topk(min(top_k, logits.shape[-1] - len(left_out)), dim=-1)
        weights_M = (scores_M / temperature).softmax(-1)
        return (weights_M[..., None] * embed(ids_M)).sum(-2)


class Feedback(nn.Module):
    """Maps the content of a thought, as the last hidden state before it, to the thought that is fed.

    `table`: the input embeddings, whose deviation is the scale of a Gaussian head without one.
    """

    projector: Any

    def __init__(self, slot: Slot, hidden: int, table: Tensor | None = None):
        super().__init__()
        self.slot = slot
        self.projector = projector = PROJECTORS[slot.projector](slot, hidden)
        if isinstance(projector, GaussianHead) and not slot.scale and table is not None:
            projector.scale.fill_(table.detach().float().std())

    def forward(self, content: Tensor, words: Words | None = None) -> Tensor:
        """Thoughts (..., D). A head needs the model's `words` for them."""
        content = self.in_own_dtype(content)
        return self.projector.thoughts(content, words) if self.slot.merges else self.projector(content)

    def next_word(self, states: Tensor, words: Words) -> Tensor:
        """(..., V) logits of a word of the group that the next thought merges, or of `<eot>`.

        The Gaussian head is trained to name any of them, the multi-token head the first one.
        """
        return self.projector.next_word(self.in_own_dtype(states), words)

    def ends(self, states: Tensor, words: Words) -> Tensor:
        """(...) where the model ends its thoughts instead, of one that does so itself."""
        return greedy_words(self.next_word(states, words), words.special) == words.special.eot

    def in_own_dtype(self, states: Tensor) -> Tensor:
        weight = next(self.projector.parameters(), None)
        return states if weight is None else states.to(weight.dtype)

    @property
    def has_weights(self) -> bool:
        return any(True for _ in self.parameters())

    def save(self, folder: Path | str) -> None:
        """Write the weights, if there are any."""
        if self.has_weights:
            save_module(self, Path(folder) / WEIGHTS_FILE)

    def load(self, folder: Path | str) -> None:
        """Read what `save` wrote. Raises ValueError if the file is missing, damaged, or of another projector."""
        if self.has_weights:
            what = f"the weights of the projector {self.slot.projector.value} of the thoughts"
            load_module(self, Path(folder) / WEIGHTS_FILE, what)
