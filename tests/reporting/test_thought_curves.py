"""Gradients and drift along the thoughts: the sentences and the chart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coconut.methods import Curriculum, plan
from coconut.reporting.plots import Band
from coconut.reporting.thought_curves import chart, describe

STAGE = plan("codi", Curriculum(num_thoughts=3, total_length=10)).stages[-1]


def row(step: int, drift: float | None, ratio: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "stage": 0, "thought_norm": 10.0, "thought_across": 5.0, "thought_gradient": [0.1, 0.2, 0.4],
        "thought_gradient_ratio": ratio, "thought_gradient_ratio_low": ratio - 0.1,
        "thought_gradient_ratio_high": ratio + 0.1, "thought_drift": None if drift is None else [drift] * 3, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, "it shrinks on its way back"), (1.5, "it grows"), (1.05, "is not clear")]
)
def test_the_ratio_is_judged_by_its_interval(ratio: float, expected: str) -> None:
    assert expected in describe(row(20, 0.1, ratio), [row(10, None), row(20, 0.1)], STAGE)[0]


def test_rest_is_judged_by_the_distance_between_questions() -> None:
    still, moving = (describe(None, [row(10, None), row(20, drift)], STAGE)[0] for drift in (0.04, 0.2))
    assert "moved by 4.0 % of their norm, 0.08 times as far" in still
    assert still.endswith("they have come to rest.")
    assert moving.endswith("they still move.")
    assert "is not known" in describe(None, [row(10, None)], STAGE)[0]


def test_a_line_for_each_thought_and_a_panel_for_each_measure() -> None:
    bands = [Band("stage 0", "3 thoughts", 0, 20)]
    upper, lower = chart([[row(10, None), row(20, 0.1)]], bands, 720).axes
    assert [np.asarray(line.get_ydata()).tolist() for line in upper.lines] == [[0.1, 0.1], [0.2, 0.2], [0.4, 0.4]]
    assert [np.asarray(line.get_ydata()).tolist() for line in lower.lines] == [[0.1]] * 3
    (alone,) = chart([[row(10, None, thought_drift=None)]], bands, 350).axes
    assert alone.get_yscale() == "log"
