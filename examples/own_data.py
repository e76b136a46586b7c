"""Your own data: write rows to a file, train a small new model on them, ask it.

    python examples/own_data.py

Three rows, learned by heart: this shows the way. A model that is to learn something needs many more, and others to be
asked. The same from the command line:

    coconut train model=tiny data=own data.task=gsm8k data.train=FILE data.valid=FILE run=runs/own

Fine-tuning a pretrained model differs in one argument: model=ModelConfig(base="openai-community/gpt2").
"""

import json
import sys
import tempfile
from pathlib import Path

from coconut import answer
from coconut.config import DataConfig, EngineConfig, ModelConfig, OptimizerConfig, TaskName, TrainConfig
from coconut.methods import Curriculum, Unit
from coconut.runs.loading import load_run
from coconut.training.trainer import run

ROWS = [
    {"question": "Ann has 3 apples and buys 4 more. She eats 2. How many are left?",
     "steps": ["3 + 4 = 7", "7 - 2 = 5"], "answer": "5"},
    {"question": "Ben has 9 pens and gives 6 away. He finds 1. How many has he now?",
     "steps": ["9 - 6 = 3", "3 + 1 = 4"], "answer": "4"},
    {"question": "Eva reads 2 pages an hour for 4 hours. The book has 9. How many are left?",
     "steps": ["2 * 4 = 8", "9 - 8 = 1"], "answer": "1"},
]  # fmt: skip


def configuration(folder: Path, file: Path) -> TrainConfig:
    """Coconut in three stages: both steps written, one thought for the first, two thoughts for both."""
    return TrainConfig(
        run=str(folder / "run"),
        # gsm8k compares numbers
        data=DataConfig(TaskName.gsm8k, train=str(file), valid=str(file), cache_dir=str(folder)),
        model=ModelConfig(
            architecture={
                "model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 128, "max_position_embeddings": 64,
            },
            tokenizer="words", new_token_init="random",
        ),
        curriculum=Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=40, stage_length=40,
                              total_length=120),
        optimizer=OptimizerConfig(lr=3e-3), engine=EngineConfig(device="cpu"),
        batch_size=len(ROWS), validate_every=40,
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        config = configuration(folder, file)
        if status := run(config):
            sys.exit(status)
        lm = load_run(folder / "run", "best", config.engine).lm
        answered = answer(lm, [row["question"] for row in ROWS])
        for row, text, thoughts in zip(ROWS, answered.texts, answered.num_thoughts.tolist(), strict=True):
            print(f"{row['question']}  {thoughts} thoughts, then: {text.strip()}  (right: {row['answer']})")


if __name__ == "__main__":
    main()
