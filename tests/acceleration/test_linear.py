"""Linear layers: oneDNN products and deferred weight gradients equal torch's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.models import build, gradients, in_graph, mixed_batch, relative, step
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coconut import LatentLM
from coconut.acceleration import linear
from coconut.acceleration.linear import _Linear, onednn_linear
from coconut.config import MECHANISMS


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", 1)


def both(lm: LatentLM, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Gradients computed in every pass, and once for all passes."""
    found = []
    for least in (2**40, 1):
        monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", least)
        found.append(step(lm, batch)[1])
    return found


def test_deferred_gradients_equal_the_recomputing_path(family: str) -> None:
    lm = build(family)
    batch = mixed_batch(lm)
    _, plain = step(lm, {**batch, "use_cache": False})
    lm.zero_grad()
    loss = lm(**batch).loss
    assert in_graph(loss, _Linear) > 0
    loss.backward()
    assert relative(gradients(lm), plain) < 1e-9
    linear = [module for module in lm.base.modules() if isinstance(module, nn.Linear | Conv1D)]
    assert not any("forward" in vars(module) for module in linear), "nothing of it stays on the layers"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Conv1D, nn.Linear])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_onednn_products_equal_those_of_the_layer(kind: Any, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer: Any = Conv1D(48, 80) if kind is Conv1D else nn.Linear(80, 48, bias)
    found = []
    for context in (onednn_linear, lambda layer, inputs: nullcontext()):
        inputs = torch.randn(2, rows, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with context(layer, inputs):
            made = layer(inputs)
        assert in_graph(made, _Linear) == (context is onednn_linear)
        made.square().sum().backward()
        weights = {name: weight.grad for name, weight in layer.named_parameters()}
        found.append({"made": made.detach(), "inputs": inputs.grad, **weights})
        layer.zero_grad(set_to_none=True)
    ours, torchs = found
    for name, tensor in torchs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-4)
    assert "forward" not in vars(layer)


def test_onednn_computes_large_float32_layers_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("gpt2", torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    products = 4 * lm.base.config.n_layer + 1
    assert in_graph(lm(ids, labels=ids).loss, _Linear) == products, "in float32 on a CPU"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not in_graph(lm(ids, labels=ids).loss, _Linear)
    monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", 2**40)
    assert not in_graph(lm(ids, labels=ids).loss, _Linear), "where weights are large"


def test_a_model_in_float32_is_the_same_without_onednn(family: str) -> None:
    lm = build(family, torch.float32)
    batch = mixed_batch(lm)
    found = []
    for mechanisms in (frozenset(MECHANISMS), frozenset(MECHANISMS) - {"onednn"}):
        lm.acceleration.mechanisms = mechanisms
        _, found_gradients = step(lm, batch)
        answers = lm.generate(batch["input_ids"][:, :2].clamp(max=20), num_thoughts=2, max_new_tokens=4)
        found.append((found_gradients, answers.tokens.tolist()))
    assert relative(found[0][0], found[1][0]) < 1e-5
    assert found[0][1] == found[1][1]


def test_frozen_weights_get_no_gradient() -> None:
    lm = build("gpt2", torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    batch = {"input_ids": ids, "labels": ids}
    _, whole = step(lm, batch)
    for name, weight in lm.named_parameters():
        weight.requires_grad = "ln_1" in name
    lm.zero_grad(set_to_none=True)
    _, some = step(lm, batch)
    assert {name for name in whole if "ln_1" in name} == set(some)
    assert relative(some, {name: whole[name] for name in some}) < 1e-6


def test_generated_tokens_use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("gpt2", torch.float32)
    made: list[int] = []

    def counted(inputs: Tensor, *rest: Any, **options: Any) -> Tensor:
        made.append(len(inputs))
        return product(inputs, *rest, **options)

    product = linear.matmul
    monkeypatch.setattr(linear, "matmul", counted)
    numbers = []
    for words in (1, 4):
        made.clear()
        lm.generate(torch.tensor([[3, 4]]), num_thoughts=1, max_new_tokens=words, min_new_tokens=words)
        numbers.append(len(made))
    assert numbers[1] - numbers[0] == 3 * (4 * lm.base.config.n_layer + 1)


def test_outputs_can_be_changed_in_place() -> None:
    layer: Any = nn.Linear(8, 8)
    inputs = torch.randn(2, 3, 8, requires_grad=True)
    with onednn_linear(layer, inputs):
        made = layer(inputs)
    made[..., 0] = 1.0
    made.sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], torch.zeros(8))
    assert inputs.grad is not None


def test_partitioned_weights_are_left_alone() -> None:
    layer: Any = nn.Linear(8, 8)
    inputs = torch.randn(2, 8)
    with onednn_linear(layer, inputs):
        assert "forward" in vars(layer)
    layer.weight.ds_id = 0
    with onednn_linear(layer, inputs):
        assert "forward" not in vars(layer)


def test_gradients_with_recomputed_layers_are_the_same(family: str) -> None:
    lm = build(family, torch.float32).train()
    batch = mixed_batch(lm)
    _, kept = step(lm, batch)
    lm.acceleration.activation_checkpointing = True
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
def test_gradients_under_transformers_checkpointing_are_the_same(use_cache: bool) -> None:
    lm = build("gpt2", torch.float32).train()
    ids = torch.randint(3, 20, (2, 9))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 6, -100)}
    _, kept = step(lm, batch)
    newer = hasattr(lm.base, "activation_checkpointing_enable")
    getattr(lm.base, f"{'activation' if newer else 'gradient'}_checkpointing_enable")()
    assert relative(step(lm, {**batch, "use_cache": use_cache})[1], kept) < 1e-5


def test_gradients_are_deferred_only_over_several_training_passes() -> None:
    lm = build("gpt2")
    batch = mixed_batch(lm)
    words = {key: value[:, :3] for key, value in batch.items()}
    words["input_ids"] = words["input_ids"].clamp(max=20)
    assert not in_graph(lm(**words).loss, _Linear)
    with torch.no_grad():
        assert lm(**batch).loss.grad_fn is None
    for name, weight in lm.named_parameters():
        weight.requires_grad = "c_fc" in name
    frozen = in_graph(lm(**batch).loss, _Linear)
    for weight in lm.parameters():
        weight.requires_grad = True
    assert 0 < frozen < in_graph(lm(**batch).loss, _Linear)


def test_deferred_gradients_in_bfloat16_are_as_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("llama", torch.float32)
    batch = mixed_batch(lm)
    exact, _ = both(lm, batch, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        each, once = both(lm, batch, monkeypatch)
    assert all(gradient.dtype == torch.float32 for gradient in once.values())
    assert relative(once, exact) < 1.2 * relative(each, exact) < 0.5


def test_backward_can_run_twice_and_for_some_weights() -> None:
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
def test_gradients_under_distributed_data_parallel_are_the_same() -> None:
    lm = build("gpt2", torch.float32)
    batch = mixed_batch(lm)
    _, alone = step(lm, batch)
    lm.zero_grad()
    nn.parallel.DistributedDataParallel(lm)(**batch).loss.backward()
    assert relative(gradients(lm), alone) < 1e-6
