"""Acceleration on and off: the same losses, gradients and answers, with each mechanism alone too."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.family_table import FAMILIES, Family, base_of, new_tokenizer
from helpers.models import assert_same, build, in_float64, in_graph, mixed_batch, padded, step
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coconut import LatentLM
from coconut.acceleration import attention, kv_cache, linear
from coconut.config import MECHANISMS, NOT_IDENTITY, EngineConfig
from coconut.generation.generate import Generated
from coconut.methods import Reasoning
from coconut.runs.loading import load_model, match_dtypes
from coconut.training.model_setup import apply_engine_options

SETTINGS = ["auto", *MECHANISMS]

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
QUESTIONS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [15], [16, 17, 18, 19, 20]]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "log_probs": True}


@pytest.fixture(autouse=True)
def _small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coconut.acceleration.linear.MIN_WEIGHT_NUMEL", 1)


def accelerate(lm: LatentLM, setting: str) -> LatentLM:
    lm.acceleration.mechanisms = EngineConfig(acceleration=setting).mechanisms
    return lm


@cache
def step_without(family: str, dtype: torch.dtype) -> tuple[LatentLM, dict[str, Any], tuple[Tensor, dict[str, Tensor]]]:
    """A model, a batch, and its loss and gradients without acceleration."""
    lm = build(family, dtype).train()
    batch = mixed_batch(lm)
    return lm, batch, step(accelerate(lm, "off"), batch)


@cache
def answers_without(family: str, dtype: torch.dtype, right: bool) -> tuple[LatentLM, Generated]:
    """A model and its answers without acceleration."""
    lm = build(family, dtype, num_thoughts=3)
    return lm, accelerate(lm, "off").generate(*padded(QUESTIONS, right), **OPTIONS)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_loss_and_gradients_are_those_without_acceleration(
    family: str, setting: str, checkpointing: bool, dtype: torch.dtype, tolerance: float
) -> None:
    lm, batch, expected = step_without(family, dtype)
    lm = deepcopy(lm)
    lm.acceleration.activation_checkpointing = checkpointing
    assert_same(step(accelerate(lm, setting), batch), expected, tolerance)


WORDS = torch.arange(48).reshape(4, 12) % 32 + 3
WITHOUT_THOUGHTS = {"input_ids": WORDS, "labels": WORDS.masked_fill(torch.arange(12) <= 7, -100)}


@pytest.mark.parametrize("change", [{"use_cache": False}, {"min_passes": 7}, WITHOUT_THOUGHTS], ids=list)
def test_other_batches_are_those_without_acceleration(family: str, change: dict[str, Any]) -> None:
    lm = build(family).train()
    batch = change if "labels" in change else {**mixed_batch(lm), **change}
    assert_same(step(accelerate(lm, "auto"), batch), step(accelerate(lm, "off"), batch))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_recomputing_layers_changes_nothing_without_acceleration(family: str, checkpointing: bool) -> None:
    lm = build(family).train()
    batch = mixed_batch(lm)
    expected = step(accelerate(lm, "off"), {**batch, "use_cache": False})
    lm.acceleration.activation_checkpointing = checkpointing
    assert_same(step(lm, batch), expected)


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_family_is_the_same(row: Family) -> None:
    """Among them those with sliding windows, whose caches differ most."""
    torch.manual_seed(0)
    lm = LatentLM.from_base(base_of(row), new_tokenizer(), init="random", reasoning=Reasoning(num_thoughts=3))
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    lm = in_float64(lm.to(torch.float64).eval()) if row.float64 else lm.eval()
    batch = mixed_batch(lm)
    expected = step(accelerate(lm, "off"), batch)
    assert_same(step(accelerate(lm, "auto"), batch), expected, 1e-6 if row.float64 else 1e-4)
    answers = [accelerate(lm, setting).generate(*padded(QUESTIONS), max_new_tokens=6) for setting in ("off", "auto")]
    assert torch.equal(answers[0].tokens, answers[1].tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("right", [False, True], ids=["padded left", "padded right"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_answers_are_those_without_acceleration(
    family: str, setting: str, right: bool, dtype: torch.dtype, tolerance: float
) -> None:
    lm, expected = answers_without(family, dtype, right)
    found = accelerate(deepcopy(lm), setting).generate(*padded(QUESTIONS, right), **OPTIONS)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.thoughts, expected.thoughts, rtol=0, atol=100 * max(tolerance, 1e-6))
    for ours, theirs in zip(found.log_probs or [], expected.log_probs or [], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_several_answers_with_thoughts_of_different_lengths_are_the_same(family: str) -> None:
    lm = build(family, num_thoughts=3)
    ids, mask = padded(QUESTIONS)
    results = []
    for setting in ("off", "auto"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "num_thoughts": [1, 3, 0, 2]}
        results.append(accelerate(lm, setting).generate(ids, mask, max_new_tokens=5, **options).tokens)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_off_is_plain_torch_and_transformers(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = accelerate(build(family, dtype).train(), "off")
    patched: list[Any] = []
    setattr_of_modules = torch.nn.Module.__setattr__

    def note(module: torch.nn.Module, name: str, value: Any) -> None:
        if name == "forward":
            patched.append(module)
        setattr_of_modules(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", note)
    loss = lm(**mixed_batch(lm)).loss
    lm.generate(*padded(QUESTIONS), num_thoughts=2, max_new_tokens=3)
    assert not patched
    functions = (linear._Linear, linear._Weight, attention._OneQuery, kv_cache._Append)
    assert not any(in_graph(loss, function) for function in functions)
    assert all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in lm.new_cache(9).layers)
    accelerate(lm, "auto")(**mixed_batch(lm))
    assert patched, "the test would notice a patch"


def test_the_switch_is_copied_with_the_model_and_set_at_any_time() -> None:
    lm = accelerate(build("gpt2"), "off")
    copy = deepcopy(lm)
    assert copy.acceleration.mechanisms == frozenset()
    accelerate(copy, "gelu")
    assert lm.acceleration.mechanisms == frozenset()
    assert copy.acceleration._model is copy.base


def test_a_second_derivative_exists_without_acceleration() -> None:
    lm = accelerate(build("gpt2"), "off")
    lm.base.set_attn_implementation("eager")
    ids = torch.tensor([[3, 4, lm.latent_id, 6]])
    weight: Any = lm.base.get_parameter("transformer.ln_f.weight")
    loss = lm(ids, labels=ids.masked_fill(ids == lm.latent_id, -100)).loss
    (first,) = torch.autograd.grad(loss, [weight], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), [weight])
    assert second.any()


@pytest.mark.parametrize("setting", ["on", "", "gelu,fast", "off,gelu"])
def test_unknown_mechanisms_are_refused_with_those_that_exist(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"engine\.acceleration={setting} names .*auto, off, or some of onednn,"):
        EngineConfig(acceleration=setting)


def test_settings_name_mechanisms() -> None:
    assert EngineConfig().mechanisms == frozenset(MECHANISMS)
    assert EngineConfig(acceleration="off").mechanisms == frozenset()
    assert EngineConfig(acceleration="gelu, kv_cache").mechanisms == {"gelu", "kv_cache"}
    assert "engine.acceleration" in NOT_IDENTITY


def test_loaded_models_and_their_references_take_the_setting(tmp_path: Path) -> None:
    build("gpt2", torch.float32).save_pretrained(tmp_path)
    lm = load_model(str(tmp_path), "best", EngineConfig(device="cpu", threads=1, acceleration="off"))
    assert lm.acceleration.mechanisms == frozenset()
    assert apply_engine_options(lm, EngineConfig(acceleration="gelu")).acceleration.mechanisms == {"gelu"}
    reference = match_dtypes(LatentLM.from_pretrained(tmp_path), lm, lm.device)
    assert reference.acceleration.mechanisms == {"gelu"}
