"""Runs on several processes: equal results, exact resume, and the end of all if one fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import on_processes, together
from helpers.runs import Launched, composed, copy_until, data_beside, graph_files, keys, same_end, small_run

from coconut.config import DataConfig, EngineConfig, EngineKind, LaunchConfig, LoraConfig, OptimizerConfig, TrainConfig
from coconut.engine.base import choose_device
from coconut.engine.launch import run_workers
from coconut.engine.launcher_env import RankInfo, read_launcher_env
from coconut.engine.process_group import init_distributed
from coconut.engine.world import EXIT_LOST
from coconut.evaluate import run as evaluate_run
from coconut.evaluate import run_rank as evaluate_on_rank
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Curriculum, Unit
from coconut.runs.checkpoints import Checkpoints
from coconut.runs.description import read_metrics
from coconut.training.trainer import run

pytestmark = pytest.mark.slow

ENGINE = EngineConfig(device="cpu", threads=1, timeout=120)
ZERO_3 = replace(ENGINE, kind=EngineKind.deepspeed, zero_stage=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 25, 11, 7)


def settings(folder: Path, data: DataConfig, engine: EngineConfig = ENGINE, **changes: Any) -> TrainConfig:
    """A run of 10 updates, 4 in an epoch, the last of them with one row; mixing is on."""
    values: dict[str, Any] = {
        "curriculum": Curriculum(
            max_stage=2, length_unit=Unit.updates, stage0_length=3, stage_length=3, total_length=10,
            mixing_probability=0.3,
        ),
        "engine": engine, "optimizer": OptimizerConfig(lr=1e-2, max_grad_norm=1.0), "batch_size": 8,
        "micro_batch_size": 3, "save_every": 1, "keep_checkpoints": 100,
    }  # fmt: skip
    return small_run(folder, data, **values | changes)


def numbers(folder: Path) -> list[list[float]]:
    """The metrics of a run that do not depend on the machine."""
    names = ("step", "stage", "loss", "grad_norm", "lr", "targets", "tokens", "accuracy", "new_tokens", "thought_norm",
             "thought_gradient_ratio")  # fmt: skip
    lists = ("thought_gradient", "thought_drift")
    return [
        [*(row[name] for name in names if row.get(name) is not None),
         *(value for name in lists for value in row.get(name) or ())] for row in read_metrics(folder)
    ]  # fmt: skip


def lora_run(root: Path, name: str, data: DataConfig, engine: EngineConfig) -> TrainConfig:
    """A LoRA run on the model of the single-process run."""
    plain = settings(root / name, data, engine, init=str(root / "one"))
    return replace(plain, model=replace(plain.model, lora=LoraConfig(rank=2)))


def runs_of_two(folder: str, train: str) -> None:
    """The runs of the fixture `finished_runs` that use two processes."""
    data, root = data_beside(train), Path(folder)
    with init_distributed(ENGINE) as world:
        for name, engine in {"ddp": ENGINE, "zero": ZERO_3, "ddp_from_one": ENGINE, "zero_from_one": ZERO_3}.items():
            assert run(settings(root / name, data, engine), world) == 0
        sparing = replace(ZERO_3, activation_checkpointing=True)
        assert run(lora_run(root, "zero_lora", data, sparing), world) == 0
        assert run(settings(root / "zero_colar", data, sparing, method="colar"), world) == 0
        assert run(composed("train", TrainConfig, keys(root / "whole", data)), world) == 0
        assert evaluate_on_rank(EvaluateConfig(str(root / "one"), engine=ENGINE, batch_size=2), world) == 0


@pytest.fixture(scope="module")
def finished_runs(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by one process; by two, from the start and from update 5 of the first; and by one from update 5 of two."""
    folder = tmp_path_factory.mktemp("runs")
    assert run(settings(folder / "one", data)) == 0
    assert run(lora_run(folder, "one_lora", data, ENGINE)) == 0
    assert run(settings(folder / "one_colar", data, method="colar")) == 0
    for name in ("ddp_from_one", "zero_from_one"):
        copy_until(5, folder / "one", folder / name)
    assert evaluate_run(EvaluateConfig(str(folder / "one"), engine=ENGINE, batch_size=2)) == 0
    shutil.move(folder / "one" / "evaluation", folder / "evaluation")
    together(runs_of_two, str(folder), data.train)
    assert run(settings(copy_until(5, folder / "zero", folder / "one_from_zero"), data)) == 0
    return folder


@pytest.mark.parametrize(
    "name", ["ddp", "zero", "ddp_from_one", "zero_from_one", "one_from_zero", "zero_lora", "zero_colar"]
)
def test_two_processes_train_like_one(finished_runs: Path, name: str) -> None:
    alone = {"zero_lora": "one_lora", "zero_colar": "one_colar"}.get(name, "one")
    ours, theirs = numbers(finished_runs / name), numbers(finished_runs / alone)
    assert len(ours) == len(theirs) == 10 + 3
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_two_processes_evaluate_like_one(finished_runs: Path) -> None:
    folders = finished_runs / "one" / "evaluation", finished_runs / "evaluation"
    ours, theirs = ((folder / "test.predictions.jsonl").read_text() for folder in folders)
    assert len(ours.splitlines()) == 7
    assert ours == theirs


