"""Probes of the thoughts: accuracy for any number of thoughts, probabilities of the next step, logit lens.

Shapes: N questions (or the nodes of one), K thoughts, D hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from coconut.analysis.graph_paths import GraphQuestion, Outcome, classify
from coconut.analysis.node_probabilities import Spelling, name_probabilities, spell
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import EvalResult, Evaluated, Prediction, evaluate
from coconut.generation.generate import likeliest_tokens, logit_lens
from coconut.generation.stop_classifier import StopClassifier
from coconut.generation.thoughts import think
from coconut.methods import METHODS, Source
from coconut.models.latent_lm import LatentLM
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS, Task
from coconut.tasks.chain import read_steps

EXTRA_THOUGHTS = 2  # the model is measured with up to this many more thoughts than trained
SHOWN_TOKENS = 5


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model and the questions to measure it with. Results that several studies need are computed once.

    Every question must leave room in the context for EXTRA_THOUGHTS more thoughts than the trained number.
    `mode`: of a hybrid model, that in which it is measured; `lm` has the settings of the mode then. `free`: of a model
    that ends its thoughts itself, the model as it does so; `lm` takes a fixed number then, the same for all questions.
    """

    lm: LatentLM
    task: Task
    examples: Sequence[Example]
    batch_size: int = 64
    trained_with_fewer_thoughts: bool = False
    mixed: bool = False  # whether it was trained to write the whole chain, too
    mode: str = ""
    free: LatentLM | None = None
    _evaluations: dict[int, Evaluated] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_trained_thoughts(self) -> int:
        """The number of thoughts or pause tokens in the last stage of training."""
        return self.lm.reasoning.num_thoughts

    @property
    def baseline(self) -> Evaluated:
        """The evaluation with the trained number of thoughts."""
        return self.forced(self.num_trained_thoughts)

    def forced(self, count: int) -> Evaluated:
        """The evaluation with a given number of thoughts or pause tokens; computed once."""
        if count not in self._evaluations:
            self._evaluations[count] = self.ask(num_thoughts=count if not self.lm.reasoning.slot.is_empty else None)
        return self._evaluations[count]

    def ask(self, examples: Sequence[Example] | None = None, **options: Any) -> Evaluated:
        """Call `evaluate` with this model on these examples, by default on all."""
        chosen = self.examples if examples is None else examples
        ids = self.question_ids if examples is None else self.encode(chosen)
        return evaluate(self.lm, self.task, chosen, batch_size=self.batch_size, **{"question_ids": ids, **options})

    def encode(self, examples: Sequence[Example]) -> list[list[int]]:
        """The token ids of questions, each with the control token of the mode, if there is one."""
        questions = encode_questions(self.lm.tokenizer, [e.question for e in examples], self.lm.reasoning.format)
        control = [self.lm.special.control[self.mode]] if self.mode else []
        return [question + control for question in questions]

    def with_this_count(self, examples: Sequence[Example]) -> list[int]:
        """The indices of the examples for which the model takes the fixed number of thoughts by itself; else all."""
        if self.free is None or not examples:
            return list(range(len(examples)))
        asked = evaluate(self.free, self.task, examples, max_new_tokens=1, batch_size=self.batch_size)
        return [i for i, each in enumerate(asked.predictions) if each.num_thoughts == self.num_trained_thoughts]

    @cached_property
    def question_ids(self) -> list[list[int]]:
        """The token ids of the questions."""
        return self.encode(self.examples)

    @cached_property
    def word_embeddings(self) -> torch.Tensor:
        """(M, D) the input embeddings of the M different words of the questions, in float32 on the CPU."""
        words = sorted({token for question in self.question_ids for token in question} - {*self.lm.special.added})
        with torch.no_grad():
            return self.lm.base.get_input_embeddings()(torch.tensor(words, device=self.lm.device)).float().cpu()

    @cached_property
    def graphs(self) -> list[GraphQuestion]:
        """The parsed questions. Raises NotApplicable if the task has no graphs or a question cannot be parsed."""
        if not hasattr(self.task, "graph"):
            with_graphs = ", ".join(name for name, task in TASKS.items() if hasattr(task, "graph"))
            raise NotApplicable(
                f"The questions of {self.task.name} describe no graph. Tasks with graphs: {with_graphs}."
            )
        graphs = []
        for number, example in enumerate(self.examples, 1):
            try:
                graphs.append(GraphQuestion.read(example.question, example.answer))
            except ValueError as error:
                raise NotApplicable(f"Question {number} describes no graph. {error}") from None
        return graphs

    @property
    def symbolic(self) -> bool:
        """Whether the questions are in symbols. Raises NotApplicable if some are in symbols and others in sentences."""
        forms = {graph.symbolic for graph in self.graphs}
        if len(forms) > 1:
            raise NotApplicable("Some questions are in symbols and others in sentences. Analyze one form at a time.")
        return forms == {True}

    @cached_property
    def spellings(self) -> dict[str, Spelling]:
        """The token ids of the names of the nodes of all questions."""
        return spell(self.lm, sorted({node for parsed in self.graphs for node in parsed.graph}), self.symbolic)

    @property
    def warning(self) -> str:
        """A caveat about results with other numbers of thoughts than the trained one."""
        if self.free is not None:
            return (
                f"The model ends its thoughts itself, after {self.num_trained_thoughts} in these questions. Fewer or "
                "more of them are unusual input."
            )
        trained = f"{self.num_trained_thoughts} {self.lm.reasoning.slot.noun}s"
        if self.mode:
            return f"The mode {self.mode} was trained with {trained}. Fewer or more of them are unusual input."
        if self.trained_with_fewer_thoughts:
            return f"The model was never trained with more than {trained}. More of them are unusual input."
        return (
            f"The run was trained without mixing, so its last stage has {trained} and no other number. Fewer or more "
            "of them are unusual input."
        )

    def need_thoughts(self) -> None:
        """Raise NotApplicable if the model has no latent thoughts."""
        reasoning = self.lm.reasoning
        if not reasoning.slot.thinks:
            content = {Source.none: "nothing", Source.pause: "pauses"}[reasoning.slot.source]
            raise NotApplicable(
                f"{reasoning.method} has no latent thoughts; its slot has {content}. Methods with thoughts: "
                f"{', '.join(name for name, method in METHODS.items() if method.slot.thinks)}."
            )
        if not self.num_trained_thoughts:
            raise NotApplicable(
                f"{reasoning.method} has no thoughts yet at stage {reasoning.stage}. Use a checkpoint of a later stage."
            )

    def need_steps_of_thoughts(self) -> int:
        """The number of thoughts that stand for one step. Raises NotApplicable if there are no such thoughts."""
        self.need_thoughts()
        if not self.lm.reasoning.thoughts_per_step:
            raise NotApplicable(
                f"The thoughts of {self.lm.reasoning.method} stand for no steps in particular, so they cannot be "
                "compared with the nodes of one step."
            )
        return self.lm.reasoning.thoughts_per_step


