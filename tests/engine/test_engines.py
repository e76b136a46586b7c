"""Engines: equal updates on one process, on several, and with every ZeRO stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.models import ARCHITECTURES, build, token_batch
from helpers.processes import group_threads, together
from torch import nn

from coconut.config import EngineConfig, EngineKind, OptimizerConfig, Precision
from coconut.data.batching import Batch
from coconut.engine.base import Engine, Loss, NonFiniteUpdate, restore_master
from coconut.engine.factory import make_engine
from coconut.engine.local import LocalEngine
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.models.latent_lm import LatentLM

pytestmark = pytest.mark.slow

LOCAL = EngineConfig(device="cpu", threads=1, timeout=120)
ZERO = [replace(LOCAL, kind=EngineKind.deepspeed, zero_stage=stage) for stage in range(4)]
OFFLOADED = [
    replace(ZERO[2], offload_optimizer=True),
    replace(ZERO[3], offload_optimizer=True, offload_parameters=True),
]
EXACT = [LOCAL, *ZERO, *OFFLOADED]
BFLOAT16 = [replace(config, precision=Precision.bfloat16) for config in (LOCAL, *ZERO[1:])]
SETTINGS = OptimizerConfig(lr=1e-2, beta2=0.95, max_grad_norm=0.5)
UPDATES, RESET_AT, SAVED_AT = 6, 2, 4  # the optimizer is reset at RESET_AT; a run is saved and resumed at SAVED_AT
KEYS = [f"base.transformer.h.{layer}.attn.c_attn.bias" for layer in range(2)]  # the gradient of a key's bias is 0
# but for rounding, of which Adam makes a whole step
TOLERANCE = 1e-5  # relative, of losses and gradient norms in float32


ODD_SIZED = {**ARCHITECTURES["gpt2"], "n_embd": 33, "n_head": 3}  # no two processes get equal parts of its vectors


def model(family: str = "gpt2") -> LatentLM:
    with mock.patch.dict(ARCHITECTURES, gpt2=ODD_SIZED):
        lm = build(family, torch.float32)
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm.train()


def rank_batches(step: int, lm: LatentLM, world: World) -> list[Batch]:
    """This process's two micro-batches, with 0 to 2 thoughts a row. The second of update 1 has one row in all."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 35, (8, 14), generator=random)
    for row in range(8):
        ids[row, 6 : 6 + row % 3] = lm.latent_id
    labels = torch.where((torch.rand(ids.shape, generator=random) < 0.5) & (ids != lm.latent_id), ids, -100)
    labels[:, :9] = -100
    batches = []
    for rows in ([0, 1, 2, 3], [4] if step == 1 else [4, 5, 6, 7]):
        mine = rows[world.rank :: world.size]
        kept = labels[mine or rows[:1]] if mine else torch.full_like(labels[:1], -100)
        own = ids[mine or rows[:1]]
        batches.append(token_batch(own, torch.ones_like(own), kept, passes=1 + max(row % 3 for row in rows)))
    return batches


def summed_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    return module(batch.input_ids, batch.attention_mask, labels=batch.labels, min_passes=batch.passes).loss_sum


def train_updates(engine: Engine, lm: LatentLM, world: World, first: int, last: int) -> list[tuple[float, float]]:
    results = []
    for step in range(first, last):
        if step == RESET_AT:
            engine.reset_optimizer()
        done = engine.update(rank_batches(step, lm, world), lr=3e-3 / (1 + step))
        results.append((done.loss, done.grad_norm))
    return results


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.full_module() as whole:
        return {name: weight.detach().clone() for name, weight in whole.named_parameters()}


def equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    return sum((ours[name] - theirs[name]).pow(2).sum().item() for name in theirs if name not in KEYS) ** 0.5


