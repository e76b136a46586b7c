"""Launch scripts for several processes or machines, and sweeps."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.processes import CLEAN, free_port
from helpers.runs import SMALL, graph_files
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from coconut.config import TrainConfig
from coconut.runs.checkpoints import Checkpoints
from coconut.runs.description import read_metrics
from coconut.utils.hydra_app import CONF_DIR

pytestmark = pytest.mark.slow

SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
ENVIRONMENT = {**CLEAN, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
MANY = 100_000  # updates; no test waits for so many


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], list[str]]:
    """A function (folder, total updates) that returns the arguments of a small quickstart."""
    data = graph_files(tmp_path_factory.mktemp("data"), 24, 6, 6)

    def keys(folder: Path, total: int) -> list[str]:
        return [
            "experiment=quickstart", f"run={folder}", f"data.train={data.train}", f"data.valid={data.valid}",
            "curriculum.stage0_length=1", "curriculum.stage_length=1", f"curriculum.total_length={total}",
            f"validate_every={MANY}",
            "batch_size=8", "max_new_tokens=4", "engine.device=cpu", "engine.threads=1", "engine.timeout=120",
            *SMALL,
        ]  # fmt: skip

    return keys


@contextmanager
def started(*command: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**ENVIRONMENT, **environment},
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def is_in_last_stage(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and any(row.get("stage") == 3 for row in read_metrics(folder))


def terminated_in_last_stage(process: subprocess.Popen[str], run: Path) -> str:
    assert wait_until(lambda: is_in_last_stage(run) or process.poll() is not None, 120)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=60)[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("torchrun.sh", ["experiment=quickstart"], "'experiment=quickstart' came"),
        ("deepspeed.sh", [], "'' came"),
        ("torchrun_nodes.sh", ["2"], "NODES (how many machines) and MEET"),
    ],
)
def test_launch_scripts_name_missing_arguments(script: str, arguments: list[str], message: str) -> None:
    with started("bash", f"launch/{script}", *arguments) as done:
        printed, _ = done.communicate(timeout=60)
    assert done.returncode == 2
    assert printed.startswith("error: ")
    assert message in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick=true"], "'quick=true' is not known here. Usage: "),
        (["data=a"], "data=a has no train.jsonl"),
    ],
)
def test_pretrained_names_wrong_arguments(arguments: list[str], message: str) -> None:
    done = subprocess.run(["bash", ROOT / "launch/pretrained.sh", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_fetched_weights_are_verified(tmp_path: Path) -> None:
    file = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"weights")
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(b'weights').hexdigest()}  {file.name}\n")
    command = [sys.executable, ROOT / "launch/smollm2.py", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(file)), done.stderr
    file.write_bytes(b"weighty")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert f"{file} is not the file with SHA-256" in done.stderr
    (tmp_path / "SHA256SUMS").unlink()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, file.read_bytes()) == (1, b"weighty")
    assert f"{tmp_path} holds files without SHA256SUMS" in done.stderr


def test_torchrun_workers_save_on_sigterm(keys: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("bash", "launch/torchrun.sh", 2, *keys(run, MANY)) as launcher:
        printed = terminated_in_last_stage(launcher, run)
    assert "100,000 updates on 2 processes" in printed
    assert "Stopped by SIGTERM; saved at update" in printed, printed
    assert Checkpoints(run).steps()[-1] == max(row["step"] for row in read_metrics(run))


def test_torchrun_on_two_nodes(keys: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    """With DeepSpeed, which must let each process end with status 0."""
    run = tmp_path / "run"
    meet = {"NODES": "2", "MEET": f"localhost:{free_port()}"}
    with ExitStack() as held:
        command = ("bash", "launch/torchrun_nodes.sh", 1, *keys(run, 6), "engine=deepspeed")
        nodes = [held.enter_context(started(*command, **meet)) for _ in range(2)]
        printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "6 updates on 2 processes" in "".join(printed)
    assert Checkpoints(run).newest_valid() == Checkpoints(run).path(6)


def test_sweep_with_a_failed_job_exits_with_an_error(keys: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    with started(
        sys.executable, "-m", "coconut.train", "--multirun", "hydra/launcher=submitit_local",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", *keys(tmp_path / "run-${batch_size}", 6), "batch_size=0,8",
    ) as sweep:  # fmt: skip
        printed, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 2, printed
    assert "error: batch_size is 0" in printed
    assert Checkpoints(tmp_path / "run-8").newest_valid() == Checkpoints(tmp_path / "run-8").path(6)
    assert not (tmp_path / "run-0").exists()


def test_sigterm_stops_the_whole_sweep(keys: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    with started(
        sys.executable, "-m", "coconut.train", "--multirun", f"hydra.sweep.dir={tmp_path / 'sweep'}",
        *keys(tmp_path / "run-${seed}", MANY), "seed=0,1",
    ) as sweep:  # fmt: skip
        printed = terminated_in_last_stage(sweep, tmp_path / "run-0")
    assert sweep.returncode == 143, printed
    assert "Stopped by SIGTERM; saved at update" in printed
    assert not (tmp_path / "run-1").exists()


def test_sweep_logs_its_runs_and_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    for launcher, where in [("basic", "here"), ("submitit_local", "all at once"), ("slurm", "each a SLURM job")]:
        keys = ["experiment=quickstart", "method=cot,icot", "seed=0,1", f"hydra/launcher={launcher}"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra
            config = hydra.compose_config("train", keys, run_mode=RunMode.MULTIRUN, with_log_configuration=False)
        Callbacks(config).on_multirun_start(config=config, config_name="train")
        output = capsys.readouterr().out
        assert output.startswith(f"A sweep of 4 runs, {where}")
        assert "  2: method=icot seed=0\n" in output
        assert ("runs/.sweep/.submitit/JOB, in *_log.out" in output) == (launcher != "basic")


def test_slurm_sweeps_compose() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    overrides = ["hydra/launcher=slurm", "hydra.launcher.tasks_per_node=4"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        launcher = compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.gres == "gpu:4"
    assert launcher.max_num_timeout > 0


def slurm(*command: str) -> str:
    slurm_environment = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **slurm_environment}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def no_slurm() -> bool:
    if not shutil.which("sbatch"):
        return True
    return subprocess.run(["sinfo"], capture_output=True, env=os.environ).returncode != 0


@pytest.mark.skipif(no_slurm(), reason="needs SLURM: sbatch is not found, or no cluster answers")
def test_slurm_requeues_a_stopped_job(keys: Callable[[Path, int], list[str]], tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = slurm("sbatch", "--parsable", "--gres=none", "--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1",
                "--time=5", f"--output={log}", "launch/slurm.sbatch", *keys(run, MANY))  # fmt: skip

    def state() -> str:
        return slurm("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")

    try:
        if not wait_until(lambda: state() != "PENDING", 60):
            pytest.skip("the cluster is busy")
        assert wait_until(lambda: is_in_last_stage(run) or state() != "RUNNING", 120)
        slurm("scancel", "--signal=USR1", job)
        assert wait_until(lambda: state() == "PENDING", 60), log.read_text()
    finally:
        slurm("scancel", job)
    printed = log.read_text()
    assert "100,000 updates on 2 processes" in printed
    assert "Stopped by SIGUSR1; saved at update" in printed
    assert "goes back into the queue" in printed
