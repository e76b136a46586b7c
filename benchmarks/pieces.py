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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from itertools import product
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

from benchmarks.run import machine, questions, seconds, step
from benchmarks.ways import NEW_TOKENS, SIZES, WAYS, make_batch, make_data, make_model, make_view, our_answers
from coconut import LatentLM
from coconut.attention import OneQueryAttention
from coconut.engine.base import keep_memory
from coconut.layout import BUCKET, Batch, EpochView, epoch_batches, micro_batches
from coconut.linear import FusedGelu, fused_gelu
from coconut.thinking import longest_first, pad_rows

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


@contextmanager
def torch_attention(lm: LatentLM) -> Iterator[None]:
    """A thought's attention as torch's kernel does it."""
    ours = OneQueryAttention.__torch_function__
    OneQueryAttention.__torch_function__ = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))
    try:
        yield
    finally:
        OneQueryAttention.__torch_function__ = ours


WITHOUT: dict[str, Callable[[LatentLM], Any]] = {
    "all": lambda lm: nullcontext(),
    "cache joined": joined_cache,
    "gradients pass by pass": gradients_pass_by_pass,
    "GELU spelled out": gelu_spelled_out,
    "GELU kept": gelu_kept,
}


HALF: dict[str, Callable[[LatentLM], Any]] = {"all": WITHOUT["all"], "torch's attention": torch_attention}


def times(
    size: str, thoughts: int, rounds: int, kind: str, ways: dict[str, Callable[[LatentLM], Any]]
) -> dict[str, list[float]]:
    """Seconds of a step in each round."""
    lm = make_model(SIZES[size])
    batch = make_batch(lm, make_data(512), thoughts, SIZES[size].rows)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, without in ways.items():
            with without(lm):
                spent = seconds(lambda: step("ours", lm, batch, kind))
            if number:
                taken[name].append(spent)
    return taken


def answer_times(size: str, rounds: int) -> list[list[float]]:
    """Seconds in each round: SAMPLES answers to ASKED questions from one reading of each, and from as many readings;
    one answer to 4 * ASKED questions in batches of like lengths, and in batches as they come.
    """
    lm = make_model(SIZES[size]).eval()
    rows = questions(4 * ASKED)
    ids, mask = pad_rows(rows[:ASKED], lm.special.pad)
    ids_again, mask_again = (part.repeat_interleave(SAMPLES, 0) for part in (ids, mask))
    sampled: dict[str, Any] = {
        "num_thoughts": 3, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True
    }  # fmt: skip

    def all_of(batches: Sequence[list[int]]) -> None:
        for places in batches:
            our_answers(lm, *pad_rows([rows[place] for place in places], lm.special.pad), 3)

    ways: list[Callable[[], object]] = [
        lambda: lm.generate(ids, mask, num_return_sequences=SAMPLES, **sampled),
        lambda: lm.generate(ids_again, mask_again, **sampled),
        lambda: all_of(list(longest_first(rows, ASKED))),
        lambda: all_of([list(range(start, start + ASKED)) for start in range(0, len(rows), ASKED)]),
    ]
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for spent, way in zip(taken, ways, strict=True):
            took = seconds(way)
            if number:
                spent.append(took)
    return taken


def padding(view: EpochView, batches: list[np.ndarray]) -> float:
    made = [next(micro_batches(view, batch, len(batch))) for batch in batches]
    return 1 - sum(int(part.attention_mask.sum()) for part in made) / sum(part.attention_mask.numel() for part in made)


def by_length(view: EpochView, size: int) -> list[np.ndarray]:
    """Rows of like lengths among as many batches, whatever their thoughts."""
    order = np.random.default_rng(0).permutation(len(view))
    chunks = np.split(order, range(BUCKET * size, len(order), BUCKET * size))
    order = np.concatenate([chunk[np.argsort(view.lengths[chunk], kind="stable")] for chunk in chunks])
    return np.split(order, range(size, len(order), size))


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    columns = list(columns)
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def step_rows(rounds: int, kind: str, ways: dict[str, Callable[[LatentLM], Any]]) -> Iterator[list[str]]:
    for size, thoughts in product(SIZES, THOUGHTS):
        taken = times(size, thoughts, rounds, kind, ways)
        cells = [
            f"{statistics.median(values):.3g} "
            f"({statistics.median(a / b for a, b in zip(values, taken['all'], strict=True)):.2f})"
            for values in taken.values()
        ]
        yield [size, str(thoughts), *cells]


def kept_rows() -> Iterator[list[str]]:
    for name, size in SIZES.items():
        lm = make_model(size)
        batch = make_batch(lm, make_data(512), 3, size.rows)
        held = []
        for without in WITHOUT.values():
            with without(lm):
                held.append(f"{kept(lm, batch):.0f}")
        yield [name, *held]


def answer_rows(rounds: int) -> Iterator[list[str]]:
    for size in SIZES:
        yield [size, *(f"{statistics.median(spent):.3g}" for spent in answer_times(size, rounds))]


def padding_rows() -> Iterator[list[str]]:
    lm = make_model(SIZES["2 x 128"])
    view = make_view(lm, make_data(ROWS), 3)
    for size in BATCHES:
        ours, plain = (100 * padding(view, b) for b in (epoch_batches(view, size, 0, 0), by_length(view, size)))
        yield [str(size), f"{ours:.1f}", f"{plain:.1f}"]


def main() -> None:
    keep_memory()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{date.today()}, {machine()}")
    for kind, ways in {"float32": WITHOUT, "bfloat16": HALF}.items():
        table(f"A step in {kind}, seconds (and times the step with all pieces)", ["model", "thoughts", *ways],
              step_rows(rounds, kind, ways))  # fmt: skip
    table("Kept for the backward pass, MB, 3 thoughts", ["model", *WITHOUT], kept_rows())
    table(
        f"Seconds for {SAMPLES} answers to each of {ASKED} questions; for one to each of {4 * ASKED}, {ASKED} at once",
        ["model", "from one reading", "each from its own", "like lengths together", "as they come"],
        answer_rows(rounds),
    )
    table(f"Padding of an epoch's batches of {ROWS:,} rows with 3 thoughts, % of the columns",
          ["rows", "as they are put together", "by length alone"], padding_rows())  # fmt: skip


if __name__ == "__main__":
    main()
