"""Training steps on a GPU: the released implementation, plain fine-tuning, ours, and ours with CUDA graphs.

    python -m benchmarks.gpu [full=FOLDER]

benchmarks/baselines.py has the implementations; here they run with 32 rows. A step is LocalEngine.update: forward,
backward, clipping and fused AdamW on one batch. Milliseconds are medians. *busy* is the time in kernels. *MFU* counts
the model's matrix products and attention for the tokens of the batch, without padding, recomputation, or the head
where nothing is predicted, relative to the step's time and the GPU's peak in bfloat16.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.baselines import IMPLEMENTATIONS, SIZES, VOCABULARY, Size, make_batches, make_model
from benchmarks.run import GIB, Row, print_table, seconds
from coconut import LatentLM
from coconut.config import AdamWConfig, EngineConfig, Precision
from coconut.data.batching import IGNORED, Batch
from coconut.engine.base import Loss
from coconut.engine.local import LocalEngine
from coconut.utils.files import write_json

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # NVIDIA's data sheets, SXM, bfloat16, dense
OURS = "ours, CUDA graphs"
CASES = [("12 x 768", "bfloat16", k) for k in (6, 0, 3, 12)] + [
    ("2 x 768", "bfloat16", 6), ("2 x 768", "float32", 6), ("12 x 768", "float32", 6),
]  # fmt: skip
ROWS, ROUNDS, FEW_ROUNDS = 32, 20, 3


def flops(size: Size, batch: Batch) -> float:
    """Of matrix products and causal attention, forward and backward, with the head at the targets alone."""
    lengths = batch.attention_mask.sum(1).double()
    layers = size.layers * (24 * size.width**2 * lengths.sum() + 2 * size.width * lengths.square().sum())
    head = 2 * size.width * VOCABULARY * batch.denominators[0]
    return 3 * (float(layers) + head)


def engine_for(name: str, size: Size, kind: str) -> LocalEngine:
    def loss_sum(module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, LatentLM)
        mean = IMPLEMENTATIONS["ours" if name == OURS else name](module, batch)
        return mean * (batch.labels != IGNORED).sum()

    lm = make_model(size)
    lm.acceleration.cuda_graphs = name == OURS
    return LocalEngine(lm, Loss(loss_sum), EngineConfig(device="cuda", precision=Precision(kind)), AdamWConfig())


def measure(name: str, size: Size, kind: str, thoughts: int) -> Row:
    engine = engine_for(name, size, kind)
    batch = make_batches(engine.module, thoughts, size.rows)["plain" if name == "plain" else "ours"]  # pyright: ignore
    update = partial(engine.update, [batch], 1e-5)
    rounds = FEW_ROUNDS if name == "released" else ROUNDS
    for _ in range(FEW_ROUNDS):
        update()
    torch.cuda.reset_peak_memory_stats()
    spent = [seconds(update) for _ in range(rounds)]
    peak = torch.cuda.max_memory_reserved() / GIB
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        update()
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    step = statistics.median(spent)
    gpu = next((gpu for gpu in PEAK if gpu in torch.cuda.get_device_name()), None)
    mfu = 100 * flops(size, batch) / step / PEAK[gpu] if gpu else float("nan")
    return {"ms": 1000 * step, "busy, ms": 1000 * busy, "MFU, %": mfu, "reserved, GiB": peak}


def rows() -> Iterator[Row]:
    for model, kind, thoughts in CASES:
        size = replace(SIZES[model], rows=ROWS)
        plain = None
        for name in ("plain", OURS, "ours", "released"):
            if name == "released" and thoughts != 6:
                continue
            torch.cuda.empty_cache()
            row = measure(name, size, kind, thoughts)
            plain = plain or row["ms"]
            case = {"model": model, "precision": kind, "thoughts": thoughts, "implementation": name}
            yield {**case, **row, "times plain": row["ms"] / plain}


def copying() -> Iterator[Row]:
    """Copying a batch to the GPU, from pageable and from pinned memory."""
    lm = make_model(replace(SIZES["2 x 128"], rows=ROWS))
    batch = make_batches(lm, 6, ROWS)["ours"]
    tensors = [batch.input_ids, batch.attention_mask, batch.labels]
    kinds = {"pageable": tensors, "pinned": [tensor.pin_memory() for tensor in tensors]}

    def copy(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.to("cuda", non_blocking=True)
        torch.cuda.synchronize()

    for kind, tensors in kinds.items():
        yield {"memory": kind, "ms": 1000 * statistics.median(seconds(partial(copy, tensors)) for _ in range(50))}


def main() -> None:
    match sys.argv[1:]:
        case []:
            folder = None
        case [text] if text.startswith("full="):
            folder = Path(text.removeprefix("full="))
        case other:
            sys.exit(f"error: {' '.join(other)} came. Usage: python -m benchmarks.gpu [full=FOLDER]")
    about = f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(about)
    tables = {
        "steps": print_table(f"A step, {ROWS} rows", rows()),
        "copying": print_table("A batch to the GPU", copying()),
    }
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "gpu.json", {"about": about, **tables})


if __name__ == "__main__":
    main()
