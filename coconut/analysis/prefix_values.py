"""Prefix values: how much each thought adds to the log-probability of the right answer.

The prefix value of the first k thoughts is V_k = log p(right answer | question, the first k thoughts, <eot>). Thought k
adds V_k - V_(k-1). This is not an implicit reward: a deterministic thought has no probability, there is no reference
model, and the right answer must be known. It measures the model's confidence in the answer, not the quality of the
thought.

Shapes: N questions, K thoughts, C = K + 1 numbers of thoughts; M tokens of the answers in a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from coconut.analysis.probes import Subject
from coconut.analysis.statistics import column_means, with_bounds
from coconut.data.batching import collate
from coconut.data.sequences import Layout, slot_with_markers
from coconut.data.tokenization import encode_answers
from coconut.generation.generate import longest_first
from coconut.models.latent_lm import LatentLM
from coconut.models.losses import target_log_probs
from coconut.runs.study import NotApplicable, Study
from coconut.utils.torch_utils import eval_mode

MIN_GROUP_SIZE = 10  # the fewest questions with the same number of steps that are reported as a group


def prefix_values(subject: Subject) -> Study:
    """Mean V_k for k = 0 .. K and what each thought adds, with 95 % bootstrap intervals over the questions.

    `of` names the tokens that count. "answer": the whole answer with the end of the sequence, right after <eot>.
    "after_mark": the tokens after the answer mark, given the mark; after few thoughts a model may be about to write
    steps and not the mark. `steps`: the number of steps of the questions, None for all questions. `gain`: what the
    last thought adds, None for 0 thoughts. `left`: what all further thoughts add.

    Raises NotApplicable if the model has no latent thoughts, or an answer does not fit into its context.
    """
    subject.need_thoughts()
    lengths_N = np.array([len(example.steps) for example in subject.examples])
    counts = zip(*np.unique(lengths_N, return_counts=True), strict=True)
    groups = [int(steps) for steps, count in counts if MIN_GROUP_SIZE <= count < len(lengths_N)]
    rows: list[dict[str, Any]] = []
    for of, values_NC in zip(("answer", "after_mark"), _values(subject), strict=True):
        rows += [{"of": of, "steps": None, **row} for row in _means(values_NC)]
        for steps in groups:
            rows += [{"of": of, "steps": steps, **row} for row in _means(values_NC[lengths_N == steps])]
    warning = None if subject.trained_with_fewer_thoughts else subject.warning
    return Study("prefix_values", rows, {"trained_thoughts": subject.num_trained_thoughts, "warning": warning})


def _means(values_NC: np.ndarray) -> list[dict[str, Any]]:
    """A row for each number of thoughts: the mean value, and its mean paired difference from one thought fewer."""
    N, C = values_NC.shape
    steps_NC = np.diff(values_NC, axis=1)
    of_columns = column_means(np.concatenate([values_NC, steps_NC, values_NC[:, -1:] - values_NC], axis=1))
    rows = []
    for k in range(C):
        value, low, high = of_columns[k]
        gain = of_columns[C + k - 1] if k else None
        rows.append({"thoughts": k, "questions": N, "value": value, "low": low, "high": high,
                     **with_bounds("gain", gain), **with_bounds("left", of_columns[2 * C - 1 + k])})  # fmt: skip
    return rows


@torch.no_grad()
def _values(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities (N, C) of the whole answers, and those of the tokens after the answer mark."""
    lm, questions = subject.lm, subject.question_ids
    golds = [example.answer for example in subject.examples]
    answers, mark_lengths = encode_answers(lm.tokenizer, golds, lm.reasoning.format)
    rows = [layout_with_slot(lm, *pair, subject.num_trained_thoughts) for pair in zip(questions, answers, strict=True)]
    lengths = [len(row.ids) for row in rows]
    if too_long := [i for i, length in enumerate(lengths) if length > lm.max_sequence_length]:
        raise NotApplicable(
            f"{len(too_long)} of {len(lengths)} answers, with their questions and thoughts, exceed the model's "
            f"context of {lm.max_sequence_length} tokens. The first is the answer to question {too_long[0] + 1} "
            f"({lengths[too_long[0]]} tokens)."
        )
    answer_NC, after_mark_NC = np.zeros((2, len(questions), subject.num_trained_thoughts + 1))
    with eval_mode(lm):
        for indices in longest_first(questions, subject.batch_size):
            for count in range(subject.num_trained_thoughts + 1):
                batch = collate(
                    [layout_with_slot(lm, questions[i], answers[i], count) for i in indices], lm.special
                ).to(lm.device)
                out: Any = lm(batch.input_ids, batch.attention_mask, labels=batch.labels, return_target_logits=True)
                logits_MV = out.target_logits
                logits_MV[:, lm.special.added] = -torch.inf  # generation never produces the added tokens
                log_probs_M = target_log_probs(logits_MV, out.targets).double().cpu()
                by_answer = log_probs_M.split([len(answers[i]) for i in indices])
                for i, log_probs_L in zip(indices, by_answer, strict=True):
                    answer_NC[i, count] = float(log_probs_L.sum())
                    after_mark_NC[i, count] = float(log_probs_L[mark_lengths[i] :].sum())
    return answer_NC, after_mark_NC


def layout_with_slot(lm: LatentLM, question: Sequence[int], answer: Sequence[int], count: int) -> Layout:
    """A question, `count` positions of the slot with the markers, and an answer."""
    before = [*question, *slot_with_markers(lm.reasoning, lm.special, count)]
    slot_start = len(question) + lm.reasoning.markers
    return Layout(np.array([*before, *answer], np.int32), num_prompt=len(before), slot_start=slot_start)
