"""Answer one question after each number of thoughts, for the demo page."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx
import torch

from coconut.analysis.graph_layout import place_nodes
from coconut.analysis.node_probabilities import Spelling, name_probabilities, spell
from coconut.analysis.probes import EXTRA_THOUGHTS, SHOWN_TOKENS, Subject
from coconut.config import Precision
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions, unknown_id, unknown_in
from coconut.engine.base import autocast
from coconut.generation.generate import logit_lens
from coconut.models.latent_lm import LatentLM
from coconut.tasks import prosqa
from coconut.tasks.chain import read_answer


@dataclass(frozen=True)
class InteractiveModel:
    """A trained model, and example questions of its run. It answers one question at a time.

    `about`: facts about the run that the page shows.
    """

    subject: Subject
    about: dict[str, Any]
    precision: Precision = Precision.float32
    max_new_tokens: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def ask_row(self, row: int) -> dict[str, Any]:
        """Ask the question of a row of the run's data file; see `ask`. Raises ValueError if there is no such row."""
        examples = self.subject.examples
        if not 0 <= row < len(examples):
            there = f"The rows are 0 to {len(examples) - 1}" if examples else "The run's data file is missing"
            raise ValueError(f"There is no row {row}. {there}.")
        return self.ask(examples[row].question, examples[row].answer) | {"row": row}

    def ask(self, question: str, right: str | None = None) -> dict[str, Any]:
        """Answer a question after each number of thoughts. Gives what the page shows, as JSON.

        That is the graph of the question, the likeliest tokens of each thought, and for each number of thoughts the
        answer and the probability of each node as the next step.
        `right`: the right answer; by default the only option that the root reaches in the graph, if there is one.
        Raises ValueError if the question is empty or too long for the model's context.
        """
        if not question.strip():
            raise ValueError("There is no question. Type one, or draw one.")
        lm, parsed, notes = self.subject.lm, None, []
        if self.subject.task.name == prosqa.name:
            try:
                parsed = prosqa.parse_question(question)
            except ValueError as error:
                notes.append(f"The question describes no graph. {error}")
        right = right or (parsed and right_answer(question, parsed))
        with self.lock, autocast(lm.device, self.precision):
            if unknown := unknown_in(lm.tokenizer, question):
                notes.append(f"Not in the model's vocabulary: {', '.join(unknown)}.")
            spellings = spell_nodes(lm, parsed) if parsed and lm.reasoning.slot.thinks else {}
            prompt = self._prompt(question, spellings)
            after, thoughts = self._after_each(prompt, right)
            names = self._names(prompt, spellings, symbolic=bool(parsed and parsed.symbolic))
        return {
            "row": None, "question": question, "right": right, "notes": notes,
            "graph": parsed and describe_graph(question, parsed, right), "thoughts": thoughts,
            "after": [one | {"names": names.get(one["thoughts"])} for one in after],
        }  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """The numbers of thoughts, or of pause tokens, after which a question is answered."""
        is_empty = self.subject.lm.reasoning.slot.is_empty
        return list(range(1 if is_empty else self.subject.num_trained_thoughts + EXTRA_THOUGHTS + 1))

    def _prompt(self, question: str, spellings: Mapping[str, Spelling]) -> list[int]:
        """The token ids of a question. Raises ValueError if the most thoughts and a name do not fit after it."""
        lm, max_thoughts = self.subject.lm, self.counts[-1]
        [prompt] = encode_questions(lm.tokenizer, [question], lm.reasoning.format)
        name_length = max((len(spelling.before) + len(spelling.name) for spelling in spellings.values()), default=1)
        longest_slot = slot_with_markers(lm.reasoning, lm.special, max_thoughts)
        if len(prompt) + len(longest_slot) + name_length > lm.max_sequence_length:
            slot = f"{max_thoughts} {lm.reasoning.slot.noun}s and " if max_thoughts else ""
            raise ValueError(
                f"The question has {len(prompt):,} tokens, which leaves no room for {slot}an answer in the model's "
                f"context of {lm.max_sequence_length:,} tokens. Ask something shorter."
            )
        return prompt

    def _after_each(self, prompt: list[int], right: str | None) -> tuple[list[dict[str, Any]], list[Any]]:
        """The answer after each number of thoughts, and each thought read with the logit lens, if it can be."""
        lm, task, counts = self.subject.lm, self.subject.task, self.counts
        ids_BT = torch.tensor([prompt]).expand(len(counts), -1)
        out = lm.generate(ids_BT, num_thoughts=counts, max_new_tokens=self.max_new_tokens)
        answers = []
        for count, text, truncated in zip(counts, out.texts, out.truncated.tolist(), strict=True):
            answer = read_answer(text, lm.reasoning.format)
            correct = None if right is None else task.judge(answer, right)
            answers.append(
                {"thoughts": count, "text": text.strip(), "answer": answer, "correct": correct, "truncated": truncated}
            )
        has_lens = lm.reasoning.slot.thinks and lm.feedback.slot.read_by_head
        return answers, logit_lens(lm, out.thoughts[-1], SHOWN_TOKENS) if has_lens else []

    def _names(
        self, prompt: list[int], spellings: Mapping[str, Spelling], symbolic: bool
    ) -> dict[int, dict[str, float]]:
        """For each number of thoughts, the probability of each node as the next step.

        In sentences the first step always begins with the root. So there are no probabilities before the thoughts that
        replace it.
        """
        if not spellings:
            return {}
        lm = self.subject.lm
        if lm.reasoning.slot.thinks and not lm.reasoning.thoughts_per_step:  # no step follows the thoughts
            return {}
        counts = [count for count in self.counts if symbolic or count >= lm.reasoning.thoughts_per_step]
        values = name_probabilities(lm, [prompt], [list(spellings.values())], counts, batch_size=1)
        return {count: dict(zip(spellings, values[0, count], strict=True)) for count in counts}


