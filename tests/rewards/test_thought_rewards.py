"""Rewards of noisy thoughts, and what each thought adds to the right answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import QUESTIONS, build, hybrid, in_sentences, padded, rows_of, shift_weights
from helpers.runs import graph_rows
from torch import Tensor
from torch.distributions import Normal

from coconut import LatentLM
from coconut.analysis.prefix_values import prefix_values
from coconut.analysis.probes import Subject
from coconut.completions.completion import completion_from_ids, completions_of
from coconut.completions.scoring import SamplingDistribution
from coconut.data.examples import Example
from coconut.data.tokenization import encode_answers, encode_questions, encode_texts
from coconut.generation.generate import Generated
from coconut.generation.thoughts import ThoughtNoise, think
from coconut.methods import NOTHING, PAUSES, PromptFormat
from coconut.rewards.answer_scores import AnswerReward
from coconut.rewards.implicit import ImplicitReward
from coconut.rewards.thoughts import answer_rewards, thought_means, thought_rewards, token_rewards
from coconut.rewards.value_model import ValueModel
from coconut.runs.study import NotApplicable, Study
from coconut.tasks import TASKS

SIGMA, BETA = 0.3, 0.05


def noisy(lm: LatentLM, sigma: float = SIGMA, seed: int = 0, **options: Any) -> Generated:
    torch.manual_seed(seed)
    return lm.generate(*padded(QUESTIONS), max_new_tokens=6, thought_noise=sigma, **options)


def pair(family: str = "llama", **reasoning: Any) -> ImplicitReward:
    """A model, and another one that is a little different."""
    lm, reference = (build(family, num_thoughts=3, **reasoning) for _ in range(2))
    torch.manual_seed(7)
    return ImplicitReward(lm, shift_weights(reference, 0.02), BETA)


# --- generation -------------------------------------------------------------------------------------


def test_thought_noise_is_the_difference_to_the_models_own_states(family: str) -> None:
    lm = build(family, num_thoughts=3)
    out = noisy(lm)
    means = thought_means(lm, QUESTIONS, out.thoughts)
    noise = (out.thoughts - means) / SIGMA
    assert float(noise.mean()) == pytest.approx(0, abs=0.2)
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    again = lm.generate(*padded(QUESTIONS), max_new_tokens=6, thoughts=out.thoughts)
    assert rows_of(again) == rows_of(out), "fed back, they give the same answers"
    assert torch.equal(noisy(lm).thoughts, out.thoughts), "a function of the seed"
    assert not torch.equal(noisy(lm, seed=1).thoughts, out.thoughts)


def test_thought_means_equal_the_states_of_the_feedback_loop(family: str) -> None:
    lm = build(family, num_thoughts=4)
    for batch_size in (1, 3, 256):
        out = noisy(lm, sigma=0.0)
        means = thought_means(lm, QUESTIONS, out.thoughts, batch_size)
        torch.testing.assert_close(means, out.thoughts, rtol=1e-5, atol=1e-6)
    prompts = [[*question, lm.special.bot] for question in QUESTIONS]
    z_NKD = noisy(lm).thoughts
    means = thought_means(lm, QUESTIONS, z_NKD)
    for k in range(4):
        states = think(lm, *padded(prompts), k, thoughts=z_NKD).states
        torch.testing.assert_close(means[:, k], states.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampled", [False, True])
def test_every_completion_has_its_own_noisy_thoughts(sampled: bool) -> None:
    lm = build("llama", num_thoughts=3)
    out = noisy(lm, num_return_sequences=3, do_sample=sampled)
    thoughts = out.thoughts.view(len(QUESTIONS), 3, 3, -1)
    assert (thoughts[:, 0] - thoughts[:, 1]).abs().amin(dim=(1, 2)).gt(0).all()
    of_each = [question for question in QUESTIONS for _ in range(3)]
    fed = lm.generate(*padded(of_each), max_new_tokens=6, thoughts=out.thoughts)
    if not sampled:
        assert rows_of(fed) == rows_of(out)
    different = noisy(lm, num_thoughts=[1, 3, 2, 3], num_return_sequences=2)
    assert different.num_thoughts.tolist() == [1, 1, 3, 3, 2, 2, 3, 3]


def test_early_stopped_rows_keep_their_noise() -> None:
    lm = build("llama", num_thoughts=4)
    ends = noisy(lm).thoughts[[0, 1, 2, 3], [1, 3, 0, 2]]

    def stop(thoughts_BD: Tensor) -> Tensor:
        return (thoughts_BD[:, None].float() - ends).abs().amax(-1).lt(1e-9).any(1)

    out = noisy(lm, stop=stop)
    assert out.num_thoughts.tolist() == [2, 4, 1, 3]
    for row, (question, count) in enumerate(zip(QUESTIONS, out.num_thoughts.tolist(), strict=True)):
        fed = out.thoughts[row : row + 1, :count]
        assert rows_of(lm.generate(torch.tensor([question]), max_new_tokens=6, thoughts=fed))[0] == rows_of(out)[row]


def test_invalid_thought_noise_is_refused() -> None:
    lm = build("llama", num_thoughts=2)
    for sigma in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"thought_noise is {sigma}"):
            noisy(lm, sigma)
    with pytest.raises(ValueError, match="given ones are fed as they are"):
        noisy(lm, thoughts=noisy(lm).thoughts)
    with pytest.raises(ValueError, match=r"no latent thoughts to replace, to make noisy"):
        noisy(build("llama", slot=PAUSES, num_thoughts=2))
    with pytest.raises(ValueError, match="leave out num_thoughts, thoughts, thought_noise"):
        noisy(hybrid())
    with pytest.raises(ValueError, match="Did you mean thought_noise"):
        lm.generate(*padded(QUESTIONS), thoughts_noise=0.1)


# --- rewards ----------------------------------------------------------------------------------------


def log_density(lm: LatentLM, thoughts: Tensor, sigma: float) -> Tensor:
    """(N, K) of thoughts, each after those before it, from the loop that feeds them one after the other."""
    prompts = padded([[*question, lm.special.bot] for question in QUESTIONS])
    means = [think(lm, *prompts, k, thoughts=thoughts).states for k in range(thoughts.shape[1])]
    return Normal(torch.stack(means, dim=1), sigma).log_prob(thoughts.double()).sum(-1)


@pytest.mark.parametrize("sigma", [0.05, SIGMA, 2.0])
def test_thought_reward_is_the_log_ratio_of_densities(family: str, sigma: float) -> None:
    reward = pair(family)
    thoughts = noisy(reward.lm, sigma).thoughts
    found = thought_rewards(reward, QUESTIONS, thoughts, sigma)
    expected = BETA * (log_density(reward.lm, thoughts, sigma) - log_density(reward.reference, thoughts, sigma))
    assert found.shape == (len(QUESTIONS), 3)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(thought_rewards(reward, QUESTIONS, thoughts, sigma, batch_size=1), found)
    same = ImplicitReward(reward.lm, reward.lm, BETA)
    assert not thought_rewards(same, QUESTIONS, thoughts, sigma).any()


def test_mean_thought_reward_is_the_kl_divergence() -> None:
    """Of thoughts that the model draws itself: beta |mu - mu_ref|^2 / (2 sigma^2), which is never below 0."""
    reward = pair()
    out = noisy(reward.lm, num_return_sequences=64, num_thoughts=1)
    of_each = [question for question in QUESTIONS for _ in range(64)]
    found = thought_rewards(reward, of_each, out.thoughts, SIGMA).view(len(QUESTIONS), 64)
    model_means, reference_means = (thought_means(lm, of_each, out.thoughts) for lm in (reward.lm, reward.reference))
    expected = BETA * (model_means - reference_means).pow(2).sum(-1).view(len(QUESTIONS), 64)[:, 0] / (2 * SIGMA**2)
    error = found.std(1) / 8
    assert ((found.mean(1) - expected).abs() < 4 * error).all()


def test_thought_and_token_rewards_add_up_to_the_log_ratio(family: str) -> None:
    reward = pair(family)
    out = noisy(reward.lm, do_sample=True, log_probs=True)
    completion_ids = [out.completion_ids(row) for row in range(len(QUESTIONS))]
    of_thoughts = thought_rewards(reward, QUESTIONS, out.thoughts, SIGMA)
    of_tokens = token_rewards(reward, QUESTIONS, out.thoughts, completion_ids)
    wholes = []
    for lm in (reward.lm, reward.reference):
        spoken = [after(lm, question, out.thoughts[row], completion_ids[row]) for row, question in enumerate(QUESTIONS)]
        wholes.append(log_density(lm, out.thoughts, SIGMA).sum(1) + torch.stack(spoken))
    total = of_thoughts.sum(1) + torch.stack([row.sum() for row in of_tokens])
    torch.testing.assert_close(total, BETA * (wholes[0] - wholes[1]).float(), rtol=1e-4, atol=1e-5)
    assert out.log_probs
    for row, likely in enumerate(out.log_probs):
        spoken = after(reward.lm, QUESTIONS[row], out.thoughts[row], completion_ids[row])
        assert float(likely.sum()) == pytest.approx(float(spoken), abs=1e-4), "as they were sampled"


def after(lm: LatentLM, question: list[int], thoughts_KD: Tensor, completion_ids: list[int]) -> Tensor:
    """The log-probability of what is said after given thoughts, a token at a time, from the loop's cache."""
    K = len(thoughts_KD)
    prompt = torch.tensor([[*question, lm.special.bot]])
    thinking = think(lm, prompt, torch.ones_like(prompt), K, thoughts=thoughts_KD[None])
    table: Any = lm.base.get_input_embeddings()
    total, begin = torch.zeros((), dtype=torch.float64), prompt.shape[1] + K
    for place, (fed, token) in enumerate(zip([lm.special.eot, *completion_ids], completion_ids, strict=False)):
        mask, position = torch.ones(1, begin + place + 1), torch.tensor([[begin + place]])
        with torch.no_grad():
            logits = lm.logits(lm.hidden_states(table(torch.tensor([[fed]])), mask, position, thinking.cache))[0, -1]
        logits[lm.special.added] = -torch.inf
        total = total + logits.log_softmax(-1)[token]
    return total


