"""The DeepSpeed engine. ZeRO shards the optimizer state (stage 1), the gradients (2) and the weights (3).

Weights are float32. With precision=bfloat16 they are bfloat16 copies of float32 master weights, which the optimizer
updates.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from coconut.config import AdamWConfig, EngineConfig, Precision
from coconut.engine.base import (
    Loss,
    MicroBatch,
    NonFiniteUpdate,
    StepResult,
    TermSums,
    adamw,
    clip_gradients,
    random_state,
    restore_random_state,
    set_random_state,
    set_up_device,
    total_statistics,
    trainable_parameters,
)
from coconut.engine.deepspeed_import import import_deepspeed, quiet
from coconut.engine.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """Engine with DeepSpeed, ZeRO stages 0 to 3."""

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        config: EngineConfig,
        optimizer: AdamWConfig,
        world: World,
    ):
        self.world = world
        self.device = set_up_device(config, world)
        self.stage = config.zero_stage
        self.low_precision = config.precision is Precision.bfloat16
        self.loss = loss
        self.settings = optimizer
        self.module = module
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        exact: dict[str, torch.Tensor] = {}
        if self.low_precision:
            exact = {
                name: weight.data for name, weight in trainable_parameters(module) if weight.dtype is torch.float32
            }
            for weight in module.parameters():
                weight.data = weight.data.to(torch.bfloat16)
        self.replica = copy_without_weights(module).to(self.device) if self.stage == 3 else None
        if not config.offload_parameters:
            module.to(self.device)
        deepspeed = import_deepspeed()
        if not torch.distributed.is_initialized():
            self._init_single_process_group(world)
        with quiet():
            self.deepspeed, self.sharded, *_ = deepspeed.initialize(
                model=module,
                optimizer=adamw(module, optimizer, self.device),
                config=deepspeed_config(config, optimizer, sum(weight.numel() for weight in module.parameters())),
                dist_init_required=False,
            )
        world.exit_callbacks.callback(self._release)
        for (
            name,
            buffer,
        ) in self.module.named_buffers():  # DeepSpeed has cast them; rotary frequencies need float32
            buffer.data = buffers[name].to(self.device)
        for name, weight in trainable_parameters(module):
            if name in exact:  # DeepSpeed made the master weights from the bfloat16 ones
                self._set_sharded(weight, exact[name], None)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over this process's part of the weights."""
        return self.sharded.optimizer if self.stage else self.sharded

    def reset_optimizer(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()  # in place: ZeRO keeps views of them

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def full_module(self) -> Iterator[nn.Module]:
        """The module; in stage 3 a temporary full copy, so that processes need not run the same passes."""
        if self.replica is None:
            yield self.module
            return
        import deepspeed

        for weight, copied in zip(self.module.parameters(), self.replica.parameters(), strict=True):
            with torch.no_grad(), deepspeed.zero.GatheredParameters([weight]):
                copied.data = weight.detach().to(self.device, copy=True)
        try:
            yield self.replica
        finally:
            for copied in self.replica.parameters():
                copied.data = copied.data.new_empty(0)

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        terms = TermSums(self.loss, micro_batches, self.world)
        given = total_statistics(self.loss, self.deepspeed, micro_batches, self.world, self.device)
        for batch in micro_batches:
            self.deepspeed.set_gradient_accumulation_boundary(batch is micro_batches[-1])
            self.world.heartbeat()
            sums = self.loss.sums(self.deepspeed, batch.to(self.device), *given)
            self.deepspeed.backward(terms.add(sums), scale_wrt_gas=False)
        if not self.stage:
            terms.leave_idle_parameters()
        means = terms.means()
        mean = terms.mean(means)
        norm = math.nan if self.stage else clip_gradients(self.module, self.settings.max_grad_norm)
        if not math.isfinite(mean) or (not self.stage and not math.isfinite(norm)):
            raise NonFiniteUpdate(mean, norm, [])
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        if self.stage:
            norm = float(self.deepspeed.get_global_grad_norm())
            if self.sharded.overflow:  # ZeRO has skipped the update
                raise NonFiniteUpdate(mean, norm, [])
        return terms.result(means, norm)

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """One update with learning rate 0, which also allocates the moments."""
        before = random_state(self.device)
        with suppress(NonFiniteUpdate):  # the first update raises it
            self.update([micro_batch], lr=0.0)
        self.reset_optimizer()
        set_random_state(before, self.device)

    def state_dict(self) -> dict[str, Any]:
        random = self.world.all_gather_object(random_state(self.device))
        if not self.stage:
            return {"optimizer": self.optimizer.state_dict(), "random": random}
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        step = next(iter(self.optimizer.state.values()))["step"]
        state: dict[int, dict[str, torch.Tensor]] = {}
        master: dict[str, torch.Tensor] = {}
        for index, (name, weight) in enumerate(trainable_parameters(self.module)):
            self.world.heartbeat()
            moments = {key: self._on_main(safe_get_full_optimizer_state(weight, key)) for key in MOMENTS}
            state[index] = {"step": step.cpu().clone(), **moments}  # one per weight, since AdamW counts up each
            if self.low_precision:
                master[name] = self._on_main(safe_get_full_fp32_param(weight))
        group = {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"}
        groups = [{**group, "params": list(state)}]
        saved: dict[str, Any] = {"optimizer": {"state": state, "param_groups": groups}, "random": random}
        return {**saved, "master": master} if self.low_precision else saved

    def _on_main(self, value: torch.Tensor | None) -> torch.Tensor:
        assert value is not None
        return value.cpu() if self.world.is_main else value.new_empty(0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Call it after `dry_run`, which creates the moments."""
        restore_random_state(state["random"], self.world, self.device)
        if not self.stage:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            return
        saved = state["optimizer"]["state"]
        for index, (_, weight) in enumerate(trainable_parameters(self.module)):
            for key in MOMENTS if index in saved else ():  # a weight without a gradient so far has no moments
                self._set_sharded(weight, saved[index][key], key)
        for own in self.optimizer.state.values():
            own["step"].copy_(next(iter(saved.values()))["step"])

    def _set_sharded(self, weight: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        """Set this process's part of a full moment, or for `key` None of a master weight."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.device)
        if self.stage < 3:
            if key is None:
                safe_set_full_fp32_param(weight, value)
            else:
                safe_set_full_optimizer_state(weight, value, key)
            return
        part = safe_get_local_fp32_param(weight)
        assert part is not None
        first = self.world.rank * part.numel()
        own = part.new_zeros(part.numel())  # the last part is padded
        rest = value.flatten()[first : first + part.numel()]
        own[: rest.numel()] = rest
        if key is None:
            safe_set_local_fp32_param(weight, own)
        else:
            safe_set_local_optimizer_state(weight, own, key)

    def _release(self) -> None:
        """Clear DeepSpeed's objects: C++ hooks keep them alive, and they would keep the process groups alive."""
        self.deepspeed.destroy()
        for weight in self.module.parameters():
            vars(weight).clear()
        for held in (getattr(self.sharded, "parameter_offload", None), self.sharded, self.deepspeed):
            if held is not None:
                vars(held).clear()

    def _init_single_process_group(self, world: World) -> None:
        """Create a process group of one process, which DeepSpeed requires.

        DeepSpeed reads LOCAL_RANK. It is taken back at the end, since other libraries take it as a sign of several
        processes.
        """
        if "LOCAL_RANK" not in os.environ:
            os.environ["LOCAL_RANK"] = str(self.device.index or 0)
            world.exit_callbacks.callback(os.environ.pop, "LOCAL_RANK", None)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # pyright: ignore
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def deepspeed_config(config: EngineConfig, optimizer: AdamWConfig, weights: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with one micro-batch: the engine does gradient accumulation itself."""
    bucket = min(500_000_000, weights)
    offload = {
        "offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
        "offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()},
    }
    enabled = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm if config.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision is Precision.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket // 10,
            "stage3_param_persistence_threshold": min(100_000, weights // 1000),
            **{key: value for key, value in offload.items() if enabled[key]},
        },
    }


def copy_without_weights(module: nn.Module) -> nn.Module:
    """A copy of the module with empty parameters; shared parameters stay shared."""
    memo = {id(weight): nn.Parameter(weight.data.new_empty(0), requires_grad=False) for weight in module.parameters()}
    return copy.deepcopy(module, memo).eval()
