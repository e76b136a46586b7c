"""What is in the thoughts: how the model does with any number of them, and what it reads out of each.

Shapes: N questions (or the nodes of one), K thoughts, D hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coconut.analysis.graph_paths import GraphQuestion, Outcome, classify
from coconut.analysis.node_probabilities import name_probabilities, spell
from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import Evaluated, Prediction, evaluate
from coconut.generation.generate import logit_lens
from coconut.methods import METHODS, Slot
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS, Task

if TYPE_CHECKING:
    from coconut.generation.stop_classifier import StopClassifier
    from coconut.models.latent_lm import LatentLM

MORE = 2  # how many thoughts more than its own a model is given at most
SHOWN_TOKENS = 5


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model and the questions to measure it with. Results that several studies need are computed once.

    Every question leaves room for MORE thoughts than the model's own.
    """

    lm: LatentLM
    task: Task
    examples: Sequence[Example]
    batch_size: int = 64
    trained_with_fewer_thoughts: bool = False
    _made: dict[int, Evaluated] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_trained_thoughts(self) -> int:
        """The model's own number of thoughts or pauses."""
        return self.lm.reasoning.num_thoughts

    @property
    def baseline(self) -> Evaluated:
        """Asked as it was trained."""
        return self.forced(self.num_trained_thoughts)

    def forced(self, count: int) -> Evaluated:
        """Asked with so many thoughts or pauses, each number once."""
        if count not in self._made:
            self._made[count] = self.ask(num_thoughts=count if self.lm.reasoning.slot is not Slot.none else None)
        return self._made[count]

    def ask(self, examples: Sequence[Example] | None = None, **options: Any) -> Evaluated:
        """`evaluate` with this model, on these or on all examples."""
        asked = self.examples if examples is None else examples
        return evaluate(self.lm, self.task, asked, batch_size=self.batch_size, **options)

    @cached_property
    def asked(self) -> list[GraphQuestion]:
        """The graphs. Raises Unfit if the task has none or a question tells none."""
        if not hasattr(self.task, "graph"):
            having = ", ".join(name for name, task in TASKS.items() if hasattr(task, "graph"))
            raise NotApplicable(f"The questions of {self.task.name} tell no graph; this study needs one: {having}.")
        found = []
        for number, example in enumerate(self.examples, 1):
            try:
                found.append(GraphQuestion.read(example.question, example.answer))
            except ValueError as error:
                raise NotApplicable(f"Question {number} tells no graph. {error}") from None
        return found

    @property
    def symbolic(self) -> bool:
        """Whether the questions are in symbols. Raises Unfit if some are and others not."""
        forms = {asked.symbolic for asked in self.asked}
        if len(forms) > 1:
            raise NotApplicable(
                "Some questions are in symbols and others in sentences. Take those of one form at a time."
            )
        return forms == {True}

    @cached_property
    def nodes(self) -> list[str]:
        """The names of the nodes of all questions."""
        return sorted({node for asked in self.asked for node in asked.graph})

    @property
    def has_graphs(self) -> bool:
        try:
            return bool(self.asked)
        except ValueError:
            return False

    @property
    def warning(self) -> str:
        """What to beware of with other numbers of thoughts than its own."""
        noun = self.lm.reasoning.slot.value
        if self.trained_with_fewer_thoughts:
            trained = self.num_trained_thoughts
            return f"More {noun}s than its own {trained} were never trained: what is seen there may be surprise."
        return (
            f"The run was trained without mixing, so its last stage knows {self.num_trained_thoughts} {noun}s and "
            "no other number: "
            "what is seen with fewer or more may be surprise."
        )

    def need_thoughts(self) -> None:
        """Raises Unfit if the model has no latent thoughts."""
        reasoning = self.lm.reasoning
        if reasoning.slot is not Slot.thought:
            holds = {Slot.none: "nothing", Slot.pause: "pauses"}[reasoning.slot]
            having = ", ".join(name for name, method in METHODS.items() if method.slot is Slot.thought)
            raise NotApplicable(
                f"{reasoning.method} has no latent thoughts, its slot holds {holds}. Methods that have: {having}."
            )
        if not self.num_trained_thoughts:
            raise NotApplicable(
                f"{reasoning.method} has no thoughts yet at stage {reasoning.stage}. Take a checkpoint of a later one."
            )


# --- any number of thoughts -----------------------------------------------------------------------