def test_token_rewards_after_own_thoughts_equal_implicit_rewards(family: str) -> None:
    reward = pair(family)
    out = noisy(reward.lm, sigma=0.0, log_probs=True)
    samples = [s for row, question in enumerate(QUESTIONS) for s in completions_of(reward.lm, question, out, [row])]
    usual = SamplingDistribution.of(reward.lm.special).score(reward.lm, samples, 4)
    completion_ids = [sample.completion_ids for sample in samples]
    plain = ImplicitReward(reward.lm, reward.reference, 1.0)
    of_tokens = token_rewards(plain, QUESTIONS, out.thoughts, completion_ids)
    both = [torch.stack([after(lm, q, z, s) for q, z, s in zip(QUESTIONS, out.thoughts, completion_ids, strict=True)])
            for lm in (reward.lm, reward.reference)]  # fmt: skip
    torch.testing.assert_close(both[0].float(), torch.stack([row.sum() for row in usual]), rtol=1e-4, atol=1e-4)
    found = torch.stack([row.sum() for row in of_tokens])
    torch.testing.assert_close(found, (both[0] - both[1]).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_answer_reward_is_the_log_ratio_of_thoughts_and_tokens(family: str, dropout: float) -> None:
    """With dropout each number of a thought is drawn from a mixture of two normal distributions.

    Dropout alone leaves thoughts without a density, and the reward is that of the tokens.
    """
    reward = pair(family)
    out = noisy(reward.lm, thought_dropout=dropout)
    completion_ids = [out.completion_ids(row) for row in range(len(QUESTIONS))]
    wholes = []
    for lm in (reward.lm, reward.reference):
        prompts = padded([[*question, lm.special.bot] for question in QUESTIONS])
        means = torch.stack([think(lm, *prompts, k, thoughts=out.thoughts).states for k in range(3)], dim=1).double()
        density = (1 - dropout) * Normal(means / (1 - dropout), SIGMA).log_prob(out.thoughts.double()).exp()
        density = density + dropout * Normal(0.0, SIGMA).log_prob(out.thoughts.double()).exp()
        spoken = [after(lm, question, out.thoughts[row], completion_ids[row]) for row, question in enumerate(QUESTIONS)]
        wholes.append(density.log().sum((1, 2)) + torch.stack(spoken))
    expected = BETA * (wholes[0] - wholes[1]).float()
    noise = ThoughtNoise(SIGMA, dropout)
    for size in (1, 256):
        found = answer_rewards(reward, QUESTIONS, out.thoughts, completion_ids, noise, size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found - expected.mean()).abs().max()) > 1e-3
    text = answer_rewards(reward, QUESTIONS, out.thoughts, completion_ids, ThoughtNoise(dropout=0.3))
    of_tokens = token_rewards(reward, QUESTIONS, out.thoughts, completion_ids)
    torch.testing.assert_close(text, torch.stack([row.sum() for row in of_tokens]))


