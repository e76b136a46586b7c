"""Hybrid roll-outs: how varied the sampled answers to a question are after each number of thoughts, and how good.

The model takes j thoughts, and the rest is sampled in words (Cui et al., arXiv 2602.22441). Thoughts are deterministic,
so that all variety comes from the words after them.

Shapes: Q questions, N answers to each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import entropy

from coconut.analysis.graph_paths import GraphQuestion
from coconut.analysis.probes import Subject
from coconut.analysis.statistics import with_bounds
from coconut.data.tokenization import encode_texts
from coconut.evaluation.config import Sampling
from coconut.evaluation.gold_answers import ROOM
from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.metrics_at_k import majority_at, pass_at
from coconut.evaluation.sampling import evaluate_samples
from coconut.methods import METHODS, NOTHING, PromptFormat, Reasoning
from coconut.models.latent_lm import LatentLM
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import Task, chain, prosqa

NUM_SAMPLES = 32  # answers to a question
NUM_QUESTIONS = 100  # the first ones
TEMPERATURE = 1.0
BATCH = 4  # answers at a time, as a multiple of the questions at a time: those to one question share its prompt
SEED = 0
WRITTEN = 0.25  # the least share of answers with steps where the chain is written
SHARES = ("pass_1", "pass_n", "maj_n", "with_steps", "unreadable", "truncated")  # the other measures are counts
OF_GRAPH = ("ahead", "ahead_found")

Answers = Sequence[Sequence[dict[str, Any]]]  # of each question; each answer as the fields of its Prediction
Values = dict[str, np.ndarray]  # (Q,) by measure; NaN for a question that has no such value


def rollouts(subject: Subject) -> Study:
    """Sample NUM_SAMPLES answers to each question after 0 .. K thoughts (Cui et al., arXiv 2602.22441).

    Pauses count as thoughts, and of thoughts that are updated all at once j are j positions. A method without a slot
    has the row of 0 thoughts only. Where the same weights learn to write the chain without a slot, as the teacher of
    their method, they do so in rows with `chain`. The random numbers of an answer are the same in all rows.

    A row for each number of thoughts and `measure`, with its mean `value` over questions and the 95 % bootstrap
    interval, `low` to `high`; `change`, the paired difference from 0 thoughts; `to_chain`, that from the written chain.

    `next_steps`: how many different next steps the answers have (see `next_step`). `answers`: how many different
    answers, by the task's key; those that cannot be read do not count. `effective_...`: exp of the entropy of their
    shares, which is less dependent on the number of samples. `pass_1`, `pass_n`, `maj_n`: accuracy of one sample, of
    any of all, of their majority vote. `with_steps`, `unreadable`, `truncated`: shares of the answers. `ahead`: how
    many next steps the graph allows (see `steps_ahead`), and `ahead_found`: how many of these are sampled; both over
    the questions whose target is not reached, and left out where there is no graph or no next step.

    facts: `samples`, `temperature`, `trained_thoughts`, `trained_with_fewer`, `warning`; `written_chain`: whether the
    chain is written in rows with `chain` ("without slot"), or else in those of 0 thoughts ("0 thoughts"), or in neither
    (None). It is where the share of answers with steps is at least WRITTEN; short questions may have no step to write.

    Raises NotApplicable for a hybrid model, which chooses by itself whether it thinks.
    """
    lm, own = subject.lm, subject.lm.reasoning
    if own.modes:
        raise NotApplicable(
            f"{own.method} chooses by its first token how it answers, so there is no number of thoughts to force. "
            "Leave out parts: its modes are compared then."
        )
    K = 0 if own.slot.is_empty else subject.num_trained_thoughts
    found: dict[tuple[bool, int], Values] = {}
    method = METHODS.get(own.method)
    if method and method.teacher:
        with writing_the_chain(lm):
            found[True, 0] = _values(subject, sampled(subject, 0, _limit_of_chains(subject)), 0)
    for count in range(K + 1):
        found[False, count] = _values(subject, sampled(subject, count), count)
    none, reference, written = found[False, 0], None, None
    for place, name in (((False, 0), "0 thoughts"), ((True, 0), "without slot")):
        if place in found and found[place]["with_steps"].mean() >= WRITTEN:
            reference, written = found[place], name
    rows = [
        {"chain": is_chain, "thoughts": count, "measure": measure, **_mean(measure, values_Q),
         **_difference("change", measure, values_Q, None if values is none else none),
         **_difference("to_chain", measure, values_Q, None if values is reference else reference)}
        for (is_chain, count), values in found.items() for measure, values_Q in values.items()
    ]  # fmt: skip
    facts = {
        "samples": NUM_SAMPLES, "temperature": TEMPERATURE, "trained_thoughts": K,
        "trained_with_fewer": subject.trained_with_fewer_thoughts, "written_chain": written,
        "warning": subject.warning if K and not subject.trained_with_fewer_thoughts else None,
    }  # fmt: skip
    return Study("rollouts", rows, facts)


def sampled(subject: Subject, count: int, max_new_tokens: int | None = None) -> Answers:
    """NUM_SAMPLES answers to each of the first questions after `count` thoughts."""
    evaluated = evaluate_samples(
        subject.lm, subject.task, subject.examples[:NUM_QUESTIONS], Sampling(NUM_SAMPLES, TEMPERATURE, seed=SEED),
        question_ids=subject.question_ids[:NUM_QUESTIONS], num_thoughts=count, max_new_tokens=max_new_tokens,
        batch_size=BATCH * subject.batch_size,
    )  # fmt: skip
    return [asked.answers for asked in evaluated.questions]


@contextmanager
def writing_the_chain(lm: LatentLM) -> Iterator[None]:
    """The model writes the whole chain right after the question, as the teacher of its method does."""
    own = lm.reasoning
    lm.reasoning = replace(own, slot=NOTHING, markers=False, num_thoughts=0, steps_cut=0, tokens_cut=0)
    try:
        yield
    finally:
        lm.reasoning = own


def _limit_of_chains(subject: Subject) -> int:
    """A limit of new tokens that leaves room for the whole chains; the model's own may be for its short answers."""
    reasoning, examples = subject.lm.reasoning, subject.examples[:NUM_QUESTIONS]
    texts = [reasoning.format.written(example.steps, example.answer) for example in examples]
    longest = max(map(len, encode_texts(subject.lm.tokenizer, texts)))
    return max(reasoning.max_new_tokens, math.ceil(ROOM * (longest + 1)))


