"""Plans, and the golden file of the layout of every method at every stage."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TESTS
from hypothesis import given
from hypothesis import strategies as st

from coconut.data.examples import Example
from coconut.data.sequences import EpochView
from coconut.data.tokenization import (
    add_control_tokens,
    add_rate_tokens,
    add_special_tokens,
    build_word_tokenizer,
    tokenize,
)
from coconut.methods import (
    METHODS,
    PAUSES,
    STUDENT,
    At,
    Curriculum,
    Cut,
    Form,
    Mixing,
    PromptFormat,
    Reasoning,
    Spans,
    Stage,
    Unit,
    plan,
)

GOLDEN = TESTS / "golden_layouts.txt"


def test_table_has_the_papers_methods_first() -> None:
    assert list(METHODS)[:8] == ["coconut", "cot", "no_cot", "icot", "pause", "without_curriculum", "without_thought",
                                 "pause_as_thought"]  # fmt: skip


def test_plan_matches_the_paper_for_prosqa() -> None:
    stages = plan("coconut", Curriculum(max_stage=6, stage0_length=5, stage_length=5, total_length=50)).stages
    assert [(s.index, s.length, s.form.slot_length, s.form.steps_cut) for s in stages] == [
        (0, 5, 0, 0), (1, 5, 1, 1), (2, 5, 2, 2), (3, 5, 3, 3), (4, 5, 4, 4), (5, 5, 5, 5), (6, 20, 6, 6),
    ]  # fmt: skip


def test_plan_matches_the_paper_for_gsm8k() -> None:
    curriculum = Curriculum(
        thoughts_per_step=2, max_stage=3, extra_stage=True, stage0_length=6, stage_length=3, total_length=50
    )
    stages = plan("coconut", curriculum).stages
    assert [(s.index, s.length, s.form.slot_length, s.form.steps_cut) for s in stages] == [
        (0, 6, 0, 0), (1, 3, 2, 1), (2, 3, 4, 2), (3, 3, 6, 3), (4, 35, 6, None),
    ]  # fmt: skip
    only = plan("without_curriculum", curriculum).stages
    assert [(s.length, s.form.slot_length, s.form.steps_cut) for s in only] == [(50, 6, None)]
    pause = plan("pause", curriculum).stages
    assert [stage.form for stage in pause] == [Form(PAUSES, True, 6, None, thoughts_per_step=2)]


def test_plan_of_icot_for_gsm8k() -> None:
    stages = plan("icot", Curriculum(total_length=50)).stages
    assert [(s.length, s.form.tokens_cut) for s in stages] == [(1, 0), (1, 8), (1, 16), (1, 24), (1, 32), (45, None)]
    assert [s.form.smoothed for s in stages] == [True] * 5 + [False]


def test_thoughts_that_stand_for_no_steps_are_never_fewer() -> None:
    for name, fewer in (("coconut", True), ("sim_cot", True), ("codi", False), ("sim_cot_codi", False)):
        curriculum = Curriculum(pad_thoughts=False, num_thoughts=None if fewer else 6)
        assert plan(name, curriculum).trained_with_fewer_thoughts is fewer


def test_plan_can_start_at_a_later_stage() -> None:
    stages = plan(
        "coconut", Curriculum(max_stage=2, stage0_length=6, stage_length=3, total_length=10, start_stage=1)
    ).stages
    assert [(s.index, s.length) for s in stages] == [(1, 3), (2, 7)]


@given(
    st.sampled_from(list(METHODS)),
    st.integers(0, 3), st.integers(0, 4), st.booleans(), st.integers(0, 5), st.integers(1, 5), st.integers(1, 60),
)  # fmt: skip
def test_plan_fills_the_total_length_or_is_refused(
    method: str, c: int, deepest: int, extra: bool, first: int, each: int, total: int
) -> None:
    curriculum = Curriculum(c, deepest, extra, Unit.updates, first, each, total)
    lengths = {"icot": 5 * curriculum.icot_stage_length}.get(method, 0)
    if METHODS[method].cut is Cut.steps:
        lengths = first + each * (deepest + extra - 1) if deepest + extra else 0
    if METHODS[method].fixed_length and not c * deepest:
        with pytest.raises(ValueError, match="needs thoughts"):
            plan(method, curriculum)
        return
    if lengths >= total:
        with pytest.raises(ValueError, match=r"curriculum\.total"):
            plan(method, curriculum)
        return
    stages = plan(method, curriculum).stages
    assert sum(s.length for s in stages) == total
    assert all(s.length > 0 for s in stages)
    assert all(s.form.slot_length == 0 for s in stages if s.form.slot.is_empty)
    assert all(s.form.slot_length <= c * deepest for s in stages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thoughts_per_step": -1}, "thoughts_per_step is -1"),
        ({"max_stage": -1}, "max_stage is -1"),
        ({"stage_length": 0}, "stage_length is 0"),
        ({"mixing_probability": 1.5}, "mixing_probability is 1.5"),
        ({"icot_tokens": 0}, "icot_tokens is 0"),
    ],
)
def test_curriculum_errors_name_the_key(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(**values)  # pyright: ignore[reportArgumentType]


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match=r"take 30 epochs, and curriculum.total_length is 20"):
        plan("coconut", Curriculum(total_length=20))
    with pytest.raises(ValueError, match=r"no method 'cocnut'.*coconut, cot"):
        plan("cocnut", Curriculum())
    with pytest.raises(ValueError, match="stages 0 to 6"):
        plan("coconut", Curriculum(start_stage=7))
    with pytest.raises(ValueError, match="exactly once"):
        PromptFormat(step="no place")
    with pytest.raises(ValueError, match="to end a step"):
        PromptFormat(step="{}")


def test_prompt_format_keeps_other_braces() -> None:
    form = PromptFormat(question="Q{a}: {}\n", answer="\\boxed{{}}")
    assert PromptFormat.fill(form.question, "{x}") == "Q{a}: {x}\n"
    assert PromptFormat.fill(form.answer, "7") == "\\boxed{7}"
    assert (form.answer_mark, form.answer_end) == ("\\boxed{", "}")


def test_reasoning_round_trips_through_json() -> None:
    stages = plan("coconut", Curriculum(extra_stage=True))
    reasoning = Reasoning.at(stages, stages.stages[-1])
    assert reasoning.num_thoughts == 6
    assert Reasoning.from_dict(reasoning.as_dict()) == reasoning


# --- the golden file ------------------------------------------------------------------------------

EXAMPLES = [
    Example("Is Tom a rat or cat ?", ("Tom is a dog .", "Every dog is a pet .", "Every pet is a cat ."), "a cat ."),
    Example("Is Sam a bee ?", ("Sam is a bee .",), "Yes"),
]
CURRICULUM = Curriculum(
    thoughts_per_step=2, max_stage=2, extra_stage=True, stage0_length=1, stage_length=1, total_length=4
)
ICOT = Curriculum(max_stage=2, total_length=4, icot_tokens=8, icot_limit=16)
HYBRID = Curriculum(modes=["short", "think", "latent_2"], total_length=4)


def show(view: EpochView, index: int, words: list[str]) -> list[str]:
    """The sequences of an example: `=` around the tokens where states are compared, steps below their thoughts."""
    lines = []
    compared = any(term.at is At.answer_prompt for term in view.terms)
    for name, item in zip(view.names, view.layouts(index), strict=True):
        tokens = [words[token].replace("\n", "\\n") for token in item.ids]
        if item.control >= 0:
            tokens[item.control] = f"[{tokens[item.control]}]"
        if compared:
            tokens[item.answer_prompt] = f"={tokens[item.answer_prompt]}="
        text = " ".join(tokens[: item.num_prompt]) + "  ‖  " + " ".join(tokens[item.num_prompt :])
        lines.append(f"    {text}" if name == STUDENT else f"        {name}: {text}")
        spans = [" ".join(words[token].replace("\n", "\\n") for token in span) or "nothing" for span in item.spans]
        if view.spans is Spans.steps:
            lines += [f"        group {number} of thoughts writes: {span}" for number, span in enumerate(spans, 1)]
        elif spans:
            its = next(term for term in view.terms if term.spans)
            kind = "the states before thoughts predict" if its.at is At.before_thoughts else "the thoughts stand for"
            lines.append(f"        {kind}: {' | '.join(spans)}")
        shown = [word.replace("\n", "\\n") for word in words]
        if len(item.drawn) and any(term.name == "random_token" for term in view.terms):
            lines.append(f"        of these, drawn: {' | '.join(shown[t] for t in item.drawn)}")
    return lines


def golden_text() -> str:
    tokenizer = build_word_tokenizer(EXAMPLES)
    special = add_control_tokens(tokenizer, add_special_tokens(tokenizer), HYBRID.modes)
    special = add_rate_tokens(tokenizer, special, max(method.slot.max_group for method in METHODS.values()))
    words = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))]
    data = tokenize(EXAMPLES, tokenizer)
    lines = [
        "What every method sees at every stage: two examples, of three steps and of one.",
        "Two thoughts a step, two stages and the extra one. The loss is on what follows ‖, and on [...].",
        "Hidden states are compared at the tokens between = and =.",
        "",
    ]
    for name, method in METHODS.items():
        lines += [f"{name}: {method.summary}", ""]
        stages = plan(name, {"icot": ICOT, "hybrid_warmup": HYBRID}.get(name, CURRICULUM))
        for stage in stages.stages:
            lines.append(f"  stage {stage.index}: {stage.describe()}")
            epoch = next(
                e for e in range(100) if without_icot_offsets(EpochView(data, stages, stage, special, 0, e), stage)
            )
            for later in range(max(len(stage.in_turn), 1)):  # in each of the modes
                view = EpochView(data, stages, stage, special, 0, epoch + later)
                lines += [line for i in range(len(data)) for line in show(view, i, words)] + [""]
    unpadded = plan(
        "coconut",
        Curriculum(
            thoughts_per_step=2, max_stage=2, pad_thoughts=False, stage0_length=1, stage_length=1, total_length=3
        ),
    )
    lines += ["coconut with curriculum.pad_thoughts=false: short chains get thoughts for their own steps only", ""]
    view = EpochView(data, unpadded, unpadded.stages[-1], special, 0, 0)
    lines += [line for i in range(len(data)) for line in show(view, i, words)]
    return "\n".join(lines) + "\n"


def without_icot_offsets(view: EpochView, stage: Stage) -> bool:
    """Whether iCoT drew no offset for any example in this epoch."""
    return not stage.form.smoothed or bool(np.all(view.forms[0].tokens_cut == stage.form.tokens_cut))


def test_golden_layouts() -> None:
    """To accept an intended change: PYTHONPATH=tests python tests/methods/test_methods.py"""
    assert golden_text() == GOLDEN.read_text(encoding="utf-8")


# --- randomness is keyed ----------------------------------------------------------------------


def mixing_view(mixing: Mixing, probability: float, epoch: int = 0, seed: int = 0, stage: int = 1) -> EpochView:
    tokenizer = build_word_tokenizer(EXAMPLES)
    curriculum = Curriculum(
        max_stage=2, stage0_length=1, stage_length=1, total_length=3, mixing=mixing, mixing_probability=probability
    )
    stages = plan("coconut", curriculum)
    data = tokenize(EXAMPLES * 400, tokenizer)
    return EpochView(data, stages, stages.stages[stage], add_special_tokens(tokenizer), seed, epoch)


def depths(view: EpochView) -> list[int]:
    """The stage that each example is drawn from; 3 for the one without any step."""
    cuts = [view.form(i).steps_cut for i in range(len(view))]
    return [3 if cut is None else cut for cut in cuts]


def test_mixing_is_keyed_by_seed_epoch_and_index() -> None:
    depth = depths(mixing_view(Mixing.current, 0.5))
    assert depth == depths(mixing_view(Mixing.current, 0.5))
    assert depth != depths(mixing_view(Mixing.current, 0.5, epoch=1))
    assert depth != depths(mixing_view(Mixing.current, 0.5, seed=1))
    shares = [depth.count(k) / len(depth) for k in (0, 1, 2)]
    assert shares[0] == pytest.approx(0.25, abs=0.05)
    assert shares[1] == pytest.approx(0.75, abs=0.05)
    assert shares[2] == 0


def test_mixing_over_all_stages_removes_whole_chains() -> None:
    view = mixing_view(Mixing.all, 1.0)
    long, short = (depths(view)[k::2] for k in (0, 1))
    assert {k: long.count(k) / len(long) for k in range(4)} == pytest.approx(dict.fromkeys(range(4), 0.25), abs=0.07)
    assert set(short) == {0, 1}
    deepest = view.form(2 * long.index(3))
    assert (deepest.steps_cut, deepest.slot_length) == (None, 2)


def test_mixing_of_earlier_stages_weighs_later_ones_more() -> None:
    view = mixing_view(Mixing.earlier, 1.0, stage=2)
    shares = np.bincount(depths(view), minlength=3) / len(view)
    assert shares.tolist() == pytest.approx([1 / 3, 2 / 3, 0], abs=0.05)
    assert set(depths(mixing_view(Mixing.earlier, 1.0, stage=0))) == {0}


@pytest.mark.slow
def test_icot_offsets_are_exponentially_distributed() -> None:
    tokenizer = build_word_tokenizer(EXAMPLES)
    stages = plan("icot", ICOT)
    data = tokenize(EXAMPLES * 10_000, tokenizer)
    view = EpochView(data, stages, stages.stages[1], add_special_tokens(tokenizer), 0, 0)
    share = [(view.forms[0].tokens_cut == 8 + o).mean() for o in range(3)]
    expected = np.exp(-4 * np.arange(3)) * (1 - np.exp(-4))
    assert share == pytest.approx(expected, abs=0.003)


def test_mixing_needs_a_slot_that_differs_by_stage() -> None:
    curriculum = Curriculum(mixing_probability=0.1)
    mixed = {name for name in METHODS if plan(name, curriculum).mixing_probability}
    assert mixed == {name for name, its in METHODS.items() if its.cut is Cut.steps and not its.slot.is_empty}
    assert {"coconut", "pause_as_thought"} <= mixed
    assert all(plan(name, curriculum).trained_with_fewer_thoughts == (name in mixed) for name in METHODS)


if __name__ == "__main__":
    GOLDEN.write_text(golden_text(), encoding="utf-8")
