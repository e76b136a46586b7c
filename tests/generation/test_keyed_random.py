"""Answers from random keys: the right distribution, and the same answer in any batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import QUESTIONS, build, hybrid, padded, rows_of
from scipy.stats import binomtest, chisquare, kstest

from coconut import LatentLM
from coconut.generation.keyed_random import KeyedSampling, Stream, choose, normal, uniform
from coconut.generation.thoughts import NO_NOISE, ThoughtNoise
from coconut.methods import PAUSES, THOUGHTS, Update
from coconut.rewards.thoughts import thought_means

KEYS = [(3, question, sample) for question in range(4) for sample in range(3)]


def keyed(lm: LatentLM, rows: list[int], samples: int = 3, **options: Any) -> Any:
    keys = [key for row in rows for key in KEYS[row * 3 : row * 3 + samples]]
    ids, mask = padded([QUESTIONS[row] for row in rows])
    return lm.generate(ids, mask, max_new_tokens=6, num_return_sequences=samples, random_keys=keys, **options)


@pytest.mark.parametrize(
    ("noise", "dropout", "temperature"), [(0, 0, 1.5), (0.5, 0, 0), (0.5, 0, 1.5), (0, 0.3, 0), (0.5, 0.3, 1.5)]
)
def test_an_answer_does_not_depend_on_its_batch(noise: float, dropout: float, temperature: float) -> None:
    lm = build("llama", num_thoughts=3)
    options: dict[str, Any] = {"thought_noise": noise, "thought_dropout": dropout}
    if temperature:
        options |= {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    together = keyed(lm, [0, 1, 2, 3], **options)
    assert len({tuple(row) for row in rows_of(together)}) > 4, "samples differ"
    torch.manual_seed(1)
    alone = [keyed(lm, [row], **options) for row in range(4)]
    assert [row for out in alone for row in rows_of(out)] == rows_of(together)
    thoughts = torch.cat([out.thoughts for out in alone])
    torch.testing.assert_close(thoughts, together.thoughts, rtol=1e-9, atol=1e-9)
    reverse = keyed(lm, [3, 2, 1, 0], samples=1, **options)
    assert rows_of(reverse) == rows_of(together)[::3][::-1]


def test_modes_are_drawn_from_the_key_and_answers_keep_their_order() -> None:
    lm = hybrid()
    together = keyed(lm, [0, 1, 2, 3], do_sample=True, temperature=2.0, log_probs=True)
    assert len(set(together.modes)) > 1
    for row in range(4):
        alone = keyed(lm, [row], do_sample=True, temperature=2.0, log_probs=True)
        own = slice(row * 3, row * 3 + 3)
        assert (alone.modes, rows_of(alone)) == (together.modes[own], rows_of(together)[own])
        assert alone.mode_log_probs == pytest.approx(together.mode_log_probs[own])


def test_words_follow_the_distribution_of_the_model() -> None:
    """The first word of many samples against the probabilities at the temperature, of the words that top_p keeps."""
    lm, samples = build("gpt2", num_thoughts=1), 4000
    ids, mask = padded([QUESTIONS[0]])
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_p": 0.8, "max_new_tokens": 1}
    keys = [(0, sample) for sample in range(samples)]
    out = lm.generate(ids, mask, num_return_sequences=samples, random_keys=keys, **settings)
    row = [*QUESTIONS[0], lm.special.bot, lm.latent_id, lm.special.eot]
    logits = lm(torch.tensor([row]), return_logits=True).logits[0, -1].detach()
    logits[lm.special.added] = -torch.inf
    probabilities = (logits / 1.3).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    kept = tokens[: int((ordered.cumsum(0) < 0.8).sum()) + 1]
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    counts = torch.bincount(out.tokens[:, 0], minlength=len(expected))
    assert set(counts.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert len(kept) > 3
    assert chisquare(counts[kept], samples * expected[kept]).pvalue > 1e-3


def test_noise_has_the_variance_that_is_asked_for() -> None:
    lm = build("llama", num_thoughts=3)
    rows = [question for question in QUESTIONS for _ in range(20)]
    ids, mask = padded(rows)
    keys = [(5, n) for n in range(len(rows))]
    out = lm.generate(ids, mask, max_new_tokens=1, thought_noise=0.7, random_keys=keys)
    noise = ((out.thoughts - thought_means(lm, rows, out.thoughts)) / 0.7).flatten(1)
    assert kstest(noise.flatten(), "norm").pvalue > 1e-3
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert float(torch.corrcoef(noise).triu(1).abs().max()) < 0.5, "each answer has noise of its own"


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("parallel", [False, True])
def test_dropout_is_that_of_a_flat_computation(noise: float, parallel: bool) -> None:
    """Each fed number from the model's own one, a number of the key's generator, and arithmetic, one at a time."""
    iterated: dict[str, Any] = {"slot": replace(THOUGHTS, update=Update.jacobi, iterations=2)} if parallel else {}
    lm = build("llama", num_thoughts=3, **iterated)
    keys = KEYS[:4]
    options: dict[str, Any] = {"thought_dropout": 0.3, "thought_noise": noise, "random_keys": keys}
    out = lm.generate(*padded(QUESTIONS), max_new_tokens=4, **options)
    if parallel:
        own = lm.generate(*padded(QUESTIONS), max_new_tokens=4).thoughts
    else:
        own = thought_means(lm, QUESTIONS, out.thoughts)
    dropped = 0
    for key, fed_KD, own_KD in zip(keys, out.thoughts.tolist(), own.tolist(), strict=True):
        chance = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(3,)))
        gauss = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(1,)))
        for fed_D, own_D in zip(fed_KD, own_KD, strict=True):
            for fed, value in zip(fed_D, own_D, strict=True):
                is_dropped = chance.random() < 0.3
                dropped += is_dropped
                normal = float(gauss.standard_normal(dtype=np.float32))
                assert fed == pytest.approx((0 if is_dropped else value / 0.7) + noise * normal, abs=1e-5)
    assert binomtest(dropped, out.thoughts.numel(), 0.3).pvalue > 1e-3
    again = lm.generate(*padded(QUESTIONS), max_new_tokens=4, thoughts=out.thoughts)
    assert rows_of(again) == rows_of(out), "fed back, they give the same answers: nothing else is dropped"


def test_dropout_without_keys_keeps_the_mean_and_is_no_part_of_the_plain_model() -> None:
    torch.manual_seed(0)
    dropped = ThoughtNoise(dropout=0.25).apply(torch.ones(40, 10, 25))
    assert set(dropped.flatten().tolist()) == {0.0, float(torch.tensor(1) / 0.75)}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    assert not NO_NOISE
    lm = build("llama", num_thoughts=3)
    plain, without = (
        lm.generate(*padded(QUESTIONS), max_new_tokens=4, log_probs=True, **options)
        for options in ({}, {"thought_dropout": 0.0, "random_keys": KEYS[:4]})
    )
    assert torch.equal(plain.thoughts, without.thoughts)
    assert plain.log_probs
    assert without.log_probs
    assert all(torch.equal(a, b) for a, b in zip(plain.log_probs, without.log_probs, strict=True))
    noisy, other = (
        lm.generate(*padded(QUESTIONS), max_new_tokens=4, thought_noise=0.5, random_keys=KEYS[:4], **options)
        for options in ({}, {"thought_dropout": 0.0})
    )
    assert torch.equal(noisy.thoughts, other.thoughts)


def test_invalid_dropout_is_refused() -> None:
    lm = build("llama", num_thoughts=2)
    for chance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"thought_dropout is {chance}; it must be a probability"):
            lm.generate(*padded(QUESTIONS), thought_dropout=chance)
    with pytest.raises(ValueError, match=r"thought_dropout=0\.1 is for the model's own thoughts"):
        lm.generate(*padded(QUESTIONS), thought_dropout=0.1, thoughts=torch.zeros(4, 2, 16))
    with pytest.raises(ValueError, match="no latent thoughts to replace, to make noisy"):
        build("llama", slot=PAUSES, num_thoughts=2).generate(*padded(QUESTIONS), thought_dropout=0.1)
    with pytest.raises(ValueError, match="leave out num_thoughts, thoughts, thought_noise, thought_dropout"):
        hybrid().generate(*padded(QUESTIONS), thought_dropout=0.1)


def test_streams_of_a_key_are_independent_and_begin_alike() -> None:
    assert torch.equal(uniform([(1, 2)], Stream.words, 9)[:, :4], uniform([(1, 2)], Stream.words, 4))
    longer, shorter = (ThoughtNoise(1.0, 0.5).draw([(1, 2)], count, 3) for count in (5, 2))
    assert all(torch.equal(a[:, :2], b) for a, b in zip(longer, shorter, strict=True))
    assert torch.equal(normal([(1, 2)], Stream.thoughts, 5, 3)[:, :2], normal([(1, 2)], Stream.thoughts, 2, 3))
    assert not torch.equal(uniform([(1, 2)], Stream.words, 4), uniform([(1, 2)], Stream.mode, 4))
    assert not torch.equal(uniform([(1, 2)], Stream.words, 4), uniform([(2, 1)], Stream.words, 4))


def test_choose_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0]).log()
    drawn = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits.expand(6, -1), drawn).tolist() == [0, 0, 2, 2, 3, 3]


def test_wrong_keys_and_settings_are_refused() -> None:
    lm = build("gpt2", num_thoughts=1)
    with pytest.raises(ValueError, match="random_keys has 2 keys, for 4 answers"):
        lm.generate(*padded(QUESTIONS), do_sample=True, random_keys=[(0,), (1,)])
    with pytest.raises(ValueError, match=r"min_p=0\.1 is not supported with random_keys"):
        lm.generate(*padded(QUESTIONS), do_sample=True, min_p=0.1, random_keys=[(n,) for n in range(4)])
    assert KeyedSampling.SETTINGS == ("temperature", "top_k", "top_p")
