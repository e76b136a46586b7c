"""What each thought adds to the right answer.

The prefix value of the first k thoughts is V_k = log p(right answer | question, the first k thoughts, <eot>), and
V_k - V_(k-1) is what thought k adds. That is no implicit reward: a deterministic thought has no probability, no
reference model is asked, and the answer must be known. It is how sure the model is of the answer, not how good the
thought is.

Shapes: N questions, K thoughts, C = K + 1 numbers of thoughts; M tokens of the answers in a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coconut.data.batching import collate
from coconut.data.sequences import Layout, slot_with_markers
from coconut.data.tokenization import encode_questions
from coconut.generation.generate import longest_first
from coconut.methods import PromptFormat
from coconut.models.losses import target_log_probs
from coconut.runs.study import NotApplicable, Study
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from coconut.analysis.probes import Subject
    from coconut.models.latent_lm import LatentLM

RESAMPLES = 2000
FEW = 10  # questions of as many steps, below which they have no rows of their own


def prefix_values(subject: Subject) -> Study:
    """Mean V_k for k = 0 .. K and what each thought adds, with 95 % bootstrap intervals over the questions.

    `of`: "answer", all of its text and the end of the sequence, right after <eot>; or "after_mark", what follows the
    prompt format's words before an answer, given those: a model that knows fewer thoughts may be about to write steps
    instead. `steps`: of all questions (None), and of those with as many. `gain` is None without a thought.

    Raises Unfit if the model has no latent thoughts, or an answer does not fit into its context.
    """
    subject.need_thoughts()
    lengths = [len(example.steps) for example in subject.examples]
    groups: list[tuple[int | None, np.ndarray]] = [(None, np.arange(len(lengths)))]
    for steps in sorted(set(lengths)):
        places = np.flatnonzero(np.array(lengths) == steps)
        if FEW <= len(places) < len(lengths):
            groups.append((steps, places))
    rows: list[dict[str, Any]] = []
    for of, values_NC in zip(("answer", "after_mark"), _values(subject), strict=True):
        for steps, places in groups:
            rows += [{"of": of, "steps": steps, **row} for row in _means(values_NC[places])]
    warning = None if subject.trained_with_fewer_thoughts else subject.warning
    return Study("prefix_values", rows, {"trained_thoughts": subject.num_trained_thoughts, "warning": warning})


def _means(values_NC: np.ndarray) -> list[dict[str, Any]]:
    """A row for each number of thoughts: the mean, and by pairs its difference from that with one thought fewer."""
    N, C = values_NC.shape
    both = np.concatenate([values_NC, np.diff(values_NC, axis=1)], axis=1)
    resampled = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=RESAMPLES) @ both / N
    bounds = [both.mean(0).tolist(), *np.quantile(resampled, (0.025, 0.975), axis=0).tolist()]
    rows = []
    for k in range(C):
        value, low, high = (bound[k] for bound in bounds)
        gain, gain_low, gain_high = (bound[C + k - 1] if k else None for bound in bounds)
        rows.append({"thoughts": k, "questions": N, "value": value, "low": low, "high": high, "gain": gain,
                     "gain_low": gain_low, "gain_high": gain_high})  # fmt: skip
    return rows


@torch.no_grad()
def _values(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) twice: log-probabilities of the whole answers, and of what follows their mark."""
    lm = subject.lm
    questions = encode_questions(lm.tokenizer, [e.question for e in subject.examples], lm.reasoning.format)
    answers, marks = encoded_answers(lm, [e.answer for e in subject.examples])
    slot = len(slot_with_markers(lm.reasoning, lm.special, subject.num_trained_thoughts))
    lengths = [len(asks) + slot + len(said) for asks, said in zip(questions, answers, strict=True)]
    if too_long := [i for i, length in enumerate(lengths) if length > lm.max_sequence_length]:
        raise NotApplicable(
            f"{len(too_long)} of {len(lengths)} answers are, with their questions and thoughts, longer than the "
            f"model's context of {lm.max_sequence_length} tokens; the first is that to question {too_long[0] + 1} "
            f"({lengths[too_long[0]]})."
        )
    whole_NC, after_NC = np.zeros((2, len(questions), subject.num_trained_thoughts + 1))
    with eval_mode(lm):
        for places in longest_first(questions, subject.batch_size):
            for count in range(subject.num_trained_thoughts + 1):
                rows = [_layout(lm, questions[i], count, answers[i]) for i in places]
                batch = collate(rows, lm.special).to(lm.device)
                out: Any = lm(batch.input_ids, batch.attention_mask, labels=batch.labels, return_target_logits=True)
                logits_MV = out.target_logits
                logits_MV[:, lm.special.added] = -torch.inf  # they are never said
                log_probs_M = target_log_probs(logits_MV, out.targets).double().cpu()
                for i, found in zip(places, log_probs_M.split([len(answers[i]) for i in places]), strict=True):
                    whole_NC[i, count] = float(found.sum())
                    after_NC[i, count] = float(found[marks[i] :].sum())
    return whole_NC, after_NC


def _layout(lm: LatentLM, question: Sequence[int], count: int, answer: Sequence[int]) -> Layout:
    before = [*question, *slot_with_markers(lm.reasoning, lm.special, count)]
    anchor = len(question) + lm.reasoning.markers
    return Layout(np.array([*before, *answer], np.int32), num_prompt=len(before), slot_start=anchor)


def encoded_answers(lm: LatentLM, golds: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Token ids of each answer as it is trained, and how many of them stand before what differs between answers."""
    template = lm.reasoning.format.answer
    texts = [PromptFormat.fill(template, gold) for gold in golds]
    encoded: Any = lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    begin = len(template.split("{}")[0])
    marks = [sum(right <= begin for _, right in spans) for spans in encoded["offset_mapping"]]
    return [[*ids, lm.special.eos] for ids in encoded["input_ids"]], marks