def next_step(answer: dict[str, Any], task: Task, form: PromptFormat) -> Hashable | None:
    """The key of an answer's first written step; of the answer itself if it has no step.

    Steps are compared by their text, without differences in spaces and final full stops; a step is never equal to an
    answer. None if there is neither, or if the limit of new tokens cut off the first step.
    """
    steps = chain.read_steps(answer["text"], form)
    cut_off = answer["truncated"] and answer["predicted"] is None and len(steps) == 1
    if steps and not (cut_off and not answer["text"].endswith(form.step_end)):
        return "step", chain.key(steps[0])
    return None if answer["predicted"] is None else ("answer", task.key(answer["predicted"]))


def variety(keys: Sequence[Hashable | None]) -> tuple[int, float]:
    """How many different keys there are, and their effective number: exp of the entropy of their shares.

    None does not count. Both are 0 if there is nothing else.
    """
    counts = list(Counter(key for key in keys if key is not None).values())
    return len(counts), float(np.exp(entropy(counts))) if counts else 0.0


def _values(subject: Subject, answers: Answers, count: int) -> Values:
    """All measures of the answers after `count` thoughts."""
    task, form = subject.task, subject.lm.reasoning.format
    next_steps = [[next_step(answer, task, form) for answer in of] for of in answers]
    keys = [[None if one["predicted"] is None else task.key(one["predicted"]) for one in of] for of in answers]
    right_QN = np.array([[float(answer["correct"]) for answer in of] for of in answers])
    steps_Q2, answers_Q2 = (np.array([variety(of) for of in kinds], float) for kinds in (next_steps, keys))

    def share(cases: Sequence[Sequence[bool]]) -> np.ndarray:
        return np.array(cases, float).mean(1)

    return {
        "next_steps": steps_Q2[:, 0], "effective_next_steps": steps_Q2[:, 1],
        "answers": answers_Q2[:, 0], "effective_answers": answers_Q2[:, 1],
        "pass_1": right_QN.mean(1), "pass_n": pass_at(right_QN, NUM_SAMPLES),
        "maj_n": majority_at(keys, right_QN, [NUM_SAMPLES])[:, 0],
        "with_steps": share([[bool(chain.read_steps(answer["text"], form)) for answer in of] for of in answers]),
        "unreadable": share([[key is None for key in of] for of in keys]),
        "truncated": share([[answer["truncated"] for answer in of] for of in answers]),
        **_graph_values(subject, next_steps, count),
    }  # fmt: skip