def test_scores_of_answers_are_their_rewards() -> None:
    """After own thoughts that of the tokens; with noise that of given thoughts too, for each number of thoughts."""
    reward = pair()
    plain = noisy(reward.lm, sigma=0.0, log_probs=True)
    samples = [s for row, question in enumerate(QUESTIONS) for s in completions_of(reward.lm, question, plain, [row])]
    found = AnswerReward(reward)(QUESTIONS, plain)
    assert [score.reward for score in found] == pytest.approx([float(row.sum()) for row in reward.tokens(samples)])
    assert {score.passes for score in found} == {2 * (3 + 1)}
    values = AnswerReward(ValueModel(reward.lm), ThoughtNoise(SIGMA))(QUESTIONS, plain)
    assert [score.reward for score in values] == pytest.approx(
        [float(row[-1]) for row in ValueModel(reward.lm).steps(samples)]
    )
    assert {score.passes for score in values} == {3 + 1}

    out = noisy(reward.lm, num_thoughts=[1, 3, 2, 3])
    of_noisy = AnswerReward(reward, ThoughtNoise(SIGMA))(QUESTIONS, out)
    for row, score in enumerate(of_noisy):
        fed = out.thoughts[row : row + 1, : int(out.num_thoughts[row])]
        of_thoughts = thought_rewards(reward, [QUESTIONS[row]], fed, SIGMA).sum()
        [of_tokens] = token_rewards(reward, [QUESTIONS[row]], fed, [out.completion_ids(row)])
        assert score.reward == pytest.approx(float(of_thoughts + of_tokens.sum()), rel=1e-4, abs=1e-5)
        assert score.passes == 2


