"""Start the processes of a run on this machine with torch's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from coconut.config import EngineConfig, LaunchConfig
from coconut.engine.launcher_env import read_launcher_env
from coconut.engine.process_group import FAILURE_MARKER, init_distributed
from coconut.engine.world import World


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to save and exit, without those that this process ignores, as nohup does SIGHUP."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    available = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in available if signal.getsignal(number) is not signal.SIG_IGN]


def num_processes(launch: LaunchConfig, engine: EngineConfig) -> int:
    """The number of processes of a run: the launcher's if one started this process, else the configured number.

    Raises ValueError if there are fewer GPUs than processes, or if `num_processes` is null and there is no GPU.
    """
    if (launched := read_launcher_env().size) > 1:
        return launched
    gpus = torch.cuda.device_count() if engine.device in ("auto", "cuda") else 0
    count = gpus if launch.num_processes is None else launch.num_processes
    if not count:
        raise ValueError("There is no GPU, so launch.num_processes=null is undefined. Set it, for example to 2.")
    if gpus and count > gpus:
        raise ValueError(
            f"launch.num_processes is {count}, but this machine has {gpus} GPU{'s' * (gpus > 1)}. Lower it, or run on "
            "the CPU with engine.device=cpu."
        )
    return count


def run_workers(launch: LaunchConfig, engine: EngineConfig, module: str, arguments: list[str]) -> int | None:
    """Run `python -m MODULE ARGUMENTS` on the configured number of processes, and return the exit status.

    Returns None if this process is to do the work itself: it is the only one, or was started by a launcher. Raises
    ValueError as `num_processes` does.
    """
    count = num_processes(launch, engine)
    return None if count == 1 or read_launcher_env().size > 1 else _run(count, launch.grace, module, arguments)


def run_on_processes(launch: LaunchConfig, engine: EngineConfig, module: str, work: Callable[[World], int]) -> int:
    """Run `work` in this process of the world, or start workers with this command's arguments that do.

    Returns the exit status. Raises ValueError as `num_processes` does.
    """
    status = run_workers(launch, engine, module, sys.argv[1:])
    if status is not None:
        return status
    with init_distributed(engine) as world:
        return work(world)


def _run(count: int, grace: int, module: str, arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Elastic
    from torch.distributed.launcher.api import elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported below
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    signals = stop_signals()
    optional = {"signals_to_handle": ",".join(number.name for number in signals), "shutdown_timeout": grace}
    elastic = Elastic(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **{name: value for name, value in optional.items() if name in {field.name for field in fields(Elastic)}},
    )
    before = {number: signal.getsignal(number) for number in signals}
    folder = tempfile.TemporaryDirectory()
    os.environ[FAILURE_MARKER] = str(Path(folder.name) / "failed")
    try:
        elastic_launch(elastic, sys.executable)("-m", module, *arguments)
    except SignalException as stop:
        return 2 if Path(os.environ[FAILURE_MARKER]).exists() else 128 + stop.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = str(-failure.exitcode)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was killed by {name}; the others were stopped.", file=sys.stderr)
        return 128 - failure.exitcode
    finally:
        folder.cleanup()
        for number, handler in before.items():  # torch does not restore them
            signal.signal(number, handler)
    return 0
