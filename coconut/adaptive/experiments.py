"""Experiments: policies trained on a few questions of a table of outcomes, compared with baselines on the others.

Shapes: S seeds, Q questions, T of them for training and U for the test, C configurations, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from coconut.adaptive.config import PolicyConfig
from coconut.adaptive.outcome_table import OutcomeTable
from coconut.adaptive.policy import LearningResult, distances, entropies, learn
from coconut.runs.study import Study

POINTS = 60  # the most points of a curve
BEST_FIXED, POLICY, ORACLE = "best fixed", "policy", "oracle"


@dataclass(frozen=True)
class Arm:
    """The results of one chooser, (S, U) each; expected values for one that chooses at random.

    `numbers`: the chosen configurations; none for one that chooses at random.
    """

    reward: NDArray[np.float32]
    correct: NDArray[np.float32]
    passes: NDArray[np.float32]
    numbers: NDArray[np.int64]


@dataclass(frozen=True)
class Experiments:
    """Trained policies with the results of all arms. `train` (S, T), `test` (S, U): indices of the questions."""

    table: OutcomeTable
    cost: float
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    arms: dict[str, Arm]
    learned: LearningResult


def run_experiments(
    table: OutcomeTable, config: PolicyConfig, *, cost: float, default: int, num_train_questions: int, seeds: int,
    seed: int = 0,
) -> Experiments:  # fmt: skip
    """Train a policy for each seed on `num_train_questions` random questions, and compare it on the others with:

    random: every configuration equally often.
    default: the configuration with number `default`.
    best fixed: the configuration with the best mean reward on the training questions, from all their outcomes.
    blind policy: a policy whose embeddings are zero.
    NAME alone: a policy of one dimension; the others are as in best fixed.
    oracle: the best configuration of each test question.
    """
    space, rewards = table.space, table.rewards(cost)
    orders = np.stack([np.random.default_rng([seed, s]).permutation(len(table.questions)) for s in range(seeds)])
    train, test = orders[:, :num_train_questions], orders[:, num_train_questions:]
    fixed_S = rewards[train].mean(1).argmax(1)
    embeddings, rewards_STC = torch.from_numpy(table.embeddings), torch.from_numpy(rewards[train])
    train_embeddings, test_embeddings = embeddings[torch.from_numpy(train)], embeddings[torch.from_numpy(test)]

    def arm(numbers: NDArray[Any]) -> Arm:
        return Arm(rewards[test, numbers], table.correct[test, numbers], table.passes[test, numbers], numbers)

    def fixed_arm(number_S: NDArray[np.int64]) -> Arm:
        return arm(np.broadcast_to(number_S[:, None], test.shape))

    def greedy(learned: LearningResult, questions: torch.Tensor) -> NDArray[np.int64]:
        return learned.policy.best(questions).numpy()

    means = [values.mean(1)[test] for values in (rewards, table.correct, table.passes)]
    random = Arm(*means, numbers=np.empty(0, np.int64))
    arms = {"random": random, "default": fixed_arm(np.full(seeds, default)), BEST_FIXED: fixed_arm(fixed_S)}
    learned = learn(space, train_embeddings, rewards_STC, config, seed=seed)
    blind = learn(space, torch.zeros_like(train_embeddings), rewards_STC, config, seed=seed)
    arms["blind policy"] = arm(greedy(blind, torch.zeros_like(test_embeddings)))
    indices_S = [torch.from_numpy(indices) for indices in np.unravel_index(fixed_S, space.sizes)]
    for j, name in enumerate(space.names if len(space.names) > 1 else ()):
        fixed = [None if i == j else indices for i, indices in enumerate(indices_S)]
        single = learn(space, train_embeddings, rewards_STC, config, seed=seed, fixed=fixed)
        own_indices = np.unravel_index(greedy(single, test_embeddings), space.sizes)[j]
        index_arrays = [own_indices if i == j else np.broadcast_to(indices.numpy()[:, None], test.shape)
                 for i, indices in enumerate(indices_S)]  # fmt: skip
        arms[f"{name} alone"] = arm(space.number(index_arrays))
    arms[POLICY] = arm(greedy(learned, test_embeddings))
    arms[ORACLE] = arm(np.asarray(rewards.argmax(1))[test])
    return Experiments(table, cost, train, test, arms, learned)


def mean_and_interval(values_S: NDArray[Any]) -> tuple[float, float, float]:
    """The mean over seeds with Student's 95 % interval."""
    mean, S = float(values_S.mean()), len(values_S)
    half = float(student.ppf(0.975, S - 1) * values_S.std(ddof=1) / S**0.5)
    return mean, mean - half, mean + half


