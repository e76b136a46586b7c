"""The table of methods.

A method has three parts: what fills the slot between question and chain, how the written chain is cut, and whether
the markers `<bot>` and `<eot>` stand around the slot.

The first eight entries of `METHODS` are the rows of Table 1 in Hao et al., "Training Large Language Models to Reason
in a Continuous Latent Space", arXiv 2412.06769; the last is the warm-up of a hybrid model (Thinkless, arXiv
2505.13379).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Slot(StrEnum):
    """What stands between the question and the written chain."""

    none = "nothing"
    pause = "pause"  # a learned <pause> token
    thought = "thought"  # the last hidden state, fed back


class Cut(StrEnum):
    """What is removed from the front of the written chain, and when."""

    never = "never"
    steps = "steps"  # stage k removes the first k steps
    last = "last"  # what the last stage of `steps` removes, from the first update
    tokens = "tokens"  # every stage removes a few more tokens (iCoT)
    all = "all"
    modes = "modes"  # depends on the mode of the example


@dataclass(frozen=True)
class Method:
    """One entry of the table. `summary` describes it in run plans, reports and tables."""

    slot: Slot
    cut: Cut
    markers: bool
    summary: str

    def __post_init__(self) -> None:
        assert self.markers or self.slot is not Slot.thought, "thoughts need <eot>: the first word is predicted from it"


METHODS: dict[str, Method] = {
    "coconut": Method(Slot.thought, Cut.steps, True, "stage k: the first k steps become k*c thoughts"),
    "cot": Method(Slot.none, Cut.never, False, "the whole chain in words"),
    "no_cot": Method(Slot.none, Cut.all, False, "the answer at once"),
    "icot": Method(Slot.none, Cut.tokens, False, "the chain is removed token by token"),
    "pause": Method(Slot.pause, Cut.all, True, "pause tokens, then the answer; no curriculum"),
    "without_curriculum": Method(Slot.thought, Cut.last, True, "Coconut's last stage from the start"),
    "without_thought": Method(Slot.none, Cut.steps, False, "Coconut's curriculum, nothing in the slot"),
    "pause_as_thought": Method(Slot.pause, Cut.steps, True, "Coconut's curriculum, pauses in the slot"),
    "hybrid_warmup": Method(Slot.none, Cut.modes, False, "each example in each mode, after its control token"),
}


def get_method(name: str) -> Method:
    """The entry of METHODS with this name. Raises ValueError with all names if there is none."""
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}. The methods are: {', '.join(METHODS)}.")
    return METHODS[name]