def k_forcing(subject: Subject) -> Study:
    """Accuracy and outcomes with 0 to EXTRA_THOUGHTS more thoughts than trained (Hao et al., arXiv 2412.06769, Fig. 3).

    Pause tokens count as thoughts. Raises NotApplicable if the method has nothing in its slot.
    """
    reasoning = subject.lm.reasoning
    if reasoning.slot.is_empty:
        with_slot = ", ".join(name for name, method in METHODS.items() if not method.slot.is_empty)
        raise NotApplicable(
            f"{reasoning.method} has nothing in its slot, so there is no number of thoughts to force. Methods with "
            f"thoughts or pauses: {with_slot}."
        )
    rows = []
    for count in range(subject.num_trained_thoughts + EXTRA_THOUGHTS + 1):
        result, predictions, _ = subject.forced(count)
        outcomes = _outcomes(subject, predictions, hidden=count > 0)
        rows.append({"thoughts": count, **accuracy_of(result), "new_tokens": result.mean_new_tokens, **outcomes})
    return Study("k_forcing", rows, {"trained_thoughts": subject.num_trained_thoughts, "warning": subject.warning})


def accuracy_of(result: EvalResult) -> dict[str, Any]:
    """The part of a study's row that gives an accuracy, with its 95 % interval."""
    low, high = result.interval
    return {"questions": result.count, "accuracy": result.accuracy, "low": low, "high": high}


def _outcomes(subject: Subject, predictions: Sequence[Prediction], hidden: bool) -> dict[str, int | None]:
    """The number of answers of each outcome class; None without graphs. `hidden`: see `classify`."""
    try:
        graphs = subject.graphs
    except NotApplicable:
        return dict.fromkeys(Outcome)
    steps = [read_steps(prediction.text, subject.lm.reasoning.format) for prediction in predictions]
    counts = Counter(
        classify(parsed, written, prediction.correct, hidden=hidden)
        for parsed, written, prediction in zip(graphs, steps, predictions, strict=True)
    )
    return {outcome.value: counts[outcome] for outcome in Outcome}


def stopping(subject: Subject, classifier: StopClassifier) -> Study:
    """Compare a constant number of thoughts with a classifier that decides when to stop (arXiv 2412.06769, section 3).

    facts: the classifier's accuracy on validation data, and `by_place_alone`, the accuracy of the best constant
    decision at each thought.
    Raises NotApplicable if the model has no latent thoughts.
    """
    subject.need_thoughts()
    assert classifier.measured
    rows = []
    for rule, evaluated in (("constant", subject.baseline), ("classifier", subject.ask(stop=classifier.stop))):
        rows.append({"rule": rule, "thoughts": evaluated.result.num_thoughts, **accuracy_of(evaluated.result)})
    facts = {
        "classifier_accuracy": classifier.measured.accuracy,
        "by_place_alone": float(np.mean([max(p, 1 - p) for p in classifier.measured.positives])),
        "trained_on": classifier.measured.trained_on,
    }
    return Study("stopping", rows, facts)


