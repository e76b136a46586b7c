"""Training: for each stage, for each update: update, log, validate if due, save if due."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coconut.config import TooLong, TrainConfig
from coconut.data.batching import Batch, epoch_batches, micro_batches
from coconut.data.examples import Example, read_examples
from coconut.data.sequences import EpochView, fit_context, forms_of
from coconut.data.tokenization import TokenizedData, tokenize, unknown_words
from coconut.engine.base import Engine, NonFiniteUpdate, peak_memory
from coconut.engine.factory import make_engine
from coconut.engine.world import World
from coconut.evaluation.evaluator import EvaluationInterrupted, Prediction, evaluate
from coconut.evaluation.gold_answers import limit_for, readable, warn_of_limit
from coconut.methods import Reasoning, Stage, plan
from coconut.models.latent_lm import LatentLM
from coconut.runs.description import DESCRIPTION
from coconut.runs.folder import open_run_folder, used_file, write_description
from coconut.runs.loading import starting_point
from coconut.runs.state import TrainingState, stopped
from coconut.runs.tracking import Tracking, open_tracking
from coconut.tasks import TASKS
from coconut.training.launch import check_divisible, launch_training, runtime_info
from coconut.training.loop import NonFiniteLossError
from coconut.training.model_setup import apply_engine_options, make_model
from coconut.training.schedule import Schedule, StepPosition, updates_since_reset
from coconut.training.signals import StopRequest, handle_stop_signals
from coconut.training.thought_statistics import measure_thoughts
from coconut.utils.console import duration, log, progress_bar
from coconut.utils.files import read_json, write_json
from coconut.utils.hydra_app import own_environment


def summed_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    return module(batch.input_ids, batch.attention_mask, labels=batch.labels, min_passes=batch.passes).loss_sum


class Trainer:
    """One run, as one of its processes sees it: model, data, engine and folder."""

    def __init__(self, config: TrainConfig, folder: Path, files: dict[str, str], world: World):
        self.config, self.folder, self.files, self.world = config, folder, files, world
        self.task = TASKS[config.data.required_task()]
        self.plan = plan(config.method, config.curriculum)
        self.training_state = TrainingState(config, folder, world, {"pending": False})
        found = self.training_state.resume_from

        torch.manual_seed(config.seed)
        examples = {split: read_examples(self.files[split]) for split in ("train", "valid")}
        if shared := len({e.question for e in examples["train"]} & {e.question for e in examples["valid"]}):
            log(f"warning: {shared:,} questions of the validation data are in the training data too.")
        self.lm = (
            LatentLM.from_pretrained(found, config.model.attention) if found else make_model(config, examples["train"])
        )
        self.training_state.restore(self.lm)
        self.lm.train()
        apply_engine_options(self.lm, config.engine)
        self.num_parameters = sum(weight.numel() for weight in self.lm.parameters())
        with world.main_process_first():  # which then find the tokens in the cache
            self.train, used = self._prepare("train", examples["train"])
            self.valid, kept = self._prepare("valid", examples["valid"][: config.valid_limit])
        if any(stage.modes for stage in self.plan.stages):
            self._refuse_without_pairs(self.train, "train")
        self.valid_examples = [examples["valid"][i] for i in kept]
        self.questions = {
            "train": [examples["train"][i].question for i in used],
            "valid": [example.question for example in self.valid_examples],
        }
        self.schedule = Schedule(self.plan, -(-len(self.train) // config.batch_size))
        if world.rank:
            torch.manual_seed(config.seed + world.rank)  # the model is the same everywhere, what dropout drops is not
        self.engine: Engine = make_engine(self.lm, summed_loss, config.engine, config.optimizer, world)

        state = self.training_state.state
        self.step, self.best = state["step"], state["best"]
        self.pending = state["pending"]  # a validation that is due, and was left for being asked to stop
        self.recent: deque[dict[str, float]] = deque(maxlen=5)
        self.collapse: list[str] = []  # what was last found wrong with the thoughts

    def _prepare(self, split: str, examples: list[Example]) -> tuple[TokenizedData, np.ndarray]:
        config = self.config.data
        data = tokenize(examples, self.lm.tokenizer, config.format, config.cache_dir)
        if unknown := unknown_words(data, self.lm.tokenizer):
            log(f"warning: {unknown:,} words of {self.files[split]} are not in the tokenizer's vocabulary.")
        skip = config.too_long is TooLong.skip
        fitting, kept = fit_context(self._all_views, data, self.lm.max_sequence_length, skip, self.files[split])
        if len(kept) < len(data):
            log(f"Left out {len(data) - len(kept)} of {len(data)} {split} examples, longer than the model's context.")
        rows = [examples[i] for i in kept]
        right = readable(
            rows, fitting, self.lm.tokenizer, self.task, config.format,
            file=self.files[split], unreadable=config.unreadable,
        )  # fmt: skip
        return (fitting, kept) if len(right) == len(kept) else (fitting.select(right), kept[right])

    def _refuse_without_pairs(self, data: TokenizedData, split: str) -> None:
        """An answer at once and one with its chain are the same thing where there is no chain."""
        if without := np.flatnonzero(data.num_steps == 0).tolist():
            raise ValueError(
                f"{self.files[split]}: {len(without)} of {len(data)} examples have no steps, the first of them example "
                f"{without[0] + 1}. {self.config.method} shows each example with a short answer and a long one, so "
                "that it needs a chain for each. Leave these examples out."
            )

    def _all_views(self, data: TokenizedData) -> list[EpochView]:
        return [self._plain_view(data, form) for form in forms_of(self.plan)]

    def _plain_view(self, data: TokenizedData, stage: Stage) -> EpochView:
        """The data as the stage has it, nothing mixed in."""
        return EpochView(data, replace(self.plan, mixing_probability=0.0), stage, self.lm.special, seed=0, epoch=0)

    @property
    def micro_batch_size(self) -> int:
        share = self.config.batch_size // self.world.size
        return min(self.config.micro_batch_size or share, share)

    def dry_run(self) -> None:
        """Run the largest micro-batch of the form with the most passes, and of the one with the longest rows."""
        world, size = self.world, self.micro_batch_size
        views = self._all_views(self.train)
        widest = max(range(len(views)), key=lambda k: views[k].lengths.max())
        deepest = max(range(len(views)), key=lambda k: (views[k].passes.max(), k))
        for k in {widest, deepest}:
            longest = np.argsort(-views[k].lengths, kind="stable")[: size * world.size]
            for batch in micro_batches(views[k], longest, size, world.rank, world.size):
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

    def run(self) -> int:
        """Train from where the run stands to its end, or until asked to stop. Gives the exit status."""
        config, schedule = self.config, self.schedule
        started, first = time.monotonic(), self.step
        view, batches = None, []
        with (
            handle_stop_signals(self.world) as asked,
            self._tracking() as track,
            progress_bar("training", schedule.total, self.step) as bar,
        ):
            if self.pending:
                self.validate(schedule.at(self.step - 1), track, asked)
                self.save()
                if number := asked.anywhere():
                    return stopped(number, f"update {self.step}")
            for step in range(self.step, schedule.total):
                place = schedule.at(step)
                if updates_since_reset(place, config.optimizer.reset_every) == 0:
                    self.engine.reset_optimizer()
                if place.stage_step == 0 or step == first:
                    self.lm.reasoning = self._reasoning(place.stage)
                    log(f"Stage {place.stage.index}: {place.stage.describe()}")
                if place.batch == 0 or view is None:
                    view = EpochView(self.train, self.plan, place.stage, self.lm.special, config.seed, place.epoch)
                    batches = epoch_batches(view, config.batch_size, config.seed, place.epoch)

                row = self.update(place, view, batches[place.batch])
                track.log("train", step + 1, stage=place.stage.index, epoch=place.epoch, **row)
                bar(step + 1, f"stage {place.stage.index}, loss {row['loss']:.3f}")
                self.step = step + 1

                due = self.pending = self._validation_due(place)
                if due and not asked.anywhere():
                    self.validate(place, track, asked)
                    self._report(place, time.monotonic() - started, first)
                number = asked.anywhere()
                if due or number or any(n and self.step % n == 0 for n in (config.save_every, config.keep_every)):
                    self.save()
                if number:
                    return stopped(number, f"update {self.step}")
            if track.tracker_process:
                self._write_page(track)
        log(f"Done: {schedule.total:,} updates in {self.folder}")
        if self.best:
            log(f"Best checkpoint: update {self.best['step']}, {100 * self.best['accuracy']:.1f} % on validation data")
        log(f"Next: python -m coconut.evaluate run={self.folder}")
        return 0

    def update(self, place: StepPosition, view: EpochView, batch: np.ndarray) -> dict[str, float]:
        config, world = self.config, self.world
        world.set_activity(f"in update {place.step + 1}")
        begin = time.perf_counter()
        parts = list(micro_batches(view, batch, self.micro_batch_size, world.rank, world.size))
        since = updates_since_reset(place, config.optimizer.reset_every)
        lr = config.optimizer.learning_rate(since, place.stage.index)
        try:
            done = self.engine.update(parts, lr)
        except NonFiniteUpdate as error:
            raise NonFiniteLossError(self._diagnosis(place, error, batch, lr)) from error
        row = {"loss": done.loss, "grad_norm": done.grad_norm, "lr": lr, "targets": done.num_targets}
        self.recent.append({"step": place.step + 1, **row})
        return {
            **row,
            "tokens": int(view.lengths[batch].sum()),
            "seconds": time.perf_counter() - begin,
            "memory": peak_memory(self.engine.device),
        }

    def _validation_due(self, place: StepPosition) -> bool:
        every = self.config.validate_every
        return place.ends_stage or (self.step % every == 0 if every else place.ends_epoch)

    def validate(self, place: StepPosition, track: Tracking, asked: StopRequest) -> None:
        """Loss and accuracy by generation on validation data, as the stage has it; keeps the best.

        When asked to stop it is left, and stays pending.
        """
        world, size = self.world, self.config.eval_batch_size
        view = self._plain_view(self.valid, place.stage)
        order = np.argsort(view.lengths, kind="stable")
        loss_sum, targets = 0.0, 0
        try:
            with self.engine.full_module() as lm, torch.no_grad(), self.engine.autocast():
                lm.eval()
                lm.reasoning = self.lm.reasoning
                for batch in micro_batches(view, order, size, world.rank, world.size):
                    world.set_activity(f"in the validation after update {self.step}")
                    loss_sum += summed_loss(lm, batch.to(self.engine.device)).item()
                    targets += batch.num_targets
                    if asked:
                        break
                result, predictions, thoughts = evaluate(
                    lm, self.task, self.valid_examples, batch_size=size, world=world, asked=asked
                )
                watched = self._watch(lm, thoughts, predictions) if thoughts.shape[1] else {}
        except EvaluationInterrupted:
            return
        finally:
            self.lm.train()
        loss = world.all_reduce_sum(loss_sum) / max(world.all_reduce_sum(targets), 1)
        if place.in_last_stage:
            rank = place.stage.checkpoint_score
            if not self.best or rank(result.accuracy, loss) > rank(self.best["accuracy"], self.best["loss"]):
                self.best = {"step": self.step, "accuracy": result.accuracy, "loss": loss}
        track.samples(self.step, [asdict(prediction) for prediction in predictions[:5]])
        self.validated = {
            "loss": loss,
            "accuracy": result.accuracy,
            "chain_match": result.chain_match,
            "new_tokens": result.mean_new_tokens,
            "truncated": result.truncated,
            **watched,
        }
        track.log("valid", self.step, stage=place.stage.index, epoch=place.epoch, **self.validated)
        self.pending = False

    def _watch(self, lm: LatentLM, thoughts: torch.Tensor, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """What the thoughts of the validation questions look like; warns when they collapse, once in a row."""
        table: Any = lm.base.get_input_embeddings()
        found = measure_thoughts(thoughts, table.weight, torch.tensor([said.num_thoughts for said in predictions]))
        collapse = found.collapse()
        for problem in collapse:
            if problem not in self.collapse:
                log(f"warning: the thoughts of the validation questions {problem} ({found.describe()})")
        self.collapse = collapse
        return {f"thought_{name}": value for name, value in found.as_dict().items()}

    def save(self) -> None:
        self.world.set_activity(f"saving update {self.step}")
        state = {"best": self.best, "pending": self.pending}
        self.training_state.save(self.step, self.engine, self.lm.reasoning, state)

    def _tracking(self) -> Tracking:
        described = read_json(self.folder / DESCRIPTION) if self.world.is_main else {}
        about = {"config": asdict(self.config), **described}
        return open_tracking(self.config.tracking, self.folder, self.step, about, writes=self.world.is_main)

    def _reasoning(self, stage: Stage) -> Reasoning:
        forms = [stage, *(self.plan.depths if self.plan.mixing_probability else ())]
        limit = self.config.max_new_tokens or limit_for([self.train, self.valid], forms, self.task.max_new_tokens)
        return replace(Reasoning.at(self.plan, stage, limit), format=self.config.data.format)

    def _write_page(self, track: Tracking) -> None:
        """RUN/report.html for the tracker, made by the command that makes it for people."""
        command = [sys.executable, "-P", "-m", "coconut.analyze", f"run={self.folder}", "parts=[]"]
        made = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=False)
        if made.returncode:
            log(f"warning: the report for the tracker could not be made: {made.stderr.strip()}")
        else:
            track.artifact(self.folder / "report.html", "report")

    def _report(self, place: StepPosition, seconds: float, first: int) -> None:
        if self.pending:
            return
        left = seconds / (self.step - first) * (self.schedule.total - self.step)
        loss, found = self.recent[-1]["loss"], self.validated
        log(
            f"  update {self.step:>6,} of {self.schedule.total:,}  stage {place.stage.index}  loss {loss:.3f}  "
            f"valid loss {found['loss']:.3f}  accuracy {100 * found['accuracy']:5.1f} %  "
            f"{duration(seconds)} so far, about {duration(left)} left"
        )

    def _diagnosis(self, place: StepPosition, error: NonFiniteUpdate, batch: np.ndarray, lr: float) -> str:
        found = {
            "step": place.step + 1, "stage": place.stage.index, "epoch": place.epoch, "lr": lr,
            "loss": str(error.loss), "grad_norm": str(error.grad_norm), "not_finite": error.non_finite_names,
            "examples": [int(i) for i in batch], "before": list(self.recent),
        }  # fmt: skip
        if self.world.is_main:
            write_json(self.folder / "diverged.json", found)
        saved = self.training_state.checkpoints.steps()
        before = "; ".join(f"{r['loss']:.3g} ({r['grad_norm']:.3g})" for r in self.recent) or "none"
        unnamed = "a gradient" if math.isfinite(error.loss) else "the loss"
        first = (
            f"{error.non_finite_names[0]} ({len(error.non_finite_names)} in all)" if error.non_finite_names else unnamed
        )
        return (
            f"The loss of update {place.step + 1} (stage {place.stage.index}) is {error.loss}, its gradient norm "
            f"{error.grad_norm}. It was not applied"
            + (f", and the checkpoint of update {saved[-1]} is whole.\n" if saved else ".\n")
            + f"  not finite in: {first}\n"
            f"  losses before, with gradient norms: {before}\n"
            f"  learning rate {lr:g}, clipping {self.config.optimizer.max_grad_norm or 'off'}, "
            f"{self.config.engine.precision.value}\n"
            "A norm that grew before points to the learning rate: lower optimizer.lr, or set "
            "optimizer.max_grad_norm=1 and "
            "optimizer.warmup_steps=100. One that did not points to the data: the examples of this update are "
            "listed in "
            f"{self.folder / 'diverged.json'}."
        )


def describe_run(config: TrainConfig, folder: Path, training: Trainer) -> None:
    """What exactly is trained, on what, with which code, where: config.json and run.json."""
    write_description(
        folder,
        config,
        {
            "name": config.name,
            "plan": training.plan.as_dict(),
            "updates": training.schedule.total,
            "updates_per_epoch": training.schedule.updates_per_epoch,
            "parameters": training.num_parameters,
            "new_tokens": training.lm.new_tokens,
            "data": {
                split: used_file(training.files[split], len(used))
                for split, used in [("train", training.train), ("valid", training.valid)]
            },
            "model_type": training.lm.base.config.model_type,
            "init": str(starting_point(config.init).resolve()) if config.init and not training.step else None,
        },
        {**runtime_info(config, training.world), "from_update": training.step},
        training.questions,
    )


def run(config: TrainConfig) -> int:
    """Train one run, or go on with it, on as many processes as asked for."""
    return launch_training(config, "batch_size", "coconut.train", lambda world: run_rank(config, world))


def run_rank(config: TrainConfig, world: World) -> int:
    """What each process of a run does."""
    check_divisible(config.batch_size, world.size)
    with open_run_folder(config, world) as (folder, files):
        return train(config, folder, files, world)


def train(config: TrainConfig, folder: Path, files: dict[str, str], world: World) -> int:
    """The run of this configuration on these files, in a folder that is its own."""
    training = Trainer(config, folder, files, world)
    if training.step == training.schedule.total and not training.pending:
        log(f"This run is complete: {training.step:,} updates. Next: python -m coconut.evaluate run={folder}")
        return 0
    where = f"{world.size} processes, {config.engine.kind}" if world.size > 1 else str(training.engine.device)
    log(
        f"{config.method}: {len(training.train):,} training and {len(training.valid):,} validation examples, "
        f"{training.num_parameters / 1e6:.1f}M parameters, {training.schedule.total:,} updates on {where}"
    )
    unit = training.plan.unit.value
    if config.curriculum.mixing_probability and not training.plan.mixing_probability:
        log(f"note: {config.method} has no slot that tells stages apart, so curriculum.mixing_probability is not used")
    for stage in training.plan.stages:
        log(f"  stage {stage.index}: {stage.length} {unit}, {stage.describe()}")
    if config.max_new_tokens:
        for split, data in (("train", training.train), ("valid", training.valid)):
            warn_of_limit(data, training.plan.stages, config.max_new_tokens, files[split])
    training.dry_run()
    training.training_state.resume(training.engine)
    world.on_main_process(lambda: describe_run(config, folder, training))
    if training.step:
        log(f"Going on from update {training.step:,}")
        now = runtime_info(config, world)
        session = read_json(folder / DESCRIPTION)["sessions"][-2] if world.is_main else now
        differing = [key for key in now if session.get(key, now[key]) != now[key]]
        if changed := [f"{key}: {session[key]} before, {now[key]} now" for key in differing]:
            log(f"note: {', '.join(changed)}. Batches are the same, losses but for the last digits; dropout is not")
    return training.run()
