"""One completion: its tokens, their log-probabilities, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from coconut.completions.noisy_thoughts import NoisyThoughts
from coconut.data.sequences import Layout, slot_with_markers
from coconut.generation.generate import Generated, forward_passes
from coconut.methods import Slot
from coconut.utils.console import list_lengths

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class Cost:
    """The compute of one completion. `passes`: sequential forward passes for the prompt, thoughts and tokens."""

    passes: int
    num_thoughts: int
    new_tokens: int


@dataclass(frozen=True)
class Completion:
    """A completion with its prompt, and the log-probabilities of its sampled tokens.

    layout: prompt and completion. Its targets are the sampled tokens: the completion and, if the model chose its mode,
        the control token. Not sampled are the question, a forced control token, markers, thoughts and pauses.
    log_probs: (sampled tokens,), float32, under the sampling distribution: at the temperature, among the tokens that
        are allowed at the position. Zeros if they are unknown. Noisy thoughts are sampled, too, and come first: the
        log of the ratio of each one's density to that at sampling, so 0.
    new_tokens: without the end of the sequence.
    truncated: the token limit was reached before the end of the sequence.
    noisy: its thoughts, if they were drawn with noise.
    expected: (G, D) what the gates of a model mixed into the first G tokens of the completion when they were fed, as
        constants; None for a model without gates.
    """

    layout: Layout
    log_probs: Tensor
    text: str
    mode: str
    new_tokens: int
    slot: Slot
    num_thoughts: int
    truncated: bool
    noisy: NoisyThoughts | None = None
    expected: Tensor | None = None

    @property
    def is_control(self) -> Tensor:
        """(sampled tokens,) true for a sampled control token, which comes first."""
        return torch.arange(len(self.log_probs)) < int(self.layout.control >= 0)

    @property
    def passes(self) -> int:
        """Sequential passes of a teacher-forced forward, which feeds noisy thoughts as they were drawn."""
        return 1 if self.noisy else self.slot.passes(self.num_thoughts)

    @property
    def num_noisy(self) -> int:
        """How many of the `log_probs` are of noisy thoughts."""
        return len(self.noisy.fed) if self.noisy and len(self.log_probs) else 0

    @property
    def cost(self) -> Cost:
        """What generating it took."""
        passes = forward_passes(self.new_tokens, self.truncated, self.slot, self.num_thoughts, self.mode)
        return Cost(passes, self.num_thoughts, self.new_tokens)

    @property
    def completion_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.layout.ids[self.layout.num_prompt :].tolist()

    def with_completion_ids(self, completion_ids: Sequence[int]) -> Completion:
        """The same prompt with other tokens after it, fed as they are; `log_probs` are zeros, `text` is empty."""
        ids = np.array([*self.layout.ids[: self.layout.num_prompt], *completion_ids], np.int32)
        layout = replace(self.layout, ids=ids, control=-1)
        return replace(
            self, layout=layout, log_probs=torch.zeros(self.num_noisy + len(completion_ids)), text="", expected=None
        )

    def with_noisy_thoughts(self, noisy: NoisyThoughts) -> Completion:
        """The same completion after these thoughts, which were drawn."""
        return replace(self, noisy=noisy, log_probs=torch.cat([torch.zeros(len(noisy.fed)), self.log_probs]))

    def without_targets(self) -> Completion:
        """The same row without targets: a placeholder for a rank that has no row left in a collective forward pass."""
        layout = replace(self.layout, num_prompt=len(self.layout.ids), control=-1)
        expected = None if self.expected is None else self.expected[:0]
        return replace(self, layout=layout, log_probs=self.log_probs[:0], expected=expected)


def passes_and_length(completions: Sequence[Completion]) -> tuple[int, int]:
    """The sequential passes that a batch of these completions takes, and the tokens of the longest with its prompt."""
    longest = max(len(completion.layout.ids) for completion in completions)
    return max(completion.passes for completion in completions), longest


def shard_by_length(
    sizes: Sequence[tuple[int, int]], size: int, rank: int = 0, ranks: int = 1
) -> list[tuple[list[int], int]]:
    """Divide items (completions, or pairs of them) of similar length into micro-batches of one rank of `ranks`.

    sizes: `passes_and_length` of each item. size: the most items in a micro-batch.
    Returns, for each micro-batch, the indices of its items and the number of passes. All ranks get as many
    micro-batches, with as many passes in each; a rank without an item left gets the index -1.
    """
    by_length = sorted(range(len(sizes)), key=lambda i: sizes[i])
    parts = [by_length[first : first + size * ranks] for first in range(0, len(by_length), size * ranks)]
    return [(part[rank::ranks] or [-1], max(sizes[i][0] for i in part)) for part in parts]


def completions_of(lm: LatentLM, question: Sequence[int], out: Generated, rows: Sequence[int]) -> list[Completion]:
    """The completions of one question (its token ids) in these rows of the output of `lm.generate(log_probs=True)`."""
    assert out.log_probs is not None
    completions = []
    for row in rows:
        mode, count, mode_log_prob = out.modes[row], int(out.num_thoughts[row]), out.mode_log_probs[row]
        control = [] if mode_log_prob is None else [mode_log_prob]
        layout = _layout(lm, question, mode, count, out.completion_ids(row), control_sampled=bool(control))
        log_probs = torch.cat([torch.tensor(control), out.log_probs[row]])
        new_tokens, truncated = int(out.lengths[row]), bool(out.truncated[row])
        slot = lm.reasoning.in_mode(mode).slot
        expected = None if out.expected is None else out.expected[row]
        completion = Completion(
            layout, log_probs, out.texts[row], mode, new_tokens, slot, count, truncated, expected=expected
        )
        if out.thought_means is not None:
            noisy = NoisyThoughts(out.thoughts[row, :count], out.thought_means[row, :count])
            completion = completion.with_noisy_thoughts(noisy)
        completions.append(completion)
    return completions


def _layout(
    lm: LatentLM, question: Sequence[int], mode: str, count: int, completion_ids: Sequence[int], control_sampled: bool
) -> Layout:
    reasoning = lm.reasoning.in_mode(mode)
    control = [lm.special.control[mode]] if mode else []
    # `Generated.num_thoughts` is 0 for pauses, whose number is fixed
    in_slot = count if reasoning.slot.thinks else count or reasoning.num_thoughts
    prompt = [*question, *control, *slot_with_markers(reasoning, lm.special, in_slot).tolist()]
    return Layout(
        ids=np.array([*prompt, *completion_ids], np.int32),
        num_prompt=len(prompt),
        slot_start=len(question) + len(control) + reasoning.markers,
        control=len(question) if control_sampled else -1,
    )


def question_of(lm: LatentLM, completion: Completion) -> list[int]:
    """The question's token ids, without control token and slot."""
    reasoning = lm.reasoning.in_mode(completion.mode)
    return completion.layout.ids[: completion.layout.slot_start - reasoning.markers - bool(completion.mode)].tolist()


