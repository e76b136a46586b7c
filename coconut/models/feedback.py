"""How a hidden state becomes the next input: the one rule of training, generation and analysis.

Shapes: (..., D) states and thoughts of size D; B rows, K positions of a block of thoughts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from coconut.methods import Projector, Slot, Update
from coconut.models.module_files import load_module, save_module

WEIGHTS_FILE = "feedback.safetensors"  # beside a model's own weights, which AutoModel opens without it


def _mlp_ln(hidden: int, width: int) -> nn.Module:
    """CODI's projection (arXiv 2502.21074; released code, src/model.py), without its dropout of 0."""
    return nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, hidden), nn.LayerNorm(hidden))


PROJECTORS: dict[Projector, Callable[[int, int], nn.Module]] = {
    Projector.none: lambda hidden, width: nn.Identity(),
    Projector.mlp_ln: _mlp_ln,
}


class Feedback(nn.Module):
    """Maps the last hidden state before a thought, after the final norm, to the thought that is fed."""

    def __init__(self, slot: Slot, hidden: int):
        super().__init__()
        self.slot = slot
        self.projector = PROJECTORS[slot.projector](hidden, slot.width or hidden)

    def forward(self, states: Tensor) -> Tensor:
        weight = next(self.projector.parameters(), None)
        return self.projector(states if weight is None else states.to(weight.dtype))

    def update_block(self, tokens_BKD: Tensor, states_BKD: Tensor, before_BKD: Tensor) -> Tensor:
        """(B, K, D) the inputs of a block of thoughts in the next iteration, all at once.

        `tokens_BKD`: the embeddings of its tokens. `states_BKD`: the last hidden states at its positions, and
        `before_BKD` at the positions before them. Jacobi: PCCoT, Wu et al., arXiv 2506.18582, section 3. Loop: LOTUS,
        arXiv 2606.31779.
        """
        if self.slot.update is Update.loop:
            return tokens_BKD + self(states_BKD).to(tokens_BKD)
        return self(before_BKD).to(tokens_BKD)

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
