"""Pointer chasing made from scratch."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coconut.tasks.pointers import parse_question, walk
from coconut.utils.files import read_json, write_json
from data_builders.pointers import PointersBuild, alike, build, checked, draw_row, key_of


@given(st.integers(2, 12), st.data(), st.integers(0, 10_000))
def test_pointers_rows_are_consistent(nodes: int, pick: st.DataObject, seed: int) -> None:
    low = pick.draw(st.integers(1, nodes - 1))
    high = pick.draw(st.integers(low, nodes - 1))
    drawn = draw_row(random.Random(seed), lambda key: True, nodes, low, high, 1.0)
    assert drawn
    row, key = drawn
    checked(row)
    asked = parse_question(row["question"])
    assert low <= asked.hops == len(row["steps"]) <= high
    assert len(asked.pointers) == nodes
    assert len({asked.start, *walk(asked)}) == asked.hops + 1, "no node is passed twice"
    told, rest = row["question"].split(" ? ")
    turned = {**row, "question": " | ".join(reversed(told.split(" | "))) + f" ? {rest}"}
    assert alike(row, turned)
    assert key_of(turned) == key
    assert draw_row(random.Random(seed), lambda key: False, nodes, low, high, 1.0) is None


def test_hops_and_answers_are_equally_frequent(tmp_path: Path) -> None:
    build(PointersBuild(out_dir=str(tmp_path), num_train=3000, num_valid=0, num_test=0, nodes=5, hops_to=4))
    rows = read_json(tmp_path / "pointers_train.json")
    for counts, kinds in ((Counter(row["hops"] for row in rows), 4), (Counter(row["answer"] for row in rows), 5)):
        assert len(counts) == kinds
        assert all(abs(count - 3000 / kinds) < 4 * (3000 / kinds) ** 0.5 for count in counts.values())


def test_decay_makes_further_hops_rarer(tmp_path: Path) -> None:
    build(PointersBuild(out_dir=str(tmp_path), num_train=3000, num_valid=0, num_test=0, hops_to=3, decay=0.5))
    counts = Counter(row["hops"] for row in read_json(tmp_path / "pointers_train.json"))
    assert [counts[hops] / 3000 for hops in (1, 2, 3)] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.04)


def test_pointers_files_are_checked(tmp_path: Path) -> None:
    build(PointersBuild(out_dir=str(tmp_path), num_train=20, num_valid=0, num_test=0))
    file = tmp_path / "pointers_train.json"
    build(PointersBuild(out_dir=str(tmp_path / "again"), train=str(file)))
    assert read_json(tmp_path / "again" / "pointers_train.json") == read_json(file)
    rows = read_json(file)
    write_json(file, [*rows[:3], {**rows[3], "answer": "11"}])
    with pytest.raises(ValueError, match="the answer is '11'"):
        build(PointersBuild(out_dir=str(tmp_path / "wrong"), train=str(file)))


def test_pointers_refuses_impossible_dials() -> None:
    with pytest.raises(ValueError, match="1 <= from <= to < nodes <= 26"):
        PointersBuild(nodes=4, hops_to=4)
    with pytest.raises(ValueError, match=r"nodes=4 says how rows are made, but train=a.json is read"):
        PointersBuild(nodes=4, hops_to=3, train="a.json")
    with pytest.raises(ValueError, match="decay is 0"):
        PointersBuild(decay=0.0)
