"""Interventions: change the thoughts, or an edge of the graph, and measure how the answers change.

A model that answers well after thoughts need not use them. It may compute the answer while it reads the question, or
need only the additional positions. The interventions show whether it reads the thoughts' content.

Shapes: N questions, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.analysis.graph_paths import GraphQuestion, redirect, remove_elsewhere, remove_on_path
from coconut.analysis.probes import EXTRA_THOUGHTS, Subject, accuracy_of
from coconut.analysis.statistics import difference_interval, partners, share, with_bounds
from coconut.evaluation.evaluator import Evaluated, Prediction
from coconut.runs.study import Study
from coconut.tasks import Task, prosqa

SEED = 0
# Limits of the share of the accuracy above chance that is lost with the thoughts of another question.
USED = 0.5  # a larger share: the thoughts are used
PARTLY_USED = 0.1  # a larger share: they are used in part

Rows = dict[str, dict[str, Any]]  # by the name of the intervention


def audit_thoughts(subject: Subject) -> Study:
    """Accuracy and changed answers under each intervention on the thoughts.

    The recorded thoughts of each question are fed again with one change: zeros; the mean over questions at each
    position; noise with the norm of each thought; the thoughts of another question; another order; a single thought
    replaced by its mean. Other rows have fewer or more thoughts. Zeros and noise are out of distribution, so a lower
    accuracy may have that cause; the mean, other thoughts and another order are closer to thoughts of the training.
    Replacing a single thought keeps what later thoughts have computed from it.

    `difference`: accuracy minus that as trained, with a paired bootstrap interval. `changed`: the share of answers
    that differ from those as trained, right or wrong. `neither`: the share that is none of the answers named in the
    question, None if it names none. facts `verdict`: sentences chosen by the numbers; `lost`: see `share_lost`.

    Raises NotApplicable if the model has no latent thoughts.
    """
    subject.need_thoughts()
    baseline, chance_accuracy, lost = subject.baseline, subject.baseline.result.chance_accuracy, None
    rows: Rows = {"none": _row(subject, "none", "as trained", baseline)}
    for name, label, thoughts_NKD in changed_thoughts(baseline.thoughts):
        evaluated = subject.ask(thoughts=thoughts_NKD)
        rows[name] = _row(subject, name, label, evaluated)
        if name == "other":
            lost = share_lost(
                correct_answers(baseline.predictions), correct_answers(evaluated.predictions), chance_accuracy or 0.0
            )
    for count in range(subject.num_trained_thoughts + EXTRA_THOUGHTS + 1):
        if count != subject.num_trained_thoughts:
            name, label = f"count_{count}", f"{count or 'no'} thought{'s' * (count != 1)}"
            rows[name] = _row(subject, name, label, subject.forced(count))
    facts = {"chance_accuracy": chance_accuracy, "lost": lost, "verdict": thoughts_verdict(rows, chance_accuracy, lost)}
    return Study("audit_thoughts", list(rows.values()), facts)


def share_lost(before_N: np.ndarray, after_N: np.ndarray, chance_accuracy: float) -> tuple[float, float, float] | None:
    """The share of the accuracy above chance that is lost, with its 95 % bootstrap interval (10,000 resamples).

    Shapes: N questions, right or wrong before and after the intervention. None if the accuracy before is not above
    chance, overall or in more than 2.5 % of the resamples.
    """
    kinds, counts = np.unique(np.stack([before_N, after_N]).astype(np.int64), axis=1, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(before_N), counts / len(before_N), size=10_000)
    before, after = (drawn @ kinds.T / len(before_N)).T
    if before_N.mean() <= chance_accuracy or (before <= chance_accuracy).mean() > 0.025:
        return None
    above = before > chance_accuracy
    low, high = np.quantile((before - after)[above] / (before - chance_accuracy)[above], (0.025, 0.975))
    return float((before_N.mean() - after_N.mean()) / (before_N.mean() - chance_accuracy)), float(low), float(high)


def changed_thoughts(thoughts_NKD: Tensor) -> list[tuple[str, str, Tensor]]:
    """The (name, label, thoughts) of each intervention. Some need a second question or a second thought."""
    N, K, _ = thoughts_NKD.shape
    mean_NKD = thoughts_NKD.mean(0, keepdim=True).expand_as(thoughts_NKD)
    noise_NKD = torch.randn(thoughts_NKD.shape, generator=torch.Generator().manual_seed(SEED))
    noise_NKD = noise_NKD * thoughts_NKD.norm(dim=-1, keepdim=True) / noise_NKD.norm(dim=-1, keepdim=True)
    changes = [
        ("zeros", "thoughts replaced by zeros", torch.zeros_like(thoughts_NKD)),
        ("noise", "thoughts replaced by noise of the same norm", noise_NKD),
    ]
    if N > 1:
        changes.append(("mean", "thoughts replaced by their mean over questions", mean_NKD))
        changes.append(("other", "thoughts of another question", thoughts_NKD[other_questions(N)]))
    if K > 1:
        changes.append(("order", "thoughts in another order", thoughts_NKD.roll(1, dims=1)))
    if N > 1 and K > 1:
        for place in range(K):
            single_NKD = thoughts_NKD.clone()
            single_NKD[:, place] = mean_NKD[:, place]
            changes.append((f"thought_{place + 1}", f"thought {place + 1} replaced by its mean", single_NKD))
    return changes


def other_questions(count: int) -> np.ndarray:
    """(count,) for each of two or more questions the index of another one; a permutation without fixed points."""
    return partners([None] * count)


def correct_answers(predictions: Sequence[Prediction]) -> np.ndarray:
    """(N,) whether each answer is right."""
    return np.array([prediction.correct for prediction in predictions])


def _row(subject: Subject, change: str, label: str, evaluated: Evaluated) -> dict[str, Any]:
    before, after = subject.baseline, evaluated
    if change == "none":
        difference = changed = (0.0, 0.0, 0.0)
    else:
        bounds = difference_interval(
            correct_answers(after.predictions)[None], correct_answers(before.predictions)[None]
        )
        difference = (after.result.accuracy - before.result.accuracy, *bounds)
        changed = share(_changed_answers(subject.task, before.predictions, after.predictions))
    return {
        "change": change, "label": label, **accuracy_of(after.result), **with_bounds("difference", difference),
        **with_bounds("changed", changed), "neither": _share_outside_options(subject, after.predictions),
    }  # fmt: skip


def _share_outside_options(subject: Subject, predictions: Sequence[Prediction]) -> float | None:
    """The share of answers that are none of those the question named; None if a question named none."""
    options = [subject.task.candidates(prediction.question) or [] for prediction in predictions]
    if not all(options):
        return None
    judge = subject.task.judge
    named = [any(judge(p.predicted, option) for option in each) for p, each in zip(predictions, options, strict=True)]
    return named.count(False) / len(named)


def _changed_answers(task: Task, before: Sequence[Prediction], after: Sequence[Prediction]) -> list[bool]:
    """Whether each answer differs, by the keys with which the task compares answers."""
    keys = [[None if p.predicted is None else task.key(p.predicted) for p in part] for part in (before, after)]
    return [old != new for old, new in zip(*keys, strict=True)]


def thoughts_verdict(rows: Rows, chance_accuracy: float | None, lost: tuple[float, float, float] | None) -> list[str]:
    """Summarize the interventions on the thoughts in sentences. The first says whether the thoughts are used.

    The thoughts of another question decide, since they are in distribution but have the wrong content. `lost` is the
    share of the accuracy above chance that they cost (`share_lost`). The thoughts are used if this share is at least
    USED, or else used in part, given that its interval lies above PARTLY_USED. They are hardly used if the interval
    lies below PARTLY_USED. Otherwise there is no verdict.
    """
    as_trained = rows["none"]
    than = "" if chance_accuracy is None else f" (chance: {_percent(chance_accuracy)})"
    if lost is None:
        why = f"{_percent(as_trained['accuracy'])} of {as_trained['questions']} questions are right as trained{than}"
        return [f"It is not clear whether the thoughts are used: {why}. The accuracy is not reliably above chance."]
    other, (share, least, most) = rows["other"], lost
    if least >= PARTLY_USED:
        first = "The thoughts are used" if share >= USED else "The thoughts are used in part"
    elif most < PARTLY_USED:
        first = "The thoughts are hardly used"
    else:
        first = "It is not clear whether the thoughts are used"
    numbers = f"{_right(other)} are right instead of {_percent(as_trained['accuracy'])}{than}"
    if other["neither"]:
        numbers += f"; {_percent(other['neither'])} of the answers are then neither option"
    sentences = [
        f"{first}: with the thoughts of another question {numbers}.",
        _content_sentence(rows["mean"], chance_accuracy),
        f"With zeros in their place {_percent(rows['zeros']['accuracy'])} are right, with noise of the same norm "
        f"{_percent(rows['noise']['accuracy'])}. Such inputs are out of distribution, which alone may lower accuracy.",
    ]
    if "order" in rows:
        matters = "Their order matters" if _falls(rows["order"]) else "No effect of their order is seen"
        sentences.append(f"{matters}: in another order {_right(rows['order'])}.")
    if single_rows := [row for name, row in rows.items() if name.startswith("thought_")]:
        worst = min(single_rows, key=lambda row: row["difference"])
        which, effect = worst["change"].removeprefix("thought_"), f"with its mean in its place {_right(worst)}"
        if _falls(worst):
            sentences.append(f"Of single thoughts, number {which} matters most: {effect}.")
        else:
            sentences.append(f"No single thought is clearly needed; number {which} has the largest effect, {effect}.")
    sentences.append(
        f"Without any thought {_right(rows['count_0'])}; the model may then write the steps that thoughts replaced."
    )
    return sentences


def _content_sentence(row: dict[str, Any], chance_accuracy: float | None) -> str:
    effect = f"with the mean over questions in place of each thought {_right(row)}"
    if not _falls(row):
        return f"No need for their content is seen: {effect}."
    guessing = chance_accuracy is not None and row["low"] <= chance_accuracy <= row["high"]
    return f"Their content is needed: {effect}" + (", which is not clearly above chance." if guessing else ".")


def _falls(row: dict[str, Any]) -> bool:
    """Whether the accuracy is lower than as trained, by the interval of the difference."""
    return row["difference_high"] < 0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _right(row: dict[str, Any]) -> str:
    value, low, high = (100 * row[key] for key in ("difference", "difference_low", "difference_high"))
    return f"{_percent(row['accuracy'])} ({value:+.1f} points, {low:+.1f} to {high:+.1f})"


def audit_edges(subject: Subject) -> Study:
    """Changed answers under each intervention on an edge of the graph, of questions that were answered correctly.

    Rows:
    - redirected: only the other option is reachable.
    - redirected_old_thoughts: the redirected question, with the thoughts of the original one.
    - redirected_thoughts_only: the original question, with the thoughts of the redirected one.
    - removed: no option is reachable.
    - removed_elsewhere: an edge on no path to an option is removed, so the answer should stay.
    The rest of the text is unchanged. The two rows with exchanged thoughts exist for models with latent thoughts only.
    In all layers after the first, a fed thought still depends on the question before it, through attention.

    `followed`: the share of answers that name the right option of the redirected question. `changed`: the share that
    differs from the answer before. A row has the questions with an edge for its intervention.
    facts: `right`, the number of questions answered correctly; `left_out`, how many of them have no such edge, or get
    another number of thoughts once they are changed, from a model that ends its thoughts itself;
    `redirections`, how many exchanged two heads (`swapped`) and how many kept the length of the path (`same_hops`);
    `chance_accuracy`; `verdict`.

    Raises NotApplicable if the questions describe no graphs.
    """
    graphs = subject.graphs
    correct = [i for i, prediction in enumerate(subject.baseline.predictions) if prediction.correct]

    def edited(edit: Callable[[GraphQuestion, Random], Any], text: Callable[[Any], str] = str) -> dict[int, Any]:
        """The changed questions by index, of questions answered correctly that have such an edge.

        `text` gives the question of a change. The model has to take as many thoughts for it as for the others.
        """
        changes = [(i, change) for i in correct if (change := edit(graphs[i], Random(f"{SEED} {i}")))]
        kept = subject.with_this_count([replace(subject.examples[i], question=text(change)) for i, change in changes])
        return dict(changes[n] for n in kept)

    rows: Rows = {}

    def add_row(change: str, label: str, indices: Sequence[int], evaluated: Evaluated, *, followed: bool) -> None:
        before = [subject.baseline.predictions[i] for i in indices]
        follows = share([p.correct for p in evaluated.predictions]) if followed else None
        changed = share(_changed_answers(subject.task, before, evaluated.predictions))
        rows[change] = {"change": change, "label": label, "questions": len(indices),
                        **with_bounds("followed", follows), **with_bounds("changed", changed)}  # fmt: skip

    redirections = edited(redirect, lambda change: change.question)
    if indices := list(redirections):
        expected = [replace(subject.examples[i], steps=(), answer=_other_answer(subject, i)) for i in indices]
        redirected = [
            replace(each, question=redirections[i].question) for i, each in zip(indices, expected, strict=True)
        ]
        answers = subject.ask(redirected)
        add_row("redirected", "an edge redirected towards the other option", indices, answers, followed=True)
        if subject.lm.reasoning.slot.thinks and subject.num_trained_thoughts > 0:
            old_thoughts = subject.ask(redirected, thoughts=subject.baseline.thoughts[indices])
            label = "an edge redirected, original thoughts"
            add_row("redirected_old_thoughts", label, indices, old_thoughts, followed=True)
            thoughts_only = subject.ask(expected, thoughts=answers.thoughts)
            label = "original question, thoughts of the redirected one"
            add_row("redirected_thoughts_only", label, indices, thoughts_only, followed=True)
    left_out = {"redirected": len(correct) - len(redirections)}
    for change, label, edit in (
        ("removed", "an edge removed that is on every path to the answer", remove_on_path),
        ("removed_elsewhere", "an edge removed that is on no path to an option", remove_elsewhere),
    ):
        questions = edited(edit)
        left_out[change] = len(correct) - len(questions)
        if questions:
            cut = [replace(subject.examples[i], question=question) for i, question in questions.items()]
            add_row(change, label, list(questions), subject.ask(cut), followed=False)
    counts = {key: sum(getattr(each, key) for each in redirections.values()) for key in ("swapped", "same_hops")}
    facts = {"chance_accuracy": subject.baseline.result.chance_accuracy, "right": len(correct), "left_out": left_out,
             "redirections": counts, "verdict": edges_verdict(rows)}  # fmt: skip
    return Study("audit_edges", list(rows.values()), facts)


def _other_answer(subject: Subject, index: int) -> str:
    """The gold answer if the other option were right."""
    question = subject.examples[index].question
    answers = prosqa.candidates(question)
    assert answers
    return answers[prosqa.parse_question(question).options.index(subject.graphs[index].other)]


def edges_verdict(rows: Rows) -> list[str]:
    """Summarize the interventions on the graph in sentences. The first says where the answer comes from.

    The two rows with exchanged thoughts decide. Most answers follow a change if the interval of the share lies above
    one half, and few if it lies below.
    """
    if "redirected" not in rows:
        return [
            "It is not clear where the answer comes from: no graph of a correctly answered question could be changed."
        ]
    redirected = rows["redirected"]
    follows: dict[bool | None, str] = {
        True: "The answer follows the graph",
        False: "The answer does not follow the graph",
        None: "It is not clear whether the answer follows the graph",
    }
    on_graph = (
        f"{follows[_majority_follows(redirected)]}: of {redirected['questions']} answers, "
        f"{_percent(redirected['followed'])} name the other option when an edge is redirected so that only it is "
        "reachable."
    )
    sentences = []
    if "redirected_old_thoughts" in rows and _majority_follows(redirected):
        old, alone = rows["redirected_old_thoughts"], rows["redirected_thoughts_only"]
        by_text_and_thoughts: dict[Any, str] = {
            (False, True): "The thoughts carry the answer",
            (True, False): "The question carries the answer, not the thoughts",
            (True, True): "Changing the thoughts or the question alone changes most answers",
            (False, False): "Neither the thoughts nor the question carry the answer alone",
        }
        unclear = "It is not clear whether the thoughts or the question carry the answer"
        first = by_text_and_thoughts.get((_majority_follows(old), _majority_follows(alone)), unclear)
        sentences.append(
            f"{first}: if only the question is changed and the original thoughts are fed, "
            f"{_percent(old['followed'])} of the answers follow the change; if only the thoughts are those of the "
            f"changed question, {_percent(alone['followed'])} do."
        )
    sentences.append(on_graph)
    if "removed" in rows:
        sentences.append(
            f"With an edge of every path to the answer removed, so that no option is right, "
            f"{_percent(rows['removed']['changed'])} of the answers change; guesses would in about half of the cases."
        )
    if "removed_elsewhere" in rows:
        share = _percent(rows["removed_elsewhere"]["changed"])
        sentences.append(f"With an edge removed that is on no path to an option, {share} of the answers change.")
    return sentences


def _majority_follows(row: dict[str, Any]) -> bool | None:
    """Whether most answers follow; None if the interval includes one half."""
    if row["followed_low"] > 0.5:
        return True
    return False if row["followed_high"] < 0.5 else None
