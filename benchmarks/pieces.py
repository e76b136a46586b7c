"""What each piece of speed brings: python -m benchmarks.pieces [rounds]

A training step of ours as it is, and without one piece at a time, in one process in turn: medians of the rounds after
one that is not counted, and the ratio to the step with all pieces in the same round. Then what is kept for the backward
pass; answers, several from one reading of a question or each from its own, and in batches of like lengths or as they
come; and the padding of an epoch's batches with rows put together as they are, and by their length alone. What freed
memory brings is in benchmarks/run.py, which has processes of their own for it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from functools import partial
from itertools import product
from types import MethodType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

from benchmarks.run import Row, in_turn, machine, padding, questions, shown, step
from benchmarks.ways import NEW_TOKENS, SIZES, WAYS, make_batch, make_data, make_model, make_view, our_answers
from coconut import LatentLM
from coconut.acceleration import attention, linear
from coconut.acceleration.linear import FusedGelu, fused_gelu
from coconut.data import sequences as layout
from coconut.data.batching import Batch, epoch_batches, micro_batches
from coconut.data.sequences import EpochView
from coconut.engine.base import keep_freed_memory
from coconut.generation.generate import longest_first, pad_rows
from coconut.models import latent_lm as model

THOUGHTS = (3, 12)
BATCHES = (8, 16, 64, 128)
ROWS = 17_886  # as many as ProsQA's training data have
SAMPLES = 4  # answers to a question
ASKED = 8  # questions in a batch


@contextmanager
def joined_cache(lm: LatentLM) -> Iterator[None]:
    """Keys and values in a DynamicCache, which joins what it has with what is new."""
    lm.new_cache = MethodType(lambda self, columns=0, windows=True: DynamicCache(config=self.base.config), lm)
    try:
        yield
    finally:
        del lm.new_cache


@contextmanager
def gradients_pass_by_pass(lm: LatentLM) -> Iterator[None]:
    """Every pass makes a gradient of each weight."""
    lm._over_passes = MethodType(lambda self: nullcontext(), lm)
    try:
        yield
    finally:
        del lm._over_passes


@contextmanager
def gelu_spelled_out(lm: LatentLM) -> Iterator[None]:
    """GPT-2's GELU as transformers has it."""
    blocks = [module for module in lm.modules() if isinstance(getattr(module, "act", None), FusedGelu)]
    fused = [block.act for block in blocks]
    try:
        for block in blocks:
            block.act = NewGELUActivation()
        yield
    finally:
        for block, act in zip(blocks, fused, strict=True):
            block.act = act


@contextmanager
def gelu_kept(lm: LatentLM) -> Iterator[None]:
    """The layer after GELU keeps what GELU made, as autograd would."""
    after = [module for module in lm.modules() if isinstance(module, FusedGelu)]
    for module in after:
        module.forward = fused_gelu
    try:
        yield
    finally:
        for module in after:
            del module.forward


def every_state(lm: LatentLM) -> AbstractContextManager[Any]:
    """All of the last layer for all columns, read or not."""
    return patch.object(lm, "_last_layer", None)


def products_by_blas(lm: LatentLM) -> AbstractContextManager[Any]:
    """A CPU's products in float32 as torch makes them."""
    return patch.object(linear, "_by_onednn", lambda given: False)


def table_twice(lm: LatentLM) -> AbstractContextManager[Any]:
    """A gradient of the whole table for the embeddings that were looked up, beside the head's."""
    return patch.object(model, "rows_added", lambda base: nullcontext())


