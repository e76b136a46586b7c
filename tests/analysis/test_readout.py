"""What linear probes read out of the slot."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import build
from helpers.runs import graph_rows
from scipy.optimize import minimize
from scipy.special import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM

from coconut import LatentLM
from coconut.analysis.linear_probes import fit
from coconut.analysis.probes import Subject
from coconut.analysis.readout import WEIGHT_DECAYS, Target, readout
from coconut.analysis.readout import _read as read
from coconut.data.examples import Example
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import build_word_tokenizer, encode_questions, encode_texts
from coconut.methods import NOTHING, PAUSES, PromptFormat, Reasoning
from coconut.models.passes import Reads
from coconut.reporting.measurements.readout import describe, layers_chart
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS

FORM = PromptFormat("{}", "{} ", "### {}")
GRAPHS = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=2, count=170)]
TEST, TRAINING = GRAPHS[:60], GRAPHS[60:]


def subject_of(lm: LatentLM, examples: list[Example] = TEST, batch_size: int = 32) -> Subject:
    return Subject(lm, TASKS["prosqa"], examples, batch_size)


@pytest.fixture(scope="module")
def lm() -> LatentLM:
    return build("llama", num_thoughts=2, format=FORM)


@pytest.fixture(scope="module")
def studies(lm: LatentLM) -> list[Study]:
    return readout(subject_of(lm), TRAINING)


def rows_of(study: Study, **keys: Any) -> list[dict[str, Any]]:
    return [row for row in study.rows if all(row[key] == value for key, value in keys.items())]


def states_of(lm: LatentLM, examples: list[Example], place: int, layer: int) -> np.ndarray:
    """(N, D) in float64, one question at a time, everything run again for every thought."""
    found = []
    for question in encode_questions(lm.tokenizer, [each.question for each in examples], lm.reasoning.format):
        ids = torch.tensor([[*question, *slot_with_markers(lm.reasoning, lm.special, lm.reasoning.num_thoughts)]])
        out = lm(ids, reads=Reads(columns_B=torch.tensor([len(question) + place])), use_cache=False)
        found.append(out.states[0, layer].detach().double().numpy())
    return np.stack(found)


def slow_probe(states: np.ndarray, classes: np.ndarray, num_classes: int, decay: float) -> Any:
    """A probe by scipy: a function of states that gives log-probabilities."""
    prior = (np.bincount(classes, minlength=num_classes) + 0.5) / (len(classes) + 0.5 * num_classes)
    shape = states.shape[1] + 1, num_classes

    def log_probs(flat: np.ndarray, x: np.ndarray) -> np.ndarray:
        return log_softmax(x @ flat.reshape(shape)[:-1] + flat.reshape(shape)[-1] + np.log(prior), axis=1)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = log_probs(flat, states)
        error = (np.exp(log_p) - np.eye(num_classes)[classes]) / len(classes)
        gradient = np.concatenate([states.T @ error, error.sum(0, keepdims=True)]).ravel() + decay * flat
        return decay / 2 * flat @ flat - log_p[np.arange(len(classes)), classes].mean(), gradient

    found = minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return lambda x: log_probs(found.x, x)


@pytest.mark.parametrize(("place", "layer"), [(0, 1), (2, 2)])
def test_numbers_equal_those_of_single_probes(lm: LatentLM, studies: list[Study], place: int, layer: int) -> None:
    names = [encode_texts(lm.tokenizer, [f"{example.steps[0]} " for example in each]) for each in (TRAINING, TEST)]
    fitted, asked = ([name[0] for name in each] for each in names)
    order = sorted(set(fitted), key=lambda token: (-fitted.count(token), token))
    y, y_test = (np.array([order.index(token) for token in each]) for each in (fitted, asked))
    x, x_test = (states_of(lm, each, place, layer) for each in (TRAINING, TEST))
    std = np.where(x.std(0) > 1e-5 * np.sqrt((x**2).mean(0)), x.std(0), np.inf)
    x, x_test = (x - x.mean(0)) / std, (x_test - x.mean(0)) / std
    shuffled = np.random.default_rng([0, 0]).permutation(len(y))
    held_out, used = shuffled[::5], np.delete(shuffled, np.s_[::5])
    losses, probes = [], []
    for decay in WEIGHT_DECAYS:
        probes.append(slow_probe(x[used], y[used], len(order) + 1, decay))
        losses.append(-probes[-1](x[held_out])[np.arange(len(held_out)), y[held_out]].mean())
    log_p = probes[int(np.argmin(losses))](x_test)
    shares = np.bincount(y_test) / len(y_test)
    entropy = -sum(share * np.log(share) for share in shares if share)
    information = entropy + log_p[np.arange(len(y_test)), y_test].mean()
    row = rows_of(studies[1], of="thoughts", step=1, place=place, layer=layer)[0]
    assert row["accuracy"] == pytest.approx((log_p[:, :-1].argmax(1) == y_test).mean(), abs=1.01 / len(TEST))
    assert row["information"] == pytest.approx(max(0, information), abs=2e-3)
    assert row["low"] <= row["accuracy"] <= row["high"]
    at_layer = rows_of(studies[0], step=1, place=place)[0]
    assert at_layer["majority"] == pytest.approx((y_test == 0).mean())
    assert at_layer["entropy"] == pytest.approx(entropy)
    assert at_layer["questions"] == len(TEST)


def test_differences_are_those_of_the_rows(studies: list[Study]) -> None:
    chosen, by_layer = studies
    for row in chosen.rows:
        same = rows_of(by_layer, step=row["step"], place=row["place"], layer=row["layer"])
        assert row["accuracy"] == next(each["accuracy"] for each in same if each["of"] == "thoughts")
        for name in ("majority", "other", "shuffled", "before", "pauses"):
            if row[name] is None:
                assert row["place"] == 0
                continue
            assert row[f"over_{name}"] == pytest.approx(row["accuracy"] - row[name])
            assert row[f"over_{name}_low"] <= row[f"over_{name}"] <= row[f"over_{name}_high"]
    for step in {row["step"] for row in chosen.rows}:
        assert [row["best"] for row in rows_of(chosen, step=step)].count(True) == 1


def test_rows_do_not_depend_on_the_batch(lm: LatentLM, studies: list[Study]) -> None:
    again = readout(subject_of(lm, batch_size=7), TRAINING)
    for ours, theirs in zip(studies, again, strict=True):
        for one, other in zip(ours.rows, theirs.rows, strict=True):
            same = {k: pytest.approx(v, abs=1.01 / len(TEST)) if isinstance(v, float) else v for k, v in other.items()}
            assert one == same


def test_probes_fitted_at_once_are_those_fitted_alone() -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(3, 120, 8, generator=random) * torch.tensor([0.01, 1.0, 10.0])[:, None, None]
    classes = (states[1, :, 0] > 0).long() + (states[1, :, 1] > 0.5).long()
    decays = torch.tensor([0.1, 0.001, 0.01])
    together = fit(states, classes, 4, decays)
    for m in range(3):
        x = states[m].double().numpy()
        alone = slow_probe(x, classes.numpy(), 4, float(decays[m]))(x)
        assert together(states)[m].T.exp().numpy() == pytest.approx(np.exp(alone), abs=2e-3)


def test_information_is_a_bound_from_below() -> None:
    """The state names one of four tokens, in three of ten cases at random."""
    random = np.random.default_rng(0)
    tokens = random.integers(4, size=6000)
    seen = np.where(random.random(6000) < 0.3, random.integers(4, size=6000), tokens)
    states = torch.stack([torch.eye(4)[torch.from_numpy(seen)], torch.randn(6000, 4)])
    right, wrong = 0.7 + 0.3 / 4, 0.3 / 4
    mutual = np.log(4) + right * np.log(right) + 3 * wrong * np.log(wrong)
    target = Target(1, 0, 5, torch.from_numpy(tokens[:2000]), torch.from_numpy(tokens[2000:]))
    found = read([target], states[:, :2000], states[:, 2000:], "thoughts", controls=True)
    gains = {name: each.gain[0].mean(1) for name, each in found.items()}
    assert gains["thoughts"][0] == pytest.approx(mutual, abs=0.03)
    assert gains["thoughts"][1] == pytest.approx(0, abs=0.01)
    assert gains["shuffled"][0] == pytest.approx(0, abs=0.01)
    assert gains["other"][0] < -0.5, "sure and wrong"
    accuracy = {name: each.right[0].mean(1) for name, each in found.items()}
    assert accuracy["thoughts"][0] == pytest.approx(right, abs=0.02)
    assert accuracy["other"][0] == pytest.approx(0.25, abs=0.03)


# A model by hand.

LETTERS, FILLERS = [*"ABCDEFGH"], [f"f{i}" for i in range(10)]


def lettered(count: int, seed: int) -> list[Example]:
    """A letter among other words, which is the first step; the second step is a letter at random."""
    random = Random(seed)
    found = []
    for _ in range(count):
        letter, words = random.choice(LETTERS), random.choices(FILLERS, k=random.randint(2, 6))
        words.insert(random.randrange(len(words)), letter)
        found.append(Example(" ".join(words), (letter, random.choice(LETTERS)), "A"))
    return found


def planted_model() -> LatentLM:
    """A thought is a constant that attends to the letter; no other position does."""
    tokenizer = build_word_tokenizer(lettered(200, 0), FORM)
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=1, n_positions=32,
                                  bos_token_id=None)  # fmt: skip
    reasoning = Reasoning(num_thoughts=2, format=FORM, max_new_tokens=2)
    lm = LatentLM.from_base(AutoModelForCausalLM.from_config(config), tokenizer, "random", reasoning).eval()
    with torch.no_grad():
        for name, weight in lm.base.named_parameters():
            if "ln" not in name:
                weight.zero_()
        table: Any = lm.base.get_input_embeddings()
        special = [lm.special.bot, lm.special.eot, lm.special.latent, lm.special.pause]
        for number, token in enumerate([*tokenizer.convert_tokens_to_ids(FILLERS), *special]):  # pyright: ignore
            table.weight[token, 10 + number] = 4
        for number, token in enumerate(tokenizer.convert_tokens_to_ids(LETTERS)):  # pyright: ignore
            table.weight[token, [1, 2 + number]] = 4
        attention: Any = lm.base.get_submodule("transformer.h.0.attn")
        attention.c_attn.weight[0, 0], attention.c_attn.bias[0] = 100, -200  # asks if it is a thought, refuses if not
        attention.c_attn.weight[1, 32] = 1  # a letter answers
        attention.c_attn.weight[range(2, 10), range(66, 74)] = 1  # with its name
        attention.c_proj.weight.copy_(torch.eye(32))
    lm.feedback.forward = lambda states, words: 4 * torch.eye(32)[0].expand_as(states)  # pyright: ignore
    return lm


@pytest.fixture(scope="module")
def planted() -> list[Study]:
    return readout(subject_of(planted_model(), lettered(150, 1)), lettered(300, 2))


def test_a_step_that_only_thoughts_hold_is_told_from_one_that_nothing_holds(planted: list[Study]) -> None:
    chosen, by_layer = planted
    for place in (1, 2):
        row = rows_of(chosen, step=1, place=place)[0]
        assert (row["accuracy"], row["layer"]) == (1.0, 1)
        assert row["low"] == pytest.approx(1 - 0.025, abs=0.002), "Wilson's, where the bootstrap has no width"
        assert row["information"] > 0.95 * row["entropy"]
        assert max(row["before"], row["pauses"], row["other"], row["shuffled"]) < 0.4
        assert min(row[f"over_{name}_low"] for name in ("before", "pauses", "other", "shuffled", "majority")) > 0.5
        assert rows_of(by_layer, of="thoughts", step=1, place=place, layer=0)[0]["information"] < 0.02
    first, better, second = describe(chosen, "thought")
    assert first.startswith("Step 1 can be read from thought 1 on: a probe on thought")
    assert better.startswith("That is clearly better than the token before the slot (")
    assert "and than a pause in its place" in better
    assert second.startswith("Step 2 cannot be read from any thought")


# What is asked.


def test_without_training_questions_the_others_have_two_halves(lm: LatentLM) -> None:
    chosen, _ = readout(subject_of(lm, GRAPHS))
    assert chosen.facts["fitted_from"] == "test"
    assert (chosen.facts["fitted_on"], chosen.facts["measured"]) == (85, 85)
    assert max(row["questions"] for row in chosen.rows) == 85


def test_no_question_is_fitted_on_and_measured(lm: LatentLM) -> None:
    chosen, _ = readout(subject_of(lm), [*TRAINING, *TEST])
    assert (chosen.facts["fitted_on"], chosen.facts["measured"]) == (len(TRAINING), len(TEST))


def test_a_model_of_pauses_has_no_control_of_pauses(lm: LatentLM) -> None:
    other = build("llama", num_thoughts=2, format=FORM, slot=PAUSES)
    chosen, by_layer = readout(subject_of(other), TRAINING)
    assert all(row["pauses"] is None and row["over_pauses"] is None for row in chosen.rows)
    assert {row["of"] for row in by_layer.rows} == {"pauses", "other", "shuffled"}
    assert "than a pause" not in " ".join(describe(chosen, "pause"))


def test_what_is_left_out_is_told(lm: LatentLM) -> None:
    """Step 1 has one token that varies between two that do not; step 2 has ten; few questions have a third."""
    random = Random(0)

    def draw(count: int) -> list[Example]:
        digits = [[str(random.randrange(10)) for _ in range(11)] for _ in range(count)]
        return [
            Example(" ".join(each), (f"1 {each[0]} 2", " ".join(each[1:]), *(["3"] if i < 5 else [])), "c")
            for i, each in enumerate(digits)
        ]

    chosen, _ = readout(subject_of(lm, draw(60)), draw(100))
    assert chosen.facts["offsets"] == {"1": [1], "2": [0, 1, 2, 3, 4, 5]}
    left_out = {"constant": {"1": [0, 2]}, "rare": {"3": [0]}, "further": {"2": [6, 7, 8, 9]}, "steps": [3]}
    assert chosen.facts["left_out"] == left_out
    assert {(row["step"], row["tokens"]) for row in chosen.rows} == {(1, 1), (2, 6)}


def test_what_does_not_apply_is_named(lm: LatentLM) -> None:
    with pytest.raises(NotApplicable, match="no written steps"):
        readout(subject_of(lm, [replace(example, steps=()) for example in TEST]), TRAINING)
    with pytest.raises(NotApplicable, match="with 110 questions to fit on and 20 to measure"):
        readout(subject_of(lm, TEST[:20]), TRAINING)
    empty = build("llama", slot=NOTHING, markers=False, format=FORM)
    with pytest.raises(NotApplicable, match="nothing in its slot"):
        readout(subject_of(empty), TRAINING)


# The sentences.


def told(*accuracies: float, before: float = 0.0, pauses: float | None = 0.0, readable: bool = True) -> list[str]:
    """`before` and `pauses`: how much better the best thought is than these, all with an interval of 0.1."""
    best = len(accuracies) - 1
    rows = []
    for place, accuracy in enumerate(accuracies):
        row = {"step": 1, "place": place, "best": place == best, "tokens": 1, "accuracy": accuracy,
               "low": accuracy - 0.05, "high": accuracy + 0.05}  # fmt: skip
        for name, value in (("majority", 0.1), ("other", 0.1), ("shuffled", accuracy - 0.3 * readable)):
            row |= {name: value, f"over_{name}_low": accuracy - value - 0.05}
        for name, over in (("before", before), ("pauses", pauses)):
            row |= {name: None if over is None else accuracy - over}
            row |= {f"over_{name}_{end}": over and over + by for end, by in (("low", -0.05), ("high", 0.05))}
        rows.append(row)
    return describe(Study("readout", rows), "thought")


def test_the_sentences_follow_the_intervals() -> None:
    assert told(0.1, 0.12, 0.8, before=0.7, pauses=0.01) == [
        "Step 1 can be read from thought 2: a probe on thought 2 names 80.0 % of its tokens, against the most frequent "
        "token's 10.0 % and 10.0 % with another question's thoughts.",
        "That is clearly better than the token before the slot (10.0 %) and not clearly better than a pause in its "
        "place (79.0 %).",
    ]
    first, second = told(0.6, 0.4, 0.5, before=-0.1, pauses=None)
    assert first.startswith("Step 1 can be read in part from the token before the slot and from every thought: a probe")
    assert second == "That is clearly worse than the token before the slot (60.0 %)."
    assert told(0.1, 0.4, 0.5)[0].startswith("Step 1 can be read in part from thought 1 on: a probe on thought 2")
    assert told(0.1, 0.4, 0.1, 0.5)[0].startswith("Step 1 can be read in part from thoughts 1 and 3: a probe")
    assert told(0.6, 0.1, 0.12) == [
        "Step 1 cannot be read from any thought: a probe on thought 2 names 12.0 % of its tokens, against the most "
        "frequent token's 10.0 %; from the token before the slot it can (60.0 %)."
    ]
    assert told(0.6, 0.9, readable=False)[0].startswith("Step 1 cannot be read from any thought"), "shuffled is as good"


def test_cells_show_what_a_probe_gains_over_one_fitted_to_other_steps(planted: list[Study]) -> None:
    by_layer = planted[1]
    drawn = [
        (axes.get_title(loc="left"), *map(int, text.get_position()), text.get_text())
        for axes in layers_chart(by_layer, 720).axes
        for text in axes.texts
    ]
    probes, expected = rows_of(by_layer, of="thoughts"), []
    for probe in probes:
        same = {key: probe[key] for key in ("step", "place", "layer")}
        (control,) = rows_of(by_layer, **same, of="shuffled")
        if probe["low"] > control["high"]:
            gain = 100 * (probe["accuracy"] - control["accuracy"])
            expected.append((f"Step {probe['step']}", probe["place"], probe["layer"], f"{gain:.0f}"))
    assert sorted(drawn) == sorted(expected)
    assert 0 < len(drawn) < len(probes)
