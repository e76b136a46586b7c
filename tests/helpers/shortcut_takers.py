"""A small model that has learned a shortcut, and nothing else: it answers with the option that is named last."""

from __future__ import annotations

from random import Random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.data.batching import collate
from coconut.data.examples import Example
from coconut.data.sequences import layout
from coconut.data.tokenization import build_word_tokenizer, encode_questions, encode_texts
from coconut.methods import THOUGHTS, Form, PromptFormat, Reasoning
from coconut.tasks import prosqa
from helpers.models import ARCHITECTURES
from helpers.runs import graph_rows

FORM = PromptFormat("{}", "{} ", "### {}")
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
    tokenizer = build_word_tokenizer(examples, FORM)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=None, **ARCHITECTURES["llama"])
    reasoning = Reasoning(num_thoughts=1, steps_cut=None, max_new_tokens=4, format=FORM)
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning)
    questions = encode_questions(tokenizer, [example.question for example in examples], FORM)
    answers = encode_texts(tokenizer, [PromptFormat.fill(FORM.answer, example.answer) for example in examples])
    form = Form(THOUGHTS, True, 1, steps_cut=None)
    segments = zip(questions, ([*answer, lm.special.eos] for answer in answers), strict=True)
    rows = [layout(each, form, lm.special) for each in segments]
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    for update in range(UPDATES):
        batch = collate(Random(update).sample(rows, BATCH_SIZE), lm.special)
        loss = lm(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()
