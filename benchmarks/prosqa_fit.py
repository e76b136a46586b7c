"""How well the parameters of the random graphs fit released rows: python -m benchmarks.prosqa_fit FILE [rows]

For each setting rows are drawn twice, and all their statistics are compared with those of the released rows in one
number, Hotelling's T squared. For two samples of one distribution it is about the number of statistics, which is
printed first. The table of docs/data.md comes from here.
"""

from __future__ import annotations

import random
import sys

import numpy as np

from data_builders.graph_measures import measure
from data_builders.prosqa import ProsqaBuild, recipe, released_rows
from data_builders.statistics import Measures

SETTINGS: list[dict[str, float | int | bool]] = [
    {}, {"nodes": 27}, {"nodes": 29},
    {"first_family": 0.30, "second_family": 0.50}, {"first_family": 0.33, "second_family": 0.47},
    {"first_family": 0.40, "second_family": 0.40},
    {"second_family": 0.35}, {"second_family": 0.43}, {"second_family": 0.47}, {"second_family": 0.50},
    {"branching": 1.4}, {"branching": 1.6}, {"depth_weight": 1.0}, {"depth_weight": 2.0}, {"as_printed": True},
    {"as_printed": True, "nodes": 26, "second_family": 0.35},
]  # fmt: skip
LEFT_OUT = ("names of persons", "names of concepts", "persons are the nodes without parents")


def vector(measures: Measures, names: list[str]) -> list[float]:
    """One row's statistics as numbers: shares of texts, means of lists, counts of texts in lists."""
    values: dict[str, float] = {}
    for name, value in measures.items():
        if isinstance(value, str):
            values[f"{name}: {value}"] = 1.0
        elif isinstance(value, float):
            values[name] = value
        elif isinstance(value, list) and value and isinstance(value[0], str):
            for text in value:
                values[f"{name}: {text}"] = values.get(f"{name}: {text}", 0.0) + 1.0
        elif isinstance(value, list) and value:
            values[name] = float(np.mean(np.array(value, float)))
    return [values.get(name, 0.0) for name in names]


def statistics(rows: list[Measures]) -> list[str]:
    """Names of the statistics to compare: no rare ones, and one less of each group of shares, which sum to one."""
    seen: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            for full in {f"{name}: {text}" if isinstance(text, str) else name for text in texts} or {name}:
                seen[full] = seen.get(full, 0) + 1
    common = [n for n, count in seen.items() if count > 0.03 * len(rows) and not n.startswith(LEFT_OUT)]
    groups = {n.split(": ")[0]: n for n in common if ": " in n}
    return [n for n in common if n not in groups.values()]


def t_squared(here: np.ndarray, there: np.ndarray) -> float:
    gap = here.mean(0) - there.mean(0)
    covariance = np.cov(here.T) * (1 / len(here) + 1 / len(there))
    return float(gap @ np.linalg.pinv(covariance, rcond=1e-9) @ gap)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 4000
    released = [measure(row) for row in released_rows(sys.argv[1])]
    names = statistics(released)
    there = np.array([vector(row, names) for row in released])
    print(f"{len(names)} statistics of {len(released)} released rows, {count} rows made for each setting, twice")
    for setting in SETTINGS:
        make = recipe(ProsqaBuild(**setting))  # type: ignore[arg-type]
        fits = []
        for seed in (1, 2):
            drawn = (make.draw(random.Random(f"{seed} {place}"), lambda key: True) for place in range(count))
            fits.append(t_squared(np.array([vector(measure(one[0]), names) for one in drawn if one]), there))
        text = ", ".join(f"{key}={value}" for key, value in setting.items()) or "the default"
        print(f"{text:45} {fits[0]:8.1f} {fits[1]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
