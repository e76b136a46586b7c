"""Thoughts that are updated all at once against thoughts in sequence and against plain fine-tuning.

    python -m benchmarks.parallel_thoughts [thoughts=24] [iterations=3] [rounds=5]

Questions as long as ProsQA's (benchmarks/baselines.py). First a training step, forward and backward without the
optimizer: the medians of all rounds, and the median of their ratios to the plain step of the same tokens in the same
round. Then the thought phase of generation, from the questions to the last thought, at two batch sizes.
OMP_NUM_THREADS sets the number of cores.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial

from benchmarks.baselines import SIZES, make_batches, make_model
from benchmarks.run import in_turn, questions, step
from coconut import LatentLM
from coconut.engine.base import keep_freed_memory
from coconut.generation.generate import pad_rows
from coconut.generation.thoughts import think
from coconut.methods import THOUGHTS, Slot, Source, Update
from coconut.models.feedback import Feedback

BATCH_SIZES = (1, 32)


def with_slot(size: str, slot: Slot) -> LatentLM:
    lm = make_model(SIZES[size])
    lm.feedback = Feedback(slot, lm.thought_size)
    return lm


def print_medians(times: dict[str, list[float]], baseline: str, notes: dict[str, str]) -> None:
    for name, spent in times.items():
        ratio = statistics.median(a / b for a, b in zip(spent, times[baseline], strict=True))
        note = f", {notes[name]}" if name in notes else ""
        print(f"  {name:<22} {1000 * statistics.median(spent):8.0f} ms   {ratio:.2f} of {baseline}{note}", flush=True)


def numbers_of(arguments: Iterable[str], **defaults: int) -> list[int]:
    """The values of KEY=NUMBER arguments, in the order of the defaults. Exits if one is not among them or below 1."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in defaults or not value.isdecimal() or int(value) < 1:
            sys.exit(f"{argument!r} is not KEY=NUMBER with one of {', '.join(defaults)}.")
        defaults[key] = int(value)
    return list(defaults.values())


def main(arguments: Iterable[str]) -> None:
    thoughts, iterations, rounds = numbers_of(arguments, thoughts=24, iterations=3, rounds=5)
    keep_freed_memory()
    at_once = Slot(Source.thought, update=Update.jacobi, iterations=iterations)
    slots = {f"Jacobi, T={iterations}": at_once, "in sequence": THOUGHTS}
    for size in ("2 x 768", "12 x 768"):
        rows = SIZES[size].rows
        print(f"A training step of {rows} rows with {thoughts} thoughts, GPT-2 of {size}")
        models = {name: with_slot(size, slot) for name, slot in slots.items()}
        first = next(iter(models.values()))
        batches = make_batches(first, thoughts, rows)
        works: dict[str, Callable[[], object]] = {"plain": partial(step, "plain", first, batches["plain"], "float32")}
        for name, lm in models.items():
            works[name] = partial(step, "ours", lm, batches["ours"], "float32")
        print_medians(in_turn(works, rounds), "plain", {})
        for count in BATCH_SIZES:
            print(f"{thoughts} thoughts after {count} question{'s' * (count > 1)}, GPT-2 of {size}")
            ids, mask = pad_rows(questions(count), first.special.pad)
            notes: dict[str, str] = {}
            works = {"the questions alone": partial(think, first.eval(), ids, mask, 0)}
            for name, lm in models.items():
                works[name] = partial(think, lm.eval(), ids, mask, thoughts)
                notes[name] = f"{lm.feedback.slot.passes_before_answer(thoughts)} passes"
            print_medians(in_turn(works, rounds), "in sequence", notes)


if __name__ == "__main__":
    main(sys.argv[1:])
