"""Generate pointer chasing, a task whose difficulty is set by the number of hops.

Run `coconut data pointers --help`. All nodes lie on one cycle, so that no node is passed twice and all nodes
are equally likely answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from string import ascii_lowercase
from typing import Any

from coconut.tasks import pointers
from coconut.utils.hydra_app import application
from data_builders.builder_app import Builder, run, text_key
from data_builders.fields import text_field
from data_builders.hints import check_share, planting
from data_builders.parallel_generation import Recipe, Row
from data_builders.release_formats import Kind, SourceKeys, open_released, rows_of
from data_builders.statistics import Measures

COUNTS = {"train": 20000, "valid": 500, "test": 1000}

FIELDS = {
    "question": "the pointers in random order, then how many hops from which node",
    "steps": "the node after each hop",
    "answer": "the node after the last one",
    "hops": "how many there are",
}


@dataclass
class PointersBuild(SourceKeys):
    name: str = "pointers"
    nodes: int = 10
    hops_from: int = 1
    hops_to: int = 6
    decay: float = 1.0  # ratio of the frequencies of h + 1 and h hops
    hint: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.hint)
        given = self.dials() | {"hint": self.hint}
        self.refuse_dials({name: dial for name, dial in given.items() if dial != getattr(PointersBuild, name)})
        if not 1 <= self.hops_from <= self.hops_to < self.nodes <= len(ascii_lowercase):
            raise ValueError(
                f"hops_from={self.hops_from}, hops_to={self.hops_to}, nodes={self.nodes}; it must be "
                "1 <= from <= to < nodes <= 26, since no node is passed twice and each has a letter."
            )
        if not 0 < self.decay <= 1:
            raise ValueError(
                f"decay is {self.decay}; it must be above 0 and at most 1, where all hops are as frequent."
            )

    def dials(self) -> dict[str, Any]:
        return self.given("nodes", "hops_from", "hops_to", "decay")


def recipe(config: PointersBuild) -> Recipe:
    return Recipe(partial(draw_row, **config.dials()), checked, measure, planting(config.hint, itemgetter("answer")))


def draw_row(
    rng: random.Random, wanted: Callable[[int], bool], nodes: int, hops_from: int, hops_to: int, decay: float
) -> tuple[Row, int] | None:
    """A row and its key, or None if the key is not wanted."""
    cycle = rng.sample(ascii_lowercase[:nodes], nodes)
    [hops] = rng.choices(range(hops_from, hops_to + 1), [decay**far for far in range(hops_to + 1 - hops_from)])
    told = [f"{a} {b}" for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
    rng.shuffle(told)
    row: Row = {
        "question": f"{' | '.join(told)} ? from {cycle[0]} go {hops}",
        "steps": cycle[1 : hops + 1],
        "answer": cycle[hops],
        "hops": hops,
    }
    key = key_of(row)
    return (row, key) if wanted(key) else None


def key_of(row: Row) -> int:
    """A key that is equal for questions that differ only in the order of the pointers."""
    return text_key({"question": _asked(row)})


def alike(row: Row, other: Row) -> bool:
    return _asked(row) == _asked(other)


def _asked(row: Row) -> str:
    found = pointers.parse_question(row["question"])
    return f"{sorted(found.pointers.items())} {found.hops} {found.start}"


def checked(record: Any) -> Row:
    """The record. Raises ValueError unless question, steps, answer and number of hops agree."""
    question, answer = text_field(record, "question"), text_field(record, "answer")
    asked = pointers.parse_question(question)
    path = pointers.walk(asked)
    if record.get("steps") != path:
        raise ValueError(f"the steps are {record.get('steps')!r}, and the question's are {path}.")
    if answer != path[-1] or record.get("hops", asked.hops) != asked.hops:
        raise ValueError(
            f"the answer is {answer!r} and hops {record.get('hops')}; it is {path[-1]} after {asked.hops}."
        )
    return record


def released_rows(path: str) -> list[Row]:
    """The rows of a file in the common format, each checked against its own text."""
    return rows_of(open_released(path, Kind.rows), checked)


def measure(row: Row) -> Measures:
    asked = pointers.parse_question(row["question"])
    return {"nodes": float(len(asked.pointers)), "hops": str(asked.hops), "answer": row["answer"]}


BUILDER = Builder(
    task="pointers",
    title="where does one arrive after so many hops?",
    about="Pointer chasing: every node points to another, and the question asks where so many hops from a node lead.",
    fields=FIELDS,
    read=lambda config, path: released_rows(path),
    measure=measure,
    key=key_of,
    alike=alike,
    recipe=recipe,
    counts=lambda config: COUNTS,
    made=lambda config: {"dials": config.dials(), "hint": config.hint},
)

build = partial(run, builder=BUILDER)
main = application("build_pointers", PointersBuild, build)

if __name__ == "__main__":
    main()