def single_process_result(family: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    lm = model(family)
    engine = LocalEngine(lm, Loss(summed_loss), LOCAL, SETTINGS)
    return train_updates(engine, lm, World(), 0, UPDATES), weights(engine)


# --- in each of two processes ---------------------------------------------------------------------


def build_engine(
    config: EngineConfig,
    world: World,
    family: str,
    start: dict[str, torch.Tensor] | None = None,
    state: dict[str, Any] | None = None,
) -> tuple[Engine, LatentLM]:
    lm = model(family)
    if start:
        lm.load_state_dict(start, strict=False)  # tied weights have one name
    restore_master(lm, state or {})
    return make_engine(lm, Loss(summed_loss), config, SETTINGS, world), lm


def trajectory(config: EngineConfig, world: World, family: str) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Losses, gradient norms and final weights of an engine after a dry run.

    It is saved on its way: an engine of the same kind must resume with equal bits, a single process with equal numbers.
    """
    engine, lm = build_engine(config, world, family)
    start = weights(engine)
    engine.dry_run(rank_batches(0, lm, world)[0])
    assert equal_weights(weights(engine), start), "the dry run changed weights"
    results = train_updates(engine, lm, world, 0, SAVED_AT)
    kept, state = weights(engine), world.broadcast_object(copy.deepcopy(engine.state_dict()))
    rest = train_updates(engine, lm, world, SAVED_AT, UPDATES)
    end = weights(engine)

    resumed, lm = build_engine(config, world, family, kept, state)
    resumed.dry_run(rank_batches(0, lm, world)[0])
    resumed.load_state_dict(state)
    assert train_updates(resumed, lm, world, SAVED_AT, UPDATES) == rest, "resuming is not exact"
    assert equal_weights(weights(resumed), end), "the resumed engine ends with other weights"

    exact = config.precision is Precision.float32
    single, lm = build_engine(replace(LOCAL, precision=config.precision), World(), family, kept, state)
    single.load_state_dict(state)
    assert {weight.dtype for weight in lm.parameters()} == {torch.float32}
    for ours, theirs in zip(train_updates(single, lm, World(), SAVED_AT, UPDATES), rest, strict=True):
        compared = slice(None) if exact else slice(1)  # gradient norms in bfloat16 are rough
        assert ours[compared] == pytest.approx(theirs[compared], rel=TOLERANCE if exact else 0.02)
    assert ("master" in state) == (not exact and config.zero_stage > 0)
    return results + rest, end


def check_float32_equals_one_process(
    world: World, family: str = "gpt2", configs: Sequence[EngineConfig] = EXACT
) -> None:
    losses, last = single_process_result(family)
    start = dict(model(family).named_parameters())
    for config in configs:
        results, end = trajectory(config, world, family)
        for ours, theirs in zip(results, losses, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE), (config, results, losses)
        assert distance(end, last) < 1e-3 * distance(start, last), config


def check_another_family(world: World) -> None:
    check_float32_equals_one_process(world, "llama", ZERO[3:])


def check_bfloat16_is_close(world: World) -> None:
    losses, _ = single_process_result("llama")
    for config in BFLOAT16:
        results, _ = trajectory(config, world, "llama")
        assert [loss for loss, _ in results] == pytest.approx([loss for loss, _ in losses], rel=0.02), (config, results)


def nan_gradient_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    """A finite loss whose gradient is not a number."""
    loss = summed_loss(module, batch)
    return loss + torch.sqrt(loss * 0.0)


def check_non_finite_updates_are_skipped(world: World) -> None:
    for config in [LOCAL, *ZERO]:
        lm = model("gpt2")
        engine = make_engine(lm, Loss(nan_gradient_loss), config, SETTINGS, world)
        before = weights(engine)
        with pytest.raises(NonFiniteUpdate):
            engine.update(rank_batches(0, lm, world), lr=1e-2)
        assert equal_weights(weights(engine), before), config


CHECKS = [
    check_float32_equals_one_process,
    check_another_family,
    check_bfloat16_is_close,
    check_non_finite_updates_are_skipped,
]


def all_checks() -> None:
    with init_distributed(ZERO[0]) as world:
        for check in CHECKS:
            check(world)
            print(f"passed: {check.__name__}", flush=True)
    print(f"remaining threads: {group_threads()}", flush=True)


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def output() -> str:
    """The output of `all_checks` on two processes."""
    return "\n".join(together(all_checks, succeed=False))


def run_single_process() -> None:
    with init_distributed(ZERO[0]) as world:
        check_float32_equals_one_process(world, configs=ZERO[3:])
        assert group_threads()
    assert not group_threads()


def test_deepspeed_equals_local_on_one_process() -> None:
    together(run_single_process, size=1)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_engines_on_two_processes(check: str, output: str) -> None:
    assert output.count(f"passed: {check}") == 2, output


def test_process_group_threads_end_with_the_world(output: str) -> None:
    assert output.count("remaining threads: []") == 2, output
