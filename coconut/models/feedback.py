"""How a hidden state becomes the next input: the one rule of training, generation and analysis.

Shapes: (..., D) states and thoughts of size D; B rows, K positions of a block of thoughts; S words of a group,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coconut.data.tokenization import SpecialIds
from coconut.methods import Pooling, Projector, Slot, Update

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

    def ends(self, states: Tensor, words: Words) -> Tensor:
        return greedy_words(words.logits(states), words.special) == words.special.eot


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

    def ends(self, states: Tensor, words: Words) -> Tensor:
        return greedy_words(words.logits(self(states)[..., 0, :]), words.special) == words.special.eot


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


class Feedback(nn.Module):
    """Maps the last hidden state before a thought, after the final norm, to the thought that is fed.

    `table`: the input embeddings, whose deviation is the scale of a Gaussian head without one.
    """

    projector: Any

    def __init__(self, slot: Slot, hidden: int, table: Tensor | None = None):
        super().__init__()
        self.slot = slot
        self.projector = projector = PROJECTORS[slot.projector](slot, hidden)
        if isinstance(projector, GaussianHead) and not slot.scale and table is not None:
            projector.scale.fill_(table.detach().float().std())

    def forward(self, states: Tensor, words: Words | None = None) -> Tensor:
        """Thoughts (..., D). A head needs the model's `words` for them."""
        states = self.in_own_dtype(states)
        return self.projector.thoughts(states, words) if self.slot.merges else self.projector(states)

    def ends(self, states: Tensor, words: Words) -> Tensor:
        """(...) where the model ends its thoughts instead, of one that does so itself."""
        return self.projector.ends(self.in_own_dtype(states), words)

    def in_own_dtype(self, states: Tensor) -> Tensor:
        weight = next(self.projector.parameters(), None)
        return states if weight is None else states.to(weight.dtype)

    def update_block(
        self, tokens_BKD: Tensor, states_BKD: Tensor, before_BKD: Tensor, words: Words | None = None
    ) -> Tensor:
        """(B, K, D) the inputs of a block of thoughts in the next iteration, all at once.

        `tokens_BKD`: the embeddings of its tokens. `states_BKD`: the last hidden states at its positions, and
        `before_BKD` at the positions before them. Jacobi: PCCoT, Wu et al., arXiv 2506.18582, section 3. Loop: LOTUS,
        arXiv 2606.31779.
        """
        if self.slot.update is Update.loop:
            return tokens_BKD + self(states_BKD).to(tokens_BKD)
        return self(before_BKD, words).to(tokens_BKD)

    @property
    def has_weights(self) -> bool:
        return any(True for _ in self.parameters())

    def save(self, folder: Path | str) -> None:
        """Write the weights, if there are any."""
        from safetensors.torch import save_file

        if self.has_weights:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()}
            save_file(weights, Path(folder) / WEIGHTS_FILE)

    def load(self, folder: Path | str) -> None:
        """Read what `save` wrote. Raises ValueError if the file is missing, damaged, or of another projector."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.has_weights:
            return
        file = Path(folder) / WEIGHTS_FILE
        try:
            self.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{file}, the weights of the projector {self.slot.projector.value} of the thoughts, cannot be read "
                f"({error}). Save the model again."
            ) from error
