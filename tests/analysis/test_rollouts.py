"""Hybrid roll-outs: sampled answers after each number of thoughts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.memorizing import EXAMPLES, memorizing_model
from helpers.models import SENTENCES, build, hybrid, in_float64, subject
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.analysis import rollouts as rolled
from coconut.analysis.graph_paths import GraphQuestion
from coconut.analysis.probes import Subject
from coconut.analysis.rollouts import next_step, rollouts, steps_ahead, variety
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import build_word_tokenizer
from coconut.evaluation.config import Sampling
from coconut.evaluation.sampling import evaluate_samples
from coconut.generation.keyed_random import Stream, generator
from coconut.methods import (
    METHODS,
    NOTHING,
    PAUSES,
    THOUGHTS,
    Curriculum,
    PromptFormat,
    Reasoning,
    Slot,
    Source,
    Update,
    plan,
)
from coconut.reporting.measurements.rollouts import chart, describe
from coconut.reporting.page import Figure, Heading
from coconut.reporting.sections import what_they_hold
from coconut.runs.record import RunRecord
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS
from coconut.tasks.chain import read_answer, read_steps

FORM = PromptFormat("{}", "{} ", "### {}")
JACOBI = Slot(Source.thought, update=Update.jacobi, iterations=2)


@cache
def memorized() -> LatentLM:
    return memorizing_model()


def unsure_model(slot: Slot, method: str = "coconut") -> LatentLM:
    """A model in float64 that gives different answers to a question, some of which cannot be read."""
    if slot.in_parallel:
        lm = build("llama", slot=slot, num_thoughts=3, format=FORM, max_new_tokens=4)
    else:
        lm = in_float64(deepcopy(memorized()).double())
        lm.base.model.norm.weight.data.mul_(0.5)  # pyright: ignore
    return with_slot(lm, slot, method)


def with_slot(lm: LatentLM, slot: Slot, method: str = "coconut") -> LatentLM:
    lm.reasoning = replace(lm.reasoning, slot=slot, markers=not slot.is_empty, method=method, steps_cut=0)
    if slot.is_empty:
        lm.reasoning = replace(lm.reasoning, num_thoughts=0)
    return lm


def value(study: Study, measure: str, thoughts: int = 0, chain: bool = False, key: str = "value") -> Any:
    (row,) = [
        row for row in study.rows if (row["chain"], row["thoughts"], row["measure"]) == (chain, thoughts, measure)
    ]
    return row[key]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolled, "NUM_SAMPLES", 5)
    monkeypatch.setattr(rolled, "NUM_QUESTIONS", 3)


def slow_texts(lm: LatentLM, question: list[int], number: int, count: int, chain: bool) -> Iterator[tuple[str, bool]]:
    """One answer after another, everything run again for every token; with whether the limit ended it."""
    prompt = question if chain else [*question, *slot_with_markers(lm.reasoning, lm.special, count).tolist()]
    limit = rolled._limit_of_chains(Subject(lm, TASKS["prosqa"], EXAMPLES)) if chain else lm.reasoning.max_new_tokens
    for sample in range(rolled.NUM_SAMPLES):
        drawn = generator((rolled.SEED, number, sample), Stream.words).random(limit)
        new: list[int] = []
        while len(new) < limit and (not new or new[-1] != lm.special.eos):
            with torch.no_grad():
                logits = lm(torch.tensor([prompt + new]), return_logits=True, use_cache=False).logits[0, -1]
            logits[lm.special.added] = -torch.inf
            reached = np.cumsum(np.exp((logits - logits.logsumexp(0)).double().numpy()))
            new.append(int(np.argmax(reached > drawn[len(new)])))
        ended = new[-1] == lm.special.eos
        yield str(lm.tokenizer.decode(new[:-1] if ended else new)), not ended


def slow_measures(examined: Subject, count: int, chain: bool) -> dict[str, float]:
    """Means over questions, from texts."""
    found: dict[str, list[float]] = {}
    for number, example in enumerate(examined.examples[: rolled.NUM_QUESTIONS]):
        texts = list(slow_texts(examined.lm, examined.question_ids[number], number, count, chain))
        steps = [read_steps(text, FORM) for text, _ in texts]
        answers = [read_answer(text, FORM) for text, _ in texts]
        first: list[str] = []
        for (text, truncated), written, answer in zip(texts, steps, answers, strict=True):
            cut_off = truncated and answer is None and len(written) == 1 and text[-1] != " "
            if written and not cut_off:
                first.append(f"step {written[0].rstrip('.')}")
            elif answer is not None:
                first.append(f"answer {answer.rstrip('.')}")
        votes = Counter(answer.rstrip(".") for answer in answers if answer is not None)
        right, top = votes[example.answer], max(votes.values(), default=0)
        elected = [answer for answer, count in votes.items() if count == top]
        measures = {
            "pass_1": right / len(texts), "pass_n": float(right > 0),
            "maj_n": float(example.answer in elected) / max(len(elected), 1),
            "with_steps": sum(map(bool, steps)) / len(texts),
            "unreadable": answers.count(None) / len(texts),
            "truncated": sum(truncated for _, truncated in texts) / len(texts),
        }  # fmt: skip
        for name, counts in (("next_steps", Counter(first)), ("answers", votes)):
            shares = [count / counts.total() for count in counts.values()]
            measures[name] = len(counts)
            measures[f"effective_{name}"] = math.prod(share**-share for share in shares) if shares else 0.0
        for name, one in measures.items():
            found.setdefault(name, []).append(one)
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize(
    ("slot", "method"), [(THOUGHTS, "codi"), (PAUSES, "pause"), (NOTHING, "cot"), (JACOBI, "pccot")]
)
def test_every_measure_equals_a_slow_computation(slot: Slot, method: str, few: None) -> None:
    examined = Subject(unsure_model(slot, method), TASKS["prosqa"], EXAMPLES[:6], batch_size=2)
    before = examined.lm.reasoning
    study = rollouts(examined)
    assert examined.lm.reasoning == before
    places = {(row["chain"], row["thoughts"]) for row in study.rows}
    teacher = method in ("codi", "pccot")
    assert places == {(False, count) for count in range(1 if slot.is_empty else 4)} | (
        {(True, 0)} if teacher else set()
    )
    varied = 0
    for chain, count in places:
        expected = slow_measures(examined, count, chain)
        assert {name: value(study, name, count, chain) for name in expected} == pytest.approx(expected, abs=1e-9)
        varied += expected["next_steps"] > 1.5
    assert varied == len(places), "otherwise little is tested"
    for row in study.rows:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["questions"] <= 3


SAMPLED = [name for name, method in METHODS.items() if name != "hybrid_warmup" and not method.slot.merges]


@pytest.mark.parametrize("method", SAMPLED)
def test_every_method_is_sampled_after_as_many_thoughts_as_it_has(method: str, few: None) -> None:
    planned = plan(method, Curriculum(max_stage=2))
    reasoning = replace(Reasoning.at(planned, planned.stages[-1], max_new_tokens=3), format=FORM)
    lm = build("gpt2", torch.float32, **vars(reasoning))
    study = rollouts(Subject(lm, TASKS["prosqa"], EXAMPLES[:2]))
    places = {(row["chain"], row["thoughts"]) for row in study.rows}
    counts = [0] if reasoning.slot.is_empty else [0, 1, 2]
    assert {count for chain, count in places if not chain} == set(counts)
    assert ((True, 0) in places) is METHODS[method].teacher
    assert (study.facts["warning"] is None) is reasoning.slot.is_empty
    assert lm.reasoning == reasoning


def test_rows_do_not_depend_on_the_batch(few: None) -> None:
    lm = unsure_model(THOUGHTS, "codi")
    ours, theirs = (rollouts(Subject(lm, TASKS["prosqa"], EXAMPLES, batch_size=size)).rows for size in (1, 16))
    assert ours == theirs


def test_accuracies_are_those_of_a_sampled_evaluation(few: None) -> None:
    lm = unsure_model(THOUGHTS)
    study = rollouts(Subject(lm, TASKS["prosqa"], EXAMPLES))
    for count in (0, 3):
        settings = Sampling(5, 1.0, seed=rolled.SEED)
        result = evaluate_samples(lm, TASKS["prosqa"], EXAMPLES[:3], settings, num_thoughts=count).result
        last = result.sampling.at_k[-1]
        for measure, mean, interval in (
            ("pass_1", result.accuracy, result.interval), ("pass_n", last.pass_at_k, last.pass_interval),
            ("maj_n", last.maj_at_k, last.maj_interval),
        ):  # fmt: skip
            found = [value(study, measure, count, key=key) for key in ("value", "low", "high")]
            assert found == pytest.approx([mean, *interval], abs=1e-9)


def test_differences_are_paired_and_equal_those_of_the_means(few: None) -> None:
    study = rollouts(Subject(unsure_model(THOUGHTS, "codi"), TASKS["prosqa"], EXAMPLES))
    assert study.facts["written_chain"] == "without slot"
    for row in study.rows:
        of_graph = row["measure"] in ("ahead", "ahead_found")
        for key, is_reference, reference in (
            ("change", not row["chain"] and row["thoughts"] == 0, (0, False)), ("to_chain", row["chain"], (0, True)),
        ):  # fmt: skip
            if is_reference or of_graph:
                assert row[key] is None
            else:
                assert row[key] == pytest.approx(row["value"] - value(study, row["measure"], *reference), abs=1e-9)
                assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]


def test_intervals_of_counts_are_bootstrap_intervals_and_leave_room_if_all_are_equal() -> None:
    values_Q = np.random.default_rng(0).integers(1, 12, 60).astype(float)
    drawn = np.random.default_rng(1).choice(values_Q, (20_000, 60)).mean(1)
    row = rolled._mean("answers", np.concatenate([values_Q, [np.nan]]))
    assert row["questions"] == 60
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.06)
    alike = rolled._mean("answers", np.ones(100))
    assert (alike["value"], alike["low"]) == (1.0, 1.0), "a question that is answered has one answer at least"
    assert 1.1 < alike["high"] < 3
    same = rolled._difference("change", "answers", np.ones(100), {"answers": np.ones(100)})
    assert same["change_low"] < 0 < same["change_high"]


@pytest.mark.parametrize(
    ("text", "truncated", "expected"),
    [
        ("4 7 ### 7", False, ("step", "4")),
        ("### 7", False, ("answer", "7")),
        (" 4  ###  7. ", False, ("step", "4")),
        ("4 7 9 1", True, ("step", "4")),
        ("4", True, None),
        ("4 ", True, ("step", "4")),
        ("4", False, ("step", "4")),
        ("", False, None),
    ],
)
def test_the_next_step_is_the_first_that_is_written_or_the_answer(text: str, truncated: bool, expected: Any) -> None:
    answer = {"text": text, "truncated": truncated, "predicted": read_answer(text, FORM)}
    assert next_step(answer, TASKS["prosqa"], FORM) == expected


def test_variety_counts_what_is_readable() -> None:
    assert variety([None, None]) == (0, 0.0)
    assert variety(["a", "b", "c", "d", None]) == (4, pytest.approx(4.0))
    assert variety([("step", "a"), ("answer", "a")])[0] == 2
    many, effective = variety(["a"] * 31 + ["b"])
    assert many == 2
    assert 1 < effective < 1.2


def test_the_graph_allows_nodes_in_symbols_and_edges_in_sentences() -> None:
    symbols = GraphQuestion.read("0 1 | 0 2 | 1 3 | 2 3 | 2 4 | 3 5 | 6 7 ? 5 or 7 from 0", "5")
    assert [steps_ahead(symbols, done) for done in range(4)] == [{"1", "2"}, {"3", "4"}, {"5"}, set()]
    sentences = GraphQuestion.read(SENTENCES[0].question, SENTENCES[0].answer)
    ahead = [steps_ahead(sentences, done) for done in range(4)]
    assert ahead[:2] == [{("Tom", "wumpus")}, {("wumpus", "cat"), ("wumpus", "vumpus")}]
    assert ahead[2:] == [{("cat", "dog")}, set()]
    assert rolled._named(sentences, "Every wumpus is a cat.") in ahead[1]
    assert rolled._named(sentences, "Every wumpus is") is None


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({}, [0, None, 1, None, 2]),
        ({"steps_cut": None}, [None] * 5),
        ({"tokens_cut": 4}, [None] * 5),
        ({"slot": PAUSES, "thoughts_per_step": 1, "steps_cut": 4}, [0, 1, 2, 3, 4]),
        ({"slot": NOTHING, "num_thoughts": 0, "steps_cut": 1}, [1]),
    ],
)
def test_what_thoughts_stand_for_says_what_is_ahead(changes: dict[str, Any], replaced: list[int | None]) -> None:
    reasoning = replace(Reasoning(num_thoughts=4, thoughts_per_step=2, steps_cut=2), **changes)
    assert [rolled._steps_replaced(reasoning, count) for count in range(reasoning.num_thoughts + 1)] == replaced


# A planted model: without thoughts it names one of four next nodes and one of two answers, after them the right answer.

STAR = [Example(f"0 1 | 0 2 | 0 3 | 0 4 | {n} 5 | 7 6 ? 5 or 6 from 0", (str(n), "5"), "5") for n in (1, 2, 3, 4) * 5]


def planted() -> LatentLM:
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(STAR, FORM)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, n_embd=16, n_layer=1, n_head=2
    )
    reasoning = Reasoning(num_thoughts=2, thoughts_per_step=1, steps_cut=2, max_new_tokens=6, format=FORM)
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning)
    word = {name: tokenizer.convert_tokens_to_ids(name) for name in ["###", *"123456"]}
    law = {word["###"]: ["5", "6"], **{word[node]: ["###"] for node in "1234"}}
    thoughts, generate = 0, lm.generate

    def noting(*args: Any, num_thoughts: int, **options: Any) -> Any:
        nonlocal thoughts
        thoughts = num_thoughts
        return generate(*args, num_thoughts=num_thoughts, **options)

    def write(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if (ids_BT := kwargs.get("input_ids")) is None:
            return
        logits_BV = torch.full_like(output.logits[:, -1], -50.0)
        for row, last in enumerate(ids_BT[:, -1].tolist()):
            start = "1234" if not thoughts else ["###"]
            names = start if last == lm.special.eot else law.get(last, [])
            names = names[:1] if thoughts else names
            logits_BV[row, [word[name] for name in names] or [lm.special.eos]] = 0.0
        output.logits[:, -1] = logits_BV

    lm.base.register_forward_hook(write, with_kwargs=True)
    lm.generate = noting  # pyright: ignore
    return lm.eval()


@pytest.fixture(scope="module")
def of_planted() -> Study:
    return rollouts(Subject(planted(), TASKS["prosqa"], STAR, batch_size=8, trained_with_fewer_thoughts=True))


def test_a_model_that_decides_in_its_thoughts_is_told_apart(of_planted: Study) -> None:
    study = of_planted
    assert study.facts["written_chain"] == "0 thoughts"
    assert study.facts["warning"] is None
    assert [value(study, name) for name in ("next_steps", "answers", "with_steps", "pass_n")] == [4.0, 2.0, 1.0, 1.0]
    assert 3.5 < value(study, "effective_next_steps") < 4
    assert value(study, "pass_1") == pytest.approx(0.5, abs=0.1)
    for count in (1, 2):
        names = ("next_steps", "effective_next_steps", "effective_answers", "pass_1", "with_steps", "unreadable")
        assert [value(study, name, count) for name in names] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert [value(study, name) for name in ("ahead", "ahead_found")] == [4.0, 4.0]
    assert [value(study, name, 1) for name in ("ahead", "ahead_found")] == [1.0, 0.0], "the answer follows at once"
    assert not [row for row in study.rows if row["thoughts"] == 2 and row["measure"] == "ahead"], "no step is left"
    told = describe(study)
    assert told[0].startswith(
        "32 answers to each of 20 questions were sampled after 0 to 2 thoughts. From 0 to 2, the "
    )
    assert "different next steps clearly falls, from 3.8" in told[0]
    assert "different answers clearly falls, from 1.9" in told[0]
    assert told[1].startswith("100.0 % of the answers write steps without thoughts and 0.0 % after 2 thoughts")
    assert "clearly less varied than those without thoughts, where the chain is written" in told[2]
    assert "Next steps that the graph allows: 4.00 without thoughts, of which 4.00 are sampled; 1.00 after" in told[4]
    assert "The model was trained with fewer than 2 thoughts, too." in told


def test_the_sentences_follow_the_intervals(of_planted: Study) -> None:
    def changed(key: str, low: float, high: float, **facts: Any) -> str:
        rows = [row if row["change"] is None else row | {f"{key}_low": low, f"{key}_high": high}
                for row in of_planted.rows]  # fmt: skip
        return " ".join(describe(Study("rollouts", rows, of_planted.facts | facts), "pause"))

    assert "next steps clearly rises" in changed("change", 0.1, 0.2)
    assert "next steps does not clearly change" in changed("change", -0.1, 0.2)
    assert "after 2 pauses are clearly more varied than those without pauses" in changed("to_chain", 0.1, 0.2)
    assert "after 2 pauses are not clearly more or less varied" in changed("to_chain", -0.1, 0.2)
    none = changed("to_chain", 0.1, 0.2, written_chain=None)
    assert "Too few answers without pauses write steps for a comparison with a written chain." in none
    assert "varied than" not in none
    assert "cannot be read" not in none
    rows = [row | {"value": 0.2} if row["measure"] == "unreadable" else row for row in of_planted.rows]
    told = " ".join(describe(replace(of_planted, rows=rows)))
    assert "cannot be read and count as no answer: 20.0 % without thoughts, 20.0 % after 1 thought and" in told


def test_what_does_not_apply_is_named_and_a_chain_has_one_place(few: None) -> None:
    with pytest.raises(NotApplicable, match="chooses by its first token how it answers"):
        rollouts(subject(hybrid(), EXAMPLES[:2]))
    lm = with_slot(deepcopy(memorized()), NOTHING, "no_cot")
    study = rollouts(Subject(lm, TASKS["gsm8k"], EXAMPLES))
    assert {(row["chain"], row["thoughts"]) for row in study.rows} == {(False, 0)}
    assert not [row for row in study.rows if row["measure"] in ("ahead", "ahead_found")], "no graph"
    assert study.facts["warning"] is None
    assert describe(study)[0].startswith("5 answers to each of 3 questions were sampled. To one question there are ")
    assert study.facts["written_chain"] is None
    without = Subject(unsure_model(THOUGHTS), TASKS["prosqa"], EXAMPLES)
    assert "trained without mixing" in rollouts(without).facts["warning"]


@pytest.mark.parametrize("method", ["coconut", "cot"])
def test_the_page_has_a_section_and_a_chart_within_its_width(of_planted: Study, method: str) -> None:
    stage = asdict(plan(method, Curriculum(max_stage=2)).stages[-1]) | {"index": 2}
    study = of_planted
    if method == "cot":
        rows = [row for row in study.rows if not row["thoughts"]]
        study = Study("rollouts", rows, study.facts | {"trained_thoughts": 0})
    described = {"plan": {"unit": "updates", "stages": [stage]}}
    run = RunRecord(Path("run"), {"method": method}, described, [], [], studies={"rollouts": study})
    section = what_they_hold(run)
    assert section
    assert section.title == ("Sampled answers" if method == "cot" else "What the thoughts hold")
    assert Heading("How varied the sampled answers are") in section.parts
    assert any(isinstance(part, Figure) for part in section.parts) is (method != "cot")
    with_chain = [row | {"chain": True} for row in study.rows if not row["thoughts"]]
    for width in (720, 350):
        figure = chart(replace(study, rows=[*with_chain, *study.rows]), width)
        box = figure.get_tightbbox()
        assert 72 * min(box.x0, box.y0) > -3
        assert 72 * box.x1 < width + 3
        assert 72 * box.y1 < 72 * figure.get_figheight() + 3
        assert [text.get_text() for text in figure.axes[0].get_xticklabels()][:2] == ["chain", "0"]
