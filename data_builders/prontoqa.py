"""ProntoQA: the output of the original generator, checked and converted.

Run `python -m data_builders.prontoqa --help`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coconut.cli import application
from data_builders.sources import Kind, SourceKeys, expect, open_released, rows_of, text_field
from data_builders.writing import Row, write_splits

ASKED = "True or false: "


@dataclass
class ProntoqaBuild(SourceKeys):
    name: str = "prontoqa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError(
                "No file is given. Write one with the generator at https://github.com/asaparov/prontoqa "
                "(run_experiment.py --ontology fictional --min-hops 5 --max-hops 5 --ordering random ...), "
                "then give it as source=FILE, or one for each split as train=FILE valid=FILE test=FILE."
            )


def build(config: ProntoqaBuild) -> None:
    made = {"task": "prontoqa", "seed": config.seed, "sources": config.described()}
    write_splits(config.out_dir, config.name, config.read(released_rows), made)


def released_rows(path: str) -> list[Row]:
    """The test example of every record; what a few-shot file holds beside it is left out."""
    released = open_released(path)
    expect(released, Kind.prontoqa)
    return rows_of(released, converted)


def converted(record: Any) -> Row:
    """Steps are the sentences of the proof two by two; the last may be one alone."""
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
    if (proof[-1] == query.removeprefix(ASKED)) != (answer == "True"):
        raise ValueError(f"the proof ends in {proof[-1]!r}, which does not make {query!r} {answer}.")
    return {
        "question": f"{question} {query}",
        "steps": [" ".join(proof[i : i + 2]) for i in range(0, len(proof), 2)],
        "answer": answer,
    }


main = application("build_prontoqa", ProntoqaBuild, build)

if __name__ == "__main__":
    main()
