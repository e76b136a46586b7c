"""Tests on several processes: one call starts them, waits, and leaves none behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**CLEAN, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                 "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(size)
    ]  # fmt: skip
    end = time.monotonic() + seconds
    try:
        printed = [process.communicate(timeout=max(end - time.monotonic(), 1))[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, process in enumerate(started):
        assert process.returncode == 0 or not succeed, (
            f"process {rank} ended with {process.returncode}:\n{printed[rank]}"
        )
    return printed
