"""Small data sets and runs."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from safetensors.torch import load_file

from coconut import LatentLM
from coconut.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, OptimizerConfig, TaskName, TrainConfig
from coconut.engine.world import World
from coconut.methods import Curriculum, PromptFormat, Unit
from coconut.rl.config import RLConfig
from coconut.rl.trainer import PolicyTrainer
from coconut.runs.checkpoints import Checkpoints, load_state, load_trainer
from coconut.runs.description import read_metrics
from coconut.training.trainer import run as run_training
from coconut.utils.files import read_json, write_json
from coconut.utils.hydra_app import CONF_DIR, to_dataclass
from data_builders.prosqa import Form, Preset, ProsqaBuild, draw_row
from helpers import ROOT
from helpers.models import shift_weights
from helpers.processes import CLEAN, alive, children

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = [f"model.architecture.{name}={value}" for name, value in SIZE.items()]


def graph_rows(seed: int, count: int, nodes: int = 8, form: Form = Form.symbols) -> list[dict[str, Any]]:
    """Small graphs with questions."""
    dials = ProsqaBuild(preset=Preset.graphs, nodes=nodes).graph_dials()
    drawn = (draw_row(random.Random(f"{seed} {i}"), lambda key: True, dials, form) for i in range(count))
    return [found[0] for found in drawn if found]


def graph_files(folder: Path, train: int, valid: int, test: int) -> DataConfig:
    """Files of so many graphs in a folder."""
    rows = iter(graph_rows(seed=0, count=train + valid + test))
    files: dict[str, Any] = {}
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        write_json(folder / f"{split}.json", list(islice(rows, count)))
        files[split] = str(folder / f"{split}.json")
    return DataConfig(TaskName.prosqa, **files, format=PromptFormat("{}", "{} ", "### {}"))


def rewrite(file: Path, /, **changes: Any) -> dict[str, Any]:
    """Change values of a JSON file. Gives what it held before."""
    before = read_json(file)
    write_json(file, {**before, **changes})
    return before


def small_run(folder: Path, data: DataConfig, **changes: Any) -> TrainConfig:
    """A run of seconds, of three stages."""
    architecture = {"model_type": "gpt_neox", **SIZE, "max_position_embeddings": 96}
    values: dict[str, Any] = {
        "run": str(folder),
        "curriculum": Curriculum(
            max_stage=2, length_unit=Unit.updates, stage0_length=2, stage_length=2, total_length=6
        ),
        "model": ModelConfig(architecture=architecture, tokenizer="words", new_token_init="random"),
        "data": data,
        "optimizer": OptimizerConfig(lr=1e-2),
        "engine": EngineConfig(device="cpu", threads=1),
        "batch_size": 16,
        "max_new_tokens": 6,
    }
    return TrainConfig(**{**values, **changes})


def trained(folder: Path, **changes: Any) -> tuple[Path, DataConfig]:
    """A model that is trained for 60 updates, by default to write chains of thought, and its data."""
    data = graph_files(folder, 40, 12, 8)
    settings = {"method": "cot", "curriculum": Curriculum(length_unit=Unit.updates, total_length=60), **changes}
    assert run_training(small_run(folder / "run", data, max_new_tokens=8, **settings)) == 0
    return folder / "run", data


def saved_as(kind: str, init: Path, folder: Path) -> Path:
    """A model as it is, "saved in bfloat16", or in bfloat16 with a "lora" adapter that is not zero."""
    if not kind.startswith(("saved", "lora")):
        return init
    lm = LatentLM.from_pretrained(init).to(torch.bfloat16)
    lm.save_pretrained(folder / "whole")
    if kind.startswith("saved"):
        return folder / "whole"
    lm = LatentLM.from_pretrained(folder / "whole")
    lm.add_lora(LoraConfig(rank=2), str(folder / "whole"))
    shift_weights(lm, 0.05).save_pretrained(folder / "adapter")
    return folder / "adapter"


def data_beside(run: str) -> DataConfig:
    """The data of a `trained` model."""
    files: dict[str, Any] = {split: str(Path(run).parent / f"{split}.json") for split in ("train", "valid", "test")}
    return DataConfig(TaskName.prosqa, **files, format=PromptFormat("{}", "{} ", "### {}"))


def new_policy_trainer(config: RLConfig, world: World | None = None) -> PolicyTrainer:
    folder, files = Path(str(config.run)), {"train": config.data.train, "valid": config.data.valid}
    folder.mkdir(exist_ok=True)
    return PolicyTrainer(config, folder, files, world or World())


def rows_of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a kind, train or valid."""
    return [row for row in read_metrics(run) if row["kind"] == kind]


