"""The hybrid model's choice of a mode compared with routers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import EXAMPLES, MODES, TASK, hybrid

from coconut.evaluation.evaluator import evaluate
from coconut.rl.mode_routing import (
    ModeOutcomes,
    RouterClassifier,
    cheapest_right,
    compare_routers,
    mode_outcomes,
    question_states,
    router_distributions,
)

KNOWN = ModeOutcomes(
    modes=("short", "think"),
    correct=np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
    tokens=np.array([[1.0, 9.0]] * 4),
    passes=np.array([[2.0, 10.0]] * 4),
    mode_probabilities=np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.1, 0.9]]),
)


def by_name(outcomes: ModeOutcomes, classified: Any = None) -> dict[str, dict[str, Any]]:
    rows = compare_routers(outcomes, router_distributions(outcomes, classified))
    return {row["router"]: row for row in rows}


def test_compare_routers_by_hand() -> None:
    assert cheapest_right(KNOWN).tolist() == [0, 1, 0, 0]
    found = by_name(KNOWN, np.array([1, 1, 0, 0]))
    expected = {
        "the model": (0.5, 7.0, 8.0), "always short": (0.5, 1.0, 2.0), "always think": (0.5, 9.0, 10.0),
        "at random, as often": (0.5, 7.0, 8.0), "classifier": (0.75, 5.0, 6.0), "oracle": (0.75, 3.0, 4.0),
    }  # fmt: skip
    assert {name: (row["accuracy"], row["new_tokens"], row["passes"]) for name, row in found.items()} == expected
    for router in ("the model", "at random, as often"):
        assert (found[router]["share_short"], found[router]["share_think"]) == (0.25, 0.75)
    assert 0 <= found["oracle"]["low"] < 0.75 < found["oracle"]["high"] <= 1
    assert "classifier" not in router_distributions(KNOWN)


def test_random_router_equals_independent_draws() -> None:
    random = np.random.default_rng(0)
    correct = (random.random((500, 3)) < [0.3, 0.6, 0.9]).astype(np.float64)
    known = ModeOutcomes(tuple(MODES), correct, np.ones((500, 3)), np.ones((500, 3)), random.random((500, 3)))
    shares = np.bincount(known.chosen, minlength=3) / 500
    drawn = random.choice(3, p=shares, size=(2000, 500))
    assert by_name(known)["at random, as often"]["accuracy"] == pytest.approx(
        correct[np.arange(500), drawn].mean(), abs=5e-3
    )


@pytest.mark.slow
def test_mode_outcomes_equal_evaluations() -> None:
    lm = hybrid()
    known = mode_outcomes(lm, TASK, EXAMPLES, batch_size=2)
    for number, mode in enumerate(MODES):
        result, *_ = evaluate(lm, TASK, EXAMPLES, mode=mode)
        always = by_name(known)[f"always {mode}"]
        assert (always["new_tokens"], always["passes"]) == pytest.approx((result.mean_new_tokens, result.passes))
        assert always[f"share_{mode}"] == 1
        assert known.tokens[:, number].mean() == pytest.approx(result.mean_new_tokens)
    own, *_ = evaluate(lm, TASK, EXAMPLES)
    model = by_name(known)["the model"]
    assert model["passes"] == pytest.approx(own.passes)
    assert {mode: model[f"share_{mode}"] for mode in MODES} == pytest.approx(own.modes)


@pytest.mark.slow
def test_question_states_give_the_models_choice() -> None:
    lm = hybrid()
    found = question_states(lm, EXAMPLES, batch_size=2)
    controls = [lm.special.control[mode] for mode in MODES]
    chosen = lm.logits(found.to(torch.float64))[:, controls].argmax(1).tolist()
    assert chosen == mode_outcomes(lm, TASK, EXAMPLES).chosen.tolist()
    assert [MODES[number] for number in chosen] == [p.mode for p in evaluate(lm, TASK, EXAMPLES).predictions]


def test_classifier_learns_the_cheapest_right_mode() -> None:
    torch.manual_seed(0)
    states_QD = torch.randn(600, 8)
    hard = (states_QD[:, 0] > 0).numpy()
    tokens, passes, probabilities = (np.tile(row, (600, 1)) for row in ([1.0, 9.0], [2.0, 10.0], [0.9, 0.1]))
    correct = np.stack([~hard, np.ones(600)], 1).astype(float)
    known = ModeOutcomes(("short", "think"), correct, tokens, passes, probabilities)
    before = torch.random.get_rng_state()
    said = RouterClassifier(states_QD, known)(torch.tensor([[3.0, *[0.0] * 7], [-3.0, *[0.0] * 7]]))
    assert said.tolist() == [1, 0]
    assert torch.equal(torch.random.get_rng_state(), before)
