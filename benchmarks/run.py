"""Time and memory of training steps and answers, against the released way and plain fine-tuning.

    python -m benchmarks.run                     the short form, in float32
    python -m benchmarks.run full=FOLDER         all sizes, thoughts and precisions; a table and a plot into FOLDER

What is measured is in benchmarks/ways.py. First it is seen that the released way and ours agree in loss, gradient and
answers; then the ways are timed in one process in turn, forward and backward without the optimizer, and the medians are
printed, with the ratio to plain fine-tuning and to the released way of the same round; all of them keep freed memory
(coconut.engine.base.keep_memory). Then each is run in a process of its own, the released way as its user would (in the
full form `indexed`, too, which is nearer to its code), and ours with freed memory given back, kept, and kept with the
layers' activations recomputed. OMP_NUM_THREADS says on how many cores.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ways import (
    NEW_TOKENS,
    SIZES,
    WAYS,
    make_batch,
    make_batches,
    make_data,
    make_model,
    make_view,
    our_answers,
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


def step(way: str, lm: LatentLM, batch: Batch, kind: str) -> float:
    lm.zero_grad(set_to_none=True)
    with precision(kind):
        loss = WAYS[way](lm, batch)
    loss.backward()
    return loss.item()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and those that all threads spent in the kernel."""
    before, start = os.times().system, time.perf_counter()
    work()
    return time.perf_counter() - start, os.times().system - before


def seconds(work: Callable[[], object]) -> float:
    return timed(work)[0]


# --- that the ways are the same ---------------------------------------------------------------------


def agreement(size: str, thoughts: int) -> tuple[float, float, str]:
    """Relative differences of loss and gradient of the released way and ours, and how many answers are the same."""
    lm = make_model(SIZES[size])
    batch = make_batch(lm, make_data(64), thoughts, 2)
    found: list[tuple[float, dict[str, Tensor]]] = []
    for way in ("released", "ours"):
        loss = step(way, lm, batch, "float32")
        found.append((loss, {name: weight.grad for name, weight in lm.named_parameters() if weight.grad is not None}))
    (theirs, before), (mine, after) = found
    apart = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    norm = sum(float(gradient.square().sum()) for gradient in before.values()) ** 0.5
    rows = questions(2)
    same = [released_answer(lm.eval(), torch.tensor(row), thoughts) for row in rows]
    our = our_answers(lm, *pad_rows(rows, lm.special.pad), thoughts)
    agree = sum(a == b for a, b in zip(same, our, strict=True))
    return abs(mine - theirs) / theirs, apart / norm, f"{agree} of {len(rows)}"


def questions(count: int) -> list[list[int]]:
    data = make_data(count)
    return [data.question(i).tolist() for i in range(count)]


# --- time -------------------------------------------------------------------------------------------


def in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if number:
                taken[name].append(spent)
    return taken


