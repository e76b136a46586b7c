"""From an epoch's sequences to batches, and from a batch to the micro-batches of one process.

Shapes: B rows of a batch, T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coconut.data.sequences import ORDER, EpochView, Layout
from coconut.data.tokenization import SpecialIds

IGNORED = -100  # the label of a position that is no target, as in torch's cross_entropy


BATCHES_PER_BUCKET = 64  # batches that are sorted by length together


BATCHES_PER_GROUP = 4  # batches of that order that are sorted by prefix together


def epoch_batches(view: EpochView, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The indices of each update of an epoch: every example once, in batches of like lengths, in random order.

    Of a hybrid model's modes a batch has what a random draw gives it. Whatever goes with length (the number of steps,
    the depth of a mixed row) is more alike within a batch than in a random one.

    The last batch may be smaller. A function of its arguments alone, so a resumed run takes up its place.
    """
    random = np.random.default_rng([seed, epoch, ORDER])
    order = random.permutation(len(view))
    span = batch_size * BATCHES_PER_BUCKET
    chunks = np.split(order, range(span, len(order), span))
    order = np.concatenate([_sort_by_length(view, chunk, BATCHES_PER_GROUP * batch_size) for chunk in chunks])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[k] for k in random.permutation(len(batches))]


def _sort_by_length(view: EpochView, rows: np.ndarray, group: int) -> np.ndarray:
    """Sort rows by length; where there are thoughts, by what stands before them in each `group` rows of that order.

    A row changes places with rows of its own mode alone, so that the modes stay where they were drawn.
    """
    order = np.empty_like(rows)
    for mode in np.unique(view.modes[rows]):
        positions = np.flatnonzero(view.modes[rows] == mode)
        same_mode = rows[positions]
        same_mode = same_mode[np.argsort(view.lengths[same_mode], kind="stable")]
        if view.passes.max() > 1:
            same_mode = same_mode[np.lexsort((view.slot_starts[same_mode], positions // group))]
        order[positions] = same_mode
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
    shifts = [item.slot_start if special.latent in item.ids else 0 for item in layouts]
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


def micro_batches(view: EpochView, batch: np.ndarray, size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """What one process of `ranks` does of an update, in parts of at most `size` rows of one mode.

    All processes get equally many parts, with equally many passes each; one for which no row is left gets
    a row without targets.
    """
    for mode in np.unique(view.modes[batch]):
        rows = batch[view.modes[batch] == mode]
        shares = [rows[other::world_size] for other in range(world_size)]
        for start in range(0, len(shares[0]), size):
            parts = [share[start : start + size] for share in shares]
            yield _collate_part(view, parts, rank)


def _collate_part(view: EpochView, parts: list[np.ndarray], rank: int) -> Batch:
    """The part of one process among those that are carried out at the same time."""
    rows = parts[rank] if len(parts[rank]) else parts[0][:1]
    made = collate([view.layout(i) for i in rows], view.special)
    if not len(parts[rank]):
        made.labels.fill_(IGNORED)
    made.passes = max(int(view.passes[part].max()) for part in parts if len(part))
    return made
