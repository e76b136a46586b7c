"""What benchmarks compare does the same work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.models import gradients, in_graph

from benchmarks import ways
from benchmarks.pieces import HALF, WITHOUT
from benchmarks.run import precision, questions
from coconut import LatentLM
from coconut.acceleration.attention import _OneQuery
from coconut.data.batching import Batch
from coconut.generation.generate import pad_rows


@pytest.fixture(scope="module")
def lm() -> LatentLM:
    lm = ways.make_model(ways.Size(2, 16, 2, 3))
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return lm


def done(way: Callable[[LatentLM, Batch], torch.Tensor], lm: LatentLM, batch: Batch) -> dict[str, torch.Tensor]:
    lm.zero_grad()
    loss = way(lm, batch)
    loss.backward()
    return gradients(lm) | {"loss": loss.detach()}


@pytest.mark.parametrize("thoughts", [0, 1, 3])
def test_the_released_way_is_ours(lm: LatentLM, thoughts: int) -> None:
    batch = ways.make_batch(lm, ways.make_data(8), thoughts, 3)
    assert len(set(batch.attention_mask.sum(1).tolist())) > 1, "rows differ in length"
    torch.testing.assert_close(done(ways.ours, lm, batch), done(ways.released, lm, batch), rtol=1e-4, atol=1e-6)


def test_without_thoughts_plain_fine_tuning_is_ours(lm: LatentLM) -> None:
    batch = ways.make_batch(lm, ways.make_data(8), 0, 3)
    whole = ways.pushed_left(batch, lm.special.pad)
    torch.testing.assert_close(done(ways.ours, lm, batch), done(ways.plain, lm, whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("piece", list(WITHOUT))
def test_a_piece_less_is_the_same_work(lm: LatentLM, piece: str) -> None:
    batch = ways.make_batch(lm, ways.make_data(8), 3, 3)
    whole = done(ways.ours, lm, batch)
    with WITHOUT[piece](lm):
        less = done(ways.ours, lm, batch)
    torch.testing.assert_close(less, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(done(ways.ours, lm, batch), whole, rtol=0, atol=0)


def test_what_half_precision_brings_is_left_away(lm: LatentLM) -> None:
    batch = ways.make_batch(lm, ways.make_data(8), 3, 3)
    found = {}
    for piece in HALF:
        with HALF[piece](lm), precision("bfloat16"):
            found[piece] = in_graph(ways.ours(lm, batch), _OneQuery)
    assert found == {"all": 2 * 2 + 1, "torch's attention": 0, "every state made": 2 * 2}, (
        "two layers, two thoughts without company, and in the last layer the question's last column"
    )


def test_the_released_way_answers_as_ours_does(lm: LatentLM) -> None:
    lm.eval()
    rows = questions(2)
    ours = ways.our_answers(lm, *pad_rows(rows, lm.special.pad), 2)
    assert ours == [ways.released_answer(lm, torch.tensor(row), 2) for row in rows]
    assert all(len(row) == ways.NEW_TOKENS for row in ours)
