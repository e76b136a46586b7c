"""What a training costs, measured before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import graph_files, small_run

from coconut.config import TrainConfig
from coconut.data.batching import epoch_batches
from coconut.data.sequences import EpochView
from coconut.engine.world import World
from coconut.methods import METHODS, Curriculum, Unit
from coconut.train import run
from coconut.training import dry_run
from coconut.training.trainer import Trainer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("data")
    return replace(small_run(folder / "run", graph_files(folder, 40, 12, 8)), dry_run=True, eval_batch_size=4)


def trainer_of(config: TrainConfig) -> Trainer:
    data = config.data
    return Trainer(config, Path(str(config.run)), {"train": data.train, "valid": data.valid}, World())


@pytest.mark.parametrize("method", ["coconut", "cot", "codi", "icot", "hybrid_warmup", "colar"])
def test_a_dry_run_writes_nothing(method: str, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path(str(config.run)).parent.rglob("*"))
    assert method in METHODS
    assert run(replace(config, method=method)) == 0
    said = capsys.readouterr().out
    assert "Peak memory" in said
    assert "  stage 0: " in said
    assert sorted(Path(str(config.run)).parent.rglob("*")) == before


def test_the_longest_rows_are_run_and_nothing_is_learned(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(config)
    before = {name: weight.clone() for name, weight in trainer.lm.named_parameters()}
    widths: list[int] = []
    update = trainer.engine.update

    def noted(parts: Any, lr: float) -> Any:
        widths.append(max(part.input_ids.shape[1] for part in parts))
        return update(parts, lr)

    monkeypatch.setattr(trainer.engine, "update", noted)
    cost = dry_run.run_cost(trainer)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.lm.named_parameters())
    assert len(widths) == 3 * len(trainer.plan.stages)
    for number, stage in enumerate(trainer.plan.stages):
        data, form = trainer.train, stage.form
        left = [
            [data.starts[i], *data.bounds[data.first[i] : data.first[i + 1]]]  # where the segments begin and end
            for i in range(len(data))
        ]
        cut = form.steps_cut or 0
        lengths = [ends[1] - ends[0] + ends[-1] - ends[min(1 + cut, len(ends) - 2)] for ends in left]
        assert widths[3 * number] >= max(lengths) + 2 + form.slot_length
        assert max(widths[3 * number + 1 : 3 * number + 3]) <= widths[3 * number]
    assert [c.stage for c in cost.measured] == list(trainer.plan.stages)
    assert cost.updates == (2, 2, 2)
    assert cost.training == pytest.approx(sum(2 * c.seconds for c in cost.measured))


def test_whole_batches_are_measured_whatever_comes_first(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 40 rows has two batches of 16 and one of 8, in random order."""
    seed, sizes = 8, []
    trainer = trainer_of(replace(config, seed=seed))
    view = EpochView(trainer.train, trainer.plan, trainer.plan.stages[0], trainer.lm.special, seed, epoch=0)
    assert list(map(len, epoch_batches(view, config.batch_size, seed, epoch=0))) == [8, 16, 16]
    update = trainer.engine.update

    def noted(parts: Any, lr: float) -> Any:
        sizes.append(sum(len(part.input_ids) for part in parts))
        return update(parts, lr)

    monkeypatch.setattr(trainer.engine, "update", noted)
    dry_run.run_cost(trainer)
    assert sizes == [16] * 3 * len(trainer.plan.stages)


def test_peak_memory_is_that_of_validations_too(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each reading is of what came since the one before."""
    trainer, evaluate, peaks = trainer_of(config), dry_run.evaluate, {"update": 2.0}

    def noted(*args: Any, **options: Any) -> Any:
        peaks["validation"] = 3.0
        return evaluate(*args, **options)

    monkeypatch.setattr(dry_run, "evaluate", noted)
    monkeypatch.setattr(dry_run, "peak_memory", lambda device: max(peaks.values()))
    cost = dry_run.run_cost(trainer)
    assert ([each.memory for each in cost.measured], cost.memory) == ([2.0] * 3, 3.0)
    assert "Peak memory 3.0 GiB" in cost.describe()


def test_stages_between_the_measured_ones_are_interpolated(config: TrainConfig) -> None:
    curriculum = Curriculum(max_stage=8, length_unit=Unit.updates, stage0_length=1, stage_length=1, total_length=9)
    trainer = trainer_of(replace(config, curriculum=curriculum))
    cost = dry_run.run_cost(trainer)
    assert [c.stage.index for c in cost.measured] == [0, 2, 3, 5, 6, 8]
    seconds = cost.seconds_per_update
    assert seconds[4] == pytest.approx((cost.measured[2].seconds + cost.measured[3].seconds) / 2)
    assert "and 3 stages between these" in cost.describe()


@pytest.mark.parametrize(("unit", "every"), [(Unit.updates, 0), (Unit.updates, 3), (Unit.epochs, 0), (Unit.epochs, 2)])
def test_validations_are_counted(unit: Unit, every: int, config: TrainConfig) -> None:
    curriculum = replace(config.curriculum, length_unit=unit, stage0_length=4, stage_length=4, total_length=12)
    trainer = trainer_of(replace(config, curriculum=curriculum, validate_every=every))
    due = 0
    for step in range(1, trainer.num_steps + 1):
        trainer.step = step
        due += trainer.validation_due()
    assert dry_run.num_validations(trainer.schedule, every) == due > 3
