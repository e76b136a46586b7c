"""How a hybrid model may answer: modes, each with its control token (Thinkless, arXiv 2505.13379)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coconut.methods.table import Slot


@dataclass(frozen=True)
class Mode:
    """A way in which a hybrid model answers: what it does after this control token (Thinkless, arXiv 2505.13379).

    `<short>` is the answer at once, `<think>` the whole chain in words, `<latent_K>` K thoughts and the answer.
    """

    name: str
    slot: Slot
    num_thoughts: int
    steps_cut: int | None

    @property
    def token(self) -> str:
        return f"<{self.name}>"


def parse_mode(name: str) -> Mode:
    """Raises ValueError if no mode has this name."""
    if name == "short":
        return Mode(name, Slot.none, 0, None)
    if name == "think":
        return Mode(name, Slot.none, 0, 0)
    if found := re.fullmatch(r"latent_([1-9]\d*)", name):
        return Mode(name, Slot.thought, int(found[1]), None)
    raise ValueError(f"There is no mode {name!r}. The modes are short, think, and latent_K for K thoughts.")
