"""The Engine protocol and what its implementations share: device, optimizer, clipping, random state.

An engine gets an `nn.Module` and a loss function; it does not depend on models, data or methods.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn

from coconut.config import AdamWConfig, EngineConfig, Precision
from coconut.engine.world import World
from coconut.utils.console import log


class MicroBatch(Protocol):
    """A part of the batch of an update."""

    @property
    def denominators(self) -> Sequence[int]:
        """What each term of the loss is divided by: what it counts in this part."""
        ...

    def to(self, device: torch.device | str) -> Any: ...


LossFunction = Callable[[nn.Module, Any], torch.Tensor]  # a term summed over what its denominator counts


@dataclass(frozen=True)
class Loss:
    """What an engine minimises: a weighted sum of terms, each divided by its denominator over the whole update.

    `sums(module, micro_batch)`: the summed terms of a micro-batch, (terms,), or () for a single one. `statistics`:
    quantities of a micro-batch that add up over an update, and whose totals the terms need: `sums` gets these as a
    third argument if the update has several micro-batches or processes. Computed without gradient.

    `idle(denominators)`: parameters that an update leaves as they are, without weight decay; ZeRO 1 to 3 decay them all
    the same. `may_skip_modules`: whether a batch may use only some of the trained modules.
    """

    sums: Callable[..., torch.Tensor]
    weights: tuple[float, ...] = (1.0,)
    statistics: Callable[[nn.Module, Any], torch.Tensor] | None = None
    idle: Callable[[Sequence[int]], Iterable[nn.Parameter]] = lambda denominators: ()
    may_skip_modules: bool = False


@dataclass(frozen=True)
class StepResult:
    """Result of an update. `grad_norm`: before clipping. `terms`: of the loss, without their weights."""

    loss: float
    grad_norm: float
    terms: tuple[float, ...]
    denominators: tuple[int, ...]


class TermSums:
    """The terms of one update: what its micro-batches and processes sum up to."""

    def __init__(self, loss: Loss, micro_batches: Sequence[MicroBatch], world: World):
        self.loss, self.world = loss, world
        self.weights = torch.tensor(loss.weights, dtype=torch.float64)
        counts = torch.tensor([batch.denominators for batch in micro_batches]).sum(0)
        self.denominators = world.all_reduce_sums(counts)
        self.sums = torch.zeros(len(loss.weights), dtype=torch.float64)

    def add(self, sums: torch.Tensor) -> torch.Tensor:
        """Count the terms of a micro-batch in. Returns what its backward pass starts from."""
        sums = sums.reshape(-1)
        self.sums += sums.detach().cpu()
        weights, denominators = (values.to(sums) for values in (self.weights, self.denominators.clamp(min=1)))
        return (sums * self.world.size * weights / denominators).sum()  # engines average over processes

    def means(self) -> torch.Tensor:
        """The value of each term over all processes."""
        return self.world.all_reduce_sums(self.sums) / self.denominators.clamp(min=1)

    def leave_idle_parameters(self) -> None:
        """Take the gradients away from the parameters that this update leaves as they are."""
        for weight in self.loss.idle(self.denominators.int().tolist()):
            weight.grad = None

    def result(self, means: torch.Tensor, grad_norm: float) -> StepResult:
        counts = tuple(map(int, self.denominators.tolist()))
        return StepResult(self.mean(means), grad_norm, tuple(means.tolist()), counts)

    def mean(self, means: torch.Tensor) -> float:
        return float((means * self.weights).sum())


def total_statistics(
    loss: Loss, module: nn.Module, micro_batches: Sequence[MicroBatch], world: World, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """What `Loss.sums` gets as a third argument: nothing if it can be computed from the update's only micro-batch.

    The random generators are left as they were, so that dropout in the update itself is the same with and without it.
    """
    if loss.statistics is None or (len(micro_batches) == 1 and world.size == 1):
        return ()
    before = random_state(device)
    with torch.no_grad():
        total = sum(loss.statistics(module, batch.to(device)).double().cpu() for batch in micro_batches)
    set_random_state(before, device)
    assert isinstance(total, torch.Tensor)
    return (world.all_reduce_sums(total),)


class NonFiniteUpdate(ArithmeticError):
    """The loss or a gradient is not finite; no weight was changed. `non_finite_names`: the weights or gradients."""

    def __init__(self, loss: float, grad_norm: float, names: list[str]):
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")
        self.loss, self.grad_norm, self.non_finite_names = loss, grad_norm, names


class Engine(Protocol):
    """Executes updates. Each process has one; all processes call the same methods in the same order."""

    device: torch.device
    world: World

    def reset_optimizer(self) -> None:
        """Reset the optimizer's moments and step count."""
        ...

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One update by the loss over all micro-batches of all processes.

        Every process passes equally many micro-batches, with equally many forward passes each. Raises NonFiniteUpdate.
        """
        ...

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """Forward and backward pass without an update, to fail early if memory does not suffice."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def full_module(self) -> AbstractContextManager[Any]:
        """A context with the unsharded module, for evaluating or saving it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and of the random generators, as tensors and plain values.

        The format is the same for all engines and numbers of processes. `optimizer`: torch's state dict of AdamW over
        the trained parameters, in their order. `random`: an entry per process. `master`: float32 weights by name, if
        the module's weights have a lower precision; `restore_master` puts them into a module before another engine is
        made of it. The state is complete on the main process only.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Call it after `dry_run`, which creates the moments of sharded optimizers.

        `state` is copied, so later updates do not change it.
        """
        ...


