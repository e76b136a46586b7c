"""A small model with thoughts that has learned the answers to a few questions by heart."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.data.batching import collate
from coconut.data.examples import Example
from coconut.data.sequences import layout
from coconut.data.tokenization import build_word_tokenizer, encode_questions, encode_texts
from coconut.methods import THOUGHTS, Form, PromptFormat, Reasoning
from helpers.models import ARCHITECTURES
from helpers.runs import graph_rows

EXAMPLES = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=6, count=24)]
NUM_THOUGHTS = 3


def memorizing_model() -> LatentLM:
    """A small model that has memorized most of the examples and hardly needs its thoughts."""
    torch.manual_seed(0)
    form = PromptFormat("{}", "{} ", "### {}")
    tokenizer = build_word_tokenizer(EXAMPLES, form)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), bos_token_id=None, **ARCHITECTURES["llama"])
    reasoning = Reasoning(num_thoughts=NUM_THOUGHTS, steps_cut=None, max_new_tokens=4, format=form)
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning)
    questions = encode_questions(tokenizer, [example.question for example in EXAMPLES], form)
    answers = encode_texts(tokenizer, [PromptFormat.fill(form.answer, example.answer) for example in EXAMPLES])
    thinking = Form(THOUGHTS, True, NUM_THOUGHTS, steps_cut=None)
    segments = zip(questions, ([*ids, lm.special.eos] for ids in answers), strict=True)
    batch = collate([layout(each, thinking, lm.special) for each in segments], lm.special)
    optimizer = torch.optim.Adam(lm.parameters(), lr=5e-3)
    for _ in range(60):
        loss = lm(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()
