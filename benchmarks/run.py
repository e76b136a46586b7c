"""Time and memory of training steps and answers, against the released implementation and plain fine-tuning.

    python -m benchmarks.run                     the short form, in float32
    python -m benchmarks.run full=FOLDER         all sizes, thoughts and precisions; a table and a plot into FOLDER

benchmarks/baselines.py has the implementations. First the released one and ours are checked to agree in loss, gradient
and answers. Then all are timed in turn in one process, forward and backward without the optimizer; the medians are
printed with their ratios to plain fine-tuning and to the released implementation in the same round. All of them keep
freed memory (coconut.engine.base.keep_freed_memory). Then each runs in a process of its own: the released one as its
users would run it (in the full form `indexed` too, which is closer to its code), and ours with freed memory returned to
the system, kept, and kept with activation checkpointing. OMP_NUM_THREADS sets the number of cores.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import (
    IMPLEMENTATIONS,
    NEW_TOKENS,
    SIZES,
    answer,
    in_own_process,
    make_batch,
    make_batches,
    make_data,
    make_model,
    make_view,
    released_answer,
)  # fmt: skip
from coconut import LatentLM
from coconut.config import Precision
from coconut.data.batching import Batch, epoch_batches, micro_batches
from coconut.engine.base import autocast, keep_freed_memory
from coconut.generation.generate import pad_rows
from coconut.reporting.charts import save_png
from coconut.reporting.plots import LIGHT, new_figure
from coconut.utils.files import write_json

GIB = 2**30
QUESTIONS = 32  # answered in one go


def precision(name: str) -> AbstractContextManager[Any]:
    return autocast(torch.device("cpu"), Precision(name))


def step(implementation: str, lm: LatentLM, batch: Batch, kind: str) -> float:
    lm.zero_grad(set_to_none=True)
    with precision(kind):
        loss = IMPLEMENTATIONS[implementation](lm, batch)
    loss.backward()
    return loss.item()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds that all threads spent in the operating system's kernel."""
    before, start = os.times().system, time.perf_counter()
    work()
    return time.perf_counter() - start, os.times().system - before


def seconds(work: Callable[[], object]) -> float:
    return timed(work)[0]


# --- agreement --------------------------------------------------------------------------------------


def agreement(size: str, thoughts: int) -> tuple[float, float, str]:
    """Relative differences between the released implementation and ours in loss and gradient; equal answers."""
    lm = make_model(SIZES[size])
    batch = make_batch(lm, make_data(64), thoughts, 2)
    losses, gradients = [], []
    for implementation in ("released", "ours"):
        losses.append(step(implementation, lm, batch, "float32"))
        gradients.append(torch.cat([weight.grad.flatten() for weight in lm.parameters() if weight.grad is not None]))
    rows = questions(2)
    released = [released_answer(lm.eval(), torch.tensor(row), thoughts) for row in rows]
    ours = answer(lm, *pad_rows(rows, lm.special.pad), thoughts)
    agree = sum(a == b for a, b in zip(released, ours, strict=True))
    difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    return abs(losses[1] - losses[0]) / losses[0], difference, f"{agree} of {len(rows)}"


def questions(count: int) -> list[list[int]]:
    data = make_data(count)
    return [data.question(i).tolist() for i in range(count)]


# --- time -------------------------------------------------------------------------------------------


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                times[name].append(spent)
    return times


