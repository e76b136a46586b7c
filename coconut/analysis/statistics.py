"""Runs side by side: how good each method is, and how sure a difference.

What is taken as random. The intervals are for other questions and other seeds of the same kind: both are
drawn anew, with replacement, the questions for all seeds at once, since every seed answers the same ones. With
three seeds or fewer that level is coarse, and with one it says nothing. The test is for other questions only:
it asks whether these very models differ, not whether new seeds would.

Shapes: S seeds, Q questions, R resamples, C kinds of questions.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from coconut.analysis.comparable_runs import ComparableRun, comparable_runs, natural
from coconut.analysis.config import TableConfig
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.methods import METHODS
from coconut.utils.console import listed
from coconut.utils.overrides import quoted

RESAMPLES = 10_000
LEVEL = 0.05  # a p value above it tells nothing apart
CUT = 0.01  # share of truncated answers above which a warning is given
SHOWN_KEYS = 3  # differing keys in a label


# How sure a number is.


def accuracy_interval(correct_SQ: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean accuracy: percentiles of 10,000 resamples of questions and of seeds.

    Where all answers are right, or all wrong, a bootstrap has no width; Wilson's interval over the questions
    stands in its place.
    """
    return _interval(correct_SQ.astype(np.int64), least=0.0)


def difference_interval(a_SQ: np.ndarray, b_SQ: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the accuracy of a minus that of b: as `accuracy_interval`, by pairs.

    Row s of both is of one seed, column q of one question, and they are drawn together. Where no question
    tells a from b, the width is what Wilson's interval leaves for the share of such questions.
    """
    assert a_SQ.shape == b_SQ.shape
    return _interval(a_SQ.astype(np.int64) - b_SQ, least=-1.0)


def _interval(values_SQ: np.ndarray, least: float) -> tuple[float, float]:
    S, Q = values_SQ.shape
    value = values_SQ[0, 0]
    if (values_SQ == value).all():
        from scipy.stats import binomtest

        unseen = float(binomtest(0, Q).proportion_ci(method="wilson").high)
        return max(float(value) - unseen, least), min(float(value) + unseen, 1.0)
    random = np.random.default_rng(0)
    kinds_SC, counts_C = np.unique(values_SQ, axis=1, return_counts=True)  # questions of a kind need not be told apart
    questions_RC = random.multinomial(Q, counts_C / Q, size=RESAMPLES)
    seeds_RS = random.multinomial(S, np.full(S, 1 / S), size=RESAMPLES)
    sums_R = (seeds_RS * (questions_RC @ kinds_SC.T)).sum(1)
    low, high = np.quantile(sums_R, (0.025, 0.975)) / (S * Q)
    return float(low), float(high)


def exact_test(a_SQ: np.ndarray, b_SQ: np.ndarray) -> float:
    """The two-sided p value of the exact sign-flip test, questions being random and these models given.

    If a and b were alike, either could have given the other's answers to a question. So the difference of
    each question, summed over the seeds, keeps its size and takes either sign; p is the chance that the sum
    over questions is then as far from 0 as it is. With one seed this is McNemar's exact test.
    """
    from scipy.stats import binom

    assert a_SQ.shape == b_SQ.shape
    differences_Q = (a_SQ.astype(np.int64) - b_SQ).sum(0)
    chances = np.ones(1)  # of each sum, from the least to the greatest
    sizes, counts = np.unique(np.abs(differences_Q[differences_Q != 0]), return_counts=True)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        of_this_size = np.zeros(2 * size * count + 1)
        of_this_size[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, of_this_size)
    sums = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[np.abs(sums) >= abs(int(differences_Q.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values, in their order, corrected for how many they are (Holm 1979)."""
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = least
    return corrected


# What is compared.


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, in the order of their seeds."""

    label: str
    runs: list[ComparableRun]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def accuracy(self) -> float:
        return float(self.correct().mean())

    def correct(self, seeds: Iterable[int] | None = None) -> np.ndarray:
        """(S, Q) of these seeds, by default of all."""
        chosen = self.seeds if seeds is None else seeds
        return np.stack([run.correct_Q for run in self.runs if run.seed in set(chosen)])

    def mean(self, key: str) -> float:
        """Of what the evaluations counted."""
        return sum(run.found[key] for run in self.runs) / len(self.runs)


@dataclass(frozen=True)
class Pair:
    """The accuracy of `a` minus that of `b` on the seeds that both have. `p_holm`: p, corrected over all pairs."""

    a: str
    b: str
    seeds: list[int]
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0

    @property
    def told_apart(self) -> bool:
        """By the test on questions, and by the interval, which knows of seeds too."""
        return self.p_holm <= LEVEL and not self.low <= 0 <= self.high


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Every two groups with a seed in common, the more accurate one first."""
    pairs = []
    for a, b in combinations(ranked(groups), 2):
        if seeds := sorted(set(a.seeds) & set(b.seeds)):
            a_SQ, b_SQ = a.correct(seeds), b.correct(seeds)
            low, high = difference_interval(a_SQ, b_SQ)
            difference = float(a_SQ.mean() - b_SQ.mean())
            pairs.append(Pair(a.label, b.label, seeds, difference, low, high, exact_test(a_SQ, b_SQ)))
    corrected = holm([pair.p for pair in pairs])
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]


