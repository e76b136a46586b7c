"""The verdict on a run, and the parts of an analysis on models whose behaviour is planted."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.memorizing import EXAMPLES
from helpers.planted import NUM_THOUGHTS, planted_model, planted_subject

from coconut.analysis.geometry import geometry
from coconut.analysis.influence import influence
from coconut.analysis.interventions import audit_thoughts
from coconut.analysis.noise import noise_curves
from coconut.analysis.prefix_values import prefix_values
from coconut.analysis.probes import Subject, inner_products, k_forcing
from coconut.analysis.verdict import EXCHANGE, GAIN, NEEDED, NOISE, SEQUENCE, SHORTCUTS, SPREAD, reliance, verdict
from coconut.methods import Curriculum, Reasoning, plan
from coconut.reporting.measurements.influence import describe
from coconut.reporting.verdict import _before_answers, verdict_of
from coconut.runs.record import RunRecord
from coconut.runs.study import Study
from coconut.tasks import TASKS

KINDS = {"ignores": "unused", "last_only": "single", "from_the_first": "at_once", "step_by_step": "sequence"}


@cache
def studies(kind: str) -> dict[str, Study]:
    subject = planted_subject(kind)
    measured = [audit_thoughts(subject), k_forcing(subject), prefix_values(subject), influence(subject),
                noise_curves(subject), *geometry(subject)]  # fmt: skip
    return {study.name: study for study in measured}


@pytest.mark.parametrize("kind", KINDS)
def test_planted_models_get_their_verdict(kind: str) -> None:
    found = verdict(studies(kind), "thoughts", above_chance=True)
    assert found.kind == KINDS[kind], found
    speaks = {each.name: each.speaks for each in found.findings}
    used = kind != "ignores"
    assert speaks[EXCHANGE] is used
    assert speaks[GAIN] is None
    assert speaks[NEEDED] is (True if used else None), "24 questions are too few to say that none is needed"
    spread = max(row["spread"] for row in studies(kind)["geometry"].rows)
    assert (spread < 0.1) is not used
    assert speaks[SEQUENCE] is (True if kind in ("from_the_first", "step_by_step") else None)
    values = {each.name: each.value for each in found.findings}
    assert ("no clear fall" in values[NOISE]) is not used


def test_many_questions_show_that_no_thought_is_needed() -> None:
    subject = Subject(planted_model("ignores"), TASKS["prosqa"], EXAMPLES * 4, batch_size=96)
    found = verdict({"influence": influence(subject)}, "thoughts").findings
    assert next(each for each in found if each.name == NEEDED).speaks is False


def test_the_number_of_thoughts_tells_when_the_answer_is_there() -> None:
    accuracy = {kind: [row["accuracy"] for row in studies(kind)["k_forcing"].rows] for kind in KINDS}
    assert min(accuracy["from_the_first"][1:4]) > 0.9
    assert max(accuracy["step_by_step"][:3]) < 0.5 < accuracy["step_by_step"][3]


def test_a_model_that_searches_points_at_the_nodes_ahead() -> None:
    by_kind = {}
    for kind in ("searches", "last_only"):
        rows = inner_products(planted_subject(kind)).rows
        by_kind[kind] = {(row["thought"], row["group"]): row["mean"] for row in rows}
    for thought in (1, 2):
        mean = by_kind["searches"]
        ahead = min(mean[thought, group] for group in ("optimal", "frontier") if (thought, group) in mean)
        assert ahead > 10 + max(mean.get((thought, "reachable"), -99), mean[thought, "other"])
        constant = by_kind["last_only"]
        assert abs(constant[thought, "optimal"] - constant[thought, "other"]) < 10


def right(study: Any, change: str, later: str) -> list[float]:
    """By unit, the share of right answers after a change."""
    return [row["right"] for row in study.rows
            if (row["change"], row["later"], row["control"], row["on"]) == (change, later, False, None)]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_influence_tells_planted_models_apart(kind: str) -> None:
    study = studies(kind)["influence"]
    recomputed, kept, only = (right(study, *pair) for pair in
                              (("other", "recomputed"), ("other", "kept"), ("only", "kept")))  # fmt: skip
    trained = study.facts["right"]["thoughts"]
    assert trained > 0.8
    if kind == "ignores":
        assert recomputed == kept == only == [trained] * NUM_THOUGHTS
    elif kind == "last_only":
        assert recomputed[:2] == kept[:2] == [trained] * 2
        assert recomputed[2] < 0.5
        assert only[2] == trained
        assert max(only[:2]) < 0.5
    elif kind == "from_the_first":
        assert recomputed[0] < 0.3 < kept[0], "later thoughts carry what the first one holds"
    else:
        assert max(recomputed) < 0.5, "each thought is needed"
        assert min(kept[:2]) > trained - 0.1, "but the first ones through later ones only"
        assert kept[2] < 0.5, "but the first ones through later ones only"
        assert only[2] > 0.8 > max(only[:2])


def test_the_sentences_follow_the_planted_behaviour() -> None:
    by_kind = {kind: " ".join(describe(studies(kind)["influence"], "thoughts")) for kind in
               ("ignores", "last_only", "step_by_step")}  # fmt: skip
    assert "no fall was seen for any of them" in by_kind["ignores"]
    assert "no single one alone clearly helps" in by_kind["ignores"]
    assert "fewer are right" in by_kind["last_only"]
    assert "(number 1)" not in by_kind["last_only"]
    assert "keeping one alone clearly helps for number 3" in by_kind["last_only"]
    assert "With later thoughts kept as they were, more are right" in by_kind["step_by_step"]
    assert re.search(r"larger than in a random direction: [^.]*2 → 3\.", by_kind["step_by_step"])
    for kind in ("ignores", "last_only"):
        assert "No thought clearly acts on a later one" in by_kind[kind]


def test_nothing_is_said_at_chance_or_without_thoughts() -> None:
    some = studies("step_by_step")
    assert verdict(some, "thoughts", above_chance=False).kind == "chance"
    assert verdict(some, "steps").kind == "steps"
    assert verdict(some, "pauses").kind == "pauses"
    assert verdict(some, "nothing").kind == "nothing"
    assert verdict({}, "thoughts").kind == "unmeasured"
    without = {name: study for name, study in some.items() if name != "influence"}
    assert verdict(without, "thoughts").kind == "used"


def test_thoughts_that_add_nothing_speak_against() -> None:
    rows = [{"of": "after_mark", "steps": None, "thoughts": k, "value": -0.5, "low": -0.6, "high": -0.4,
             "gain_low": None if not k else -0.1, "left_high": 0.2} for k in range(3)]  # fmt: skip
    (finding,) = verdict({"prefix_values": Study("prefix_values", rows)}, "thoughts").findings
    assert finding.speaks is False
    for spread, speaks in ((0.001, False), (0.3, None)):
        study = Study("geometry", [{"spread": spread}, {"spread": spread / 2}])
        (finding,) = verdict({"geometry": study}, "thoughts").findings
        assert (finding.name, finding.speaks) == (SPREAD, speaks)


def test_a_later_gain_keeps_the_answer_from_being_there_at_once() -> None:
    """Marginal intervals overlap, and the paired ones do not."""
    rows = [
        {"of": "after_mark", "steps": None, "thoughts": k, "value": value, "low": value - 0.5, "high": value + 0.5,
         "gain_low": 0.1 if k else None, "left_high": 0.0 - value} for k, value in enumerate((-3, -0.5, -0.2, 0))
    ]  # fmt: skip
    found = verdict(studies("step_by_step") | {"prefix_values": Study("prefix_values", rows)}, "thoughts")
    assert found.kind == "sequence"


BEFORE = {"no_cot": "nothing", "icot": "nothing", "cot": "steps", "pause": "pauses", "coconut": "thoughts",
          "hybrid_warmup": "modes"}  # fmt: skip


@pytest.mark.parametrize("method", BEFORE)
def test_what_stands_before_the_answers_comes_from_the_last_stage(method: str) -> None:
    its = plan(method, Curriculum(max_stage=2))
    assert _before_answers(Reasoning.at(its, its.stages[-1])) == BEFORE[method]


def shortcut_row(change: str, kind: str, difference: float, **more: Any) -> dict[str, Any]:
    bounds = {"difference_low": difference - 0.02, "difference_high": difference + 0.02}
    return {
        "change": change,
        "kind": kind,
        "label": change,
        "accuracy": 0.5,
        "changed_low": None,
        "changed_high": 0.9,
        "difference": difference,
        **bounds,
        **more,
    }


def test_shortcuts_are_sorted_by_their_intervals_and_spoil_the_verdict() -> None:
    rows = [
        {"change": "none", "kind": "unchanged", "low": 0.9, "chance_accuracy": 0.5},
        shortcut_row("named_last_wrong", "rule", -0.3), shortcut_row("edge_order", "edit", 0.0, changed_low=0.1),
        shortcut_row("option_order", "edit", -0.04, changed_low=0.7), shortcut_row("deeper_wrong", "rule", -0.04),
        shortcut_row("longer_1", "distribution", -0.4), shortcut_row("hint_right", "hint", 0.2),
    ]  # fmt: skip
    study = Study("shortcuts", rows)
    found = reliance(study)
    assert [row["change"] for row in found.used] == ["named_last_wrong", "option_order"]
    assert [row["change"] for row in found.unused] == ["edge_order"]
    assert [row["change"] for row in found.unclear] == ["deeper_wrong"]
    rows[0]["low"] = 0.4
    assert [row["change"] for row in reliance(study).used] == ["named_last_wrong"], "at chance answers are loose"
    rows[2]["changed_high"] = 0.2
    assert [row["change"] for row in reliance(study).used] == ["named_last_wrong", "option_order"], "not with this edit"
    rows[0]["low"] = 0.9
    assert verdict({"shortcuts": study}, "thoughts", above_chance=False).headline.endswith("above chance.")
    spoiled = verdict({**studies("step_by_step"), "shortcuts": study}, "thoughts")
    assert spoiled.kind == "sequence"
    assert spoiled.headline.endswith("Besides, it relies on a shortcut of its data.")
    assert next(each for each in spoiled.findings if each.name == SHORTCUTS).speaks is False


@pytest.mark.parametrize("fact", [{}, {"alike": {"thoughts": 3, "questions": 24, "of": 90}}, {"mode": "latent_3"}])
def test_chance_is_that_of_the_questions_and_the_mode_that_were_measured(fact: dict[str, Any]) -> None:
    found = {name: replace(study, facts=study.facts | fact) for name, study in studies("last_only").items()}
    assert found["audit_thoughts"].rows[0]["low"] > 0.5
    test, of_plan = {"chance_accuracy": 0.5, "interval": (0.45, 0.55)}, plan("coconut", Curriculum()).as_dict()
    run = RunRecord(
        Path("run"), {"method": "coconut"}, {"plan": of_plan}, [], [], {"test": test}, "test", studies=found
    )
    assert verdict_of(run).kind == ("single" if fact else "chance")
    assert verdict_of(replace(run, test=None, evaluations={})).kind == "single"
