"""Training sequences: the token ids of an example at a stage.

`layout` alone defines what a training sequence looks like:

    question [control] [<bot>] slot [<eot>] rest of the chain, answer, <eos>

with the loss on what follows the slot, and on the control token of a hybrid model. All randomness is a function of
(seed, epoch, index).

Shapes: N examples of a data set, F forms that stand together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from coconut.data.tokenization import SpecialIds, TokenizedData
from coconut.methods import Compression, Form, Mixing, Plan, Reasoning, Source, Spans, Stage
from coconut.utils.console import list_lengths

# purposes of random numbers: part of a generator's key
MIXING, ICOT_OFFSET, ORDER, SPANS, COMPRESSION, GROUP, DRAWN_TOKENS = 1, 2, 3, 4, 5, 6, 7
EVERYTHING = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Layout:
    """One training sequence: `ids[num_prompt:]` are the targets, `ids[slot_start]` is the first token of the slot.

    `answer_prompt`: the index of the last token before the answer itself, -1 if the answer has no tokens before it.
    `spans`: the parts of the chain that the thoughts stand for, each as its token ids, empty where the chain is too
    short: one for each thought, or for each `thoughts_per_step` thoughts with `Spans.steps`. `chain`: the indices of
    the written chain's tokens.
    `control`: the index of the control token, which is a target too; -1 if there is none.
    `thought_end`: the index of the `<eot>` with which the model ends its thoughts, the last of `spans` then; -1 if
    their number is given. `drawn`: a token of each span, drawn for each example and epoch.
    """

    ids: np.ndarray
    num_prompt: int
    slot_start: int
    answer_prompt: int = -1
    spans: tuple[np.ndarray, ...] = ()
    chain: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    control: int = -1
    thought_end: int = -1
    drawn: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def layout(
    segments: Sequence[Sequence[int] | np.ndarray],
    form: Form,
    special: SpecialIds,
    *,
    slot_length: int | None = None,
    tokens_cut: int | None = None,
    num_answer_mark: int = 0,
    spans: Spans | None = None,
    random: np.random.Generator | None = None,
) -> Layout:
    """The sequence of one example in one form.

    `segments`: the token ids of the question, of each step, and of the answer with its end-of-sequence
    token. `slot_length` and `tokens_cut` override the form's (short chains, iCoT's offset). `num_answer_mark`: how many
    tokens of the last segment precede the answer itself. `spans`: how `Layout.spans` is made, by `random` if it is
    drawn; None leaves it empty.
    """
    question, *steps, answer = (np.asarray(segment, np.int32) for segment in segments)
    cut = len(steps) if form.steps_cut is None else form.steps_cut
    written = steps[cut : max(len(steps) - form.last_steps_cut, 0)]
    chain = np.concatenate(written) if written else np.zeros(0, np.int32)
    tokens_cut = form.tokens_cut if tokens_cut is None else tokens_cut
    chain = chain[len(chain) if tokens_cut is None else tokens_cut :]
    slot_length = form.slot_length if slot_length is None else slot_length
    slot = slot_with_markers(form, special, slot_length)
    control = [special.control[form.mode]] if form.mode else []
    before = np.concatenate([question, np.array(control, np.int32), slot])
    parts = SPLITS[spans](form, steps[:cut], slot_length, random) if spans and form.slot.thinks else ()
    ends = form.slot.merges and bool(spans)
    return Layout(
        ids=np.concatenate([before, chain, answer]),
        num_prompt=len(before),
        slot_start=len(question) + len(control) + form.markers,
        answer_prompt=len(before) + len(chain) + num_answer_mark - 1 if num_answer_mark else -1,
        spans=_ended(parts, form.slot.group, special.eot) if ends else parts,
        chain=len(before) + np.arange(len(chain)),
        control=len(question) if control else -1,
        thought_end=len(before) - 1 if ends else -1,
        drawn=_drawn_tokens((*parts, np.array([special.eot])), random) if ends and random else np.zeros(0, np.int64),
    )


def _ended(groups: Sequence[np.ndarray], size: int, eot: int) -> tuple[np.ndarray, ...]:
    """The groups of a chain with its end: the last one if it has room, and a further one, end with `<eot>`."""
    end = np.array([eot], np.int32)
    whole = [group if len(group) == size else np.concatenate([group, end]) for group in groups]
    return *whole, end


def _drawn_tokens(groups: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """A token of each group, all equally likely."""
    places = random.integers([len(group) for group in groups])
    return np.array([group[place] for group, place in zip(groups, places, strict=True)], np.int64)


def _joined(steps: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(steps) if len(steps) else np.zeros(0, np.int32)


def _by_step(form: Form, removed: Sequence[np.ndarray], num_thoughts: int, random: Any) -> tuple[np.ndarray, ...]:
    """`Spans.steps`. Thoughts that stand for no steps in particular are taken to stand for one each."""
    groups = num_thoughts // (form.thoughts_per_step or 1)
    return tuple(_joined(removed[k : k + 1] if k + 1 < groups else removed[k:]) for k in range(groups))


def _by_token(form: Form, removed: Sequence[np.ndarray], num_thoughts: int, random: Any) -> tuple[np.ndarray, ...]:
    """`Spans.tokens`. Thoughts that stand for no steps in particular are taken to stand for the chain."""
    width = form.thoughts_per_step or num_thoughts
    whole = _by_step(form, removed, num_thoughts, random) if form.thoughts_per_step else (_joined(removed),)
    return tuple(step[place : place + 1] for step in whole for place in range(width))


def _evenly(form: Form, removed: Sequence[np.ndarray], num_thoughts: int, random: Any) -> tuple[np.ndarray, ...]:
    """`Spans.even`: the first thoughts have a token more if it does not divide."""
    return tuple(np.array_split(_joined(removed), num_thoughts)) if num_thoughts else ()


def _at_random(
    form: Form, removed: Sequence[np.ndarray], num_thoughts: int, random: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """`Spans.random`: all divisions are equally likely. With too few tokens the first thoughts have one each."""
    chain = _joined(removed)
    if len(chain) <= num_thoughts:
        return _evenly(form, removed, num_thoughts, random)
    if not num_thoughts:
        return ()
    cuts = np.sort(random.choice(len(chain) - 1, num_thoughts - 1, replace=False)) + 1
    return tuple(np.split(chain, cuts))


def _in_groups(form: Form, removed: Sequence[np.ndarray], num_thoughts: int, random: Any) -> tuple[np.ndarray, ...]:
    """`Spans.fixed`, without the end."""
    chain = _joined(removed)
    return tuple(chain[start : start + form.slot.group] for start in range(0, len(chain), form.slot.group))


SPLITS: dict[Spans, Callable[..., tuple[np.ndarray, ...]]] = {
    Spans.steps: _by_step, Spans.tokens: _by_token, Spans.even: _evenly, Spans.random: _at_random,
    Spans.fixed: _in_groups,
}  # fmt: skip


def compressed(chain: np.ndarray, count: int, rule: Compression, random: np.random.Generator) -> np.ndarray:
    """At most `count` of a chain's tokens, in order. R-KV chooses in the model, so that all stay here."""
    if rule is Compression.rkv or len(chain) <= count:
        return chain
    if rule is Compression.uniform:
        return chain[(2 * np.arange(count) + 1) * len(chain) // (2 * count)]
    return np.sort(random.choice(chain, count, replace=False))


def slot_with_markers(form: Form | Reasoning, special: SpecialIds, length: int) -> np.ndarray:
    """The token ids between question and chain: the markers and the slot. `<rate_N>` is a marker instead of `<bot>`."""
    token = {Source.none: [], Source.pause: [special.pause], Source.thought: [special.latent]}[form.slot.source]
    begin = special.rates[form.slot.group - 1] if form.slot.max_group else special.bot
    return np.array([begin, *token * length, special.eot] if form.markers else token * length, np.int32)


def slot_lengths(form: Form, pad_thoughts: bool, num_steps: np.ndarray) -> np.ndarray:
    """(N,) the slot's length in examples with `num_steps` steps: the form's, or without padding at most their own."""
    if pad_thoughts or not form.thoughts_per_step:
        return np.full_like(num_steps, form.slot_length)
    return np.minimum(form.slot_length, form.thoughts_per_step * num_steps)


def merged_lengths(data: TokenizedData, group: np.ndarray | int) -> np.ndarray:
    """(N,) the slot's length where `group` tokens of the whole chain are merged into each thought."""
    return -(-(written_lengths(data, 0, 0) - written_lengths(data, None, 0)) // group)


def written_lengths(
    data: TokenizedData,
    steps_cut: np.ndarray | int | None,
    tokens_cut: np.ndarray | int | None,
    last_steps_cut: np.ndarray | int = 0,
) -> np.ndarray:
    """(N,) number of tokens after the slot: the rest of the chain, and the answer with its end-of-sequence token."""
    steps_cut, tokens_cut = (EVERYTHING if cut is None else cut for cut in (steps_cut, tokens_cut))
    answer_starts = data.bounds[data.first[1:] - 2]
    chain_starts = data.bounds[data.first[:-1] + np.minimum(steps_cut, data.num_steps)]
    chain_ends = data.bounds[data.first[1:] - 2 - np.minimum(last_steps_cut, data.num_steps)]
    return np.maximum(chain_ends - chain_starts - tokens_cut, 0) + data.starts[1:] - answer_starts


class EpochView:
    """The sequences of a data set in one epoch of one stage; `layouts(i)` builds those of one example, form by form.

    Known without building them: `lengths` (F, N), the tokens of each sequence; `passes` (N,), the forward passes that
    an example's thoughts need; `slot_starts` (N,), where the slot of its first form begins; `modes` (N,), the index of
    its mode among the stage's, 0 without modes.
    """

    def __init__(self, data: TokenizedData, plan: Plan, stage: Stage, special: SpecialIds, seed: int, epoch: int):
        self.data, self.special, self.terms = data, special, plan.terms
        self.spans = next((term.spans for term in plan.terms if term.spans), None)
        if stage.form.slot.merges:  # the thoughts are made of them, whatever the terms
            self.spans = Spans.fixed
        self.compression = next((term.compression for term in plan.terms if term.compression), None)
        self.key = seed, epoch
        forms = list(stage.in_turn) or [stage.form, *plan.mixing_forms]
        which = np.zeros(len(data), np.int64)
        if stage.in_turn:  # each example cycles through them; every epoch has equally many of each
            which = (np.arange(len(data)) + epoch) % len(forms)
        elif plan.mixing_probability > 0:
            chance, drawn = _uniform(seed, epoch, MIXING, (2, len(data)))
            depth = np.minimum(_drawn_stages(plan.mixing, stage.index, data.num_steps, drawn), len(forms) - 2)
            which = np.where(chance < plan.mixing_probability, 1 + depth, 0)
        self.modes = which if stage.in_turn else np.zeros_like(which)
        offsets = _icot_offsets(seed, epoch, len(data)) if stage.form.smoothed else np.zeros_like(which)
        drawn_group = 1 + np.random.default_rng([seed, epoch, GROUP]).integers(
            stage.form.slot.max_group or 1, size=len(data)
        )
        self.groups = drawn_group if stage.form.draws_group else np.full_like(which, stage.form.slot.group)
        alone = [
            _OneForm(data, [form], plan.pad_thoughts, np.zeros_like(which), 0, self.groups)
            for form in stage.together[1:]
        ]
        self.forms = [_OneForm(data, forms, plan.pad_thoughts, which, offsets, self.groups), *alone]
        self.names = [form.name for form in stage.together]
        self.lengths = np.stack([form.lengths for form in self.forms])
        self.passes = np.max([form.passes for form in self.forms], axis=0)
        self.slot_starts = self.forms[0].slot_starts

    def __len__(self) -> int:
        return len(self.data)

    def form(self, index: int) -> Form:
        """The form of an example's first sequence."""
        return self.forms[0].of(index)

    @property
    def longest(self) -> np.ndarray:
        """(N,) the length of an example's longest sequence."""
        return self.lengths.max(0)

    def layouts(self, index: int) -> list[Layout]:
        """The sequences of one example, in the order of the stage's forms."""
        first, last = self.data.first[index], self.data.first[index + 1]
        example = self.data.tokens[self.data.starts[index] : self.data.starts[index + 1]]
        segments = np.split(example, self.data.bounds[first : last - 1] - self.data.starts[index])
        purpose = {Spans.random: SPANS, Spans.fixed: DRAWN_TOKENS}.get(self.spans) if self.spans else None
        layouts = [
            layout(
                segments,
                form.of(index),
                self.special,
                slot_length=int(form.slot_lengths[index]),
                tokens_cut=int(form.tokens_cut[index]),
                num_answer_mark=int(self.data.answer_marks[index]),
                spans=self.spans,
                random=np.random.default_rng([*self.key, purpose, index]) if purpose else None,
            )
            for form in self.forms
        ]
        if self.compression is None:
            return layouts
        count, rule = int(self.forms[0].slot_lengths[index]), self.compression
        random = np.random.default_rng([*self.key, COMPRESSION, index])
        return [replace(item, chain=compressed(item.chain, count, rule, random)) for item in layouts]


class _OneForm:
    """One of the sequences that stand together: example i has the form `forms[which[i]]`. All arrays are (N,).

    `groups`: from how many tokens of the chain thoughts are merged, where they are.
    """

    def __init__(
        self, data: TokenizedData, forms: list[Form], pad_thoughts: bool, which: np.ndarray, offsets: np.ndarray | int,
        groups: np.ndarray,
    ):  # fmt: skip
        self.forms, self.which, self.groups = forms, which, groups

        def of_each(values: list[int | None]) -> np.ndarray:
            return np.array([EVERYTHING if value is None else value for value in values])[which]

        lengths = np.stack(
            [
                merged_lengths(data, groups) if form.slot.merges else slot_lengths(form, pad_thoughts, data.num_steps)
                for form in forms
            ]
        )
        self.slot_lengths = lengths[which, np.arange(len(data))]
        passes = np.stack([form.slot.training_passes(length) for form, length in zip(forms, lengths, strict=True)])
        self.passes = passes[which, np.arange(len(data))]
        self.tokens_cut = of_each([form.tokens_cut for form in forms]) + offsets
        markers = of_each([form.markers for form in forms])
        controls = of_each([bool(form.mode) for form in forms])
        last_steps_cut = of_each([form.last_steps_cut for form in forms])
        written = written_lengths(data, of_each([form.steps_cut for form in forms]), self.tokens_cut, last_steps_cut)
        self.slot_starts = data.question_lengths + controls + markers
        self.lengths = data.question_lengths + controls + 2 * markers + self.slot_lengths + written

    def of(self, index: int) -> Form:
        """The form of an example."""
        form = self.forms[self.which[index]]
        return replace(form, slot=replace(form.slot, group=int(self.groups[index]))) if form.draws_group else form


def _drawn_stages(mixing: Mixing, current: int, num_steps: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(N,) the stage from which each mixed example is drawn; `drawn` (N,) are uniform in [0, 1)."""
    if mixing is Mixing.earlier:
        weights = np.arange(1, max(current, 1) + 1)  # stage 0 has none before it and draws itself
        return np.searchsorted(weights.cumsum() / weights.sum(), drawn, side="right")
    highest = np.full_like(num_steps, current) if mixing is Mixing.current else num_steps
    return (drawn * (highest + 1)).astype(np.int64)


def stage_variants(plan: Plan) -> list[Stage]:
    """Every set of sequences that an example may get in any epoch, each as a stage; iCoT's without an offset.

    Of merged thoughts whose groups are drawn, those with one token a thought, which are the longest.
    """
    plain = [
        replace(stage, together=(_fixed_form(form), *stage.together[1:]), in_turn=())
        for stage in plan.stages
        for form in stage.forms_at_inference
    ]
    mixed = [replace(plain[0], together=(form, *plain[0].together[1:])) for form in plan.mixing_forms]
    return [*(mixed if plan.mixing_probability else ()), *plain]


def _fixed_form(form: Form) -> Form:
    """The form with nothing drawn. Of merged thoughts whose groups are drawn, that with one token a thought."""
    slot = replace(form.slot, group=1) if form.draws_group else form.slot
    return replace(form, slot=slot, smoothed=False, draws_group=False)


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
    longest = np.max([view.longest for view in view_of(data)], axis=0)
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
