"""Noisy thoughts as actions of a policy: their densities, their losses and gradients, and the same on any split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import QUESTIONS, build, gradients, hybrid, padded, relative, rows_of
from helpers.processes import together
from torch import Tensor
from torch.distributions import Categorical, Normal

from coconut import LatentLM
from coconut.completions.completion import Completion, completions_of
from coconut.completions.noisy_thoughts import NoisyThoughts, dispersion, log_density_ratio, refuse_noise
from coconut.completions.rollouts import sample_groups
from coconut.completions.scoring import CompletionBatch, SamplingDistribution
from coconut.config import EngineConfig, EngineKind, OptimizerConfig
from coconut.data.examples import Example
from coconut.engine.base import Loss
from coconut.engine.factory import make_engine
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.generation.thoughts import think
from coconut.methods import PAUSES, THOUGHTS, Content, Projector, Slot, Update
from coconut.models.passes import Reads
from coconut.rl.loss import PolicyBatch, PolicyLoss, broadcast_to_tokens, policy_batch, totals_of
from coconut.rl.objectives import OBJECTIVES, Objective, advantages, kl_k3

SIGMA, K, GROUP, LIMIT, BUDGET = 0.3, 3, 4, 5, 8
MIXTURE = replace(THOUGHTS, content=Content.mixture)
PROJECTED = replace(THOUGHTS, projector=Projector.mlp_ln)


def thinker(family: str = "llama", slot: Slot = THOUGHTS, dtype: torch.dtype = torch.float64) -> LatentLM:
    return build(family, dtype, slot=slot, num_thoughts=K)


def sampled(lm: LatentLM, sigma: float = SIGMA, limit: int = LIMIT) -> list[Completion]:
    """Groups of completions of all questions, with thoughts that are drawn."""
    torch.manual_seed(1)
    out = lm.generate(
        *padded(QUESTIONS), max_new_tokens=limit, do_sample=True, num_return_sequences=GROUP, log_probs=True,
        thought_noise=sigma,
    )  # fmt: skip
    groups = [range(first, first + GROUP) for first in range(0, len(out.tokens), GROUP)]
    return [
        s for question, rows in zip(QUESTIONS, groups, strict=True) for s in completions_of(lm, question, out, rows)
    ]


def noisy_of(completion: Completion) -> NoisyThoughts:
    assert completion.noisy
    return completion.noisy


def policy(lm: LatentLM) -> SamplingDistribution:
    return SamplingDistribution.of(lm.special, thought_noise=SIGMA)


def scored(lm: LatentLM, completion: Completion) -> tuple[Tensor, Tensor]:
    """(K,) log-densities and (words,) log-probabilities of one completion, with gradient and without any padding.

    Whole rows are run again for each thought, and each is embedded by hand.
    """
    ids = torch.tensor(completion.layout.ids.tolist())
    table: Any = lm.base.get_input_embeddings()
    embeds = table(ids).clone()
    fed = noisy_of(completion).fed.to(embeds)
    densities = []
    for k, column in enumerate((ids == lm.latent_id).nonzero()[:, 0].tolist()):
        state = lm.layer_states(embeds[None, :column], torch.ones(1, column))[-1][0, -1]
        densities.append(Normal(lm.feedback(state), SIGMA).log_prob(fed[k]).sum())
        embeds = embeds.index_copy(0, torch.tensor([column]), fed[k : k + 1])
    first = completion.layout.num_prompt
    logits = lm.logits(lm.layer_states(embeds[None], torch.ones(1, len(ids)))[-1][0, first - 1 : -1])
    never = torch.zeros(logits.shape[1], dtype=torch.bool)
    never[list(lm.special.added)] = True
    words = Categorical(logits=logits.masked_fill(never, -torch.inf)).log_prob(ids[first:])
    return torch.stack(densities), words


# --- densities --------------------------------------------------------------------------------------


def test_log_density_ratio_equals_torch_distributions_and_does_not_cancel() -> None:
    torch.manual_seed(0)
    mu, nu = (100 + torch.randn(5, 64).double() for _ in range(2))
    nu = mu + 1e-3 * (nu - mu)
    z = mu + 0.01 * torch.randn(5, 64).double()
    told = Normal(mu, 0.01).log_prob(z).sum(-1) - Normal(nu, 0.01).log_prob(z).sum(-1)
    torch.testing.assert_close(log_density_ratio(z, mu, nu, 0.01), told, rtol=1e-9, atol=1e-9)
    z, mu, nu = z.float(), mu.float(), nu.float()
    exact = log_density_ratio(z.double(), mu.double(), nu.double(), 0.01)
    torch.testing.assert_close(log_density_ratio(z, mu, nu, 0.01).double(), exact, rtol=1e-6, atol=1e-6)
    assert not log_density_ratio(z, mu, mu, 0.01).any()
    assert log_density_ratio(z.bfloat16(), mu.bfloat16(), nu.bfloat16(), 0.01).dtype is torch.float32


def test_dispersion_is_the_deviation_around_each_place() -> None:
    torch.manual_seed(0)
    means = torch.randn(2000, 3, 8) * torch.tensor([1.0, 2.0, 3.0])[:, None] + torch.randn(3, 8) * 50
    assert dispersion(means) == pytest.approx((14 / 3) ** 0.5, rel=0.02)


# --- the forward pass over given thoughts -----------------------------------------------------------


@pytest.mark.parametrize("slot", [THOUGHTS, PROJECTED], ids=["states", "projected"])
@pytest.mark.parametrize("right", [False, True], ids=["padding left", "padding right"])
def test_one_pass_gives_the_thoughts_of_the_loop(family: str, slot: Slot, right: bool) -> None:
    """Rows of different numbers of thoughts: the model's own after given ones, and what follows them."""
    lm, counts = thinker(family, slot), [3, 0, 1, 2]
    torch.manual_seed(3)
    fed = torch.randn(4, K, lm.thought_size).double()
    rows = [
        q + [lm.special.bot] + [lm.latent_id] * n + [lm.special.eot, 9] for q, n in zip(QUESTIONS, counts, strict=True)
    ]
    ids, mask = padded(rows, right)
    reads = Reads(own_thoughts=True)
    found = lm(ids, mask, return_logits=True, thoughts=fed, reads=reads)
    plain = lm(ids, mask, return_logits=True, thoughts=fed, reads=reads, use_cache=False)
    torch.testing.assert_close(found.own_thoughts, plain.own_thoughts, rtol=1e-9, atol=1e-9)
    is_token = mask.bool()
    torch.testing.assert_close(found.logits[is_token], plain.logits[is_token], rtol=1e-9, atol=1e-9)
    for row, (question, count) in enumerate(zip(QUESTIONS, counts, strict=True)):
        prompt = torch.tensor([[*question, lm.special.bot]])
        for k in range(count):
            state = think(lm, prompt, torch.ones_like(prompt), k, thoughts=fed[row : row + 1]).states[0]
            torch.testing.assert_close(found.own_thoughts[row, k], lm.feedback(state), rtol=1e-9, atol=1e-9)
        assert not found.own_thoughts[row, count:].any()
        alone = lm(torch.tensor([rows[row]]), return_logits=True, thoughts=fed[row : row + 1], reads=reads)
        torch.testing.assert_close(alone.logits[0], found.logits[row][mask[row].bool()], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.own_thoughts[0], found.own_thoughts[row], rtol=1e-9, atol=1e-9)


