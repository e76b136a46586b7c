"""From an example and a stage to token ids, and from token ids to batches.

`layout` is the one place that says what a training sequence looks like:

    question [control] [<bot>] slot [<eot>] rest of the chain, answer, <eos>

with the loss on what follows the slot, and on the control token of a hybrid model. Everything random here is a function
of (seed, epoch, index).

Shapes: N examples of a data set; B rows of a batch, T columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from coconut.data import SpecialIds, TokenizedData
from coconut.methods import Mixing, Plan, Reasoning, Slot, Stage

IGNORED = -100  # the label of a position that is no target, as in torch's cross_entropy
BUCKET = 64  # batches that are sorted by length together
ALIKE = 4  # batches of that order that are sorted by prefix together

_MIXING, _OFFSET, _ORDER = 1, 2, 3  # what a random number is for


@dataclass(frozen=True)
class Layout:
    """One training sequence: `ids[num_prompt:]` are the targets, `ids[anchor]` is the first of the slot.

    `control`: where the control token stands, a target too; -1 if there is none.
    """

    ids: np.ndarray
    num_prompt: int
    anchor: int
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
    slot = slot_ids(stage, special, stage.num_thoughts if num_thoughts is None else num_thoughts)
    control = [special.control[stage.mode]] if stage.mode else []
    before = np.concatenate([question, np.array(control, np.int32), slot])
    return Layout(
        ids=np.concatenate([before, chain, answer]),
        num_prompt=len(before),
        anchor=len(question) + len(control) + stage.markers,
        control=len(question) if control else -1,
    )


def slot_ids(form: Stage | Reasoning, special: SpecialIds, num_thoughts: int) -> np.ndarray:
    """What stands between question and chain: the markers and the slot's tokens."""
    fill = {Slot.nothing: [], Slot.pause: [special.pause], Slot.thought: [special.latent]}[form.slot] * num_thoughts
    return np.array([special.bot, *fill, special.eot] if form.markers else fill, np.int32)


def thoughts_for(stage: Stage, plan: Plan, num_steps: np.ndarray | int) -> np.ndarray:
    """How many thoughts examples with so many steps get: all of the stage's, or as many as they have steps for."""
    if plan.pad_thoughts:
        return np.full_like(num_steps, stage.num_thoughts)
    return np.minimum(stage.num_thoughts, plan.thoughts_per_step * np.asarray(num_steps))


def written_lengths(
    data: TokenizedData, steps_cut: np.ndarray | int | None, tokens_cut: np.ndarray | int | None
) -> np.ndarray:
    """(N,) tokens that follow the slot: what the cut leaves of the chain, and the answer with its end."""
    every = np.iinfo(np.int64).max
    steps_cut, tokens_cut = (every if cut is None else cut for cut in (steps_cut, tokens_cut))
    answer_starts = data.bounds[data.first[1:] - 2]
    chain_starts = data.bounds[data.first[:-1] + np.minimum(steps_cut, data.num_steps)]
    return np.maximum(answer_starts - chain_starts - tokens_cut, 0) + data.starts[1:] - answer_starts


class EpochView:
    """A data set as one epoch of one stage sees it.

    `lengths` (N,) counts the tokens of each sequence, without building it, `passes` (N,) the forward
    passes that its thoughts need, and `modes` (N,) says in which of the stage's modes it is, 0 where there are none;
    `layout(i)` builds one.
    """

    def __init__(self, data: TokenizedData, plan: Plan, stage: Stage, special: SpecialIds, seed: int, epoch: int):
        self.data, self.special = data, special
        forms = list(stage.modes) or [stage, *plan.depths]
        which = np.zeros(len(data), np.int64)
        if stage.modes:  # all of them in turn, as many of each in every epoch
            which = (np.arange(len(data)) + epoch) % len(forms)
        elif plan.mixing_probability > 0:
            chance, depth = _uniform(seed, epoch, _MIXING, (2, len(data)))
            highest = np.full(len(data), stage.index) if plan.mixing is Mixing.current else data.num_steps
            drawn = np.minimum((depth * (highest + 1)).astype(np.int64), len(plan.depths) - 1)
            which = np.where(chance < plan.mixing_probability, 1 + drawn, 0)
        self.forms = [forms[k] for k in which]
        self.modes = which if stage.modes else np.zeros_like(which)

        thoughts = np.stack([thoughts_for(form, plan, data.num_steps) for form in forms])
        self.num_thoughts = thoughts[which, np.arange(len(data))]
        latent = np.array([form.slot is Slot.thought for form in forms])[which]
        self.passes = np.where(latent, self.num_thoughts, 0) + 1
        markers = np.array([2 * form.markers for form in forms])[which]
        controls = np.array([bool(form.mode) for form in forms], np.int64)[which]
        every = np.iinfo(np.int64).max
        steps_cut = np.array([every if form.steps_cut is None else form.steps_cut for form in forms])[which]
        self.tokens_cut = np.array([every if form.tokens_cut is None else form.tokens_cut for form in forms])[which]
        if stage.smoothed:
            self.tokens_cut = self.tokens_cut + _icot_offsets(seed, epoch, len(data))

        self.anchors = data.question_lengths + controls + markers // 2
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