def answer_times(size: str, thoughts: int, kind: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a question: released, on another question in each round, and ours, on all QUESTIONS at once, in turn."""
    lm = make_model(SIZES[size]).eval()
    rows = questions(QUESTIONS)
    ids, mask = pad_rows(rows, lm.special.pad)
    released, ours = [], []
    with precision(kind):
        answer(lm, ids[:2], mask[:2], thoughts)
        for row in rows[:rounds]:
            released.append(seconds(lambda row=row: released_answer(lm, torch.tensor(row), thoughts)))
            ours.append(seconds(lambda: answer(lm, ids, mask, thoughts)) / QUESTIONS)
    return released, ours


def padding_and_loading(size: str, thoughts: int) -> tuple[float, float]:
    """Share of padding in an epoch's batches, and seconds to make one batch."""
    lm = make_model(replace(SIZES[size], layers=1, width=8, heads=1))
    view = make_view(lm, make_data(4096), thoughts)
    rows = SIZES[size].rows
    start = time.perf_counter()
    batches = [next(micro_batches(view, batch, rows)) for batch in epoch_batches(view, rows, seed=0, epoch=0)]
    spent = (time.perf_counter() - start) / len(batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return 1 - tokens / sum(batch.attention_mask.numel() for batch in batches), spent


# --- memory -----------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Bytes of this process's largest resident set. getrusage would include its parent's, from before the exec."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def steps_alone(size: str, kind: str, name: str, memory: str, rounds: int) -> Row:
    """Medians over steps of this process, after a warm-up step, and its largest resident set in GiB."""
    if memory != "returned":
        keep_freed_memory()
    lm = make_model(SIZES[size])
    lm.acceleration.activation_checkpointing = memory == "recomputed"
    thoughts = 3
    batch = make_batches(lm, thoughts, SIZES[size].rows)[name]
    spent, system = zip(*[timed(lambda: step(name, lm, batch, kind)) for _ in range(rounds + 1)], strict=True)
    medians = {"step": statistics.median(spent[1:]), "kernel": statistics.median(system[1:])}
    return {**medians, "memory": peak_memory() / GIB}


# --- the report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What is measured."""

    sizes: dict[str, tuple[int, ...]]  # and the numbers of thoughts of each
    kinds: tuple[str, ...]  # precisions
    released: tuple[int, ...]  # numbers of thoughts at which the released implementation is timed too
    alone: tuple[tuple[str, str], ...]  # implementations that run in a process of their own, and their memory
    rounds: int
    answer_rounds: int


IN_TURN = ("released", "plain", "ours")
RELEASED = ("released", "indexed")
BOTH = (("released", "returned"), ("ours", "kept"))
SHORT = Form({"2 x 768": (3, 12), "12 x 768": (3,)}, ("float32",), (3,), BOTH, 2, 1)
FULL = Form(
    dict.fromkeys(SIZES, (0, 3, 6, 12)), ("float32", "bfloat16"), (3,),
    (BOTH[0], ("indexed", "returned"), BOTH[1], ("plain", "kept"), ("ours", "returned"), ("ours", "recomputed")), 3, 3,
)  # fmt: skip
Row = dict[str, Any]
Results = dict[str, list[Row]]  # of the parts so far
USUAL = ("float32", 3)  # precision and thoughts


def training_rows(form: Form, results: Results) -> Iterator[Row]:
    cases = [(size, kind, k) for size, kind in product(form.sizes, form.kinds) for k in form.sizes[size]]
    for size, kind, thoughts in cases:
        names = [name for name in IN_TURN if name != "released" or thoughts in form.released]
        lm = make_model(SIZES[size])
        batches = make_batches(lm, thoughts, SIZES[size].rows)
        times = in_turn({name: partial(step, name, lm, batches[name], kind) for name in names}, form.rounds)
        medians = {name: statistics.median(times[name]) if name in times else "" for name in IN_TURN}
        ratios: dict[str, object] = {"ours / plain": "", "released / ours": ""}
        for a, b in [pair for pair in (("ours", "plain"), ("released", "ours")) if pair[0] in times]:
            ratios[f"{a} / {b}"] = statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        yield {"model": size, "rows": SIZES[size].rows, "precision": kind, "thoughts": thoughts, **medians, **ratios}


def alone_rows(form: Form, results: Results) -> Iterator[Row]:
    for size, kind in product(form.sizes, form.kinds):
        released: dict[str, Row] = {}
        for name, memory in form.alone:
            row = in_own_process("benchmarks.run", size, kind, name, memory, str(form.rounds - 1))
            if name in RELEASED:
                released[name] = row
            ratios = {
                f"{column}: {other} / this": released[other][column] / row[column] if other in released else ""
                for column, other in product(("step", "memory"), RELEASED)
                if other in dict(form.alone)
            }
            yield {"model": size, "precision": kind, "implementation": name, "freed memory": memory, **row, **ratios}


def answer_rows(form: Form, results: Results) -> Iterator[Row]:
    for size, kind in product(form.sizes, form.kinds):
        released, ours = (statistics.median(times) for times in answer_times(size, 3, kind, form.answer_rounds))
        yield {"model": size, "precision": kind, "released": released, "ours": ours, "released / ours": released / ours}


def loading_rows(form: Form, results: Results) -> Iterator[Row]:
    usual = [row for row in results["training"] if (row["precision"], row["thoughts"]) == USUAL]
    for size, step_seconds in {row["model"]: row["ours"] for row in usual}.items():
        share, spent = padding_and_loading(size, 3)
        cells = {"padding, %": 100 * share, "loading, ms": 1000 * spent, "of a step, %": 100 * spent / step_seconds}
        yield {"model": size, "rows": SIZES[size].rows, **cells}


def agreement_rows(form: Form, results: Results) -> Iterator[Row]:
    for size in form.sizes:
        loss, gradient, same = agreement(size, 3)
        yield {"model": size, "loss differs by": f"{loss:.1e}", "gradient by": f"{gradient:.1e}", "same answers": same}


PARTS: dict[str, tuple[str, Callable[[Form, Results], Iterator[Row]]]] = {
    "agreement": ("Released and ours, relative differences, 3 thoughts", agreement_rows),
    "training": ("Training step, seconds", training_rows),
    "alone": ("Training step, each in a process of its own, 3 thoughts: seconds, seconds of all cores in the kernel, "
              "largest resident set in GiB", alone_rows),
    "answers": (f"Answering, seconds a question, 3 thoughts and {NEW_TOKENS} tokens; released one by one, "
                f"ours {QUESTIONS} at once", answer_rows),
    "loading": ("Batches, 3 thoughts", loading_rows),
}  # fmt: skip


def report(form: Form, folder: Path | None) -> None:
    keep_freed_memory()
    print(f"{date.today()}, {machine()}")
    results: Results = {}
    for name, (title, rows) in PARTS.items():
        results[name] = print_table(title, rows(form, results))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "performance.json", {"date": str(date.today()), "machine": machine(), **results})
        plot(results["training"], folder / "performance.png")
        print(f"\n{folder}/performance.json and performance.png hold this.")


def print_table(title: str, rows: Iterable[Row]) -> list[Row]:
    """Print the rows of a table as they are measured, and return them."""
    print(f"\n{title}\n")
    printed: list[Row] = []
    for row in rows:
        if not printed:
            print(f"| {' | '.join(row)} |\n|{' --- |' * len(row)}")
        printed.append(row)
        print(f"| {' | '.join(map(_cell, row.values()))} |", flush=True)
    return printed


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(rows: list[Row], file: Path) -> None:
    """Ours as a multiple of plain fine-tuning over the number of thoughts: one panel a precision, one line a model."""
    figure = new_figure(620, 260)
    for place, kind in enumerate(dict.fromkeys(row["precision"] for row in rows)):
        axes = figure.add_subplot(1, 2, place + 1)
        for colour, size in zip(("blue", "green", "red"), dict.fromkeys(row["model"] for row in rows), strict=False):
            of_size = [row for row in rows if (row["model"], row["precision"]) == (size, kind)]
            points = [(row["thoughts"], row["ours / plain"]) for row in of_size]
            axes.plot(*zip(*points, strict=True), color=LIGHT[colour], marker="o", markersize=3, label=f"{size} layers")
        axes.set(title=kind, xlabel="thoughts", ylabel="times plain fine-tuning", ylim=(0, None))
        axes.axhline(1, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
        axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    save_png(figure, file)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    return f"{names[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    match sys.argv[1:]:
        case [size, kind, name, memory, rounds]:
            print(json.dumps(steps_alone(size, kind, name, memory, int(rounds))))
        case []:
            report(SHORT, None)
        case [text] if text.startswith("full="):
            report(FULL, Path(text.removeprefix("full=")))
        case other:
            sys.exit(f"error: {' '.join(other)} came. Usage: python -m benchmarks.run [full=FOLDER]")


if __name__ == "__main__":
    main()