def ranked(groups: Sequence[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: -group.accuracy)


def alike(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[list[str]]:
    """Stretches of the ranking, as long as can be, of which no two can be told apart."""
    order = [group.label for group in ranked(groups)]
    same = {(pair.a, pair.b) for pair in pairs if not pair.told_apart}
    found, reached = [], 0
    for first in range(len(order)):
        last = first + 1
        while last < len(order) and all((order[i], order[last]) in same for i in range(first, last)):
            last += 1
        if last - first > 1 and last > reached:
            found.append(order[first:last])
            reached = last
    return found


def grouped(runs: Sequence[ComparableRun]) -> list[Group]:
    """The runs by method and settings, in the order of METHODS.

    Groups of one method are labelled with the keys in which they differ. Raises ValueError if two runs have
    the same settings and seed.
    """
    found: dict[str, list[ComparableRun]] = defaultdict(list)
    for run in runs:
        found[json.dumps([run.method, run.settings], sort_keys=True)].append(run)
    groups = []
    for method in METHODS:
        same = sorted((key for key in found if found[key][0].method == method), key=natural)
        labels = _labels(method, [found[key][0].settings for key in same])
        groups += [Group(label, _by_seed(found[key])) for key, label in zip(same, labels, strict=True)]
    return groups


def _by_seed(runs: list[ComparableRun]) -> list[ComparableRun]:
    runs = sorted(runs, key=lambda run: run.seed)
    for one, other in pairwise(runs):
        if one.seed == other.seed:
            raise ValueError(
                f"{one.folder} and {other.folder} are one run made twice: {one.method} with the same settings and "
                f"seed={one.seed}. Name one of them."
            )
    return runs


def _labels(method: str, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each: the method and, if there are several, the keys in which they differ."""
    if len(settings) < 2:
        return [method] * len(settings)
    keys, shortened = differing(settings), ""
    if len(keys) > SHOWN_KEYS:
        keys, shortened = _enough(keys, settings), ", ..."
    shown = [", ".join(f"{key}={each.get(key)}" for key in keys) for each in settings]
    return [f"{method} ({text}{shortened})" for text in shown]


def _enough(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """As few of the keys, taken in order, as make every one of the settings unlike the others."""
    chosen: list[str] = []

    def kinds(keys: list[str]) -> int:
        return len({json.dumps([each.get(key) for key in keys]) for each in settings})

    for key in keys:
        if kinds([*chosen, key]) > kinds(chosen):
            chosen.append(key)
    return chosen


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


# The comparison.


@dataclass(frozen=True)
class Comparison:
    """Groups in the order of METHODS, every pair of them, and what a reader must be warned of.

    `rows`: for each group, what its row of the table says; shares are between 0 and 1, `sd` is over seeds.
    """

    groups: list[Group]
    pairs: list[Pair]
    rows: list[dict[str, Any]]
    warnings: list[str]
    command: str

    @property
    def runs(self) -> list[ComparableRun]:
        return [run for group in self.groups for run in group.runs]

    @property
    def found(self) -> dict[str, Any]:
        """The first run's evaluation: questions, file and guessing are the same for all."""
        return self.runs[0].found

    @property
    def questions(self) -> str:
        """How many of which file, and how many of them the run has seen that has seen the most."""
        seen = most_seen([run.found for run in self.runs])
        return describe_questions(self.found["count"], seen, Path(self.found["file"]).name)

    @property
    def best(self) -> dict[str, Any]:
        label = ranked(self.groups)[0].label
        return next(row for row in self.rows if row["method"] == label)


def compare(config: TableConfig) -> Comparison:
    """Raises ValueError if the runs may not be compared (see `entrants`)."""
    groups = grouped(comparable_runs(config.runs, config.split))
    pairs = pairs_of(groups)
    return Comparison(
        groups=groups,
        pairs=pairs,
        rows=[_row(group) for group in groups],
        warnings=_warnings(groups, pairs),
        command=_command(config),
    )


def _command(config: TableConfig) -> str:
    """One that makes the same table."""
    runs = ",".join(config.runs)
    if any(re.search(r"[,\s]", name) for name in config.runs):
        runs = f"[{','.join(map(quoted, config.runs))}]"
    named = [f"runs={shlex.quote(runs)}"]
    if config.split != TableConfig.split:
        named.append(f"split={shlex.quote(config.split)}")
    return " ".join(["coconut analyze table", *named])


def _row(group: Group) -> dict[str, Any]:
    low, high = accuracy_interval(group.correct())
    each = [run.found["accuracy"] for run in group.runs]
    return {
        "method": group.label,
        "seeds": describe_seeds(group.seeds),
        "runs": len(group.runs),
        "questions": group.runs[0].found["count"],
        "accuracy": group.accuracy,
        "low": low,
        "high": high,
        "sd": statistics.stdev(each) if len(each) > 1 else None,
        "new_tokens": group.mean("mean_new_tokens") + group.mean("num_thoughts"),
        "language_tokens": group.mean("mean_new_tokens"),
        "thoughts": group.mean("num_thoughts"),
        "truncated": group.mean("truncated"),
        "passes": group.mean("passes"),
        "seconds_per_item": group.mean("seconds_per_item"),
        "batch_size": same_in_all([run.found.get("batch_size") for run in group.runs]),
        "updates": sum(map(updates_of, group.runs)) / len(group.runs),
    }


def updates_of(run: ComparableRun) -> int:
    """All that the weights have been through."""
    return run.before + run.record.description["updates"]


def same_in_all(values: Sequence[Any]) -> Any:
    """The value that all have, or None."""
    return values[0] if all(value == values[0] for value in values) else None


def describe_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 2 and all(b == a + 1 for a, b in pairwise(seeds)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


# What a reader is warned of.


def _warnings(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    warnings = [_alike(labels, pairs) for labels in alike(groups, pairs)]
    single = [group.label for group in groups if len(group.runs) == 1]
    if single and len(groups) > 1:
        warnings.append(f"Only one seed of {listed(single)}: a difference may be the seed's and not the method's.")
    compared = {frozenset((pair.a, pair.b)) for pair in pairs}
    order = [group.label for group in ranked(groups)]
    apart = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if frozenset((a, b)) not in compared]
    if apart:
        warnings.append("No seed in common, so not compared: " + "; ".join(f"{a} and {b}" for a, b in apart) + ".")
    if same_in_all([group.seeds for group in groups]) is None:
        warnings.append("Not all methods have the same seeds. Pairs are compared on the seeds that both have.")
    runs = [run for group in groups for run in group.runs]
    if len(sizes := {run.found.get("batch_size") for run in runs}) > 1:
        known = ", ".join(sorted("not known" if size is None else str(size) for size in sizes))
        warnings.append(f"Times were taken at different batch sizes ({known}), so they cannot be compared.")
    if same_in_all([updates_of(run) for run in runs]) is None:
        least, most = min(map(updates_of, runs)), max(map(updates_of, runs))
        warnings.append(f"Not all were trained equally long: {least:,} to {most:,} updates.")
    cut = [f"{group.label} {100 * group.mean('truncated'):.1f} %" for group in groups if group.mean("truncated") >= CUT]
    if cut:
        warnings.append(f"Answers cut off at the limit of new tokens: {listed(cut)}.")
    seen = most_seen([run.found for run in runs])
    if seen and any(seen.values()):
        warnings.append(
            f"Not all is unseen: {describe_questions(runs[0].found['count'], seen)} of the run that saw the most."
        )
    elif seen is None:
        warnings.append("Not every run says which questions it has seen, so some may be in its training data.")
    if left_out := max(run.found["left_out"] for run in runs):
        warnings.append(f"{left_out:,} questions of the file were left out, too long for the model's context.")
    return warnings


def _alike(labels: Sequence[str], pairs: Sequence[Pair]) -> str:
    among = [pair for pair in pairs if pair.a in labels and pair.b in labels]
    widest = max(among, key=lambda pair: abs(pair.difference))
    text = f"{listed(labels)} cannot be told apart on these questions: "
    text += "difference" if len(among) == 1 else f"the largest difference, {widest.a} to {widest.b}, is"
    text += (
        f" {points(widest.difference)} points, 95 % interval {describe_interval(widest)}, {describe_p(widest.p_holm)}."
    )
    return text if widest.p_holm > LEVEL else f"{text} These runs differ; with other seeds it may be otherwise."


def points(share: float) -> str:
    """A difference of shares in points of a hundred, with its sign."""
    text = f"{100 * share:+.1f}"
    return text if text.strip("+-0.") else "0.0"


def describe_interval(pair: Pair) -> str:
    return f"{points(pair.low)} to {points(pair.high)}"


def describe_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"
