"""Training steps on a GPU: the released way, plain fine-tuning, ours, and ours as CUDA graphs.

    python -m benchmarks.gpu [full=FOLDER]

What is measured is in benchmarks/ways.py, here with 32 rows. A step is LocalEngine.update: forward, backward, clipping
and fused AdamW on one batch. Milliseconds are medians; *busy* is the kernels' share of them; *MFU* what the
model's products and attention need for the tokens of the batch, without padding, recomputation or the head where
nothing is predicted, over the step's time and the GPU's peak in bfloat16, for what is named below.
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

from benchmarks.run import GIB, Row, seconds, shown
from benchmarks.ways import SIZES, VOCABULARY, WAYS, Size, make_batches, make_model
from coconut import LatentLM
from coconut.config import AdamWConfig, EngineConfig, Precision
from coconut.data.batching import IGNORED, Batch
from coconut.engine.local import LocalEngine
from coconut.utils.files import write_json

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # NVIDIA's data sheets, SXM, bfloat16, dense
OURS = "ours, CUDA graphs"
CASES = [("12 x 768", "bfloat16", k) for k in (6, 0, 3, 12)] + [
    ("2 x 768", "bfloat16", 6), ("2 x 768", "float32", 6), ("12 x 768", "float32", 6),
]  # fmt: skip
ROWS, ROUNDS, LEAST = 32, 20, 3


def flops(size: Size, batch: Batch) -> float:
    """Of products and causal attention, forward and backward, with the head at the targets alone."""
    lengths = batch.attention_mask.sum(1).double()
    layers = size.layers * (24 * size.width**2 * lengths.sum() + 2 * size.width * lengths.square().sum())
    head = 2 * size.width * VOCABULARY * batch.num_targets
    return 3 * (float(layers) + head)


def engine_for(way: str, size: Size, kind: str) -> LocalEngine:
    def loss_sum(module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, LatentLM)
        mean = WAYS["ours" if way == OURS else way](module, batch)
        return mean * (batch.labels != IGNORED).sum()

    lm = make_model(size)
    lm.cuda_graphs = way == OURS
    return LocalEngine(lm, loss_sum, EngineConfig(device="cuda", precision=Precision(kind)), AdamWConfig())


def measured(way: str, size: Size, kind: str, thoughts: int) -> Row:
    engine = engine_for(way, size, kind)
    batch = make_batches(engine.module, thoughts, size.rows)["plain" if way == "plain" else "ours"]  # pyright: ignore
    update = partial(engine.update, [batch], 1e-5)
    rounds = LEAST if way == "released" else ROUNDS
    for _ in range(LEAST):
        update()
    torch.cuda.reset_peak_memory_stats()
    spent = [seconds(update) for _ in range(rounds)]
    peak = torch.cuda.max_memory_reserved() / GIB
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        update()
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
    step = statistics.median(spent)
    name = next((name for name in PEAK if name in torch.cuda.get_device_name()), None)
    mfu = 100 * flops(size, batch) / step / PEAK[name] if name else float("nan")
    return {"ms": 1000 * step, "busy, ms": 1000 * busy, "MFU, %": mfu, "reserved, GiB": peak}


def rows() -> Iterator[Row]:
    for name, kind, thoughts in CASES:
        size = replace(SIZES[name], rows=ROWS)
        plain = None
        for way in ("plain", OURS, "ours", "released"):
            if way == "released" and thoughts != 6:
                continue
            torch.cuda.empty_cache()
            found = measured(way, size, kind, thoughts)
            plain = plain or found["ms"]
            about = {"model": name, "precision": kind, "thoughts": thoughts, "way": way}
            yield {**about, **found, "times plain": found["ms"] / plain}


def copying() -> Iterator[Row]:
    """A batch to the GPU, from memory as it is and from pinned memory."""
    lm = make_model(replace(SIZES["2 x 128"], rows=ROWS))
    batch = make_batches(lm, 6, ROWS)["ours"]
    held = [batch.input_ids, batch.attention_mask, batch.labels]
    parts = {"as it is": held, "pinned": [part.pin_memory() for part in held]}

    def copy(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.to("cuda", non_blocking=True)
        torch.cuda.synchronize()

    for name, tensors in parts.items():
        yield {"memory": name, "ms": 1000 * statistics.median(seconds(partial(copy, tensors)) for _ in range(50))}


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
    found = {
        "steps": shown(f"A step, {ROWS} rows", rows()),
        "copying": shown("A batch to the GPU", copying()),
    }
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "gpu.json", {"about": about, **found})


if __name__ == "__main__":
    main()