def test_thought_rewards_refuse_models_without_thoughts() -> None:
    reward = pair()
    thoughts = noisy(reward.lm).thoughts
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"sigma is {sigma}; it must be above 0"):
            thought_rewards(reward, QUESTIONS, thoughts, sigma)
    for lm in (build("llama", slot=NOTHING, method="cot", markers=False), build("llama", slot=PAUSES), hybrid()):
        with pytest.raises(ValueError, match="has no latent thoughts to reward"):
            thought_rewards(ImplicitReward(lm, lm, BETA), QUESTIONS, thoughts, SIGMA)
    for wrong in (thoughts[:2], thoughts[..., :5], thoughts[0]):
        with pytest.raises(ValueError, match="thoughts has the shape"):
            thought_rewards(reward, QUESTIONS, wrong, SIGMA)


# --- prefix values ----------------------------------------------------------------------------------

GRAPHS = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=1, count=40)]
LINES = PromptFormat("{}", "{} ", "### {}")


def subject(examples: list[Example] = GRAPHS, batch_size: int = 16, **reasoning: Any) -> Subject:
    lm = build("llama", **{"num_thoughts": 2, "format": LINES, **reasoning})
    return Subject(lm, TASKS["prosqa"], examples, batch_size)


def rows_about(study: Study, **keys: Any) -> list[dict[str, Any]]:
    return [row for row in study.rows if all(row[key] == value for key, value in keys.items())]


