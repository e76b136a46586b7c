"""How far thoughts move between validations: that of a flat computation, also after a run went on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.runs import copy_until, graph_files, rows_of_kind, same_end, small_run

from coconut import LatentLM
from coconut.config import TrainConfig
from coconut.data.examples import read_examples
from coconut.evaluation.evaluator import evaluate
from coconut.methods import Curriculum, Unit
from coconut.runs.checkpoints import Checkpoints
from coconut.tasks import TASKS
from coconut.training.thought_drift import MAX_QUESTIONS, SeenThoughts
from coconut.training.trainer import run


def seen(thoughts: torch.Tensor, counts: list[int], stage: int = 1) -> SeenThoughts:
    return SeenThoughts.of(stage, thoughts, torch.tensor(counts))


def test_drift_is_the_distance_as_a_share_of_the_norm() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[0.0, 1.0], [1.0, 0.0]]])
    after = before + torch.tensor([[[0.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [0.5, 0.0]]])
    first, second = seen(before, [2, 2]), seen(after, [2, 2])
    assert second.drift_since(first) == pytest.approx([3 / 6, 0.5 / 3])
    assert first.drift_since(first) == [0.0, 0.0]
    assert first.drift_since(None) is None
    assert seen(after, [2, 2], stage=2).drift_since(first) is None


def test_only_questions_with_as_many_thoughts_are_compared() -> None:
    before, after = torch.ones(3, 3, 2), 2 * torch.ones(3, 3, 2)
    after[1] = 9
    assert seen(after, [1, 2, 1]).drift_since(seen(before, [1, 3, 1])) == [1.0, None, None]
    assert seen(after[:, :1], [1, 1, 1]).drift_since(seen(before, [1, 3, 1])) == [1.0]
    assert seen(before, [1] * 3).drift_since(seen(0 * before, [1] * 3)) == [None] * 3


def test_few_questions_are_kept() -> None:
    count = 3 * MAX_QUESTIONS + 5
    kept = seen(torch.arange(count).view(-1, 1, 1).float(), [1] * count)
    questions = kept.thoughts_NKD.flatten().tolist()
    assert len(questions) == len(set(questions)) == MAX_QUESTIONS
    assert questions[0] == 0
    assert questions[-1] > count - 5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    """A run with three validations in each stage, and a checkpoint after every update."""
    folder = tmp_path_factory.mktemp("runs")
    curriculum = Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=3, stage_length=6, total_length=15)
    config = small_run(
        folder / "run", graph_files(folder, 16, 9, 4), curriculum=curriculum, batch_size=8, validate_every=2,
        save_every=1, keep_checkpoints=100,
    )  # fmt: skip
    assert run(config) == 0
    return folder / "run", config


def test_drift_equals_a_flat_computation_from_checkpoints(finished: tuple[Path, TrainConfig]) -> None:
    folder, config = finished
    rows = [row for row in rows_of_kind(folder, "valid") if row["stage"]]
    assert [(row["step"], row["stage"], row["thought_drift"] is None) for row in rows] == [
        (4, 1, True), (6, 1, False), (8, 1, False), (9, 1, False),
        (10, 2, True), (12, 2, False), (14, 2, False), (15, 2, False),
    ]  # fmt: skip
    task, examples = TASKS[config.data.required_task()], read_examples(config.data.valid)

    def thoughts_at(step: int) -> torch.Tensor:
        lm = LatentLM.from_pretrained(Checkpoints(folder).path(step))
        return torch.cat([evaluate(lm, task, [example]).thoughts for example in examples]).double()

    thoughts = {row["step"]: thoughts_at(row["step"]) for row in rows}
    for before, row in pairwise(rows):
        if row["thought_drift"] is not None:
            old, new = thoughts[before["step"]], thoughts[row["step"]]
            expected = [
                sum(float((new[n, k] - old[n, k]).norm()) for n in range(9)) / sum(float(v[k].norm()) for v in old)
                for k in range(row["stage"])
            ]
            assert row["thought_drift"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_resumed_run_logs_the_same(finished: tuple[Path, TrainConfig], tmp_path: Path, step: int) -> None:
    """From before there were thoughts, from between two validations, and from one."""
    folder, config = finished
    copied = copy_until(step, folder, tmp_path / "run")
    config.run = str(copied)
    assert run(config) == 0
    same_end(copied, folder)