def train_times(size: str, thoughts: int, kind: str, ways: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step in each round."""
    lm = make_model(SIZES[size])
    batches = make_batches(lm, thoughts, SIZES[size].rows)
    return in_turn({way: partial(step, way, lm, batches[way], kind) for way in ways}, rounds)


def answer_times(size: str, thoughts: int, kind: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a question: the released way on another one in each round, ours on all QUESTIONS at once, in turn."""
    lm = make_model(SIZES[size]).eval()
    rows = questions(QUESTIONS)
    ids, mask = pad_rows(rows, lm.special.pad)
    theirs, mine = [], []
    with precision(kind):
        our_answers(lm, ids[:2], mask[:2], thoughts)
        for row in rows[:rounds]:
            theirs.append(seconds(lambda row=row: released_answer(lm, torch.tensor(row), thoughts)))
            mine.append(seconds(lambda: our_answers(lm, ids, mask, thoughts)) / QUESTIONS)
    return theirs, mine


def padding_and_loading(size: str, thoughts: int) -> tuple[float, float]:
    """Share of padding among the columns of an epoch's batches, and seconds to make one of them."""
    lm = make_model(replace(SIZES[size], layers=1, width=8, heads=1))
    view = make_view(lm, make_data(4096), thoughts)
    rows = SIZES[size].rows
    start = time.perf_counter()
    batches = epoch_batches(view, rows, seed=0, epoch=0)
    made = [next(micro_batches(view, batch, rows)) for batch in batches]
    spent = (time.perf_counter() - start) / len(batches)
    return padding(made), spent


def padding(batches: Sequence[Batch]) -> float:
    """Share of the columns."""
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return 1 - tokens / sum(batch.attention_mask.numel() for batch in batches)


# --- memory -----------------------------------------------------------------------------------------


def largest() -> int:
    """Bytes of this process's largest resident set. getrusage would count its parent's, from before the exec."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def steps_alone(size: str, kind: str, way: str, how: str, rounds: int) -> Row:
    """Medians of so many steps of this process, after one that is not counted, and its largest resident set in GiB."""
    if how != "given back":
        keep_freed_memory()
    lm = make_model(SIZES[size])
    lm.activation_checkpointing = how == "recomputed"
    thoughts = 3
    batch = make_batches(lm, thoughts, SIZES[size].rows)[way]
    spent, system = zip(*[timed(lambda: step(way, lm, batch, kind)) for _ in range(rounds + 1)], strict=True)
    return {"step": statistics.median(spent[1:]), "kernel": statistics.median(system[1:]), "memory": largest() / GIB}


def elsewhere(*arguments: str) -> Any:
    """What `main` prints for these arguments in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


# --- the report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What is measured: `sizes` with their numbers of thoughts, in which precisions, for which numbers of thoughts the
    released way too, which ways in a process of their own and with what memory, how often, and how often answers.
    """

    sizes: dict[str, tuple[int, ...]]
    kinds: tuple[str, ...]
    released: tuple[int, ...]
    alone: tuple[tuple[str, str], ...]
    rounds: int
    asked: int


IN_TURN = ("released", "plain", "ours")
THEIRS = ("released", "indexed")
BOTH = (("released", "given back"), ("ours", "kept"))
SHORT = Form({"2 x 768": (3, 12), "12 x 768": (3,)}, ("float32",), (3,), BOTH, 2, 1)
FULL = Form(
    dict.fromkeys(SIZES, (0, 3, 6, 12)),
    ("float32", "bfloat16"),
    (3,),
    (BOTH[0], ("indexed", "given back"), BOTH[1], ("plain", "kept"), ("ours", "given back"), ("ours", "recomputed")),
    3,
    3,
)
Row = dict[str, Any]
Found = dict[str, list[Row]]  # what was measured so far, by its part
USUAL = ("float32", 3)  # precision and thoughts


def training_rows(form: Form, found: Found) -> Iterator[Row]:
    cases = [(size, kind, k) for size, kind in product(form.sizes, form.kinds) for k in form.sizes[size]]
    for size, kind, thoughts in cases:
        ways = [way for way in IN_TURN if way != "released" or thoughts in form.released]
        taken = train_times(size, thoughts, kind, ways, form.rounds)
        medians = {way: statistics.median(taken[way]) if way in taken else "" for way in IN_TURN}
        ratios = {
            f"{a} / {b}": statistics.median(x / y for x, y in zip(taken[a], taken[b], strict=True))
            if a in taken
            else ""
            for a, b in (("ours", "plain"), ("released", "ours"))
        }
        yield {"model": size, "rows": SIZES[size].rows, "precision": kind, "thoughts": thoughts, **medians, **ratios}


def alone_rows(form: Form, found: Found) -> Iterator[Row]:
    for size, kind in product(form.sizes, form.kinds):
        theirs: dict[str, Row] = {}
        for way, how in form.alone:
            took = elsewhere(size, kind, way, how, str(form.rounds - 1))
            if way in THEIRS:
                theirs[way] = took
            ratios = {
                f"{name}: {their} / this": theirs[their][name] / took[name] if their in theirs else ""
                for name, their in product(("step", "memory"), THEIRS)
                if their in dict(form.alone)
            }
            yield {"model": size, "precision": kind, "way": way, "memory is": how, **took, **ratios}


def answer_rows(form: Form, found: Found) -> Iterator[Row]:
    for size, kind in product(form.sizes, form.kinds):
        theirs, mine = (statistics.median(values) for values in answer_times(size, 3, kind, form.asked))
        yield {"model": size, "precision": kind, "released": theirs, "ours": mine, "released / ours": theirs / mine}


def loading_rows(form: Form, found: Found) -> Iterator[Row]:
    whole_of = {row["model"]: row["ours"] for row in found["training"] if (row["precision"], row["thoughts"]) == USUAL}
    for size, whole in whole_of.items():
        share, spent = padding_and_loading(size, 3)
        took = {"padding, %": 100 * share, "loading, ms": 1000 * spent, "of a step, %": 100 * spent / whole}
        yield {"model": size, "rows": SIZES[size].rows, **took}


def agreement_rows(form: Form, found: Found) -> Iterator[Row]:
    for size in form.sizes:
        loss, gradient, same = agreement(size, 3)
        yield {"model": size, "loss differs by": f"{loss:.1e}", "gradient by": f"{gradient:.1e}", "same answers": same}


PARTS: dict[str, tuple[str, Callable[[Form, Found], Iterator[Row]]]] = {
    "agreement": ("Released and ours, relative differences, 3 thoughts", agreement_rows),
    "training": ("Training step, seconds", training_rows),
    "alone": ("Training step, each in a process of its own, 3 thoughts: seconds, those of both cores in the kernel, "
              "largest resident set in GiB", alone_rows),
    "answers": (f"Answering, seconds a question, 3 thoughts and {NEW_TOKENS} tokens; released one by one, "
                f"ours {QUESTIONS} at once", answer_rows),
    "loading": ("Batches, 3 thoughts", loading_rows),
}  # fmt: skip


def report(form: Form, folder: Path | None) -> None:
    keep_freed_memory()
    print(f"{date.today()}, {machine()}")
    found: Found = {}
    for name, (title, rows) in PARTS.items():
        found[name] = shown(title, rows(form, found))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "performance.json", {"date": str(date.today()), "machine": machine(), **found})
        plot(found["training"], folder / "performance.png")
        print(f"\n{folder}/performance.json and performance.png hold this.")


def shown(title: str, rows: Iterable[Row]) -> list[Row]:
    """Prints the rows of a table as they come, and gives them back."""
    print(f"\n{title}\n")
    found: list[Row] = []
    for row in rows:
        if not found:
            print(f"| {' | '.join(row)} |\n|{' --- |' * len(row)}")
        found.append(row)
        print(f"| {' | '.join(map(_cell, row.values()))} |", flush=True)
    return found


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(rows: list[Row], file: Path) -> None:
    """Ours in multiples of plain fine-tuning, over the number of thoughts: a panel a precision, a line a model."""
    figure = new_figure(620, 260)
    for place, kind in enumerate(dict.fromkeys(row["precision"] for row in rows)):
        axes = figure.add_subplot(1, 2, place + 1)
        for colour, size in zip(("blue", "green", "red"), dict.fromkeys(row["model"] for row in rows), strict=False):
            mine = [row for row in rows if (row["model"], row["precision"]) == (size, kind)]
            points = [(row["thoughts"], row["ours / plain"]) for row in mine]
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
        case [size, kind, way, how, rounds]:
            print(json.dumps(steps_alone(size, kind, way, how, int(rounds))))
        case []:
            report(SHORT, None)
        case [text] if text.startswith("full="):
            report(FULL, Path(text.removeprefix("full=")))
        case other:
            sys.exit(f"error: {' '.join(other)} came. Usage: python -m benchmarks.run [full=FOLDER]")


if __name__ == "__main__":
    main()