def asked_questions(subject: Subject) -> Study:
    """The questions (`question`: the index) and the model's answers with the trained number of thoughts."""
    rows = [
        {"question": i, "text": p.question, "gold": p.gold, "predicted": p.predicted, "correct": p.correct}
        for i, p in enumerate(subject.baseline.predictions)
    ]
    return Study("asked", rows)


def next_step_values(subject: Subject) -> list[Study]:
    """The value of each node after each number of thoughts: the studies values, parallelism and heights.

    The value of a node is the probability that the next step names it. The tokens before the name are forced, and the
    probability is the product over the name's tokens (arXiv 2412.06769, section 5.2). In sentences a step begins with
    "Every" and the node where its edge starts, so there are no values before the first thought. Numbers of thoughts
    that are not a whole number of steps are left out.

    A node is `ahead` if its distance from the root is that of the node which the next step names. No node is ahead if
    the target has been reached, since then there is no next step.
    facts: `offset` is the distance from the root of the nodes that the first step may name, 1 in symbols and 0 in
    sentences.

    Raises NotApplicable if the model has no latent thoughts that stand for steps, or the questions have no graphs.
    """
    lm, c, offset = subject.lm, subject.need_steps_of_thoughts(), int(subject.symbolic)
    candidates = [[subject.spellings[node] for node in parsed.graph] for parsed in subject.graphs]
    counts = range(c * (1 - offset), subject.num_trained_thoughts + 1, c)
    probabilities = name_probabilities(lm, subject.question_ids, candidates, counts, subject.batch_size)
    rows = []
    for (question, after), values in sorted(probabilities.items()):
        parsed, named_distance = subject.graphs[question], after // c + offset
        has_next_step = parsed.hops is not None and parsed.hops > after // c
        for node, value in zip(parsed.graph, values, strict=True):
            distance = parsed.distance.get(node)
            rows.append({
                "question": question, "after": after, "node": node, "distance": distance,
                "ahead": has_next_step and distance == named_distance,
                "height_shortest": parsed.shortest_heights.get(node),
                "height_longest": parsed.longest_heights.get(node),
                "leads": node in parsed.remaining, "value": float(f"{value:.6g}"),
            })  # fmt: skip
    facts = {"form": "symbols" if subject.symbolic else "sentences", "offset": offset, "thoughts_per_step": c,
             "warning": None if subject.trained_with_fewer_thoughts else subject.warning}  # fmt: skip
    return [Study("values", rows, facts), _parallelism(rows), _heights(rows)]


def _parallelism(rows: Sequence[dict[str, Any]]) -> Study:
    """Percentiles over the questions of the summed values of the 1, 2 and 3 likeliest nodes ahead (Fig. 6)."""
    values: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ahead"]:
            values[row["after"]][row["question"]].append(row["value"])
    curve_rows, with_nodes_ahead = [], {}
    for after, of_question in sorted(values.items()):
        with_nodes_ahead[str(after)] = len(of_question)
        likeliest = [[*sorted(ahead, reverse=True), 0.0, 0.0][:3] for ahead in of_question.values()]
        curves = np.percentile(np.cumsum(likeliest, axis=1), np.arange(101), axis=0)
        for percentile, (top1, top2, top3) in enumerate(curves.tolist()):
            curve_rows.append({"after": after, "percentile": percentile, "top1": top1, "top2": top2, "top3": top3})
    return Study("parallelism", curve_rows, {"with_nodes_ahead": with_nodes_ahead})


def _heights(rows: Sequence[dict[str, Any]]) -> Study:
    """The mean value of nodes ahead by height, for nodes that lead to the target and for others (Fig. 7)."""
    groups: dict[tuple[int, str, int, bool], list[float]] = defaultdict(list)
    for row in rows:
        for kind in ("shortest", "longest"):
            if row["ahead"] and (height := row[f"height_{kind}"]) is not None:
                groups[row["after"], kind, height, row["leads"]].append(row["value"])
    mean_rows = []
    for (after, kind, height, leads), values in sorted(groups.items()):
        mean, sd = _mean_sd(values)
        mean_rows.append({
            "after": after, "kind": kind, "height": height, "leads": leads, "mean": mean,
            "se": None if sd is None else sd / math.sqrt(len(values)), "count": len(values),
        })  # fmt: skip
    return Study("heights", mean_rows)


