"""A training step of every method, in multiples of the plain step of the same examples' written chains.

    python -m benchmarks.methods [methods=codi,pccot] [thoughts=6] [size="12 x 768"] [precision=float32] [rounds=3]

The examples are as long as ProsQA's (benchmarks/baselines.py). Each method is in its last stage, so that all steps are
replaced. *plain* is ordinary fine-tuning on question, chain and answer: one pass, logits at the targets alone. A method
with a teacher also trains on that, so that it cannot be much below 2. All are measured in turn in one process, forward
and backward without the optimizer; printed are the medians, and the median of the ratios in the same round. pccot, kava
and lotus have 3 iterations. The decoder of sim_cot and sim_cot_codi is a copy of the first two layers.
OMP_NUM_THREADS sets the number of cores.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.baselines import SIZES, Size, make_data, make_model, padded_right
from benchmarks.run import in_turn, machine, precision, step
from coconut import LatentLM
from coconut.data.batching import Batch, epoch_batches, micro_batches
from coconut.engine.base import keep_freed_memory
from coconut.methods import METHODS, Curriculum, Plan, plan
from coconut.objectives.training_model import TrainingModel
from coconut.training.prepare import plain_view

STEPS = 3  # of the chain, that are replaced
DECODER_LAYERS = 2
OPTIONS = {name: {"steps": {"layers": DECODER_LAYERS}} for name in ("sim_cot", "sim_cot_codi")}
MADE_FROM_CHAIN = ("icot", "hybrid_warmup")  # forms of the written chain, with a step of cot or no_cot


def plan_of(method: str, thoughts: int) -> Plan:
    entry = METHODS[method]
    its_length: dict[str, Any] = {"num_thoughts": thoughts} if entry.fixed_length else {}
    curriculum = Curriculum(max_stage=STEPS, total_length=50, thoughts_per_step=thoughts // STEPS, **its_length)
    return plan(method, curriculum, options=OPTIONS.get(method))


def batch_of(lm: LatentLM, plan: Plan, rows: int) -> Batch:
    view = plain_view(make_data(512), plan, plan.stages[-1], lm)
    chosen = epoch_batches(view, rows, seed=0, epoch=0)[0]
    return next(micro_batches(view, chosen, rows))


def step_of(method: str, thoughts: int, size: Size, kind: str) -> Callable[[], object]:
    """A training step on one update's rows."""
    its = plan_of(method, thoughts)
    lm = make_model(size)
    lm.feedback = lm.new_feedback(its.stages[-1].form.slot)
    lm.add_rates(its.stages[-1].form.slot.max_group, "random")
    model = TrainingModel(lm, its).train()
    batch = batch_of(lm, its, size.rows)
    weights = torch.tensor(model.loss.weights) / torch.tensor(batch.denominators)

    def work() -> float:
        model.zero_grad(set_to_none=True)
        with precision(kind):
            loss = (model(batch) * weights).sum()
        loss.backward()
        return loss.item()

    return work


def main(arguments: Iterable[str]) -> None:
    given = {"methods": "", "thoughts": "6", "size": "12 x 768", "precision": "float32", "rounds": "3"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in given or not value:
            sys.exit(f"{argument!r} is not KEY=VALUE with one of {', '.join(given)}.")
        given[key] = value
    methods = given["methods"].split(",") if given["methods"] else [m for m in METHODS if m not in MADE_FROM_CHAIN]
    thoughts, rounds = int(given["thoughts"]), int(given["rounds"])
    size, kind = SIZES[given["size"]], given["precision"]
    if thoughts % STEPS:
        sys.exit(f"thoughts={thoughts} is no multiple of {STEPS}, the steps that they replace.")
    keep_freed_memory()
    print(f"{machine()}; {size.rows} rows, GPT-2 of {given['size']}, {kind}, {thoughts} thoughts\n")
    lm = make_model(size)
    chain = padded_right(batch_of(lm, plan_of("cot", thoughts), size.rows), lm.special.pad)
    plain = partial(step, "plain", lm, chain, kind)
    print("| method | a step, s | plain, s | step / plain |\n| --- | ---: | ---: | ---: |")
    for method in methods:
        times = in_turn({"plain": plain, method: step_of(method, thoughts, size, kind)}, rounds)
        ratio = statistics.median(a / b for a, b in zip(times[method], times["plain"], strict=True))
        own, base = (statistics.median(times[name]) for name in (method, "plain"))
        print(f"| `{method}` | {own:.2f} | {base:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
