"""Tests on several processes: one call starts them, waits, and leaves none behind."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import TESTS

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}


def group_threads() -> list[str]:
    """The names of this process's threads that belong to a process group or its store."""
    found = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in found if name.startswith(("pt_", "gloo_")))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _calling(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Python code that calls a function of a test file, in a process that starts in the folder of the tests."""
    return (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('in_child', {inspect.getfile(function)!r}); "
        "module = sys.modules['in_child'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        f"module.{function.__name__}(*{arguments!r})"
    )


def together(
    function: Callable[..., Any], *arguments: Any, size: int = 2, seconds: float = 170, succeed: bool = True
) -> list[str]:
    """Call a test module's function(*arguments) in `size` processes that a launcher might have started.

    Gives what each of them printed. Unless they need not `succeed`, fails with the output of the first that fails.
    """
    code = _calling(function, arguments)
    port = free_port()
    with contextlib.ExitStack() as open_files:
        told = [open_files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code], cwd=TESTS, stdout=told[rank], stderr=subprocess.STDOUT,
                env={**CLEAN, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
                     "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port)},
            )
            for rank in range(size)
        ]  # fmt: skip
        end = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in started:
                process.wait(timeout=max(end - time.monotonic(), 1))
        for process in started:
            process.kill()
            process.wait()
        printed = [(file.seek(0), file.read())[1] for file in told]
    for rank, process in enumerate(started):
        assert process.returncode == 0 or not succeed, (
            f"process {rank} ended with {process.returncode}:\n{printed[rank]}"
        )
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
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**CLEAN, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.monotonic() + 120
        while max(steps(), default=-1) < at_least:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)
        if number == signal.SIGTERM and process.returncode:
            assert process.returncode == 128 + signal.SIGTERM
            assert "Stopped by SIGTERM; saved at" in told
        assert steps()[-1] > reached
        reached = steps()[-1]


def python(
    *arguments: str, cwd: Path | None = None, text: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=text, env=environment, check=False)
