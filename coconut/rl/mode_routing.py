"""Mode routing: the hybrid model's own choice of a mode, compared with routers that choose for it.

Shapes: Q questions, M modes, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import Prediction, evaluate, wilson_interval
from coconut.generation.generate import longest_first, pad_rows
from coconut.generation.thoughts import think
from coconut.rewards.aggregation import bootstrap_interval
from coconut.runs.study import Study
from coconut.tasks import Task
from coconut.utils.torch_utils import seeded

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

Numbers = NDArray[np.float64]
HIDDEN, FITTING_STEPS = 64, 300  # of the classifier


@dataclass(frozen=True)
class ModeOutcomes:
    """Outcomes of every question in every mode, (Q, M) each.

    tokens: new tokens. passes: sequential forward passes. mode_probabilities: of the mode under the model.
    """

    modes: tuple[str, ...]
    correct: Numbers
    tokens: Numbers
    passes: Numbers
    mode_probabilities: Numbers

    @property
    def chosen(self) -> NDArray[np.int64]:
        """(Q,) the model's greedy choice of a mode."""
        return self.mode_probabilities.argmax(1)


def predict_in_each_mode(
    lm: LatentLM, task: Task, examples: Sequence[Example], **options: Any
) -> dict[str, list[Prediction]]:
    """Greedy predictions for each example in each mode; `options` are those of `evaluate`.

    A model without modes has one, named by the empty string.
    """
    modes = lm.reasoning.modes or ("",)
    return {mode: evaluate(lm, task, examples, mode=mode or None, **options).predictions for mode in modes}


def mode_outcomes(lm: LatentLM, task: Task, examples: Sequence[Example], **options: Any) -> ModeOutcomes:
    """The outcomes of each example in each mode, by greedy decoding; `options` are those of `evaluate`."""
    return collect_outcomes(lm, examples, predict_in_each_mode(lm, task, examples, **options))


def collect_outcomes(lm: LatentLM, examples: Sequence[Example], forced: Mapping[str, list[Prediction]]) -> ModeOutcomes:
    """The outcomes of given predictions in each mode, with the model's mode probabilities."""

    def table(name: str) -> Numbers:
        return np.array([[float(getattr(p, name)) for p in row] for row in forced.values()]).T

    chances = mode_probabilities(lm, examples) if lm.reasoning.modes else np.ones((len(examples), 1))
    return ModeOutcomes(tuple(forced), table("correct"), table("new_tokens"), table("passes"), chances)


@torch.no_grad()
def mode_probabilities(lm: LatentLM, examples: Sequence[Example], *, batch_size: int = 64) -> Numbers:
    """(Q, M) probabilities of the control tokens, normalized over the modes."""
    controls = [lm.special.control[mode] for mode in lm.reasoning.modes]
    states_QD = question_states(lm, examples, batch_size=batch_size).to(lm.device, lm.base.dtype)
    return lm.logits(states_QD)[:, controls].double().softmax(1).cpu().numpy()


def question_states(lm: LatentLM, examples: Sequence[Example], *, batch_size: int = 64) -> torch.Tensor:
    """(Q, D) the hidden states that predict the control token, float32, on the CPU."""
    rows = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
    states: dict[int, torch.Tensor] = {}
    for indices in longest_first(rows, batch_size):
        ids, mask = pad_rows([rows[index] for index in indices], lm.special.pad)
        states |= zip(indices, think(lm, ids.to(lm.device), mask.to(lm.device), 0).states.float().cpu(), strict=True)
    return torch.stack([states[index] for index in range(len(rows))])


def cheapest_right(outcomes: ModeOutcomes) -> NDArray[np.int64]:
    """(Q,) the right mode with the fewest passes; where none is right, the mode with the fewest."""
    return np.where(outcomes.correct > 0, outcomes.passes, outcomes.passes + outcomes.passes.max() + 1).argmin(1)


class RouterClassifier:
    """A router with one hidden layer on `question_states`, fitted to predict `cheapest_right`."""

    def __init__(self, states_QD: torch.Tensor, outcomes: ModeOutcomes):
        self.mean, self.scale = states_QD.mean(0), states_QD.std(0) + 1e-6
        with seeded(0):
            self.net = nn.Sequential(
                nn.Linear(states_QD.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(outcomes.modes))
            )
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2, weight_decay=1e-2)
        targets_Q = torch.from_numpy(cheapest_right(outcomes))
        for _ in range(FITTING_STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net((states_QD - self.mean) / self.scale), targets_Q).backward()
            optimizer.step()

    @torch.no_grad()
    def __call__(self, states_QD: torch.Tensor) -> NDArray[np.int64]:
        """(Q,) the index of the mode for each question."""
        return self.net((states_QD - self.mean) / self.scale).argmax(1).numpy()


