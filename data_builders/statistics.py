"""Statistics of sets of rows, and their comparison.

A task's `measure(row)` gives the statistics of one row: numbers are averaged over rows, texts give the shares of their
values; lists (and counts of texts) are pooled over all rows. Errors are standard errors over rows, also for pooled
statistics, since a row is drawn as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

Value = float | str | Sequence[float] | Sequence[str] | dict[str, int]
Measures = dict[str, Value]

SHOWN_VALUES = 12  # for a measure with more values, the comparison shows their number in place of their shares


@dataclass(frozen=True)
class Mean:
    """A mean over pooled values: the ratio of two sums over rows, of values and of counts. `sd`: of the values."""

    sums_N: np.ndarray
    counts_N: np.ndarray
    squares: float

    @property
    def value(self) -> float:
        return float(self.sums_N.sum() / max(self.counts_N.sum(), 1))

    @property
    def sd(self) -> float:
        return sqrt(max(self.squares / max(self.counts_N.sum(), 1) - self.value**2, 0.0))


def compact(measures: Measures) -> Measures:
    """The measures with lists of texts replaced by counts, which take less memory and less to pickle."""
    compacted: Measures = {}
    for name, value in measures.items():
        texts = [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
        compacted[name] = dict(Counter(texts)) if texts else value
    return compacted


def summary(measured: Sequence[Measures]) -> dict[str, Any]:
    """The summary for a manifest: mean, standard deviation and range of numbers, shares of texts."""
    numbers, words = _columns(measured)
    result: dict[str, Any] = {}
    for name, mean in _means(numbers).items():
        every = [value for values in numbers[name] for value in values]
        if every:
            extent = {"min": min(every), "max": max(every)}
            result[name] = {"mean": round(mean.value, 4), "sd": round(mean.sd, 4), **extent}
    for name, values in _shares(words).items():
        result[name] = {value: round(share.value, 4) for value, share in values.items()}
    return {name: result[name] for name in _names(measured) if name in result}


@dataclass(frozen=True)
class Line:
    """One statistic of two sets; `distance` in standard errors of their difference, None if both are constant."""

    name: str
    first: str
    second: str
    distance: float | None


def compare(first: Sequence[Measures], second: Sequence[Measures]) -> list[Line]:
    """Compare the statistics of two sets, a line for each. Raises ValueError if one is empty."""
    if not first or not second:
        raise ValueError("There is nothing to compare: one of the two sets has no rows.")
    lines: dict[str, list[Line]] = {}
    (numbers, words), (other_numbers, other_words) = _columns(first), _columns(second)
    one, other = _means(numbers), _means(other_numbers)
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        texts = [f"{mean.value:.3g} ± {mean.sd:.2g}" if mean.sd else f"{mean.value:.4g}" for mean in (a, b)]
        lines[name] = [Line(name, texts[0], texts[1], _distance(a, b))]
    values, other_values = _shares(words), _shares(other_words)
    for name in values.keys() & other_values.keys():
        lines[name] = _compare_shares(name, values[name], other_values[name])
    return [line for name in first[0] for line in lines.get(name, [])]


def _compare_shares(name: str, first: dict[str, Mean], second: dict[str, Mean]) -> list[Line]:
    counts = [next(iter(shares.values())).counts_N for shares in (first, second)]
    absent = [Mean(np.zeros_like(counts_N), counts_N, 0.0) for counts_N in counts]
    values = sorted(first.keys() | second.keys())
    pairs = {value: (first.get(value, absent[0]), second.get(value, absent[1])) for value in values}
    distances = {value: _distance(*pair) for value, pair in pairs.items()}
    if len(values) > SHOWN_VALUES:
        squares = [d * d for d in distances.values() if d is not None]
        spread = (sum(squares) - len(squares)) / sqrt(2 * len(squares)) if squares else None
        return [Line(f"{name}*", f"{len(first)} values", f"{len(second)} values", spread)]
    return [
        Line(f"{name}: {value}", f"{a.value * 100:.1f} %", f"{b.value * 100:.1f} %", distances[value])
        for value, (a, b) in pairs.items()
    ]


def _distance(a: Mean, b: Mean) -> float | None:
    """The difference of two means in standard errors, by the linearised variance over the rows of both sets."""
    sums_N, counts_N = (np.concatenate([getattr(a, f), getattr(b, f)]) for f in ("sums_N", "counts_N"))
    if not counts_N.sum():
        return None
    common = sums_N.sum() / counts_N.sum()
    residuals_N = (sums_N - common * counts_N) / counts_N.mean()
    error = sqrt(float(residuals_N.var()) * (1 / len(a.sums_N) + 1 / len(b.sums_N)))
    return (a.value - b.value) / error if error > 1e-12 else None


def table(lines: Sequence[Line], first: str, second: str) -> str:
    """The lines as text, with the largest distance under them."""
    rows = [("", first, second, "difference"), *((x.name, x.first, x.second, _signed(x.distance)) for x in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    text = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in rows
    ]
    known = [line for line in lines if line.distance is not None]
    if known:
        far = max(known, key=lambda line: abs(line.distance or 0))
        beyond = sum(abs(line.distance or 0) > 2 for line in known)
        text.append(
            f"Differences are in standard errors. Beyond 2: {beyond} of {len(known)} (by chance "
            f"{len(known) * 0.0455:.0f}, were they independent); the largest: {_signed(far.distance)}, {far.name}."
        )
    if any(line.name.endswith("*") for line in lines):
        text.append("* all values together: the sum of their squared differences, in its own standard deviations.")
    return "\n".join(text)


def _signed(distance: float | None) -> str:
    return "" if distance is None else f"{distance:+.1f}"


def _names(measured: Sequence[Measures]) -> list[str]:
    return list({name: None for row in measured for name in row})


def _columns(measured: Sequence[Measures]) -> tuple[dict[str, list[list[float]]], dict[str, list[Counter[str]]]]:
    """For each measure, row by row: the values of numeric ones, and the counts of values of the others.

    A row without the measure has none.
    """
    numbers: dict[str, list[list[float]]] = {}
    words: dict[str, list[Counter[str]]] = {}
    for name in _names(measured):
        values: list[Any] = [row.get(name, []) for row in measured]
        if any(isinstance(v, (str, dict)) or (isinstance(v, list) and v and isinstance(v[0], str)) for v in values):
            words[name] = [Counter([v] if isinstance(v, str) else v) for v in values]
        else:
            numbers[name] = [list(v) if isinstance(v, (list, tuple)) else [v] for v in values]
    return numbers, words


def _means(numbers: dict[str, list[list[float]]]) -> dict[str, Mean]:
    return {
        name: Mean(
            np.array([sum(values) for values in rows], float),
            np.array([len(values) for values in rows], float),
            float(sum(value * value for values in rows for value in values)),
        )
        for name, rows in numbers.items()
    }


def _shares(words: dict[str, list[Counter[str]]]) -> dict[str, dict[str, Mean]]:
    found: dict[str, dict[str, Mean]] = {}
    for name, rows in words.items():
        number = {value: place for place, value in enumerate(sorted({v for counts in rows for v in counts}))}
        sums_NV = np.zeros((len(rows), len(number)))
        for row, counts in enumerate(rows):
            for value, count in counts.items():
                sums_NV[row, number[value]] = count
        counts_N = sums_NV.sum(1)
        found[name] = {
            value: Mean(sums_NV[:, place], counts_N, float(sums_NV[:, place].sum())) for value, place in number.items()
        }
    return found
