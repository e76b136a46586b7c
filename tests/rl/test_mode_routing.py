"""The model's own choice of a mode against routers that choose for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import EXAMPLES, MODES, TASK, hybrid

from coconut.evaluation.evaluator import evaluate
from coconut.rl.mode_routing import Classifier, ModeOutcomes, cheapest_right, compare, outcomes, routes, states

KNOWN = ModeOutcomes(
    modes=("short", "think"),
    correct=np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
    tokens=np.array([[1.0, 9.0]] * 4),
    passes=np.array([[2.0, 10.0]] * 4),
    chances=np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.1, 0.9]]),
)


def test_by_hand() -> None:
    assert cheapest_right(KNOWN).tolist() == [0, 1, 0, 0]
    found = compare(KNOWN, routes(KNOWN, np.array([1, 1, 0, 0])))
    expected = {
        "the model": (0.5, 7.0, 8.0),
        "always short": (0.5, 1.0, 2.0),
        "always think": (0.5, 9.0, 10.0),
        "at random, as often": (0.5, 7.0, 8.0),
        "classifier": (0.75, 5.0, 6.0),
        "oracle": (0.75, 3.0, 4.0),
    }
    assert {name: (row.accuracy, row.tokens, row.passes) for name, row in found.items()} == expected
    assert found["the model"].shares == {"short": 0.25, "think": 0.75}
    assert found["at random, as often"].shares == pytest.approx(found["the model"].shares)
    low, high = found["oracle"].interval
    assert 0 <= low < 0.75 < high <= 1
    assert "classifier" not in routes(KNOWN)


def test_at_random_is_what_independent_draws_come_to() -> None:
    random = np.random.default_rng(0)
    correct = (random.random((500, 3)) < [0.3, 0.6, 0.9]).astype(np.float64)
    known = ModeOutcomes(tuple(MODES), correct, np.ones((500, 3)), np.ones((500, 3)), random.random((500, 3)))
    shares = np.bincount(known.chosen, minlength=3) / 500
    drawn = random.choice(3, p=shares, size=(2000, 500))
    found = compare(known, routes(known))["at random, as often"]
    assert found.accuracy == pytest.approx(correct[np.arange(500), drawn].mean(), abs=5e-3)


def test_outcomes_are_those_of_the_evaluations() -> None:
    lm = hybrid()
    known = outcomes(lm, TASK, EXAMPLES, batch_size=2)
    for number, mode in enumerate(MODES):
        result, *_ = evaluate(lm, TASK, EXAMPLES, mode=mode)
        always = compare(known, routes(known))[f"always {mode}"]
        assert (always.tokens, always.passes) == pytest.approx((result.mean_new_tokens, result.passes))
        assert always.shares[mode] == 1
        assert known.tokens[:, number].mean() == pytest.approx(result.mean_new_tokens)
    own, *_ = evaluate(lm, TASK, EXAMPLES)
    assert compare(known, routes(known))["the model"].passes == pytest.approx(own.passes)
    assert compare(known, routes(known))["the model"].shares == pytest.approx(own.modes)


def test_states_are_those_that_the_mode_is_read_from() -> None:
    lm = hybrid()
    found = states(lm, EXAMPLES, batch_size=2)
    controls = [lm.special.control[mode] for mode in MODES]
    chosen = lm.logits(found.to(torch.float64))[:, controls].argmax(1).tolist()
    assert chosen == outcomes(lm, TASK, EXAMPLES).chosen.tolist()
    assert [MODES[number] for number in chosen] == [p.mode for p in evaluate(lm, TASK, EXAMPLES).predictions]


def test_a_classifier_learns_what_the_state_tells() -> None:
    torch.manual_seed(0)
    states_QD = torch.randn(600, 8)
    hard = (states_QD[:, 0] > 0).numpy()
    known = ModeOutcomes(
        modes=("short", "think"),
        correct=np.stack([~hard, np.ones(600)], 1).astype(float),
        tokens=np.array([[1.0, 9.0]] * 600),
        passes=np.array([[2.0, 10.0]] * 600),
        chances=np.array([[0.9, 0.1]] * 600),
    )
    before = torch.random.get_rng_state()
    said = Classifier(states_QD, known)(torch.tensor([[3.0, *[0.0] * 7], [-3.0, *[0.0] * 7]]))
    assert said.tolist() == [1, 0]
    assert torch.equal(torch.random.get_rng_state(), before)