def router_distributions(outcomes: ModeOutcomes, classified: NDArray[np.int64] | None = None) -> dict[str, Numbers]:
    """For each router, (Q, M) the probability that it takes each mode. `classified` (Q,): a classifier's modes."""
    one_MM = np.eye(len(outcomes.modes))
    own_QM = one_MM[outcomes.chosen]
    constant = {f"always {mode}": one_M for mode, one_M in zip(outcomes.modes, one_MM, strict=True)}
    constant["at random, as often"] = own_QM.mean(0)
    routers = {"the model": own_QM, **{name: np.tile(row_M, (len(own_QM), 1)) for name, row_M in constant.items()}}
    if classified is not None:
        routers["classifier"] = one_MM[classified]
    return {**routers, "oracle": one_MM[cheapest_right(outcomes)]}


def compare_routers(outcomes: ModeOutcomes, routers: Mapping[str, Numbers]) -> list[dict[str, Any]]:
    """A row for each router, (Q, M) probabilities of the modes, with expected values over the same questions.

    low, high: the 95 % interval of the accuracy, Wilson's; for a router that chooses at random, a bootstrap over
    questions.
    """
    rows = []
    for name, route_QM in routers.items():
        right_Q = (route_QM * outcomes.correct).sum(1)
        if set(np.unique(route_QM)) <= {0.0, 1.0}:
            low, high = wilson_interval(round(right_Q.sum()), len(right_Q))
        else:
            low, high = bootstrap_interval(right_Q)
        tokens, passes = (float((route_QM * each).sum(1).mean()) for each in (outcomes.tokens, outcomes.passes))
        row = {"router": name, "accuracy": float(right_Q.mean()), "low": low, "high": high, "new_tokens": tokens}
        shares = zip(outcomes.modes, route_QM.mean(0).tolist(), strict=True)
        rows.append(row | {"passes": passes, **{f"share_{mode}": share for mode, share in shares}})
    return rows


def mode_metrics(outcomes: ModeOutcomes, rows: NDArray[np.int64]) -> dict[str, float]:
    """For each mode, over the questions in `rows`: share of choices, mean probability, and accuracy if forced."""
    metrics: dict[str, float] = {}
    for number, mode in enumerate(outcomes.modes if outcomes.modes != ("",) else ()):
        metrics |= {
            f"share_{mode}": float((outcomes.chosen[rows] == number).mean()),
            f"chance_{mode}": float(outcomes.mode_probabilities[rows, number].mean()),
            f"accuracy_{mode}": float(outcomes.correct[rows, number].mean()),
        }
    return metrics


def metrics_by_steps(outcomes: ModeOutcomes, examples: Sequence[Example]) -> list[dict[str, float]]:
    """`mode_metrics` of the questions with each number of steps, a measure of their difficulty."""
    steps_Q = np.array([len(example.steps) for example in examples])
    return [
        {"steps": int(n), "count": int((steps_Q == n).sum()), **mode_metrics(outcomes, np.flatnonzero(steps_Q == n))}
        for n in np.unique(steps_Q)
    ]


def choice_studies(
    lm: LatentLM, task: Task, examples: Sequence[Example], fitted_on: Sequence[Example], **options: Any
) -> list[Study]:
    """Two studies: the model's choice of modes against routers, and its choices by number of steps.

    The classifier is fitted on `fitted_on`. `options` are those of `evaluate`.
    """
    outcomes = mode_outcomes(lm, task, examples, **options)
    classifier = RouterClassifier(question_states(lm, fitted_on), mode_outcomes(lm, task, fitted_on, **options))
    classified = classifier(question_states(lm, examples))
    rows, modes = compare_routers(outcomes, router_distributions(outcomes, classified)), list(outcomes.modes)
    return [
        Study("routers", rows, {"modes": modes, "fitted_on": len(fitted_on)}),
        Study("difficulty", metrics_by_steps(outcomes, examples), {"modes": modes}),
    ]
