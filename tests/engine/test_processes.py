"""A run on several processes: it means the same, goes on exactly, and ends as a whole."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import together
from helpers.runs import Launched, graph_files, keys, same_end, small_run
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from coconut.config import (
    DataConfig,
    EngineConfig,
    EngineKind,
    LaunchConfig,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
)
from coconut.engine.base import choose_device
from coconut.engine.launch import started_workers
from coconut.engine.launcher_env import RankInfo, read_launcher_env
from coconut.engine.process_group import init_distributed
from coconut.evaluate import run as evaluate_alone
from coconut.evaluate import run_rank as evaluate_on_rank
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Curriculum, Unit
from coconut.runs.checkpoints import Checkpoints
from coconut.runs.description import read_metrics
from coconut.training.trainer import run, run_rank
from coconut.utils.hydra_app import CONF_DIR, to_dataclass

ENGINE = EngineConfig(device="cpu", threads=1, timeout=120)
ZERO_3 = replace(ENGINE, kind=EngineKind.deepspeed, zero_stage=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 25, 11, 7)


def settings(folder: Path, data: DataConfig, engine: EngineConfig = ENGINE, **changes: Any) -> TrainConfig:
    """A run of 10 updates, 4 in an epoch, the last of them with one row; mixing is on."""
    values: dict[str, Any] = {
        "curriculum": Curriculum(
            max_stage=2,
            length_unit=Unit.updates,
            stage0_length=3,
            stage_length=3,
            total_length=10,
            mixing_probability=0.3,
        ),
        "engine": engine,
        "optimizer": OptimizerConfig(lr=1e-2, max_grad_norm=1.0),
        "batch_size": 8,
        "micro_batch_size": 3,
        "save_every": 1,
        "keep_checkpoints": 100,
    }
    return small_run(folder, data, **values | changes)


def numbers(folder: Path) -> list[list[float]]:
    """What a run's metrics tell of the model, not of the machine."""
    names = ("step", "stage", "loss", "grad_norm", "lr", "targets", "tokens", "accuracy", "new_tokens", "thought_norm")
    return [[row[name] for name in names if row.get(name) is not None] for row in read_metrics(folder)]


def forget_after(folder: Path, step: int) -> None:
    for later in Checkpoints(folder).steps():
        if later > step:
            shutil.rmtree(Checkpoints(folder).path(later))


def corrected(where: Path, name: str, data: DataConfig, engine: EngineConfig) -> TrainConfig:
    """LoRA on what the run of one process made."""
    plain = settings(where / name, data, engine, init=str(where / "one"))
    return replace(plain, model=replace(plain.model, lora=LoraConfig(rank=2)))


def runs_of_two(folder: str, files: dict[str, str]) -> None:
    """What the fixture `made` has done by each of two processes."""
    data = graph_data(files)
    where = Path(folder)
    with init_distributed(ENGINE) as world:
        for name, engine in {"ddp": ENGINE, "zero": ZERO_3, "ddp_from_one": ENGINE, "zero_from_one": ZERO_3}.items():
            assert run_rank(settings(where / name, data, engine), world) == 0
        sparing = replace(ZERO_3, activation_checkpointing=True)
        assert run_rank(corrected(where, "zero_lora", data, sparing), world) == 0
        assert run_rank(composed(keys(where / "whole", data)), world) == 0
        assert evaluate_on_rank(EvaluateConfig(str(where / "one"), engine=ENGINE, batch_size=2), world) == 0


def composed(given: list[str]) -> TrainConfig:
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_dataclass(compose("train", given), TrainConfig)


def graph_data(files: dict[str, Any]) -> DataConfig:
    from coconut.config import Task
    from coconut.methods import PromptFormat

    return DataConfig(Task.prosqa, **files, format=PromptFormat("{}", "{} ", "### {}"))


