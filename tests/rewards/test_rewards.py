"""Labelled completions, their steps, reward models, and rewards of tokens and steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import build, byte_level_tokenizer, gradients, hybrid, shift_weights
from helpers.processes import killed_and_stopped, together
from helpers.runs import rows_of_kind, same_end, saved_as, small_run, trained
from hypothesis import given
from hypothesis import strategies as st

from coconut import LatentLM
from coconut.analysis.config import AnalyzeConfig
from coconut.analyze import run as analyze
from coconut.completions.completion import completion_from_ids, passes_and_length, question_of, shard_by_length
from coconut.completions.config import RolloutConfig
from coconut.completions.rollout_file import write_rows
from coconut.completions.rollouts import CorrectnessReward
from coconut.completions.scoring import SamplingDistribution, score_tokens
from coconut.config import AdamWConfig, DataConfig, DataFiles, EngineConfig, Precision, TaskName, TooLong, Unreadable
from coconut.data.examples import Example
from coconut.data.tokenization import encode_texts
from coconut.engine.base import StepResult
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.evaluation.metrics_at_k import best_at, pass_at
from coconut.methods import NOTHING, PAUSES, THOUGHTS, Curriculum, PromptFormat, Unit
from coconut.reward import compare
from coconut.rewards.aggregation import (
    aggregate_steps,
    best_threshold,
    first_below,
    first_errors,
    weighted_vote,
)
from coconut.rewards.batches import AnswerSet, reward_batch, reward_loss
from coconut.rewards.compare import TrainedRewardModel, all_bounds, bounds, costs, selections
from coconut.rewards.config import CompareConfig, RewardModelConfig
from coconut.rewards.implicit import REFERENCE, ImplicitReward, reference_of, sum_by_part
from coconut.rewards.labelled_answers import LabelledAnswers, all_completions, read_answers
from coconut.rewards.losses import LOSSES, cross_entropy, dpo, kto, nca
from coconut.rewards.monte_carlo import continue_completions, step_labels
from coconut.rewards.step_spans import completion_parts, step_count, text_ends, token_parts
from coconut.rewards.trainer import RewardTrainer, run
from coconut.rewards.value_model import ValueModel
from coconut.rollout import run as roll
from coconut.runs.checkpoints import Checkpoints, load_state
from coconut.runs.description import read_metrics
from coconut.runs.loading import match_dtypes, starting_point
from coconut.tasks import TASKS
from coconut.tasks.chain import read_steps
from coconut.training.divergence import NonFiniteLossError
from coconut.training.trainer import run as run_training
from coconut.utils.files import read_json, sha256, write_json
from data_builders.pointers import PointersBuild
from data_builders.pointers import build as build_pointers

pytestmark = pytest.mark.slow

CPU = EngineConfig(device="cpu", threads=1)
TWO_PROCESS_LOSSES = ("ce", "dpo", "value")
LINES = PromptFormat()
WORDS = PromptFormat("{}", "{} ", "### {}")
Made = tuple[Path, DataConfig]  # a run, and the files of its answers

# --- steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form", "parts"),
    [
        ("a b\nc\n### 72", LINES, ["a b\n", "c\n", "### 72"]),
        ("a\n\n\nb\n### 1", LINES, ["a\n\n\n", "b\n", "### 1"]),
        ("### 72", LINES, ["### 72"]),
        ("a b\nc", LINES, ["a b\n", "c"]),
        ("a b\nc ### 5", LINES, ["a b\n", "c ", "### 5"]),
        ("b c ### c", WORDS, ["b ", "c ", "### c"]),
        ("### a\n#### 4\n### 5", LINES, ["### a\n", "#### 4\n", "### 5"]),
        ("a\nb", PromptFormat(answer="{}"), ["a\n", "b"]),
        ("", LINES, [""]),
        ("\n### 1\nand more\n", LINES, ["\n### 1\nand more\n"]),
    ],
)
def test_text_ends_of_each_form(text: str, form: PromptFormat, parts: list[str]) -> None:
    ends = text_ends(text, form)
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == parts


@given(st.text("ab \n#", max_size=30))
def test_text_ends_cover_the_whole_text(text: str) -> None:
    ends = text_ends(text, LINES)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(text)


def test_token_parts_assign_tokens_to_the_step_they_end_in() -> None:
    tokenizer = byte_level_tokenizer()
    text = "12 + 3 = 15\n15 * 2 = 30\n### 30"
    [ids] = encode_texts(tokenizer, [text])
    eos: Any = tokenizer.eos_token_id
    parts = token_parts(tokenizer, [*ids, eos], LINES, [eos])
    assert sorted(set(parts)) == [0, 1, 2]
    assert parts == sorted(parts)
    texts = [tokenizer.decode([t for t, p in zip(ids, parts, strict=False) if p == part]) for part in (0, 1, 2)]
    assert texts == ["12 + 3 = 15\n", "15 * 2 = 30\n", "### 30"]
    assert token_parts(tokenizer, [eos], LINES, [eos]) == [0]
    assert token_parts(tokenizer, [], LINES) == []


# --- losses -----------------------------------------------------------------------------------------


def test_losses_equal_their_formulas() -> None:
    torch.manual_seed(0)
    r, other = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    right = torch.tensor([1, 0, 1, 1, 0]).bool()
    sigma = torch.sigmoid
    torch.testing.assert_close(cross_entropy(r, right), -torch.where(right, sigma(r), sigma(-r)).log())
    torch.testing.assert_close(dpo(r, other), -sigma(r - other).log())
    torch.testing.assert_close(nca(r, other), -sigma(r).log() - 0.5 * (sigma(-r).log() + sigma(-other).log()))
    zero = torch.tensor(0.3, dtype=torch.float64)
    expected = torch.where(right, 1 - sigma(r - zero), 1 - sigma(zero - r))
    torch.testing.assert_close(kto(r, right, zero), expected)
    torch.testing.assert_close(kto(r, right, zero, 3.0), torch.where(right, 3 * expected, expected))
    far = torch.tensor([60.0, -60.0], requires_grad=True)
    cross_entropy(far, torch.tensor([0, 1])).sum().backward()
    assert far.grad is not None
    assert far.grad.tolist() == pytest.approx([1, -1]), "the gradient does not saturate where the prediction is wrong"


# --- scores -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A briefly trained chain-of-thought model, and labelled completions sampled from it."""
    sampler, _ = trained(tmp_path_factory.mktemp("sampler"))
    for split in ("train", "valid"):
        assert roll(RolloutConfig(run=str(sampler), split=split, samples=6, engine=CPU)) == 0
    return answers_beside(sampler)


