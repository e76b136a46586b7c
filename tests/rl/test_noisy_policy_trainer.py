"""The trainer of policies with noisy thoughts: what it logs, that it goes on exactly, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import copy_until, graph_files, new_policy_trainer, rows_of_kind, same_end, small_run

from coconut.completions.completion import Completion
from coconut.completions.noisy_thoughts import dispersion
from coconut.completions.rollouts import Cost
from coconut.config import AdamWConfig, DataConfig, EngineConfig
from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.methods import Curriculum, Unit
from coconut.rewards.implicit import ImplicitReward
from coconut.rewards.thoughts import thought_rewards, token_rewards
from coconut.rl.config import ObjectiveConfig, ProcessRewardConfig, RewardConfig, RLConfig
from coconut.rl.report import report
from coconut.rl.trainer import run
from coconut.runs.record import read_run
from coconut.training.trainer import run as run_training

pytestmark = pytest.mark.slow

CPU = EngineConfig(device="cpu", threads=1)
SIGMA = 0.2
Made = tuple[Path, DataConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A briefly trained model with thoughts, and its data."""
    folder = tmp_path_factory.mktemp("warm")
    data = graph_files(folder, 16, 4, 4)
    curriculum = Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=2, stage_length=2, total_length=10)
    assert run_training(small_run(folder / "run", data, method="coconut", curriculum=curriculum)) == 0
    return folder / "run", data


def settings(made: Made, folder: Path, **changes: Any) -> RLConfig:
    warm, data = made
    values: dict[str, Any] = {
        "run": str(folder), "init": str(warm), "data": data, "objective": ObjectiveConfig("grpo", kl_coef=0.01),
        "reward": RewardConfig(), "engine": CPU, "num_steps": 3, "prompts_per_step": 4, "group_size": 4,
        "optimizer": AdamWConfig(lr=3e-3, max_grad_norm=1.0), "validate_every": 3, "keep_checkpoints": 100,
        "max_new_tokens": 4, "thought_noise": SIGMA,
    }  # fmt: skip
    return RLConfig(**{**values, **changes})


def reward_first_word(example: Example, text: str, mode: str, cost: Cost, /) -> float:
    return float(text.strip()[:1].isdigit())


def several_updates(made: Made, folder: Path) -> RLConfig:
    return settings(made, folder, save_every=1, num_minibatches=2, num_iterations=2, micro_batch_size=3)


@pytest.fixture(scope="module")
def finished(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(several_updates(made, folder), reward_first_word) == 0
    return folder


def test_run_with_noisy_thoughts_logs_and_reports_them(finished: Path) -> None:
    rows = rows_of_kind(finished, "train")
    for row in rows:
        assert 0 <= row["thought_clipped"] <= 1
        assert 0 <= row["word_clipped"] <= 1
        assert row["thought_norm"] > 0
        assert row["thought_dispersion"] > 0
        assert np.isfinite([row["kl"], row["thought_log_ratio"], row["word_log_ratio"]]).all()
    assert any(row["thought_log_ratio"] != 0 for row in rows)
    page = report(read_run(finished))
    assert f"drawn with noise {SIGMA:g}, and trained like words" in page
    assert f"Noise of the thoughts: {SIGMA:g} on a dispersion of {rows[0]['thought_dispersion']:.3g}" in page
    assert "Clipping takes the gradient of" in page


def test_resumed_run_with_noisy_thoughts_equals_uninterrupted(finished: Path, made: Made, tmp_path: Path) -> None:
    copy_until(1, finished, tmp_path / "run")
    assert run(several_updates(made, tmp_path / "run"), reward_first_word) == 0
    same_end(tmp_path / "run", finished)


def test_first_update_is_on_policy_and_without_divergence(made: Made, tmp_path: Path) -> None:
    training = new_policy_trainer(settings(made, tmp_path / "run", micro_batch_size=5))
    training.dry_run()
    groups = training.sample(0)
    noisy = [sample.noisy for group in groups for sample in group.completions]
    assert all(thoughts and len(thoughts.fed) == training.lm.reasoning.num_thoughts for thoughts in noisy)
    row = training.completion_statistics(groups)
    means_NKD = torch.stack([thoughts.means for thoughts in noisy if thoughts])
    assert row["thought_norm"] == pytest.approx(float(means_NKD.norm(dim=-1).mean()))
    assert row["thought_dispersion"] == pytest.approx(dispersion(means_NKD))
    row = training.learn(groups)
    assert row["kl"] == 0.0
    assert "thought_clipped" not in row, "all ratios are 1"
    assert training.learn(groups)["kl"] > 0


def test_budget_counts_thoughts(made: Made, tmp_path: Path) -> None:
    thoughts = new_policy_trainer(settings(made, tmp_path / "a"))
    words = new_policy_trainer(settings(made, tmp_path / "b", thought_noise=0.0))
    assert (words.budget, thoughts.budget) == (4, 4 + thoughts.lm.reasoning.num_thoughts)
    assert not any(sample.noisy for group in words.sample(0) for sample in group.completions)


def test_process_rewards_of_noisy_thoughts_are_the_exact_ones(made: Made, tmp_path: Path) -> None:
    """Against coconut.rewards.thoughts, which embeds thoughts by hand, after the reward model has learned."""
    rewarded = ProcessRewardConfig(weight=1.0, beta=0.5, optimizer=AdamWConfig(lr=1e-2))
    objective = ObjectiveConfig("dr_grpo", kl_coef=0.0)
    training = new_policy_trainer(settings(made, tmp_path / "run", process_reward=rewarded, objective=objective))
    training.dry_run()
    model = training.process_reward
    assert model
    assert model.engine
    training.learn(training.sample(0))
    groups = training.sample(1)
    lm, reference = model.lm, model.reference
    reward = ImplicitReward(lm, reference, 0.5)
    for told in model.rewards(groups):
        samples: list[Completion] = list(told.group.completions)
        questions = encode_questions(lm.tokenizer, [told.group.example.question], lm.reasoning.format) * len(samples)
        thoughts = torch.stack([sample.noisy.fed for sample in samples if sample.noisy])
        of_thoughts = thought_rewards(reward, questions, thoughts, SIGMA)
        of_words = token_rewards(reward, questions, thoughts, [sample.completion_ids for sample in samples])
        assert of_thoughts.abs().min() > 1e-3
        for row, thought_row, word_row in zip(told.tokens, of_thoughts, of_words, strict=True):
            torch.testing.assert_close(row, torch.cat([thought_row, word_row]), rtol=1e-3, atol=1e-3)
    row = training.learn(groups)
    assert np.isfinite([row["loss"], row["grad_norm"], row["process_reward_loss"]]).all()


def test_noise_that_does_not_fit_is_refused(made: Made, tmp_path: Path) -> None:
    for noise in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"thought_noise is {noise}"):
            settings(made, tmp_path / "none", thought_noise=noise)
    curriculum = Curriculum(length_unit=Unit.updates, total_length=2)
    assert run_training(small_run(tmp_path / "words", made[1], method="cot", curriculum=curriculum)) == 0
    with pytest.raises(ValueError, match=r"thought_noise=0.2 is not for cot: it has no latent thoughts to draw"):
        run(settings((tmp_path / "words", made[1]), tmp_path / "none"))
    assert not (tmp_path / "none").exists()
