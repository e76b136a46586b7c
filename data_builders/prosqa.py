"""ProsQA: small graphs to search, made from scratch, or the released files checked and converted.

Run `python -m data_builders.prosqa --help`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from coconut.cli import application
from coconut.tasks import prosqa
from data_builders.graphs import check_dials, graph_rows
from data_builders.sources import Kind, SourceKeys, expect, open_released, rows_of, text_field
from data_builders.writing import Row, write_splits

__all__ = ["Preset", "ProsqaBuild", "build", "graph_rows", "main", "released_rows"]


class Preset(StrEnum):
    graphs = "graphs"  # one symbol a node, a handful of nodes


COUNTS = {Preset.graphs: {"valid": 500, "test": 500, "train": 20000}}


@dataclass
class ProsqaBuild(SourceKeys):
    name: str = "graphs"
    preset: Preset | None = None
    nodes: int = 8
    min_hops: int = 2
    max_hops: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            self.preset = self.preset or Preset.graphs
            check_dials(self.nodes, self.min_hops, self.max_hops)
            return
        key, path = next(iter(self.files.items()))
        if self.preset:
            raise ValueError(f"preset={self.preset} and {key}={path} are both given. Keep one of them.")
        for dial in fields(self):
            if dial.name in ("nodes", "min_hops", "max_hops") and getattr(self, dial.name) != dial.default:
                raise ValueError(
                    f"{dial.name}={getattr(self, dial.name)} says how graphs are made, but {key}={path} is "
                    "read. Leave one of them out."
                )


def build(config: ProsqaBuild) -> None:
    if config.preset is None:
        splits = config.read(released_rows)
        made: dict[str, Any] = {"seed": config.seed, "sources": config.described()}
    else:
        asked = {split: count for split, count in config.counts.items() if count is not None}
        counts = COUNTS[config.preset] | asked
        dials = {"nodes": config.nodes, "min_hops": config.min_hops, "max_hops": config.max_hops}
        rows = graph_rows(config.seed, sum(counts.values()), **dials)
        splits = {}
        for split, count in counts.items():
            splits[split], rows = rows[:count], rows[count:]
        made = {"preset": config.preset.value, "dials": dials, "seed": config.seed}
    write_splits(config.out_dir, config.name, splits, {"task": "prosqa", **made})


def released_rows(path: str) -> list[Row]:
    """The rows of a released file, in its order, each checked against its own text."""
    released = open_released(path)
    expect(released, Kind.prosqa)
    return rows_of(released, checked)


def checked(record: Any) -> Row:
    """The record, if text, graph, chain and answer say the same; else ValueError."""
    question, answer = text_field(record, "question"), text_field(record, "answer")
    steps, symbols, edges = (_list_field(record, key) for key in ("steps", "idx_to_symbol", "edges"))
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
    told = prosqa.parse_question(question)
    if sorted(told.edges) != sorted(listed):
        differing = sorted(set(told.edges) ^ set(listed)) or "the same ones, some of them repeated"
        raise ValueError(f"the question's text and 'edges' differ: {differing}.")
    if told.root != root or set(told.options) != {target, other}:
        raise ValueError(
            f"the question asks whether {told.root} is {' or '.join(told.options)}, and the fields say "
            f"{root}, {target} and {other}."
        )
    path = prosqa.parse_path(steps, root if told.symbolic else None)
    graph = prosqa.graph(question)
    if not path or path[0][0] != root or path[-1][1] != target:
        raise ValueError(f"the steps do not lead from {root} to {target}: {steps}.")
    for edge, before in zip(path, [None, *path], strict=False):
        if not graph.has_edge(*edge) or (before and before[1] != edge[0]):
            raise ValueError(f"the steps are not a path in the graph, at {' -> '.join(edge)}: {steps}.")
    candidates = dict(zip(told.options, prosqa.candidates(question) or [], strict=True))
    if not prosqa.judge(answer, candidates[target]):
        raise ValueError(f"the answer is {answer!r}, and the target's is {candidates[target]!r}.")
    return {**record, "question": question, "steps": [step.strip() for step in steps], "answer": answer}


def _list_field(record: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(record.get(name), list):
        raise ValueError(f"{name!r} is {record.get(name)!r}; it must be a list.")
    return record[name]


main = application("build_prosqa", ProsqaBuild, build)

if __name__ == "__main__":
    main()
