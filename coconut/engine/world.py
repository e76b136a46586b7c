"""The processes of one run: joining them, what they tell each other, and how they end together."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from coconut.config import EngineConfig, EngineKind
from coconut.utils.console import hush, listed

T = TypeVar("T")
FAILED = "COCONUT_FAILED"  # names a file that a failed process of `launch=local` leaves
LOST = 3  # exit status of a process that ends because another one did, or does not get on
STARTING, ENDING = "starting", "ending"  # what takes as long as it takes: loading data and models, the last words
CONNECTION = re.compile(r"connection (closed|reset)|broken pipe|remote process|timed out", re.IGNORECASE)
SECONDS_BEFORE_A_WORD = 5  # of waiting for the other processes
FOR_EVER = timedelta(days=30)  # `Watch` knows better than a clock when a process has waited enough


@dataclass(frozen=True)
class Seat:
    """Which of the processes this one is; `host` and `port` are where the first one is to be found.

    `told_by`: the variable without which this process would be alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = ""
    port: int = 0
    told_by: str = field(default="", compare=False)

    @property
    def alone(self) -> str:
        """What to do if there are no others."""
        named = f"{self.told_by}={os.environ.get(self.told_by, '')}"
        return (
            f"{named} in the environment says that this process is one of {self.size}. If it is the only one, as in a "
            f"shell of srun --pty, start it with: env -u {self.told_by} COMMAND"
        )


def seat() -> Seat:
    """As torchrun, deepspeed or SLURM's srun tell it; alone if none of them started this process.

    Raises ValueError if what they tell is not enough.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        if missing := [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]:
            raise ValueError(
                f"RANK and WORLD_SIZE are set, as a launcher does, but not {listed(missing)}. Start with torchrun, "
                "deepspeed or srun; for one process unset RANK and WORLD_SIZE."
            )
        size = int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)
        rank, local_rank = int(env["RANK"]), int(env["LOCAL_RANK"])
        return Seat(rank, size, local_rank, local_size, env["MASTER_ADDR"], int(env["MASTER_PORT"]), "RANK")
    size = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "SLURM_STEP_ID" not in env or size == 1:
        return Seat()
    return Seat(
        rank=int(env["SLURM_PROCID"]),
        size=size,
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=_most_on_a_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
        host=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "")),
        port=int(env.get("MASTER_PORT") or _port(int(env.get("SLURM_JOB_ID", 0)), int(env["SLURM_STEP_ID"]))),
        told_by="SLURM_STEP_ID",
    )


def _port(job: int, step: int) -> int:
    """The same in all tasks of a step, and below those that the system gives to outgoing connections."""
    return 20000 + (job + 97 * step) % 12000


def _most_on_a_node(tasks: str) -> int:
    """SLURM's tasks per node, such as "4(x2),3"."""
    return max(int(part.partition("(")[0]) for part in tasks.split(","))


def _first_host(nodes: str) -> str:
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"scontrol does not tell the first of SLURM's nodes {nodes!r} ({error}). Set MASTER_ADDR to its name; or, "
            "if this process is the only one, as in a shell of srun --pty, start it with: env -u SLURM_STEP_ID COMMAND"
        ) from error
    return told.stdout.split()[0]


class World:
    """All processes of a run, seen from one of them; with a single one, everything is immediate."""

    def __init__(self, place: Seat | None = None):
        place = place or Seat()
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self.doing, self.count, self.waiting = STARTING, 0, False
        self.endings = contextlib.ExitStack()  # what engines let go of before the process groups are destroyed

    def close(self) -> None:
        """End the engines, then the process groups with their threads.

        A group's threads run until nothing refers to it. One of gloo's threads that frees a tensor while Python
        shuts down asks for the GIL in vain, and aborts the process.
        """
        with contextlib.suppress(Exception):  # the others may have gone
            self.endings.close()
        if not dist.is_initialized():
            return
        deepspeed = sys.modules.get("deepspeed.comm")  # it has groups of its own, and refers to them
        owner: Any = deepspeed if deepspeed and deepspeed.is_initialized() else dist
        with contextlib.suppress(Exception):
            owner.destroy_process_group()
        gc.collect()  # DeepSpeed's engine and optimizer refer to each other, and to the groups

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mark(self, doing: str) -> None:
        """Note that this process gets on, and with what."""
        self.doing = doing
        self.tick()

    def tick(self) -> None:
        """Note that this process gets on."""
        self.count += 1

    def share(self, value: T) -> T:
        """What the first process gives."""
        box = [value]
        if self.size > 1:
            with self._waiting():
                dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What each process gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(found, value)
        return found

    def sum(self, value: float) -> float:
        """Over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(total)
        return total.item()

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum(float(flag)) > 0

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process. Raises its ValueError or OSError in all of them."""
        result: Any = None
        error: tuple[bool, str] | None = None
        if self.first:
            try:
                result = work()
            except (ValueError, OSError) as caught:
                if self.size == 1:
                    raise
                error = isinstance(caught, ValueError), str(caught)
        result, error = self.share((result, error))
        if error is not None:
            raise (ValueError if error[0] else OSError)(error[1])
        return result

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """A block that the first process goes through before the others begin it."""
        if not self.first:
            self.share(None)
        try:
            yield
        finally:
            if self.first:
                self.share(None)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.tick()