def spell_nodes(lm: LatentLM, parsed: prosqa.Question) -> dict[str, Spelling]:
    """The token ids of the names of nodes, without nodes that are not in the vocabulary."""
    nodes = dict.fromkeys(node for pair in [*parsed.edges, (parsed.root, parsed.root), parsed.options] for node in pair)
    unknown = unknown_id(lm.tokenizer)
    spellings = spell(lm, list(nodes), parsed.symbolic)
    return {node: spelling for node, spelling in spellings.items() if unknown not in spelling.name}


def right_answer(question: str, parsed: prosqa.Question) -> str | None:
    """The answer that names the only option that the root reaches; None if it reaches both or neither."""
    reached = {parsed.root, *networkx.descendants(prosqa.graph(question), parsed.root)}
    answers = zip(parsed.options, prosqa.candidates(question) or (), strict=True)
    reachable = [answer for option, answer in answers if option in reached]
    return reachable[0] if len(reachable) == 1 else None


def describe_graph(question: str, parsed: prosqa.Question, right: str | None) -> dict[str, Any]:
    """The graph as JSON for drawing. `nodes` have a column x and a row y and are sorted by distance from the root."""
    graph = prosqa.graph(question)
    places = place_nodes(graph, parsed.root)
    distance = dict(networkx.single_source_shortest_path_length(graph, parsed.root))
    target = prosqa.read_target(right) if right else None
    order = sorted(graph, key=lambda node: (node not in distance, places[node][0], -places[node][1]))
    return {
        "nodes": [{"name": node, "x": places[node][0], "y": -places[node][1]} for node in order],
        "edges": list(graph.edges), "root": parsed.root, "options": parsed.options, "target": target,
        "way": networkx.shortest_path(graph, parsed.root, target) if target in distance else [],
        "symbolic": parsed.symbolic,
    }  # fmt: skip
