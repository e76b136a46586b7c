"""Are the thoughts used, and where does the answer come from?

A model that answers well after thoughts need not read them: it may do everything when it reads the question,
or only need the time. So the thoughts of answered questions are changed, one way at a time, and so are edges
of the graphs.

Shapes: N questions, K thoughts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coconut.analysis.graph_paths import GraphQuestion, redirect, remove_elsewhere, remove_on_way
from coconut.analysis.probes import MORE, Subject
from coconut.analysis.statistics import difference_interval
from coconut.evaluation.evaluator import Evaluated, Prediction
from coconut.methods import Slot
from coconut.runs.study import Study
from coconut.tasks import Task, prosqa

if TYPE_CHECKING:
    from torch import Tensor

SEED = 0
# Of what the model has above guessing, how much is lost with the thoughts of another question.
MOST = 0.5  # from here on they are used
FEW = 0.1  # and from here on in part

Rows = dict[str, dict[str, Any]]  # by the name of the change


# --- changes of the thoughts ----------------------------------------------------------------------


def audit_thoughts(subject: Subject) -> Study:
    """Accuracy and changed answers, when the thoughts are not what they were.

    Recorded thoughts are fed with one change, and all else as it was: zeros; the mean over questions of each
    place; noise of each thought's own length; the thoughts of another question; another order; one of them
    replaced by its mean. Besides, fewer and more thoughts. Only the mean, other thoughts and another order
    are of a kind that the model knows; after zeros and noise a fall may be surprise. A single replaced thought
    leaves what later ones took from it.

    The interval of the difference is bootstrapped over pairs; `changed` counts answers that are not the same,
    right or wrong; `neither` is the share that is none of the answers that the question names, where it
    names any. `facts` has the verdict: sentences chosen by the numbers.

    Raises Unfit if the model has no latent thoughts.
    """
    subject.need_thoughts()
    baseline = subject.baseline
    rows: Rows = {"none": _row(subject, "none", "as trained", baseline)}
    guess = baseline.result.chance_accuracy
    lost = None
    for name, label, thoughts_NKD in changed_thoughts(baseline.thoughts):
        found = subject.ask(thoughts=thoughts_NKD)
        rows[name] = _row(subject, name, label, found)
        if name == "other":
            before, after = (np.array([p.correct for p in each.predictions]) for each in (baseline, found))
            lost = share_lost(before, after, guess or 0.0)
    for count in range(subject.num_trained_thoughts + MORE + 1):
        if count != subject.num_trained_thoughts:
            name, label = f"count_{count}", f"{count or 'no'} thought{'s' * (count != 1)}"
            rows[name] = _row(subject, name, label, subject.forced(count))
    facts = {"chance_accuracy": guess, "lost": lost, "verdict": thoughts_verdict(rows, guess, lost)}
    return Study("audit_thoughts", list(rows.values()), facts)


def share_lost(before_N: np.ndarray, after_N: np.ndarray, guess: float) -> tuple[float, float, float] | None:
    """What was lost of that which the model had above guessing, and its 95 % interval; None if it had nothing.

    The interval is of 10,000 resamples of the questions; None, too, if in more than one of 40 of them the
    model does not beat guessing.
    """
    kinds, counts = np.unique(np.stack([before_N, after_N]).astype(np.int64), axis=1, return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(before_N), counts / len(before_N), size=10_000)
    before, after = (drawn @ kinds.T / len(before_N)).T
    if before_N.mean() <= guess or (before <= guess).mean() > 0.025:
        return None
    surely = before > guess
    low, high = np.quantile((before - after)[surely] / (before - guess)[surely], (0.025, 0.975))
    return float((before_N.mean() - after_N.mean()) / (before_N.mean() - guess)), float(low), float(high)


def changed_thoughts(thoughts_NKD: Tensor) -> list[tuple[str, str, Tensor]]:
    """Name, plain words and thoughts of each change. What needs a second question or thought is left out without."""
    N, K, _ = thoughts_NKD.shape
    mean_NKD = thoughts_NKD.mean(0, keepdim=True).expand_as(thoughts_NKD)
    noise_NKD = torch.randn(thoughts_NKD.shape, generator=torch.Generator().manual_seed(SEED))
    noise_NKD = noise_NKD * thoughts_NKD.norm(dim=-1, keepdim=True) / noise_NKD.norm(dim=-1, keepdim=True)
    changes = [
        ("zeros", "thoughts replaced by zeros", torch.zeros_like(thoughts_NKD)),
        ("noise", "thoughts replaced by noise of the same length", noise_NKD),
    ]
    if N > 1:
        changes.append(("mean", "thoughts replaced by their mean over questions", mean_NKD))
        changes.append(("other", "thoughts of another question", thoughts_NKD[others(N)]))
    if K > 1:
        changes.append(("order", "thoughts in another order", thoughts_NKD.roll(1, dims=1)))
    if N > 1 and K > 1:
        for place in range(K):
            single_NKD = thoughts_NKD.clone()
            single_NKD[:, place] = mean_NKD[:, place]
            changes.append((f"thought_{place + 1}", f"thought {place + 1} replaced by its mean", single_NKD))
    return changes


def others(count: int) -> np.ndarray:
    """(count,) another question for each, every one once."""
    circle = np.random.default_rng(SEED).permutation(count)
    found = np.empty(count, dtype=np.int64)
    found[circle] = np.roll(circle, 1)
    return found


def _row(subject: Subject, change: str, label: str, found: Evaluated) -> dict[str, Any]:
    before = subject.baseline.predictions
    was_right, is_right = ([p.correct for p in predictions] for predictions in (before, found.predictions))
    accuracy, low, high = _share(is_right)
    row: dict[str, Any] = {"change": change, "label": label, "questions": len(is_right),
                           "accuracy": accuracy, "low": low, "high": high}  # fmt: skip
    neither = {"neither": _neither(subject, found.predictions)}
    if change == "none":
        same = ("difference", "difference_low", "difference_high", "changed", "changed_low", "changed_high")
        return row | dict.fromkeys(same, 0.0) | neither
    difference_low, difference_high = difference_interval(np.array([is_right]), np.array([was_right]))
    return {
        **row,
        "difference": accuracy - sum(was_right) / len(was_right),
        "difference_low": difference_low,
        "difference_high": difference_high,
        **_named("changed", _share(_unlike(subject.task, before, found.predictions))),
        **neither,
    }


def _neither(subject: Subject, predictions: Sequence[Prediction]) -> float | None:
    named = [subject.task.candidates(prediction.question) for prediction in predictions]
    if not all(named):
        return None
    outside = [
        prediction.predicted is None or not any(subject.task.judge(prediction.predicted, name) for name in names or [])
        for prediction, names in zip(predictions, named, strict=True)
    ]
    return sum(outside) / len(outside)


def _unlike(task: Task, before: Sequence[Prediction], after: Sequence[Prediction]) -> list[bool]:
    """Which answers are not the same, as the task tells them apart."""
    keys = [[None if p.predicted is None else task.key(p.predicted) for p in part] for part in (before, after)]
    return [old != new for old, new in zip(*keys, strict=True)]


def _share(cases: Sequence[bool]) -> tuple[float, float, float]:
    """The share of those that are true, and its 95 % Wilson interval."""
    from scipy.stats import binomtest

    interval = binomtest(sum(cases), len(cases)).proportion_ci(method="wilson")
    return sum(cases) / len(cases), float(interval.low), float(interval.high)


def _named(name: str, share: tuple[float, float, float] | None) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), share or (None, None, None), strict=True))


def thoughts_verdict(rows: Rows, guess: float | None, lost: tuple[float, float, float] | None) -> list[str]:
    """What the changes of the thoughts show, in sentences. The first says whether the thoughts are used.

    The thoughts of another question decide, since they are real ones with the wrong content. What they cost is
    measured in what the model has above guessing (`share_lost`). Used, or used in part: surely FEW of it or
    more, and MOST of it or less. Hardly used: surely less than FEW. Otherwise it cannot be told.
    """
    as_trained = rows["none"]
    than = "" if guess is None else f", where guessing gives {_percent(guess)}"
    if lost is None:
        why = f"{_percent(as_trained['accuracy'])} of {as_trained['questions']} questions are right as trained{than}"
        return [f"It cannot be told whether the thoughts are used: {why}. Nothing is there that could surely be lost."]
    other, (share, least, most) = rows["other"], lost
    if least >= FEW:
        first = "The thoughts are used" if share >= MOST else "The thoughts are used in part"
    elif most < FEW:
        first = "The thoughts are hardly used"
    else:
        first = "It cannot be told whether the thoughts are used"
    numbers = f"{_right(other)} are right instead of {_percent(as_trained['accuracy'])}{than}"
    if other["neither"]:
        numbers += f"; {_percent(other['neither'])} of the answers are then none of the options"
    found = [f"{first}: with the thoughts of another question {numbers}."]
    if "mean" in rows:
        found.append(_on_content(rows["mean"], guess))
    found.append(
        f"With zeros in their place {_percent(rows['zeros']['accuracy'])} are right, with noise of the same length "
        f"{_percent(rows['noise']['accuracy'])}; the model never saw such inputs, so a fall there may be surprise."
    )
    if "order" in rows:
        matters = "Their order matters" if _falls(rows["order"]) else "That their order matters is not seen"
        found.append(
            f"{matters}: in another order {_percent(rows['order']['accuracy'])} ({_difference(rows['order'])})."
        )
    if singles := [row for name, row in rows.items() if name.startswith("thought_")]:
        worst = min(singles, key=lambda row: row["difference"])
        which, effect = worst["change"].removeprefix("thought_"), f"with its mean in its place {_right(worst)}"
        if _falls(worst):
            found.append(f"Of single thoughts, number {which} is missed most: {effect}.")
        else:
            found.append(f"No single thought is surely missed; number {which} costs most, {effect}.")
    if "count_0" in rows:
        found.append(
            f"Without any thought {_right(rows['count_0'])}; the model may then write what it would have thought."
        )
    return found


def _on_content(row: dict[str, Any], guess: float | None) -> str:
    effect = f"with the mean over questions in place of each thought {_right(row)}"
    if not _falls(row):
        return f"That their content is needed is not seen: {effect}."
    guessing = guess is not None and row["low"] <= guess <= row["high"]
    return f"Their content is needed: {effect}" + (", which is not surely better than guessing." if guessing else ".")


def _falls(row: dict[str, Any]) -> bool:
    """Whether the accuracy is surely lower than as trained."""
    return row["difference_high"] < 0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _right(row: dict[str, Any]) -> str:
    return f"{_percent(row['accuracy'])} ({_difference(row)})"


def _difference(row: dict[str, Any]) -> str:
    value, low, high = (100 * row[key] for key in ("difference", "difference_low", "difference_high"))
    return f"{value:+.1f} points, {low:+.1f} to {high:+.1f}"


# --- changes of the graph -------------------------------------------------------------------------


def audit_edges(subject: Subject) -> Study:
    """What becomes of right answers when an edge of the graph is another one.

    redirected: exactly the other option is reachable; with latent thoughts also redirected_old_thoughts, where
    the thoughts are those of the question as it was, and redirected_thoughts_only, where the question is as it
    was and the thoughts are those of the redirected one. removed: no option is reachable. removed_elsewhere:
    the answer should stay. `followed` is the share of answers that name the option that is now right, `changed`
    of those that are not what they were. All else in the text stays as it was.

    Each row is over the questions that were answered rightly and have such an edge. facts: `guess`; `right`,
    how many were answered rightly; `left_out`, how many of them have no such edge; `redirections`, how many
    were made by a swap of two heads (`swapped`) and how many kept the length of the way (`same_hops`); and
    the verdict. Fed thoughts, too, are read together with the question before them, in all layers but the first.

    Raises Unfit if the questions tell no graphs.
    """
    graphs = subject.asked
    right = [i for i, prediction in enumerate(subject.baseline.predictions) if prediction.correct]

    def edited(edit: Callable[[str, GraphQuestion, Random], Any]) -> dict[int, Any]:
        """The edits of questions answered rightly, by their place, where there is one."""
        found = {i: edit(subject.examples[i].question, graphs[i], Random(f"{SEED} {i}")) for i in right}
        return {i: edit for i, edit in found.items() if edit}

    redirections = edited(redirect)
    latent = subject.lm.reasoning.slot is Slot.thought and subject.num_trained_thoughts > 0
    rows: Rows = {}
    if redirections:
        asked = list(redirections)
        goals = [replace(subject.examples[i], steps=(), answer=_other_answer(subject, i)) for i in asked]
        turned = [replace(goal, question=redirections[i].question) for i, goal in zip(asked, goals, strict=True)]
        again = subject.ask(turned)
        label = "an edge turned towards the other option"
        rows["redirected"] = _edge_row(subject, "redirected", label, asked, again, followed=True)
        if latent:
            name, found = "redirected_old_thoughts", subject.ask(turned, thoughts=subject.baseline.thoughts[asked])
            rows[name] = _edge_row(subject, name, "an edge turned, thoughts from before", asked, found, followed=True)
            name, found = "redirected_thoughts_only", subject.ask(goals, thoughts=again.thoughts)
            rows[name] = _edge_row(subject, name, "no edge turned, thoughts as if", asked, found, followed=True)
    left_out = {"redirected": len(right) - len(redirections)}
    for name, label, edit in (
        ("removed", "an edge removed that all ways to the answer take", remove_on_way),
        ("removed_elsewhere", "an edge removed on no way to an option", remove_elsewhere),
    ):
        questions = edited(edit)
        left_out[name] = len(right) - len(questions)
        if questions:
            cut = [replace(subject.examples[i], question=question) for i, question in questions.items()]
            rows[name] = _edge_row(subject, name, label, list(questions), subject.ask(cut), followed=False)
    facts = {
        "chance_accuracy": subject.baseline.result.chance_accuracy,
        "right": len(right),
        "left_out": left_out,
        "redirections": {
            "swapped": sum(found.swapped for found in redirections.values()),
            "same_hops": sum(found.same_hops for found in redirections.values()),
        },
        "verdict": edges_verdict(rows),
    }
    return Study("audit_edges", list(rows.values()), facts)


def _other_answer(subject: Subject, index: int) -> str:
    """The answer that names the wrong option."""
    question = subject.examples[index].question
    answers = prosqa.candidates(question)
    assert answers
    return answers[prosqa.parse_question(question).options.index(subject.asked[index].other)]


def _edge_row(
    subject: Subject, change: str, label: str, asked: Sequence[int], found: Evaluated, *, followed: bool
) -> dict[str, Any]:
    before = [subject.baseline.predictions[i] for i in asked]
    follows = _share([p.correct for p in found.predictions]) if followed else None
    changed = _share(_unlike(subject.task, before, found.predictions))
    return {"change": change, "label": label, "questions": len(asked), **_named("followed", follows),
            **_named("changed", changed)}  # fmt: skip


def edges_verdict(rows: Rows) -> list[str]:
    """What the changes of the graph show, in sentences. The first says where the answer comes from.

    Old thoughts under a new graph, and new thoughts under an old one, decide: each is followed by most
    answers if the interval of its share lies above one half, by few if below.
    """
    if "redirected" not in rows:
        return [
            "It cannot be told where the answer comes from: no graph of a question answered rightly could be changed."
        ]
    redirected = rows["redirected"]
    count, share = redirected["questions"], _percent(redirected["followed"])
    effect = f"of {count} answers, {share} name the other option once an edge is turned so that only it is reachable"
    follows: dict[bool | None, str] = {
        True: "The answer follows the graph",
        False: "The answer does not follow the graph",
        None: "It cannot be told whether the answer follows the graph",
    }
    on_graph = f"{follows[_most(redirected)]}: {effect}."
    found = []
    if "redirected_old_thoughts" in rows and _most(redirected):
        old, alone = rows["redirected_old_thoughts"], rows["redirected_thoughts_only"]
        text, thoughts = _most(old), _most(alone)
        if thoughts and text is False:
            first = "The thoughts carry the answer"
        elif text and thoughts is False:
            first = "The thoughts do not carry the answer, the question itself is read"
        elif text and thoughts:
            first = "Either of them alone turns most answers"
        elif text is None or thoughts is None:
            first = "It cannot be told whether thoughts or question carry the answer"
        else:
            first = "Neither thoughts nor question carry the answer alone"
        found.append(
            f"{first}: if only the question is changed and the thoughts are those from before, "
            f"{_percent(old['followed'])} of the answers follow the change; if only the thoughts are those of the "
            f"changed question, {_percent(alone['followed'])} do."
        )
    found.append(on_graph)
    if "removed" in rows:
        found.append(
            f"With the way to the answer cut, so that no option is right, {_percent(rows['removed']['changed'])} of "
            "the answers change; a guess would in about half of the cases."
        )
    if "removed_elsewhere" in rows:
        row = rows["removed_elsewhere"]
        found.append(f"With an edge removed that should not matter, {_percent(row['changed'])} do.")
    return found


def _most(row: dict[str, Any]) -> bool | None:
    """Whether most answers follow; None if the interval holds one half."""
    if row["followed_low"] > 0.5:
        return True
    return False if row["followed_high"] < 0.5 else None
