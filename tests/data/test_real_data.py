"""The published data sets, from their released files to a trained and evaluated run.

The excerpts under tests/data are real; the model is a small GPT-2. The tokenizer is byte-level, trained here, and also
GPT-2's own if it is available in shared/.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import DATA, SHARED
from helpers.models import byte_level_tokenizer
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from coconut.completions.config import RolloutConfig
from coconut.config import AdamWConfig, DataConfig, EngineConfig, TrainConfig
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.reward import compare
from coconut.rewards.config import CompareConfig, RewardModelConfig
from coconut.rewards.trainer import run as run_reward
from coconut.rollout import run as roll
from coconut.runs.description import read_metrics, read_results
from coconut.training.trainer import run
from coconut.utils.hydra_app import CONF_DIR

RELEASED = {
    "prosqa": ("prosqa", "prosqa_released.json"),
    "prontoqa": ("prontoqa", "prontoqa_generated.json"),
    "gsm8k": ("gsm8k", "gsm8k_test.jsonl"),
    "gsm8k_aug": ("gsm8k", "gsm8k_aug_valid.txt"),
}
GPT2 = SHARED / "gpt2_tokenizer"
TOKENIZERS = ["trained here", *(["GPT-2's"] if GPT2.is_dir() else [])]
ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def convert(task: str, file: str, folder: Path) -> Path:
    """The builder's output for a released file."""
    builder = importlib.import_module(f"data_builders.{task}")
    path = folder / f"{task}.json"
    path.write_text(json.dumps(builder.released_rows(str(DATA / file))))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", RELEASED)
def test_released_data_trains_and_evaluates(name: str, tokenizer: str, tmp_path: Path) -> None:
    task, file = RELEASED[name]
    data = convert(task, file, tmp_path)
    if tokenizer == "trained here":
        byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "tokenizer" if tokenizer == "trained here" else GPT2
    stages = 5 if task == "gsm8k" else 7
    overrides = [
        f"experiment={task}_gpt2", "model=gpt2_new", f"model.tokenizer={folder}", "+model.architecture.n_layer=1",
        "+model.architecture.n_embd=16", "+model.architecture.n_head=2", "+model.architecture.n_positions=2048",
        f"data.train={data}", f"data.valid={data}", f"run={tmp_path / 'run'}", "engine.device=cpu",
        "curriculum.length_unit=updates", "curriculum.stage0_length=1", "curriculum.stage_length=1",
        f"curriculum.total_length={stages}",
        "max_new_tokens=3", "batch_size=4", "keep_checkpoints=1",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("train", overrides))
    assert run(config) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["stage"] for row in rows] == list(range(stages))
    assert run_evaluate(EvaluateConfig(run=str(tmp_path / "run"), split="valid", max_new_tokens=2)) == 0
    result = next(iter(read_results(tmp_path / "run").values()))
    assert result["num_thoughts"] == 6
    assert result["chance_accuracy"] == (None if task == "gsm8k" else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_aug"])
def test_step_rewards_of_real_solutions(name: str, tmp_path: Path) -> None:
    """Answers of a model, and given ones: for each question its own solution, and that of another question."""
    task, file = RELEASED[name]
    data = convert(task, file, tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    overrides = [
        "experiment=gsm8k_gpt2", "method=cot", "model=gpt2_new", f"model.tokenizer={tmp_path / 'tokenizer'}",
        "+model.architecture.n_layer=1", "+model.architecture.n_embd=16", "+model.architecture.n_head=2",
        "+model.architecture.n_positions=2048", f"data.train={data}", f"data.valid={data}", f"data.test={data}",
        f"run={tmp_path / 'run'}", "engine.device=cpu", "curriculum.length_unit=updates", "curriculum.total_length=1",
        "max_new_tokens=3", "batch_size=4", "keep_checkpoints=1",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("train", overrides))
    assert run(config) == 0
    cpu = EngineConfig(device="cpu", threads=1)
    assert roll(RolloutConfig(run=config.run, split="test", samples=2, limit=4, max_new_tokens=6, engine=cpu)) == 0
    rows = json.loads(data.read_text())[:6]
    texts = ["\n".join([*row["steps"], f"### {row['answer']}"]) for row in rows]
    answers = tmp_path / "answers.jsonl"
    lines = [
        {**row, "completions": [{"text": texts[n], "correct": True}, {"text": texts[n - 1], "correct": False}]}
        for n, row in enumerate(rows)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for loss in ("ce", "dpo", "value"):
        settings = RewardModelConfig(
            run=str(tmp_path / "models" / loss), init=config.run, loss=loss, batch_size=4, engine=cpu,
            data=DataConfig(train=str(answers), valid=str(answers)), optimizer=AdamWConfig(lr=1e-3),
        )  # fmt: skip
        assert run_reward(settings) == 0
    sampled = tmp_path / "run" / "rollouts" / "test.jsonl"
    for file_of_answers in (answers, sampled):
        assert compare(CompareConfig(runs=[f"{tmp_path}/models/*"], answers=str(file_of_answers), engine=cpu)) == 0
        assert "selection" in {path.stem for path in (tmp_path / "models").iterdir()}
