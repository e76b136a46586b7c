"""Set up the process group of a run, and end all its processes if one fails."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from coconut.config import EngineConfig, EngineKind
from coconut.engine.launcher_env import RankInfo, read_launcher_env
from coconut.engine.watchdog import Watchdog
from coconut.engine.world import ENDING, EXIT_LOST, World
from coconut.utils.console import mute_log

FAILURE_MARKER = "COCONUT_FAILED"  # environment variable: a file that a failed worker of `launch=local` creates


CONNECTION_ERROR = re.compile(r"connection (closed|reset)|broken pipe|remote process|timed out", re.IGNORECASE)


SECONDS_UNTIL_MESSAGE = 5  # while waiting for the other processes


NO_TIMEOUT = timedelta(days=30)  # the watchdog detects hanging processes; collectives need no timeout


@contextlib.contextmanager
def init_distributed(config: EngineConfig) -> Iterator[World]:
    """Yield the World of the launcher's processes, or of this process alone.

    Inside this context only the main process logs, and an error that several processes have is raised in one of them;
    the others exit with status 2. If a process dies or makes no progress for `config.timeout` seconds, the watchdog
    reports it and ends all processes with status 3.
    """
    info = read_launcher_env()
    gpus = torch.cuda.is_available() and not config.device.startswith("cpu")
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed if it is installed
    if info.size == 1:
        with contextlib.closing(World()) as alone:
            yield alone
        return
    if config.device.startswith("cuda:"):
        raise ValueError(
            f"engine.device={config.device} is one GPU for {info.size} processes. Leave it out; each takes its own GPU."
        )
    os.environ |= {
        "RANK": str(info.rank), "WORLD_SIZE": str(info.size), "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_size), "MASTER_ADDR": info.host, "MASTER_PORT": str(info.port),
    }  # fmt: skip
    if config.kind is EngineKind.deepspeed and find_spec("deepspeed"):
        from coconut.engine.deepspeed_import import import_deepspeed

        import_deepspeed()  # before the group exists: its functions would keep the group as a default argument forever
    world = World(info)
    watchdog = Watchdog(world, _rendezvous(info, config.timeout, gpus), config.timeout)
    try:
        with mute_log() if world.rank else contextlib.nullcontext():
            dist.barrier()
            watchdog.start()
            yield world
            world.set_activity(ENDING)
            dist.barrier()
            watchdog.end("done")
    except (ValueError, OSError) as error:
        watchdog.end("failed")
        if marker := os.environ.get(FAILURE_MARKER):
            Path(marker).touch()
        if world.rank:
            time.sleep(1)  # if the main process has the same error, it reports it
        if not watchdog.is_first_to_report(str(error)):
            raise SystemExit(2) from error
        if world.is_main:
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{error}\n(process {world.rank} of {world.size}, on {socket.gethostname()})") from error
    except RuntimeError as error:
        if not CONNECTION_ERROR.search(str(error)):
            watchdog.end("failed")
            raise
        watchdog.end("lost")
        time.sleep(1)  # a stop signal for all may have reached the other process first
        if watchdog.is_first_to_report("lost"):
            reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", str(error).splitlines()[0])
            watchdog.print_error(
                f"process {world.rank} lost its connection to another one while {world.activity}: {reason}"
            )
        raise SystemExit(EXIT_LOST) from error
    except BaseException:
        watchdog.end("failed")
        raise
    finally:
        world.close()


def _rendezvous(info: RankInfo, seconds: float, gpus: bool) -> Any:
    """Create the process group, and return a store for the watchdogs of the processes.

    Raises ValueError if the other processes do not join in time.
    """
    message = f"Waiting for {info.size - 1} more processes at {info.host}:{info.port}. {info.advice}"
    timer = threading.Timer(SECONDS_UNTIL_MESSAGE, print, [message], {"flush": True})
    timer.daemon = True
    if not info.rank:
        timer.start()
    try:
        span = timedelta(seconds=seconds)
        store, *_ = next(rendezvous("env://", timeout=span))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=info.rank, world_size=info.size,
            timeout=NO_TIMEOUT,
        )  # fmt: skip
        return dist.TCPStore(info.host, info.port, is_master=False, timeout=span)  # pyright: ignore
    except RuntimeError as error:
        raise ValueError(
            f"Process {info.rank} could not connect to the {info.size - 1} others at {info.host}:{info.port}: "
            f"{str(error).splitlines()[0]}. Check that all were started and that the port is free; MASTER_PORT sets "
            f"another. {info.advice}"
        ) from error
    finally:
        timer.cancel()
