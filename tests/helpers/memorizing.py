"""A small model with thoughts that has learned the answers to a few questions by heart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.data.batching import Batch, collate
from coconut.data.examples import Example
from coconut.data.sequences import Layout, layout
from coconut.data.tokenization import build_word_tokenizer, encode_questions, encode_texts
from coconut.methods import THOUGHTS, Form, PromptFormat, Reasoning
from helpers.models import ARCHITECTURES
from helpers.runs import graph_rows

EXAMPLES = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=6, count=24)]
NUM_THOUGHTS = 3


FORM = PromptFormat("{}", "{} ", "### {}")


def word_model(examples: Sequence[Example], num_thoughts: int, **sizes: int) -> LatentLM:
    """A small model with new weights, thoughts and a tokenizer for the words of these examples."""
    tokenizer = build_word_tokenizer(examples, FORM)
    sizes = {**ARCHITECTURES["llama"], **sizes}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=None, **sizes)
    reasoning = Reasoning(num_thoughts=num_thoughts, steps_cut=None, max_new_tokens=4, format=FORM)
    return LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning)


def training_rows(lm: LatentLM, examples: Sequence[Example]) -> list[Layout]:
    """The examples as the model is trained on them, with the answer right after its thoughts."""
    questions = encode_questions(lm.tokenizer, [example.question for example in examples], FORM)
    answers = encode_texts(lm.tokenizer, [PromptFormat.fill(FORM.answer, example.answer) for example in examples])
    thinking = Form(THOUGHTS, True, lm.reasoning.num_thoughts, steps_cut=None)
    segments = zip(questions, ([*ids, lm.special.eos] for ids in answers), strict=True)
    return [layout(each, thinking, lm.special) for each in segments]


def update(lm: LatentLM, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One update of a training."""
    loss = lm(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def memorizing_model() -> LatentLM:
    """A small model that has memorized most of the examples and hardly needs its thoughts."""
    torch.manual_seed(0)
    lm = word_model(EXAMPLES, NUM_THOUGHTS)
    batch = collate(training_rows(lm, EXAMPLES), lm.special)
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    for _ in range(60):
        update(lm, optimizer, batch)
    return lm.eval()
