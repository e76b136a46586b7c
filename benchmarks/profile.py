"""Where a training step's time goes, and a lower bound of it: python -m benchmarks.profile [thoughts]

For each size of benchmarks/baselines.py, ours and plain fine-tuning, in both precisions: time by kind of operator, the
rest (Python between operators), system time (mostly page faults), and the floor: the time of the step's matrix products
at the rate of one product of the same shape in the same run, by the faster of torch's two libraries.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines import SIZES, Size, make_batches, make_model
from benchmarks.run import Row, machine, print_table, seconds, step, timed
from coconut.acceleration.linear import matmul
from coconut.engine.base import keep_freed_memory

KINDS = {
    "products": ("mm", "linear", "matmul", "mkldnn"),
    "attention": ("attention", "softmax", "scaled_dot"),
    "loss": ("nll", "cross_entropy", "log_softmax"),
    "norms": ("norm",),
    "copies": ("copy", "cat", "clone", "contiguous", "index", "gather", "slice_backward", "embedding", "fill", "zero"),
}


def kind_of(name: str) -> str:
    """The kind with the longest matching part: log_softmax belongs to the loss, softmax to attention."""
    matches = [(len(part), kind) for kind, parts in KINDS.items() for part in parts if part in name]
    return max(matches)[1] if matches else "the rest"


def rate(size: Size, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the feed-forward layer's product."""
    a = torch.randn(size.rows * 400, size.width, dtype=dtype)
    b = torch.randn(size.width, 4 * size.width, dtype=dtype)
    best = min(seconds(partial(product, a, b)) for product in (torch.mm, matmul) for _ in range(10))
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / best


def onednn_flops(inputs: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Floating-point operations from the shapes (N, in) and (out, in). torch does not count this operator."""
    return 2 * math.prod(inputs) * weight[0]


UNCOUNTED = {torch.ops.mkldnn._linear_pointwise: onednn_flops}


def rows(thoughts: int) -> Iterator[Row]:
    for name, size in SIZES.items():
        lm = make_model(size)
        batches = make_batches(lm, thoughts, size.rows)
        for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            for implementation in ("plain", "ours"):
                work = partial(step, implementation, lm, batches[implementation], precision)
                with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counted:
                    work()
                whole, system = timed(work)
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    work()
                spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
                for event in seen.key_averages():
                    spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
                yield {
                    "model": name, "precision": precision, "implementation": implementation, "step": whole, **spent,
                    "Python": max(whole - sum(spent.values()), 0.0), "system": system,
                    "floor": counted.get_total_flops() / rate(size, dtype),
                }  # fmt: skip


def main() -> None:
    keep_freed_memory()
    thoughts = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print_table(f"{machine()}; {thoughts} thoughts; seconds a step", rows(thoughts))


if __name__ == "__main__":
    main()
