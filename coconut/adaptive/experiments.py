"""What a policy is worth: many times, it learns from a few questions of a table, and is set against others on the rest.

Shapes: S seeds, Q questions, T of them to learn from and U for the test, C configurations, D numbers of an embedding.
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
from coconut.adaptive.policy import Learned, distances, entropies, learn
from coconut.runs.study import Study

POINTS = 60  # of a curve
BEST_FIXED, POLICY, ORACLE = "best fixed", "policy", "oracle"


@dataclass(frozen=True)
class Arm:
    """One way to choose, (S, U) each: expected values where it chooses by chance. `numbers`: what it takes, if it is
    one configuration for each question.
    """

    name: str
    reward: NDArray[np.float32]
    correct: NDArray[np.float32]
    passes: NDArray[np.float32]
    numbers: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Experiments:
    """`train` (S, T) and `test` (S, U) are the places of the questions."""

    table: OutcomeTable
    cost: float
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    arms: list[Arm]
    learned: Learned

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def split(questions: int, few: int, seeds: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each seed `few` questions to learn from, and the others."""
    refuse_few(few, questions)
    orders = np.stack([np.random.default_rng([seed, s]).permutation(questions) for s in range(seeds)])
    return orders[:, :few], orders[:, few:]


def refuse_few(few: int, questions: int) -> None:
    """Raises ValueError if so many to learn from leave no question for the test."""
    if few >= questions:
        raise ValueError(
            f"num_train_questions={few} leaves none of {questions} questions for the test. Lower it, or raise limit."
        )


def run_experiments(
    table: OutcomeTable, config: PolicyConfig, *, cost: float, default: int, few: int, seeds: int, seed: int = 0
) -> Experiments:
    """Policies that learn from `few` questions each, and beside them, on the same test questions:

    random: every configuration equally often. default. best fixed: the configuration that is best on the questions to
    learn from, of which all outcomes are known to it. blind: a policy that is shown no question. NAME alone: a policy
    of one dimension, with the others as in the best fixed. oracle: for each question what is best there.
    """
    space, rewards = table.space, table.rewards(cost)
    train, test = split(len(table.questions), few, seeds, seed)
    fixed_S = rewards[train].mean(1).argmax(1)
    embeddings, rewards_STC = torch.from_numpy(table.embeddings), torch.from_numpy(rewards[train])
    known, unknown = embeddings[torch.from_numpy(train)], embeddings[torch.from_numpy(test)]

    def at(name: str, numbers: NDArray[Any]) -> Arm:
        return Arm(name, rewards[test, numbers], table.correct[test, numbers], table.passes[test, numbers], numbers)

    def everywhere(name: str, number_S: NDArray[np.int64]) -> Arm:
        return at(name, np.broadcast_to(number_S[:, None], test.shape))

    def chosen(learned: Learned, questions: torch.Tensor) -> NDArray[np.int64]:
        return learned.policy.best(questions).numpy()

    means = [values.mean(1)[test] for values in (rewards, table.correct, table.passes)]
    arms = [
        Arm("random", *means),
        everywhere("default", np.full(seeds, default)),
        everywhere(BEST_FIXED, fixed_S),
    ]
    learned = learn(space, known, rewards_STC, config, seed=seed)
    blind = learn(space, torch.zeros_like(known), rewards_STC, config, seed=seed)
    arms.append(at("blind policy", chosen(blind, torch.zeros_like(unknown))))
    places_S = [torch.from_numpy(places) for places in np.unravel_index(fixed_S, space.sizes)]
    for j, name in enumerate(space.names if len(space.names) > 1 else ()):
        fixed = [None if i == j else places for i, places in enumerate(places_S)]
        alone = learn(space, known, rewards_STC, config, seed=seed, fixed=fixed)
        own = np.unravel_index(chosen(alone, unknown), space.sizes)[j]
        taken = [own if i == j else np.broadcast_to(places.numpy()[:, None], test.shape)
                 for i, places in enumerate(places_S)]  # fmt: skip
        arms.append(at(f"{name} alone", space.number(taken)))
    arms.append(at(POLICY, chosen(learned, unknown)))
    arms.append(at(ORACLE, np.asarray(rewards.argmax(1))[test]))
    return Experiments(table, cost, train, test, arms, learned)


