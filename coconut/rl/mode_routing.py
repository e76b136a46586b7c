"""Who chooses how to answer: the model itself, against routers that choose for it.

Shapes: Q questions, M modes, D numbers of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import nn

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import Prediction, evaluate
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import think
from coconut.runs.study import Study
from coconut.tasks import Task
from coconut.utils.torch_utils import seeded

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

Numbers = NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class ModeOutcomes:
    """What comes of every question in every mode, (Q, M) each.

    `tokens`: of language. `passes`: forward passes one after the other. `chances`: how likely the model takes the mode.
    """

    modes: tuple[str, ...]
    correct: Numbers
    tokens: Numbers
    passes: Numbers
    mode_probabilities: Numbers

    @property
    def chosen(self) -> NDArray[np.int64]:
        """(Q,) the mode that the model takes where it is not sampled."""
        return self.mode_probabilities.argmax(1)


def predict_in_each_mode(
    lm: LatentLM, task: Task, examples: Sequence[Example], **options: Any
) -> dict[str, list[Prediction]]:
    """Each example answered greedily in each mode; `options` are those of `evaluate`.

    A model without modes has one, the empty text.
    """
    return {
        mode: evaluate(lm, task, examples, mode=mode or None, **options).predictions
        for mode in lm.reasoning.modes or ("",)
    }


def mode_outcomes(lm: LatentLM, task: Task, examples: Sequence[Example], **options: Any) -> ModeOutcomes:
    """What comes of each example in each mode, greedily, and how likely the model would take it.

    `options` are those of `evaluate`.
    """
    return collect_outcomes(lm, examples, predict_in_each_mode(lm, task, examples, **options))


def collect_outcomes(lm: LatentLM, examples: Sequence[Example], forced: Mapping[str, list[Prediction]]) -> ModeOutcomes:
    """The outcomes of these predictions."""

    def table(name: str) -> Numbers:
        return np.array([[float(getattr(p, name)) for p in row] for row in forced.values()]).T

    chances = mode_probabilities(lm, examples) if lm.reasoning.modes else np.ones((len(examples), 1))
    return ModeOutcomes(tuple(forced), table("correct"), table("new_tokens"), table("passes"), chances)


@torch.no_grad()
def mode_probabilities(lm: LatentLM, examples: Sequence[Example], *, batch_size: int = 64) -> Numbers:
    """(Q, M) how likely the model's first token is that of each mode, among them."""
    controls = [lm.special.control[mode] for mode in lm.reasoning.modes]
    states_QD = question_states(lm, examples, batch_size=batch_size).to(lm.device, lm.base.dtype)
    return lm.logits(states_QD)[:, controls].double().softmax(1).cpu().numpy()


def question_states(lm: LatentLM, examples: Sequence[Example], *, batch_size: int = 64) -> torch.Tensor:
    """(Q, D) the states from which the model chooses its mode, float32, on the CPU."""
    rows = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    found: dict[int, torch.Tensor] = {}
    for places in longest_first(rows, batch_size):
        ids, mask = pad_rows([rows[place] for place in places], lm.special.pad)
        found |= zip(places, think(lm, ids.to(lm.device), mask.to(lm.device), 0).states.float().cpu(), strict=True)
    return torch.stack([found[place] for place in range(len(rows))])


def cheapest_right(known: ModeOutcomes) -> NDArray[np.int64]:
    """(Q,) of the modes that are right the one with fewest passes; where none is, the one with fewest."""
    return np.where(known.correct > 0, known.passes, known.passes + known.passes.max() + 1).argmin(1)


class Classifier:
    """One hidden layer on the model's state after a question, fitted to name the cheapest mode that is right."""

    def __init__(
        self, states_QD: torch.Tensor, known: ModeOutcomes, *, hidden: int = 64, steps: int = 300, seed: int = 0
    ):
        self.mean, self.scale = states_QD.mean(0), states_QD.std(0) + 1e-6
        with seeded(seed):
            self.net = nn.Sequential(
                nn.Linear(states_QD.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, len(known.modes))
            )
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, weight_decay=1e-2)
        targets_Q = torch.from_numpy(cheapest_right(known))
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net((states_QD - self.mean) / self.scale), targets_Q).backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, states_QD: torch.Tensor) -> NDArray[np.int64]:
        """(Q,)"""
        return self.net((states_QD - self.mean) / self.scale).argmax(1).numpy()


