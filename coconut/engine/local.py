"""One process, one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from coconut.config import EngineConfig, OptimizerConfig, Precision
from coconut.engine.base import LossFunction, MicroBatch, NonFinite, Update


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` takes a GPU if there is one. Raises ValueError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"engine.device={name} cannot be used here ({reason}). Set engine.device=cpu or auto."
        ) from None


def set_up(config: EngineConfig) -> torch.device:
    """Set the number of threads, and give the device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return choose_device(config.device)


class LocalEngine:
    def __init__(
        self, module: nn.Module, loss_function: LossFunction, config: EngineConfig, optimizer: OptimizerConfig
    ):
        self.device = set_up(config)
        self.module = module.to(self.device)
        self.loss_function = loss_function
        self.precision = config.precision
        self.settings = optimizer
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=s.lr,
            betas=(s.beta1, s.beta2),
            weight_decay=s.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.precision)

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> Update:
        num_targets = sum(batch.num_targets for batch in micro_batches)
        loss = torch.zeros((), dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        for batch in micro_batches:
            loss_sum = self._loss_sum(batch)
            (loss_sum / num_targets).backward()
            loss += loss_sum.detach().to(loss)
        weights = [weight for weight in self.module.parameters() if weight.grad is not None]
        total = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        norm, mean = total.item(), loss.item() / num_targets
        if not (math.isfinite(mean) and math.isfinite(norm)):
            culprits = self._culprits()
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFinite(mean, norm, culprits)
        if self.settings.clip:
            nn.utils.clip_grads_with_norm_(weights, self.settings.clip, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(mean, norm, num_targets)

    def rehearse(self, micro_batch: MicroBatch) -> None:
        before = self._random_state()
        self._loss_sum(micro_batch).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._set_random_state(before)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "random": self._random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._set_random_state(state["random"])

    def _loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        with self.autocast():
            return self.loss_function(self.module, batch.to(self.device))

    def _culprits(self) -> list[str]:
        named = list(self.module.named_parameters())
        bad = [f"weight {name}" for name, p in named if not torch.isfinite(p).all()]
        return bad or [
            f"gradient of {name}" for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()
        ]

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision is Precision.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
