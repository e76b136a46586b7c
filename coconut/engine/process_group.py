"""Join the processes of a run, and end them together."""

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
from coconut.engine.world import ENDING, LOST, World
from coconut.utils.console import mute_log

FAILED = "COCONUT_FAILED"  # names a file that a failed process of `launch=local` leaves


CONNECTION = re.compile(r"connection (closed|reset)|broken pipe|remote process|timed out", re.IGNORECASE)


SECONDS_BEFORE_A_WORD = 5  # of waiting for the other processes


FOR_EVER = timedelta(days=30)  # `Watch` knows better than a clock when a process has waited enough


@contextlib.contextmanager
def init_distributed(config: EngineConfig) -> Iterator[World]:
    """The world that a launcher made, or one of this process alone.

    While it lasts, only the first process writes to the screen, and an error that several have is raised in
    one of them. If a process dies or does not get on for `config.timeout` seconds, the others say so and end
    with status 3.
    """
    place = read_launcher_env()
    gpus = torch.cuda.is_available() and not config.device.startswith("cpu")
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed where it is installed
    if place.size == 1:
        with contextlib.closing(World()) as alone:
            yield alone
        return
    if config.device.startswith("cuda:"):
        raise ValueError(
            f"engine.device={config.device} is one GPU, for {place.size} processes. Leave it out: each takes its own."
        )
    os.environ |= {
        "RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size), "MASTER_ADDR": place.host, "MASTER_PORT": str(place.port),
    }  # fmt: skip
    if config.kind is EngineKind.deepspeed and find_spec("deepspeed"):
        from coconut.engine.deepspeed_import import import_deepspeed

        import_deepspeed()  # before there is a group, which its functions would keep as default arguments for good
    world = World(place)
    watch = Watchdog(world, _rendezvous(place, config.timeout, gpus), config.timeout)
    try:
        with mute_log() if world.rank else contextlib.nullcontext():
            dist.barrier()
            watch.start()
            yield world
            world.set_activity(ENDING)
            dist.barrier()
            watch.end("done")
    except (ValueError, OSError) as error:
        watch.end("failed")
        if told := os.environ.get(FAILED):
            Path(told).touch()
        if world.rank:
            time.sleep(1)  # if the first process has the same error, it says so
        if not watch.says_first(str(error)):
            raise SystemExit(2) from error
        if world.is_main:
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(f"{error}\n(process {world.rank} of {world.size}, on {socket.gethostname()})") from error
    except RuntimeError as error:
        if not CONNECTION.search(str(error)):
            watch.end("failed")
            raise
        watch.end("lost")
        time.sleep(1)  # for a signal that was meant for all, and has reached the other one first
        if watch.says_first("lost"):
            reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", str(error).splitlines()[0])
            watch.say(f"process {world.rank} lost its connection to another one while {world.activity}: {reason}")
        raise SystemExit(LOST) from error
    except BaseException:
        watch.end("failed")
        raise
    finally:
        world.close()


def _rendezvous(place: RankInfo, seconds: float, gpus: bool) -> Any:
    """Make the process group, and give a store in which the processes leave word for each other.

    Raises ValueError if the others do not come.
    """
    wait = f"Waiting for {place.size - 1} more processes at {place.host}:{place.port}. {place.alone}"
    waiting = threading.Timer(SECONDS_BEFORE_A_WORD, print, [wait], {"flush": True})
    waiting.daemon = True
    if not place.rank:
        waiting.start()
    try:
        span = timedelta(seconds=seconds)
        store, *_ = next(rendezvous("env://", timeout=span))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=place.rank, world_size=place.size,
            timeout=FOR_EVER,
        )  # fmt: skip
        return dist.TCPStore(place.host, place.port, is_master=False, timeout=span)  # pyright: ignore
    except RuntimeError as error:
        raise ValueError(
            f"Process {place.rank} did not meet the {place.size - 1} others at {place.host}:{place.port}: "
            f"{str(error).splitlines()[0]}. Were all of them started, and is the port free? MASTER_PORT names another. "
            f"{place.alone}"
        ) from error
    finally:
        waiting.cancel()
