"""A batch's passes as CUDA graphs: recorded once for each shape, then started with one launch each way.

On a GPU a thought's pass is hundreds of kernels of a few microseconds each, and starting them one by one takes several
times as long as running them. A recording holds addresses, not values: what goes in and comes out is copied, weights
must stay where they are, and two recordings share their memory, so that one is gone back through before the next runs.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from coconut.utils.torch_utils import differentiable_once

Passes = Callable[..., Tensor]
MOST = 128  # recordings that are kept: of each the input, the states and their gradients, besides what all share


def bucket_up(width: int) -> int:
    """So wide is a pass made that others have its shape, too: up by less than an eighth, or to a multiple of 8."""
    step = max(8, 2 ** (width.bit_length() - 4))
    return -(-width // step) * step


def bucket_down(width: int) -> int:
    """More coarsely: it only says what is left out."""
    return width - width % max(8, 2 ** (width.bit_length() - 2))


class CudaGraphs:
    """Recordings of one model's passes. A shape that comes for the first time is run as always."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        self._gradients: _Gradients | None = None
        self._turn: Callable[[], _ReplayToken | None] = lambda: None

    def __deepcopy__(self, memo: Any) -> CudaGraphs:
        return CudaGraphs(deepcopy(self._model, memo))

    @property
    def captured(self) -> int:
        """How many shapes are."""
        return len(self._recordings)

    def run(self, shape: Hashable, passes: Passes, given: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """`passes(*given)`, whose first tensor and weights may have gradients. `shape`: what it depends on else."""
        if self._turn() is not None:  # the last one is still to be gone back through
            return passes(*given)
        places = tuple(weight.data_ptr() for weight in weights)
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (shape, tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in given), places, kind)
        recording = self._recordings.get(key)
        if recording is None:
            if key not in self._seen:
                self._seen.add(key)
                return passes(*given)
            recording = self._record(passes, given, weights, kind)
            self._recordings[key] = recording
            if len(self._recordings) > MOST:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        for static, tensor in zip(recording.given, given, strict=True):
            static.data.copy_(tensor)
        turn = _ReplayToken()
        self._turn = weakref.ref(turn)
        found = _Replayed.apply(recording, turn, given[0], *weights)
        assert isinstance(found, Tensor)
        return found

    def _record(
        self, passes: Passes, given: Sequence[Tensor], weights: Sequence[Tensor], kind: torch.dtype | None
    ) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._gradients is None or not self._gradients.fit(weights):
            self._recordings.clear()
            self._gradients = _Gradients(weights)
        uncached = torch.autocast("cuda", kind, cache_enabled=False) if kind else nullcontext()
        device = given[0].device
        with torch.random.fork_rng([device]), uncached, detached_leaf_parameters(self._model, weights) as leaves:
            return _Recording(passes, given, leaves, self._gradients, self._pool)


@contextmanager
def detached_leaf_parameters(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within, the model has other leaves for these weights, in the same memory.

    A leaf is tied to the stream on which it was first used for as long as a loss that came from it lives, and what is
    recorded may have nothing to do with that stream.
    """
    leaves = [weight.detach().requires_grad_() for weight in weights]
    fresh = {id(weight): leaf for weight, leaf in zip(weights, leaves, strict=True)}
    own = [(module._parameters, dict(module._parameters)) for module in model.modules()]
    for held, before in own:
        held.update({name: fresh.get(id(weight), weight) for name, weight in before.items()})  # pyright: ignore
    try:
        yield leaves
    finally:
        for held, before in own:
            held.update(before)


class _ReplayToken:
    """Lives as long as a replay can be gone back through."""


class _Gradients:
    """Of all weights, in one piece of memory for all recordings."""

    def __init__(self, weights: Sequence[Tensor]):
        self.shapes = [weight.shape for weight in weights]
        sizes = [weight.numel() for weight in weights]
        self.whole = torch.zeros(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)
        self.parts = self._cut(self.whole)

    def fit(self, weights: Sequence[Tensor]) -> bool:
        return self.shapes == [weight.shape for weight in weights]

    def take(self, found: Sequence[Tensor | None]) -> list[bool]:
        """Which of the weights have a gradient."""
        pairs = [(part, of) for part, of in zip(self.parts, found, strict=True) if of is not None]
        for part, of_weight in pairs:
            part.copy_(of_weight)
        return [of is not None for of in found]

    def copies(self) -> list[Tensor]:
        return self._cut(self.whole.clone())

    def _cut(self, whole: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(whole.split(sizes), self.shapes, strict=True)]


class _Recording:
    def __init__(
        self, passes: Passes, given: Sequence[Tensor], weights: Sequence[Tensor], gradients: _Gradients, pool: Any
    ):
        self.given = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given]
        self.gradients = gradients
        wanted = [self.given[0], *weights] if given[0].requires_grad else [*weights]
        self._warm_up(passes, wanted)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool):
            made = passes(*self.given)
        self.gradient = torch.empty_like(made)
        with torch.cuda.graph(self.backward, pool=pool):
            found = list(torch.autograd.grad(made, wanted, self.gradient, allow_unused=True))
            self.of_given = found.pop(0) if given[0].requires_grad else None
            self.has_gradient = gradients.take(found)
        self.made = made.detach()

    def _warm_up(self, passes: Passes, wanted: list[Tensor]) -> None:
        """What kernels set up when they first run must not be recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            made = passes(*self.given)
            torch.autograd.grad(made, wanted, torch.zeros_like(made), allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, turn: _ReplayToken, given: Tensor, *weights: Tensor) -> Tensor:
        ctx.recording, ctx.turn = recording, turn
        recording.forward.replay()
        return recording.made.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.turn is None:
            raise RuntimeError("Passes that were replayed can be gone back through once. Set lm.cuda_graphs = False.")
        recording: _Recording = ctx.recording
        recording.gradient.copy_(gradient)
        recording.backward.replay()
        ctx.turn = None
        of_given = None if recording.of_given is None else recording.of_given.clone()
        copies = recording.gradients.copies()
        of_weights = [copy if has else None for copy, has in zip(copies, recording.has_gradient, strict=True)]
        return None, None, of_given, *of_weights
