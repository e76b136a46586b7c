"""Groups of sampled completions with their rewards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.models import EXAMPLES, MODES, TASK, hybrid

from coconut.completions.rollouts import CorrectnessReward, Cost, Group, sample_groups
from coconut.data.examples import Example
from coconut.data.tokenization import encode_questions
from coconut.evaluation.evaluator import evaluate
from coconut.methods import PromptFormat


def mode_reward(example: Example, text: str, mode: str, cost: Cost, /) -> float:
    return MODES.index(mode) - cost.passes / 100


def keys_of(*numbers: int) -> list[tuple[int, ...]]:
    return [(*numbers, place) for place in range(len(EXAMPLES))]


def sampled_ids(groups: list[Group]) -> list[tuple[str, list[int]]]:
    return [(sample.mode, sample.layout.ids.tolist()) for group in groups for sample in group.completions]


def test_sample_groups_gives_one_group_a_question_in_order() -> None:
    lm = hybrid()
    seen: list[tuple[str, str, str, Cost]] = []

    def note(example: Example, text: str, mode: str, cost: Cost, /) -> float:
        seen.append((example.question, text, mode, cost))
        return float(len(seen))

    groups = sample_groups(lm, EXAMPLES, note, samples=5, keys=keys_of(1, 2), max_new_tokens=6, batch_size=2)
    assert [group.example for group in groups] == EXAMPLES
    ids = encode_questions(lm.tokenizer, [example.question for example in EXAMPLES], lm.reasoning.format)
    for question, group in zip(ids, groups, strict=True):
        assert len(group.completions) == 5
        assert all(sample.layout.ids[: len(question)].tolist() == question for sample in group.completions)
        for sample, number in zip(group.completions, group.rewards.tolist(), strict=True):
            asked, text, mode, cost = seen[int(number) - 1]
            assert (asked, text, mode) == (group.example.question, sample.text, sample.mode)
            assert (cost.num_thoughts, cost.new_tokens) == (sample.num_thoughts, sample.new_tokens)
    assert len({sample.mode for group in groups for sample in group.completions}) > 1


def test_a_completion_depends_on_its_key_alone() -> None:
    """Neither on torch's generator nor on the other questions, completions and batches."""
    lm = hybrid()
    keys = keys_of(0, 7)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = sample_groups(lm, EXAMPLES, mode_reward, samples=4, keys=keys, max_new_tokens=6)
    assert torch.equal(torch.random.get_rng_state(), before), "no other draw depends on it"
    torch.manual_seed(5)
    for i in reversed(range(len(EXAMPLES))):
        [alone] = sample_groups(lm, EXAMPLES[i : i + 1], mode_reward, samples=3, keys=keys[i : i + 1], max_new_tokens=6)
        assert sampled_ids([alone]) == sampled_ids([first[i]])[:3]
        for ours, its in zip(alone.completions, first[i].completions[:3], strict=True):
            torch.testing.assert_close(ours.log_probs, its.log_probs)
    for other in (keys_of(1, 7), keys_of(0, 8), keys[::-1]):
        again = sample_groups(lm, EXAMPLES, mode_reward, samples=4, keys=other, max_new_tokens=6)
        assert sampled_ids(again) != sampled_ids(first)
    with pytest.raises(ValueError, match="There are 2 keys for 3 questions"):
        sample_groups(lm, EXAMPLES, mode_reward, samples=4, keys=keys[:2])


@pytest.mark.parametrize("mode", MODES)
def test_completion_cost_equals_what_evaluation_counts(mode: str) -> None:
    lm = hybrid()
    costs: list[Cost] = []
    sample_groups(
        lm, EXAMPLES, lambda example, text, mode, cost: costs.append(cost) or 0.0, samples=1, keys=keys_of(0),
        mode=mode, temperature=1e-4, max_new_tokens=6,
    )  # fmt: skip
    result, predictions, _ = evaluate(lm, TASK, EXAMPLES, mode=mode, max_new_tokens=6)
    assert sum(cost.passes for cost in costs) / len(costs) == pytest.approx(result.passes)
    assert sorted(cost.new_tokens for cost in costs) == sorted(p.new_tokens for p in predictions)


def test_correctness_reward_subtracts_the_cost_of_the_control_tokens_mode() -> None:
    reward, nothing = CorrectnessReward(TASK, PromptFormat(), {"short": 0.0, "think": 0.5}), Cost(0, 0, 0)
    example = Example("Is A a b or c?", ("A is a b.",), "A is a b.")
    right = "### A is a b."
    assert reward(example, right, "short", nothing) == 1.0
    assert reward(example, right, "think", nothing) == 0.5
    assert reward(example, "<short> " + right, "think", nothing) == 0.5, "the text does not decide the mode"
    assert reward(example, right, "latent_2", nothing) == 1.0
    assert reward(example, right, "", nothing) == 1.0
    for wrong in ("### A is a c.", "A is a b", ""):
        assert reward(example, wrong, "short", nothing) == -1.0
    assert replace(reward, incorrect_reward=0.0)(example, "", "think", nothing) == 0.0
    limited = replace(reward, max_mode_tokens={"short": 3})
    rewards = [limited(example, right, mode, Cost(5, 0, n)) for mode in ("short", "think") for n in (3, 4)]
    assert rewards == [1.0, -1.0, 0.5, 0.5]


def test_sample_groups_names_the_answer_with_a_non_finite_reward() -> None:
    with pytest.raises(ValueError, match="an answer to '4 5 6 7 8', is nan, which is not finite"):
        sample_groups(
            hybrid(), EXAMPLES, lambda example, *_: float("nan") if "4" in example.question else 0.0, samples=2,
            keys=keys_of(0), max_new_tokens=3,
        )  # fmt: skip
