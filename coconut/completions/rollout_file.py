"""A file of sampled answers with their labels, made in chunks so that a killed command can resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.completions.config import RolloutConfig
from coconut.completions.rollouts import CorrectnessReward, Group, sample_groups
from coconut.data.examples import Example
from coconut.engine.base import autocast
from coconut.engine.world import World
from coconut.utils.console import log, progress_bar
from coconut.utils.files import write_json, write_text

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

CHUNK = 256  # questions


def write_rollouts(
    lm: LatentLM, examples: Sequence[Example], judge: CorrectnessReward, config: RolloutConfig, output: Path,
    about: dict[str, Any], world: World,
) -> None:  # fmt: skip
    """Sample and judge answers, and write the file, with `about` beside it as JSON. The processes share the chunks.

    Chunks are kept beside the file until it is whole. Those of a command with another `about` are removed.
    """
    folder = output.with_name(f".{output.name}.chunks")
    world.on_main_process(lambda: _open_chunks(folder, about))
    chunks = [range(first, min(first + CHUNK, len(examples))) for first in range(0, len(examples), CHUNK)]
    files = [folder / f"{number:06d}.jsonl" for number in range(len(chunks))]
    with progress_bar("sampling", len(chunks)) as bar, autocast(lm.device, config.engine.precision):
        for number, places in list(enumerate(chunks))[world.rank :: world.size]:
            world.set_activity(f"sampling chunk {number}")
            if not files[number].is_file():
                groups = sample_groups(
                    lm, [examples[i] for i in places], lambda *_: 0.0, samples=config.samples,
                    keys=[(config.seed, i) for i in places], temperature=config.temperature, mode=config.mode,
                    max_new_tokens=config.max_new_tokens, batch_size=config.batch_size,
                )  # fmt: skip
                write_rows(files[number], (answer_row(group, judge) for group in groups))
            bar(number + 1, "")
    world.all_gather_object(None)
    if world.is_main:
        _join(files, output)
        write_json(output.with_suffix(".json"), about)
        shutil.rmtree(folder)


def _open_chunks(folder: Path, about: dict[str, Any]) -> None:
    file = folder / "about.json"
    if file.is_file() and json.loads(file.read_text()) != about:
        shutil.rmtree(folder)
    if not file.is_file():
        write_json(file, about)


def _join(files: Sequence[Path], output: Path) -> None:
    """Write the chunks as one file."""
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    write_rows(output, rows)
    labels = [completion["correct"] for row in rows for completion in row["completions"]]
    right = f"{100 * sum(labels) / len(labels):.1f} % of them right"
    log(f"{len(rows):,} questions, {len(labels):,} answers, {right}: {output}")


def answer_row(group: Group, judge: CorrectnessReward) -> dict[str, Any]:
    """A line of the file."""
    example = group.example
    samples = [
        {"text": sample.text, "correct": judge.is_correct(example, sample.text), "ids": sample.completion_ids,
         "mode": sample.mode, "num_thoughts": sample.num_thoughts, "new_tokens": sample.new_tokens,
         "truncated": sample.truncated}
        for sample in group.completions
    ]  # fmt: skip
    return {"question": example.question, "answer": example.answer, "steps": list(example.steps),
            "completions": samples}  # fmt: skip


def write_rows(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """The whole file or none of it."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
