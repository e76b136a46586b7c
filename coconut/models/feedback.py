"""How hidden states become the next input: the one rule of training, generation and analysis.

A thought is made in two steps: its content (`LatentLM.thought`), which may be a mixture of words, passes the projector.

Shapes: (..., D) states and thoughts of size D; V vocabulary, M words of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coconut.methods import Projector, Slot
from coconut.models.losses import at_least_float32
from coconut.models.module_files import load_module, save_module

WEIGHTS_FILE = "feedback.safetensors"  # beside a model's own weights, which AutoModel opens without it


def _mlp_ln(hidden: int, width: int) -> nn.Module:
    """CODI's projection (arXiv 2502.21074; released code, src/model.py), without its dropout of 0."""
    return nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, hidden), nn.LayerNorm(hidden))


PROJECTORS: dict[Projector, Callable[[int, int], nn.Module]] = {
    Projector.none: lambda hidden, width: nn.Identity(),
    Projector.mlp_ln: _mlp_ln,
}


def mixture(
    logits: Tensor, embed: nn.Module, left_out: Sequence[int], top_k: int = 0, temperature: float = 1.0
) -> Tensor:
    """(..., D) the expectation of the words' input embeddings under softmax(logits / temperature).

    `logits` (..., V). `embed` gives the embeddings of token ids. The tokens `left_out` have no part in it. With `top_k`
    only so many of the most probable words have, and their probabilities are scaled to sum to 1; with 1 it is exactly
    the embedding of the most probable word. Soft Thinking, Zhang et al., arXiv 2505.15778, section 3.
    """
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
    """Maps the content of a thought, as the last hidden state before it, to the thought that is fed."""

    def __init__(self, slot: Slot, hidden: int):
        super().__init__()
        self.slot = slot
        self.projector = PROJECTORS[slot.projector](hidden, slot.width or hidden)

    def forward(self, content: Tensor) -> Tensor:
        weight = next(self.projector.parameters(), None)
        return self.projector(content if weight is None else content.to(weight.dtype))

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