def drop_later(run: Path, step: int) -> None:
    """Remove the checkpoints after a step."""
    for later in Checkpoints(run).steps():
        if later > step:
            shutil.rmtree(Checkpoints(run).path(later))


def copy_until(step: int, run: Path, folder: Path) -> Path:
    """Copy a run as it was after a step."""
    drop_later(shutil.copytree(run, folder), step)
    return folder


def _weights_of(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All of them: the model's, its projector's, and those that only training needs."""
    files = checkpoint.rglob("*.safetensors")
    return {(str(file.relative_to(checkpoint)), key): value for file in files for key, value in load_file(file).items()}


def same_end(folder: Path, other: Path) -> None:
    """Bit for bit: weights (of LoRA too), optimizer, random states, best so far, every number in metrics.jsonl."""
    ends = [Checkpoints(run).newest_valid() for run in (folder, other)]
    assert ends[0]
    assert ends[1]
    assert ends[0].name == ends[1].name
    ours, theirs = (_weights_of(end) for end in ends if end)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    a, b = (load_trainer(end) for end in ends if end)
    for mine, its in zip(a["random"], b["random"], strict=True):
        assert torch.equal(mine["cpu"], its["cpu"])
    for index, state in b["optimizer"]["state"].items():
        assert all(torch.equal(value, a["optimizer"]["state"][index][key]) for key, value in state.items())
    assert load_state(ends[0]) == load_state(ends[1])
    rows, its_rows = (
        [{key: value for key, value in row.items() if key not in ("seconds", "memory")} for row in read_metrics(run)]
        for run in (folder, other)
    )
    assert rows == its_rows


def composed(name: str, schema: type, overrides: list[str]) -> Any:
    """The configuration of a command with these overrides."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_dataclass(compose(name, overrides), schema)


def keys(folder: Path, data: DataConfig) -> list[str]:
    """Of a run of 16 updates with dropout, saved after each."""
    return [
        "experiment=quickstart", f"data.train={data.train}", f"data.valid={data.valid}", f"run={folder}",
        *SMALL, "+model.architecture.hidden_dropout=0.1", "+model.architecture.attention_dropout=0.1",
        "curriculum.stage0_length=6", "curriculum.stage_length=5", "curriculum.max_stage=2",
        "curriculum.total_length=16",
        "optimizer.warmup_steps=2", "batch_size=8", "micro_batch_size=3", "save_every=1", "keep_checkpoints=100",
        "engine.device=cpu", "engine.threads=1",
    ]  # fmt: skip


class Launched:
    """`coconut.train` on two processes that it starts itself."""

    def __init__(self, folder: Path, data: DataConfig, *more: str):
        self.folder = folder
        self.log = folder.with_suffix(".log")
        given = [*keys(folder, data), "launch=local", "launch.num_processes=2", *more]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "coconut.train", *given], cwd=ROOT, stdout=log, stderr=log,
                env={**CLEAN, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def workers(self) -> list[int]:
        return children(self.process.pid)

    def reaches(self, update: int) -> None:
        end = time.monotonic() + 90
        while not any(step >= update for step in Checkpoints(self.folder).steps()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def ends(self) -> int:
        workers = self.workers()
        status = self.process.wait(timeout=120)
        assert not any(alive(pid) for pid in workers), "a worker was left behind"
        return status


def score(run: Path, name: str, right: list[int]) -> None:
    """Let exactly these answers of an evaluation be right."""
    file = run / "evaluation" / f"{name}.predictions.jsonl"
    rows = [json.loads(line) | {"correct": i in right} for i, line in enumerate(file.read_text().splitlines())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run / "evaluation" / f"{name}.json"
    write_json(result, {**read_json(result), "correct": len(right), "accuracy": len(right) / len(rows)})
