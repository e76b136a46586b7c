"""Train a model stage by stage on examples with a chain of reasoning steps."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coconut.config import TrainConfig
from coconut.data.batching import Batch, epoch_batches, micro_batches
from coconut.data.sequences import EpochView, merged_lengths
from coconut.engine.base import Engine, peak_memory, restore_master
from coconut.engine.factory import make_engine
from coconut.engine.world import World
from coconut.evaluation.evaluator import Prediction, evaluate
from coconut.evaluation.gold_answers import limit_for, warn_of_limit
from coconut.methods import Reasoning, Stage
from coconut.models.latent_lm import LatentLM
from coconut.objectives.training_model import TrainingModel
from coconut.runs.checkpoints import load_trainer
from coconut.runs.folder import used_file, write_description
from coconut.runs.loading import starting_point
from coconut.runs.state import TrainingState
from coconut.runs.tracking import Tracking
from coconut.tasks import TASKS
from coconut.training.divergence import explain_non_finite_loss
from coconut.training.launch import launch_training
from coconut.training.model_setup import apply_engine_options, make_model
from coconut.training.prepare import answers_view, largest_examples, prepare_data, read_splits
from coconut.training.schedule import Schedule, StepPosition, updates_since_reset
from coconut.training.signals import StopRequest
from coconut.training.thought_drift import SeenThoughts
from coconut.training.thought_gradients import attenuation, gradient_norms
from coconut.training.thought_statistics import measure_thoughts
from coconut.utils.console import log
from coconut.utils.hydra_app import own_environment
from coconut.utils.torch_utils import spread_indices

GRADIENT_QUESTIONS = 32  # validation questions on which the gradients at the thoughts are measured


def summed_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    thoughts = module.merged_thoughts(batch.spans_RGS) if isinstance(module, LatentLM) else None
    return module(
        batch.input_ids, batch.attention_mask, labels=batch.labels, min_passes=batch.passes, thoughts=thoughts
    ).loss_sum


class Trainer:
    """One process's part of a run. A step is one update of the model. See `coconut.training.loop` for the loop."""

    unit = "update"

    def __init__(self, config: TrainConfig, folder: Path, files: dict[str, str], world: World):
        self.config, self.folder, self.files, self.world = config, folder, files, world
        self.task = TASKS[config.data.required_task()]
        self.plan = config.plan()
        self.training_state = TrainingState(config, folder, world, pending=False)
        self.step = self.training_state.state["step"]
        self.best = self.training_state.state["best"]
        self.pending = self.training_state.state["pending"]

        torch.manual_seed(config.seed)
        examples = read_splits(config, files)
        if self.training_state.resume_from:
            self.lm = LatentLM.from_pretrained(self.training_state.resume_from, config.model.attention)
        else:
            self.lm = make_model(config, examples["train"])
        apply_engine_options(self.lm, config.engine)
        self.module = TrainingModel(self.lm, self.plan).train()
        self.thoughts: SeenThoughts | None = None  # of the last validation
        if self.training_state.resume_from:
            self.module.load_training_modules(self.training_state.resume_from)
            resumed = load_trainer(self.training_state.resume_from)
            restore_master(self.module, resumed)
            self.thoughts = SeenThoughts.from_state(resumed.get("thoughts"))
        self.num_parameters = sum(weight.numel() for weight in self.lm.parameters())
        self.num_training_only = sum(weight.numel() for weight in self.module.objectives.parameters())
        with world.main_process_first():  # the others then find the tokens in the cache
            used = {split: prepare_data(config, self.plan, self.lm, split, examples[split], files[split])
                    for split in ("train", "valid")}  # fmt: skip
        self.train, self.valid = used["train"][0], used["valid"][0]
        self.valid_examples = used["valid"][1]
        self.questions = {split: [example.question for example in rows] for split, (_, rows) in used.items()}
        self.schedule = Schedule(self.plan, -(-len(self.train) // config.batch_size))
        self.num_steps = self.schedule.total
        if world.rank:
            torch.manual_seed(config.seed + world.rank)  # the same model in every process, other dropout
        self.engine: Engine = make_engine(self.module, self.module.loss, config.engine, config.optimizer, world)

        self.view: EpochView | None = None  # of the current epoch, with its batches
        self.batches: list[np.ndarray] = []
        self.collapse: list[str] = []  # what the last validation warned of

    @property
    def next_command(self) -> str:
        data = self.config.data
        needs_file = (data.train or data.valid) and not data.test
        return f"coconut evaluate run={self.folder}{' data.test=FILE' if needs_file else ''}"

    @property
    def micro_batch_size(self) -> int:
        share = self.config.batch_size // self.world.size
        return min(self.config.micro_batch_size or share, share)

    def log_summary(self) -> None:
        config, world = self.config, self.world
        where = f"{world.size} processes, {config.engine.kind}" if world.size > 1 else str(self.engine.device)
        log(
            f"{config.method}: {len(self.train):,} training and {len(self.valid):,} validation examples, "
            f"{self.num_parameters / 1e6:.1f}M parameters, {self.num_steps:,} updates on {where}"
        )
        if self.num_training_only:
            log(f"  and {self.num_training_only / 1e6:.1f}M parameters that only training needs; exports lack them")
        if config.curriculum.mixing_probability and not self.plan.mixing_probability:
            log(
                f"note: {config.method} has no stages that its slot tells apart, so curriculum.mixing_probability is "
                "not used"
            )
        for stage in self.plan.stages:
            log(f"  stage {stage.index}: {stage.length} {self.plan.unit.value}, {stage.describe()}")
        if len(self.plan.terms) > 1:
            log(f"  loss: {' + '.join(f'{term.weight:g} {term.name}' for term in self.plan.terms)}")
        if config.max_new_tokens:
            forms = [form for stage in self.plan.stages for form in stage.forms_at_inference]
            for split, data in (("train", self.train), ("valid", self.valid)):
                warn_of_limit(data, forms, config.max_new_tokens, self.files[split])

    def dry_run(self) -> None:
        """Run the micro-batches with the longest rows and with the most passes."""
        world, size = self.world, self.micro_batch_size
        for view, longest in largest_examples(self.train, self.plan, self.lm, size * world.size):
            for batch in micro_batches(view, longest, size, world.rank, world.size):
                try:
                    self.engine.dry_run(batch)
                except RuntimeError as error:
                    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                        raise
                    rows, columns = batch.input_ids.shape
                    raise ValueError(
                        f"Memory does not suffice for the largest micro-batch, {rows} rows of {columns} tokens. Lower "
                        f"micro_batch_size (now {size}); the loss does not change with it. {error}"
                    ) from error

    def train_step(self) -> dict[str, Any]:
        """One update."""
        config, position = self.config, self.schedule.at(self.step)
        if updates_since_reset(position, config.optimizer.reset_every) == 0:
            self.engine.reset_optimizer()
        if position.stage_step == 0 or self.view is None:
            self.lm.reasoning = self.reasoning_in(position.stage)
            log(f"Stage {position.stage.index}: {position.stage.describe()}")
        if position.batch == 0 or self.view is None:
            self.view = EpochView(self.train, self.plan, position.stage, self.lm.special, config.seed, position.epoch)
            self.batches = epoch_batches(self.view, config.batch_size, config.seed, position.epoch)
        row = self._update(position, self.view, self.batches[position.batch])
        return {"stage": position.stage.index, "epoch": position.epoch, **row}

    def _update(self, position: StepPosition, view: EpochView, batch: np.ndarray) -> dict[str, float]:
        config, world = self.config, self.world
        world.set_activity(f"in update {position.step + 1}")
        begin = time.perf_counter()
        parts = list(micro_batches(view, batch, self.micro_batch_size, world.rank, world.size))
        stage, since_reset = position.stage.index, updates_since_reset(position, config.optimizer.reset_every)
        lr = config.optimizer.learning_rate(since_reset, stage, position.step / self.num_steps)
        details = {"stage": stage, "epoch": position.epoch, "examples": batch.tolist()}
        with explain_non_finite_loss(self, f"update {position.step + 1} (stage {stage})", lr, details):
            result = self.engine.update(parts, lr)
        names = [f"term_{term.name}" for term in self.plan.terms]
        return {
            "loss": result.loss,
            **(dict(zip(names, result.terms, strict=True)) if len(names) > 1 else {}),
            "grad_norm": result.grad_norm,
            "lr": lr,
            "targets": result.denominators[0],
            "tokens": int(view.lengths[:, batch].sum()),
            "seconds": time.perf_counter() - begin,
            "memory": peak_memory(self.engine.device),
        }

    def progress(self, row: dict[str, Any]) -> str:
        return f"stage {row['stage']}, loss {row['loss']:.3f}"

    def validation_due(self) -> bool:
        every, position = self.config.validate_every, self.schedule.at(self.step - 1)
        return position.ends_stage or (self.step % every == 0 if every else position.ends_epoch)

    def validate(self, track: Tracking, stop: StopRequest) -> str:
        """Loss and generated answers on the validation data, in the form of the current stage."""
        world, size, position = self.world, self.config.eval_batch_size, self.schedule.at(self.step - 1)
        view = answers_view(self.valid, self.plan, position.stage, self.lm)
        order = np.argsort(view.longest, kind="stable")
        loss_sum, num_targets = 0.0, 0
        try:
            with self.engine.full_module() as module, torch.no_grad(), self.engine.autocast():
                lm = module.lm.eval()
                lm.reasoning = self.lm.reasoning
                for batch in micro_batches(view, order, size, world.rank, world.size):
                    world.set_activity(f"in the validation after update {self.step}")
                    loss_sum += summed_loss(lm, batch.to(self.engine.device)).item()
                    num_targets += sum(batch.denominators)
                    if stop:
                        break
                result, predictions, thoughts = evaluate(
                    lm, self.task, self.valid_examples, batch_size=size, world=world, stop_requested=stop
                )
                statistics = self._thought_statistics(lm, thoughts, predictions)
                gradients = self._thought_gradients(lm, view)
        finally:
            self.lm.train()
        loss = world.all_reduce_sum(loss_sum) / max(world.all_reduce_sum(num_targets), 1)
        if position.in_last_stage:
            score = position.stage.checkpoint_score
            if not self.best or score(result.accuracy, loss) > score(self.best["accuracy"], self.best["loss"]):
                self.best = {"step": self.step, "accuracy": result.accuracy, "loss": loss}
        track.samples(self.step, [asdict(prediction) for prediction in predictions[:5]])
        track.log(
            "valid",
            self.step,
            stage=position.stage.index,
            epoch=position.epoch,
            loss=loss,
            accuracy=result.accuracy,
            chain_match=result.chain_match,
            new_tokens=result.mean_new_tokens,
            truncated=result.truncated,
            **{f"thought_{name}": value for name, value in (statistics | gradients).items()},
        )
        return f"valid loss {loss:.3f}  accuracy {100 * result.accuracy:5.1f} %"

    def _thought_statistics(
        self, lm: LatentLM, thoughts: torch.Tensor, predictions: Sequence[Prediction]
    ) -> dict[str, Any]:
        """Statistics of the thoughts in a validation, and their drift since the last one.

        Warns of a collapse that the last validation did not have.
        """
        if not thoughts.shape[1]:
            self.thoughts = None
            return {}
        table: Any = lm.base.get_input_embeddings()
        counts = torch.tensor([prediction.num_thoughts for prediction in predictions])
        statistics = measure_thoughts(thoughts, table.weight, counts)
        collapse = statistics.collapse()
        for problem in collapse:
            if problem not in self.collapse:
                log(f"warning: the thoughts of the validation questions {problem} ({statistics.describe()})")
        self.collapse = collapse
        before, self.thoughts = self.thoughts, SeenThoughts.of(lm.reasoning.stage, thoughts, counts)
        return {**statistics.as_dict(), "drift": self.thoughts.drift_since(before)}

    def _thought_gradients(self, lm: LatentLM, view: EpochView) -> dict[str, Any]:
        """The gradients at the thoughts of some validation questions, the same in each validation of a stage."""
        thinking = np.flatnonzero(view.passes > 1)
        chosen = thinking[spread_indices(len(thinking), GRADIENT_QUESTIONS).numpy()].tolist()
        own = chosen[self.world.rank :: self.world.size]
        norms = gradient_norms(lm, [view.layouts(i)[0] for i in own], self.micro_batch_size)
        parts = self.world.all_gather_object(dict(zip(own, norms, strict=True)))
        found = {i: norms_K for part in parts for i, norms_K in part.items()}
        return attenuation([found[i] for i in chosen]) if chosen else {}

    def reasoning_in(self, stage: Stage) -> Reasoning:
        """How the model is asked in a stage."""
        mixed = self.plan.mixing_forms if self.plan.mixing_probability else ()
        forms = [*stage.forms_at_inference, *mixed]
        limit = self.config.max_new_tokens or limit_for([self.train, self.valid], forms, self.task.max_new_tokens)
        reasoning = replace(Reasoning.at(self.plan, stage, limit), format=self.config.data.format)
        if reasoning.slot.merges and not reasoning.num_thoughts:
            reasoning = replace(reasoning, num_thoughts=int(merged_lengths(self.train, reasoning.slot.group).max()))
        return reasoning

    def resume(self) -> None:
        self.training_state.resume(self.engine)

    def save(self) -> None:
        self.world.set_activity(f"saving update {self.step}")
        state = {"best": self.best, "pending": self.pending}
        thoughts = {"thoughts": self.thoughts.state_dict()} if self.thoughts else {}
        self.training_state.save(self.step, self.engine, self.lm.reasoning, state, tensors=thoughts)

    def finish(self, track: Tracking) -> str:
        """Write RUN/report.html if there is a tracker to send it to."""
        if track.tracker_process:
            command = [sys.executable, "-P", "-m", "coconut.analyze", f"run={self.folder}", "parts=[]"]
            made = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=False)
            if made.returncode:
                log(f"warning: the report for the tracker could not be made: {made.stderr.strip()}")
            else:
                track.artifact(self.folder / "report.html", "report")
        return f"update {self.best['step']}, {100 * self.best['accuracy']:.1f} %" if self.best else ""

    def describe(self, session: dict[str, Any]) -> None:
        init = self.config.init
        about = {
            "name": self.config.name,
            "plan": self.plan.as_dict(),
            "updates": self.num_steps,
            "updates_per_epoch": self.schedule.updates_per_epoch,
            "parameters": self.num_parameters,
            "training_only_parameters": self.num_training_only,
            "new_tokens": self.lm.new_tokens,
            "data": {split: used_file(self.files[split], len(rows)) for split, rows in self.questions.items()},
            "model_type": self.lm.base.config.model_type,
            "init": str(starting_point(init).resolve()) if init and not self.step else None,
        }
        write_description(self.folder, self.config, about, session, self.questions)


def run(config: TrainConfig, world: World | None = None) -> int:
    """Train a run, or resume it, on the configured processes or as one of `world`. Returns the exit status."""
    return launch_training(config, Trainer, "coconut.train", world)
