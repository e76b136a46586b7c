"""Build ProntoQA: generate rows, or check and convert the output of the original generator.

Run `coconut data prontoqa --help`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import partial
from typing import Any

from coconut.utils.hydra_app import application
from data_builders.builder_app import Builder, run, text_key
from data_builders.fields import text_field
from data_builders.ontology import Names, OntologyDials, Ordering, draw, measure
from data_builders.parallel_generation import Recipe, Row
from data_builders.prover import ASKED, check
from data_builders.release_formats import Kind, SourceKeys, open_released, rows_of


class Preset(StrEnum):
    released = "released"  # as the original generator writes it: 5 hops, random ordering


COUNTS = {"train": 9000, "valid": 200, "test": 800}

FIELDS = {
    "question": "rules and facts in the order asked for, then the query",
    "steps": "the sentences of the proof two by two; the last is the conclusion",
    "answer": "True or False",
    "hops": "rules that the proof applies",
    "levels": "of the chain of concepts",
    "entity": "asked about",
    "chain": "concepts of the proof, from the entity's own up",
    "property": "the word asked about",
    "negated_query": "whether the query says not",
}


@dataclass
class ProntoqaBuild(SourceKeys):
    """Dials that are null have the defaults of OntologyDials."""

    name: str = "prontoqa"
    preset: Preset | None = None
    hops_from: int | None = None
    hops_to: int | None = None
    ordering: Ordering | None = None
    names: Names | None = None
    spare_levels: int | None = None
    distractors: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_dials(self.given("preset", *DIALS))
        self.dials()

    def dials(self) -> OntologyDials:
        return OntologyDials(**self.given(*DIALS))


DIALS = tuple(dial.name for dial in fields(OntologyDials))


def recipe(config: ProntoqaBuild) -> Recipe:
    return Recipe(partial(drawn, dials=config.dials()), check, measure)


def drawn(rng: random.Random, wanted: Callable[[int], bool], dials: OntologyDials) -> tuple[Row, int] | None:
    row = draw(rng, dials)
    key = text_key(row)
    return (row, key) if wanted(key) else None


def released_rows(path: str) -> list[Row]:
    """The rows of a file of the original generator (of each record the test example), or of rows generated here."""
    released = open_released(path, Kind.prontoqa, Kind.rows)
    return rows_of(released, converted if released.kind is Kind.prontoqa else checked)


def checked(record: Any) -> Row:
    """A row in the common format. Raises ValueError unless `prover.check` accepts it."""
    row = {**record, **{key: text_field(record, key) for key in ("question", "answer")}}
    if not isinstance(row.get("steps"), list) or not all(isinstance(step, str) for step in row["steps"]):
        raise ValueError(f"'steps' is {row.get('steps')!r}; it must be a list of sentences.")
    check(row)
    return row


def converted(record: Any) -> Row:
    """A record of the original generator as a row: steps are pairs of sentences of the proof, the last possibly one.

    Raises ValueError unless `prover.check` accepts it.
    """
    if not isinstance(record, dict) or "test_example" not in record:
        raise ValueError("it has no 'test_example'.")
    example = record["test_example"]
    question, query, answer = (text_field(example, key) for key in ("question", "query", "answer"))
    proof = example.get("chain_of_thought")
    if not isinstance(proof, list) or not proof or not all(isinstance(s, str) and s.strip() for s in proof):
        raise ValueError(f"'chain_of_thought' is {proof!r}; it must be a list of sentences.")
    if answer not in ("True", "False"):
        raise ValueError(f"'answer' is {answer!r}; it must be 'True' or 'False'.")
    if not query.startswith(ASKED):
        raise ValueError(f"'query' is {query!r}; it must begin with {ASKED!r}.")
    proof = [sentence.strip() for sentence in proof]
    steps = [" ".join(proof[i : i + 2]) for i in range(0, len(proof), 2)]
    row = {"question": f"{question} {query}", "steps": steps, "answer": answer}
    check(row)
    return row


BUILDER = Builder(
    task="prontoqa",
    title="is a statement about an entity true or false?",
    about=(
        "ProntoQA (Saparov and He, arXiv 2210.01240): a fictional ontology, told in sentences, and a statement about "
        "one entity that it proves true or false."
    ),
    fields=FIELDS,
    read=lambda config, path: released_rows(path),
    measure=measure,
    recipe=recipe,
    counts=lambda config: COUNTS,
    made=lambda config: {"preset": Preset.released.value, "dials": asdict(config.dials())},
)

build = partial(run, builder=BUILDER)
main = application("build_prontoqa", ProntoqaBuild, build)

if __name__ == "__main__":
    main()
