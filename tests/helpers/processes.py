"""Tests on several processes: one call starts them, waits, and leaves none behind.

`python` starts an interpreter. What only has to be a process of its own is `Forked` instead: the imports of a training
take an interpreter several seconds of CPU time, and a fork has them done.
"""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from helpers import ROOT, TESTS

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers.preload"])
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}


def group_threads() -> list[str]:
    """The names of this process's threads that belong to a process group or its store."""
    found = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in found if name.startswith(("pt_", "gloo_")))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


class Forked:
    """`python -c CODE ARGUMENTS`, forked from a process that has imported what trainings import.

    That process is one for all tests of a pytest process. `ended` is the exit status, negative after a signal; None
    before the end. Leaving the context kills what still runs.
    """

    def __init__(self, code: str, *arguments: str, cwd: Path = TESTS, variables: Mapping[str, str] = {}):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("output", "errors")]
        for file in self._files:
            file.touch()
        own = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "COCONUT_CACHE": os.environ["COCONUT_CACHE"]}
        path = os.pathsep.join([str(TESTS), str(ROOT), *filter(None, [CLEAN.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, {**own, "PYTHONPATH": path}):
            forkserver.ensure_running()
        given = (code, arguments, str(cwd), {**CLEAN, **own, **variables}, list(map(str, self._files)))
        self._process = FORKS.Process(target=_run, args=given)
        self._process.start()

    @property
    def ended(self) -> int | None:
        return self._process.exitcode

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return self._files[0].read_text()

    @property
    def printed(self) -> str:
        """Its standard output and error so far."""
        return "".join(file.read_text() for file in self._files)

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid
        os.kill(self._process.pid, number)

    def children(self) -> list[int]:
        assert self._process.pid
        return children(self._process.pid)

    def wait(self, seconds: float) -> int | None:
        self._process.join(max(seconds, 0))
        return self.ended

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Fails if the process ends before the condition holds, or the time does."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.ended is None, self.printed
            assert time.monotonic() < end, self.printed
            time.sleep(0.01)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._folder.cleanup()


def forked_command(name: str, *arguments: str, cwd: Path = TESTS) -> Forked:
    """`coconut NAME ARGUMENTS`."""
    module = f"coconut.{name}" + ".__main__" * (name in ("rl", "adaptive"))
    return Forked(f"from {module} import main; main()", *arguments, cwd=cwd)


def _run(code: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str], files: list[str]) -> None:
    assert "deepspeed" in sys.modules, "helpers.preload was not imported"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, file in enumerate(files, start=1):
        with open(file, "a") as opened:
            os.dup2(opened.fileno(), stream)
    sys.argv, sys.path = ["-c", *arguments], ["", *sys.path]
    exec(code, {"__name__": "__main__"})


def _calling(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Python code that calls a function of a test file, in a process that starts in the folder of the tests."""
    return (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('in_child', {inspect.getfile(function)!r}); "
        "module = sys.modules['in_child'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        f"module.{function.__name__}(*{arguments!r})"
    )


@contextlib.contextmanager
def on_processes(function: Callable[..., Any], *arguments: Any, size: int = 2) -> Iterator[list[Forked]]:
    """`size` processes that call a test module's function(*arguments), as a launcher might have started them."""
    code = _calling(function, arguments)
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    with contextlib.ExitStack() as held:
        ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        yield [held.enter_context(Forked(code, variables=variables)) for variables in ranks]


def together(
    function: Callable[..., Any], *arguments: Any, size: int = 2, seconds: float = 170, succeed: bool = True
) -> list[str]:
    """Call a test module's function(*arguments) in `size` processes, and wait for their end.

    Gives what each of them printed. Unless they need not `succeed`, fails with the output of the first that fails.
    """
    end = time.monotonic() + seconds
    with on_processes(function, *arguments, size=size) as started:
        statuses = [process.wait(max(end - time.monotonic(), 1)) for process in started]
        printed = [process.printed for process in started]
    for rank, status in enumerate(statuses):
        assert status == 0 or not succeed, f"process {rank} ended with {status}:\n{printed[rank]}"
    return printed


def killed_and_stopped(
    function: Callable[..., Any], *arguments: Any, steps: Callable[[], list[int]], first: int, then: int
) -> None:
    """Call a test module's function(*arguments) in a process, which gets SIGKILL, then in another, which gets SIGTERM.

    Each is sent as soon as a run has come to step `first`, or `then`; `steps` tells which are saved. Fails if the run
    did not get further each time, or did not say that it stopped.
    """
    code, reached = _calling(function, arguments), -1
    for number, at_least in ((signal.SIGKILL, first), (signal.SIGTERM, then)):
        with Forked(code) as process:
            process.wait_until(lambda least=at_least: max(steps(), default=-1) >= least)
            process.send(number)
            status = process.wait(60)
            if number == signal.SIGTERM and status:
                assert status == 128 + signal.SIGTERM
                assert "Stopped by SIGTERM; saved at" in process.printed
        assert status is not None
        assert steps()[-1] > reached
        reached = steps()[-1]


def python(
    *arguments: str, cwd: Path | None = None, text: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=text, env=environment, check=False)