def _graph_values(subject: Subject, next_steps: Sequence[Sequence[Any]], count: int) -> Values:
    """The measures OF_GRAPH; none if no question has a graph and a next step."""
    try:
        graphs = subject.graphs[:NUM_QUESTIONS]
    except NotApplicable:
        return {}
    replaced = _steps_replaced(subject.lm.reasoning, count)
    if replaced is None:
        return {}
    pairs = []
    for parsed, keys in zip(graphs, next_steps, strict=True):
        ahead = steps_ahead(parsed, replaced)
        named = {_named(parsed, key[1]) for key in set(keys) - {None} if key[0] == "step"}
        pairs.append((len(ahead), len(ahead & named)) if ahead else (np.nan, np.nan))
    ahead_Q, found_Q = np.array(pairs, float).T
    return {} if np.isnan(ahead_Q).all() else dict(zip(OF_GRAPH, (ahead_Q, found_Q), strict=True))


def _steps_replaced(reasoning: Reasoning, count: int) -> int | None:
    """The number of steps that `count` positions of the slot stand for; None if no whole step is left to write."""
    c = reasoning.thoughts_per_step
    if reasoning.steps_cut is None or reasoning.tokens_cut != 0:
        return None
    if reasoning.slot.is_empty or count == reasoning.num_thoughts or not c:
        return reasoning.steps_cut
    return None if count % c else count // c


def steps_ahead(parsed: GraphQuestion, done: int) -> set[Hashable]:
    """What a step may name after `done` steps: in symbols a node at distance done + 1, in sentences an edge to one.

    Empty once the target is reached.
    """
    if parsed.hops is None or parsed.hops <= done:
        return set()
    ahead = {node for node, distance in parsed.distance.items() if distance == done + 1}
    if parsed.symbolic:
        return set(ahead)
    return {(tail, head) for tail, head in parsed.edges if head in ahead and parsed.distance.get(tail) == done}


def _named(parsed: GraphQuestion, step: str) -> Hashable:
    """The node or the edge that a step names; None if it names no single one."""
    if parsed.symbolic:
        return step
    edges = prosqa.parse_path([step], symbolic=False)
    return edges[0] if edges and len(edges) == 1 else None


def _mean(measure: str, values_Q: np.ndarray) -> dict[str, Any]:
    """The mean over the questions that have a value, with its bootstrap interval.

    If all values are equal, the interval has room for questions with another value (see `mean_interval`); no count is
    below 1 then, unless one that was seen is.
    """
    values_Q = values_Q[~np.isnan(values_Q)]
    least, most = (0.0, 1.0)
    if measure not in SHARES:
        least, most = min(1.0, float(values_Q.min())), max(float(NUM_SAMPLES), float(values_Q.max()))
    low, high = mean_interval((values_Q - least)[None] / (most - least))
    bounds = {"low": least + (most - least) * low, "high": least + (most - least) * high}
    return {"questions": len(values_Q), "value": float(values_Q.mean()), **bounds}


def _difference(name: str, measure: str, values_Q: np.ndarray, reference: Values | None) -> dict[str, Any]:
    """The mean paired difference from another row, with its bootstrap interval; None without one, and of the graph."""
    if reference is None or measure in OF_GRAPH:
        return with_bounds(name, None)
    difference_Q, most = values_Q - reference[measure], 1 if measure in SHARES else NUM_SAMPLES
    low, high = mean_interval(difference_Q[None] / most, lower_limit=-1.0)
    return with_bounds(name, (float(difference_Q.mean()), most * low, most * high))
