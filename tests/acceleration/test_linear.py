"""Gradients of weights, summed once over all passes: those of a sum pass by pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.models import build, gradients, in_graph, mixed_batch, relative
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut import LatentLM
from coconut.acceleration import linear
from coconut.acceleration.linear import _Product, onednn_linear, sparse_embedding_gradient


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", 1)


def both(lm: LatentLM, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Gradients summed pass by pass, and once."""
    found = []
    for least in (2**40, 1):
        monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", least)
        lm.zero_grad()
        lm(**batch).loss.backward()
        found.append(gradients(lm))
    return found


def test_equals_the_plain_path(family: str) -> None:
    lm = build(family)
    batch = mixed_batch(lm)
    lm(**batch, use_cache=False).loss.backward()
    plain = gradients(lm)
    lm.zero_grad()
    loss = lm(**batch).loss
    assert in_graph(loss, _Product) > 0
    loss.backward()
    assert relative(gradients(lm), plain) < 1e-9
    linear = [module for module in lm.base.modules() if isinstance(module, nn.Linear | Conv1D)]
    assert not any("forward" in vars(module) for module in linear), "nothing of it stays on the layers"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Conv1D, nn.Linear])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_onednn_makes_the_products_of_the_layer(kind: Any, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer: Any = Conv1D(48, 80) if kind is Conv1D else nn.Linear(80, 48, bias)
    found = []
    for way in (onednn_linear, lambda layer, given: nullcontext()):
        given = torch.randn(2, rows, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with way(layer, given):
            made = layer(given)
        assert in_graph(made, _Product) == (way is onednn_linear)
        made.square().sum().backward()
        weights = {name: weight.grad for name, weight in layer.named_parameters()}
        found.append({"made": made.detach(), "given": given.grad, **weights})
        layer.zero_grad(set_to_none=True)
    ours, torchs = found
    for name, tensor in torchs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-4)
    assert "forward" not in vars(layer)


def test_which_passes_onednn_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("gpt2", torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    products = 4 * lm.base.config.n_layer + 1
    assert in_graph(lm(ids, labels=ids).loss, _Product) == products, "in float32 on a CPU"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not in_graph(lm(ids, labels=ids).loss, _Product)
    monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", 2**40)
    assert not in_graph(lm(ids, labels=ids).loss, _Product), "where weights are large"


def test_a_model_in_float32_is_the_same_without_onednn(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(family, torch.float32)
    batch = mixed_batch(lm)
    found = []
    for onednn in (True, False):
        if not onednn:
            monkeypatch.setattr("coconut.acceleration.linear._by_onednn", lambda given: False)
        lm.zero_grad()
        lm(**batch).loss.backward()
        answers = lm.generate(batch["input_ids"][:, :2].clamp(max=20), num_thoughts=2, max_new_tokens=4)
        found.append((gradients(lm), answers.tokens.tolist()))
    assert relative(found[0][0], found[1][0]) < 1e-5
    assert found[0][1] == found[1][1]


def test_weights_that_are_not_trained_keep_nothing() -> None:
    lm = build("gpt2", torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    lm(ids, labels=ids).loss.backward()
    whole = gradients(lm)
    for name, weight in lm.named_parameters():
        weight.requires_grad = "ln_1" in name
    lm.zero_grad(set_to_none=True)
    lm(ids, labels=ids).loss.backward()
    some = gradients(lm)
    assert {name for name in whole if "ln_1" in name} == set(some)
    assert relative(some, {name: whole[name] for name in some}) < 1e-6


def test_words_are_made_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("gpt2", torch.float32)
    made: list[int] = []

    def counted(given: Tensor, *rest: Any) -> Tensor:
        made.append(len(given))
        return product(given, *rest)

    product = linear._product
    monkeypatch.setattr(linear, "_product", counted)
    numbers = []
    for words in (1, 4):
        made.clear()
        lm.generate(torch.tensor([[3, 4]]), num_thoughts=1, max_new_tokens=words, min_new_tokens=words)
        numbers.append(len(made))
    assert numbers[1] - numbers[0] == 3 * (4 * lm.base.config.n_layer + 1)


def test_what_a_layer_makes_may_be_changed_in_place() -> None:
    layer: Any = nn.Linear(8, 8)
    given = torch.randn(2, 3, 8, requires_grad=True)
    with onednn_linear(layer, given):
        made = layer(given)
    made[..., 0] = 1.0
    made.sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], torch.zeros(8))
    assert given.grad is not None


def test_weights_that_are_in_parts_are_left_alone() -> None:
    layer: Any = nn.Linear(8, 8)
    given = torch.randn(2, 8)
    with onednn_linear(layer, given):
        assert "forward" in vars(layer)
    layer.weight.ds_id = 0
    with onednn_linear(layer, given):
        assert "forward" not in vars(layer)


def test_layers_that_are_run_again(family: str) -> None:
    lm = build(family, torch.float32).train()
    batch = mixed_batch(lm)
    lm(**batch).loss.backward()
    kept = gradients(lm)
    lm.activation_checkpointing = True
    loss = lm(**batch).loss
    for _ in range(2):
        lm.zero_grad()
        loss.backward(retain_graph=True)
        assert relative(gradients(lm), kept) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("thoughts", [True, False])
def test_a_second_derivative_is_right_or_refused(thoughts: bool, dtype: torch.dtype) -> None:
    lm = build("gpt2", dtype)
    lm.base.set_attn_implementation("eager")
    ids = torch.tensor([[3, 4, lm.latent_id if thoughts else 5, 6]])
    weight: Any = lm.base.get_parameter("transformer.ln_f.weight")
    loss = lm(ids, labels=ids.masked_fill(ids == lm.latent_id, -100)).loss
    if thoughts or dtype == torch.float32:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, [weight], create_graph=True)
    else:
        (first,) = torch.autograd.grad(loss, [weight], create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), [weight])
        assert second.any()


