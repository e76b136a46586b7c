"""A thread of each process that ends the run where another process died or hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from coconut.engine.world import ENDING, LOST, STARTING, World
from coconut.utils.console import listed


def _machine() -> str:
    """Tells machines apart, and parts of one that do not see each other's processes."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(found)


class Watchdog(threading.Thread):
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
        told = {"count": world.count, "doing": world.activity, "waiting": world.waiting, "beats": self.beats,
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