def router_distributions(known: ModeOutcomes, classified: NDArray[np.int64] | None = None) -> dict[str, Numbers]:
    """(Q, M) each: how likely a router takes each mode. `classified` (Q,): what a classifier says."""
    one_M = np.eye(len(known.modes))
    own = one_M[known.chosen]
    found = {"the model": own}
    found |= {f"always {mode}": np.tile(one, (len(own), 1)) for mode, one in zip(known.modes, one_M, strict=True)}
    found["at random, as often"] = np.tile(own.mean(0), (len(own), 1))
    if classified is not None:
        found["classifier"] = one_M[classified]
    return {**found, "oracle": one_M[cheapest_right(known)]}


@dataclass(frozen=True)
class RoutingResult:
    """Expected values over the questions. `interval`: of the accuracy, 95 %; Wilson's, or where a router takes its mode
    by chance that of questions drawn anew.
    """

    accuracy: float
    interval: tuple[float, float]
    tokens: float
    passes: float
    shares: dict[str, float]


def compare_routers(known: ModeOutcomes, by: Mapping[str, Numbers], seed: int = 0) -> dict[str, RoutingResult]:
    """What each of the routers comes to on the same questions."""
    Q = len(known.chosen)
    draws_RQ = np.random.default_rng(seed).integers(Q, size=(RESAMPLES, Q))
    found = {}
    for name, route_QM in by.items():
        right_Q = (route_QM * known.correct).sum(1)
        if set(np.unique(route_QM)) <= {0.0, 1.0}:
            wilson = binomtest(round(right_Q.sum()), Q).proportion_ci(method="wilson")
            low, high = wilson.low, wilson.high
        else:
            low, high = np.quantile(right_Q[draws_RQ].mean(1), [0.025, 0.975])
        found[name] = RoutingResult(
            accuracy=float(right_Q.mean()),
            interval=(float(low), float(high)),
            tokens=float((route_QM * known.tokens).sum(1).mean()),
            passes=float((route_QM * known.passes).sum(1).mean()),
            shares=dict(zip(known.modes, route_QM.mean(0).tolist(), strict=True)),
        )
    return found


def mode_metrics(known: ModeOutcomes, rows: NDArray[np.int64]) -> dict[str, float]:
    """Of these questions, for each mode: how often it is chosen, how likely it is, how often it is right if forced."""
    found: dict[str, float] = {}
    for number, mode in enumerate(known.modes if known.modes != ("",) else ()):
        found |= {
            f"share_{mode}": float((known.chosen[rows] == number).mean()),
            f"chance_{mode}": float(known.mode_probabilities[rows, number].mean()),
            f"accuracy_{mode}": float(known.correct[rows, number].mean()),
        }
    return found


def metrics_by_steps(known: ModeOutcomes, examples: Sequence[Example]) -> list[dict[str, float]]:
    """`of_modes` for the questions of each number of steps, which is how hard they are."""
    steps_Q = np.array([len(example.steps) for example in examples])
    return [
        {"steps": int(n), "count": int((steps_Q == n).sum()), **mode_metrics(known, np.flatnonzero(steps_Q == n))}
        for n in np.unique(steps_Q)
    ]


def choice_studies(
    lm: LatentLM, task: Task, examples: Sequence[Example], fitted_on: Sequence[Example], **options: Any
) -> list[Study]:
    """Who chooses best on these questions, and what the model chooses where.

    A classifier is fitted on other questions. `options` are those of `evaluate`.
    """
    known, others = mode_outcomes(lm, task, examples, **options), mode_outcomes(lm, task, fitted_on, **options)
    classified = Classifier(question_states(lm, fitted_on), others)(question_states(lm, examples))
    found = compare_routers(known, router_distributions(known, classified))
    rows = [
        {
            "router": name,
            "accuracy": row.accuracy,
            "low": row.interval[0],
            "high": row.interval[1],
            "new_tokens": row.tokens,
            "passes": row.passes,
            **{f"share_{mode}": share for mode, share in row.shares.items()},
        }
        for name, row in found.items()
    ]
    return [
        Study("routers", rows, {"modes": list(known.modes), "fitted_on": len(fitted_on)}),
        Study("difficulty", metrics_by_steps(known, examples), {"modes": list(known.modes)}),
    ]