def k_forcing(subject: Subject) -> Study:
    """The same weights with 0 to MORE thoughts more than their own (Hao et al., arXiv 2412.06769, Fig. 3).

    Pauses count as thoughts. Raises Unfit if the method has nothing in its slot.
    """
    reasoning = subject.lm.reasoning
    if reasoning.slot is Slot.none:
        having = ", ".join(name for name, method in METHODS.items() if method.slot is not Slot.none)
        raise NotApplicable(
            f"{reasoning.method} has nothing in its slot, so there is no number of thoughts to force. Methods with "
            f"thoughts or pauses: {having}."
        )
    rows = []
    for count in range(subject.num_trained_thoughts + MORE + 1):
        result, predictions, _ = subject.forced(count)
        low, high = result.interval
        rows.append(
            {
                "thoughts": count,
                "questions": result.count,
                "accuracy": result.accuracy,
                "low": low,
                "high": high,
                "new_tokens": result.mean_new_tokens,
                **_outcomes(subject, predictions, hidden=count > 0),
            }
        )
    return Study("k_forcing", rows, {"trained_thoughts": subject.num_trained_thoughts, "warning": subject.warning})


def _outcomes(subject: Subject, predictions: Sequence[Prediction], hidden: bool) -> dict[str, int | None]:
    if not subject.has_graphs:
        return dict.fromkeys(Outcome)
    form = subject.lm.reasoning.format
    counts = Counter(
        classify(
            asked,
            subject.task.read_steps(prediction.text, form),
            prediction.correct,
            hidden=hidden,
        )
        for asked, prediction in zip(subject.asked, predictions, strict=True)
    )
    return {outcome.value: counts[outcome] for outcome in Outcome}


def stopping(subject: Subject, classifier: StopClassifier) -> Study:
    """Always as many thoughts against as many as a classifier wants (arXiv 2412.06769, section 3).

    Raises Unfit if the model has no latent thoughts.
    """
    subject.need_thoughts()
    assert classifier.measured
    rows = []
    for rule, found in (("constant", subject.baseline), ("classifier", subject.ask(stop=classifier.stop))):
        low, high = found.result.interval
        rows.append({"rule": rule, "thoughts": found.result.num_thoughts, "questions": found.result.count,
                     "accuracy": found.result.accuracy, "low": low, "high": high})  # fmt: skip
    facts = {
        "classifier_accuracy": classifier.measured.accuracy,
        "by_place_alone": float(np.mean([max(p, 1 - p) for p in classifier.measured.positives])),
        "trained_on": classifier.measured.trained_on,
    }
    return Study("stopping", rows, facts)


# --- the values of nodes --------------------------------------------------------------------------


def asked(subject: Subject) -> Study:
    """The questions, and what the model answers as trained; `question` is the place, `text` the question."""
    rows = [
        {"question": i, "text": p.question, "gold": p.gold, "predicted": p.predicted, "correct": p.correct}
        for i, p in enumerate(subject.baseline.predictions)
    ]
    return Study("asked", rows)


def next_step_values(subject: Subject) -> list[Study]:
    """What the model would name next after each number of thoughts: the studies values, parallelism, heights.

    The language of the next step is forced, and the value of a node is the probability of its name, the
    product over its tokens (arXiv 2412.06769, section 5.2). In sentences the step begins "Every" and the
    name is that of the node where it starts, so there are none before the first thought. Numbers of
    thoughts that end within a step are left out.

    A node is `ahead` if the next step of a shortest way could name it, wherever that leads; where the
    target is reached before, there is no next step, and none is.

    Raises Unfit if the model has no latent thoughts or the questions no graphs.
    """
    subject.need_thoughts()
    c, offset = subject.lm.reasoning.thoughts_per_step, int(subject.symbolic)
    rows = []
    for (question, after), values in sorted(
        _values(subject, range(c * (1 - offset), subject.num_trained_thoughts + 1, c)).items()
    ):
        asked, place = subject.asked[question], after // c + offset
        goes_on = asked.hops is not None and asked.hops > after // c
        for node, value in zip(asked.graph, values, strict=True):
            distance = asked.distance.get(node)
            rows.append(
                {
                    "question": question,
                    "after": after,
                    "node": node,
                    "distance": distance,
                    "ahead": goes_on and distance == place,
                    "height_shortest": asked.shortest_heights.get(node),
                    "height_longest": asked.longest_heights.get(node),
                    "leads": node in asked.remaining,
                    "value": float(f"{value:.6g}"),
                }
            )
    facts = {
        "form": "symbols" if subject.symbolic else "sentences",
        "offset": offset,
        "thoughts_per_step": c,
        "warning": None if subject.trained_with_fewer_thoughts else subject.warning,
    }
    return [Study("values", rows, facts), _parallelism(rows), _heights(rows)]


