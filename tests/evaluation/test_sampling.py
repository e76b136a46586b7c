"""Sampled evaluation: every answer reproducible, counted and written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.html import words
from helpers.models import EXAMPLES, TASK, build, hybrid
from helpers.processes import together
from helpers.runs import graph_files, small_run

from coconut import LatentLM
from coconut.analysis.comparable_runs import comparable_runs
from coconut.analyze import page_of
from coconut.config import EngineConfig
from coconut.data.examples import Example
from coconut.engine.process_group import init_distributed
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig, Sampling
from coconut.evaluation.evaluator import evaluate
from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.sampling import AnswerScore, SampledEvaluation, describe_samples, evaluate_samples
from coconut.generation.generate import Generated
from coconut.methods import PAUSES, PromptFormat
from coconut.runs.description import read_results
from coconut.runs.record import read_run
from coconut.training.trainer import run as run_train
from coconut.utils.files import read_json, write_json

WORDS = Sampling(5, temperature=1.5, top_p=0.95)
NOISE = Sampling(5, thought_noise=0.8)
DROPOUT = Sampling(5, thought_dropout=0.4)
ALL = Sampling(5, temperature=1.5, top_p=0.95, thought_noise=0.8, thought_dropout=0.2)
FORM = PromptFormat("{}", "{} ", "{}")  # everything that is generated is an answer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run_train(small_run(folder / "run", graph_files(folder, 32, 8, 10))) == 0
    return folder / "run"


def model(**changes: Any) -> LatentLM:
    return build("llama", **{"num_thoughts": 3, "max_new_tokens": 4, "format": FORM, **changes})


def sampled(sampling: Sampling, examples: list[Example] = EXAMPLES, **settings: Any) -> SampledEvaluation:
    return evaluate_samples(model(), TASK, examples, sampling, **settings)


def texts(evaluation: SampledEvaluation) -> list[list[str]]:
    return [[answer["text"] for answer in row.answers] for row in evaluation.questions]


@pytest.mark.parametrize("sampling", [WORDS, NOISE, DROPOUT, ALL], ids=["words", "noise", "dropout", "all"])
def test_answers_depend_on_seed_question_and_sample_alone(sampling: Sampling) -> None:
    torch.manual_seed(0)
    whole = texts(sampled(sampling))
    assert any(len(set(row)) > 1 for row in whole)
    for batch_size in (1, 2, 5, 11):
        torch.manual_seed(batch_size)
        assert texts(sampled(sampling, batch_size=batch_size)) == whole
    assert texts(sampled(sampling, EXAMPLES[1:], rows=[1, 2])) == whole[1:], "the row in the file counts"
    fewer = replace(sampling, samples=2)
    assert texts(sampled(fewer)) == [row[:2] for row in whole]
    assert texts(sampled(replace(sampling, seed=1))) != whole


def on_two(file: str) -> None:
    with init_distributed(EngineConfig(device="cpu", threads=1)) as world:
        result, questions = sampled(ALL, world=world)
        if world.is_main:
            write_json(file, [asdict(result), [asdict(row) for row in questions]])


def test_two_processes_sample_like_one(tmp_path: Path) -> None:
    together(on_two, str(tmp_path / "two.json"))
    result, questions = sampled(ALL)
    write_json(tmp_path / "one.json", [asdict(result), [asdict(row) for row in questions]])
    ours, theirs = (read_json(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert ours[1] == theirs[1]
    assert ours[0] | {"seconds_per_item": 0} == theirs[0] | {"seconds_per_item": 0}


def test_without_randomness_every_answer_is_the_greedy_one() -> None:
    lm = model()
    result, predictions, _ = evaluate(lm, TASK, EXAMPLES)
    several, questions = evaluate_samples(lm, TASK, EXAMPLES, Sampling(3))
    assert [[answer["text"] for answer in row.answers] for row in questions] == [[p.text] * 3 for p in predictions]
    assert several.accuracy == result.accuracy
    assert {(row.pass_at_k, row.maj_at_k) for row in several.sampling.at_k} == {(result.accuracy, result.accuracy)}
    assert (several.passes, several.mean_new_tokens) == (result.passes, result.mean_new_tokens)
    assert several.sampling.total_passes == 3 * sum(p.passes for p in predictions)


def test_passes_tokens_and_readable_answers_are_counted_over_all_samples() -> None:
    lm = model()
    result, questions = evaluate_samples(lm, TASK, EXAMPLES, WORDS)
    flat = [answer for row in questions for answer in row.answers]
    of = result.sampling
    assert len(flat) == 15
    assert of.total_new_tokens == sum(answer["new_tokens"] for answer in flat)
    assert of.total_thoughts == 3 * 15
    ends = sum(not answer["truncated"] for answer in flat)
    assert of.total_passes == of.total_new_tokens + ends + (3 + 1) * 15
    assert result.passes == pytest.approx(of.total_passes / 15)
    assert result.mean_new_tokens == pytest.approx(of.total_new_tokens / 15)
    assert of.unreadable == sum(answer["predicted"] is None for answer in flat) / 15
    assert result.correct == sum(answer["correct"] for answer in flat) == sum(row.correct for row in questions)


def test_curves_are_those_of_the_answers_that_are_written() -> None:
    """The gold answers are what the model says first, so that some answers are right and some wrong."""
    sampling = Sampling(5, temperature=0.4)
    said = [[answer["predicted"] for answer in row.answers] for row in sampled(sampling).questions]
    examples = [Example(e.question, (), row[0]) for e, row in zip(EXAMPLES, said, strict=True)]
    result, questions = sampled(sampling, examples)
    right_QN = np.array([[answer["correct"] for answer in row.answers] for row in questions])
    assert 0 < right_QN.mean() < 1
    at = {row.k: row for row in result.sampling.at_k}
    assert list(at) == [1, 2, 4, 5]
    assert [at[1].pass_at_k, at[1].maj_at_k] == pytest.approx([right_QN.mean()] * 2)
    assert result.accuracy == pytest.approx(right_QN.mean())
    assert result.interval == at[1].pass_interval
    assert at[5].pass_at_k == right_QN.any(1).mean()
    pairs = [(right_QN[:, i] | right_QN[:, j]).mean() for i in range(5) for j in range(i)]
    assert at[2].pass_at_k == pytest.approx(np.mean(pairs))


def by_length(questions: Sequence[Sequence[int]], out: Generated) -> list[AnswerScore]:
    """Prefers short questions and large first tokens."""
    pairs = zip(questions, out.tokens[:, 0].tolist(), strict=True)
    return [AnswerScore(first / 7 - len(question), 2) for question, first in pairs]


def test_the_best_answer_is_chosen_by_the_reward() -> None:
    sampling = Sampling(6, temperature=1.5, thought_dropout=0.3)
    said = [[answer["predicted"] for answer in row.answers] for row in sampled(sampling).questions]
    examples = [Example(e.question, (), row[0]) for e, row in zip(EXAMPLES, said, strict=True)]
    result, questions = sampled(sampling, examples, scorer=by_length)
    right_QN = np.array([[answer["correct"] for answer in row.answers] for row in questions], float)
    rewards_QN = np.array([[answer["reward"] for answer in row.answers] for row in questions])
    assert 0 < right_QN.mean() < 1
    tied_QN = rewards_QN == rewards_QN.max(1, keepdims=True)
    last = result.sampling.at_k[-1]
    chosen_Q = (tied_QN * right_QN).sum(1) / tied_QN.sum(1)
    assert last.best_at_k == pytest.approx(chosen_Q.mean())
    assert last.best_interval == pytest.approx(mean_interval(chosen_Q[None]))
    assert result.sampling.at_k[0].best_at_k == pytest.approx(right_QN.mean())
    assert result.sampling.scoring_passes == 2 * right_QN.size
    assert "best@k" in describe_samples(result)
    for batch_size in (1, 4):
        assert sampled(sampling, examples, scorer=by_length, batch_size=batch_size).questions == questions
    plain = sampled(sampling, examples)
    assert plain.result.sampling.at_k[0].best_at_k is None
    assert "reward" not in plain.questions[0].answers[0]
    assert "best@k" not in describe_samples(plain.result)
    assert [(row.pass_at_k, row.maj_at_k) for row in plain.result.sampling.at_k] == [
        (row.pass_at_k, row.maj_at_k) for row in result.sampling.at_k
    ]


def test_modes_of_a_hybrid_model_are_sampled() -> None:
    lm = hybrid()
    whole = evaluate_samples(lm, TASK, EXAMPLES, Sampling(6, 2.0), max_new_tokens=3)
    assert sum(whole.result.modes.values()) == pytest.approx(1)
    assert len({answer["mode"] for row in whole.questions for answer in row.answers}) > 1
    again = evaluate_samples(lm, TASK, EXAMPLES, Sampling(6, 2.0), max_new_tokens=3, batch_size=4)
    assert again.questions == whole.questions


def test_noise_needs_thoughts() -> None:
    noise = Sampling(2, thought_noise=0.5)
    with pytest.raises(ValueError, match=r"thought_noise=0\.5 is not for pause: it has no latent thoughts to change"):
        evaluate_samples(model(slot=PAUSES, method="pause"), TASK, EXAMPLES, noise)
    with pytest.raises(ValueError, match=r"thought_noise=0\.5 is not for .*: its modes think without noise"):
        evaluate_samples(hybrid(), TASK, EXAMPLES, noise)
    with pytest.raises(ValueError, match=r"answers without thoughts here \(num_thoughts=0\)"):
        evaluate_samples(model(), TASK, EXAMPLES, noise, num_thoughts=0)
    with pytest.raises(ValueError, match=r"answers without thoughts here \(stage 0\)"):
        evaluate_samples(model(num_thoughts=0), TASK, EXAMPLES, noise)
    with pytest.raises(ValueError, match=r"thought_dropout=0\.1 is not for pause"):
        evaluate_samples(model(slot=PAUSES, method="pause"), TASK, EXAMPLES, Sampling(2, thought_dropout=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"samples": 257}, "samples is 257; it must be at most 256"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"thought_noise": -1.0}, "thought_noise is -1.0; it must be at least 0"),
        ({"thought_noise": float("inf")}, "thought_noise is inf; it must be a finite number"),
        ({"thought_dropout": -0.5}, "thought_dropout is -0.5; it must be at least 0"),
        ({"thought_dropout": 1.0}, "thought_dropout is 1.0; it must be a probability below 1"),
        ({"reward": "r"}, "reward=r chooses among several answers: set samples"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 0.9}, "top_p=0.9 is for sampled words: set temperature"),
        ({"seed": -1, "temperature": 1.0}, "seed is -1; it must be at least 0"),
        ({"seed": 3, "samples": 4}, "seed=3 is for sampled answers"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(run="r", **settings)


def test_the_command_writes_every_answer_and_the_page_shows_the_curves(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluate(EvaluateConfig(run=str(trained))) == 0
    folder = trained / "evaluation"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["test.json", "test.predictions.jsonl"]
    assert run_evaluate(EvaluateConfig(run=str(trained), samples=4, temperature=0.8, thought_noise=0.5, limit=6)) == 0
    name = "test-samples-4-temperature-0.8-thought_noise-0.5-limit-6"
    assert {file: (folder / file).read_bytes() for file in before} == before, "other files"
    result = read_results(trained)[name]
    assert not result["default_settings"]
    assert (result["count"], result["sampling"]["samples"], result["step"]) == (6, 4, 6)
    assert [row["k"] for row in result["sampling"]["at_k"]] == [1, 2, 4]
    lines = (folder / f"{name}.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [len(row["answers"]) for row in rows] == [4] * 6
    assert sum(answer["correct"] for row in rows for answer in row["answers"]) == result["correct"]
    assert (
        sum(answer["new_tokens"] for row in rows for answer in row["answers"])
        == (result["sampling"]["total_new_tokens"])
    )
    assert result["seen"] == {"train": 0, "valid": 0}
    said = capsys.readouterr().out
    assert f"4 answers to each of 6 questions, {100 * result['accuracy']:.1f} % of them right" in said
    last = result["sampling"]["at_k"][-1]
    assert f"{100 * last['pass_at_k']:.1f} % ({100 * last['pass_interval'][0]:.1f} to" in said

    assert "warning: all" not in said
    assert run_evaluate(EvaluateConfig(run=str(trained), samples=4, limit=2)) == 0
    assert "warning: all 4 answers are the greedy one" in capsys.readouterr().out

    page = words(page_of(read_run(trained)))
    assert "Several answers to a question" in page
    assert "temperature 0.8, noise 0.5" in page
    assert f"{100 * last['maj_at_k']:.1f}" in page
    with pytest.raises(ValueError, match="or sampled answers"):
        comparable_runs([str(trained)], name)
