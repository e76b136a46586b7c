"""Labels of steps from rollouts: a step is as good as what comes of it (Math-Shepherd; Wang et al., arXiv 2312.08935).

What the implicit reward does without: K answers are sampled on from the end of every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from coconut.methods import Slot
from coconut.modes import seeded
from coconut.rewards.answers import Labelled
from coconut.rewards.steps import parts_said, step_count
from coconut.rl.rollouts import Correctness
from coconut.thinking import longest_first, pad_rows

if TYPE_CHECKING:
    from coconut.model import LatentLM


@dataclass(frozen=True)
class StepLabels:
    """For each answer, in the order of the questions, of each step the share of rollouts that came out right.

    `sampled`: rollouts made, fewer than steps times K where answers begin alike. `tokens` that went through the model:
    each prefix once, and what was said after it.
    """

    shares: list[list[float]]
    sampled: int
    tokens: int

    @property
    def hard(self) -> list[list[bool]]:
        """Whether any of a step's rollouts came out right."""
        return [[share > 0 for share in shares] for shares in self.shares]


@torch.no_grad()
def step_labels(
    lm: LatentLM,
    judge: Correctness,
    labelled: Sequence[Labelled],
    *,
    rollouts: int = 8,
    seed: int = 0,
    batch_size: int = 64,
) -> StepLabels:
    """Sample on from the end of every step of every answer, and see what share comes out right.

    Answers to a question that begin alike share their rollouts. Raises ValueError for a model that thinks or pauses
    between question and words, since there is then no going on from within its words.
    """
    reasoning = lm.reasoning
    if reasoning.slot is not Slot.nothing or reasoning.modes:
        raise ValueError(
            f"{reasoning.method} does not write its steps in words alone, so that none can be gone on from."
        )
    special = lm.special
    ends: list[list[tuple[int, ...]]] = []  # of each answer, what stands before the end of each step
    for row in labelled:
        for sample in row.samples:
            said = sample.said
            parts = parts_said(lm, said)
            cuts = [len(parts) - parts[::-1].index(step) for step in range(step_count(sample.text, reasoning.format))]
            ends.append([tuple(said[:cut]) for cut in cuts])
    answers = [(n, row) for n, row in enumerate(labelled) for _ in row.samples]
    wanted = sorted({(n, prefix) for (n, _), prefixes in zip(answers, ends, strict=True) for prefix in prefixes})
    questions = {n: row.samples[0].layout.ids[: row.samples[0].layout.num_prompt].tolist() for n, row in answers}
    prompts = [[*questions[n], *prefix] for n, prefix in wanted]
    shares: dict[tuple[int, tuple[int, ...]], float] = {}
    tokens = sum(map(len, prompts))
    with seeded(seed, lm.device):
        for places in longest_first(prompts, batch_size):
            ids, mask = pad_rows([prompts[place] for place in places], special.pad)
            out = lm.generate(ids, mask, do_sample=True, num_return_sequences=rollouts)
            tokens += int(out.lengths.sum())
            for row, place in enumerate(places):
                n, prefix = wanted[place]
                said = [out.said(i) for i in range(row * rollouts, (row + 1) * rollouts)]
                whole = [[*prefix, *(token for token in its if token != special.eos)] for its in said]
                texts = [lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in whole]
                shares[n, prefix] = float(np.mean([judge.right(labelled[n].example, str(text)) for text in texts]))
    found = [[shares[n, prefix] for prefix in prefixes] for (n, _), prefixes in zip(answers, ends, strict=True)]
    return StepLabels(found, len(wanted) * rollouts, tokens)
