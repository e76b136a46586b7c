"""Finish a DeepSpeed run on two processes again and again: each must leave with status 0.

    python tests/stress_deepspeed_exit.py [runs=50] [zero_stage=2] [busy=2]

`busy` processes compete for the cores, as on a shared machine: whether a thread is caught by Python's end is a matter
of timing. Takes about a minute a run; run by hand when DeepSpeed, torch or the end of a run changes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.runs import Launched, graph_files

KEYS = (
    "engine=deepspeed",
    "curriculum.stage0_length=2",
    "curriculum.stage_length=2",
    "curriculum.total_length=6",
    "save_every=100",
)


def main(runs: int = 50, zero_stage: int = 2, busy: int = 2) -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    failed = 0
    try:
        with tempfile.TemporaryDirectory() as place:
            data = graph_files(Path(place), 28, 12, 8)
            for number in range(1, runs + 1):
                run = Launched(Path(place) / str(number), data, *KEYS, f"engine.zero_stage={zero_stage}")
                status = run.process.wait()
                print(f"run {number}: status {status}", flush=True)
                if status:
                    failed += 1
                    print(run.log.read_text(), flush=True)
    finally:
        for loop in loops:
            loop.kill()
    sys.exit(f"{failed} of {runs} runs failed" if failed else None)


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
