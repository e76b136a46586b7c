"""The engine for one device per process; several processes use DistributedDataParallel."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from coconut.config import AdamWConfig, EngineConfig
from coconut.engine.base import (
    Loss,
    MicroBatch,
    NonFiniteUpdate,
    StepResult,
    TermSums,
    adamw,
    autocast,
    clip_gradients,
    random_state,
    restore_random_state,
    set_learning_rate,
    set_random_state,
    set_up_device,
    total_statistics,
)
from coconut.engine.world import World


class LocalEngine:
    """Engine with plain torch on one device per process."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        config: EngineConfig,
        optimizer: AdamWConfig,
        world: World | None = None,
        lr_factors: Mapping[str, float] | None = None,
    ):
        self.world = world or World()
        self.device = set_up_device(config, self.world)
        self.module = module.to(self.device)
        self.wrapped: nn.Module = self.module
        if self.world.size > 1:
            with warnings.catch_warnings():  # broadcast_buffers is renamed; torch 2.6 has the old name only
                warnings.simplefilter("ignore", FutureWarning)
                self.wrapped = DistributedDataParallel(
                    self.module, broadcast_buffers=False, gradient_as_bucket_view=True,
                    find_unused_parameters=loss.may_skip_modules,
                )  # fmt: skip
        self.loss = loss
        self.precision = config.precision
        self.settings, self.lr_factors = optimizer, lr_factors
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        self.optimizer = adamw(self.module, self.settings, self.device, self.lr_factors)

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.precision)

    def full_module(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.module)

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        terms = TermSums(self.loss, micro_batches, self.world)
        with self.autocast():
            given = total_statistics(self.loss, self.wrapped, micro_batches, self.world, self.device)
        for batch in micro_batches:
            self.world.heartbeat()
            with self._gradient_sync(batch is micro_batches[-1]):
                terms.add(self._sums(batch, *given)).backward()
        terms.leave_idle_parameters()
        norm, means = clip_gradients(self.module, self.settings.max_grad_norm), terms.means()
        mean = terms.mean(means)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            names = self._non_finite_names()
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteUpdate(mean, norm, names)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return terms.result(means, norm)

    def dry_run(self, micro_batch: MicroBatch) -> None:
        before = random_state(self.device)
        self._sums(micro_batch).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        set_random_state(before, self.device)

    def state_dict(self) -> dict[str, Any]:
        random = self.world.all_gather_object(random_state(self.device))
        return {"optimizer": self.optimizer.state_dict(), "random": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        restore_random_state(state["random"], self.world, self.device)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients between processes with the last micro-batch of an update only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        return nullcontext()

    def _sums(self, batch: MicroBatch, *given: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.loss.sums(self.wrapped, batch.to(self.device), *given)

    def _non_finite_names(self) -> list[str]:
        named = list(self.module.named_parameters())
        bad = [f"weight {name}" for name, p in named if not torch.isfinite(p).all()]
        return bad or [
            f"gradient of {name}" for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
