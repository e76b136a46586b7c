"""Measure how well the dials of the random graphs fit released rows: python -m benchmarks.prosqa_fit FILE [rows]

For each setting the rows are drawn twice, and all statistics are compared with those of the released rows in one
number, Hotelling's T squared. For two sets from the same distribution it is about the number of statistics, which is
printed first. The table in docs/data.md is made by this script.
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
    """One row's statistics as numbers: indicators of texts, means of lists of numbers, counts of texts in lists."""
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
    """The names of the statistics to compare: not rare, and without one value of each text, which the others imply."""
    seen: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            for full in {f"{name}: {text}" if isinstance(text, str) else name for text in texts} or {name}:
                seen[full] = seen.get(full, 0) + 1
    common = [n for n, count in seen.items() if count > 0.03 * len(rows) and not n.startswith(LEFT_OUT)]
    groups = {n.split(": ")[0]: n for n in common if ": " in n}
    return [n for n in common if n not in groups.values()]


def t_squared(drawn: np.ndarray, released: np.ndarray) -> float:
    """Hotelling's T squared of the means of two sets, (rows, statistics) each."""
    difference = drawn.mean(0) - released.mean(0)
    covariance = np.cov(drawn.T) * (1 / len(drawn) + 1 / len(released))
    return float(difference @ np.linalg.pinv(covariance, rcond=1e-9) @ difference)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 4000
    released = [measure(row) for row in released_rows(sys.argv[1])]
    names = statistics(released)
    released_vectors = np.array([vector(row, names) for row in released])
    print(f"{len(names)} statistics of {len(released)} released rows, {count} rows made for each setting, twice")
    for setting in SETTINGS:
        make = recipe(ProsqaBuild(**setting))  # type: ignore[arg-type]
        distances = []
        for seed in (1, 2):
            drawn = (make.draw(random.Random(f"{seed} {place}"), lambda key: True) for place in range(count))
            distances.append(
                t_squared(np.array([vector(measure(one[0]), names) for one in drawn if one]), released_vectors)
            )
        label = ", ".join(f"{key}={value}" for key, value in setting.items()) or "the default"
        print(f"{label:45} {distances[0]:8.1f} {distances[1]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