@contextlib.contextmanager
def joined(config: EngineConfig) -> Iterator[World]:
    """The world that a launcher made, or one of this process alone.

    While it lasts, only the first process writes to the screen, and an error that several have is raised in
    one of them. If a process dies or does not get on for `config.timeout` seconds, the others say so and end
    with status 3.
    """
    place = seat()
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
        from coconut.engine.zero import import_deepspeed

        import_deepspeed()  # before there is a group, which its functions would keep as default arguments for good
    world = World(place)
    watch = Watch(world, _meet(place, config.timeout, gpus), config.timeout)
    try:
        with hush() if world.rank else contextlib.nullcontext():
            dist.barrier()
            watch.start()
            yield world
            world.mark(ENDING)
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
        if world.first:
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
            watch.say(f"process {world.rank} lost its connection to another one while {world.doing}: {reason}")
        raise SystemExit(LOST) from error
    except BaseException:
        watch.end("failed")
        raise
    finally:
        world.close()


def _meet(place: Seat, seconds: float, gpus: bool) -> Any:
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


def _machine() -> str:
    """Tells machines apart, and parts of one that do not see each other's processes."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(found)


class Watch(threading.Thread):
    """Looks after all processes from a thread of each: whether they live, and whether they get on.

    They tell each other by a store: `count` rises as a process gets on, `beats` while it lives at all.
    """

    def __init__(self, world: World, store: Any, timeout: float):
        super().__init__(daemon=True, name="watch")
        self.world, self.store, self.timeout = world, store, timeout
        self.pause = min(2.0, timeout / 4)
        self.parent, self.machine = os.getppid(), _machine()
        self.ended = threading.Event()
        self.beats = 0
        self.seen: dict[int, tuple[dict[str, Any], float, float]] = {}  # what it told, when it lived, when it got on
        self.tell("")

    def tell(self, state: str) -> None:
        world, self.beats = self.world, self.beats + 1
        told = {"count": world.count, "doing": world.doing, "waiting": world.waiting, "beats": self.beats,
                "state": state, "pid": os.getpid(), "host": socket.gethostname(), "machine": self.machine}  # fmt: skip
        self.store.set(f"watch/{world.rank}", json.dumps(told))

    def says_first(self, message: str) -> bool:
        """Whether no process has said this yet."""
        key = hashlib.sha256(message.encode()).hexdigest()
        try:
            return self.store.add(f"said/{key}", 1) == 1
        except RuntimeError:
            return True

    def say(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)

    def end(self, state: str) -> None:
        self.ended.set()
        with contextlib.suppress(RuntimeError):
            self.tell(state)
        if self.is_alive():
            self.join(5)  # Python would abort at its end if this thread were within the store's C++ then

    def run(self) -> None:
        while not self.ended.wait(self.pause):
            if os.getppid() != self.parent:
                self._leave("what started this process has gone")
            try:
                self.tell("")
                told = self.store.multi_get([f"watch/{rank}" for rank in range(self.world.size)])
            except RuntimeError as error:
                if self.ended.wait(self.pause):
                    return
                self._leave(f"the process that keeps the others together has gone ({str(error).splitlines()[0]})")
            self._look([json.loads(text) for text in told])

    def _look(self, told: list[dict[str, Any]]) -> None:
        now = time.monotonic()
        for rank, new in enumerate(told):
            old, lived, got_on = self.seen.get(rank, (new, now, now))
            lived = now if new["beats"] != old["beats"] else lived
            got_on = now if new["count"] != old["count"] else got_on
            self.seen[rank] = (new, lived, got_on)
        at_work = {rank: entry for rank, entry in self.seen.items() if entry[0]["state"] != "done"}
        dead = [
            rank for rank, (new, _, _) in at_work.items()
            if new["state"] or (new["machine"] == self.machine and not _lives(new["pid"]))
        ]  # fmt: skip
        if dead:
            self.ended.wait(10)  # its message, and the end of this process by an error of its own
            self._judge(dead, "ended")
        silent = [rank for rank, (_, lived, _) in at_work.items() if now - lived > self.timeout]
        if silent:
            self._judge(silent, f"gave no sign of life for engine.timeout={self.timeout:g} s")
        begun = at_work and all(new["doing"] not in (STARTING, ENDING) for new, _, _ in at_work.values())
        if begun and all(now - got_on > self.timeout for _, _, got_on in at_work.values()):
            busy = [rank for rank, (new, _, _) in at_work.items() if not new["waiting"]] or list(at_work)
            least = min(self.seen[rank][0]["count"] for rank in busy)
            behind = [rank for rank in busy if self.seen[rank][0]["count"] == least]
            self._judge(behind, f"did not get on for engine.timeout={self.timeout:g} s")

    def _judge(self, ranks: list[int], why: str) -> NoReturn:
        """End this process, and those at fault that are on this machine."""
        told = [self.seen[rank][0] for rank in ranks]
        who = listed(
            f"process {rank} (on {new['host']}, {new['doing']})" for rank, new in zip(ranks, told, strict=True)
        )
        if self.world.rank in ranks:
            faulthandler.dump_traceback(all_threads=True)
            time.sleep(self.pause)  # for one of the others to say it
        self._leave(f"{who} {why}", told)

    def _leave(self, why: str, at_fault: list[dict[str, Any]] | None = None) -> NoReturn:
        if self.ended.is_set():
            raise SystemExit
        if self.says_first("lost"):
            self.say(f"{why}. The run ends; the same command goes on from its last checkpoint.")
        else:
            time.sleep(1)  # for the one that says it
        for new in at_fault or []:
            if new["machine"] == self.machine and new["pid"] != os.getpid() and not new["state"]:
                with contextlib.suppress(OSError):
                    os.kill(new["pid"], signal.SIGKILL)
        os._exit(LOST)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
