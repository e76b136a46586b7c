"""Compare sampled evaluations at equal sequential forward passes: thoughts against words, one run against another.

k answers take k times the mean passes of an answer. The best of several answers by a reward takes the passes of the
reward on each of them as well.

Shapes: Q questions, N answers to each, S values of k.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from coconut.analysis.comparable_runs import ComparableRun, predictions_file, sampled_evaluations
from coconut.analysis.config import TableConfig
from coconut.analysis.run_comparison import command_of
from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.metrics_at_k import Numbers
from coconut.evaluation.sampling import METRICS, describe_sampling, keys_of, sizes_of, values_at
from coconut.tasks import TASKS

MAX_EVALUATIONS = 8  # in one picture


@dataclass(frozen=True)
class Curve:
    """A metric at k of one evaluation: the passes that k answers take (S,), and its value for each question (Q, S)."""

    metric: str
    label: str
    sizes: list[int]
    passes_S: Numbers
    values_QS: Numbers

    def at(self, passes: float) -> Numbers:
        """(Q,) the value at so many passes: a measured point, or between two, linear in the logarithm of the passes.

        Raises ValueError below the first and above the last measured point.
        """
        if not self.reaches(passes):
            raise ValueError(f"{passes} passes are outside of what was measured: {self.passes_S[[0, -1]].tolist()}.")
        right = min(int(np.searchsorted(self.passes_S, passes)), len(self.sizes) - 1)
        left = max(right - 1, 0)
        span = np.log(self.passes_S[right] / self.passes_S[left])
        weight = np.log(passes / self.passes_S[left]) / span if span else 1.0
        return (1 - weight) * self.values_QS[:, left] + weight * self.values_QS[:, right]

    def reaches(self, passes: float) -> bool:
        return bool(self.passes_S[0] <= passes <= self.passes_S[-1])

    def place_of(self, passes: float) -> str:
        """The measured k at so many passes, or the two around it, in words."""
        place = int(np.searchsorted(self.passes_S, passes))
        if self.passes_S[place] == passes:
            return f"k = {self.sizes[place]}"
        return f"between k = {self.sizes[place - 1]} and {self.sizes[place]}"


@dataclass(frozen=True)
class Difference:
    """A metric of evaluation `a` minus that of `b` at the most passes that both were measured for.

    `k_of_a`, `k_of_b`: where that is on each curve, in words. `low`, `high`: the 95 % bootstrap interval over
    questions, which are paired. Passes count as known.
    """

    metric: str
    a: str
    b: str
    passes: float
    of_a: float
    of_b: float
    k_of_a: str
    k_of_b: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class SampledComparison:
    """Evaluations with several sampled answers to the same questions.

    `labels`: a phrase for each, all different. `curves`: by metric, one for each evaluation that has it. `baseline`:
    the first evaluation that samples words alone, or else the first.
    """

    runs: list[ComparableRun]
    labels: list[str]
    curves: dict[str, list[Curve]]
    command: str

    @property
    def baseline(self) -> str:
        of_words = [label for label, run in zip(self.labels, self.runs, strict=True) if _samples_words_alone(run)]
        return (of_words or self.labels)[0]

    @cached_property
    def pairs(self) -> list[tuple[Curve, Curve, Difference | None]]:
        """Each other curve with that of the baseline, and their difference."""
        of_baseline = {name: of for name, curves in self.curves.items() for of in curves if of.label == self.baseline}
        return [
            (curve, base, difference(curve, base))
            for name, base in of_baseline.items() for curve in self.curves[name] if curve is not base
        ]  # fmt: skip

    @property
    def differences(self) -> list[Difference]:
        return [found for _, _, found in self.pairs if found]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All measured points: passes and value with its interval, for each metric, evaluation and k."""
        of_label = dict(zip(self.labels, self.runs, strict=True))
        rows = []
        for metric, curves in self.curves.items():
            for curve in curves:
                run = of_label[curve.label]
                for k, passes, values_Q in zip(curve.sizes, curve.passes_S, curve.values_QS.T, strict=True):
                    low, high = mean_interval(values_Q[None])
                    rows.append({
                        "metric": metric, "label": curve.label, "run": str(run.folder), "evaluation": run.name, "k": k,
                        "passes": float(passes), "value": float(values_Q.mean()), "low": low, "high": high,
                    })  # fmt: skip
        return rows

    def facts(self) -> dict[str, Any]:
        """The file of the questions, the baseline and the differences to it."""
        first = self.runs[0].evaluation
        shared = {key: first[key] for key in ("file", "sha256", "count", "seen")}
        return {**shared, "baseline": self.baseline, "differences": [asdict(each) for each in self.differences]}