def kept(lm: LatentLM, batch: Batch) -> float:
    """MB that a step keeps for its backward pass, but for weights; each piece of memory once."""
    weights = {weight.untyped_storage().data_ptr() for weight in lm.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = WAYS["ours"](lm, batch)
    loss.backward()
    lm.zero_grad(set_to_none=True)
    return sum(found.values()) / 1e6


def torch_attention(lm: LatentLM) -> AbstractContextManager[Any]:
    """A thought's attention as torch's kernel does it."""
    return patch.object(model, "in_place_of_torchs", lambda embeds, cached: nullcontext())


def queries_in_views(lm: LatentLM) -> AbstractContextManager[Any]:
    """Queries where keys and values are, too, which then are kept twice."""
    return patch.object(attention, "own_storage", lambda query: query)


def by_length() -> AbstractContextManager[Any]:
    """Rows of like lengths are put together, whatever stands before their thoughts."""

    def sort(view: EpochView, rows: np.ndarray, group: int) -> np.ndarray:
        return rows[np.argsort(view.lengths[rows], kind="stable")]

    return patch.object(layout, "_like_together", sort)


Pieces = dict[str, Callable[[LatentLM], AbstractContextManager[Any]]]
WITHOUT: Pieces = {
    "all": lambda lm: nullcontext(),
    "cache joined": joined_cache,
    "gradients pass by pass": gradients_pass_by_pass,
    "GELU spelled out": gelu_spelled_out,
    "GELU kept": gelu_kept,
    "every state made": every_state,
    "queries in views": queries_in_views,
    "table's gradient twice": table_twice,
    "products by BLAS": products_by_blas,
}
HALF: Pieces = {"all": WITHOUT["all"], "torch's attention": torch_attention, "every state made": every_state}


def step_rows(rounds: int, kind: str, pieces: Pieces) -> Iterator[Row]:
    for size, thoughts in product(SIZES, THOUGHTS):
        lm = make_model(SIZES[size])
        batch = make_batch(lm, make_data(512), thoughts, SIZES[size].rows)

        def without(name: str, lm: LatentLM = lm, batch: Batch = batch) -> None:
            with pieces[name](lm):
                step("ours", lm, batch, kind)

        taken = in_turn({name: partial(without, name) for name in pieces}, rounds)
        cells = {
            name: f"{statistics.median(values):.3g} "
            f"({statistics.median(a / b for a, b in zip(values, taken['all'], strict=True)):.2f})"
            for name, values in taken.items()
        }
        yield {"model": size, "thoughts": thoughts, **cells}


def kept_rows() -> Iterator[Row]:
    for name, size in SIZES.items():
        lm = make_model(size)
        batch = make_batch(lm, make_data(512), 3, size.rows)
        held: Row = {}
        for piece, without in WITHOUT.items():
            with without(lm):
                held[piece] = f"{kept(lm, batch):.0f}"
        yield {"model": name, **held}


def answer_rows(rounds: int) -> Iterator[Row]:
    """SAMPLES answers to each of ASKED questions, and one to each of four times as many."""
    for size in SIZES:
        lm = make_model(SIZES[size]).eval()
        rows = questions(4 * ASKED)
        ids, mask = pad_rows(rows[:ASKED], lm.special.pad)
        sampled = partial(lm.generate, num_thoughts=3, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                          do_sample=True)  # fmt: skip

        def each(batches: Iterable[list[int]], lm: LatentLM = lm, rows: list[list[int]] = rows) -> None:
            for places in batches:
                our_answers(lm, *pad_rows([rows[place] for place in places], lm.special.pad), 3)

        places = list(range(len(rows)))
        works = {
            "from one reading": partial(sampled, ids, mask, num_return_sequences=SAMPLES),
            "each from its own": partial(sampled, *(part.repeat_interleave(SAMPLES, 0) for part in (ids, mask))),
            "like lengths together": partial(each, list(longest_first(rows, ASKED))),
            "as they come": partial(each, [places[first : first + ASKED] for first in places[::ASKED]]),
        }
        yield {"model": size, **{name: statistics.median(spent) for name, spent in in_turn(works, rounds).items()}}


def padding_rows() -> Iterator[Row]:
    lm = make_model(SIZES["2 x 128"])
    view = make_view(lm, make_data(ROWS), 3)
    for size in BATCHES:
        shares = {}
        for name, order in {"as they are put together": nullcontext, "by length alone": by_length}.items():
            with order():
                made = [next(micro_batches(view, batch, size)) for batch in epoch_batches(view, size, 0, 0)]
            shares[name] = f"{100 * padding(made):.1f}"
        yield {"rows": size, **shares}


def main() -> None:
    keep_freed_memory()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{date.today()}, {machine()}")
    for kind, pieces in {"float32": WITHOUT, "bfloat16": HALF}.items():
        shown(f"A step in {kind}, seconds (and times the step with all pieces)", step_rows(rounds, kind, pieces))
    shown("Kept for the backward pass, MB, 3 thoughts", kept_rows())
    shown(
        f"Seconds for {SAMPLES} answers to each of {ASKED} questions; for one to each of {4 * ASKED}, {ASKED} at once",
        answer_rows(rounds),
    )
    shown(f"Padding of an epoch's batches of {ROWS:,} rows with 3 thoughts, % of the columns", padding_rows())


if __name__ == "__main__":
    main()
