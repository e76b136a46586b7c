"""Compare runs that differ in the method or its settings: groups of seeds, tests of each pair, warnings."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from coconut.analysis.comparable_runs import ComparableRun, comparable_runs, natural_key
from coconut.analysis.config import TableConfig
from coconut.analysis.statistics import accuracy_interval, difference_interval, exact_test, holm
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.methods import METHODS
from coconut.utils.console import listed
from coconut.utils.overrides import quoted

SIGNIFICANCE = 0.05  # the largest p value of a significant difference
TRUNCATION_WARNING = 0.01  # the share of truncated answers from which a warning is given
SHOWN_KEYS = 3  # how many differing keys a label has at most


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
        return float(self.correct(self.seeds).mean())

    def correct(self, seeds: Sequence[int]) -> np.ndarray:
        """(S, Q) whether each answer is right, for these seeds."""
        return np.stack([run.correct_Q for run in self.runs if run.seed in seeds])

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
    """Group runs by method and settings, in the order of METHODS; policies come after the runs of their method.

    Groups of one method are labelled with the settings in which they differ. Raises ValueError if two runs have the
    same method, settings and seed.
    """
    runs_of: dict[str, list[ComparableRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        runs_of[json.dumps([run.record.method, run.settings], sort_keys=True)].append(run)
    for alike in runs_of.values():
        for one, other in pairwise(alike):
            if one.seed == other.seed:
                raise ValueError(
                    f"{one.folder} and {other.folder} have the same method ({one.record.method}), settings and "
                    f"seed={one.seed}: one run made twice, or two that differ only in the seed of what they began "
                    "from. Name only one of them."
                )
    groups, order = [], list(METHODS)
    kinds = {run.record.method: order.index(run.method) for run in runs}
    for kind in sorted(kinds, key=lambda kind: (kinds[kind], kind)):
        of_kind = [runs_of[key] for key in sorted(runs_of, key=natural_key) if runs_of[key][0].record.method == kind]
        labels = _labels(kind, [alike[0].settings for alike in of_kind])
        groups += map(Group, labels, of_kind)
    return groups


def _labels(kind: str, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each group of a kind: the kind and, if there are several, the settings in which they differ.

    If more than SHOWN_KEYS keys differ, only those are shown, in order, that distinguish more groups.
    """
    if len(settings) < 2:
        return [kind] * len(settings)
    keys, shortened = differing(settings), ""
    if len(keys) > SHOWN_KEYS:
        rows = [[json.dumps(each.get(key)) for key in keys] for each in settings]
        kinds = [len({tuple(row[:i]) for row in rows}) for i in range(len(keys) + 1)]  # told apart by the first i keys
        keys, shortened = [key for key, (less, more) in zip(keys, pairwise(kinds), strict=True) if more > less], ", ..."
    shown = [", ".join(f"{key}={each.get(key)}" for key in keys) for each in settings]
    return [f"{kind} ({text}{shortened})" for text in shown]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not equal in all settings."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


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
    return compare_evaluations(config.runs, config.split, command_of(config))


def compare_evaluations(runs: Sequence[str], name: str, command: str) -> Comparison:
    """Compare the evaluations of this name. Raises ValueError as `comparable_runs` does."""
    groups = grouped(comparable_runs(runs, name))
    pairs = pairs_of(groups)
    return Comparison(groups, pairs, list(map(_row, groups)), warnings_of(groups, pairs), command)


def command_of(config: TableConfig) -> str:
    """The command that makes this table."""
    runs = ",".join(config.runs)
    if any(re.search(r"[,\s]", name) for name in config.runs):
        runs = f"[{','.join(map(quoted, config.runs))}]"
    split = "" if config.split == TableConfig.split else f" split={shlex.quote(config.split)}"
    suite = f" suite={shlex.quote(config.suite.name)}" if config.suite.sets else ""
    if config.precision is not TableConfig.precision:
        suite += f" precision={config.precision.value}"
    sampled = f" sampled={shlex.quote(config.sampled)}" if config.sampled else ""
    return f"coconut analyze table runs={shlex.quote(runs)}{split}{suite}{sampled}"


def _row(group: Group) -> dict[str, Any]:
    low, high = accuracy_interval(group.correct(group.seeds))
    each = [run.evaluation["accuracy"] for run in group.runs]
    return {
        "method": group.label, "seeds": describe_seeds(group.seeds), "runs": len(group.runs),
        "questions": group.runs[0].evaluation["count"], "accuracy": group.accuracy, "low": low, "high": high,
        "sd": statistics.stdev(each) if len(each) > 1 else None,
        "new_tokens": group.mean("mean_new_tokens") + group.mean("num_thoughts"),
        "language_tokens": group.mean("mean_new_tokens"), "thoughts": group.mean("num_thoughts"),
        **{key: group.mean(key) for key in ("truncated", "passes", "seconds_per_item")},
        "batch_size": same_in_all([run.evaluation.get("batch_size") for run in group.runs]),
        "updates": sum(run.updates for run in group.runs) / len(group.runs),
    }  # fmt: skip


def same_in_all(values: Sequence[Any]) -> Any:
    """The common value if all are equal, else None."""
    return values[0] if all(value == values[0] for value in values) else None


def describe_seeds(seeds: Sequence[int]) -> str:
    """A phrase such as "0, 1" or "0 to 4"."""
    if len(seeds) > 2 and all(b == a + 1 for a, b in pairwise(seeds)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def warnings_of(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    warnings = [_describe_indistinguishable(labels, pairs) for labels in indistinguishable(groups, pairs)]
    one_seed = [group.label for group in groups if len(group.runs) == 1]
    if one_seed and len(groups) > 1:
        warnings.append(
            f"Only one seed of {listed(one_seed)}: a difference may come from the seed and not from the method."
        )
    every_pair = combinations([group.label for group in ranked(groups)], 2)
    compared = {(pair.a, pair.b) for pair in pairs}
    if not_compared := [f"{a} and {b}" for a, b in every_pair if (a, b) not in compared]:
        warnings.append(f"No seed in common, so not compared: {'; '.join(not_compared)}.")
    if same_in_all([group.seeds for group in groups]) is None:
        warnings.append("Not all methods have the same seeds. Pairs are compared on the seeds that both have.")
    runs = [run for group in groups for run in group.runs]
    if len(sizes := {run.evaluation.get("batch_size") for run in runs}) > 1:
        shown_sizes = ", ".join(sorted("unknown" if size is None else str(size) for size in sizes))
        warnings.append(f"Times were taken at different batch sizes ({shown_sizes}), so they cannot be compared.")
    updates = [run.updates for run in runs]
    if min(updates) < max(updates):
        warnings.append(f"The runs have different numbers of updates: {min(updates):,} to {max(updates):,}.")
    shares = [(group.label, group.mean("truncated")) for group in groups]
    if truncated := [f"{label} {100 * share:.1f} %" for label, share in shares if share >= TRUNCATION_WARNING]:
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
    which = "difference" if len(among) == 1 else f"the largest difference, {widest.a} to {widest.b}, is"
    text = (
        f"{listed(labels)} cannot be distinguished on these questions: {which} {points(widest.difference)} points, "
        f"95 % interval {describe_interval(widest)}, {describe_p(widest.p_holm)}."
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
