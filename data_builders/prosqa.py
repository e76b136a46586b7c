"""Build ProsQA and its variants: generate random graphs with a question, or check released files.

Run `coconut data prosqa --help`. The task is by Hao et al. (arXiv 2412.06769); docs/data.md describes the
presets and compares them with the released data.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import partial
from itertools import pairwise
from typing import Any

import networkx

from coconut.tasks import prosqa
from coconut.utils.hydra_app import application
from data_builders.builder_app import Builder, run
from data_builders.chains import ChainDials
from data_builders.entity_names import Names, pools
from data_builders.fields import text_field
from data_builders.graph_measures import alike, key_of, measure, parsed, shape
from data_builders.graphs import GraphDials
from data_builders.hints import check_share, planting
from data_builders.parallel_generation import Recipe, Row
from data_builders.release_formats import Kind, SourceKeys, open_released, rows_of


class Preset(StrEnum):
    released = "released"  # like the released ProsQA
    paper = "paper"  # as the paper's appendix prints it
    graphs = "graphs"  # small graphs of two chains, in symbols


class Form(StrEnum):
    sentences = "sentences"
    symbols = "symbols"  # 0 3 | 4 7 | ... ? 5 or 3 from 0


_RELEASED: dict[str, Any] = {
    "form": Form.sentences, "names": Names.released, "nodes": 28, "branching": 1.5, "edges": None, "depth_weight": 1.5,
    "first_family": 0.35, "second_family": 0.45, "as_printed": False, "hops_from": 3, "hops_to": 6, "plant": False,
    "equalize_depth": False,
}  # fmt: skip
DIALS: dict[Preset, dict[str, Any]] = {
    Preset.released: _RELEASED,
    Preset.paper: _RELEASED | {"nodes": 26, "second_family": 0.35, "as_printed": True},
    Preset.graphs: {"form": Form.symbols, "names": Names.released, "nodes": 10, "hops_from": 2, "hops_to": 3},
}
COUNTS = {
    Preset.released: {"train": 17886, "valid": 300, "test": 500},
    Preset.paper: {"train": 17886, "valid": 300, "test": 500},
    Preset.graphs: {"train": 20000, "valid": 500, "test": 500},
}

FIELDS = {
    "question": "the edges in random order, then the question; either option is named first equally often",
    "steps": "one shortest path from the root to the target, an edge (in symbols: a node) a step",
    "answer": "the target, in the form of the question",
    "idx_to_symbol": "the name of each node",
    "edges": "pairs of nodes, from parent to child",
    "root, target, neg_target": "nodes: asked about, right, wrong",
    "nodes_at_distance": "the nodes at 0, 1, 2, ... edges from the root; the others it does not reach",
}


@dataclass
class ProsqaBuild(SourceKeys):
    """Dials that are null have the preset's values."""

    name: str = "prosqa"
    preset: Preset | None = None
    form: Form | None = None
    names: Names | None = None
    nodes: int | None = None
    branching: float | None = None
    edges: int | None = None
    depth_weight: float | None = None
    first_family: float | None = None
    second_family: float | None = None
    as_printed: bool | None = None
    hops_from: int | None = None
    hops_to: int | None = None
    plant: bool | None = None
    equalize_depth: bool | None = None
    hint: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.hint)
        given = self.given(*_RELEASED)
        self.refuse_dials({"preset": self.preset} if self.preset else given)
        self.refuse_dials({"hint": self.hint} if self.hint else {})
        if self.files:
            return
        self.preset = self.preset or Preset.released
        for dial, value in given.items():
            if dial not in DIALS[self.preset]:
                raise ValueError(
                    f"{dial}={value} is not a dial of preset={self.preset}, which has: {', '.join(DIALS[self.preset])}."
                )
        if "edges" in given and "branching" in given:
            raise ValueError(
                f"edges={self.edges} and branching={self.branching} are both given: edges is the exact number in every "
                "graph, branching the mean number of a node's parents. Keep one of them."
            )
        dials = self.dials()
        graph = self.graph_dials()
        if dials["form"] is Form.symbols:
            if self.names:
                raise ValueError(f"names={self.names} is for form=sentences; in symbols nodes are numbered.")
            return
        concepts = len(pools(dials["names"])[1])
        if graph.nodes - 2 > concepts:
            raise ValueError(
                f"nodes={graph.nodes} may need {graph.nodes - 2} names of concepts, and names={dials['names']} has "
                f"{concepts}. " + ("Set names=generated, or lower nodes." if concepts < 100 else "Lower nodes.")
            )

    def dials(self) -> dict[str, Any]:
        """All dials: the preset's, overridden by those that are given."""
        assert self.preset
        return DIALS[self.preset] | self.given(*_RELEASED)

    def graph_dials(self) -> GraphDials | ChainDials:
        kind = ChainDials if self.preset is Preset.graphs else GraphDials
        values = {field.name: self.dials()[field.name] for field in fields(kind)}
        if kind is GraphDials:
            values["hops_to"] = values["hops_to"] or None
        return kind(**values)