@pytest.fixture(scope="module")
def made(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: by one process; by two, from the start and from update 5 of the one; by one, from update 5 of two."""
    folder = tmp_path_factory.mktemp("runs")
    assert run(settings(folder / "one", data)) == 0
    assert run(corrected(folder, "one_lora", data, ENGINE)) == 0
    for name in ("ddp_from_one", "zero_from_one"):
        shutil.copytree(folder / "one", folder / name)
        forget_after(folder / name, 5)
    assert evaluate_alone(EvaluateConfig(str(folder / "one"), engine=ENGINE, batch_size=2)) == 0
    shutil.move(folder / "one" / "evaluation", folder / "evaluation")
    together(runs_of_two, str(folder), {split: getattr(data, split) for split in ("train", "valid", "test")})
    shutil.copytree(folder / "zero", folder / "one_from_zero")
    forget_after(folder / "one_from_zero", 5)
    assert run(settings(folder / "one_from_zero", data)) == 0
    return folder


@pytest.mark.parametrize("name", ["ddp", "zero", "ddp_from_one", "zero_from_one", "one_from_zero", "zero_lora"])
def test_two_processes_train_as_one_does(made: Path, name: str) -> None:
    ours, theirs = numbers(made / name), numbers(made / ("one_lora" if name == "zero_lora" else "one"))
    assert len(ours) == len(theirs) == 10 + 3
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_two_processes_evaluate_as_one_does(made: Path) -> None:
    ours, theirs = (
        (folder / "test.predictions.jsonl").read_text() for folder in (made / "one" / "evaluation", made / "evaluation")
    )
    assert len(ours.splitlines()) == 7
    assert ours == theirs


# --- going on, and ending -------------------------------------------------------------------------


def test_what_was_stopped_killed_and_hung_ends_as_if_it_had_not_been(
    made: Path, data: DataConfig, tmp_path: Path
) -> None:
    asked = Launched(tmp_path / "broken", data)
    asked.reaches(4)
    asked.process.send_signal(signal.SIGUSR1)
    assert asked.ends() == 128 + signal.SIGUSR1
    assert "Stopped by SIGUSR1; saved at update" in asked.log.read_text()

    killed = Launched(tmp_path / "broken", data)
    killed.reaches(8)
    os.kill(killed.workers()[1], signal.SIGKILL)
    assert killed.ends() == 128 + signal.SIGKILL
    assert "was ended by SIGKILL; the others were stopped" in killed.log.read_text()

    hung = Launched(tmp_path / "broken", data, "engine.timeout=4")
    hung.reaches(12)
    os.kill(hung.workers()[1], signal.SIGSTOP)
    began = time.monotonic()
    assert hung.ends() in (3, 128 + signal.SIGKILL)
    assert time.monotonic() - began < 30
    assert "gave no sign of life for engine.timeout=4 s. The run ends" in hung.log.read_text()

    last = Launched(tmp_path / "broken", data)
    assert last.ends() == 0, last.log.read_text()
    same_end(tmp_path / "broken", made / "whole")


# --- who is who -----------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "n1", "MASTER_PORT": "7"}  # fmt: skip
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "81234", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "n[1-4]",
        "MASTER_ADDR": "n1"}  # fmt: skip


def test_launchers_tell_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, expected in [
        ({}, RankInfo()),
        (TORCHRUN, RankInfo(3, 4, 1, 2, "n1", 7)),
        (SRUN, RankInfo(5, 7, 1, 2, "n1", 29234)),
        ({**SRUN, "MASTER_PORT": "9"}, RankInfo(5, 7, 1, 2, "n1", 9)),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, RankInfo()),  # sbatch's own script
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, RankInfo()),
        ({**SRUN, **TORCHRUN}, RankInfo(3, 4, 1, 2, "n1", 7)),
    ]:
        with monkeypatch.context() as here:
            for name, value in told.items():
                here.setenv(name, value)
            assert read_launcher_env() == expected


def test_without_scontrol_a_lone_process_is_told_how_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**SRUN, "MASTER_ADDR": "", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"scontrol .* 'n\[1-4\]' .*MASTER_ADDR.* env -u SLURM_STEP_ID COMMAND"):
        read_launcher_env()


def test_half_a_launcher_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="not MASTER_ADDR and MASTER_PORT"):
        read_launcher_env()


def test_waiting_for_processes_that_never_come_says_how_to_be_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a shell of `srun -n4 --pty`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {**SRUN, "SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # which joining sets, to be taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr("coconut.engine.process_group.SECONDS_BEFORE_A_WORD", 0.2)
    hint = r"SLURM_STEP_ID=0 in the environment .* one of 7.* srun --pty, start it with: env -u SLURM_STEP_ID COMMAND"
    with (
        pytest.raises(ValueError, match=f"did not meet the 6 others at .*{hint}"),
        init_distributed(replace(ENGINE, timeout=1)),
    ):
        pass
    assert re.search(f"^Waiting for 6 more processes at 127.0.0.1:{port}. {hint}$", capsys.readouterr().out, re.M)


def test_a_batch_that_processes_cannot_share_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 is not divisible by 3 processes.* such as 6 or 9"):
        run(settings(tmp_path / "run", data, launch=LaunchConfig(3)))
    assert not (tmp_path / "run").exists()


def test_processes_without_a_gpu_are_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there are GPUs here")
    with pytest.raises(ValueError, match="no GPU to count processes by"):
        started_workers(LaunchConfig(None), EngineConfig(), "coconut.train", [])
    with pytest.raises(ValueError, match=r"engine.device=cuda cannot be used here"):
        choose_device("cuda", 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_stage": 2}, "engine.zero_stage=2 needs DeepSpeed. Add engine=deepspeed"),
        ({"kind": EngineKind.deepspeed, "zero_stage": 4}, "it is 0, 1, 2 or 3"),
        ({"kind": EngineKind.deepspeed, "offload_optimizer": True}, "needs the optimizer sharded"),
        ({"kind": EngineKind.deepspeed, "zero_stage": 2, "offload_parameters": True}, "Set engine.zero_stage=3"),
    ],
)
def test_what_zero_cannot_do_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)
