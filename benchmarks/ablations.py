"""What each mechanism of `engine.acceleration` brings: python -m benchmarks.ablations [rounds]

- a training step with all mechanisms, without one at a time, and with none, in turn in one process: medians over the
  rounds, after a warm-up round, and in brackets the ratio to the step with all mechanisms of the same round
- the memory that a step saves for its backward pass
- answers: with and without acceleration, several from one prefill or each from its own, and in batches of similar
  lengths or in the order of the file
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.baselines import IMPLEMENTATIONS, NEW_TOKENS, SIZES, answer, make_batch, make_data, make_model
from benchmarks.run import Row, in_turn, machine, print_table, questions, step
from coconut import LatentLM
from coconut.config import MECHANISMS, EngineConfig
from coconut.data.batching import Batch
from coconut.engine.base import keep_freed_memory
from coconut.generation.generate import longest_first, pad_rows

THOUGHTS = (3, 12)
PRECISIONS = {"float32": MECHANISMS, "bfloat16": tuple(name for name in MECHANISMS if name != "onednn")}
SAMPLES = 4  # answers to a question
QUESTIONS = 8  # in a batch


def settings(mechanisms: Sequence[str] = MECHANISMS) -> dict[str, str]:
    """Values of `engine.acceleration` by their column: all mechanisms, each left out in turn, none."""
    without = {f"no {left_out}": ",".join(set(MECHANISMS) - {left_out}) for left_out in mechanisms}
    return {"all": "auto", **without, "none": "off"}


def accelerate(lm: LatentLM, value: str) -> LatentLM:
    """Set the model's mechanisms as `engine.acceleration` does."""
    lm.acceleration.mechanisms = EngineConfig(acceleration=value).mechanisms
    return lm


def saved_megabytes(lm: LatentLM, batch: Batch) -> float:
    """MB that a step saves for its backward pass, without weights; memory that tensors share is counted once."""
    weights = {weight.untyped_storage().data_ptr() for weight in lm.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            sizes[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = IMPLEMENTATIONS["ours"](lm, batch)
    loss.backward()
    lm.zero_grad(set_to_none=True)
    return sum(sizes.values()) / 1e6


def step_rows(rounds: int, precision: str) -> Iterator[Row]:
    for size, thoughts in product(SIZES, THOUGHTS):
        lm = make_model(SIZES[size])
        batch = make_batch(lm, make_data(512), thoughts, SIZES[size].rows)

        def run(value: str, lm: LatentLM = lm, batch: Batch = batch) -> None:
            step("ours", accelerate(lm, value), batch, precision)

        columns = settings(PRECISIONS[precision])
        seconds = in_turn({name: partial(run, value) for name, value in columns.items()}, rounds)
        cells = {
            name: f"{statistics.median(values):.3g} "
            f"({statistics.median(a / b for a, b in zip(values, seconds['all'], strict=True)):.2f})"
            for name, values in seconds.items()
        }
        yield {"model": size, "thoughts": thoughts, **cells}


def memory_rows() -> Iterator[Row]:
    for name, size in SIZES.items():
        lm = make_model(size)
        batch = make_batch(lm, make_data(512), 3, size.rows)
        columns = {
            column: f"{saved_megabytes(accelerate(lm, value), batch):.0f}" for column, value in settings().items()
        }
        yield {"model": name, **columns}


def answer_rows(rounds: int) -> Iterator[Row]:
    """SAMPLES answers to each of QUESTIONS questions, and one to each of four times as many."""
    for size in SIZES:
        lm = make_model(SIZES[size]).eval()
        rows = questions(4 * QUESTIONS)
        ids, mask = pad_rows(rows[:QUESTIONS], lm.special.pad)
        sample = partial(lm.generate, num_thoughts=3, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                         do_sample=True)  # fmt: skip

        def in_batches(
            value: str, batches: Iterable[list[int]], lm: LatentLM = lm, rows: list[list[int]] = rows
        ) -> None:
            accelerate(lm, value)
            for indices in batches:
                answer(lm, *pad_rows([rows[index] for index in indices], lm.special.pad), 3)

        indices = list(range(len(rows)))
        by_length = list(longest_first(rows, QUESTIONS))
        in_order = [indices[first : first + QUESTIONS] for first in indices[::QUESTIONS]]
        works = {
            "from one prefill": partial(sample, ids, mask, num_return_sequences=SAMPLES),
            "each from its own": partial(sample, *(part.repeat_interleave(SAMPLES, 0) for part in (ids, mask))),
            "similar lengths together": partial(in_batches, "auto", by_length),
            "in order": partial(in_batches, "auto", in_order),
            "similar lengths, no acceleration": partial(in_batches, "off", by_length),
        }
        yield {"model": size, **{name: statistics.median(spent) for name, spent in in_turn(works, rounds).items()}}


def main() -> None:
    keep_freed_memory()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{date.today()}, {machine()}")
    for precision in PRECISIONS:
        title = f"A step in {precision}, seconds (and as a multiple of the step with all mechanisms)"
        print_table(title, step_rows(rounds, precision))
    print_table("Saved for the backward pass, MB, float32, 3 thoughts", memory_rows())
    print_table(
        f"Seconds for {SAMPLES} answers to each of {QUESTIONS} questions; for one to each of {4 * QUESTIONS}, "
        f"{QUESTIONS} at once",
        answer_rows(rounds),
    )


if __name__ == "__main__":
    main()
