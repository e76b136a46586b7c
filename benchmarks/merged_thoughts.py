"""An update of CoLaR and of C-MTP against updates of Coconut, CODI and CoT on the same examples.

    python -m benchmarks.merged_thoughts [rows=32] [rounds=5] [layers=2]

Forward and backward of all terms, without the optimizer, on chains of three steps of eight tokens: the medians of all
rounds, and the median of their ratios to CoT in the same round. GPT-2's width and vocabulary, `layers` layers.
OMP_NUM_THREADS sets the number of cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from benchmarks.baselines import Size, make_model
from benchmarks.parallel_thoughts import numbers_of, print_medians
from benchmarks.run import in_turn
from coconut.data.batching import Batch, micro_batches
from coconut.data.sequences import EpochView
from coconut.data.tokenization import TokenizedData
from coconut.engine.base import TermSums, keep_freed_memory
from coconut.engine.world import World
from coconut.methods import Curriculum, plan
from coconut.objectives.training_model import TrainingModel

QUESTION, STEP, STEPS, ANSWER = 60, 8, 3, 4  # tokens


def make_examples(rows: int) -> TokenizedData:
    lengths = [QUESTION, *[STEP] * STEPS, ANSWER]
    tokens = np.random.default_rng(0).integers(100, 50_000, (rows, sum(lengths)))
    return TokenizedData.from_lists(list(tokens), [lengths] * rows, np.ones(rows, np.int64))


def prepare(method: str, rows: int, layers: int) -> tuple[TrainingModel, Batch]:
    """The model in the last stage of a method, and its batch."""
    lm = make_model(Size(layers, 768, 12, rows))
    its = plan(method, Curriculum(max_stage=STEPS, num_thoughts=6 if method == "codi" else None))
    stage = its.stages[-1]
    lm.add_rates(stage.form.slot.max_group)
    lm.feedback = lm.new_feedback(stage.form.slot)
    (batch,) = micro_batches(EpochView(make_examples(rows), its, stage, lm.special, 0, 0), np.arange(rows), rows)
    return TrainingModel(lm, its).train(), batch


def update(module: TrainingModel, batch: Batch) -> None:
    module.zero_grad()
    TermSums(module.loss, [batch], World()).add(module(batch)).backward()


def main(arguments: Iterable[str]) -> None:
    rows, rounds, layers = numbers_of(arguments, rows=32, rounds=5, layers=2)
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"An update of {rows} rows, GPT-2 of {layers} x 768, {STEPS} steps of {STEP} tokens")
    works, notes = {}, {}
    for method in ("cot", "coconut", "codi", "colar", "c_mtp"):
        module, batch = prepare(method, rows, layers)
        works[method] = partial(update, module, batch)
        notes[method] = f"{batch.passes} passes, {int(batch.attention_mask.sum())} tokens"
    print_medians(in_turn(works, rounds), "cot", notes)


if __name__ == "__main__":
    main(sys.argv[1:])
