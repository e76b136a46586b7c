"""One update means the same on one process, on several, and with whatever part of the model each of them keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.models import ARCHITECTURES, build
from helpers.processes import group_threads, together
from torch import nn

from coconut.config import EngineConfig, EngineKind, OptimizerConfig, Precision
from coconut.data.batching import Batch
from coconut.engine.base import Engine, NonFiniteUpdate, restore_master
from coconut.engine.factory import make_engine
from coconut.engine.local import LocalEngine
from coconut.engine.process_group import init_distributed
from coconut.engine.world import World
from coconut.models.latent_lm import LatentLM

LOCAL = EngineConfig(device="cpu", threads=1, timeout=120)
ZERO = [replace(LOCAL, kind=EngineKind.deepspeed, zero_stage=stage) for stage in range(4)]
OFFLOADED = [
    replace(ZERO[2], offload_optimizer=True),
    replace(ZERO[3], offload_optimizer=True, offload_parameters=True),
]
EXACT = [LOCAL, *ZERO, *OFFLOADED]
LOWERED = [replace(config, precision=Precision.bfloat16) for config in (LOCAL, *ZERO[1:])]
SETTINGS = OptimizerConfig(lr=1e-2, beta2=0.95, max_grad_norm=0.5)
UPDATES, BORDER, LEFT = 8, 3, 5  # the optimizer is made anew at BORDER; a run goes on from LEFT
KEYS = [f"base.transformer.h.{layer}.attn.c_attn.bias" for layer in range(2)]  # the gradient of a key's bias is 0
# but for rounding, of which Adam makes a whole step
TOLERANCE = 1e-5  # relative, of losses and gradient norms in float32


ODD = {**ARCHITECTURES["gpt2"], "n_embd": 33, "n_head": 3}  # no two processes get equal parts of its vectors


def model(family: str = "gpt2") -> LatentLM:
    with mock.patch.dict(ARCHITECTURES, gpt2=ODD):
        lm = build(family, torch.float32)
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lm.train()


def share(step: int, lm: LatentLM, world: World) -> list[Batch]:
    """Two micro-batches of rows with 0 to 2 thoughts. In update 1 no row of the second is left for another process."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 35, (8, 14), generator=random)
    for row in range(8):
        ids[row, 6 : 6 + row % 3] = lm.latent_id
    labels = torch.where((torch.rand(ids.shape, generator=random) < 0.5) & (ids != lm.latent_id), ids, -100)
    labels[:, :9] = -100
    made = []
    for rows in ([0, 1, 2, 3], [4] if step == 1 else [4, 5, 6, 7]):
        mine = rows[world.rank :: world.size]
        kept = labels[mine or rows[:1]] if mine else torch.full_like(labels[:1], -100)
        own = ids[mine or rows[:1]]
        made.append(Batch(own, torch.ones_like(own), kept, passes=1 + max(row % 3 for row in rows)))
    return made


def summed_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    return module(batch.input_ids, batch.attention_mask, labels=batch.labels, min_passes=batch.passes).loss_sum


