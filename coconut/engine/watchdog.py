"""Watchdog: a thread in each process that ends the run if another process has died or hangs."""

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

from coconut.engine.world import ENDING, EXIT_LOST, STARTING, World
from coconut.utils.console import listed


def _machine_id() -> str:
    """Identifies this machine and PID namespace: processes with equal ids can see each other's PIDs."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


class Watchdog(threading.Thread):
    """Monitors whether all processes are alive and make progress.

    Each process publishes a report in a shared store: `progress` rises with each heartbeat of its work, `beats` as
    long as its watchdog thread runs.
    """

    def __init__(self, world: World, store: Any, timeout: float):
        super().__init__(daemon=True, name="watch")
        self.world, self.store, self.timeout = world, store, timeout
        self.interval = min(2.0, timeout / 4)
        self.parent, self.machine = os.getppid(), _machine_id()
        self.ended = threading.Event()
        self.beats = 0
        self.seen: dict[int, tuple[dict[str, Any], float, float]] = {}  # last report, times of last beat and progress
        self.publish("")

    def publish(self, state: str) -> None:
        """Put this process's report into the store. `state`: "" while it runs, else done, failed or lost."""
        world, self.beats = self.world, self.beats + 1
        report = {
            "progress": world.progress, "activity": world.activity, "waiting": world.waiting, "beats": self.beats,
            "state": state, "pid": os.getpid(), "host": socket.gethostname(), "machine": self.machine,
        }  # fmt: skip
        self.store.set(f"watch/{world.rank}", json.dumps(report))

    def is_first_to_report(self, message: str) -> bool:
        """Whether no other process has reported this message. If the store is gone, True."""
        key = hashlib.sha256(message.encode()).hexdigest()
        try:
            return self.store.add(f"reported/{key}", 1) == 1
        except RuntimeError:
            return True

    def print_error(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)

    def end(self, state: str) -> None:
        """Publish the final state and stop the thread."""
        self.ended.set()
        with contextlib.suppress(RuntimeError):
            self.publish(state)
        if self.is_alive():
            self.join(5)  # Python aborts at exit if this thread is inside the store's C++ code

    def run(self) -> None:
        while not self.ended.wait(self.interval):
            if os.getppid() != self.parent:
                self._exit("the parent process has ended")
            try:
                self.publish("")
                reports = self.store.multi_get([f"watch/{rank}" for rank in range(self.world.size)])
            except RuntimeError as error:
                if self.ended.wait(self.interval):
                    return
                self._exit(f"the process with the shared store has ended ({str(error).splitlines()[0]})")
            self._check([json.loads(text) for text in reports])

    def _check(self, reports: list[dict[str, Any]]) -> None:
        """End the run if a process has died, does not respond, or if none makes progress."""
        now = time.monotonic()
        for rank, new in enumerate(reports):
            old, last_beat, last_progress = self.seen.get(rank, (new, now, now))
            last_beat = now if new["beats"] != old["beats"] else last_beat
            last_progress = now if new["progress"] != old["progress"] else last_progress
            self.seen[rank] = (new, last_beat, last_progress)
        running = {rank: entry for rank, entry in self.seen.items() if entry[0]["state"] != "done"}
        dead = [
            rank for rank, (new, _, _) in running.items()
            if new["state"] or (new["machine"] == self.machine and not _is_alive(new["pid"]))
        ]  # fmt: skip
        if dead:
            self.ended.wait(10)  # for its message, or an error that ends this process itself
            self._end_run(dead, "ended")
        silent = [rank for rank, (_, last_beat, _) in running.items() if now - last_beat > self.timeout]
        if silent:
            self._end_run(silent, f"did not respond for engine.timeout={self.timeout:g} s")
        begun = running and all(new["activity"] not in (STARTING, ENDING) for new, _, _ in running.values())
        if begun and all(now - last_progress > self.timeout for _, _, last_progress in running.values()):
            busy = [rank for rank, (new, _, _) in running.items() if not new["waiting"]] or list(running)
            least = min(self.seen[rank][0]["progress"] for rank in busy)
            behind = [rank for rank in busy if self.seen[rank][0]["progress"] == least]
            self._end_run(behind, f"made no progress for engine.timeout={self.timeout:g} s")

    def _end_run(self, ranks: list[int], why: str) -> NoReturn:
        """End this process, and kill those of `ranks` that are on this machine."""
        reports = [self.seen[rank][0] for rank in ranks]
        processes = listed(
            f"process {rank} (on {new['host']}, {new['activity']})" for rank, new in zip(ranks, reports, strict=True)
        )
        if self.world.rank in ranks:
            faulthandler.dump_traceback(all_threads=True)
            time.sleep(self.interval)  # let one of the others report it
        self._exit(f"{processes} {why}", reports)

    def _exit(self, why: str, to_kill: list[dict[str, Any]] | None = None) -> NoReturn:
        """Report the reason if no other process has, kill processes of this machine, and exit with EXIT_LOST."""
        if self.ended.is_set():
            raise SystemExit
        if self.is_first_to_report("lost"):
            self.print_error(f"{why}. The run ends; the same command resumes it from its last checkpoint.")
        else:
            time.sleep(1)  # let the process that reports it finish
        for new in to_kill or []:
            if new["machine"] == self.machine and new["pid"] != os.getpid() and not new["state"]:
                with contextlib.suppress(OSError):
                    os.kill(new["pid"], signal.SIGKILL)
        os._exit(EXIT_LOST)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
