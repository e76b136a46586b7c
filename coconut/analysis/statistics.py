"""Compare runs: accuracies with confidence intervals, and tests of the difference of each pair of methods.

The bootstrap intervals cover both sources of randomness. Questions and seeds are resampled with replacement, and the
same questions are drawn for all seeds. With three seeds or fewer the resampling of seeds is coarse, and with one seed
it has no effect. The exact test covers the choice of questions only. It tests whether these models differ, not whether
models with new seeds would.

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

from coconut.analysis.comparable_runs import ComparableRun, comparable_runs, natural_key
from coconut.analysis.config import TableConfig
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.methods import METHODS
from coconut.utils.console import listed
from coconut.utils.overrides import quoted

RESAMPLES = 10_000
SIGNIFICANCE = 0.05  # the largest p value of a significant difference
TRUNCATION_WARNING = 0.01  # the share of truncated answers from which a warning is given
SHOWN_KEYS = 3  # how many differing keys a label has at most


# Intervals and tests.


def accuracy_interval(correct_SQ: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean accuracy: percentiles of 10,000 resamples of questions and seeds.

    If all answers are right, or all wrong, the bootstrap has no width, and Wilson's interval over questions is used.
    """
    return _interval(correct_SQ.astype(np.int64), lower_limit=0.0)


