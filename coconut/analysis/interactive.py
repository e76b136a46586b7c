"""One question at a time, as a page shows it: what a model does with it after each number of thoughts."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import networkx
import torch

from coconut.analysis.graph_layout import place_nodes
from coconut.analysis.node_probabilities import Spelling, name_probabilities, spell
from coconut.analysis.probes import MORE, SHOWN_TOKENS, Subject
from coconut.config import Precision
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import encode_questions, unknown_id, unknown_in
from coconut.generation.generate import logit_lens
from coconut.methods import Slot
from coconut.tasks import prosqa

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


@dataclass(frozen=True)
class InteractiveModel:
    """A trained model and the rows whose questions can be drawn. It answers one question at a time.

    `about`: what the page says of the run.
    """

    subject: Subject
    about: dict[str, Any]
    precision: Precision = Precision.float32
    max_new_tokens: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def draw(self, row: int) -> dict[str, Any]:
        """As `ask`, the question of a row of the run's file. Raises ValueError if there is no such row."""
        examples = self.subject.examples
        if not 0 <= row < len(examples):
            there = f"The rows are 0 to {len(examples) - 1}" if examples else "No file of the run's data is here"
            raise ValueError(f"There is no row {row}. {there}.")
        return self.ask(examples[row].question, examples[row].answer) | {"row": row}

    def ask(self, question: str, right: str | None = None) -> dict[str, Any]:
        """What the page shows of a question: its graph, the thoughts, and what follows each number of them.

        `right`: the right answer; by default the one that the question's graph decides, if it does.
        Raises ValueError if there is no question, or no room for it in the model's context.
        """
        from coconut.engine.base import autocast

        if not question.strip():
            raise ValueError("There is no question. Type one, or draw one.")
        lm, task = self.subject.lm, self.subject.task
        parsed, notes = None, []
        if task.name == prosqa.name:
            try:
                parsed = prosqa.parse_question(question)
            except ValueError as error:
                notes.append(f"This tells no graph. {error}")
        right = right or (parsed and right_answer(question, parsed))
        with self.lock, autocast(lm.device, self.precision):
            if unknown := unknown_in(lm.tokenizer, question):
                notes.append(f"The model has no word for {', '.join(unknown)}.")
            spellings = spell_nodes(lm, parsed) if parsed and self._thinks else {}
            prompt = self._prompt(question, spellings)
            after, thoughts = self._after_each(prompt, right)
            names = self._names(prompt, spellings, symbolic=bool(parsed and parsed.symbolic))
        return {
            "row": None,
            "question": question,
            "right": right,
            "notes": notes,
            "graph": parsed and picture(question, parsed, right),
            "thoughts": thoughts,
            "after": [one | {"names": names.get(one["thoughts"])} for one in after],
        }

    @property
    def counts(self) -> list[int]:
        """The numbers of thoughts, or of pauses, that a question is asked with."""
        most = 0 if self.subject.lm.reasoning.slot is Slot.none else self.subject.num_trained_thoughts + MORE
        return list(range(most + 1))

    @property
    def _thinks(self) -> bool:
        return self.subject.lm.reasoning.slot is Slot.thought

    def _prompt(self, question: str, spellings: Mapping[str, Spelling]) -> list[int]:
        """The question's tokens. Raises ValueError if the most thoughts and a name leave no room for them."""
        lm, most = self.subject.lm, self.counts[-1]
        [prompt] = encode_questions(lm.tokenizer, [question], lm.reasoning.format)
        name = max((len(spelling.before) + len(spelling.name) for spelling in spellings.values()), default=1)
        if len(prompt) + len(slot_with_markers(lm.reasoning, lm.special, most)) + name > lm.max_sequence_length:
            slot = f"{most} {lm.reasoning.slot.value}s and " if most else ""
            raise ValueError(
                f"The question has {len(prompt):,} tokens, which leaves no room for {slot}an answer in the model's "
                f"context of {lm.max_sequence_length:,} tokens. Ask something shorter."
            )
        return prompt

    def _after_each(self, prompt: list[int], right: str | None) -> tuple[list[dict[str, Any]], list[Any]]:
        """What the model says after each number of thoughts, and the likeliest tokens of each thought."""
        lm, task, counts = self.subject.lm, self.subject.task, self.counts
        ids_BT = torch.tensor([prompt]).expand(len(counts), -1)
        out = lm.generate(ids_BT, num_thoughts=counts, max_new_tokens=self.max_new_tokens)
        found = []
        for count, text, truncated in zip(counts, out.texts, out.truncated.tolist(), strict=True):
            answer = task.read_answer(text, lm.reasoning.format)
            correct = None if right is None else task.judge(answer, right)
            found.append(
                {"thoughts": count, "text": text.strip(), "answer": answer, "correct": correct, "truncated": truncated}
            )
        return found, logit_lens(lm, out.thoughts[-1], SHOWN_TOKENS) if self._thinks else []

    def _names(
        self, prompt: list[int], spellings: Mapping[str, Spelling], symbolic: bool
    ) -> dict[int, dict[str, float]]:
        """By number of thoughts: how likely each node is to be named by the next step.

        In sentences the first step begins with the root, so that nothing is to be seen before it is thought.
        """
        if not spellings:
            return {}
        lm = self.subject.lm
        counts = [count for count in self.counts if symbolic or count >= lm.reasoning.thoughts_per_step]
        values = name_probabilities(lm, [prompt], [list(spellings.values())], counts, batch_size=1)
        return {count: dict(zip(spellings, values[0, count], strict=True)) for count in counts}


def spell_nodes(lm: LatentLM, parsed: prosqa.Question) -> dict[str, Spelling]:
    """How the names of the nodes are encoded, but for those that the tokenizer has no word for."""
    nodes = dict.fromkeys(node for pair in [*parsed.edges, (parsed.root, parsed.root), parsed.options] for node in pair)
    unknown = unknown_id(lm.tokenizer)
    spellings = spell(lm, list(nodes), parsed.symbolic)
    return {node: spelling for node, spelling in spellings.items() if unknown not in spelling.name}


def right_answer(question: str, parsed: prosqa.Question) -> str | None:
    """The answer that the graph decides: the only option that the root reaches."""
    reached = {parsed.root, *networkx.descendants(prosqa.graph(question), parsed.root)}
    answers = zip(parsed.options, prosqa.candidates(question) or (), strict=True)
    found = [answer for option, answer in answers if option in reached]
    return found[0] if len(found) == 1 else None


def picture(question: str, parsed: prosqa.Question, right: str | None) -> dict[str, Any]:
    """The graph to be drawn: its nodes with column and row, in the order of their distance from the root."""
    graph = prosqa.graph(question)
    places = place_nodes(graph, parsed.root)
    distance = dict(networkx.single_source_shortest_path_length(graph, parsed.root))
    target = prosqa.read_target(right) if right else None
    order = sorted(graph, key=lambda node: (node not in distance, places[node][0], -places[node][1]))
    return {
        "nodes": [{"name": node, "x": places[node][0], "y": -places[node][1]} for node in order],
        "edges": list(graph.edges),
        "root": parsed.root,
        "options": parsed.options,
        "target": target,
        "way": networkx.shortest_path(graph, parsed.root, target) if target in distance else [],
        "symbolic": parsed.symbolic,
    }
