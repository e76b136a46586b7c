"""A small model that has learned a shortcut, and nothing else: it answers with the option that is named last."""

from __future__ import annotations

from random import Random

import torch

from coconut import LatentLM
from coconut.data.batching import collate
from coconut.data.examples import Example
from coconut.tasks import prosqa
from helpers.memorizing import training_rows, update, word_model
from helpers.runs import graph_rows

UPDATES, BATCH_SIZE = 160, 16


def graph_examples(seed: int, count: int) -> list[Example]:
    return [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed, count)]


def right_named_last(example: Example) -> Example:
    """The example with its options in the order in which the right one comes last."""
    parsed = prosqa.parse_question(example.question)
    (other,) = {*parsed.options} - {example.answer}
    question = prosqa.with_query(example.question, parsed.root, (other, example.answer))
    return Example(question, example.steps, example.answer)


def last_option_model() -> LatentLM:
    """Trained on graphs in which the right option is always named last. It has one thought."""
    torch.manual_seed(0)
    examples = [right_named_last(example) for example in graph_examples(seed=1, count=300)]
    lm = word_model(examples, num_thoughts=1)
    rows = training_rows(lm, examples)
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    for number in range(UPDATES):
        update(lm, optimizer, collate(Random(number).sample(rows, BATCH_SIZE), lm.special))
    return lm.eval()