def test_own_thoughts_that_are_given_change_nothing(family: str) -> None:
    lm = thinker(family)
    rows = [question + [lm.special.bot] + [lm.latent_id] * K + [lm.special.eot, 9] for question in QUESTIONS]
    ids, mask = padded(rows)
    columns = (ids == lm.latent_id).nonzero()[:, 1].view(len(rows), K)
    own = lm(ids, mask, return_logits=True, reads=Reads(thoughts_BK=columns))
    given = lm(ids, mask, return_logits=True, thoughts=own.thoughts, reads=Reads(own_thoughts=True))
    is_token = mask.bool()
    torch.testing.assert_close(given.logits[is_token], own.logits[is_token], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(given.own_thoughts, own.thoughts, rtol=1e-9, atol=1e-9)


def test_given_thoughts_that_do_not_fit_are_refused() -> None:
    lm = thinker()
    ids = torch.tensor([[5, lm.latent_id, lm.latent_id, 6]])
    for shape in ((1, 1, 32), (2, 2, 32), (2, 32)):
        with pytest.raises(ValueError, match=r"thoughts has the shape .* with 1 rows of up to 2 thoughts"):
            lm(ids, thoughts=torch.zeros(shape))
    jacobi = thinker(slot=replace(THOUGHTS, update=Update.jacobi, iterations=2))
    with pytest.raises(ValueError, match="its thoughts are updated all at once"):
        jacobi(ids, thoughts=torch.zeros(1, 2, 32))


# --- sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [THOUGHTS, PROJECTED], ids=["states", "projected"])
def test_sampled_thoughts_and_words_have_the_probabilities_of_one_at_a_time(slot: Slot) -> None:
    lm = thinker(slot=slot)
    samples = sampled(lm)
    batch = CompletionBatch.of(samples, lm.special, 1)
    found = policy(lm).log_probs(lm, batch).split([len(s.log_probs) for s in samples])
    for sample, row in zip(samples, found, strict=True):
        noisy = noisy_of(sample)
        densities, words = scored(lm, sample)
        torch.testing.assert_close(
            Normal(noisy.means, SIGMA).log_prob(noisy.fed).sum(-1), densities.float(), rtol=1e-5, atol=1e-4
        )
        torch.testing.assert_close(row[:K], torch.zeros(K), rtol=0, atol=1e-5)
        torch.testing.assert_close(row[K:], words.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.log_probs, row, rtol=1e-5, atol=1e-5)
        assert sample.passes == 1
        assert sample.cost.passes == len(words) + K + 1, "but it was generated one thought after the other"
    assert batch.is_thought.tolist() == [
        value for s in samples for value in [True] * K + [False] * (len(s.log_probs) - K)
    ]
    alone = [policy(lm).log_probs(lm, CompletionBatch.of([sample], lm.special, 1)) for sample in samples]
    torch.testing.assert_close(torch.cat(alone), torch.cat(found), rtol=1e-5, atol=1e-6)


def test_small_noise_approaches_the_deterministic_thoughts() -> None:
    lm = thinker()
    plain = lm.generate(*padded(QUESTIONS), max_new_tokens=LIMIT, log_probs=True)
    none, little = (
        lm.generate(*padded(QUESTIONS), max_new_tokens=LIMIT, log_probs=True, thought_noise=s) for s in (0.0, 1e-6)
    )
    assert none.thought_means is plain.thought_means is None
    assert torch.equal(none.thoughts, plain.thoughts)
    assert rows_of(none) == rows_of(little) == rows_of(plain)
    torch.testing.assert_close(little.thoughts, plain.thoughts, rtol=0, atol=1e-4)
    assert little.thought_means is not None
    torch.testing.assert_close(little.thought_means, plain.thoughts, rtol=0, atol=1e-4)
    assert not torch.equal(little.thoughts, plain.thoughts)


def test_groups_are_a_function_of_their_keys() -> None:
    lm = thinker(dtype=torch.float32)
    examples = [Example(f"{n} {n + 1}", (), "c") for n in range(3)]

    def sampled_groups(seed: int, size: int, noise: float = SIGMA) -> list[Completion]:
        groups = sample_groups(
            lm, examples, lambda *_: 0.0, samples=2, keys=[(seed, n) for n in range(3)], thought_noise=noise,
            max_new_tokens=3, batch_size=size,
        )  # fmt: skip
        return [sample for group in groups for sample in group.completions]

    one, again, other = sampled_groups(2, 3), sampled_groups(2, 1), sampled_groups(3, 3)
    for a, b in zip(one, again, strict=True):
        assert a.completion_ids == b.completion_ids
        torch.testing.assert_close(noisy_of(a).fed, noisy_of(b).fed)
    assert not any(torch.allclose(noisy_of(a).fed, noisy_of(b).fed) for a, b in zip(one, other, strict=True))
    assert not torch.allclose(noisy_of(one[0]).fed, noisy_of(one[1]).fed), "each completion has its own"
    assert not any(sample.noisy for sample in sampled_groups(2, 3, noise=0.0))


def test_other_tokens_after_the_same_thoughts() -> None:
    lm = thinker()
    sample = sampled(lm)[0]
    cut = sample.with_completion_ids(sample.completion_ids[:2])
    torch.testing.assert_close(
        policy(lm).log_probs(lm, CompletionBatch.of([cut], lm.special, 1)),
        sample.log_probs[: K + 2],
        rtol=1e-5,
        atol=1e-5,
    )
    assert cut.without_targets().num_noisy == 0


def test_models_without_thoughts_to_draw_are_refused() -> None:
    refused = [
        (hybrid(), "hybrid model's modes are fed without noise"),
        (build("llama", slot=PAUSES, num_thoughts=2), "no latent thoughts to draw"),
        (build("llama", num_thoughts=0), "no latent thoughts to draw"),
        (thinker(slot=replace(THOUGHTS, update=Update.jacobi, iterations=2)), "updated all at once"),
    ]
    for lm, why in refused:
        with pytest.raises(ValueError, match=f"thought_noise=0.1 is not for .*{why}"):
            refuse_noise(lm.reasoning, 0.1)
    refuse_noise(thinker().reasoning, 0.1)


# --- losses -----------------------------------------------------------------------------------------


def gains_of(samples: Sequence[Completion], objective: Objective) -> list[Tensor]:
    torch.manual_seed(0)
    rewards = torch.rand(len(samples) // GROUP, GROUP)
    return broadcast_to_tokens(advantages(rewards, objective.normalize_advantages).flatten(), samples)


def moved(lm: LatentLM, samples: Sequence[Completion]) -> list[Completion]:
    """The completions as another policy would have sampled them: other means, other probabilities of words."""
    torch.manual_seed(5)
    result = []
    for sample in samples:
        noisy = noisy_of(sample)
        means = noisy.means + 0.01 * torch.randn_like(noisy.means)
        words = sample.log_probs[K:] + 0.3 * torch.randn(len(sample.log_probs) - K)
        result.append(replace(sample, noisy=replace(noisy, means=means), log_probs=torch.cat([torch.zeros(K), words])))
    return result


def batch_of(lm: LatentLM, samples: Sequence[Completion], objective: Objective, on_policy: bool = True) -> PolicyBatch:
    gains, totals = gains_of(samples, objective), totals_of(samples, BUDGET)
    return policy_batch(samples, gains, objective, totals, lm.special, on_policy=on_policy)


def weight_of(name: str, length: int, samples: Sequence[Completion]) -> float:
    """The published weight of a token, with thoughts counted as tokens."""
    count, total = len(samples), sum(len(s.log_probs) for s in samples)
    return {"grpo": 1 / (count * length), "degrpo": 1 / (count * length), "dr_grpo": 1 / (count * BUDGET),
            "dapo": 1 / total}[name]  # fmt: skip


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_policy_loss_equals_the_formula_one_action_at_a_time(name: str) -> None:
    """Off-policy, clipped, with a divergence; densities by torch.distributions."""
    lm, objective = thinker(), OBJECTIVES[name]
    other = thinker()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.003 * torch.randn_like(weight))
    samples = moved(lm, sampled(lm))
    batch = batch_of(lm, samples, objective, on_policy=False)
    batch = replace(batch, reference=policy(lm).log_probs(other, batch).detach())
    loss = PolicyLoss(policy(lm), objective, 0.5)
    found = loss(lm, batch) / batch.denominators[0]
    expected, log_ratios, clipped, apart = 0.0, [], [], 0.0
    for sample, gain_M in zip(samples, gains_of(samples, objective), strict=True):
        noisy = noisy_of(sample)
        old_K = Normal(noisy.means.double(), SIGMA).log_prob(noisy.fed.double()).sum(-1)
        now_M, theirs_M = (torch.cat(scored(model, sample)).detach() for model in (lm, other))
        old_M = torch.cat([old_K, sample.log_probs[K:].double()])
        for now, old, theirs, gain in zip(now_M, old_M, theirs_M, gain_M.double(), strict=True):
            ratio = (now - old).exp()
            inside = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            k3 = (theirs - now).exp() - 1 - (theirs - now)
            weight = weight_of(name, len(now_M), samples)
            expected += weight * float(0.5 * k3 - torch.minimum(ratio * gain, inside * gain))
            log_ratios.append(float(now - old))
            clipped.append(float(inside * gain < ratio * gain))
            apart += float(k3)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    assert loss.divergence() == pytest.approx(apart, rel=1e-4)
    is_thought = batch.is_thought.tolist()
    row = loss.ratios.means(World().all_reduce_sums)
    for kind, chosen in (("thought", True), ("word", False)):
        own = [i for i, drawn in enumerate(is_thought) if drawn == chosen]
        assert row[f"{kind}_log_ratio"] == pytest.approx(sum(log_ratios[i] for i in own) / len(own), rel=1e-3, abs=1e-5)
        assert row[f"{kind}_clipped"] == pytest.approx(sum(clipped[i] for i in own) / len(own))
        assert 0 < row[f"{kind}_clipped"] < 1
    assert not loss.ratios.parts


@pytest.mark.parametrize("slot", [THOUGHTS, PROJECTED], ids=["states", "projected"])
def test_on_policy_gradient_is_that_of_the_weighted_log_probabilities(slot: Slot) -> None:
    lm, objective = thinker(slot=slot), OBJECTIVES["dr_grpo"]
    samples = sampled(lm)
    batch = batch_of(lm, samples, objective)
    assert batch.old is None
    loss = PolicyLoss(policy(lm), objective, 0.0)(lm, batch) / batch.denominators[0]
    loss.backward()
    ours = gradients(lm)
    weighted = -batch.advantages.double() * batch.weights.double() / batch.denominators[0]
    assert float(loss.detach()) == pytest.approx(float(weighted.sum()), abs=1e-6), "all ratios are 1"
    lm.zero_grad()
    (weighted * torch.cat([value for sample in samples for value in scored(lm, sample)])).sum().backward()
    assert relative(ours, gradients(lm)) < 1e-4


def test_policy_gradient_is_unbiased() -> None:
    """One thought, reward a . z: the gradient of its expectation is that of a . mu."""
    lm, question, count = build("llama", num_thoughts=1), QUESTIONS[1], 2048
    torch.manual_seed(0)
    a_D = torch.randn(lm.thought_size).double()
    prompt = torch.tensor([[*question, lm.special.bot]])
    table: Any = lm.base.get_input_embeddings()
    mean_D = lm.feedback(lm.layer_states(table(prompt), torch.ones_like(prompt))[-1][0, -1])
    (a_D * mean_D).sum().backward()
    exact = gradients(lm)
    lm.zero_grad()
    out = lm.generate(
        torch.tensor([question]), max_new_tokens=1, num_return_sequences=count, thought_noise=0.5, log_probs=True
    )
    samples = [s.with_completion_ids(()) for s in completions_of(lm, question, out, range(count))]
    rewards_N = torch.stack([noisy_of(s).fed[0].double() @ a_D for s in samples])
    baseline = float(mean_D.detach() @ a_D)  # a constant, which the gradient does not depend on
    gains = broadcast_to_tokens(rewards_N - baseline, samples)
    loss = PolicyLoss(SamplingDistribution.of(lm.special, thought_noise=0.5), OBJECTIVES["dapo"], 0.0)
    totals, found = totals_of(samples, 1), []
    for first in range(0, count, 64):
        rows = slice(first, first + 64)
        batch = policy_batch(samples[rows], gains[rows], OBJECTIVES["dapo"], totals, lm.special, on_policy=True)
        lm.zero_grad()
        (-loss(lm, batch) / 64).backward()  # dapo's weights, times the count: a sum over the samples
        found.append(gradients(lm))
    scale = next(name for name in exact if name.endswith("model.norm.weight"))  # one number for each of mu
    error_D = torch.stack([part[scale] for part in found]).std(0) / len(found) ** 0.5
    apart_D = (torch.stack([part[scale] for part in found]).mean(0) - exact[scale]) / error_D
    assert apart_D.abs().max() < 4
    assert apart_D.square().mean() < 2
    size = sum(float(gradient.square().sum()) for gradient in exact.values())
    shares = torch.tensor([sum(float((part[n] * exact[n]).sum()) for n in exact) / size for part in found])
    error = float(shares.std()) / len(found) ** 0.5
    assert error < 0.1, "a gradient of another size would be seen"
    assert abs(float(shares.mean()) - 1) < 3 * error


# --- the same whatever the split --------------------------------------------------------------------


def updated(config: EngineConfig, world: World, name: str, size: int, slot: Slot = PROJECTED) -> tuple[float, float]:
    """Loss and gradient norm of an update with noisy thoughts and a reference, sharded over ranks."""
    objective, lm = OBJECTIVES[name], thinker(slot=slot, dtype=torch.float32)
    samples = moved(lm, sampled(lm))[: 2 * GROUP + 1]  # an odd number: one process has a row without targets
    gains = gains_of(samples[: 2 * GROUP], objective)
    gains.append(torch.full_like(samples[-1].log_probs, 0.3))
    totals = totals_of(samples, BUDGET)
    rows, gains = [*samples, samples[0].without_targets()], [*gains, torch.zeros(0)]
    parts = []
    for first in range(0, len(samples), size * world.size):
        mine = list(range(first, min(first + size * world.size, len(samples))))[world.rank :: world.size] or [-1]
        part = policy_batch(
            [rows[i] for i in mine], [gains[i] for i in mine], objective, totals, lm.special, on_policy=False
        )
        parts.append(replace(part, reference=torch.cat([rows[i].log_probs - 0.1 for i in mine])))
    loss = PolicyLoss(SamplingDistribution.of(lm.special, thought_noise=SIGMA), objective, 0.1)
    engine = make_engine(
        lm, Loss(loss, may_skip_modules=lm.feedback.has_weights), config, OptimizerConfig(lr=1e-3), world
    )
    done = engine.update(parts, 1e-3)
    return done.loss, done.grad_norm


SPLIT = [
    EngineConfig(device="cpu", threads=1, timeout=120),
    EngineConfig(kind=EngineKind.deepspeed, zero_stage=3, device="cpu", threads=1, timeout=120),
]


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_loss_of_noisy_thoughts_does_not_depend_on_the_micro_batch(name: str) -> None:
    found = [updated(SPLIT[0], World(), name, size) for size in (16, 4, 1)]
    assert found[0][1] > 1e-4
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def on_two() -> None:
    with init_distributed(SPLIT[0]) as world:
        for config in SPLIT:
            for name, slot in (("degrpo", PROJECTED), ("dr_grpo", PROJECTED), ("grpo", MIXTURE)):
                shared = updated(config, world, name, 2, slot)
                alone = updated(SPLIT[0], World(), name, 9, slot)
                assert shared == pytest.approx(alone, rel=1e-4, abs=1e-6), (config.kind, name)


@pytest.mark.slow
def test_update_of_noisy_thoughts_does_not_depend_on_the_number_of_processes() -> None:
    together(on_two)


def test_row_without_targets_has_zero_gradients_for_all_weights_of_a_thought() -> None:
    """A process without a row left feeds the same thoughts, and takes part in every exchange of gradients."""
    lm, objective = thinker(slot=PROJECTED), OBJECTIVES["grpo"]
    samples = sampled(lm)
    row = samples[0].without_targets()
    totals = totals_of(samples, BUDGET)
    batch = policy_batch([row], [torch.zeros(0)], objective, totals, lm.special, on_policy=True)
    assert batch.denominators == (0,)
    assert batch.thoughts is not None
    PolicyLoss(policy(lm), objective, 0.0)(lm, batch).backward()
    assert gradients(lm).keys() == dict(lm.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients(lm).values())


def test_k3_of_a_policy_that_equals_its_reference_is_zero() -> None:
    lm = thinker()
    batch = batch_of(lm, sampled(lm), OBJECTIVES["grpo"])
    log_probs_M = policy(lm).log_probs(lm, batch)
    assert not kl_k3(log_probs_M, log_probs_M.detach()).any()