def completion_from_ids(
    lm: LatentLM, question: Sequence[int], completion_ids: Sequence[int], *,
    text: str, mode: str = "", num_thoughts: int | None = None,
) -> Completion:  # fmt: skip
    """A completion from given token ids. Its log-probabilities are unknown, and set to zero.

    `num_thoughts`: by default those of the model. Without the end of the sequence it counts as truncated.
    Raises ValueError for a model that ends its thoughts itself if their number is not given.
    """
    reasoning = lm.reasoning.in_mode(mode)
    if reasoning.slot.merges and num_thoughts is None:
        raise ValueError(
            f"{reasoning.method} ends its thoughts itself, so that each answer needs the number of its thoughts: "
            "num_thoughts."
        )
    count = reasoning.num_thoughts if num_thoughts is None else num_thoughts
    has_eos = bool(completion_ids) and completion_ids[-1] == lm.special.eos
    layout = _layout(lm, question, mode, count, completion_ids, control_sampled=False)
    log_probs, new_tokens = torch.zeros(len(completion_ids)), len(completion_ids) - has_eos
    return Completion(layout, log_probs, text, mode, new_tokens, reasoning.slot, count, truncated=not has_eos)


def largest_completion(lm: LatentLM, question: Sequence[int], limit: int) -> Completion:
    """The largest completion in any mode that generation can give: `limit` tokens, truncated."""
    completions = []
    for mode in lm.reasoning.modes or ("",):
        reasoning = lm.reasoning.in_mode(mode)
        slot, count = reasoning.slot, reasoning.num_thoughts
        layout = _layout(lm, question, mode, count, [lm.special.eos] * limit, control_sampled=bool(mode))
        log_probs = torch.zeros(limit + bool(mode))
        expected = torch.ones(limit, lm.thought_size) if lm.gates else None
        completions.append(Completion(layout, log_probs, "", mode, limit, slot, count, True, expected=expected))
    return max(completions, key=lambda completion: (len(completion.layout.ids), completion.passes))


def refuse_too_long(lm: LatentLM, lengths: Sequence[int]) -> None:
    """Raise ValueError if a completion is too long for the model; `lengths` are in tokens, with the prompt."""
    if too_long := [i for i, length in enumerate(lengths) if length > lm.max_sequence_length]:
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} completions are, with their prompts, longer than the model's context "
            f"of {lm.max_sequence_length} tokens: {list_lengths('completion', too_long, lengths)}. Leave them out."
        )