def _parallelism(rows: Sequence[dict[str, Any]]) -> Study:
    """The cumulated values of the 1, 2 and 3 likeliest nodes ahead, over the questions (Fig. 6)."""
    values: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ahead"]:
            values[row["after"]][row["question"]].append(row["value"])
    found = []
    for after, of_question in sorted(values.items()):
        best = np.zeros((len(of_question), 3))
        for row, ahead in zip(best, of_question.values(), strict=True):
            top = sorted(ahead, reverse=True)[:3]
            row[: len(top)] = top
        curves = np.percentile(best.cumsum(axis=1), np.arange(101), axis=0)
        for percentile, (top1, top2, top3) in enumerate(curves.tolist()):
            found.append({"after": after, "percentile": percentile, "top1": top1, "top2": top2, "top3": top3})
    return Study(
        "parallelism", found, {"with_nodes_ahead": {str(after): len(values[after]) for after in sorted(values)}}
    )


def _heights(rows: Sequence[dict[str, Any]]) -> Study:
    """The mean value of nodes ahead that lead to the target and of others, by their height (Fig. 7)."""
    groups: dict[tuple[int, str, int, bool], list[float]] = defaultdict(list)
    for row in rows:
        for kind in ("shortest", "longest"):
            if row["ahead"] and (height := row[f"height_{kind}"]) is not None:
                groups[row["after"], kind, height, row["leads"]].append(row["value"])
    found = []
    for (after, kind, height, leads), values in sorted(groups.items()):
        mean, sd = _mean_sd(values)
        se = None if sd is None else sd / math.sqrt(len(values))
        found.append({"after": after, "kind": kind, "height": height, "leads": leads, "mean": mean, "se": se,
                      "count": len(values)})  # fmt: skip
    return Study("heights", found)


def _mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation if there are two values at least."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _values(subject: Subject, counts: Collection[int]) -> dict[tuple[int, int], list[float]]:
    """By question and number of thoughts: the probability of each node's name at the start of the next step."""
    lm = subject.lm
    prompts = encode_questions(lm.tokenizer, [e.question for e in subject.examples], lm.reasoning.format)
    spellings = spell(lm, subject.nodes, subject.symbolic)
    candidates = [[spellings[node] for node in asked.graph] for asked in subject.asked]
    return name_probabilities(lm, prompts, candidates, counts, subject.batch_size)


# --- the thoughts themselves ----------------------------------------------------------------------

GROUPS = ("optimal", "frontier", "reachable", "other")


@torch.no_grad()
def inner_products(subject: Subject) -> Study:
    """Each thought's inner product with the input embeddings of nodes (Zhu et al., arXiv 2505.12514, section 6).

    Of a name of several tokens the mean embedding. With c thoughts a step, thought i stands for the nodes
    ceil(i/c) edges from the root; questions whose target is nearer are left out there, since their chain
    has ended before. Raises Unfit if the model has no latent thoughts or the questions no graphs.
    """
    subject.need_thoughts()
    lm, c = subject.lm, subject.lm.reasoning.thoughts_per_step
    embed = lm.base.get_input_embeddings()
    vectors = {
        node: embed(torch.tensor(spelling.name, device=lm.device)).float().mean(0).cpu()
        for node, spelling in spell(lm, subject.nodes, subject.symbolic).items()
    }
    products: dict[tuple[int, str], list[float]] = defaultdict(list)
    for asked, thoughts_KD in zip(subject.asked, subject.baseline.thoughts, strict=True):
        nodes = list(asked.graph)
        nodes_ND = torch.stack([vectors[node] for node in nodes])
        for number, row in enumerate((thoughts_KD @ nodes_ND.T).tolist(), 1):
            distance = math.ceil(number / c)
            if asked.hops is not None and distance <= asked.hops:
                for node, product in zip(nodes, row, strict=True):
                    products[number, _group(asked, node, distance)].append(product)
    rows = []
    for number in range(1, subject.num_trained_thoughts + 1):
        for group in GROUPS:
            if values := products[number, group]:
                mean, sd = _mean_sd(values)
                rows.append({"thought": number, "group": group, "mean": mean, "sd": sd, "count": len(values)})
    return Study("inner_products", rows)


def _group(asked: GraphQuestion, node: str, distance: int) -> str:
    found = asked.distance.get(node)
    if found == distance:
        return "optimal" if asked.on_shortest_way(node) else "frontier"
    return "reachable" if found is not None and found < distance else "other"


@torch.no_grad()
def decoded(subject: Subject, count: int = 3) -> Study:
    """The likeliest tokens of the model's head on each thought of the first questions (arXiv 2412.06769, Fig. 9).

    Raises Unfit if the model has no latent thoughts.
    """
    subject.need_thoughts()
    lm = subject.lm
    rows = []
    for question, thoughts_KD in enumerate(subject.baseline.thoughts[:count]):
        for thought, tokens in enumerate(logit_lens(lm, thoughts_KD, SHOWN_TOKENS), 1):
            for rank, (text, value) in enumerate(tokens, 1):
                rows.append({"question": question, "thought": thought, "rank": rank, "token": text,
                             "probability": value})  # fmt: skip
    return Study("decoded", rows)
