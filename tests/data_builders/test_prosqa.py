"""Generated graphs are verified and match the released ones in their statistics."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx
import pytest
from helpers import DATA, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.tasks import prosqa as task
from data_builders.entity_names import CONCEPTS, PERSONS, Names, pools
from data_builders.graph_measures import alike, key_of, measure
from data_builders.prosqa import Form, Preset, ProsqaBuild, checked, draw_row, prove, recipe, released_rows
from data_builders.statistics import compare

REAL = SHARED / "prosqa" / "prosqa_valid.json"
RELEASED = [DATA / "prosqa_released.json", *([REAL] if REAL.is_file() else [])]


def rows_of(count: int, seed: int = 0, **keys: Any) -> list[dict]:
    make = recipe(ProsqaBuild(**keys))
    drawn = (make.draw(random.Random(f"{seed} {index}"), lambda key: True) for index in range(count))
    return [found[0] for found in drawn if found]


@st.composite
def dials(draw_: st.DrawFn) -> dict[str, Any]:
    hops_from = draw_(st.integers(1, 3))
    hops_to = hops_from + draw_(st.integers(0, 2))
    plant, equalize = draw_(st.booleans()), draw_(st.booleans())
    return {
        "form": draw_(st.sampled_from(Form)), "preset": draw_(st.sampled_from((Preset.released, Preset.paper))),
        "nodes": 2 + 2 * hops_to + draw_(st.integers(2, 10)), "branching": draw_(st.floats(1, 2.5)),
        "depth_weight": draw_(st.floats(0.5, 3)), "hops_from": hops_from, "hops_to": hops_to,
        "plant": plant or hops_from > 2, "equalize_depth": equalize, "names": None,
    }  # fmt: skip


@settings(max_examples=60)
@given(dials(), st.integers(0, 1000))
def test_generated_prosqa_rows_are_verified(keys: dict[str, Any], seed: int) -> None:
    (row,) = rows_of(1, seed, **keys)
    prove(row)
    graph = task.graph(row["question"])
    names = row["idx_to_symbol"]
    root, target, other = (names[row[key]] for key in ("root", "target", "neg_target"))
    assert set(graph.nodes) == set(names)
    assert len(names) == len(set(names)) <= keys["nodes"]
    assert sorted(graph.edges) == sorted((names[a], names[b]) for a, b in row["edges"])
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.in_degree(root) == graph.out_degree(target) == graph.out_degree(other) == 0
    far = networkx.shortest_path_length(graph, root, target)
    assert keys["hops_from"] <= far == len(row["steps"]) <= keys["hops_to"]
    assert not networkx.has_path(graph, root, other)
    assert row["root"] in (0, 1)
    other_root = names[1 - row["root"]]
    assert not networkx.has_path(graph, other_root, target)
    if keys["equalize_depth"]:
        assert networkx.shortest_path_length(graph, other_root, other) == far
    path = task.parse_path(row["steps"], root if keys["form"] is Form.symbols else None)
    assert path
    assert all(graph.has_edge(*edge) for edge in path)
    assert (path[0][0], path[-1][1]) == (root, target)
    assert all(a[1] == b[0] for a, b in pairwise(path))
    levels = [{names[node] for node in level} for level in row["nodes_at_distance"]]
    assert levels == list(map(set, networkx.bfs_layers(graph, root)))
    if keys["form"] is Form.sentences:
        persons = {node for node in graph if graph.in_degree(node) == 0}
        assert persons == {node for node in graph if node in PERSONS}
        assert persons | {node for node in graph if node in CONCEPTS} == set(graph)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(0, 2), st.integers(0, 6), st.sampled_from(Form))
def test_generated_chain_rows_are_verified(seed: int, low: int, more: int, spare: int, form: Form) -> None:
    high = low + more
    keys = {"preset": Preset.graphs, "nodes": low + high + 2 + spare, "hops_from": low, "hops_to": high, "form": form}
    for row in rows_of(4, seed, **keys):
        prove(row)
        graph = task.graph(row["question"])
        root, other_root = (row["idx_to_symbol"][node] for node in (row["root"], 1 - row["root"]))
        target, other = (row["idx_to_symbol"][row[key]] for key in ("target", "neg_target"))
        assert len(graph) == keys["nodes"]
        assert max(degree for _, degree in graph.in_degree()) <= 2
        assert low <= networkx.shortest_path_length(graph, root, target) == len(row["steps"]) <= high
        assert low + high - len(row["steps"]) == networkx.shortest_path_length(graph, other_root, other)
        assert not networkx.has_path(graph, other_root, target)
        assert not networkx.has_path(graph, root, other)


@pytest.mark.parametrize("hops", [7, 8, 10])
@pytest.mark.parametrize("equalize", [False, True])
def test_long_chains_are_planted(hops: int, equalize: bool) -> None:
    keys = {"hops_from": hops, "hops_to": hops, "plant": True, "equalize_depth": equalize, "nodes": 30}
    for row in rows_of(20, **keys):
        prove(row)
        assert len(row["steps"]) == hops


def test_planted_lengths_are_equally_frequent() -> None:
    hops = Counter(len(row["steps"]) for row in rows_of(1200, preset=Preset.graphs, nodes=16, hops_from=2, hops_to=4))
    assert set(hops) == {2, 3, 4}
    assert all(abs(count - 400) < 4 * (1200 * 2 / 9) ** 0.5 for count in hops.values()), hops


def test_number_of_edges_is_exact() -> None:
    assert {len(row["edges"]) for row in rows_of(20, edges=33)} == {33}


def test_generated_names_for_large_graphs() -> None:
    rows = rows_of(5, nodes=90, names=Names.generated)
    for row in rows:
        prove(row)
    assert max(len(row["idx_to_symbol"]) for row in rows) > len(CONCEPTS) + len(PERSONS)
    for released, generated in zip(pools(Names.released), pools(Names.generated), strict=True):
        assert len(set(generated)) == len(generated) > 100
        assert not set(generated) & set(released)


# Of 800 released rows (the validation and the test split): mean and deviation, or shares, rounded as printed.
PUBLISHED = {
    "nodes": (22.8, 2.0, 0.05), "edges": (36.0, 5.8, 0.05), "shortest paths to the target": (1.6, 0.9, 0.05),
}  # fmt: skip
PUBLISHED_SHARES = {
    "hops to the target": {"3": 0.408, "4": 0.438, "5": 0.131, "6": 0.024},
    "root": {"node 0": 0.37, "node 1": 0.63},
}
PUBLISHED_POOLED = {
    "parents of a node": {"0": 0.027, "1": 0.48, "2": 0.305, "3": 0.134, "4": 0.042, "5": 0.011},
    "nodes reached by": {
        "neither root": 0.034, "the first root only": 0.39, "the second root only": 0.517, "both roots": 0.06,
    },
}  # fmt: skip


@pytest.mark.slow
def test_default_dials_match_the_published_counts() -> None:
    """Within 4 standard errors of 800 rows, plus the rounding of the published numbers."""
    measured = [measure(row) for row in rows_of(4000)]
    for name, (mean, deviation, rounding) in PUBLISHED.items():
        here = sum(m[name] for m in measured) / len(measured)  # type: ignore[misc]
        assert abs(here - mean) < 4 * deviation / 800**0.5 + rounding, (name, here)
    for name, shares in PUBLISHED_SHARES.items():
        here = Counter(m[name] for m in measured)
        for value, share in shares.items():
            error = (share * (1 - share) / 800) ** 0.5
            assert abs(here[value] / len(measured) - share) < 4 * error + 0.005, (name, value, here[value])
        assert set(here) == set(shares), name
    for name, shares in PUBLISHED_POOLED.items():
        here = Counter(value for m in measured for value in m[name])  # type: ignore[union-attr]
        for value, share in shares.items():
            assert abs(here[value] / here.total() - share) < 0.02, (name, value, here[value] / here.total())


@pytest.mark.skipif(not REAL.is_file(), reason="the released validation data do not lie here")
def test_default_dials_match_the_released_rows() -> None:
    lines = compare([measure(row) for row in rows_of(3000)], [measure(row) for row in released_rows(str(REAL))])
    distances = {line.name: line.distance for line in lines if line.distance is not None}
    assert len(distances) > 40
    assert max(map(abs, distances.values())) < 4, distances
    paper = compare([measure(row) for row in rows_of(1500, preset=Preset.paper)], [measure(r) for r in rows_of(1500)])
    assert max(abs(line.distance or 0) for line in paper) > 10, "the printed algorithm can be told apart"


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.name)
def test_properties_of_every_released_row(path: Path) -> None:
    for row in released_rows(str(path)):
        found = measure(row)
        assert found["steps are a shortest path"] == "yes"
        assert found["target is a deepest such leaf"] == "yes"
        assert found["target's family against the other"] != "less deep"
        assert found["distractor is a leaf that only the other root reaches"] == "yes"
        assert found["persons are the nodes without parents"] == "yes"
        assert set(found["names of persons"]) <= set(PERSONS)  # type: ignore[arg-type]
        assert set(found["names of concepts"]) <= set(CONCEPTS)  # type: ignore[arg-type]


SHORT_PLANTED = {"equalize_depth": True, "plant": True, "nodes": 12, "hops_from": 2, "hops_to": 3}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"preset": Preset.graphs}, {"equalize_depth": True}, SHORT_PLANTED], ids=str)
def test_target_and_distractor_do_not_differ_without_the_root(keys: dict[str, Any]) -> None:
    """Features that ignore the root separate them only at chance (within 4 standard errors)."""
    rows = rows_of(2500, **keys)
    wins: Counter[str] = Counter()
    for row in rows:
        graph = networkx.DiGraph(map(tuple, row["edges"]))
        names = row["idx_to_symbol"]
        pair = row["target"], row["neg_target"]
        told = task.parse_question(row["question"])
        measures = {
            "edges in": [graph.in_degree(node) for node in pair],
            "ancestors": [len(networkx.ancestors(graph, node)) for node in pair],
            "named first": [told.options[0] == names[node] for node in pair],
            "last mention": [max(i for i, e in enumerate(told.edges) if names[node] in e) for node in pair],
            "children of the root": [graph.out_degree(node) for node in (row["root"], 1 - row["root"])],
        }
        for name, (target, distractor) in measures.items():
            wins[name] += (target > distractor) - (target < distractor)
    assert all(abs(won) < 4 * len(rows) ** 0.5 for won in wins.values()), wins


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(Preset), st.randoms(use_true_random=False))
def test_key_and_alike_ignore_node_names(seed: int, preset: Preset, rng: random.Random) -> None:
    (row,) = rows_of(1, seed, preset=preset)
    count = len(row["idx_to_symbol"])
    number = rng.sample(range(count), count)
    renamed = row | {key: number[row[key]] for key in ("root", "target", "neg_target")}
    renamed["edges"] = rng.sample([[number[a], number[b]] for a, b in row["edges"]], len(row["edges"]))
    assert key_of(renamed) == key_of(row)
    assert alike(renamed, row)
    without = row | {"edges": row["edges"][:-1]}
    turned = row | {"root": 1 - row["root"]}
    for other in (without, turned):
        assert not alike(other, row) or key_of(other) == key_of(row)
    assert key_of(without) != key_of(row)


@pytest.mark.slow
def test_keys_are_uniformly_distributed() -> None:
    hundredths = Counter(key_of(row) % 100 for row in rows_of(4000))
    assert max(hundredths.values()) < 80, hundredths
    assert min(hundredths.values()) > 12, hundredths


def corrupted(row: dict) -> dict[str, dict]:
    names = row["idx_to_symbol"]
    root = names[row["root"]]
    swapped = {
        "target": row["neg_target"], "neg_target": row["target"], "answer": f"{root} is a {names[row['neg_target']]}.",
    }  # fmt: skip
    leak = [row["root"], row["neg_target"]]
    sentence = f"{root} is a {names[row['neg_target']]}. "
    levels = row["nodes_at_distance"]
    return {
        "do not lead from": row | swapped,
        "can be reached, too": row | {"edges": [*row["edges"], leak], "question": sentence + row["question"]},
        "nodes_at_distance says": row | {"nodes_at_distance": levels[:-1]},
        "and the target's is": row | {"answer": f"{root} is a {names[row['neg_target']]}."},
        "not a path": row | {"steps": [row["steps"][0], row["steps"][-1]]},
        "text and 'edges' differ": row | {"edges": row["edges"][1:]},
    }  # fmt: skip


@pytest.mark.parametrize("complaint", sorted(corrupted(rows_of(1)[0])))
def test_prove_refuses_corrupted_rows(complaint: str) -> None:
    row = rows_of(1, seed=3)[0]
    prove(row)
    with pytest.raises(ValueError, match=complaint):
        prove(corrupted(row)[complaint])


def test_prove_refuses_a_detour() -> None:
    """A valid path that is not a shortest one."""
    detours = []
    for row in rows_of(100):
        root, target = (row["idx_to_symbol"][row[key]] for key in ("root", "target"))
        longest = max(networkx.all_simple_paths(task.graph(row["question"]), root, target), key=len)
        if len(longest) - 1 > len(row["steps"]):
            detours.append((row, root, longest))
    row, root, longest = detours[0]
    steps = [f"{a if a == root else f'Every {a}'} is a {b}." for a, b in pairwise(longest)]
    with pytest.raises(ValueError, match="not a shortest path"):
        prove(row | {"steps": steps})


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"nodes": 5}, "nodes=5 is too few for a chain and a distractor of 3 hops, which need 6"),
        ({"hops_from": 40, "hops_to": 41}, "nodes=28 is too few .* 40 hops"),
        ({"preset": Preset.graphs, "nodes": 6}, "nodes=6 is too few for two chains .* = 7"),
        ({"hops_from": 4, "hops_to": 3}, "hops_from=4, hops_to=3"), ({"hops_from": 0}, "hops_from=0"),
        ({"nodes": 41}, "nodes=41 may need 39 names of concepts, and names=released has 38.* names=generated"),
        ({"form": Form.symbols, "names": Names.generated}, "names=generated is for form=sentences"),
        ({"edges": 30, "branching": 2.0}, "edges=30 and branching=2.0"), ({"edges": 3}, "edges=3; with nodes=28"),
        ({"edges": 300}, "edges=300; with nodes=28"), ({"branching": 0.0}, "branching=0.0"),
        ({"branching": math.nan}, "branching=nan"), ({"depth_weight": math.inf}, "depth_weight=inf"),
        ({"first_family": math.nan}, "first_family=nan"),
        ({"nodes": 1000, "names": Names.generated}, "nodes=1000; at most 500"),
        ({"plant": True, "hops_to": 0}, "plant=true draws a length"), ({"depth_weight": -1.0}, "depth_weight=-1.0"),
        ({"first_family": 0.7}, "first_family=0.7, second_family=0.45"),
        ({"preset": Preset.graphs, "branching": 2.0}, "branching=2.0 is not a dial of preset=graphs, which has: form"),
        ({"equalize_depth": True, "nodes": 7}, "nodes=7 is too few for two chains of 3 hops, which need 8"),
        ({"source": "a", "preset": Preset.graphs}, "preset=graphs .* source=a is read"),
        ({"valid": "a", "nodes": 9}, "nodes=9 .* valid=a is read"),
    ],
)  # fmt: skip
def test_prosqa_refuses_impossible_dials(keys: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ProsqaBuild(**keys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"hops_from": 12, "hops_to": 12, "nodes": 16}, r"None of 3000 graphs .* with nodes=16.*plant=true"),
        ({"edges": 160}, r"edges=160.*another number of edges"),
        ({"branching": 20.0}, r"branching=20.0.*lower branching"),
        ({"preset": Preset.graphs, "nodes": 200}, r"nodes=200 is too many for two chains"),
    ],
)
def test_draw_explains_why_no_graph_fits(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        rows_of(1, **keys)


@pytest.mark.slow
def test_hops_to_none_allows_longer_paths() -> None:
    assert max(len(row["steps"]) for row in rows_of(1500, hops_to=0)) > 6


def test_measure_accepts_roots_with_any_number() -> None:
    (row,) = rows_of(1)
    count = len(row["idx_to_symbol"])
    number = [count - 1 - node for node in range(count)]
    turned = row | {key: number[row[key]] for key in ("root", "target", "neg_target")}
    turned["idx_to_symbol"] = row["idx_to_symbol"][::-1]
    turned["edges"] = [[number[a], number[b]] for a, b in row["edges"]]
    same = (
        "nodes", "edges", "hops to the target", "shortest paths to the target", "depth of the distractor",
        "distractor against target",
    )  # fmt: skip
    assert all(measure(checked(turned))[name] == measure(row)[name] for name in same)


def test_draw_row_skips_unwanted_keys() -> None:
    dials = ProsqaBuild().graph_dials()
    asked: list[int] = []
    found = draw_row(random.Random(1), lambda key: not asked.append(key), dials, Form.sentences)
    assert found
    assert asked == [found[1]] == [key_of(found[0])]
    assert draw_row(random.Random(1), lambda key: False, dials, Form.sentences) is None
