"""Group the sequences of an epoch into batches, and a batch into the micro-batches of one process.

Shapes: R rows of a batch, T columns, K thoughts of the row with the most, G spans of a row, S tokens of a span,
C tokens of the longest chain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from coconut.data.sequences import ORDER, EpochView, Layout
from coconut.data.tokenization import SpecialIds
from coconut.methods import Per, Term

IGNORED = -100  # label of positions without a target, as in torch's cross_entropy


BATCHES_PER_BUCKET = 64  # that are sorted by length together


BATCHES_PER_GROUP = 4  # batches within a bucket that are then sorted by the length of the prompt


def epoch_batches(view: EpochView, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The example indices of each update of an epoch: every example once, similar lengths together, in random order.

    The modes of a hybrid model are distributed over batches as in a random draw. What correlates with length (number
    of steps, depth of a mixed example) varies less within a batch than in a random one.

    One batch may be smaller. The result depends on the arguments only, so a resumed run sees the same batches.
    """
    random = np.random.default_rng([seed, epoch, ORDER])
    order = random.permutation(len(view))
    span = batch_size * BATCHES_PER_BUCKET
    chunks = np.split(order, range(span, len(order), span))
    order = np.concatenate([_sort_by_length(view, chunk, BATCHES_PER_GROUP * batch_size) for chunk in chunks])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[k] for k in random.permutation(len(batches))]


def _sort_by_length(view: EpochView, rows: np.ndarray, group: int) -> np.ndarray:
    """Sort rows by length; if there are thoughts, then each `group` rows of that order by the start of the slot.

    Rows are exchanged within one mode only, so that the modes keep their random positions.
    """
    order = np.empty_like(rows)
    for mode in np.unique(view.modes[rows]):
        positions = np.flatnonzero(view.modes[rows] == mode)
        same_mode = rows[positions]
        same_mode = same_mode[np.argsort(view.longest[same_mode], kind="stable")]
        if view.passes.max() > 1:
            same_mode = same_mode[np.lexsort((view.slot_starts[same_mode], positions // group))]
        order[positions] = same_mode
    return order


@dataclass
class Batch:
    """Sequences of a micro-batch, padded. Rows stand form by form: all examples in the first form, then in the next.

    `input_ids`, `attention_mask`, `labels` (R, T): labels are IGNORED where there is no target. `form_R`: the index of
    each row's form. `answer_prompt_R`: the column of the last token before the answer itself, -1 if there is none.
    `thoughts_RK`: the columns of a row's thoughts, and of the `<eot>` with which a model ends thoughts that are merged
    from the chain; -1 beyond them. `spans_RGS`: the token ids of the spans of the chain that thoughts stand for,
    IGNORED beyond them. `chain_RC`: the columns of the written chain's tokens, -1 beyond them. `drawn_RG`: a token of
    each span of merged thoughts, IGNORED beyond them. `denominators`: of each term, what it counts here. `passes`:
    minimum number of forward passes, so that all processes run equally many.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    form_R: torch.Tensor
    answer_prompt_R: torch.Tensor
    thoughts_RK: torch.Tensor
    spans_RGS: torch.Tensor
    chain_RC: torch.Tensor
    drawn_RG: torch.Tensor
    denominators: tuple[int, ...] = ()
    passes: int = 1

    @property
    def cached_RM(self) -> torch.Tensor:
        """(R, M) the columns of a row's thoughts, or of a row without thoughts those of its chain, -1 beyond them."""
        M = max(self.thoughts_RK.shape[1], self.chain_RC.shape[1])
        thoughts_RM, chain_RM = (pad_columns(columns, M) for columns in (self.thoughts_RK, self.chain_RC))
        return torch.where((thoughts_RM >= 0).any(1, keepdim=True), thoughts_RM, chain_RM)

    def to(self, device: torch.device | str) -> Batch:
        moved = {field.name: value.to(device, non_blocking=True) for field in fields(self)
                 if isinstance(value := getattr(self, field.name), torch.Tensor)}  # fmt: skip
        return replace(self, **moved)

    def without_targets(self) -> Batch:
        """The same work for the model, with nothing to learn: for a process without a row left."""
        nothing = {name: torch.full_like(getattr(self, name), IGNORED) for name in ("labels", "spans_RGS", "drawn_RG")}
        for name in ("answer_prompt_R", "chain_RC"):
            nothing[name] = torch.full_like(getattr(self, name), -1)
        return replace(self, **nothing)


def pad_columns(columns: torch.Tensor, width: int) -> torch.Tensor:
    """(R, width) the columns, and -1 beyond them."""
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]), value=-1)