def arms_study(results: Experiments) -> Study:
    """A row for each arm: the mean over seeds, the gain over the best fixed configuration, and 95 % intervals."""
    best = results.arms[BEST_FIXED].reward.mean(1)
    rows = []
    for name, arm in results.arms.items():
        reward_S = arm.reward.mean(1)
        reward, low, high = mean_and_interval(reward_S)
        more, more_low, more_high = mean_and_interval(reward_S - best)
        rows.append({
            "arm": name, "reward": reward, "low": low, "high": high, "more": more, "more_low": more_low,
            "more_high": more_high, "seeds_above": int((reward_S > best).sum()),
            "accuracy": float(arm.correct.mean()), "passes": float(arm.passes.mean()),
        })  # fmt: skip
    S, T = results.train.shape
    row = {row["arm"]: row for row in rows}
    numbers = results.arms[BEST_FIXED].numbers
    common = int(np.bincount(numbers[:, 0]).argmax())
    facts = {
        "questions": len(results.table.questions), "configurations": len(results.table.space), "seeds": S,
        "num_train_questions": T, "cost": results.cost, "headroom": row[ORACLE]["more"],
        "headroom_interval": [row[ORACLE]["more_low"], row[ORACLE]["more_high"]],
        "best_fixed": results.table.space.label(common), "best_fixed_seeds": int((numbers[:, 0] == common).sum()),
        "tried": float(results.learned.tried.mean()), "known_to_best_fixed": T * len(results.table.space),
    }  # fmt: skip
    return Study("arms", rows, facts)


def curve_study(results: Experiments) -> Study:
    """Learning curves: reward, regret (to the best configuration of each question) and entropies over updates.

    Facts: the regret per question of best fixed and random on the training questions.
    """
    learned, space = results.learned, results.table.space
    rewards_STC = results.table.rewards(results.cost)[results.train]
    best_ST = rewards_STC.max(-1)
    each = np.arange(len(results.train))[None, :, None]
    regret_US = best_ST[each, learned.questions].mean(-1) - learned.rewards
    updates = len(regret_US)
    edges = np.unique(np.linspace(0, updates, min(POINTS, updates) + 1).round().astype(int))
    rows = []
    for first, last in pairwise(edges):
        part = slice(first, last)
        row = {"update": (first + last + 1) / 2, "reward": float(learned.rewards[part].mean())}
        regret, low, high = mean_and_interval(regret_US[part].mean(0))
        row |= {"regret": regret, "low": low, "high": high}
        entropy = learned.entropy[part].mean((0, 1))
        rows.append(row | {f"entropy_{name}": float(e) for name, e in zip(space.names, entropy, strict=True)})
    facts = {
        "best_fixed": float((best_ST.mean(1) - rewards_STC.mean(1).max(1)).mean()),
        "random": float((best_ST - rewards_STC.mean(-1)).mean()),
        "total": float(regret_US.sum(0).mean()),
        "names": list(space.names),
    }
    return Study("curve", rows, facts)


def heads_study(results: Experiments) -> Study:
    """For each dimension, on test questions: entropy of the policies and distance between the distributions of two
    questions, at the final temperature; and how often two questions get different values.
    """
    space = results.table.space
    test_embeddings = torch.from_numpy(results.table.embeddings)[torch.from_numpy(results.test)]
    probabilities = results.learned.policy.probabilities(test_embeddings, results.learned.temperature)
    each = np.unravel_index(results.arms[POLICY].numbers, space.sizes)
    differing = [float(np.mean([1 - ((np.bincount(row) / len(row)) ** 2).sum() for row in rows])) for rows in each]
    entropy, distance = (values.mean(0).tolist() for values in (entropies(probabilities), distances(probabilities)))
    rows = [
        {"dimension": name, "values": size, "entropy": e, "distance": far, "differing": share}
        for name, size, e, far, share in zip(space.names, space.sizes, entropy, distance, differing, strict=True)
    ]
    return Study("heads", rows)


def choices_study(results: Experiments) -> Study:
    """For questions of each number of steps: the policies' most frequent configuration, and results of three arms."""
    table, space = results.table, results.table.space
    steps_SU = table.steps[results.test]
    rows = []
    for steps in np.unique(steps_SU):
        mask = steps_SU == steps
        counts = np.bincount(results.arms[POLICY].numbers[mask])
        row = {"steps": int(steps), "questions": int((table.steps == steps).sum()),
               "takes": space.label(int(counts.argmax())), "share": float(counts.max() / counts.sum())}  # fmt: skip
        for arm_name in (BEST_FIXED, POLICY, ORACLE):
            key, arm = arm_name.replace(" ", "_"), results.arms[arm_name]
            values = {"reward": arm.reward, "accuracy": arm.correct, "passes": arm.passes}
            row |= {f"{key}_{name}": float(value[mask].mean()) for name, value in values.items()}
        rows.append(row)
    return Study("choices", rows)


def studies(results: Experiments) -> dict[str, Study]:
    """All studies by name."""
    made = arms_study(results), curve_study(results), heads_study(results), choices_study(results)
    return {study.name: study for study in made}