def recipe(config: ProsqaBuild) -> Recipe:
    dials = config.dials()
    make = partial(draw_row, dials=config.graph_dials(), form=dials["form"], names=dials["names"])
    return Recipe(make, prove, measure, planting(config.hint, _target_name))


def _target_name(row: Row) -> str:
    return row["idx_to_symbol"][row["target"]]


# --- making ---------------------------------------------------------------------------------------


def draw_row(
    rng: random.Random, wanted: Callable[[int], bool], dials: GraphDials | ChainDials, form: Form,
    names: Names = Names.released,
) -> tuple[Row, int] | None:  # fmt: skip
    """A row and its key, or None if the key is not wanted. Raises ValueError if these dials give no graph."""
    while True:
        graph = dials.draw(rng)
        key = shape(graph.nodes, graph.edges, graph.root, (graph.target, graph.distractor))
        if not wanted(key):
            return None
        parents: list[list[int]] = [[] for _ in range(graph.nodes)]
        for a, b in graph.edges:
            parents[b].append(a)
        if form is Form.symbols:
            symbols = [str(number) for number in rng.sample(range(dials.nodes), graph.nodes)]
            break
        persons, concepts = pools(names)
        rootless = [node for node in range(graph.nodes) if not parents[node]]
        if len(rootless) <= len(persons):
            named = dict(zip(rootless, rng.sample(persons, len(rootless)), strict=True))
            others = iter(rng.sample(concepts, graph.nodes - len(rootless)))
            symbols = [named[node] if node in named else next(others) for node in range(graph.nodes)]
            break
    levels, path = _levels_and_path(rng, parents, graph.root, graph.target)
    told = [(symbols[a], symbols[b], not parents[a]) for a, b in graph.edges]
    rng.shuffle(told)
    pair = [symbols[graph.target], symbols[graph.distractor]]
    rng.shuffle(pair)
    root, target = symbols[graph.root], symbols[graph.target]
    if form is Form.symbols:
        question = " | ".join(f"{a} {b}" for a, b, _ in told) + f" ? {pair[0]} or {pair[1]} from {root}"
        answer, steps = target, [symbols[node] for node in path[1:]]
    else:
        question = " ".join(_sentence(*edge) for edge in told) + f" Is {root} a {pair[0]} or {pair[1]}?"
        answer = f"{root} is a {target}."
        steps = [_sentence(symbols[a], symbols[b], not parents[a]) for a, b in pairwise(path)]
    row: Row = {
        "question": question, "steps": steps, "answer": answer, "idx_to_symbol": symbols,
        "edges": [list(edge) for edge in graph.edges], "root": graph.root, "target": graph.target,
        "neg_target": graph.distractor, "nodes_at_distance": levels,
    }  # fmt: skip
    return row, key


def _sentence(a: str, b: str, is_person: bool) -> str:
    return f"{a} is a {b}." if is_person else f"Every {a} is a {b}."


def _levels_and_path(
    rng: random.Random, parents: list[list[int]], root: int, target: int
) -> tuple[list[list[int]], list[int]]:
    """The nodes at each distance from the root, and one of the shortest paths, each equally likely."""
    distance, ways = {root: 0}, {root: 1}
    for node, above in enumerate(parents):
        reached = [p for p in above if p in distance]
        if reached:
            nearest = min(distance[p] for p in reached)
            distance[node] = nearest + 1
            ways[node] = sum(ways[p] for p in reached if distance[p] == nearest)
    levels: list[list[int]] = [[] for _ in range(max(distance.values()) + 1)]
    for node, far in distance.items():
        levels[far].append(node)
    path = [target]
    while path[-1] != root:
        nearer = [p for p in parents[path[-1]] if distance.get(p) == distance[path[-1]] - 1]
        path += rng.choices(nearer, [ways[p] for p in nearer])
    return levels, path[::-1]


# --- proving --------------------------------------------------------------------------------------


def released_rows(path: str) -> list[Row]:
    """The rows of a released file, in its order, each checked against its own text."""
    return rows_of(open_released(path, Kind.prosqa), checked)


