"""Tests on several processes: one call starts them, waits, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(function: str, *arguments: Any, size: int = 2, seconds: float = 170, succeed: bool = True) -> list[str]:
    """Call MODULE.FUNCTION(*arguments) in `size` processes that a launcher might have started.

    Gives what each of them printed. Unless they need not `succeed`, fails with the output of the first that fails.
    """
    module, name = function.rsplit(".", 1)
    code = f"import {module}; {module}.{name}(*{arguments!r})"
    port = free_port()
    with contextlib.ExitStack() as open_files:
        told = [open_files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(size)]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code], cwd=HERE, stdout=told[rank], stderr=subprocess.STDOUT,
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