def sampling_model(made: Made) -> LatentLM:
    return LatentLM.from_pretrained(starting_point(str(made[0]))).eval()


def rows_in(file: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def answers_beside(sampler: Path | str) -> Made:
    train, valid = (str(Path(sampler) / "rollouts" / f"{split}.jsonl") for split in ("train", "valid"))
    return Path(sampler), DataConfig(train=train, valid=valid)


def test_rollout_writes_reproducible_rows_with_ids(made: Made, tmp_path: Path) -> None:
    rows, lm = rows_in(made[1].train), sampling_model(made)
    assert len(rows) == 40
    for row in rows:
        assert len(row["completions"]) == 6
        for completion in row["completions"]:
            ids = completion["ids"][:-1] if completion["ids"][-1] == lm.special.eos else completion["ids"]
            assert lm.tokenizer.decode(ids) == completion["text"]
            assert completion["truncated"] == (completion["ids"][-1] != lm.special.eos)
    about = read_json(made[0] / "rollouts" / "train.json")
    assert (about["samples"], about["questions"], about["seed"]) == (6, 40, 0)
    assert not list((made[0] / "rollouts").glob(".*"))
    again = RolloutConfig(run=str(made[0]), samples=6, output=str(tmp_path / "again.jsonl"), engine=CPU, batch_size=7)
    assert roll(again) == 0
    assert [row["question"] for row in rows] == [row["question"] for row in rows_in(tmp_path / "again.jsonl")]


def test_step_rewards_add_up_to_the_completions_reward(made: Made) -> None:
    lm, reference = shift_weights(sampling_model(made), 0.05), sampling_model(made)
    labelled = read_answers(made[1].train, lm)[:10]
    samples = all_completions(labelled)
    reward = ImplicitReward(lm, reference, 0.05)
    tokens, steps = reward.tokens(samples), reward.steps(samples)
    for sample, by_token, by_step in zip(samples, tokens, steps, strict=True):
        assert len(by_token) == len(sample.completion_ids), "prompt tokens have no reward"
        assert float(by_step.sum()) == pytest.approx(float(by_token.sum()), abs=1e-6)
        parts = completion_parts(lm, sample.completion_ids)
        for part in range(max(parts) + 1):
            inside = [value for value, its in zip(by_token.tolist(), parts, strict=True) if its == part]
            assert float(by_step[part]) == pytest.approx(sum(inside), abs=1e-6)
    same = ImplicitReward(reference, reference, 0.05)
    assert all(not row.any() for row in same.tokens(samples[:5]))
    with pytest.raises(AssertionError):
        sum_by_part(torch.zeros(3), [0, 0])


# --- training ---------------------------------------------------------------------------------------


def settings(made: Made, folder: Path, **changes: Any) -> RewardModelConfig:
    values: dict[str, Any] = {
        "run": str(folder), "init": str(made[0]), "data": made[1], "engine": CPU, "batch_size": 16,
        "optimizer": AdamWConfig(lr=1e-3, max_grad_norm=1.0, warmup_steps=2), "micro_batch_size": 6, "epochs": 2,
        "beta": 0.5, "keep_checkpoints": 100,
    }  # fmt: skip
    return RewardModelConfig(**{**values, **changes})


@pytest.mark.parametrize("loss", list(LOSSES))
def test_reward_model_learns_to_separate_right_from_wrong(made: Made, tmp_path: Path, loss: str) -> None:
    """Validated on its training completions."""
    data = DataConfig(train=made[1].train, valid=made[1].train)
    assert run(settings(made, tmp_path / "run", loss=loss, data=data, epochs=12, optimizer=AdamWConfig(lr=5e-3))) == 0
    losses = [row["loss"] for row in rows_of_kind(tmp_path / "run", "train")]
    best = max(rows_of_kind(tmp_path / "run", "valid"), key=lambda row: row["pairs"])
    assert np.mean(losses[-5:]) < np.mean(losses[:2])
    assert best["pairs"] > 0.7
    assert best["best_of_n"] > best["mean"]
    assert best["reward_right"] > best["reward_wrong"]


def test_step_value_is_read_at_the_end_of_the_step(made: Made) -> None:
    lm = sampling_model(made)
    samples = all_completions(read_answers(made[1].valid, lm))[:12]
    for sample, values in zip(samples, ValueModel(lm).steps(samples), strict=True):
        parts = token_parts(lm.tokenizer, sample.completion_ids, lm.reasoning.format, [lm.special.eos, lm.special.pad])
        assert len(values) == parts[-1] + 1
        with torch.no_grad():
            logits = lm(torch.tensor([sample.layout.ids.tolist()]), return_logits=True).logits[0, :, lm.special.latent]
        for part, value in enumerate(values.tolist()):
            end = sample.layout.num_prompt + max(place for place, its in enumerate(parts) if its == part)
            last = min(end, len(sample.layout.ids) - 2)  # of the answer itself: before what ends it
            assert value == pytest.approx(float(logits[last].sigmoid()), abs=1e-5)


def test_killed_reward_training_resumes_exactly(made: Made, tmp_path: Path) -> None:
    """Killed at an update by SIGKILL, then stopped by SIGTERM, then run to its end."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(settings(made, whole, save_every=1)) == 0
    killed_and_stopped(alone, str(made[0]), str(folder), steps=lambda: Checkpoints(folder).steps(), first=3, then=8)
    assert run(settings(made, folder, save_every=1)) == 0
    same_end(folder, whole)


def test_a_validation_interrupted_by_a_signal_is_made_up_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the training, and at its very end."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    config = settings(made, folder, validate_every=8)
    assert run(replace(config, run=str(whole))) == 0
    steps = [row["step"] for row in rows_of_kind(whole, "valid")]
    for interrupted_at in (steps[1], steps[-1]):

        def interrupted(lm: LatentLM, completions: Any, size: int, score: Any, at: int = interrupted_at) -> Any:
            """Send a signal between the first batch and the second of the validation at this step."""
            validating = len(completions) == 12 * 6 and (read_metrics(folder) or [{"step": 0}])[-1]["step"] == at
            batches: list[int] = []

            def score_batch(batch: Any) -> torch.Tensor:
                batches.append(1)
                if validating and len(batches) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                return score(batch)

            return score_tokens(lm, completions, size, score_batch)

        monkeypatch.setattr("coconut.rewards.trainer.score_tokens", interrupted)
        assert run(config) == 128 + signal.SIGTERM
        checkpoints = Checkpoints(folder)
        assert checkpoints.steps()[-1] == interrupted_at
        assert load_state(checkpoints.path(interrupted_at))["pending"]
        assert read_metrics(folder)[-1]["kind"] == "train", "nothing of the validation is logged"
    monkeypatch.undo()
    assert run(config) == 0
    assert read_metrics(folder)[-1]["step"] == steps[-1]
    same_end(folder, whole)


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis(made: Made, tmp_path: Path) -> None:
    config = settings(made, tmp_path / "run", optimizer=AdamWConfig(lr=1e20), save_every=1)
    with pytest.raises(NonFiniteLossError, match=r"(?s)The loss of update \d+ is (nan|inf).*lower optimizer.lr"):
        run(config)
    found = read_json(tmp_path / "run" / "diverged.json")
    assert len(found["examples"]) == 16
    assert found["before"][-1]["step"] == found["step"] - 1 == Checkpoints(tmp_path / "run").steps()[-1]


def alone(sampler: str, folder: str) -> None:
    raise SystemExit(run(settings(answers_beside(sampler), Path(folder), save_every=1)))


def on_two(sampler: str, folder: str) -> None:
    made, engine = answers_beside(sampler), replace(CPU, timeout=120)
    with init_distributed(engine) as world:
        for loss in TWO_PROCESS_LOSSES:
            assert run(settings(made, Path(folder) / loss, engine=engine, loss=loss, epochs=1), world) == 0


def test_two_processes_equal_one_in_reward_training(made: Made, tmp_path: Path) -> None:
    together(on_two, str(made[0]), str(tmp_path / "two"))
    for loss in TWO_PROCESS_LOSSES:
        assert run(settings(made, tmp_path / "one" / loss, loss=loss, epochs=1)) == 0
        one, two = (read_metrics(tmp_path / number / loss) for number in ("one", "two"))
        for row, other in zip(one, two, strict=True):
            for key in ("loss", "grad_norm", "pairs", "reward_right"):
                assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("loss", ["ce", "kto", "dpo", "value"])
def test_reward_loss_does_not_depend_on_the_micro_batch(made: Made, tmp_path: Path, loss: str) -> None:
    found = []
    for size in (None, 6, 2):
        folder = tmp_path / str(size)
        assert run(settings(made, folder, loss=loss, micro_batch_size=size, epochs=1)) == 0
        found.append([rows_of_kind(folder, "train")[0][key] for key in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_answer_set_pairs_are_of_one_question() -> None:
    answers = AnswerSet([], np.array([1, 0, 0, 1, 1, 0], bool), np.array([0, 0, 0, 1, 1, 2]))
    for seed in range(5):
        pairs = answers.pairs(seed)
        assert pairs.shape == (1, 2), "question 1 has no wrong answer, question 2 no right one"
        assert pairs[0, 0] == 0
        assert pairs[0, 1] in (1, 2)
    found = answers.preference_metrics(np.array([0.5, 0.1, 0.9, 0.0, 0.2, 0.3]))
    assert found == {"pairs": 0.5, "best_of_n": pytest.approx(1 / 3), "mean": 0.5}


# --- the reference ----------------------------------------------------------------------------------


def new_trainer(config: RewardModelConfig) -> RewardTrainer:
    folder, files = Path(str(config.run)), {"train": config.data.train, "valid": config.data.valid}
    folder.mkdir()
    return RewardTrainer(config, folder, files, World())


@pytest.mark.parametrize("kind", ["float32", "in bfloat16", "saved in bfloat16", "lora"])
def test_untrained_reward_model_gives_zero_rewards(made: Made, tmp_path: Path, kind: str) -> None:
    """In training, and in a comparison."""
    init = saved_as(kind, starting_point(str(made[0])), tmp_path)
    engine = replace(CPU, precision=Precision("bfloat16" if kind == "in bfloat16" else "float32"))
    training = new_trainer(settings(made, tmp_path / "run", init=str(init), engine=engine))
    for split in ("train", "valid"):
        whole = training._score(training.lm, training.answers[split].completions)
        assert torch.equal(whole, training.reference[split])
    saved = tmp_path / "saved"
    training.lm.save_pretrained(saved)
    lm = LatentLM.from_pretrained(saved)
    beside = match_dtypes(LatentLM.from_pretrained(init), lm, torch.device("cpu"))
    rewards = ImplicitReward(lm, beside, 0.5).tokens(training.answers["valid"].completions[:8])
    assert all(not row.any() for row in rewards)


def test_reference_of_requires_the_weights_of_training(made: Made, tmp_path: Path) -> None:
    sampler = tmp_path / "sampler"
    shutil.copytree(made[0], sampler)
    assert run(settings(made, tmp_path / "run", init=str(sampler), epochs=1)) == 0
    reference = reference_of(tmp_path / "run")
    assert reference == starting_point(str(sampler)).resolve()
    assert reference_of(Checkpoints(tmp_path / "run").find("last")) == reference
    checkpoints = Checkpoints(sampler)
    later = checkpoints.path(checkpoints.steps()[-1] + 1)
    shutil.copytree(reference, later)
    state = {**load_state(later), "step": checkpoints.steps()[-1], "best": {"step": checkpoints.steps()[-1]}}
    write_json(later / "state.json", state)
    manifest = read_json(later / "manifest.json")
    entry = {"bytes": (later / "state.json").stat().st_size, "sha256": sha256(later / "state.json")}
    write_json(later / "manifest.json", {**manifest, "state.json": entry})
    assert starting_point(str(sampler)).resolve() != reference, "it was trained further, and another one is best"
    assert reference_of(tmp_path / "run") == reference
    saved = torch.load(tmp_path / "run" / REFERENCE)
    torch.save({split: saved[split] for split in ("train", "valid")}, tmp_path / "run" / REFERENCE)
    with pytest.raises(ValueError, match=r"has no digest of the weights .*Train it again"):
        reference_of(tmp_path / "run")
    torch.save(saved, tmp_path / "run" / REFERENCE)
    lm = LatentLM.from_pretrained(reference)
    shift_weights(lm, 0.1).save_pretrained(reference)
    with pytest.raises(ValueError, match=r"whose weights have changed since. Restore it"):
        reference_of(tmp_path / "run")
    shutil.rmtree(reference)
    with pytest.raises(ValueError, match=r"which is missing. Restore it"):
        reference_of(tmp_path / "run")


@pytest.mark.parametrize("loss", ["ce", "kto", "dpo", "value"])
def test_costs_count_the_tokens_of_a_training(made: Made, tmp_path: Path, loss: str) -> None:
    """FLOPs from the tokens forwarded; a backward pass counts twice a forward pass."""
    file = str(tmp_path / "train.jsonl")
    write_rows(file, rows_in(made[1].train)[:8])
    data = DataConfig(train=file, valid=file)
    tokens, of = [0.0], LatentLM.forward

    def counted(lm: LatentLM, input_ids: torch.Tensor, mask: torch.Tensor, **how: Any) -> Any:
        tokens[0] += int(mask.sum()) * (3 if torch.is_grad_enabled() else 1)
        return of(lm, input_ids, mask, **how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LatentLM, "forward", counted)
        training = new_trainer(settings(made, tmp_path / "run", loss=loss, data=data))
        tokens[0] /= 2  # what the reference says of validation answers, the same ones here, is not counted
        units = []
        for step in range(training.num_steps):
            training.step = step
            units.append(training.train_step()["items"])
    answers = training.answers["train"].completions
    trained = TrainedRewardModel(loss, 1.0, int(sum(units)), LOSSES[loss])
    labelled = read_answers(file, training.lm)
    [row] = costs([trained], labelled, 7, None, 1).rows
    paired = [answers[i] for i in training.training_items.flatten()]
    if loss == "dpo":  # the mean answer stands for those that are in pairs
        mean = sum(len(answer.layout.ids) for answer in answers) / len(answers)
        tokens[0] += 6 * sum(mean - len(answer.layout.ids) for answer in paired)
    assert row["flops"] == pytest.approx(2 * 7 * tokens[0], rel=1e-9)


def test_pair_takes_the_passes_of_either_completion(tmp_path: Path) -> None:
    lm = hybrid(dtype=torch.float32)
    lm.save_pretrained(tmp_path / "hybrid")
    long = {"text": "7 8 9 10 11 12 13 14", "correct": True, "mode": "short"}
    thinks = {"text": "7", "correct": False, "mode": "latent_2", "num_thoughts": 2}
    row = {"question": "3 4", "answer": "c", "steps": [], "completions": [long, thinks]}
    write_rows(tmp_path / "answers.jsonl", [row])
    data = DataConfig(train=str(tmp_path / "answers.jsonl"), valid=str(tmp_path / "answers.jsonl"))
    made = tmp_path / "hybrid", data
    training = new_trainer(settings(made, tmp_path / "run", loss="dpo", data=data))
    passes: list[int] = []

    def update(micro_batches: Any, lr: float) -> StepResult:
        passes.extend(part.passes for part in micro_batches)
        return StepResult(0.0, 0.0, (0.0,), (1,))

    training.engine.update = update
    training.train_step()
    assert passes == [3], "two thoughts are three passes, of the shorter answer"
    first, second = training.answers["train"].completions
    assert len(first.layout.ids) > len(second.layout.ids)
    assert shard_by_length([passes_and_length([first, second])], 1, rank=1, ranks=2) == [([-1], 3)]


# --- answers that are too long ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_scoring_refuses_completions_longer_than_the_context(kind: str) -> None:
    lm = build(kind, torch.float32, slot=NOTHING, markers=False)
    samples = [completion_from_ids(lm, [5, 6], [7] * count, text="") for count in (3, 94, 95)]
    assert len(SamplingDistribution.of(lm.special).score(lm, samples[:2], 2)[1]) == 94
    with pytest.raises(ValueError, match=r"1 of 3 completions are.*context of 96 tokens: completion 3 \(97 tokens\)"):
        SamplingDistribution.of(lm.special).score(lm, samples, 2)
    with pytest.raises(ValueError, match="1 of 3 completions are"):
        ValueModel(lm).before(samples)


def test_read_answers_names_or_skips_completions_longer_than_the_context(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_in(made[1].train)[:4]
    completion = rows[2]["completions"][1]
    completion["ids"] = [completion["ids"][0]] * 90
    write_rows(tmp_path / "long.jsonl", rows)
    lm = sampling_model(made)
    message = r"1 of 24 completions are.*completion 2 of question 3 \(\d+ tokens\). Leave them out with data.too_long"
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "long.jsonl", lm)
    config = settings(made, tmp_path / "run", data=replace(made[1], train=str(tmp_path / "long.jsonl")))
    with pytest.raises(ValueError, match=message):
        run(config)
    config.data.too_long = TooLong.skip
    assert len(new_trainer(config).answers["train"].completions) == 23
    assert "Left out 1 of 24 completions" in capsys.readouterr().out
    whole = read_answers(tmp_path / "long.jsonl", lm, skip=True, whole_questions=True)
    assert [len(row.completions) for row in whole] == [6, 6, 6]
    assert rows[2]["question"] not in {row.example.question for row in whole}


def test_rollout_names_or_skips_questions_without_room(made: Made, tmp_path: Path) -> None:
    file = Path(made[1].train).parents[2] / "train.json"
    rows = read_json(file)[:3]
    rows[1]["question"] = " ".join([rows[1]["question"]] * 8)
    write_json(tmp_path / "long.json", rows)
    config = RolloutConfig(run=str(made[0]), data=DataFiles(train=str(tmp_path / "long.json")), samples=2, engine=CPU,
                           output=str(tmp_path / "out.jsonl"))  # fmt: skip
    with pytest.raises(ValueError, match=r"1 of 3 questions leave no room.*question 2 \(\d+ tokens\).*too_long=skip"):
        roll(config)
    config.too_long = TooLong.skip
    assert roll(config) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


# --- selection --------------------------------------------------------------------------------------


def test_best_of_n_is_the_expectation_over_all_draws() -> None:
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(3, 6)), 0)  # with ties
    right = (rng.random((3, 6)) < 0.5).astype(float)
    for size in range(1, 7):
        expected, some = np.zeros(3), np.zeros(3)
        for q in range(3):
            for chosen in combinations(range(6), size):
                top = max(scores[q, i] for i in chosen)
                expected[q] += np.mean([right[q, i] for i in chosen if scores[q, i] == top]) / comb(6, size)
                some[q] += any(right[q, i] for i in chosen) / comb(6, size)
        assert pass_at(right, size) == pytest.approx(some)
        assert best_at(scores, right, size) == pytest.approx(expected)
    distinct = rng.permutation(18).reshape(3, 6).astype(float)
    for size in (1, 3, 6):
        draws = list(combinations(range(6), size))
        by_hand = [np.mean([right[q, max(draw, key=distinct[q].__getitem__)] for draw in draws]) for q in range(3)]
        assert best_at(distinct, right, size) == pytest.approx(by_hand)
    assert best_at(np.zeros((3, 6)), right, 4) == pytest.approx(right.mean(1)), "where all are equal, chance decides"


def vote_by_hand(answers: list[str | None], weights: Any, right: Any, size: int) -> float:
    """The mean over all draws of the mean over the answers with the largest sum of weights."""
    accuracies = []
    for chosen in combinations(range(len(answers)), size):
        voting = [i for i in chosen if answers[i] is not None]
        counted = not any(weights[i] for i in voting)
        sums: dict[str | None, float] = {}
        for i in voting:
            sums[answers[i]] = sums.get(answers[i], 0.0) + (1.0 if counted else weights[i])
        top = [answer for answer, value in sums.items() if abs(value - max(sums.values())) < 1e-9]
        accuracies.append(np.mean([right[answers.index(answer)] for answer in top]) if top else 0.0)
    return float(np.mean(accuracies))


def test_weighted_vote_is_the_expectation_over_all_draws() -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        answers = [None if n == 4 else "abcd"[n] for n in rng.integers(5, size=11)]
        right = np.array([float(answer in ("a", "c")) for answer in answers])
        for size in (1, 2, 4, 6, 9, 11):
            for weights in (np.ones(11), np.full(11, 0.3), np.zeros(11)):
                [exact] = weighted_vote([answers], weights[None], right[None], size)
                assert exact == pytest.approx(vote_by_hand(answers, weights, right, size), abs=1e-12)
        weights = np.round(rng.random(11), 1)  # with ties, and votes that weigh nothing
        for size in (1, 10, 11):
            [exact] = weighted_vote([answers], weights[None], right[None], size)
            assert exact == pytest.approx(vote_by_hand(answers, weights, right, size), abs=1e-12)
        draws = [weighted_vote([answers], weights[None], right[None], 5, seed)[0] for seed in range(8)]
        assert np.mean(draws) == pytest.approx(vote_by_hand(answers, weights, right, 5), abs=0.08)
    assert weighted_vote([[None] * 4], np.ones((1, 4)), np.zeros((1, 4)), 4).tolist() == [0.0]


def test_majority_vote_of_many_samples_is_exact() -> None:
    answers = [["a"] * 24 + ["b"] * 24 + ["c"] * 15 + [None]]
    right = np.array([[1.0] * 24 + [0.0] * 40])
    shared = [weighted_vote(answers, np.ones((1, 64)), right, size)[0] for size in (8, 16, 64)]
    other = np.array([[0.0] * 24 + [1.0] * 24 + [0.0] * 16])
    assert shared[:2] == pytest.approx([weighted_vote(answers, np.ones((1, 64)), other, size)[0] for size in (8, 16)])
    assert shared[2] == 0.5, "a tie does not depend on the order"
    assert shared[0] < shared[1] < 0.5


def test_selections_pool_votes_of_equal_answers() -> None:
    texts = ["### $18", "### 7", "### 18.00", "### 7", "### 18"]
    lm = build("gpt2", torch.float32)
    samples = tuple(completion_from_ids(lm, [3], [5, 1], text=text) for text in texts)
    row = LabelledAnswers(Example("?", (), "18"), samples, tuple(text != "### 7" for text in texts))
    study = selections([row], [], CorrectnessReward(TASKS["gsm8k"], PromptFormat()), [5])
    assert [row["accuracy"] for row in study.rows if row["scorer"] == "majority"] == [1.0]


def test_first_errors_and_aggregation_of_steps() -> None:
    rewards = [[0.5, -0.2, 0.1], [0.3, 0.4], [0.1, 0.2, -0.9]]
    assert first_below(rewards, 0.0) == [1, None, 2]
    true = [1, None, 1]
    found = first_errors(first_below(rewards, 0.0), true)
    assert (found["of_wrong"], found["of_right"]) == (0.5, 1.0)
    assert found["f1"] == pytest.approx(2 / 3)
    assert first_below(rewards, best_threshold(rewards, [1, None, 2])) == [1, None, 2]
    assert aggregate_steps(rewards, "min").tolist() == [-0.2, 0.3, -0.9]
    assert aggregate_steps(rewards, "last").tolist() == [0.1, 0.4, -0.9]
    assert aggregate_steps(rewards, "sum").tolist() == pytest.approx([0.4, 0.7, -0.6])


def test_a_pad_token_that_was_sampled_is_a_word(made: Made) -> None:
    """Its name stands in the text, so the steps of the tokens are those of the text."""
    lm = sampling_model(made)
    first, second = encode_texts(lm.tokenizer, ["0 1"])[0]
    ids = [first, lm.special.pad, second, lm.special.eos]
    text = str(lm.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False))
    assert set(completion_parts(lm, ids)) == set(range(step_count(text, lm.reasoning.format)))


def test_step_labels_share_rollouts(made: Made) -> None:
    lm = sampling_model(made)
    labelled = read_answers(made[1].train, lm)[:6]
    judge = CorrectnessReward(TASKS["prosqa"], lm.reasoning.format)
    found = step_labels(lm, judge, labelled, rollouts=4, seed=1)
    again = step_labels(lm, judge, labelled, rollouts=4, seed=1, batch_size=5)
    assert len(found.shares) == 6 * 6
    assert again == found
    texts = [sample.text for row in labelled for sample in row.completions]
    for text, shares in zip(texts, found.shares, strict=True):
        steps = read_steps(text, WORDS)
        assert len(shares) in (len(steps), len(steps) - 1), "an answer that was cut ends in a step"
        assert all(share * 4 == int(share * 4) for share in shares)
    assert found.num_rollouts < found.tokens < found.num_rollouts * 9 + 100 * found.num_rollouts


# --- comparison -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pointer-chasing model that is sometimes right, its completions, and three briefly trained reward models."""
    folder = tmp_path_factory.mktemp("pointers")
    build_pointers(PointersBuild(out_dir=str(folder), nodes=5, hops_to=2, num_train=60, num_valid=8, num_test=8))
    train, valid, test = (str(folder / f"pointers_{split}.json") for split in ("train", "valid", "test"))
    data = DataConfig(TaskName.pointers, train, valid, test, format=WORDS)
    curriculum = Curriculum(length_unit=Unit.updates, total_length=80)
    assert run_training(small_run(folder / "run", data, method="cot", curriculum=curriculum, max_new_tokens=8)) == 0
    for split in ("train", "valid", "test"):
        assert roll(RolloutConfig(run=str(folder / "run"), split=split, samples=8, engine=CPU)) == 0
    for loss in ("ce", "dpo", "value"):
        assert run(settings(answers_beside(folder / "run"), folder / "models" / loss, loss=loss)) == 0
    return folder / "run", folder / "models"


def test_reward_compare_writes_its_studies_and_page(
    models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, folder = models
    answers = str(sampler / "rollouts" / "test.jsonl")
    config = CompareConfig(runs=[f"{folder}/*"], answers=answers, rollouts=2, num_step_questions=4, engine=CPU)
    opened: list[Path] = []
    load = LatentLM.from_pretrained
    monkeypatch.setattr(
        LatentLM, "from_pretrained", lambda place, *how: opened.append(Path(place).resolve()) or load(place, *how)
    )
    assert compare(config) == 0
    assert opened.count(reference_of(folder / "ce")) == 1, "models of the same dtypes share one reference"
    output = capsys.readouterr().out
    assert "ce, sum" in output
    assert "rollouts" in output
    selection = read_json(folder / "selection.json")
    rows = {(row["scorer"], row["aggregation"], row["n"]): row for row in selection["rows"]}
    mean = selection["facts"]["mean"]
    for (scorer, aggregation, size), row in rows.items():
        if size == 1:
            assert row["accuracy"] == pytest.approx(mean, abs=0.06), "with one completion there is no choice"
        sampled = 0.06 if aggregation == "vote" else 1e-9
        assert row["accuracy"] <= rows["oracle", "any right", size]["accuracy"] + sampled, scorer
    errors = read_json(folder / "first_errors.json")
    assert [row["scorer"] for row in errors["rows"]] == ["ce", "dpo", "value", "rollouts"]
    assert errors["facts"]["answers"] == 32
    costs = {row["scorer"]: row for row in read_json(folder / "costs.json")["rows"]}
    assert set(costs) == {"ce", "dpo", "value", "rollouts"}
    assert costs["ce"]["flops"] == pytest.approx(costs["value"]["flops"] * 7 / 6), "two epochs, and the reference"
    assert min(row["seconds"] for row in costs.values()) > 0
    assert [row["scorer"] for row in read_json(folder / "bounds.json")["rows"]] == ["ce", "dpo"]
    page = (folder / "comparison.html").read_text(encoding="utf-8")
    for title in ("The first wrong step", "The cost of scoring steps", "Bounds on the value of a prefix"):
        assert title in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_prefix_value_is_the_soft_mean_of_its_continuations(models: tuple[Path, Path]) -> None:
    """q = beta log E exp(r / beta), over many continuations from the reference, from which the model is not far."""
    lm, reference = (LatentLM.from_pretrained(starting_point(str(models[0]))).eval() for _ in range(2))
    torch.manual_seed(0)
    shift_weights(lm, 0.03)
    labelled = read_answers(models[0] / "rollouts" / "test.jsonl", lm)
    found = bounds(ImplicitReward(lm, reference, 0.5), labelled, continuations=512, prefixes=12)
    apart = [abs(row["q"] - row["soft"]) for row in found.rows]
    assert np.median([abs(row["q"]) for row in found.rows]) > 0.03
    assert np.median(apart) < 0.01
    for row in found.rows:
        assert row["mean"] <= row["soft"] + 1e-6
        assert row["soft"] <= row["max"] + 1e-6
    [row] = all_bounds({"mine": found}).rows
    assert row["prefixes"] == 12
    assert min(row["mean_below"], row["below_max"]) > 0.9


@pytest.mark.parametrize("kind", ["thoughts", "pauses", "modes"])
def test_continued_prefix_keeps_one_slot(kind: str) -> None:
    slot = {"thoughts": THOUGHTS, "pauses": PAUSES, "modes": NOTHING}[kind]
    options: dict[str, Any] = {"dtype": torch.float32, "slot": slot, "num_thoughts": 2}
    lm, reference = (hybrid(dtype=torch.float32) if kind == "modes" else build("llama", **options) for _ in range(2))
    lm.reasoning = reference.reasoning = replace(lm.reasoning, max_new_tokens=3)
    torch.manual_seed(0)
    shift_weights(lm, 0.02)
    modes = ["latent_2", "think"] if kind == "modes" else ["", ""]
    samples = [completion_from_ids(lm, [5, 6, 7 + i], [8, 9, 10], text="", mode=mode) for i, mode in enumerate(modes)]
    labelled = [LabelledAnswers(Example("", (), ""), tuple(samples), (True, False))]
    found = bounds(ImplicitReward(lm, reference, 0.5), labelled, continuations=4096, prefixes=2)
    assert max(abs(row["q"]) for row in found.rows) > 0.02
    for row in found.rows:
        assert row["soft"] == pytest.approx(row["q"], abs=0.01)
    for sample in samples:
        prefix = sample.with_completion_ids(sample.completion_ids[:1])
        assert question_of(lm, prefix) == question_of(lm, sample) == sample.layout.ids[:3].tolist()
        [several] = continue_completions(reference, [prefix], 3)
        assert all(1 <= len(more) <= 3 for more in several)
        whole = prefix.with_completion_ids([*prefix.completion_ids, *several[0]])
        assert whole.layout.ids.tolist().count(lm.latent_id) == sample.layout.ids.tolist().count(lm.latent_id)
    ended = samples[0].with_completion_ids([8, lm.special.eos])
    assert continue_completions(reference, [ended], 2) == [[[], []]], "an ended completion has no continuation"


def test_reward_compare_refuses_uneven_files_and_missing_keys(models: tuple[Path, Path], tmp_path: Path) -> None:
    sampler, folder = models
    answers = sampler / "rollouts" / "test.jsonl"
    rows, uneven = rows_in(answers), str(tmp_path / "uneven.jsonl")
    rows[0]["completions"].pop()
    write_rows(uneven, rows)
    with pytest.raises(ValueError, match="Some questions have 7 completions and some 8"):
        compare(CompareConfig(runs=[f"{folder}/*"], answers=uneven, num_step_questions=2, engine=CPU))
    with pytest.raises(ValueError, match=r"is a reward model, which answers no questions.*coconut reward compare"):
        analyze(AnalyzeConfig(run=str(folder / "ce")))
    with pytest.raises(ValueError, match="Name the reward models"):
        CompareConfig(answers="a")
    with pytest.raises(ValueError, match="Name the file of labelled completions"):
        CompareConfig(runs=["a"])


# --- invalid input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["completions"][1].pop("correct"), "line 2: completion 2 has no label"),
        (lambda row: row["completions"][0].update(ids=[10**6]), "none of this model's .* tokens"),
        (lambda row: row["completions"][0].pop("text"), "completion 1 has no text"),
        (lambda row: row.update(completions=[]), "it has no completions"),
        (lambda row: row["completions"][1].update(mode="think"), "completion 2 has the mode 'think'.*it has no modes"),
        (lambda row: row.update(steps="a"), "steps is 'a'"),
        (lambda row: row.pop("question"), "it must be an object with question"),
        (lambda row: row["completions"][0].update(text="\ud800"), "line 2: holds half of a surrogate pair"),
    ],
)
def test_read_answers_names_malformed_lines(made: Made, tmp_path: Path, change: Any, message: str) -> None:
    rows = rows_in(made[1].train)[:3]
    change(rows[1])
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path / "bad.jsonl", sampling_model(made))