@pytest.mark.parametrize("use_cache", [True, False])
def test_under_transformers_own_checkpointing(use_cache: bool) -> None:
    lm = build("gpt2", torch.float32).train()
    ids = torch.randint(3, 20, (2, 9))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 6, -100)}
    lm(**batch).loss.backward()
    kept = gradients(lm)
    lm.zero_grad()
    newer = hasattr(lm.base, "activation_checkpointing_enable")
    getattr(lm.base, f"{'activation' if newer else 'gradient'}_checkpointing_enable")()
    lm(**batch, use_cache=use_cache).loss.backward()
    assert relative(gradients(lm), kept) < 1e-5


def test_only_where_there_are_several_passes_and_gradients() -> None:
    lm = build("gpt2")
    batch = mixed_batch(lm)
    words = {key: value[:, :3] for key, value in batch.items()}
    words["input_ids"] = words["input_ids"].clamp(max=20)
    assert not in_graph(lm(**words).loss, _Product)
    with torch.no_grad():
        assert lm(**batch).loss.grad_fn is None
    for name, weight in lm.named_parameters():
        weight.requires_grad = "c_fc" in name
    frozen = in_graph(lm(**batch).loss, _Product)
    for weight in lm.parameters():
        weight.requires_grad = True
    assert 0 < frozen < in_graph(lm(**batch).loss, _Product)


def test_in_bfloat16_it_is_as_close_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("llama", torch.float32)
    batch = mixed_batch(lm)
    exact, _ = both(lm, batch, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        each, once = both(lm, batch, monkeypatch)
    assert all(gradient.dtype == torch.float32 for gradient in once.values())
    assert relative(once, exact) < 1.2 * relative(each, exact) < 0.5


def test_a_graph_may_be_gone_through_twice_and_in_part() -> None:
    lm = build("gpt2")
    loss = lm(**mixed_batch(lm)).loss
    loss.backward(retain_graph=True)
    first = gradients(lm)
    some = [weight for name, weight in lm.named_parameters() if "ln_f" in name or "wte" in name]
    torch.autograd.grad(loss, some, retain_graph=True)
    lm.zero_grad()
    loss.backward()
    assert relative(gradients(lm), first) < 1e-12


@pytest.mark.usefixtures("group_of_one")
def test_under_distributed_data_parallel() -> None:
    lm = build("gpt2", torch.float32)
    batch = mixed_batch(lm)
    lm(**batch).loss.backward()
    alone = gradients(lm)
    lm.zero_grad()
    nn.parallel.DistributedDataParallel(lm)(**batch).loss.backward()
    assert relative(gradients(lm), alone) < 1e-6


def test_a_table_that_is_the_heads_gets_one_gradient_of_its_size(family: str) -> None:
    lm = build(family)
    table: Any = lm.base.get_input_embeddings()
    head: Any = lm.base.get_output_embeddings()
    tied = head.weight is table.weight
    with sparse_embedding_gradient(lm.base):
        assert table(torch.tensor([1, 2])).grad_fn._saved_sparse == tied
    assert not table.sparse
    with torch.no_grad(), sparse_embedding_gradient(lm.base):
        assert not table.sparse
    lm(**mixed_batch(lm)).loss.backward()
    assert table.weight.grad.layout == torch.strided
    ids = torch.randint(3, 35, (2, 9))
    lm.zero_grad()
    lm(ids, labels=torch.full_like(ids, -100)).loss_sum.backward()
    assert table.weight.grad.layout == torch.strided, "also where nothing is predicted"
    assert not table.weight.grad.any()
