"""What training asks of an engine.

An engine is given an `nn.Module` and a loss function. It knows neither models, data nor methods.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from coconut.config import AdamWConfig, EngineConfig, Precision
from coconut.engine.world import World
from coconut.utils.console import log


class MicroBatch(Protocol):
    """A part of an update."""

    @property
    def num_targets(self) -> int: ...

    def to(self, device: torch.device | str) -> Any: ...


LossFunction = Callable[[nn.Module, Any], torch.Tensor]  # the loss summed over the targets of a micro-batch


@dataclass(frozen=True)
class StepResult:
    """`loss`: mean over all targets of the update. `grad_norm`: before clipping."""

    loss: float
    grad_norm: float
    num_targets: int


class NonFiniteUpdate(ArithmeticError):
    """A loss or gradient that is not finite. No weight was changed. `culprits` names where it was seen."""

    def __init__(self, loss: float, grad_norm: float, culprits: list[str]):
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")
        self.loss, self.grad_norm, self.non_finite_names = loss, grad_norm, culprits


class Engine(Protocol):
    """Each process has one. All of them call the same methods in the same order, with parts of the same update."""

    device: torch.device
    world: World

    def reset_optimizer(self) -> None:
        """Make the optimizer anew: no moments, no step count."""
        ...

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """One update: the mean of the loss over all targets of all micro-batches of all processes.

        Every process gives equally many micro-batches, with equally many passes each. Raises NonFinite.
        """
        ...

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """Forward and backward without an update: fails now if memory does not suffice."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def full_module(self) -> AbstractContextManager[Any]:
        """The module with all its weights, to evaluate or save, whatever part of them a process keeps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and random number generators, as tensors and plain values.

        The form is the same for all engines and numbers of processes: `optimizer` is torch's own for AdamW over
        the trained parameters in their order, `random` has an entry for each process, and `master` (names to
        tensors) the weights in float32 if the module has them in less: `restore_master` puts them into a module
        before another engine is made of it. Whole in the first process only.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, after a rehearsal. Nothing of `state` is changed later."""
        ...


def restore_master(module: nn.Module, state: dict[str, Any]) -> None:
    """Put the float32 weights of a saved engine that computed in less into the module."""
    named = dict(module.named_parameters())
    for name, weight in state.get("master", {}).items():
        named[name].data = weight.clone()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name, on several GPUs the process's own; `auto` takes a GPU if there is one.

    Raises ValueError if it is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if name == "cuda" and torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"This machine has {count} GPU{'s' * (count > 1)} and more processes than that. Start as many "
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
    """Have glibc keep the memory of freed tensors for the next ones.

    By default it maps large blocks anew each time, and the kernel clears their pages: a quarter of a two-layer
    model's step (docs/performance.md). Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, value in ((-4, 0), (-1, -1), (-2, 64 * 2**20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def set_up_device(config: EngineConfig, world: World | None = None) -> torch.device:
    """Set the number of threads, and give the device."""
    world = world or World()
    if config.threads:
        torch.set_num_threads(config.threads)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_size))
    device = choose_device(config.device, world.local_rank)
    if config.cuda_graphs and device.type != "cuda":
        log(f"warning: engine.cuda_graphs=true does nothing here: the device is {device.type}, and it takes a GPU.")
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision is Precision.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def adamw(module: nn.Module, settings: AdamWConfig, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of the parameters that are trained."""
    return torch.optim.AdamW(
        [weight for _, weight in trained(module)],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names, in the optimizer's order."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def clip_gradients(module: nn.Module, limit: float) -> float:
    """The norm of all gradients, which are clipped to the limit if there is one and the norm is finite."""
    weights = [weight for _, weight in trained(module) if weight.grad is not None]
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


def own_random_state(states: list[dict[str, torch.Tensor]], world: World, device: torch.device) -> None:
    """Take up this process's generator where it was; one that there was not yet goes on from the first one's."""
    if world.rank < len(states):
        set_random_state(states[world.rank], device)
    else:
        set_random_state(states[0], device)
        torch.manual_seed(torch.randint(2**62, ()).item() + world.rank)


def peak_memory(device: torch.device) -> float:
    """In GiB: of the GPU since the last call, or of the process since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
