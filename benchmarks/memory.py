"""Memory and time of a training step with and without activation checkpointing: python -m benchmarks.memory [times]

GPT-2's architecture (124M), float32, one thread, 8 rows as long as ProsQA's, 3 and 6 thoughts. First both are checked
to give the same gradients. Then each step runs in a process of its own, in turn. The medians are printed: CPU time, the
process's largest resident set, and the largest sum of tensors alive at once, which is compared with what `activations`
computes from sizes. The last table is computed: what fits on which device.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.baselines import SIZES, VOCABULARY, in_own_process, make_model
from coconut import LatentLM

MODULE = "benchmarks.memory"
GIB = 2**30
ROWS, QUESTION, AFTER = 8, 160, 50


# --- computed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A decoder: widths of the hidden state, of a token's keys (or values), and of the feed-forward layer.

    `gated`: as Llama, with RMS norms and untied tables; otherwise as GPT-2.
    """

    name: str
    layers: int
    hidden: int
    keys: int
    inner: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Of matrices only; norms and biases are less than a thousandth."""
        attention = 2 * self.hidden * (self.hidden + self.keys)
        layer = attention + (3 if self.gated else 2) * self.hidden * self.inner
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def lora(self, rank: int) -> int:
        """Parameters of a LoRA correction of all linear layers but the head."""
        pairs = 2 * (2 * self.hidden) + 2 * (self.hidden + self.keys)
        if not self.gated:  # queries, keys and values are one layer
            pairs = (4 * self.hidden) + (2 * self.hidden)
        pairs += (3 if self.gated else 2) * (self.hidden + self.inner)
        return self.layers * rank * pairs

    def inside(self, size: int) -> int:
        """Numbers of `size` bytes that one layer saves for each token."""
        if not self.gated:
            return 6 * self.hidden + 2 * self.keys + 2 * self.inner
        norms = 2 * self.hidden * (4 // size - 1)  # RMS norms compute in float32
        return 8 * self.hidden + norms + 2 * self.keys + 4 * self.inner


def states(weights: int, trained: int, size: int, shards: int = 1, zero: int = 0, offload: bool = False) -> float:
    """Bytes of weights, gradients and AdamW on each device, without activations.

    float32 (`size` 4): 4 + 4 + 8 for a trained weight. bfloat16 (2) with a float32 master copy and gradients summed in
    float32: 2 + 4 + 12. Frozen weights have neither gradient nor optimizer; weights trained beside them are float32.
    ZeRO shards the optimizer (1), gradients (2) and weights (3). `offload` keeps the optimizer on the host.
    """
    frozen = weights - trained
    own = 4 if frozen else size
    optimizer = trained * (8 if own == 4 else 12)
    parts = [0 if offload else optimizer, trained * 4, trained * own + frozen * size]
    return sum(part / (shards if zero > level else 1) for level, part in enumerate(parts))


def activations(shape: Shape, rows: int, widths: list[int], size: int, recompute: bool) -> float:
    """Bytes alive at the end of the forward pass, without logits; `widths`: columns of each pass."""
    columns = rows * sum(widths)
    several = len(widths) > 1
    if recompute:
        return size * shape.layers * columns * (shape.hidden + several * 2 * shape.keys)
    single = widths.count(1) / sum(widths)  # share of columns in passes of one, whose queries are saved as a view
    cached = 0 if shape.gated else 2 * shape.keys * single  # of keys and values, which GPT-2 computes in one product
    repeated = 2 * shape.hidden if shape.keys < shape.hidden else 0  # for the last pass, whose attention has a mask
    return size * shape.layers * columns * (shape.inside(size) + several * (cached + repeated))


def working(shape: Shape, rows: int, widths: list[int], size: int) -> float:
    """Bytes inside one recomputed layer, for the widest pass."""
    seen = rows * sum(widths) if len(widths) > 1 else 0
    return size * (rows * max(widths) * shape.inside(size) + seen * 2 * shape.keys)


def head(shape: Shape, targets: int) -> float:
    """Bytes of logits, their log-probabilities and gradients in float32, at targets only."""
    return 3 * 4 * targets * shape.vocabulary


GPT2 = Shape("GPT-2", 12, 768, 768, 3072, VOCABULARY, gated=False, tied=True)
MODELS = [
    GPT2,
    Shape("Llama 3.2 1B", 16, 2048, 512, 8192, 128260, tied=True),
    Shape("Llama 3.1 8B", 32, 4096, 1024, 14336, 128260),
    Shape("Llama 3.1 70B", 80, 8192, 1024, 28672, 128260),
]


RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("float32", {"size": 4}), ("bfloat16", {"size": 2}), ("8: ZeRO 2", {"size": 2, "shards": 8, "zero": 2}),
    ("8: ZeRO 3", {"size": 2, "shards": 8, "zero": 3}),
    ("8: offload", {"size": 2, "shards": 8, "zero": 3, "offload": True}), ("LoRA", {"size": 2, "rank": 16}),
    ("8: LoRA", {"size": 2, "rank": 16, "shards": 8, "zero": 3}),
]  # fmt: skip


def fits() -> None:
    """Print what each device needs: weights and optimizer by recipe, and the activations of a micro-batch."""
    widths, targets = [QUESTION, *[1] * 5, 1 + AFTER], ROWS * AFTER
    print(f"\ncomputed: GB on each of 1 or 8 devices; {ROWS} rows of {sum(widths)} columns, 6 thoughts, in bfloat16")
    print(f"{'':14}" + "".join(f"{name:>11}" for name, _ in RECIPES) + f"{'kept':>11}{'recomputed':>12}")
    for shape in MODELS:
        needed = []
        for _, recipe in RECIPES:
            lora = shape.lora(recipe.get("rank", 0))
            options = {key: value for key, value in recipe.items() if key != "rank"}
            needed.append(states(shape.parameters + lora, lora or shape.parameters, **options))
        kept = activations(shape, ROWS, widths, 2, recompute=False)
        recomputed = activations(shape, ROWS, widths, 2, recompute=True) + working(shape, ROWS, widths, 2)
        row = [*needed, *(size + head(shape, targets) for size in (kept, recomputed))]
        print(f"{shape.name:14}" + "".join(f"{size / 1e9:11.1f}" for size in row))


# --- measured ---------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Bytes of the tensors created in this context: those alive (`now`), and the most alive at once (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen.update(t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def make_batch(lm: LatentLM, thoughts: int) -> dict[str, Tensor]:
    """Questions of equal length, thoughts, and targets."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (ROWS, QUESTION + thoughts + AFTER), generator=random)
    ids[:, QUESTION : QUESTION + thoughts] = lm.latent_id
    labels = ids.clone()
    labels[:, : QUESTION + thoughts] = -100
    return {"input_ids": ids, "labels": labels}


