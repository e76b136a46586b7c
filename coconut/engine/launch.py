"""Starting the processes of a run on this machine, with torch's elastic launcher."""

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
from coconut.engine.process_group import FAILED, init_distributed
from coconut.engine.world import World


def stopping_signals() -> list[signal.Signals]:
    """What asks a run to save and leave, but for what is ignored here, as nohup does with SIGHUP."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def num_processes(launch: LaunchConfig, engine: EngineConfig) -> int:
    """How many a run is on: those of the launcher that started this one, or those asked for.

    Raises ValueError if there are fewer GPUs than that, or if their number is left to GPUs and there are none.
    """
    if (there := read_launcher_env().size) > 1:
        return there
    gpus = torch.cuda.device_count() if engine.device in ("auto", "cuda") else 0
    count = gpus if launch.num_processes is None else launch.num_processes
    if not count:
        raise ValueError("There is no GPU to count processes by. Say how many: launch.num_processes=2.")
    if gpus and count > gpus:
        raise ValueError(
            f"launch.num_processes={count}, and this machine has {gpus} GPU{'s' * (gpus > 1)}. Lower it, or run on "
            "the CPU with engine.device=cpu."
        )
    return count


def started_workers(launch: LaunchConfig, engine: EngineConfig, module: str, arguments: list[str]) -> int | None:
    """Run `python -m MODULE ARGUMENTS` on as many processes as asked for, and give its exit status.

    None if this process is to do the work: it is the only one, or one that a launcher started. Raises
    ValueError as `processes` does.
    """
    count = num_processes(launch, engine)
    return None if count == 1 or read_launcher_env().size > 1 else _run(count, launch.grace, module, arguments)


def run_on_processes(launch: LaunchConfig, engine: EngineConfig, module: str, work: Callable[[World], int]) -> int:
    """The exit status of `work` in each process of the world, or of the workers that this command starts for it.

    Workers are given this command's own arguments. Raises ValueError as `processes` does.
    """
    status = started_workers(launch, engine, module, sys.argv[1:])
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
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it logs is said below, in words
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    passed_on = stopping_signals()
    newer = {"signals_to_handle": ",".join(number.name for number in passed_on), "shutdown_timeout": grace}
    elastic = Elastic(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **{name: value for name, value in newer.items() if name in {field.name for field in fields(Elastic)}},
    )
    before = {number: signal.getsignal(number) for number in passed_on}
    place = tempfile.TemporaryDirectory()
    os.environ[FAILED] = str(Path(place.name) / "failed")
    try:
        elastic_launch(elastic, sys.executable)("-m", module, *arguments)
    except SignalException as asked:
        return 2 if Path(os.environ[FAILED]).exists() else 128 + asked.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = str(-failure.exitcode)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was ended by {name}; the others were stopped.", file=sys.stderr)
        return 128 - failure.exitcode
    finally:
        place.cleanup()
        for number, handler in before.items():  # torch leaves its own
            signal.signal(number, handler)
    return 0
