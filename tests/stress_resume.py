"""Kill a run repeatedly and resume it: its end must equal that of an uninterrupted run.

    python tests/stress_resume.py [kills=10] [seed=0]

Trains the same run without and with interruptions, on one process and on two. SIGKILL goes to the command, to a worker
or to all of them: at random, before the first update, while a checkpoint is written, at the end of a stage. Weights,
optimizer, random states and every number in metrics.jsonl must be the same, bit for bit. Takes several minutes; run it
by hand when checkpoints, resuming or engines change.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from helpers.runs import Launched, graph_files, same_end

from coconut.config import DataConfig
from coconut.runs.checkpoints import Checkpoints

KEYS = ("curriculum.total_length=200", "keep_checkpoints=3")
STAGE_ENDS = (6, 11)


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(folder.glob("checkpoints/.step-*.part"))


def at_stage_end(folder: Path) -> bool:
    steps = Checkpoints(folder).steps()
    return bool(steps) and steps[-1] in STAGE_ENDS


def kill_once(folder: Path, data: DataConfig, processes: int, draw: random.Random) -> str:
    """Start or resume the run and kill it. Returns when that was, as text."""
    run = Launched(folder, data, *KEYS, f"launch.num_processes={processes}")
    before = max(Checkpoints(folder).steps(), default=0)
    moments: dict[str, Callable[[], bool]] = {
        "while saving": lambda: saving(folder) and max(Checkpoints(folder).steps(), default=0) > before,
        "at the end of a stage": lambda: at_stage_end(folder) and max(Checkpoints(folder).steps()) > before,
        "at random": lambda: max(Checkpoints(folder).steps(), default=0) > before and draw.random() < 0.02,
        "before the first update": lambda: (folder / "config.json").is_file() and draw.random() < 0.005,
    }
    when = draw.choice(list(moments))
    while run.process.poll() is None and not moments[when]():
        time.sleep(0.002)
    workers = run.workers() if processes > 1 else []
    victims = draw.choice([[run.process.pid], workers[:1], workers[-1:], [run.process.pid, *workers]]) or [
        run.process.pid
    ]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status = run.process.wait(timeout=120)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        if time.monotonic() > end:
            raise SystemExit(f"workers {workers} were left behind")
        time.sleep(0.1)
    if status == 0:
        return "the run ended first"
    found = Checkpoints(folder).steps()
    reached = found[-1] if found else 0
    return f"{when}, {len(victims)} of {1 + len(workers)} processes; status {status}; update {reached} was saved"


def main(kills: int = 10, seed: int = 0) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        data = graph_files(Path(place), 28, 12, 8)
        for processes in (1, 2):
            folders = [Path(place) / f"{kind}-{processes}" for kind in ("whole", "killed")]
            whole = Launched(folders[0], data, *KEYS, f"launch.num_processes={processes}")
            assert whole.process.wait() == 0, whole.log.read_text()
            for number in range(1, kills + 1):
                print(
                    f"{processes} process(es), kill {number}: {kill_once(folders[1], data, processes, draw)}",
                    flush=True,
                )
            last = Launched(folders[1], data, *KEYS, f"launch.num_processes={processes}")
            assert last.process.wait() == 0, last.log.read_text()
            same_end(folders[1], folders[0])
            print(f"{processes} process(es): the end is the same, bit for bit", flush=True)


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