def go(engine: Engine, lm: LatentLM, world: World, first: int, last: int) -> list[tuple[float, float]]:
    told = []
    for step in range(first, last):
        if step == BORDER:
            engine.reset_optimizer()
        done = engine.update(share(step, lm, world), lr=3e-3 / (1 + step))
        told.append((done.loss, done.grad_norm))
    return told


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.full_module() as whole:
        return {name: weight.detach().clone() for name, weight in whole.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def apart(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    return sum((ours[name] - theirs[name]).pow(2).sum().item() for name in theirs if name not in KEYS) ** 0.5


def of_one_process(family: str) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    lm = model(family)
    engine = LocalEngine(lm, summed_loss, LOCAL, SETTINGS)
    return go(engine, lm, World(), 0, UPDATES), weights(engine)


# --- in each of two processes ---------------------------------------------------------------------


def begun(
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
    return make_engine(lm, summed_loss, config, SETTINGS, world), lm


def trajectory(config: EngineConfig, world: World, family: str) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Losses, gradient norms and the weights after them, of an engine that rehearses first and is saved on its way.

    Another one of its kind goes on from there with the same bits, and a single process with the same numbers.
    """
    engine, lm = begun(config, world, family)
    start = weights(engine)
    engine.dry_run(share(0, lm, world)[0])
    assert same(weights(engine), start), "the rehearsal changed weights"
    told = go(engine, lm, world, 0, LEFT)
    kept, state = weights(engine), world.broadcast_object(copy.deepcopy(engine.state_dict()))
    rest = go(engine, lm, world, LEFT, UPDATES)
    end = weights(engine)

    again, lm = begun(config, world, family, kept, state)
    again.dry_run(share(0, lm, world)[0])
    again.load_state_dict(state)
    assert go(again, lm, world, LEFT, UPDATES) == rest, "going on is not exact"
    assert same(weights(again), end), "going on ends with other weights"

    exact = config.precision is Precision.float32
    alone, lm = begun(replace(LOCAL, precision=config.precision), World(), family, kept, state)
    alone.load_state_dict(state)
    assert {weight.dtype for weight in lm.parameters()} == {torch.float32}
    for ours, theirs in zip(go(alone, lm, World(), LEFT, UPDATES), rest, strict=True):
        compared = slice(None) if exact else slice(1)  # gradient norms in bfloat16 are rough
        assert ours[compared] == pytest.approx(theirs[compared], rel=TOLERANCE if exact else 0.02)
    assert ("master" in state) == (not exact and config.zero_stage > 0)
    return told + rest, end


def float32_is_the_same(world: World, family: str = "gpt2", configs: Sequence[EngineConfig] = EXACT) -> None:
    losses, last = of_one_process(family)
    start = dict(model(family).named_parameters())
    for config in configs:
        told, end = trajectory(config, world, family)
        for ours, theirs in zip(told, losses, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE), (config, told, losses)
        assert apart(end, last) < 1e-3 * apart(start, last), config


def another_family_is_the_same(world: World) -> None:
    float32_is_the_same(world, "llama", ZERO[3:])


def bfloat16_stays_near(world: World) -> None:
    losses, _ = of_one_process("llama")
    for config in LOWERED:
        told, _ = trajectory(config, world, "llama")
        assert [loss for loss, _ in told] == pytest.approx([loss for loss, _ in losses], rel=0.02), (config, told)


def poisoned(module: nn.Module, batch: Batch) -> torch.Tensor:
    """A finite loss whose gradient is not a number."""
    loss = summed_loss(module, batch)
    return loss + torch.sqrt(loss * 0.0)


def what_is_not_finite_is_not_applied(world: World) -> None:
    for config in [LOCAL, *ZERO]:
        lm = model("gpt2")
        engine = make_engine(lm, poisoned, config, SETTINGS, world)
        before = weights(engine)
        with pytest.raises(NonFiniteUpdate):
            engine.update(share(0, lm, world), lr=1e-2)
        assert same(weights(engine), before), config


CHECKS = [float32_is_the_same, another_family_is_the_same, bfloat16_stays_near, what_is_not_finite_is_not_applied]


def all_checks() -> None:
    with init_distributed(ZERO[0]) as world:
        for check in CHECKS:
            check(world)
            print(f"held: {check.__name__}", flush=True)
    print(f"left behind: {group_threads()}", flush=True)


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> str:
    return "\n".join(together(all_checks, succeed=False))


def a_process_alone() -> None:
    with init_distributed(ZERO[0]) as world:
        float32_is_the_same(world, configs=ZERO[3:])
        assert group_threads()
    assert not group_threads()


def test_deepspeed_on_one_process() -> None:
    together(a_process_alone, size=1)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_on_two_processes(check: str, told: str) -> None:
    assert told.count(f"held: {check}") == 2, told


def test_no_thread_of_a_process_group_outlives_the_world(told: str) -> None:
    assert told.count("left behind: []") == 2, told
