"""The implementations and settings that benchmarks compare do the same work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.models import gradients, in_graph

from benchmarks import baselines
from benchmarks.ablations import accelerate, settings
from benchmarks.run import precision, questions
from coconut import LatentLM
from coconut.acceleration.attention import _OneQuery
from coconut.data.batching import Batch
from coconut.generation.generate import pad_rows

Implementation = Callable[[LatentLM, Batch], torch.Tensor]


@pytest.fixture(scope="module")
def lm() -> LatentLM:
    lm = baselines.make_model(baselines.Size(2, 16, 2, 3))
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return lm


def done(implementation: Implementation, lm: LatentLM, batch: Batch) -> dict[str, torch.Tensor]:
    lm.zero_grad()
    loss = implementation(lm, batch)
    loss.backward()
    return gradients(lm) | {"loss": loss.detach()}


@pytest.mark.parametrize("thoughts", [0, 1, 3])
def test_the_released_implementation_equals_ours(lm: LatentLM, thoughts: int) -> None:
    batch = baselines.make_batch(lm, baselines.make_data(8), thoughts, 3)
    assert len(set(batch.attention_mask.sum(1).tolist())) > 1, "rows differ in length"
    ours, released = done(baselines.ours, lm, batch), done(baselines.released, lm, batch)
    torch.testing.assert_close(ours, released, rtol=1e-4, atol=1e-6)


def test_without_thoughts_plain_fine_tuning_equals_ours(lm: LatentLM) -> None:
    batch = baselines.make_batch(lm, baselines.make_data(8), 0, 3)
    whole = baselines.padded_right(batch, lm.special.pad)
    torch.testing.assert_close(done(baselines.ours, lm, batch), done(baselines.plain, lm, whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", settings().values(), ids=settings())
def test_each_ablation_does_the_same_work(lm: LatentLM, setting: str) -> None:
    batch = baselines.make_batch(lm, baselines.make_data(8), 3, 3)
    accelerated = done(baselines.ours, lm, batch)
    ablated = done(baselines.ours, accelerate(lm, setting), batch)
    torch.testing.assert_close(ablated, accelerated, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(done(baselines.ours, accelerate(lm, "auto"), batch), accelerated, rtol=0, atol=0)


def test_ablations_in_half_precision_switch_the_attention_of_one_query(lm: LatentLM) -> None:
    batch = baselines.make_batch(lm, baselines.make_data(8), 3, 3)
    found = {}
    for setting in ("all", "no attention", "no final_layer", "none"):
        with precision("bfloat16"):
            found[setting] = in_graph(baselines.ours(accelerate(lm, settings()[setting]), batch), _OneQuery)
    accelerate(lm, "auto")
    assert found == {"all": 2 * 2 + 1, "no attention": 0, "no final_layer": 2 * 2, "none": 0}, (
        "two layers, two thoughts alone in their pass, and in the last layer the question's last position"
    )


@pytest.mark.slow
def test_the_released_implementation_answers_as_ours_does(lm: LatentLM) -> None:
    lm.eval()
    rows = questions(2)
    ours = baselines.answer(lm, *pad_rows(rows, lm.special.pad), 2)
    assert ours == [baselines.released_answer(lm, torch.tensor(row), 2) for row in rows]
    assert all(len(row) == baselines.NEW_TOKENS for row in ours)