def difference_interval(a_SQ: np.ndarray, b_SQ: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of the accuracy of a minus that of b, with paired resamples.

    Row s of a and b has the same seed, and column q the same question. If all differences are equal, the
    width is the upper bound of Wilson's interval for the share of questions with another difference.
    """
    assert a_SQ.shape == b_SQ.shape
    return _interval(a_SQ.astype(np.int64) - b_SQ, lower_limit=-1.0)


def _interval(values_SQ: np.ndarray, lower_limit: float) -> tuple[float, float]:
    """The interval of a mean over seeds and questions. If all values are equal: Wilson's, in lower_limit .. 1."""
    S, Q = values_SQ.shape
    value = values_SQ[0, 0]
    if (values_SQ == value).all():
        from scipy.stats import binomtest

        wilson_width = float(binomtest(0, Q).proportion_ci(method="wilson").high)
        return max(float(value) - wilson_width, lower_limit), min(float(value) + wilson_width, 1.0)
    random = np.random.default_rng(0)
    kinds_SC, counts_C = np.unique(values_SQ, axis=1, return_counts=True)  # equal columns are drawn as one kind
    questions_RC = random.multinomial(Q, counts_C / Q, size=RESAMPLES)
    seeds_RS = random.multinomial(S, np.full(S, 1 / S), size=RESAMPLES)
    sums_R = (seeds_RS * (questions_RC @ kinds_SC.T)).sum(1)
    low, high = np.quantile(sums_R, (0.025, 0.975)) / (S * Q)
    return float(low), float(high)


def exact_test(a_SQ: np.ndarray, b_SQ: np.ndarray) -> float:
    """The two-sided p value of the exact sign-flip test over questions, for these given models.

    Under the null hypothesis a and b may be exchanged for each question. The difference of a question, summed over
    the seeds, then has either sign with equal probability. p is the probability of a sum over questions at least as
    far from 0 as the observed one. With one seed this is McNemar's exact test.
    """
    from scipy.stats import binom

    assert a_SQ.shape == b_SQ.shape
    differences_Q = (a_SQ.astype(np.int64) - b_SQ).sum(0)
    pmf = np.ones(1)  # the probability of each possible sum, from the smallest to the largest
    sizes, counts = np.unique(np.abs(differences_Q[differences_Q != 0]), return_counts=True)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        pmf_of_size = np.zeros(2 * size * count + 1)
        pmf_of_size[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        pmf = np.convolve(pmf, pmf_of_size)
    sums = np.arange(len(pmf)) - len(pmf) // 2
    return min(1.0, float(pmf[np.abs(sums) >= abs(int(differences_Q.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple testing (Holm 1979). Keeps their order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


# Groups and pairs.


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed, sorted by seed."""

    label: str
    runs: list[ComparableRun]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def accuracy(self) -> float:
        return float(self.correct().mean())

    def correct(self, seeds: Iterable[int] | None = None) -> np.ndarray:
        """(S, Q) whether each answer is right, for these seeds, by default for all."""
        chosen = self.seeds if seeds is None else seeds
        return np.stack([run.correct_Q for run in self.runs if run.seed in set(chosen)])

    def mean(self, key: str) -> float:
        """The mean over the runs of a number in their evaluations."""
        return sum(run.evaluation[key] for run in self.runs) / len(self.runs)


@dataclass(frozen=True)
class Pair:
    """The accuracy of `a` minus that of `b` on the seeds that both have.

    `low`, `high`: the 95 % interval of the difference. `p`: of the exact test. `p_holm`: p, corrected over all pairs.
    """

    a: str
    b: str
    seeds: list[int]
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0

    @property
    def distinguishable(self) -> bool:
        """Whether the test is significant and the interval, which includes the seeds, excludes 0."""
        return self.p_holm <= SIGNIFICANCE and not self.low <= 0 <= self.high


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Compare every two groups that have a seed in common; `a` is the more accurate group."""
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
    """The groups, the most accurate first."""
    return sorted(groups, key=lambda group: -group.accuracy)


def indistinguishable(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[list[str]]:
    """The longest stretches of the ranking in which no two groups can be distinguished, by their labels."""
    order = [group.label for group in ranked(groups)]
    alike = {(pair.a, pair.b) for pair in pairs if not pair.distinguishable}
    stretches, covered = [], 0
    for first in range(len(order)):
        last = first + 1
        while last < len(order) and all((order[i], order[last]) in alike for i in range(first, last)):
            last += 1
        if last - first > 1 and last > covered:
            stretches.append(order[first:last])
            covered = last
    return stretches


def grouped(runs: Sequence[ComparableRun]) -> list[Group]:
    """Group runs by method and settings, in the order of METHODS.

    Groups of one method are labelled with the settings in which they differ. Raises ValueError if two runs have the
    same method, settings and seed.
    """
    runs_of: dict[str, list[ComparableRun]] = defaultdict(list)
    for run in runs:
        runs_of[json.dumps([run.method, run.settings], sort_keys=True)].append(run)
    groups = []
    for method in METHODS:
        keys = sorted((key for key in runs_of if runs_of[key][0].method == method), key=natural_key)
        labels = _labels(method, [runs_of[key][0].settings for key in keys])
        groups += [Group(label, _by_seed(runs_of[key])) for key, label in zip(keys, labels, strict=True)]
    return groups


def _by_seed(runs: list[ComparableRun]) -> list[ComparableRun]:
    runs = sorted(runs, key=lambda run: run.seed)
    for one, other in pairwise(runs):
        if one.seed == other.seed:
            raise ValueError(
                f"{one.folder} and {other.folder} are the same run made twice: {one.method} with the same settings and "
                f"seed={one.seed}. Name only one of them."
            )
    return runs


def _labels(method: str, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each group of a method: the method and, if there are several, the settings in which they differ."""
    if len(settings) < 2:
        return [method] * len(settings)
    keys, shortened = differing(settings), ""
    if len(keys) > SHOWN_KEYS:
        keys, shortened = _distinguishing_keys(keys, settings), ", ..."
    shown = [", ".join(f"{key}={each.get(key)}" for key in keys) for each in settings]
    return [f"{method} ({text}{shortened})" for text in shown]


def _distinguishing_keys(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Choose keys, in order, until their values distinguish all settings. Keys that distinguish no more are skipped."""
    chosen: list[str] = []

    def kinds(keys: list[str]) -> int:
        return len({json.dumps([each.get(key) for key in keys]) for each in settings})

    for key in keys:
        if kinds([*chosen, key]) > kinds(chosen):
            chosen.append(key)
    return chosen


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not equal in all settings."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


# The comparison.


@dataclass(frozen=True)
class Comparison:
    """A comparison of groups, in the order of METHODS, with all pairs and with warnings for the reader.

    `rows`: the numbers of each group's row of the table; shares are between 0 and 1, `sd` is over seeds. `command`: the
    command that makes this table.
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
    def evaluation(self) -> dict[str, Any]:
        """The first run's evaluation; questions, file and chance accuracy are the same for all runs."""
        return self.runs[0].evaluation

    @property
    def questions(self) -> str:
        """A phrase with the number of questions, their file, and how many the run with most seen questions has seen."""
        seen = most_seen([run.evaluation for run in self.runs])
        return describe_questions(self.evaluation["count"], seen, Path(self.evaluation["file"]).name)

    @property
    def best(self) -> dict[str, Any]:
        label = ranked(self.groups)[0].label
        return next(row for row in self.rows if row["method"] == label)


def compare(config: TableConfig) -> Comparison:
    """Compare the runs. Raises ValueError if they may not be compared (see `comparable_runs`)."""
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
    """The command that makes this table."""
    runs = ",".join(config.runs)
    if any(re.search(r"[,\s]", name) for name in config.runs):
        runs = f"[{','.join(map(quoted, config.runs))}]"
    arguments = [f"runs={shlex.quote(runs)}"]
    if config.split != TableConfig.split:
        arguments.append(f"split={shlex.quote(config.split)}")
    return " ".join(["coconut analyze table", *arguments])


def _row(group: Group) -> dict[str, Any]:
    low, high = accuracy_interval(group.correct())
    each = [run.evaluation["accuracy"] for run in group.runs]
    return {
        "method": group.label,
        "seeds": describe_seeds(group.seeds),
        "runs": len(group.runs),
        "questions": group.runs[0].evaluation["count"],
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
        "batch_size": same_in_all([run.evaluation.get("batch_size") for run in group.runs]),
        "updates": sum(map(updates_of, group.runs)) / len(group.runs),
    }


def updates_of(run: ComparableRun) -> int:
    """All updates of the weights, with those of the runs from which they were initialized."""
    return run.updates_before + run.record.description["updates"]


def same_in_all(values: Sequence[Any]) -> Any:
    """The common value if all are equal, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def describe_seeds(seeds: Sequence[int]) -> str:
    """A phrase such as "0, 1" or "0 to 4"."""
    if len(seeds) > 2 and all(b == a + 1 for a, b in pairwise(seeds)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


# Warnings.


def _warnings(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    warnings = [_describe_indistinguishable(labels, pairs) for labels in indistinguishable(groups, pairs)]
    one_seed = [group.label for group in groups if len(group.runs) == 1]
    if one_seed and len(groups) > 1:
        warnings.append(
            f"Only one seed of {listed(one_seed)}: a difference may come from the seed and not from the method."
        )
    compared = {frozenset((pair.a, pair.b)) for pair in pairs}
    order = [group.label for group in ranked(groups)]
    not_compared = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if frozenset((a, b)) not in compared]
    if not_compared:
        warnings.append(
            "No seed in common, so not compared: " + "; ".join(f"{a} and {b}" for a, b in not_compared) + "."
        )
    if same_in_all([group.seeds for group in groups]) is None:
        warnings.append("Not all methods have the same seeds. Pairs are compared on the seeds that both have.")
    runs = [run for group in groups for run in group.runs]
    if len(sizes := {run.evaluation.get("batch_size") for run in runs}) > 1:
        shown_sizes = ", ".join(sorted("unknown" if size is None else str(size) for size in sizes))
        warnings.append(f"Times were taken at different batch sizes ({shown_sizes}), so they cannot be compared.")
    if same_in_all([updates_of(run) for run in runs]) is None:
        fewest, most = min(map(updates_of, runs)), max(map(updates_of, runs))
        warnings.append(f"The runs have different numbers of updates: {fewest:,} to {most:,}.")
    truncated = [
        f"{group.label} {100 * group.mean('truncated'):.1f} %"
        for group in groups
        if group.mean("truncated") >= TRUNCATION_WARNING
    ]
    if truncated:
        warnings.append(f"Answers truncated at the limit of new tokens: {listed(truncated)}.")
    seen = most_seen([run.evaluation for run in runs])
    if seen and any(seen.values()):
        warnings.append(
            "Some questions were seen in training or validation. The run that saw the most: "
            f"{describe_questions(runs[0].evaluation['count'], seen)}."
        )
    elif seen is None:
        warnings.append("Not every run has a record of the questions it has seen, so some may be in its training data.")
    if left_out := max(run.evaluation["left_out"] for run in runs):
        warnings.append(
            f"{left_out:,} questions of the file were left out because they are too long for the model's context."
        )
    return warnings


def _describe_indistinguishable(labels: Sequence[str], pairs: Sequence[Pair]) -> str:
    """A sentence about groups that cannot be distinguished, with their largest difference."""
    among = [pair for pair in pairs if pair.a in labels and pair.b in labels]
    widest = max(among, key=lambda pair: abs(pair.difference))
    text = f"{listed(labels)} cannot be distinguished on these questions: "
    text += "difference" if len(among) == 1 else f"the largest difference, {widest.a} to {widest.b}, is"
    text += (
        f" {points(widest.difference)} points, 95 % interval {describe_interval(widest)}, {describe_p(widest.p_holm)}."
    )
    return text if widest.p_holm > SIGNIFICANCE else f"{text} These runs differ, but runs with other seeds may not."


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    text = f"{100 * share:+.1f}"
    return text if text.strip("+-0.") else "0.0"


def describe_interval(pair: Pair) -> str:
    return f"{points(pair.low)} to {points(pair.high)}"


def describe_p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p {p:.2g}"