def test_prefix_value_is_the_answers_log_probability_after_each_thought() -> None:
    examined = subject()
    lm, study = examined.lm, prefix_values(examined)
    questions = encode_questions(lm.tokenizer, [example.question for example in GRAPHS], LINES)
    answers = [[*ids, lm.special.eos] for ids in encode_texts(lm.tokenizer, [f"### {e.answer}" for e in GRAPHS])]
    before = None
    for count in range(3):
        samples = [
            completion_from_ids(lm, question, completion_ids, text="", num_thoughts=count)
            for question, completion_ids in zip(questions, answers, strict=True)
        ]
        scored = SamplingDistribution.of(lm.special).score(lm, samples, 7)
        values = torch.stack([row.sum() for row in scored])
        (row,) = rows_about(study, of="answer", steps=None, thoughts=count)
        assert row["value"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert row["low"] < row["value"] < row["high"]
        error = float(values.std()) / len(values) ** 0.5
        assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
        (after,) = rows_about(study, of="after_mark", steps=None, thoughts=count)
        assert after["value"] == pytest.approx(sum(float(row[1:].sum()) for row in scored) / len(scored), abs=1e-5)
        for steps in {found["steps"] for found in study.rows} - {None}:
            expected = [float(value) for value, e in zip(values, GRAPHS, strict=True) if len(e.steps) == steps]
            (of_these,) = rows_about(study, of="answer", steps=steps, thoughts=count)
            assert of_these["questions"] == len(expected)
            assert of_these["value"] == pytest.approx(sum(expected) / len(expected))
        if before is None:
            assert row["gain"] is row["gain_low"] is row["gain_high"] is None
        else:
            assert row["gain"] == pytest.approx(row["value"] - before)
            assert row["gain_low"] < row["gain"] < row["gain_high"]
        before = row["value"]
    assert len({row["steps"] for row in study.rows}) > 2


def test_prefix_values_do_not_depend_on_the_batch() -> None:
    together, alone = prefix_values(subject()).rows, prefix_values(subject(batch_size=1)).rows
    assert [row["value"] for row in together] == pytest.approx([row["value"] for row in alone])


@pytest.mark.parametrize(
    ("template", "marked"), [("### {}", "### "), ("The answer is: {} !", "The answer is:"), ("{}", "")]
)
def test_encoded_answers_count_the_tokens_of_the_mark(template: str, marked: str) -> None:
    lm = in_sentences().lm
    lm.reasoning = replace(lm.reasoning, format=replace(lm.reasoning.format, answer=template))
    ids, marks = encode_answers(lm.tokenizer, ["Tom is a dog.", "72"], lm.reasoning.format)
    for row, count in zip(ids, marks, strict=True):
        assert str(lm.tokenizer.decode(row[:count])).strip() == marked.strip()
        assert row[-1] == lm.special.eos


def test_prefix_values_warn_without_mixing_and_refuse_without_thoughts() -> None:
    examined = subject(GRAPHS[:3])
    assert "without mixing" in prefix_values(examined).facts["warning"]
    assert prefix_values(replace(examined, trained_with_fewer_thoughts=True)).facts["warning"] is None
    pauses, words = {"slot": PAUSES, "method": "pause"}, {"slot": NOTHING, "method": "cot", "markers": False}
    cases: list[dict[str, Any]] = [pauses, words, {"num_thoughts": 0}]
    for without in cases:
        with pytest.raises(NotApplicable, match=r"no latent thoughts|no thoughts yet"):
            prefix_values(subject(**without))
    long = Example("3 4", (), " ".join(["5"] * 95))
    message = r"1 of 4 answers, .* context of 96 tokens. The first is the answer to question 4"
    with pytest.raises(NotApplicable, match=message):
        prefix_values(subject([*GRAPHS[:3], long]))
