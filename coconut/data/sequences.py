"""Training sequences: the token ids of an example at a stage.

`layout` alone defines what a training sequence looks like:

    question [control] [<bot>] slot [<eot>] rest of the chain, answer, <eos>

with the loss on what follows the slot, and on the control token of a hybrid model. All randomness is a function of
(seed, epoch, index).

Shapes: N examples of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coconut.data.tokenization import SpecialIds, TokenizedData
from coconut.methods import Mixing, Plan, Reasoning, Slot, Stage
from coconut.utils.console import list_lengths

MIXING, ICOT_OFFSET, ORDER = 1, 2, 3  # purposes of random numbers: the last part of a generator's key


@dataclass(frozen=True)
class Layout:
    """One training sequence: `ids[num_prompt:]` are the targets, `ids[slot_start]` is the first token of the slot.

    `control`: the index of the control token, which is a target too; -1 if there is none.
    """

    ids: np.ndarray
    num_prompt: int
    slot_start: int
    control: int = -1


def layout(
    segments: Sequence[Sequence[int] | np.ndarray],
    stage: Stage,
    special: SpecialIds,
    *,
    num_thoughts: int | None = None,
    tokens_cut: int | None = None,
) -> Layout:
    """The sequence of one example at one stage.

    `segments`: the token ids of the question, of each step, and of the answer with its end-of-sequence
    token. `num_thoughts` and `tokens_cut` override the stage's (short chains, iCoT's offset).
    """
    question, *steps, answer = (np.asarray(segment, np.int32) for segment in segments)
    kept = [] if stage.steps_cut is None else steps[stage.steps_cut :]
    chain = np.concatenate(kept) if kept else np.zeros(0, np.int32)
    cut = stage.tokens_cut if tokens_cut is None else tokens_cut
    chain = chain[len(chain) if cut is None else cut :]
    slot = slot_with_markers(stage, special, stage.num_thoughts if num_thoughts is None else num_thoughts)
    control = [special.control[stage.mode]] if stage.mode else []
    before = np.concatenate([question, np.array(control, np.int32), slot])
    return Layout(
        ids=np.concatenate([before, chain, answer]),
        num_prompt=len(before),
        slot_start=len(question) + len(control) + stage.markers,
        control=len(question) if control else -1,
    )


def slot_with_markers(form: Stage | Reasoning, special: SpecialIds, num_thoughts: int) -> np.ndarray:
    """The token ids between question and chain: the markers and the slot."""
    fill = {Slot.none: [], Slot.pause: [special.pause], Slot.thought: [special.latent]}[form.slot] * num_thoughts
    return np.array([special.bot, *fill, special.eot] if form.markers else fill, np.int32)


def thoughts_for(stage: Stage, plan: Plan, num_steps: np.ndarray | int) -> np.ndarray:
    """The number of thoughts of examples with `num_steps` steps: the stage's, or without padding at most their own."""
    if plan.pad_thoughts:
        return np.full_like(num_steps, stage.num_thoughts)
    return np.minimum(stage.num_thoughts, plan.thoughts_per_step * np.asarray(num_steps))


def written_lengths(
    data: TokenizedData, steps_cut: np.ndarray | int | None, tokens_cut: np.ndarray | int | None
) -> np.ndarray:
    """(N,) number of tokens after the slot: the rest of the chain, and the answer with its end-of-sequence token."""
    everything = np.iinfo(np.int64).max
    steps_cut, tokens_cut = (everything if cut is None else cut for cut in (steps_cut, tokens_cut))
    answer_starts = data.bounds[data.first[1:] - 2]
    chain_starts = data.bounds[data.first[:-1] + np.minimum(steps_cut, data.num_steps)]
    return np.maximum(answer_starts - chain_starts - tokens_cut, 0) + data.starts[1:] - answer_starts