def restore_master(module: nn.Module, state: dict[str, Any]) -> None:
    """Put the float32 master weights of a saved engine state into the module, if the state has them."""
    parameters = dict(module.named_parameters())
    for name, weight in state.get("master", {}).items():
        parameters[name].data = weight.clone()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this name. `cuda` is the process's own GPU; `auto` is a GPU if there is one.

    Raises ValueError if the device is not available.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if name == "cuda" and torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"This machine has {count} GPU{'s' * (count > 1)}, but more processes than that. Start as many "
                "processes as GPUs, or run on the CPU with engine.device=cpu."
            )
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"engine.device={name} cannot be used here ({reason}). Set engine.device=cpu or auto."
        ) from None


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors. Has no effect with other C libraries.

    By default glibc maps large blocks anew each time, and the kernel clears their pages: a quarter of the step of a
    two-layer model (docs/performance.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((-4, 0), (-1, -1), (-2, 64 * 2**20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def set_up_device(config: EngineConfig, world: World | None = None) -> torch.device:
    """Choose the device, and set the number of CPU threads and the allocator's options for it."""
    world = world or World()
    if config.threads:
        torch.set_num_threads(config.threads)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))
    device = choose_device(config.device, world.local_rank)
    if config.cuda_graphs and device.type != "cuda":
        log(f"warning: engine.cuda_graphs=true has no effect: the device is {device.type}, and CUDA graphs need a GPU.")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision is Precision.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def adamw(
    module: nn.Module, settings: AdamWConfig, device: torch.device, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters.

    `lr_factors`: what the learning rate is multiplied by for parameters whose names begin like this; the first that
    fits. Parameters keep their order, and each run of equal factors is a group with its `lr_factor`.
    """

    def factor(named: tuple[str, nn.Parameter]) -> float:
        return next((value for start, value in (lr_factors or {}).items() if named[0].startswith(start)), 1.0)

    groups = [
        {"params": [weight for _, weight in named], **({"lr_factor": value} if value != 1 else {})}
        for value, named in groupby(trainable_parameters(module), factor)
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The names and parameters that require gradients, in the optimizer's order."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Clip the total gradient norm to `limit`, unless it is 0 or the norm is not finite. Returns the norm before."""
    weights = [weight for _, weight in trainable_parameters(module) if weight.grad is not None]
    total = nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    norm = total.item()
    if limit and math.isfinite(norm):
        nn.utils.clip_grads_with_norm_(weights, limit, total)
    return norm


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def restore_random_state(states: list[dict[str, torch.Tensor]], world: World, device: torch.device) -> None:
    """Restore this process's random generators; a process beyond the saved ones derives its own from the first's."""
    if world.rank < len(states):
        set_random_state(states[world.rank], device)
    else:
        set_random_state(states[0], device)
        torch.manual_seed(torch.randint(2**62, ()).item() + world.rank)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU since the last call, or on the CPU of the process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