def test_pairwise_loss_requires_right_and_wrong_completions(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_in(made[1].train)
    for completion in [completion for row in rows for completion in row["completions"]]:
        completion["correct"] = True
    write_rows(tmp_path / "one.jsonl", rows)
    data = DataConfig(train=str(tmp_path / "one.jsonl"), valid=made[1].valid)
    with pytest.raises(ValueError, match="no question has both a right and a wrong answer, which loss=dpo compares"):
        run(settings(made, tmp_path / "run", loss="dpo", data=data))
    assert "to 40 of 40 questions all answers are right" in capsys.readouterr().out


def test_reward_configs_refuse_invalid_values(made: Made, tmp_path: Path) -> None:
    for changes, message in [
        ({"loss": "mse"}, r"There is no loss 'mse'. The losses are: ce, kto, dpo, nca"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"init": None}, "Name the model to start from"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"engine": EngineConfig(cuda_graphs=True)}, "a reward model is trained in eval mode"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings(made, tmp_path / "none", **changes)
    with pytest.raises(ValueError, match="temperature is 0"):
        RolloutConfig(run="x", temperature=0.0)


def test_rollout_names_or_skips_unreadable_gold_answers(made: Made, tmp_path: Path) -> None:
    rows = [{"question": "0 1 ?", "answer": 1}, {"question": "0 1 ?", "answer": "0 ### 1"}]
    write_json(tmp_path / "own.json", rows)
    files, output = DataFiles(train=str(tmp_path / "own.json")), tmp_path / "answers.jsonl"
    config = RolloutConfig(run=str(made[0]), data=files, output=str(output), samples=2, engine=CPU)
    with pytest.raises(ValueError, match="row 2, answer '0 ### 1': '1' is read"):
        roll(config)
    config.unreadable = Unreadable.skip
    assert roll(config) == 0
    assert [row["answer"] for row in rows_in(output)] == ["1"]


def test_read_answers_encodes_text_without_ids(made: Made, tmp_path: Path) -> None:
    rows, lm = rows_in(made[1].train)[:5], sampling_model(made)
    for row in rows:
        row["completions"] = [
            {key: completion[key] for key in ("text", "correct")} for completion in row["completions"]
        ]
    write_rows(tmp_path / "text.jsonl", rows)
    files = (made[1].train, tmp_path / "text.jsonl")
    pairs = zip(*(all_completions(read_answers(file, lm)[:5]) for file in files), strict=True)
    readable = [(a, b) for a, b in pairs if not a.truncated and lm.special.pad not in a.completion_ids]
    assert len(readable) > 10
    assert all(a.completion_ids == b.completion_ids for a, b in readable)


def test_reward_loss_reaches_every_completion_token() -> None:
    lm = build("llama", slot=NOTHING, markers=False)
    samples = [completion_from_ids(lm, [5, 6], [7, 8, 1], text=""), completion_from_ids(lm, [5, 6, 9], [8, 1], text="")]
    batch = reward_batch(samples, torch.zeros(2), torch.tensor([True, False]), lm.special, 1)
    policy = SamplingDistribution.of(lm.special)
    loss = reward_loss(LOSSES["ce"], policy, 0.5)(lm, batch)
    sums = torch.stack([row.sum() for row in policy.score(lm, samples, 2)]).double()
    expected = cross_entropy(0.5 * sums, torch.tensor([1.0, 0.0])).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    assert gradients(lm)