class EpochView:
    """The sequences of a data set in one epoch of one stage; `layout(i)` builds one of them.

    Known without building them: `lengths` (N,), the tokens of each sequence; `passes` (N,), the forward passes that
    its thoughts need; `modes` (N,), the index of its mode among the stage's, 0 without modes.
    """

    def __init__(self, data: TokenizedData, plan: Plan, stage: Stage, special: SpecialIds, seed: int, epoch: int):
        self.data, self.special = data, special
        forms = list(stage.modes) or [stage, *plan.mixing_stages]
        which = np.zeros(len(data), np.int64)
        if stage.modes:  # each example cycles through them; every epoch has equally many of each
            which = (np.arange(len(data)) + epoch) % len(forms)
        elif plan.mixing_probability > 0:
            chance, depth = _uniform(seed, epoch, MIXING, (2, len(data)))
            highest = np.full(len(data), stage.index) if plan.mixing is Mixing.current else data.num_steps
            drawn = np.minimum((depth * (highest + 1)).astype(np.int64), len(plan.mixing_stages) - 1)
            which = np.where(chance < plan.mixing_probability, 1 + drawn, 0)
        self.forms = [forms[k] for k in which]
        self.modes = which if stage.modes else np.zeros_like(which)

        thoughts = np.stack([thoughts_for(form, plan, data.num_steps) for form in forms])
        self.num_thoughts = thoughts[which, np.arange(len(data))]
        latent = np.array([form.slot is Slot.thought for form in forms])[which]
        self.passes = np.where(latent, self.num_thoughts, 0) + 1
        markers = np.array([2 * form.markers for form in forms])[which]
        controls = np.array([bool(form.mode) for form in forms], np.int64)[which]
        everything = np.iinfo(np.int64).max
        steps_cut = np.array([everything if form.steps_cut is None else form.steps_cut for form in forms])[which]
        self.tokens_cut = np.array([everything if form.tokens_cut is None else form.tokens_cut for form in forms])[
            which
        ]
        if stage.smoothed:
            self.tokens_cut = self.tokens_cut + _icot_offsets(seed, epoch, len(data))

        self.slot_starts = data.question_lengths + controls + markers // 2
        written = written_lengths(data, steps_cut, self.tokens_cut)
        self.lengths = data.question_lengths + controls + markers + self.num_thoughts + written

    def __len__(self) -> int:
        return len(self.data)

    def layout(self, index: int) -> Layout:
        first, last = self.data.first[index], self.data.first[index + 1]
        example = self.data.tokens[self.data.starts[index] : self.data.starts[index + 1]]
        segments = np.split(example, self.data.bounds[first : last - 1] - self.data.starts[index])
        return layout(
            segments,
            self.forms[index],
            self.special,
            num_thoughts=int(self.num_thoughts[index]),
            tokens_cut=int(self.tokens_cut[index]),
        )


def stage_variants(plan: Plan) -> list[Stage]:
    """Every layout that an example may get in any epoch, each as a stage of its own; iCoT's without an offset."""
    mixed = plan.mixing_stages if plan.mixing_probability else ()
    plain = (replace(form, smoothed=False) for stage in plan.stages for form in stage.modes or (stage,))
    return [*mixed, *plain]


def _uniform(seed: int, epoch: int, purpose: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, epoch, purpose]).random(shape)


def _icot_offsets(seed: int, epoch: int, count: int) -> np.ndarray:
    """Draw offsets o with probability proportional to exp(-4 o) (removal smoothing, Deng et al., arXiv 2405.14838)."""
    return np.floor(-np.log1p(-_uniform(seed, epoch, ICOT_OFFSET, (count,))) / 4).astype(np.int64)


def fit_context(
    view_of: Callable[[TokenizedData], Sequence[EpochView]], data: TokenizedData, context: int, skip: bool, name: str
) -> tuple[TokenizedData, np.ndarray]:
    """The examples that fit into the model's context in all views, and their indices.

    Unless `skip`, raises ValueError with the first examples that do not fit.
    """
    longest = np.max([view.lengths for view in view_of(data)], axis=0)
    too_long = np.flatnonzero(longest > context)
    if not len(too_long):
        return data, np.arange(len(data))
    if not skip:
        shown = list_lengths("example", too_long.tolist(), longest.tolist())
        raise ValueError(
            f"{name}: {len(too_long)} of {len(data)} examples are longer than the model's context of {context} "
            f"tokens: {shown}. Take a model with a longer context, or leave them out with data.too_long=skip."
        )
    kept = np.flatnonzero(longest <= context)
    if not len(kept):
        raise ValueError(f"{name}: no example fits into the model's context of {context} tokens.")
    return data.select(kept), kept