def collate(rows: Sequence[Layout], special: SpecialIds, num_forms: int = 1) -> Batch:
    """Pad sequences, given form by form, to one batch, on the left so that all first thoughts are in one column."""
    shifts = [item.slot_start if special.latent in item.ids else 0 for item in rows]
    left = [max(shifts) - shift if shift else 0 for shift in shifts]
    width = max(pad + len(item.ids) for pad, item in zip(left, rows, strict=True))
    places = [_thought_places(item, special) for item in rows]
    span_lengths = [len(span) for item in rows for span in item.spans]
    ids = np.full((len(rows), width), special.pad, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    prompts = np.full(len(rows), -1, np.int64)
    thoughts = np.full((len(rows), max(map(len, places))), -1, np.int64)
    spans = np.full((len(rows), max(len(item.spans) for item in rows), max(span_lengths, default=0)), IGNORED, np.int64)
    drawn = np.full((len(rows), max(len(item.drawn) for item in rows)), IGNORED, np.int64)
    chains = np.full((len(rows), max(1, *(len(item.chain) for item in rows))), -1, np.int64)
    for row, (pad, item) in enumerate(zip(left, rows, strict=True)):
        end = pad + len(item.ids)
        ids[row, pad:end] = item.ids
        mask[row, pad:end] = 1
        labels[row, pad + item.num_prompt : end] = item.ids[item.num_prompt :]
        if item.control >= 0:
            labels[row, pad + item.control] = item.ids[item.control]
        if item.answer_prompt >= 0:
            prompts[row] = pad + item.answer_prompt
        thoughts[row, : len(places[row])] = pad + places[row]
        drawn[row, : len(item.drawn)] = item.drawn
        chains[row, : len(item.chain)] = pad + item.chain
        for number, span in enumerate(item.spans):
            spans[row, number, : len(span)] = span
    forms = np.repeat(np.arange(num_forms), len(rows) // num_forms)
    tensors: Any = map(torch.from_numpy, (ids, mask, labels, forms, prompts, thoughts, spans, chains, drawn))
    return Batch(*tensors)


def _thought_places(item: Layout, special: SpecialIds) -> np.ndarray:
    """The indices of a row's thoughts, and of the `<eot>` that the model predicts after them."""
    ended = [item.thought_end] if item.thought_end >= 0 else []
    return np.array([*np.flatnonzero(item.ids == special.latent), *ended], np.int64)


def count_for_term(term: Term, form: int, batch: Batch) -> int:
    """What a term's sum is divided by: what it counts in the rows of the form with this index."""
    rows = batch.form_R == form
    is_target_RT, is_word_RGS = batch.labels[rows] != IGNORED, batch.spans_RGS[rows] != IGNORED
    counted = {
        Per.token: is_target_RT,
        Per.example: is_target_RT.any(1),
        Per.span: is_word_RGS.any(-1),
        Per.span_token: is_word_RGS,
    }
    if term.per is Per.token_or_span:
        return int(is_target_RT.sum() + is_word_RGS.any(-1).sum())
    return int(counted[term.per].sum())


def micro_batches(view: EpochView, batch: np.ndarray, size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The micro-batches of one process for an update: at most `size` examples each, all of one mode.

    All processes get equally many micro-batches with equally many passes each. A process without a row left gets one
    without targets.
    """
    for mode in np.unique(view.modes[batch]):
        rows = batch[view.modes[batch] == mode]
        shares = [rows[other::world_size] for other in range(world_size)]
        for start in range(0, len(shares[0]), size):
            parts = [share[start : start + size] for share in shares]
            yield _collate_part(view, parts, rank)


def _collate_part(view: EpochView, parts: list[np.ndarray], rank: int) -> Batch:
    """The micro-batch of one process. `parts`: the rows of all processes in the same step."""
    rows = parts[rank] if len(parts[rank]) else parts[0][:1]
    by_form = zip(*(view.layouts(i) for i in rows), strict=True)
    batch = collate([item for form in by_form for item in form], view.special, len(view.forms))
    if not len(parts[rank]):
        batch = batch.without_targets()
    return replace(
        batch,
        denominators=tuple(count_for_term(term, view.names.index(term.of), batch) for term in view.terms),
        passes=max(int(view.passes[part].max()) for part in parts if len(part)),
    )
