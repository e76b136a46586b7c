"""Measure how long the data builders take for the full data sets: python -m benchmarks.builders [times]

ProsQA: 17,886 + 300 + 500 rows. ProntoQA: 9,000 + 200 + 800 rows; the baseline is its published generator, which is
reported to take about 15 minutes for as many (not measured here). Commands run in turn, each in a fresh process,
start-up and writing included; the median and the range are printed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "ProsQA, 18,686 rows": ["data_builders.prosqa"],
    "ProsQA, 18,686 rows, one process": ["data_builders.prosqa", "num_workers=1"],
    "ProntoQA, 10,000 rows": ["data_builders.prontoqa"],
    "ProntoQA, 10,000 rows, one process": ["data_builders.prontoqa", "num_workers=1"],
    "graphs of the quickstart, 21,000 rows": ["data_builders.prosqa", "preset=graphs"],
}


def seconds(command: list[str]) -> float:
    """The wall time of one build into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", *command, f"out_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds_of: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(times):
        for name, command in COMMANDS.items():
            seconds_of[name].append(seconds(command))
    print(f"{os.cpu_count()} cores, {times} times each")
    for name, values in seconds_of.items():
        print(f"{name:40} {statistics.median(values):6.1f} s  ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
