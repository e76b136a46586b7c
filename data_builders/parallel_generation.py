"""Generate rows in parallel processes: draw, verify and measure them.

Every row is a function of the seed, its split and its index, so that neither the number of processes nor the size of
other splits changes it. The split that a question may belong to depends on its key alone, which is equal for equal
questions (for graphs: up to the names of the nodes). So no question occurs in two splits, even of sets made with
different seeds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from coconut.utils.console import progress_bar
from data_builders.dataset_writer import Row, WrittenRow
from data_builders.statistics import Measures

BATCH = 250  # rows of one task of a worker process
ATTEMPTS = 500  # draws for one row before the possible questions count as exhausted
ORDER = ("valid", "test", "train")
SHARES = {"valid": (0, 10), "test": (10, 20), "train": (20, 100)}  # ranges of the key modulo 100


@dataclass(frozen=True)
class Recipe:
    """How one task's rows are generated. The functions must be picklable, for worker processes.

    draw: a row and its key, a function of the random numbers, or None if the key is not wanted; raises ValueError if
        the dials allow no row. Keys are equal for equal questions, and otherwise uniformly distributed.
    prove: raises ValueError if anything in the row is wrong, independently of `draw`.
    measure: the row's statistics.
    adapt: changes a row of the training split, and no other, after it was drawn; its key and its question stay alike.
    """

    draw: Callable[[random.Random, Callable[[int], bool]], tuple[Row, int] | None]
    prove: Callable[[Row], object]
    measure: Callable[[Row], Measures]
    adapt: Callable[[random.Random, Row], Row] | None = None


Drawn = tuple[WrittenRow, str, int]  # a row, its question as drawn, and which attempt it was


def make_splits(
    recipe: Recipe, counts: dict[str, int], seed: int, num_workers: int | None = None
) -> dict[str, list[WrittenRow]]:
    """Generate `counts` rows of each split in `num_workers` processes, by default one for each core.

    Raises ValueError if there are too few different questions.
    """
    places = [(split, index) for split in ORDER for index in range(counts.get(split, 0))]
    splits: dict[str, list[WrittenRow]] = {split: [] for split in ORDER if counts.get(split)}
    questions: set[str] = set()
    with progress_bar("making rows", len(places)) as bar:
        rows = _make_all(recipe, places, seed, num_workers or _cores())
        for done, (split, index) in enumerate(places, start=1):
            drawn = next(rows)
            while drawn and drawn[1] in questions:
                drawn = _make(recipe, seed, split, index, drawn[2] + 1)
            if not drawn:
                raise ValueError(
                    f"Asked for {len(places)} questions, but after {done - 1} hardly any new ones come that may stand "
                    f"in {split}: with these dials there are too few different ones. Ask for fewer, or raise nodes."
                )
            questions.add(drawn[1])
            splits[split].append(drawn[0])
            bar(done, split)
    return splits


def _make_all(recipe: Recipe, places: list[tuple[str, int]], seed: int, num_workers: int) -> Iterator[Drawn | None]:
    batches = [places[start : start + BATCH] for start in range(0, len(places), BATCH)]
    num_workers = min(num_workers, len(batches))
    if num_workers < 2:
        yield from (_make(recipe, seed, *place) for place in places)
        return
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_workers, context, _follow_parent)
    try:
        with _interrupts_held():
            made = executor.map(partial(_make_batch, recipe, seed), batches)
        for batch in made:
            yield from batch
    except BrokenProcessPool:
        raise OSError(
            "A worker process was killed, possibly for lack of memory. Try again with num_workers=1."
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT in processes started inside; in this process it is delivered when the context ends."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """End a worker when its parent process ends, for any reason."""
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_batch(recipe: Recipe, seed: int, places: list[tuple[str, int]]) -> list[Drawn | None]:
    return [_make(recipe, seed, split, index) for split, index in places]


def _make(recipe: Recipe, seed: int, split: str, index: int, first_attempt: int = 0) -> Drawn | None:
    """The row with this index in the split, or None if no draw gives a question of the split."""
    low, high = SHARES[split]
    for attempt in range(first_attempt, ATTEMPTS):
        drawn = recipe.draw(random.Random(f"{seed} {split} {index} {attempt}"), lambda key: low <= key % 100 < high)
        if drawn:
            break
    else:
        return None
    row, key = drawn
    question = row["question"]
    if split == "train" and recipe.adapt:
        row = recipe.adapt(random.Random(f"adapt {seed} {index}"), row)
    try:
        recipe.prove(row)
    except ValueError as error:
        raise AssertionError(f"A row came out wrong ({error}): {row}") from error
    return WrittenRow.of(row, key, recipe.measure(row)), question, attempt


def _cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
