"""Activation checkpointing: the same numbers with less memory, in every family, with a cache."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import ARCHITECTURES, assert_same, build, gradients, mixed_batch, relative, step
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.memory import Living, Shape, activations, states
from coconut import LatentLM
from coconut.acceleration.facade import Acceleration

FUSED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {**ARCHITECTURES["llama"], "sliding_window": 4},
    "gemma3_text": {**ARCHITECTURES["llama"], "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {**FUSED, "intermediate_size": 48},
    "opt": {**FUSED, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi3": ARCHITECTURES["llama"],
}  # fmt: skip


def both(lm: LatentLM, batch: dict[str, Any], training: bool = True) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients with activations saved, and with layers recomputed."""
    found = []
    lm.train(training)
    for lm.acceleration.activation_checkpointing in (False, True):
        torch.manual_seed(0)
        found.append(step(lm, batch))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"min_passes": 7}])
def test_recomputed_layers_give_the_same_gradients(
    family: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    lm = build(family, dtype)
    assert_same(*both(lm, {**mixed_batch(lm), **options}), tolerance=tolerance)


@pytest.mark.parametrize("options", [{}, {"min_passes": 7}])
def test_layers_are_recomputed_in_eval_mode_too(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies and reward models are trained in eval()."""
    lm = build(family)
    layer = next(part for part in lm.base.modules() if isinstance(part, GradientCheckpointingLayer))
    forward, calls = layer.forward, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", counted)
    kept, again = both(lm, {**mixed_batch(lm), **options}, training=False)
    assert calls[0] % 3 == 0
    lm.acceleration.activation_checkpointing = False
    before, _ = calls[0], lm(**mixed_batch(lm), **options)
    assert 3 * (calls[0] - before) == before, "once where activations are kept, twice where they are recomputed"
    assert_same(again, kept)


@pytest.mark.parametrize("other", OTHERS)
def test_recomputation_works_in_other_families_and_with_sliding_windows(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, other, OTHERS[other])
    lm = build(other, torch.float32)
    assert_same(*both(lm, mixed_batch(lm)), tolerance=1e-5)
    ids = torch.randint(3, 35, (2, 12))
    ids[:, 6:9] = lm.latent_id
    torch.testing.assert_close(lm(ids, labels=ids).loss, lm(ids, labels=ids, use_cache=False).loss)


def test_recomputation_repeats_the_dropout_mask() -> None:
    lm = build("gpt2", torch.float32)
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    batch = mixed_batch(lm)
    (kept, kept_grads), (again, again_grads) = both(lm, batch)
    assert torch.equal(again, kept)
    assert relative(again_grads, kept_grads) < 1e-6
    assert not torch.equal(lm(**batch).loss, again), "dropout is on"


SHAPES = {
    "gpt2": Shape("gpt2", 4, 64, 64, 256, 0, gated=False),
    "llama": Shape("llama", 4, 64, 32, 128, 0),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def of_shape(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> LatentLM:
    sizes = {"n_embd": shape.hidden, "n_layer": shape.layers} if shape.name == "gpt2" else {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_key_value_heads": 2,
        "intermediate_size": shape.inner,
    }  # fmt: skip
    monkeypatch.setitem(ARCHITECTURES, shape.name, {**ARCHITECTURES[shape.name], **sizes})
    return build(shape.name, torch.float32).train()


def held(lm: LatentLM, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes alive after the forward pass, and after its result is deleted."""
    with Living() as living:
        out = lm(**batch)
        after = living.now
        del out
    return after, living.now


def test_saved_memory_falls_to_the_computed_size(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of two and four layers are compared, so that memory outside of the layers cancels."""
    widths = [40, 1, 1, 1, 17]
    ids = torch.randint(3, 35, (4, 60))
    found: dict[tuple[int, bool], int] = {}
    shapes = [replace(shape, layers=layers) for layers in (2, 4)]
    for one in shapes:
        lm = of_shape(one, monkeypatch)
        ids[:, 40:44] = lm.latent_id
        batch = {"input_ids": ids, "labels": torch.where(torch.arange(60) > 55, ids, -100)}
        for lm.acceleration.activation_checkpointing in (False, True):
            after, left = held(lm, batch)
            assert left < after / 20, "nothing holds the graph of a forward pass without a backward one"
            found[one.layers, lm.acceleration.activation_checkpointing] = after
    for again in (False, True):
        computed = [activations(one, 4, widths, 4, again) for one in shapes]
        assert found[4, again] - found[2, again] == pytest.approx(computed[1] - computed[0], rel=0.03)
    assert found[4, True] < found[4, False] / 3


def test_only_training_passes_are_recomputed() -> None:
    lm = build("llama", torch.float32)
    lm.acceleration.activation_checkpointing = True
    passed = torch.zeros(1, 3, 32), torch.ones(1, 3), torch.arange(3)[None]
    with pytest.raises(ValueError, match=r"DynamicCache.*new_cache"):
        lm.hidden_states(*passed, DynamicCache(config=lm.base.config))
    with torch.no_grad():
        lm.hidden_states(*passed, DynamicCache(config=lm.base.config))
    assert not any("forward" in vars(module) for module in lm.base.modules()), "nothing of it stays on the layers"
    assert deepcopy(lm).acceleration.activation_checkpointing


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("ctrl", {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16}, "CTRLLMHeadModel has no layers"),
        ("lfm2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                  "intermediate_size": 16, "layer_types": ["conv", "full_attention"]}, "LinearAttentionLayer"),
    ],
)  # fmt: skip
def test_models_without_recomputable_layers_are_refused(family: str, sizes: dict[str, Any], message: str) -> None:
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=60, **sizes))
    acceleration = Acceleration(base, is_tested=False)
    with pytest.raises(ValueError, match=rf"{message}.*activation_checkpointing=false"):
        acceleration.activation_checkpointing = True
    assert not acceleration.activation_checkpointing


@pytest.mark.usefixtures("group_of_one")
def test_recomputation_works_under_distributed_data_parallel() -> None:
    lm = build("gpt2", torch.float32)
    batch = mixed_batch(lm)
    _, kept = step(lm, batch)
    lm.zero_grad()
    nn.parallel.DistributedDataParallel(lm)(**batch).loss.backward()
    assert relative(gradients(lm), kept) < 1e-6


def test_bytes_of_weights_gradients_and_optimizer() -> None:
    """Per trained weight, and against a real optimizer."""
    assert (states(1, 1, 4), states(1, 1, 2)) == (16, 18)
    assert [states(8, 8, 2, shards=8, zero=z) for z in range(4)] == [144, 60, 32, 18]
    assert states(8, 8, 2, shards=8, zero=3, offload=True) == 6
    assert states(100, 1, 2) == 99 * 2 + 16
    lm = build("gpt2", torch.float32)
    lm(**mixed_batch(lm)).loss.backward()
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)
    optimizer.step()
    weights = list(lm.parameters())
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    found = sum(t.nbytes for t in [*weights, *(w.grad for w in weights if w.grad is not None), *moments])
    count = sum(w.numel() for w in weights)
    assert found == states(count, count, 4)


def test_sizes_of_a_shape_are_those_of_the_model() -> None:
    shape = SHAPES["llama"]
    config = AutoConfig.for_model("llama", vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                                  num_key_value_heads=2, intermediate_size=128)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    real = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    assert Shape("", shape.layers, 64, 32, 128, vocabulary=100).parameters == real