def mean_and_interval(values_S: NDArray[Any]) -> tuple[float, float, float]:
    """Of the seeds: the mean and Student's 95 % interval."""
    mean, S = float(values_S.mean()), len(values_S)
    half = float(student.ppf(0.975, S - 1) * values_S.std(ddof=1) / S**0.5)
    return mean, mean - half, mean + half


def arms_study(found: Experiments) -> Study:
    """A row an arm: mean over the seeds with 95 % intervals, and the gain over the best fixed configuration."""
    best = found.arm(BEST_FIXED).reward.mean(1)
    rows = []
    for arm in found.arms:
        reward_S = arm.reward.mean(1)
        reward, low, high = mean_and_interval(reward_S)
        more, more_low, more_high = mean_and_interval(reward_S - best)
        rows.append(
            {
                "arm": arm.name, "reward": reward, "low": low, "high": high, "more": more, "more_low": more_low,
                "more_high": more_high, "seeds_above": int((reward_S > best).sum()),
                "accuracy": float(arm.correct.mean()), "passes": float(arm.passes.mean()),
            }
        )  # fmt: skip
    S, T = found.train.shape
    row = {row["arm"]: row for row in rows}
    numbers = found.arm(BEST_FIXED).numbers
    assert numbers is not None
    common = int(np.bincount(numbers[:, 0]).argmax())
    facts = {
        "questions": len(found.table.questions), "configurations": len(found.table.space), "seeds": S, "few": T,
        "cost": found.cost, "headroom": row[ORACLE]["more"],
        "headroom_interval": [row[ORACLE]["more_low"], row[ORACLE]["more_high"]],
        "best_fixed": found.table.space.label(common), "best_fixed_seeds": int((numbers[:, 0] == common).sum()),
        "tried": float(found.learned.tried.mean()), "known_to_best_fixed": T * len(found.table.space),
    }  # fmt: skip
    return Study("arms", rows, facts)


def curve_study(found: Experiments) -> Study:
    """What the policies got while they learned: reward, regret (how much less than each question's best) and entropy.

    Facts: the regret of the others on the questions to learn from, per question.
    """
    learned, space = found.learned, found.table.space
    rewards = found.table.rewards(found.cost)
    rewards_STC = rewards[found.train]
    best_ST = rewards_STC.max(-1)
    each = np.arange(len(found.train))[None, :, None]
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


def heads_study(found: Experiments) -> Study:
    """Of each dimension, on test questions: how undecided the policies are and how far apart the distributions of two
    questions lie, at the temperature at which they ended; and how often two questions are given different values.
    """
    table, policy = found.table, found.learned.policy
    unknown = torch.from_numpy(table.embeddings)[torch.from_numpy(found.test)]
    shown = policy.probabilities(unknown, found.learned.temperature)
    taken = found.arm(POLICY).numbers
    assert taken is not None
    each = np.unravel_index(taken, table.space.sizes)
    differing = [float(np.mean([1 - ((np.bincount(row) / len(row)) ** 2).sum() for row in rows])) for rows in each]
    entropy, distance = (values.mean(0).tolist() for values in (entropies(shown), distances(shown)))
    rows = [
        {"dimension": d.name, "values": len(d.values), "entropy": e, "distance": far, "differing": share}
        for d, e, far, share in zip(table.space.dimensions, entropy, distance, differing, strict=True)
    ]
    return Study("heads", rows)


def choices_study(found: Experiments) -> Study:
    """For questions of each number of steps: what the policies take most often, and what comes of it."""
    table, space, best = found.table, found.table.space, found.arm(BEST_FIXED)
    policy, oracle = found.arm(POLICY), found.arm(ORACLE)
    steps_SU = table.steps[found.test]
    assert policy.numbers is not None
    rows = []
    for steps in np.unique(table.steps):
        at = steps_SU == steps
        if not at.any():
            continue
        counts = np.bincount(policy.numbers[at], minlength=len(space))
        most = int(counts.argmax())
        row = {"steps": int(steps), "questions": int((table.steps == steps).sum()), "takes": space.label(most),
               "share": float(counts[most] / counts.sum())}  # fmt: skip
        for arm in (best, policy, oracle):
            key = arm.name.replace(" ", "_")
            values = {"reward": arm.reward, "accuracy": arm.correct, "passes": arm.passes}
            row |= {f"{key}_{name}": float(value[at].mean()) for name, value in values.items()}
        rows.append(row)
    return Study("choices", rows)


def studies(found: Experiments) -> list[Study]:
    return [arms_study(found), curve_study(found), heads_study(found), choices_study(found)]
