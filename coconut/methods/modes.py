"""Modes of a hybrid model, which chooses how to answer with its first token (Thinkless, arXiv 2505.13379)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coconut.methods.table import NOTHING, THOUGHTS, Slot


@dataclass(frozen=True)
class Mode:
    """What a hybrid model does after a control token.

    `<short>`: answer at once. `<think>`: the whole chain in words, then the answer. `<latent_K>`: K thoughts, then the
    answer.
    """

    name: str
    slot: Slot
    num_thoughts: int
    steps_cut: int | None

    @property
    def token(self) -> str:
        return f"<{self.name}>"


def parse_mode(name: str) -> Mode:
    """The mode of this name: short, think or latent_K. Raises ValueError for other names."""
    if name == "short":
        return Mode(name, NOTHING, 0, None)
    if name == "think":
        return Mode(name, NOTHING, 0, 0)
    if found := re.fullmatch(r"latent_([1-9]\d*)", name):
        return Mode(name, THOUGHTS, int(found[1]), None)
    raise ValueError(f"There is no mode {name!r}. The modes are short, think, and latent_K with K thoughts.")
