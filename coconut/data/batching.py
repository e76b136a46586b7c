"""Group the sequences of an epoch into batches, and a batch into the micro-batches of one process.

Shapes: B rows of a batch, T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coconut.data.sequences import ORDER, EpochView, Layout
from coconut.data.tokenization import SpecialIds

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
        same_mode = same_mode[np.argsort(view.lengths[same_mode], kind="stable")]
        if view.passes.max() > 1:
            same_mode = same_mode[np.lexsort((view.slot_starts[same_mode], positions // group))]
        order[positions] = same_mode
    return order


@dataclass
class Batch:
    """Token ids, attention mask and labels, each (B, T); labels are IGNORED where there is no target.

    `passes`: minimum number of forward passes, so that all processes run equally many.
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
    """Pad sequences to one batch, on the left so that all first thoughts are in one column."""
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
    """The micro-batches of one process for an update: at most `size` rows each, all of one mode.

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
    batch = collate([view.layout(i) for i in rows], view.special)
    if not len(parts[rank]):
        batch.labels.fill_(IGNORED)
    batch.passes = max(int(view.passes[part].max()) for part in parts if len(part))
    return batch