def forms_of(plan: Plan) -> list[Stage]:
    """Every form that an epoch may give an example, as a stage that has this one alone; iCoT's without an offset."""
    mixed = plan.depths if plan.mixing_probability else ()
    plain = (replace(form, smoothed=False) for stage in plan.stages for form in stage.modes or (stage,))
    return [*mixed, *plain]


def _uniform(seed: int, epoch: int, purpose: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, epoch, purpose]).random(shape)


def _icot_offsets(seed: int, epoch: int, count: int) -> np.ndarray:
    """o with probability proportional to exp(-4 o) (Deng et al., arXiv 2405.14838, removal smoothing)."""
    return np.floor(-np.log1p(-_uniform(seed, epoch, _OFFSET, (count,))) / 4).astype(np.int64)


def epoch_batches(view: EpochView, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices of each update of an epoch: every example once, in batches of like lengths, in random order.

    Of a hybrid model's modes a batch has what a random draw gives it. Whatever goes with length (the number of steps,
    the depth of a mixed row) is more alike within a batch than in a random one.

    The last batch may be smaller. A function of its arguments alone, so a resumed run takes up its place.
    """
    random = np.random.default_rng([seed, epoch, _ORDER])
    order = random.permutation(len(view))
    span = batch_size * BUCKET
    chunks = np.split(order, range(span, len(order), span))
    order = np.concatenate([_like_together(view, chunk, ALIKE * batch_size) for chunk in chunks])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[k] for k in random.permutation(len(batches))]


def _like_together(view: EpochView, rows: np.ndarray, group: int) -> np.ndarray:
    """Sort rows by length; where there are thoughts, by what stands before them in each `group` rows of that order.

    A row changes places with rows of its own mode alone, so that the modes stay where they were drawn.
    """
    order = np.empty_like(rows)
    for mode in np.unique(view.modes[rows]):
        places = np.flatnonzero(view.modes[rows] == mode)
        own = rows[places]
        own = own[np.argsort(view.lengths[own], kind="stable")]
        if view.passes.max() > 1:
            own = own[np.lexsort((view.anchors[own], places // group))]
        order[places] = own
    return order


@dataclass
class Batch:
    """Token ids, mask and labels, each (B, T); labels are IGNORED where there is no target.

    `passes`: how many forward passes it is to take at least, so that several processes keep step.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    passes: int = 1

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        ids, mask, labels = (
            t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.labels)
        )
        return Batch(ids, mask, labels, self.passes)


def collate(layouts: Sequence[Layout], special: SpecialIds) -> Batch:
    """Rows of one batch, with the first thoughts in one column where there are any."""
    shifts = [item.anchor if special.latent in item.ids else 0 for item in layouts]
    left = [max(shifts) - shift if shift else 0 for shift in shifts]
    width = max(pad + len(item.ids) for pad, item in zip(left, layouts, strict=True))
    ids = np.full((len(layouts), width), special.pad, np.int64)
    mask = np.zeros((len(layouts), width), np.int64)
    labels = np.full((len(layouts), width), IGNORED, np.int64)
    for row, (pad, item) in enumerate(zip(left, layouts, strict=True)):
        end = pad + len(item.ids)
        ids[row, pad:end] = item.ids
        mask[row, pad:end] = 1
        labels[row, pad + item.num_prompt : end] = item.ids[item.num_prompt :]
        if item.control >= 0:
            labels[row, pad + item.control] = item.ids[item.control]
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))


def micro_batches(view: EpochView, batch: np.ndarray, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """What one process of `ranks` does of an update, in parts of at most `size` rows of one mode.

    All processes get equally many parts, with equally many passes each; one for which no row is left gets
    a row without targets.
    """
    for mode in np.unique(view.modes[batch]):
        rows = batch[view.modes[batch] == mode]
        shares = [rows[other::ranks] for other in range(ranks)]
        for start in range(0, len(shares[0]), size):
            parts = [share[start : start + size] for share in shares]
            yield _one_of(view, parts, rank)


def _one_of(view: EpochView, parts: list[np.ndarray], rank: int) -> Batch:
    """The part of one process among those that are carried out at the same time."""
    rows = parts[rank] if len(parts[rank]) else parts[0][:1]
    made = collate([view.layout(i) for i in rows], view.special)
    if not len(parts[rank]):
        made.labels.fill_(IGNORED)
    made.passes = max(int(view.passes[part].max()) for part in parts if len(part))
    return made


def fit_context(
    view_of: Callable[[TokenizedData], Sequence[EpochView]], data: TokenizedData, context: int, skip: bool, name: str
) -> tuple[TokenizedData, np.ndarray]:
    """The examples that fit into the model's context in each of these views, and their indices.

    Raises ValueError that names the longest examples that do not, unless `skip`.
    """
    longest = np.max([view.lengths for view in view_of(data)], axis=0)
    too_long = np.flatnonzero(longest > context)
    if not len(too_long):
        return data, np.arange(len(data))
    if not skip:
        shown = ", ".join(f"example {i + 1} ({longest[i]} tokens)" for i in too_long[:5])
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        raise ValueError(
            f"{name}: {len(too_long)} of {len(data)} examples are longer than the model's context of {context} "
            f"tokens: {shown}{more}. Take a model with a longer context, or leave them out with data.too_long=skip."
        )
    kept = np.flatnonzero(longest <= context)
    if not len(kept):
        raise ValueError(f"{name}: no example fits into the model's context of {context} tokens.")
    return data.select(kept), kept