def _mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation if there are at least two values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


GROUPS = ("optimal", "frontier", "reachable", "other")


@torch.no_grad()
def inner_products(subject: Subject) -> Study:
    """Each thought's inner product with the input embeddings of nodes (Zhu et al., arXiv 2505.12514, section 6).

    A name of several tokens is represented by its mean embedding. With c thoughts a step, thought i corresponds to the
    nodes ceil(i/c) edges from the root. A question is left out for thoughts beyond the length of its shortest path.
    Groups of nodes: "optimal", at this distance and on a shortest path to the target; "frontier", the others at this
    distance; "reachable", nearer to the root; "other", farther away or not reachable.
    Raises NotApplicable if the model has no latent thoughts that stand for steps, or the questions have no graphs.
    """
    lm, c = subject.lm, subject.need_steps_of_thoughts()
    embed = lm.base.get_input_embeddings()
    vectors = {
        node: embed(torch.tensor(spelling.name, device=lm.device)).float().mean(0).cpu()
        for node, spelling in subject.spellings.items()
    }
    products: dict[tuple[int, str], list[float]] = defaultdict(list)
    for parsed, thoughts_KD in zip(subject.graphs, subject.baseline.thoughts, strict=True):
        nodes_ND = torch.stack([vectors[node] for node in parsed.graph])
        for number, row in enumerate((thoughts_KD @ nodes_ND.T).tolist(), 1):
            distance = math.ceil(number / c)
            if parsed.hops is not None and distance <= parsed.hops:
                for node, product in zip(parsed.graph, row, strict=True):
                    products[number, _group_of(parsed, node, distance)].append(product)
    rows = []
    for number in range(1, subject.num_trained_thoughts + 1):
        for group in GROUPS:
            if values := products[number, group]:
                mean, sd = _mean_sd(values)
                rows.append({"thought": number, "group": group, "mean": mean, "sd": sd, "count": len(values)})
    return Study("inner_products", rows)


def _group_of(parsed: GraphQuestion, node: str, distance: int) -> str:
    from_root = parsed.distance.get(node)
    if from_root == distance:
        return "optimal" if parsed.on_shortest_path(node) else "frontier"
    return "reachable" if from_root is not None and from_root < distance else "other"


@torch.no_grad()
def decoded(subject: Subject, count: int = 3) -> Study:
    """Logit lens: the likeliest tokens of each thought, for the first `count` questions (arXiv 2412.06769, Fig. 9).

    Thoughts that are merged from words are no states that the output layer reads. Of these it is what the model says in
    their place: the likeliest words of the group that the thought merges, read from the state before it. facts:
    `read`, "thoughts" or "states before".

    Raises NotApplicable if the model has no latent thoughts, or if they are mixtures of words' embeddings.
    """
    subject.need_thoughts()
    merges = subject.lm.reasoning.slot.merges
    if not merges and not subject.lm.feedback.slot.read_by_head:
        raise NotApplicable(
            f"The thoughts are {subject.lm.feedback.slot.describe()}: input embeddings, not states that the head reads."
        )
    thoughts_NKD = subject.baseline.thoughts[:count]
    read = _said_in_their_place(subject, thoughts_NKD) if merges else (
        logit_lens(subject.lm, thoughts_KD, SHOWN_TOKENS) for thoughts_KD in thoughts_NKD
    )  # fmt: skip
    rows = [
        {"question": question, "thought": thought, "rank": rank, "token": text, "probability": value}
        for question, thoughts in enumerate(read)
        for thought, tokens in enumerate(thoughts, 1)
        for rank, (text, value) in enumerate(tokens, 1)
    ]
    return Study("decoded", rows, {"read": "states before" if merges else "thoughts"})


def _said_in_their_place(subject: Subject, thoughts_NKD: torch.Tensor) -> Iterator[list[list[tuple[str, float]]]]:
    """For each question and thought, the likeliest words by the state before it; of the added tokens only `<eot>`."""
    lm, (_, K, _) = subject.lm, thoughts_NKD.shape
    before = slot_with_markers(lm.reasoning, lm.special, 0).tolist()[:-1]
    never = [token for token in lm.special.added if token != lm.special.eot]
    for question, thoughts_KD in zip(subject.question_ids, thoughts_NKD, strict=False):
        ids_1T = torch.tensor([[*question, *before]], device=lm.device)
        fed_1KD = thoughts_KD[None].to(lm.device)
        states_KD = torch.cat(
            [think(lm, ids_1T, torch.ones_like(ids_1T), k, thoughts=fed_1KD[:, :k]).states for k in range(K)]
        )
        logits_KV = lm.feedback.next_word(states_KD, lm)
        logits_KV[:, never] = -torch.inf
        yield likeliest_tokens(lm, logits_KV, SHOWN_TOKENS)