def prove(row: Row) -> None:
    """Verify a generated row: parse its text, and check its other fields against the graph with networkx.

    Raises ValueError if `checked` does, if the distractor is reached, if the steps are not a shortest path, if an edge
    runs from a higher to a lower number, or if `nodes_at_distance` is wrong.
    """
    told = _consistent(row)
    names = row["idx_to_symbol"]
    distances = networkx.single_source_shortest_path_length(networkx.DiGraph(told.edges), told.root)
    if names[row["neg_target"]] in distances:
        raise ValueError(f"the distractor {names[row['neg_target']]} can be reached, too.")
    if len(row["steps"]) != distances[names[row["target"]]]:
        raise ValueError(f"the steps {row['steps']} are not a shortest path: {distances[names[row['target']]]} do.")
    if any(a >= b for a, b in row["edges"]):
        raise ValueError(
            f"not every edge runs from a lower to a higher number, so there may be a cycle: {row['edges']}."
        )
    said = {names[node]: far for far, level in enumerate(row["nodes_at_distance"]) for node in level}
    if said != dict(distances):
        raise ValueError(f"nodes_at_distance says {said}, and the graph {dict(distances)}.")


def checked(record: Any) -> Row:
    """The record, stripped. Raises ValueError unless question, graph, steps and answer agree."""
    _consistent(record)
    return {
        **record,
        "question": record["question"].strip(),
        "steps": [step.strip() for step in record["steps"]],
        "answer": record["answer"].strip(),
    }


def _consistent(record: Any) -> prosqa.Question:
    question, answer = text_field(record, "question"), text_field(record, "answer")
    for name in ("steps", "idx_to_symbol", "edges"):
        if not isinstance(record.get(name), list):
            raise ValueError(f"{name!r} is {record.get(name)!r}; it must be a list.")
    steps, symbols, edges = record["steps"], record["idx_to_symbol"], record["edges"]
    if not all(isinstance(step, str) and step.strip() for step in steps) or not steps:
        raise ValueError(f"'steps' is {steps!r}; it must be a list of sentences.")

    def symbol(index: Any) -> str:
        if not isinstance(index, int) or not 0 <= index < len(symbols):
            raise ValueError(f"{index!r} is not the number of a node; idx_to_symbol has {len(symbols)}.")
        if not isinstance(symbols[index], str):
            raise ValueError(f"idx_to_symbol holds {symbols[index]!r}; symbols must be texts.")
        return symbols[index]

    if not all(isinstance(edge, list) and len(edge) == 2 for edge in edges):
        raise ValueError("'edges' must be a list of pairs.")
    listed = [(symbol(a), symbol(b)) for a, b in edges]
    root, target, other = (symbol(record.get(key)) for key in ("root", "target", "neg_target"))
    told = parsed(question)
    if sorted(told.edges) != sorted(listed):
        differing = sorted(set(told.edges) ^ set(listed)) or "the same ones, some of them repeated"
        raise ValueError(f"the question's text and 'edges' differ: {differing}.")
    if told.root != root or set(told.options) != {target, other}:
        raise ValueError(
            f"the question asks whether {told.root} is {' or '.join(told.options)}, and the fields say "
            f"{root}, {target} and {other}."
        )
    path = prosqa.parse_path(steps, root if told.symbolic else None)
    if not path or path[0][0] != root or path[-1][1] != target:
        raise ValueError(f"the steps do not lead from {root} to {target}: {steps}.")
    known = set(told.edges)
    for edge, before in zip(path, [None, *path], strict=False):
        if edge not in known or (before and before[1] != edge[0]):
            raise ValueError(f"the steps are not a path in the graph, at {' -> '.join(edge)}: {steps}.")
    right = target if told.symbolic else f"{root} is a {target}."
    if not prosqa.judge(answer, right):
        raise ValueError(f"the answer is {answer!r}, and the target's is {right!r}.")
    return told


BUILDER = Builder(
    task="prosqa",
    title="which of two nodes can be reached?",
    about=(
        "Random directed acyclic graphs, each with a question: which of two leaves can be reached from a root? The "
        "task is ProsQA (Hao et al., arXiv 2412.06769)."
    ),
    fields=FIELDS,
    read=lambda config, path: released_rows(path),
    measure=measure,
    key=key_of,
    alike=alike,
    recipe=recipe,
    counts=lambda config: COUNTS[config.preset],
    made=lambda config: {"preset": config.preset.value, "dials": config.dials(), "hint": config.hint},
)

build = partial(run, builder=BUILDER)
main = application("build_prosqa", ProsqaBuild, build)

if __name__ == "__main__":
    main()