def step(lm: LatentLM, batch: dict[str, Tensor], between: Callable[[], object] = lambda: None) -> None:
    torch.manual_seed(1)
    loss = lm(**batch).loss
    assert loss is not None
    between()
    loss.backward()


def measure(thoughts: int, recompute: bool) -> dict[str, float]:
    """One step in this process for its time and resident set, then one for the tensors alive."""
    lm = make_model(SIZES["12 x 768"])
    lm.acceleration.activation_checkpointing = recompute
    batch = make_batch(lm, thoughts)
    before = time.process_time()
    step(lm, batch)
    seconds = time.process_time() - before
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held: list[int] = []
    with Living() as living:  # the gradients exist already
        step(lm, batch, lambda: held.append(living.now))
    return {"seconds": seconds, "resident": resident, "held": held[0], "peak": living.peak}


def difference(thoughts: int) -> float:
    """The largest |a - b| / |b| over the parameters' gradients, dropout on, one seed."""
    lm = make_model(SIZES["12 x 768"], dropout=0.1)
    gradients: list[dict[str, Tensor]] = []
    for lm.acceleration.activation_checkpointing in (False, True):
        lm.zero_grad()
        step(lm, make_batch(lm, thoughts))
        gradients.append({name: weight.grad for name, weight in lm.named_parameters() if weight.grad is not None})
    kept, recomputed = gradients
    return max(float((recomputed[name] - kept[name]).norm() / kept[name].norm().clamp(min=1e-12)) for name in kept)


def main() -> None:
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["measure", thoughts, activations]:
            print(json.dumps(measure(int(thoughts), activations == "recompute")))
        case ["difference", thoughts]:
            print(json.dumps(difference(int(thoughts))))
        case [*times]:
            report(int(times[0]) if times else 3)


def report(times: int) -> None:
    print(f"the gradients differ by at most {in_own_process(MODULE, 'difference', '3'):.1e} of their norm", flush=True)
    cases = [(thoughts, kind) for thoughts in (3, 6) for kind in ("keep", "recompute")]
    results: dict[tuple[int, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(times):
        for thoughts, kind in cases:
            results[thoughts, kind].append(in_own_process(MODULE, "measure", str(thoughts), kind))
    print(f"{times} processes each, medians; GiB")
    print("thoughts  activations  CPU seconds   resident   tensors: peak  held  computed")
    for (thoughts, kind), rows in results.items():
        m = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        widths = [QUESTION, *[1] * (thoughts - 1), 1 + AFTER]
        held = activations(GPT2, ROWS, widths, 4, kind == "recompute") + head(GPT2, ROWS * AFTER) / 3
        print(
            f"{thoughts:8}  {kind:11} {m['seconds']:10.1f} {m['resident'] / GIB:10.2f} {m['peak'] / GIB:15.2f} "
            f"{m['held'] / GIB:5.2f} {held / GIB:9.2f}"
        )
    fits()


if __name__ == "__main__":
    main()