# --- resuming, and ending together -------------------------------------------------------------------------


def train_until_hung(folder: str, train: str) -> None:
    with init_distributed(replace(ENGINE, timeout=4)) as world:
        run(composed("train", TrainConfig, keys(Path(folder), data_beside(train))), world)


def test_interrupted_runs_end_like_uninterrupted_ones(finished_runs: Path, data: DataConfig, tmp_path: Path) -> None:
    stopped = Launched(tmp_path / "broken", data)
    stopped.reaches(4)
    stopped.process.send_signal(signal.SIGUSR1)
    assert stopped.ends() == 128 + signal.SIGUSR1
    assert "Stopped by SIGUSR1; saved at update" in stopped.log.read_text()

    killed = Launched(tmp_path / "broken", data)
    killed.reaches(8)
    os.kill(killed.workers()[1], signal.SIGKILL)
    assert killed.ends() == 128 + signal.SIGKILL
    assert "was killed by SIGKILL; the others were stopped" in killed.log.read_text()

    with on_processes(train_until_hung, str(tmp_path / "broken"), data.train) as (first, second):
        first.wait_until(lambda: Checkpoints(tmp_path / "broken").steps()[-1:] >= [12])
        second.send(signal.SIGSTOP)
        assert first.wait(30) == EXIT_LOST
        assert "did not respond for engine.timeout=4 s. The run ends" in first.printed

    last = Launched(tmp_path / "broken", data)
    assert last.ends() == 0, last.log.read_text()
    same_end(tmp_path / "broken", finished_runs / "whole")


# --- launchers -----------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "n1", "MASTER_PORT": "7"}  # fmt: skip
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "81234", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "n[1-4]",
        "MASTER_ADDR": "n1"}  # fmt: skip


def test_rank_info_is_read_from_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, expected in [
        ({}, RankInfo()),
        (TORCHRUN, RankInfo(3, 4, 1, 2, "n1", 7)),
        (SRUN, RankInfo(5, 7, 1, 2, "n1", 29234)),
        ({**SRUN, "MASTER_PORT": "9"}, RankInfo(5, 7, 1, 2, "n1", 9)),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, RankInfo()),  # sbatch's own script
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, RankInfo()),
        ({**SRUN, **TORCHRUN}, RankInfo(3, 4, 1, 2, "n1", 7)),
    ]:
        with monkeypatch.context() as context:
            for name, value in environment.items():
                context.setenv(name, value)
            assert read_launcher_env() == expected


def test_missing_scontrol_error_gives_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**SRUN, "MASTER_ADDR": "", "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"scontrol .* 'n\[1-4\]' .*MASTER_ADDR.* env -u SLURM_STEP_ID COMMAND"):
        read_launcher_env()


def test_incomplete_launcher_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="not MASTER_ADDR and MASTER_PORT"):
        read_launcher_env()


def test_missing_processes_error_gives_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The situation in a shell of `srun -n4 --pty`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {**SRUN, "SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # set when joining; monkeypatch removes them again
        monkeypatch.delenv(name)
    monkeypatch.setattr("coconut.engine.process_group.SECONDS_UNTIL_MESSAGE", 0.2)
    hint = r"The environment variable SLURM_STEP_ID=0 .* one of 7.* start it with: env -u SLURM_STEP_ID COMMAND"
    with (
        pytest.raises(ValueError, match=f"could not connect to the 6 others at .*{hint}"),
        init_distributed(replace(ENGINE, timeout=1)),
    ):
        pass
    assert re.search(f"^Waiting for 6 more processes at 127.0.0.1:{port}. {hint}$", capsys.readouterr().out, re.M)


def test_indivisible_batch_size_is_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 is not divisible by 3 processes.* such as 6 or 9"):
        run(settings(tmp_path / "run", data, launch=LaunchConfig(3)))
    assert not (tmp_path / "run").exists()


def test_missing_gpus_are_reported() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(ValueError, match=r"There is no GPU, so launch\.num_processes=null"):
        run_workers(LaunchConfig(None), EngineConfig(), "coconut.train", [])
    with pytest.raises(ValueError, match=r"engine.device=cuda cannot be used here"):
        choose_device("cuda", 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_stage": 2}, "engine.zero_stage=2 needs DeepSpeed. Add engine=deepspeed"),
        ({"kind": EngineKind.deepspeed, "zero_stage": 4}, "must be 0, 1, 2 or 3"),
        ({"kind": EngineKind.deepspeed, "offload_optimizer": True}, "needs a sharded optimizer"),
        ({"kind": EngineKind.deepspeed, "zero_stage": 2, "offload_parameters": True}, "Set engine.zero_stage=3"),
    ],
)
def test_unsupported_zero_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**values)
