"""Gradients and drift along the thoughts on a run's page: drawn, and said in words that follow the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.html import words
from helpers.runs import graph_files, small_run

from coconut.methods import THOUGHTS, Curriculum, Form, Slot, Source, Stage, Unit, Update
from coconut.reporting.page import Aside, Table
from coconut.reporting.plots import Band, as_svg
from coconut.reporting.run_page import learning, report
from coconut.reporting.thought_curves import chart, describe
from coconut.runs.record import RunRecord, read_run
from coconut.training.trainer import run


def stage(slot: Slot = THOUGHTS) -> Stage:
    return Stage(2, 10, (Form(slot, True, 3, None),))


def row(step: int, ratio: tuple[float, float, float] | None = (0.5, 0.4, 0.6), **values: Any) -> dict[str, Any]:
    names = [f"thought_gradient_ratio{end}" for end in ("", "_low", "_high")]
    return {"step": step, "stage": 2, "thought_norm": 10.0, "thought_across": 5.0, "thought_gradient": [1.0, 2.0],
            "thought_drift": None, **dict(zip(names, ratio or (None,) * 3, strict=True)), **values}  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ((0.5, 0.4, 0.6), "0.5 times as large at the first thought as at the last (95 % interval 0.4 to 0.6): it sh"),
        ((2.0, 1.1, 3.0), "it grows on its way back"),
        ((0.8, 0.5, 1.3), "whether it shrinks on its way back along the thoughts is not clear"),
    ],
)  # fmt: skip
def test_the_verdict_on_gradients_follows_the_interval(ratio: tuple[float, float, float], said: str) -> None:
    (sentence, _) = describe(row(5, ratio), [row(9)], stage())
    assert said in sentence


def test_thoughts_updated_all_at_once_pass_nothing_back() -> None:
    (sentence, _) = describe(row(5), [row(9)], stage(Slot(Source.thought, update=Update.jacobi, iterations=2)))
    assert "matter less than the last" in sentence
    assert "earlier iterations is not in it" in sentence


@pytest.mark.parametrize(
    ("drift", "across", "said"),
    [
        ([0.4, 0.2], 5.0, "moved by 30.0 % of their norm, 0.6 times as far as the thoughts of two questions are apart: "
                          "they still move"),
        ([0.04, None], 5.0, "4.0 % of their norm, 0.08 times as far as the thoughts of two questions are apart: they "
                            "have come to rest"),
        ([0.04, 0.04], 0.5, "they still move"),
        ([0.04, 0.04], None, "moved by 4.0 % of their norm: they still move"),
        ([0.004, 0.004], 0.1, "they have come to rest"),
    ],
)  # fmt: skip
def test_movement_is_compared_with_the_distance_of_questions(
    drift: list[float | None], across: float | None, said: str
) -> None:
    (sentence,) = describe(None, [row(8), row(9, thought_drift=drift, thought_across=across)], stage())
    assert "updates 8 and 9" in sentence
    assert said in sentence


def test_what_is_not_known_is_said_or_left_out() -> None:
    assert describe(row(5, None), [row(5, None)], stage()) == [
        "Whether the thoughts still move is not known: no two validations of the last stage tell it."
    ]
    assert describe({"step": 5, "stage": 2}, [{"step": 5, "stage": 2}], stage()) == []


@pytest.mark.parametrize("width", [350, 720])
def test_each_thought_has_a_line_up_to_five(width: float) -> None:
    bands = [Band("stage 1", "8 thoughts", 0, 10), Band("stage 2", "8 thoughts", 10, 20)]
    stages = [
        [row(step, thought_gradient=[10.0**-k for k in range(8)], thought_drift=[0.1 * k for k in range(8)])
         for step in steps] for steps in ((4, 8), (12, 16, 20))
    ]  # fmt: skip
    stages[0][0]["thought_drift"] = None
    stages[1][0]["thought_gradient"] = [0.0, float("nan"), *[1.0] * 6]
    figure = chart(stages, bands, width)
    dots = [[np.size(line.get_xdata()) for line in axes.lines] for axes in figure.axes]  # of each thought in each stage
    assert dots == [[2, 2, 2, 2, 2, 3, 2, 3, 2, 3], 5 * [1, 3]]
    svg = as_svg(figure, "f")
    for label in ("thought 1", ">2<", ">4<", ">6<", ">8<"):
        assert label in svg


def test_gradients_alone_have_one_panel() -> None:
    (axes,) = chart([[row(4), row(8)]], [Band("stage 1", "", 0, 10)], 350).axes
    assert axes.get_title(loc="left") == "Gradient at each thought"


def trained(folder: Path, **changes: Any) -> RunRecord:
    curriculum = Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=2, stage_length=2, total_length=8)
    values = {"curriculum": curriculum, "batch_size": 8, "validate_every": 2, **changes}
    assert run(small_run(folder / "run", graph_files(folder, 32, 8, 20), **values)) == 0
    return read_run(folder / "run")


def test_the_page_of_a_run_has_them(tmp_path: Path) -> None:
    record = trained(tmp_path)
    text = words(report(record, [learning]))
    assert "Gradients and drift along the thoughts" in text
    assert "times as large at the first thought as at the last" in text
    assert "updates 6 and 8, the thoughts moved by" in text
    (aside,) = [part for part in learning(record).parts if isinstance(part, Aside)]
    (table,) = [part for part in aside.parts if isinstance(part, Table)]
    assert [cells[:2] for cells in table.rows] == [["1", "4"], ["2", "8"]]


@pytest.mark.parametrize("method", ["cot", "pause"])
def test_the_page_of_a_method_without_thoughts_does_not(tmp_path: Path, method: str) -> None:
    assert "drift" not in words(report(trained(tmp_path, method=method), [learning]))
