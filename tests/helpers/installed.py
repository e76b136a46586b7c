"""Use the installed package as its users do: from another folder, by its commands."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from coconut.data.examples import read_examples

ROWS = ["preset=graphs", "num_train=28", "num_valid=12", "num_test=8"]
SMALL = [
    "model.architecture.num_hidden_layers=1", "model.architecture.hidden_size=16",
    "model.architecture.num_attention_heads=2", "model.architecture.intermediate_size=32",
    "curriculum.stage0_length=2", "curriculum.stage_length=1", "curriculum.max_stage=2", "curriculum.total_length=5",
    "batch_size=8",
]  # fmt: skip


def done(*command: str | Path, cwd: Path, env: Mapping[str, str]) -> str:
    """What a command prints. Raises AssertionError with it if the command fails, or warns."""
    print(f"$ {' '.join(str(part) for part in command)}", flush=True)
    ended = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failed = ended.returncode or "Warning" in ended.stdout or "Traceback" in ended.stdout
    assert not failed, f"{command}\n{ended.stdout}\nexit status {ended.returncode}"
    return ended.stdout


def use(coconut: Path, folder: Path, env: Mapping[str, str]) -> Path:
    """Make data, train for five updates, evaluate and generate with an installed command. Returns the run's folder."""
    assert "coconut COMMAND --help" in done(coconut, "--help", cwd=folder, env=env)
    done(coconut, "data", "prosqa", *ROWS, cwd=folder, env=env)
    done(coconut, "train", "experiment=quickstart", "run=run", "data.prefix=data/prosqa", *SMALL, cwd=folder, env=env)
    assert "accuracy" in done(coconut, "evaluate", "run=run", cwd=folder, env=env)
    question = read_examples(str(folder / "data" / "prosqa_test.json"))[0].question
    done(coconut, "generate", "run=run", f"question={question}", cwd=folder, env=env)
    run = folder / "run"
    assert any((run / "checkpoints" / "step-0000005").iterdir())
    assert any((run / "evaluation").iterdir())
    return run
