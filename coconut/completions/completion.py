"""One sampled answer: what was sampled, what was forced, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from coconut.data.sequences import Layout, slot_ids
from coconut.generation.generate import Generated, forward_passes
from coconut.methods import Slot

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class Cost:
    """What an answer took. `passes`: forward passes one after the other, for prefix, thoughts and tokens."""

    passes: int
    num_thoughts: int
    new_tokens: int


@dataclass(frozen=True)
class Completion:
    """One answer: which of its tokens were sampled (`layout`: its targets), and how likely they were.

    Forced are the question, a control token that was not the model's choice, markers, thoughts and pauses.
    `log_probs` (its sampled tokens,), in float32: at the temperature, among the tokens that may stand there.
    """

    layout: Layout
    log_probs: Tensor
    text: str
    mode: str
    new_tokens: int
    num_thoughts: int
    truncated: bool

    @property
    def is_control(self) -> Tensor:
        """(its sampled tokens,)"""
        return torch.arange(len(self.log_probs)) < int(self.layout.control >= 0)

    @property
    def passes(self) -> int:
        """Of a forward pass over the whole answer."""
        return self.num_thoughts + 1

    @property
    def cost(self) -> Cost:
        """What it took to say it."""
        passes = forward_passes(self.new_tokens, self.truncated, self.num_thoughts, self.mode)
        return Cost(passes, self.num_thoughts, self.new_tokens)

    @property
    def completion_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.layout.ids[self.layout.num_prompt :].tolist()

    def with_completion_ids(self, said: Sequence[int]) -> Completion:
        """The same question, mode and thoughts with another answer, of which nobody knows how likely it is."""
        ids = np.array([*self.layout.ids[: self.layout.num_prompt], *said], np.int32)
        return replace(
            self, layout=replace(self.layout, ids=ids, control=-1), log_probs=torch.zeros(len(said)), text=""
        )

    def without_targets(self) -> Completion:
        """The same row with nothing in it that counts, for a process that has no other while others compute."""
        layout = replace(self.layout, num_prompt=len(self.layout.ids), control=-1)
        return replace(self, layout=layout, log_probs=self.log_probs[:0])


def passes_and_length(samples: Sequence[Completion]) -> tuple[int, int]:
    """Of a forward pass over these answers: how many passes it takes, and how many tokens the longest has."""
    return max(sample.passes for sample in samples), max(len(sample.layout.ids) for sample in samples)


def shard_by_length(
    needed: Sequence[tuple[int, int]], size: int, rank: int = 0, ranks: int = 1
) -> list[tuple[list[int], int]]:
    """The places of the answers, or pairs of them, that one process of `ranks` takes at a time, at most `size` of them,
    and the passes.

    `needed`: of each, see `needs`. Those of like lengths go together, and all processes take equally many passes. A
    process for which none is left takes place -1.
    """
    order = sorted(range(len(needed)), key=lambda i: needed[i])
    parts = [order[first : first + size * ranks] for first in range(0, len(order), size * ranks)]
    return [(part[rank::ranks] or [-1], max(needed[i][0] for i in part)) for part in parts]


def completions_of(lm: LatentLM, question: Sequence[int], out: Generated, rows: Sequence[int]) -> list[Completion]:
    """The answers in these rows, to one question (its token ids), of `lm.generate(log_probs=True)`."""
    assert out.log_probs is not None
    return [_sample(lm, question, out, row, out.log_probs[row]) for row in rows]


def _sample(lm: LatentLM, question: Sequence[int], out: Generated, row: int, log_probs: Tensor) -> Completion:
    mode, count = out.modes[row], int(out.num_thoughts[row])
    chosen = out.mode_log_probs[row] if mode else None
    how_likely = [log_probs] if chosen is None else [torch.tensor([chosen]), log_probs]
    return Completion(
        layout=_layout(lm, question, mode, count, out.completion_ids(row), sampled=chosen is not None),
        log_probs=torch.cat(how_likely),
        text=out.texts[row],
        mode=mode,
        new_tokens=int(out.lengths[row]),
        num_thoughts=count,
        truncated=bool(out.truncated[row]),
    )


def _layout(lm: LatentLM, question: Sequence[int], mode: str, count: int, said: Sequence[int], sampled: bool) -> Layout:
    reasoning = lm.reasoning.in_mode(mode) if mode else lm.reasoning
    control = [lm.special.control[mode]] if mode else []
    in_slot = count if reasoning.slot is Slot.thought else count or reasoning.num_thoughts  # no pause is a thought
    before = [*question, *control, *slot_ids(reasoning, lm.special, in_slot).tolist()]
    return Layout(
        ids=np.array([*before, *said], np.int32),
        num_prompt=len(before),
        slot_start=len(question) + len(control) + reasoning.markers,
        control=len(question) if sampled else -1,
    )


def question_of(lm: LatentLM, sample: Completion) -> list[int]:
    """The question's tokens, without control token and slot."""
    reasoning = lm.reasoning.in_mode(sample.mode) if sample.mode else lm.reasoning
    return sample.layout.ids[: sample.layout.slot_start - reasoning.markers - bool(sample.mode)].tolist()


def completion_from_ids(
    lm: LatentLM,
    question: Sequence[int],
    said: Sequence[int],
    *,
    text: str,
    mode: str = "",
    num_thoughts: int | None = None,
) -> Completion:
    """An answer that was given before, of which nobody knows how likely it was: its log-probabilities are zeros."""
    reasoning = lm.reasoning.in_mode(mode) if mode else lm.reasoning
    count = reasoning.num_thoughts if num_thoughts is None else num_thoughts
    ended = bool(said) and said[-1] == lm.special.eos
    layout = _layout(lm, question, mode, count, said, sampled=False)
    return Completion(layout, torch.zeros(len(said)), text, mode, len(said) - ended, count, truncated=not ended)


def longest_completions(lm: LatentLM, question: Sequence[int], limit: int) -> list[Completion]:
    """In each mode an answer to this question that is cut off after so many tokens, all alike."""
    found = []
    for mode in lm.reasoning.modes or ("",):
        count = (lm.reasoning.in_mode(mode) if mode else lm.reasoning).num_thoughts
        said = _layout(lm, question, mode, count, [lm.special.eos] * limit, sampled=bool(mode))
        likely = torch.zeros(limit + bool(mode))
        found.append(Completion(said, likely, "", mode, limit, count, truncated=True))
    return found


def refuse_too_long(lm: LatentLM, lengths: Sequence[int]) -> None:
    """Raise ValueError if an answer, with its question so many tokens long, is longer than the model's context."""
    if too_long := [i for i, length in enumerate(lengths) if length > lm.max_sequence_length]:
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} answers are, with their questions, longer than the model's context of "
            f"{lm.max_sequence_length} tokens: {list_lengths('answer', too_long, lengths)}. Leave them out."
        )


def list_lengths(what: str, places: Sequence[int], lengths: Sequence[int]) -> str:
    """The first of them by their numbers, with their lengths."""
    shown = ", ".join(f"{what} {i + 1} ({lengths[i]} tokens)" for i in places[:5])
    return shown + (f" and {len(places) - 5} more" if len(places) > 5 else "")
