"""Answers sampled in groups, and the loss that their rewards make: for tokens alone, modes, thoughts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import QUESTIONS, build, gradients, hybrid, padded, relative
from helpers.processes import together

from coconut import LatentLM
from coconut.completions.completion import Completion, completion_from_ids, completions_of
from coconut.completions.scoring import SamplingDistribution
from coconut.config import EngineConfig, EngineKind, OptimizerConfig
from coconut.engine.base import Loss
from coconut.engine.factory import make_engine
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.generation.generate import Generated
from coconut.methods import NOTHING, PAUSES, THOUGHTS
from coconut.rl.loss import PolicyBatch, PolicyLoss, broadcast_to_tokens, policy_batch, totals_of
from coconut.rl.objectives import OBJECTIVES, Objective, Totals, advantages, has_zero_variance, kl_k3

GROUP = 4


def sampled(lm: LatentLM, temperature: float = 1.0, limit: int = 6) -> list[Completion]:
    """Groups of completions of all questions."""
    torch.manual_seed(1)
    out = lm.generate(
        *padded(QUESTIONS), max_new_tokens=limit, do_sample=True, temperature=temperature, num_return_sequences=GROUP,
        log_probs=True,
    )  # fmt: skip
    return completions(lm, out, GROUP)


def completions(lm: LatentLM, out: Generated, size: int = 1) -> list[Completion]:
    """`size` completions of each question."""
    groups = [range(first, first + size) for first in range(0, len(QUESTIONS) * size, size)]
    return [
        s for question, rows in zip(QUESTIONS, groups, strict=True) for s in completions_of(lm, question, out, rows)
    ]


def gains_of(samples: list[Completion], objective: Objective) -> list[torch.Tensor]:
    """The advantages of all tokens, for random rewards."""
    torch.manual_seed(0)
    rewards = torch.rand(len(samples) // GROUP, GROUP)
    return broadcast_to_tokens(advantages(rewards, objective.normalize_advantages).flatten(), samples)


def batch_of(lm: LatentLM, samples: list[Completion], objective: Objective, on_policy: bool = True) -> PolicyBatch:
    totals = totals_of(samples, 7)
    return policy_batch(samples, gains_of(samples, objective), objective, totals, lm.special, on_policy=on_policy)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["hybrid", "thoughts", "pauses", "words"])
def test_sampled_log_probs_equal_recomputed_ones(kind: str, temperature: float) -> None:
    slots = {"thoughts": THOUGHTS, "pauses": PAUSES, "words": NOTHING}
    markers = kind != "words"
    lm = hybrid() if kind == "hybrid" else build("llama", slot=slots[kind], markers=markers, num_thoughts=2 * markers)
    samples = sampled(lm, temperature)
    if kind == "hybrid":
        assert len({sample.mode for sample in samples}) == 3
    batch = batch_of(lm, samples, OBJECTIVES["grpo"])
    again = SamplingDistribution.of(lm.special, temperature).log_probs(lm, batch)
    expected = torch.cat([sample.log_probs for sample in samples])
    torch.testing.assert_close(again.detach(), expected, rtol=1e-5, atol=1e-5)
    for sample in samples:
        ids = sample.layout.ids.tolist()
        assert (sample.layout.control >= 0) == (kind == "hybrid")
        assert len(sample.log_probs) == len(ids) - sample.layout.num_prompt + (kind == "hybrid")
        assert ids.count(lm.latent_id) == sample.num_thoughts
        assert sample.truncated == (ids[-1] != lm.special.eos)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_completions_are_scored_after_their_number_of_thoughts(count: int) -> None:
    lm = build("llama", num_thoughts=2)
    out = lm.generate(*padded(QUESTIONS), max_new_tokens=6, num_thoughts=count, log_probs=True)
    samples = completions(lm, out)
    again = SamplingDistribution.of(lm.special).score(lm, samples, 4)
    for sample, question, row in zip(samples, QUESTIONS, again, strict=True):
        assert sample.layout.ids.tolist().count(lm.latent_id) == count
        torch.testing.assert_close(row, sample.log_probs, rtol=1e-5, atol=1e-5)
        said = completion_from_ids(lm, question, sample.completion_ids, text=sample.text, num_thoughts=count)
        assert said.layout.ids.tolist() == sample.layout.ids.tolist()


def test_forced_control_tokens_have_no_log_prob() -> None:
    lm = hybrid()
    out = lm.generate(*padded(QUESTIONS), max_new_tokens=4, mode="think", log_probs=True)
    sample = completions_of(lm, QUESTIONS[0], out, [0])[0]
    assert sample.layout.control == -1
    assert lm.special.control["think"] in sample.layout.ids
    assert not sample.is_control.any()


# --- objectives -------------------------------------------------------------------------------------


def loss_by_formula(name: str, log_probs: list[torch.Tensor], old: list[torch.Tensor], gains: Any) -> float:
    """The published losses, token by token; the first token of each completion is its control token."""
    objective, total = OBJECTIVES[name], 0.0
    for mine, theirs, its in zip(log_probs, old, gains, strict=True):
        terms = []
        for a, b, gain in zip(mine.tolist(), theirs.tolist(), its.tolist(), strict=True):
            ratio = torch.tensor(a - b).exp().item()
            terms.append(min(ratio * gain, max(min(ratio, 1 + objective.clip_high), 1 - objective.clip_low) * gain))
        n = len(log_probs)
        total -= {
            "grpo": sum(terms) / len(terms) / n,
            "dr_grpo": sum(terms) / 7 / n,
            "dapo": sum(terms) / sum(map(len, log_probs)),
            "degrpo": (1e-3 * terms[0] + sum(terms[1:]) / (len(terms) - 1)) / n,
        }[name]
    return total


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_policy_loss_equals_the_papers(name: str, by_token: bool) -> None:
    lm, objective = hybrid(), OBJECTIVES[name]
    samples = sampled(lm)
    shifted = [replace(s, log_probs=s.log_probs + 0.4 * torch.randn(len(s.log_probs))) for s in samples]
    batch = batch_of(lm, shifted, objective, on_policy=False)
    if by_token:
        batch = replace(batch, advantages=torch.randn(batch.denominators[0]))
    policy = SamplingDistribution.of(lm.special)
    loss = PolicyLoss(policy, objective, 0.0)(lm, batch) / batch.denominators[0]
    lengths = [len(sample.log_probs) for sample in samples]
    now = list(policy.log_probs(lm, batch).detach().split(lengths))
    expected = loss_by_formula(name, now, [sample.log_probs for sample in shifted], batch.advantages.split(lengths))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_kl_weights_equal_token_weights() -> None:
    lm, objective = hybrid(), OBJECTIVES["degrpo"]
    samples = sampled(lm)
    reference = [sample.log_probs + 0.1 for sample in samples]
    batch = replace(batch_of(lm, samples, objective), reference=torch.cat(reference))
    policy = SamplingDistribution.of(lm.special)
    with_it, without = (PolicyLoss(policy, objective, beta)(lm, batch) / batch.denominators[0] for beta in (0.5, 0.0))
    log_probs = policy.log_probs(lm, batch).detach().split([len(sample.log_probs) for sample in samples])
    mean = sum(float(kl_k3(a, b).mean()) for a, b in zip(log_probs, reference, strict=True)) / len(samples)
    assert float((with_it - without).detach()) == pytest.approx(0.5 * mean, rel=1e-4)


def test_control_token_scale_and_weight() -> None:
    lengths, control = torch.tensor([3, 5]), torch.tensor([1, 0, 0, 1, 0, 0, 0, 0]).bool()
    totals = Totals(2, 8, 2, 10)
    per_completion, per_token = OBJECTIVES["grpo"].denominator, OBJECTIVES["dapo"].denominator
    plain, whole = Objective(per_completion).weights(lengths, control, totals)
    slowed, _ = Objective(per_completion, control_token_scale=0.1).weights(lengths, control, totals)
    torch.testing.assert_close(slowed, torch.where(control, 0.1 * plain, plain))
    alone, also_whole = Objective(per_completion, control_token_weight=0.01).weights(lengths, control, totals)
    torch.testing.assert_close(alone, torch.tensor([0.005, 1 / 4, 1 / 4, 0.005, *[1 / 8] * 4]))
    torch.testing.assert_close(whole, also_whole)
    tokens, _ = Objective(per_token, control_token_weight=0.01).weights(lengths, control, totals)
    torch.testing.assert_close(tokens, torch.tensor([0.005, 1 / 6, 1 / 6, 0.005, *[1 / 6] * 4]))
    without, _ = Objective(per_token, control_token_weight=0.01).weights(lengths, control & False, Totals(2, 8, 0, 10))
    torch.testing.assert_close(without, torch.full((8,), 1 / 8), msg="nobody chooses a mode: the mean over all tokens")


@pytest.mark.parametrize("kind", ["hybrid", "words", "forced"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_other_tokens_keep_their_weight_beside_a_control_token_weight(name: str, kind: str) -> None:
    lm = build("llama", torch.float32, slot=NOTHING, markers=False) if kind == "words" else hybrid()
    samples = sampled(lm) if kind != "forced" else forced(lm)
    objective = replace(OBJECTIVES[name], control_token_weight=0.01)
    batch = batch_of(lm, samples, objective)
    words = [len(sample.log_probs) - int(sample.is_control.sum()) for sample in samples]
    expected = []
    for sample, count in zip(samples, words, strict=True):
        word = {
            "grpo": 1 / (len(samples) * count), "degrpo": 1 / (len(samples) * count),
            "dr_grpo": 1 / (len(samples) * 7), "dapo": 1 / sum(words),
        }[name]  # fmt: skip
        expected += [0.01 / len(samples) if is_control else word for is_control in sample.is_control.tolist()]
    assert (batch.weights / batch.denominators[0]).tolist() == pytest.approx(expected, rel=1e-5)
    if name != "dr_grpo":
        on_words = batch.weights[~batch.is_control].sum() / batch.denominators[0]
        assert float(on_words) == pytest.approx(1, rel=1e-5)


def forced(lm: LatentLM) -> list[Completion]:
    """Completions in a forced mode, which have no sampled control token."""
    out = lm.generate(*padded(QUESTIONS), max_new_tokens=6, mode="short", log_probs=True)
    return completions(lm, out) * GROUP


def test_advantages_and_zero_variance_groups() -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    torch.testing.assert_close(advantages(rewards, False), torch.tensor([[0.5, -0.5, 0.5, -0.5], [0.0] * 4]))
    assert advantages(rewards, True)[0].std() == pytest.approx(1, abs=1e-3)
    assert not advantages(rewards, True)[1].any()
    assert has_zero_variance(rewards).tolist() == [False, True]
    with pytest.raises(ValueError, match="A group of one completion"):
        advantages(rewards[:, :1], False)


# --- the same whatever the split --------------------------------------------------------------------


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_policy_loss_does_not_depend_on_the_micro_batch(name: str) -> None:
    found = [updated(SPLIT[0], World(), name, size) for size in (16, 5, 1)]
    assert found[0][1] > 1e-4
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def updated(config: EngineConfig, world: World, name: str, size: int) -> tuple[float, float]:
    """Loss and gradient norm of an update with thoughts, modes and a reference, sharded over ranks."""
    objective, lm = OBJECTIVES[name], hybrid(dtype=torch.float32)
    samples = sampled(lm)
    shifted = [replace(s, log_probs=s.log_probs + 0.2) for s in samples]
    gains, totals, passes = gains_of(samples, objective), totals_of(samples, 7), max(s.passes for s in samples)
    mine, parts = list(range(world.rank, len(samples), world.size)), []
    for rows in (mine[first : first + size] for first in range(0, len(mine), size)):
        part = policy_batch(
            [shifted[i] for i in rows], [gains[i] for i in rows], objective, totals, lm.special, on_policy=False,
            passes=passes,
        )  # fmt: skip
        parts.append(replace(part, reference=torch.cat([samples[i].log_probs - 0.1 for i in rows])))
    loss = Loss(PolicyLoss(SamplingDistribution.of(lm.special), objective, 0.1))
    engine = make_engine(lm, loss, config, OptimizerConfig(lr=1e-3), world)
    engine.dry_run(parts[0])
    done = engine.update(parts, 1e-3)
    return done.loss, done.grad_norm


SPLIT = [
    EngineConfig(device="cpu", threads=1, timeout=120),
    EngineConfig(kind=EngineKind.deepspeed, zero_stage=3, device="cpu", threads=1, timeout=120),
]


def on_two() -> None:
    with init_distributed(SPLIT[0]) as world:
        for config in SPLIT:
            for name in OBJECTIVES:
                together_found = updated(config, world, name, 4)
                alone = updated(SPLIT[0], World(), name, 8)
                assert alone[1] > 1e-4
                assert together_found == pytest.approx(alone, rel=1e-4, abs=1e-6), (config.kind, name)


@pytest.mark.slow
def test_policy_update_does_not_depend_on_the_number_of_processes() -> None:
    together(on_two)


# --- TRL --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own: it uses names that transformers is giving up
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_policy_loss_without_thoughts_equals_trl(name: str, tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    lm = build("llama", torch.float32, slot=NOTHING, markers=False)
    samples = sampled(lm)
    reference = [s.log_probs + 0.1 for s in samples]
    shifted = [replace(s, log_probs=s.log_probs + 0.3 * torch.randn(len(s.log_probs))) for s in samples]
    objective, beta = OBJECTIVES[name], 0.04
    batch = replace(batch_of(lm, shifted, objective, on_policy=False), reference=torch.cat(reference))
    nothing_refused = SamplingDistribution()
    ours = PolicyLoss(nothing_refused, objective, beta)(lm, batch) / batch.denominators[0]
    ours.backward()
    our_gradients = gradients(lm)

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), loss_type=name, beta=0.0, epsilon=objective.clip_low,
        epsilon_high=objective.clip_high, num_generations=GROUP, per_device_train_batch_size=len(samples),
        max_completion_length=7, use_cpu=True, report_to="none", bf16=False, activation_checkpointing=False,
        use_bias_correction_kl=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        lm.base, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["3 7"]}), processing_class=lm.tokenizer,
    )  # fmt: skip
    trainer.beta = beta  # set from the start it would load a reference from the hub, and the one here is given
    lm.zero_grad()
    theirs = trainer._compute_loss(lm.base, pad_as_trl(lm, shifted, reference, batch))
    theirs.backward()
    assert float(theirs.detach()) == pytest.approx(float(ours.detach()), rel=1e-4)
    assert relative(gradients(lm), our_gradients) < 1e-4


def pad_as_trl(
    lm: LatentLM, samples: list[Completion], reference: list[torch.Tensor], batch: PolicyBatch
) -> dict[str, torch.Tensor]:
    """Pad prompts on the left and completions on the right, as TRL does."""
    prompts = [sample.layout.ids[: sample.layout.num_prompt].tolist() for sample in samples]
    answers = [sample.layout.ids[sample.layout.num_prompt :].tolist() for sample in samples]
    before, after = max(map(len, prompts)), max(map(len, answers))

    def right(rows: list[Any], fill: float) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (after - len(row))] for row in rows])

    lengths = [len(answer) for answer in answers]
    return {
        "prompt_ids": torch.tensor([[lm.special.pad] * (before - len(row)) + row for row in prompts]),
        "prompt_mask": torch.tensor([[0] * (before - len(row)) + [1] * len(row) for row in prompts]),
        "completion_ids": right(answers, lm.special.pad).long(),
        "completion_mask": right([[1] * length for length in lengths], 0).long(),
        "advantages": batch.advantages[torch.tensor([0, *lengths]).cumsum(0)[:-1]],
        "old_per_token_logps": right([sample.log_probs.tolist() for sample in samples], 0.0),
        "ref_per_token_logps": right([row.tolist() for row in reference], 0.0),
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
    }
