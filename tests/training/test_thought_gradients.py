"""The gradient that arrives at each thought: that of a flat reading, and nothing of it is left in the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import build, in_float64
from helpers.runs import graph_files, rows_of_kind, small_run
from torch import Tensor

from coconut import LatentLM
from coconut.config import DataConfig, EngineConfig, EngineKind, LoraConfig
from coconut.data.sequences import Layout, slot_with_markers
from coconut.methods import METHODS, Curriculum, Projector, Slot, Source, Unit, Update
from coconut.training.thought_gradients import attenuation, gradient_norms
from coconut.training.trainer import Trainer, run

COUNTS, BEFORE, AFTER = (4, 2, 1, 3), (5, 9, 7, 3), (3, 5, 4, 6)  # of each row: thoughts, tokens before and after them
CASES = [
    ("gpt2", Slot(Source.thought)),
    ("llama", Slot(Source.thought, Projector.mlp_ln, width=12)),
    ("qwen3", Slot(Source.thought, update=Update.jacobi, iterations=3)),
    ("gpt2", Slot(Source.thought, Projector.mlp_ln, update=Update.loop, iterations=1, iterations_per=2)),
]
each_case = pytest.mark.parametrize(("family", "slot"), CASES)


def rows_of(lm: LatentLM) -> list[Layout]:
    random = np.random.default_rng(1)
    rows = []
    for count, before, after in zip(COUNTS, BEFORE, AFTER, strict=True):
        slot = slot_with_markers(lm.reasoning, lm.special, count)
        ids = np.concatenate([random.integers(5, 40, before), slot, random.integers(5, 40, after)])
        rows.append(Layout(ids, num_prompt=before + len(slot), slot_start=before + 1))
    return rows


def flat(lm: LatentLM, row: Layout) -> Tensor:
    """(K,) the norms for one row, read alone, without cache, from the gradients that autograd retains."""
    ids, K = torch.tensor(row.ids), int((row.ids == lm.latent_id).sum())
    embeds_TD = lm.base.get_input_embeddings()(ids)
    place, slot = row.slot_start, lm.reasoning.slot
    tokens_KD = embeds_TD[place : place + K]
    thoughts = list(tokens_KD)

    def states(thoughts: Sequence[Tensor]) -> Tensor:
        inputs_TD = torch.cat([embeds_TD[:place], torch.stack(list(thoughts)), embeds_TD[place + K :]])
        return lm.base.base_model(inputs_embeds=inputs_TD[None]).last_hidden_state[0]

    if slot.in_parallel:
        for _ in range(slot.iterations * (math.ceil(K / slot.iterations_per) if slot.iterations_per else 1)):
            states_TD = states(thoughts)
            if slot.update is Update.loop:
                thoughts = list(tokens_KD + lm.feedback.projector(states_TD[place : place + K]))
            else:
                thoughts = list(lm.feedback.projector(states_TD[place - 1 : place + K - 1]))
    else:
        for k in range(K):
            thoughts[k] = lm.feedback.projector(states(thoughts)[place + k - 1])
    for thought in thoughts:
        thought.retain_grad()
    written = len(ids) - row.num_prompt
    F.cross_entropy(lm.logits(states(thoughts))[-written - 1 : -1], ids[-written:]).backward()
    return torch.stack([thought.grad.norm() for thought in thoughts if thought.grad is not None])


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(len(a) == len(b) and torch.allclose(a, b, rtol=1e-8, atol=0) for a, b in pairs)


@each_case
def test_norms_equal_a_flat_reading(family: str, slot: Slot) -> None:
    """In batches with padding, with all that accelerates, with layers that run again, and with plain torch."""
    lm = build(family, slot=slot)
    rows = rows_of(lm)
    expected = [flat(lm, row) for row in rows]
    assert all((norms > 1e-4).all() for norms in expected)
    for batch_size in (1, 3, 4):
        assert close(gradient_norms(lm, rows, batch_size), expected)
    lm.acceleration.activation_checkpointing = True
    assert close(gradient_norms(lm.train(), rows, 4), expected)
    lm.acceleration.activation_checkpointing = False
    lm.acceleration.mechanisms = frozenset()
    assert close(gradient_norms(lm, rows, 4), expected)
    lm.requires_grad_(False)  # as the copy of ZeRO 3, and with LoRA most of the model
    assert close(gradient_norms(lm, rows, 4), expected)


@each_case
def test_both_paths_add_the_offsets(family: str, slot: Slot) -> None:
    lm = build(family, slot=slot)
    (row, *_) = rows_of(lm)
    ids = torch.tensor(row.ids)[None]
    labels = ids.clone()
    labels[:, : row.num_prompt] = -100
    offsets = 0.3 * torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses, found = [], []
    for use_cache in (True, False):
        given = offsets.clone().requires_grad_()
        losses.append(lm(ids, labels=labels, thought_offsets=given, use_cache=use_cache).loss_sum)
        found.append(torch.autograd.grad(losses[-1], given)[0])
    assert torch.allclose(*losses, rtol=1e-10)
    assert torch.allclose(*found, rtol=1e-7, atol=1e-12)
    assert abs(losses[0] - lm(ids, labels=labels).loss_sum) > 1e-3


def test_a_model_with_lora_is_measured_like_the_merged_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lm = build("llama", torch.float32)
    lm.save_pretrained(tmp_path)
    lm = LatentLM.from_pretrained(tmp_path)
    lm.add_lora(LoraConfig(rank=2), str(tmp_path))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    lm = in_float64(lm.double())
    rows = rows_of(lm)
    assert close(gradient_norms(lm, rows, 4), [flat(in_float64(lm.merged()), row) for row in rows])


def test_nothing_is_left_behind() -> None:
    lm = build("gpt2", torch.float32).train()
    lm.base.lm_head.weight.requires_grad_(False)
    trained = [weight.requires_grad for weight in lm.parameters()]
    before = torch.get_rng_state()
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    gradient_norms(lm, rows_of(lm), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [weight.requires_grad for weight in lm.parameters()] == trained
    assert all(weight.grad is None for weight in lm.parameters())
    assert lm.training


def test_means_and_the_ratio_are_over_questions() -> None:
    norms = [torch.tensor(row).double() for row in ([1.0, 2.0, 4.0], [3.0], [2.0, 5.0])]
    found = attenuation(norms)
    assert found["gradient"] == [2.0, 3.5, 4.0]
    assert found["gradient_ratio"] == pytest.approx((1 + 2) / (4 + 5))
    assert found["gradient_ratio_low"] == pytest.approx(1 / 4)
    assert found["gradient_ratio_high"] == pytest.approx(2 / 5)
    for without in ([torch.ones(1)], [torch.zeros(2)], [torch.tensor([1.0, math.nan])]):
        assert attenuation(without)["gradient_ratio"] is None


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 16, 9, 4)


def rows_in_run(folder: Path, data: DataConfig, kind: str = "train", **changes: Any) -> list[dict[str, Any]]:
    """Of a run of six updates with dropout; without what depends on the machine."""
    architecture = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}
    config = small_run(folder, data, validate_every=1, batch_size=8, **changes)
    config = replace(config, model=replace(config.model, architecture=architecture))
    assert run(config) == 0
    return [{key: row[key] for key in row if key not in ("seconds", "memory")} for row in rows_of_kind(folder, kind)]


SPARING = EngineConfig(device="cpu", threads=1, activation_checkpointing=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"engine": SPARING}, {"method": "pccot", "curriculum": Curriculum(
        length_unit=Unit.updates, total_length=4, num_thoughts=3)}],
)  # fmt: skip
def test_training_is_the_same_with_and_without(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    measured = rows_in_run(tmp_path / "with", data, **changes)
    valid = rows_of_kind(tmp_path / "with", "valid")
    monkeypatch.setattr(Trainer, "_thought_gradients", lambda *_: {})
    assert rows_in_run(tmp_path / "without", data, **changes) == measured
    for row, plain in zip(valid, rows_of_kind(tmp_path / "without", "valid"), strict=True):
        assert {key: value for key, value in row.items() if not key.startswith("thought_gradient")} == plain
        assert len(row.get("thought_gradient", [])) == (row["stage"] if not changes.get("method") else 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_zero_measures_the_same(data: DataConfig, tmp_path: Path, stage: int) -> None:
    engine = EngineConfig(device="cpu", threads=1, kind=EngineKind.deepspeed, zero_stage=stage)
    key = "thought_gradient"
    ours, plain = (
        [row[key] for row in rows_in_run(tmp_path / name, data, "valid", **changes) if key in row]
        for name, changes in (("zero", {"engine": engine}), ("local", {}))
    )
    assert len(ours) == 4
    for a, b in zip(ours, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.slot.thinks])
def test_methods_without_thoughts_log_nothing(data: DataConfig, tmp_path: Path, method: str) -> None:
    curriculum = Curriculum(
        max_stage=1, length_unit=Unit.updates, stage0_length=1, stage_length=1, total_length=2, icot_limit=1
    )
    if METHODS[method].fixed_length:
        curriculum = replace(curriculum, num_thoughts=2)
    if method == "hybrid_warmup":
        curriculum = replace(curriculum, modes=["short", "think"])
    rows = rows_in_run(tmp_path, data, "valid", method=method, curriculum=curriculum)
    assert rows
    assert not any(key.startswith("thought_") for row in rows for key in row)


def test_a_hybrid_model_is_measured_in_its_modes_with_thoughts(data: DataConfig, tmp_path: Path) -> None:
    curriculum = Curriculum(length_unit=Unit.updates, total_length=2, modes=["short", "latent_1", "latent_3"])
    (*_, row) = rows_in_run(tmp_path, data, "valid", method="hybrid_warmup", curriculum=curriculum)
    assert len(row["thought_gradient"]) == 3