def compare_sampled(config: TableConfig) -> SampledComparison:
    """Read the sampled evaluations that a configuration names. Raises ValueError if they cannot be compared."""
    runs = sampled_evaluations(config.runs, config.sampled)
    if len(runs) > MAX_EVALUATIONS:
        raise ValueError(
            f"{len(runs)} evaluations match sampled={config.sampled}; at most {MAX_EVALUATIONS} are compared at once: "
            f"{', '.join(f'{run.folder.name}/{run.name}' for run in runs)}. Narrow the pattern, or name fewer runs."
        )
    labels = _labels(runs)
    curves = [curve for label, run in zip(labels, runs, strict=True) for curve in _curves(label, run)]
    by_metric = {metric: [curve for curve in curves if curve.metric == metric] for metric in METRICS}
    return SampledComparison(runs, labels, {name: of for name, of in by_metric.items() if of}, command_of(config))


def difference(a: Curve, b: Curve) -> Difference | None:
    """The difference of two curves of one metric, on the same questions, at the most passes that both reach.

    None if one begins above the passes where the other one ends.
    """
    passes = float(min(a.passes_S[-1], b.passes_S[-1]))
    if not (a.reaches(passes) and b.reaches(passes)):
        return None
    a_Q, b_Q = a.at(passes), b.at(passes)
    interval = mean_interval((a_Q - b_Q)[None], lower_limit=-1.0)
    return Difference(
        a.metric, a.label, b.label, passes, float(a_Q.mean()), float(b_Q.mean()), a.place_of(passes),
        b.place_of(passes), float((a_Q - b_Q).mean()), *interval,
    )  # fmt: skip


def _curves(label: str, run: ComparableRun) -> list[Curve]:
    """The curves of one evaluation, from every answer that it wrote."""
    lines = predictions_file(run.record, run.name).read_text(encoding="utf-8").split("\n")
    answers = [json.loads(line)["answers"] for line in lines if line]
    task = TASKS[run.evaluation["judge"]]
    keys = [keys_of(task, [one["predicted"] for one in of]) for of in answers]
    right_QN = np.array([[float(one["correct"]) for one in of] for of in answers])
    rewards_QN = np.array([[one["reward"] for one in of] for of in answers]) if "reward" in answers[0][0] else None
    generating, scoring = (
        float(np.mean([one.get(key, 0) for of in answers for one in of])) for key in ("passes", "scoring_passes")
    )
    sizes = sizes_of(right_QN.shape[1])
    curves = []
    for metric, values_QS in values_at(keys, right_QN, rewards_QN).items():
        of_reward = [scoring * (metric == "best" and k > 1) for k in sizes]  # one answer needs no choice
        passes_S = np.array(sizes) * (generating + np.array(of_reward))
        curves.append(Curve(metric, label, sizes, passes_S, values_QS))
    return curves


def _labels(runs: Sequence[ComparableRun]) -> list[str]:
    """How the answers of each evaluation were drawn, with the run's name if there are several, all different."""
    several = len({run.folder.resolve() for run in runs}) > 1
    labels = [_drawn_how(run.evaluation) for run in runs]
    if several:
        labels = [f"{run.folder.resolve().name}: {label}" for run, label in zip(runs, labels, strict=True)]
    counts = Counter(labels)
    labels = [label if counts[label] == 1 else f"{label} ({run.name})" for run, label in zip(runs, labels, strict=True)]
    counts = Counter(labels)
    return [label if counts[label] == 1 else f"{label}, {run.folder}" for run, label in zip(runs, labels, strict=True)]


def _drawn_how(evaluation: dict[str, Any]) -> str:
    soft = evaluation.get("soft_thinking")
    how = describe_sampling(evaluation["sampling"])
    return f"Soft Thinking with {soft['top_k'] or 'all'} words, {how}" if soft else how


def _samples_words_alone(run: ComparableRun) -> bool:
    sampling = run.evaluation["sampling"]
    changes_thoughts = sampling["thought_noise"] or sampling.get("thought_dropout")
    return bool(sampling["temperature"] and not changes_thoughts and not run.evaluation.get("soft_thinking"))
