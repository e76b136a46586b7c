"""Training a reward model on labelled answers: for each update: update, log, validate if due, save if due."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import Completion, needs, shard_by_length
from coconut.completions.scoring import SamplingDistribution
from coconut.config import TooLong
from coconut.engine.base import Engine, NonFiniteUpdate, peak_memory
from coconut.engine.factory import make_engine
from coconut.engine.world import World
from coconut.models.latent_lm import LatentLM
from coconut.rewards.batches import (
    AnswerSet,
    RewardBatch,
    preference,
    reward_batch,
    reward_loss,
    scored_together,
    value_loss,
)
from coconut.rewards.config import RewardModelConfig
from coconut.rewards.implicit import REFERENCE, WEIGHTS, digest_of
from coconut.rewards.labelled_answers import read_answers
from coconut.rewards.losses import get_loss
from coconut.rewards.value_model import ValueModel
from coconut.runs.description import DESCRIPTION
from coconut.runs.folder import open_run_folder, used_file, write_description
from coconut.runs.loading import match_dtypes, resolve_weights, to_float32
from coconut.runs.state import TrainingState, stopped
from coconut.runs.tracking import Tracking, open_tracking
from coconut.training.launch import check_divisible, launch_training, runtime_info
from coconut.training.loop import NonFiniteLossError
from coconut.training.model_setup import apply_engine_options
from coconut.training.signals import handle_stop_signals
from coconut.utils.console import duration, log, progress_bar
from coconut.utils.files import atomic_file, read_json


class RewardTrainer:
    """One run, as one of its processes sees it: reward model, reference, answers, engine and folder."""

    def __init__(self, config: RewardModelConfig, folder: Path, files: dict[str, str], world: World):
        self.config, self.folder, self.files, self.world = config, folder, files, world
        self.loss = get_loss(config.loss)
        self.training_state = TrainingState(config, folder, world, {})
        torch.manual_seed(config.seed + world.rank)
        self.init = world.on_main_process(self._init)  # the weights that it began with
        self.lm = LatentLM.from_pretrained(self.training_state.resume_from or self.init).eval()
        if not self.training_state.resume_from:
            to_float32(self.lm)
        self.policy = SamplingDistribution.of(self.lm.special)
        self.num_parameters = sum(weight.numel() for weight in self.lm.parameters())
        skip = config.data.too_long is TooLong.skip
        self.answers = {split: AnswerSet.of(read_answers(files[split], self.lm, skip)) for split in ("train", "valid")}
        self.training_items = self._training_items()
        self.training_state.restore(self.lm)
        apply_engine_options(self.lm, config.engine)
        self.engine: Engine = make_engine(self.lm, self._loss(), config.engine, config.optimizer, world)
        self.reference = self._reference()
        self.step, self.best = self.training_state.state["step"], self.training_state.state["best"]

    def _init(self) -> Path:
        if self.training_state.resume_from:
            return Path(read_json(self.folder / DESCRIPTION)["init"])
        return resolve_weights(str(self.config.init))

    def _loss(self) -> Any:
        if self.loss.is_value_model:
            return value_loss(self.loss, self.lm.special.latent)
        right = self.answers["train"].right
        return reward_loss(self.loss, self.policy, self.config.beta, float((~right).sum() / max(right.sum(), 1)))

    def _training_items(self) -> np.ndarray:
        """(U, 1 or 2) what is drawn for an update. Says which questions have nothing to compare."""
        answers = self.answers["train"]
        right = np.bincount(answers.question, answers.right)
        counts = np.bincount(answers.question)
        one_class = int(((right == 0) | (right == counts)).sum())
        if one_class:
            used = "they are left out" if self.loss.pairs else "they are used all the same"
            log(f"note: to {one_class:,} of {len(counts):,} questions all answers are right, or all wrong; {used}")
        units = answers.pairs(self.config.seed) if self.loss.pairs else np.arange(len(answers.completions))[:, None]
        if not len(units):
            raise ValueError(
                f"{self.files['train']}: no question has both a right and a wrong answer, which "
                f"loss={self.config.loss} compares. Sample more answers, or take loss=ce."
            )
        return units

    def _reference(self) -> dict[str, Any]:
        """(N,) of each split: log-probabilities of the whole answers. Computed once, and kept in the run's folder.

        Zeros for a model of values, which is compared with none. And what identifies the reference's weights.
        """
        if self.training_state.resume_from:
            return torch.load(self.folder / REFERENCE, weights_only=True)
        found: dict[str, Any] = {WEIGHTS: self.world.on_main_process(lambda: digest_of(self.init))}
        if self.loss.is_value_model:
            return found | {split: torch.zeros(len(answers.completions)) for split, answers in self.answers.items()}
        lm = match_dtypes(LatentLM.from_pretrained(self.init), self.lm, self.engine.device)
        return found | {split: self._whole(lm, answers.completions) for split, answers in self.answers.items()}

    def _whole(self, lm: LatentLM, samples: Sequence[Completion]) -> Tensor:
        """(N,) what a whole model says of each answer: how likely it is, or of its value, in logits, at its end.

        The processes share the work.
        """
        size = self.micro_batch_size

        def said(share: Sequence[Completion]) -> list[float]:
            if self.loss.is_value_model:
                return [float(row[-1]) for row in ValueModel(lm).before(share, size)]
            return [float(row.sum()) for row in self.policy.score(lm, share, size)]

        with self.engine.autocast():
            return torch.tensor(scored_together(said, samples, self.world))

    def keep_reference(self) -> None:
        with atomic_file(self.folder / REFERENCE) as part, part.open("wb") as file:
            torch.save(self.reference, file)

    @property
    def items_per_update(self) -> int:
        return max(1, self.config.batch_size // self.training_items.shape[1])

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.training_items) // self.items_per_update)

    @property
    def total(self) -> int:
        return self.config.epochs * self.updates_per_epoch

    @property
    def micro_batch_size(self) -> int:
        share = -(-self.config.batch_size // self.world.size)
        return max(2, min(self.config.micro_batch_size or share, share))

    def dry_run(self) -> None:
        """Run a micro-batch of the longest answers."""
        answers = self.answers["train"].completions
        longest = sorted(range(len(answers)), key=lambda i: -len(answers[i].layout.ids))[: self.micro_batch_size]
        longest = longest[: len(longest) - len(longest) % self.training_items.shape[1]]
        passes, _ = needs(answers)
        self.engine.dry_run(
            self._batch(np.array(longest).reshape(-1, self.training_items.shape[1]), passes, torch.zeros(()))
        )

    def run(self) -> int:
        """Train from where the run stands to its end, or until asked to stop. Gives the exit status."""
        config, total = self.config, self.total
        started, first = time.monotonic(), self.step
        with (
            handle_stop_signals(self.world) as asked,
            self._tracking() as track,
            progress_bar("training", total, self.step) as bar,
        ):
            for step in range(self.step, total):
                if number := asked.anywhere():
                    return stopped(number, f"update {self.step}")
                row = self.update(step)
                track.log("train", step + 1, **row)
                bar(step + 1, f"loss {row['loss']:.3f}")
                self.step = step + 1
                every = config.validate_every or self.updates_per_epoch
                due = self.step % every == 0 or self.step == total
                if due:
                    self.validate(track)
                    self._report(time.monotonic() - started, first)
                number = asked.anywhere()
                if due or number or any(n and self.step % n == 0 for n in (config.save_every, config.keep_every)):
                    self.save()
            if number := asked.anywhere():
                return stopped(number, f"update {self.step}")
        log(f"Done: {total:,} updates in {self.folder}")
        log(
            f"Best checkpoint: update {self.best['step']}, {100 * self.best['pairs']:.1f} % of pairs on validation data"
        )
        return 0

    def update(self, step: int) -> dict[str, float]:
        """One update: the mean of the loss over its answers, or pairs."""
        world, config = self.world, self.config
        world.set_activity(f"in update {step + 1}")
        begin = time.perf_counter()
        epoch, place = divmod(step, self.updates_per_epoch)
        order = np.random.default_rng((config.seed, epoch)).permutation(len(self.training_items))
        units = self.training_items[order[place * self.items_per_update : (place + 1) * self.items_per_update]]
        answers = self.answers["train"].completions
        needed = [needs([answers[i] for i in unit]) for unit in units]
        size = max(1, self.micro_batch_size // units.shape[1])
        zero = self._reference_point(units)
        parts = [
            self._batch(units[places] if places != [-1] else units[:0], passes, zero)
            for places, passes in shard_by_length(needed, size, world.rank, world.size)
        ]
        lr = config.optimizer.learning_rate(step)
        try:
            done = self.engine.update(parts, lr)
        except NonFiniteUpdate as error:
            raise NonFiniteLossError(
                f"The loss of update {step + 1} is {error.loss}, its gradient norm {error.grad_norm}. It was not "
                "applied. Lower optimizer.lr or beta, or set optimizer.max_grad_norm=1."
            ) from error
        return {"loss": done.loss, "grad_norm": done.grad_norm, "lr": lr, "items": len(units),
                "seconds": time.perf_counter() - begin, "memory": peak_memory(self.engine.device)}  # fmt: skip

    def _reference_point(self, units: np.ndarray) -> Tensor:
        """For a loss that needs it: the mean reward of the update's answers before it, at least 0."""
        if not self.loss.uses_reference_point:
            return torch.zeros(())
        chosen = units.flatten()
        samples = [self.answers["train"].completions[i] for i in chosen]
        with self.engine.full_module() as lm:
            sums = self._whole(lm, samples)
        return self.config.beta * (sums - self.reference["train"][chosen]).mean().clamp(min=0)

    def _batch(self, units: np.ndarray, passes: int, zero: Tensor) -> RewardBatch:
        """Of these units; of none a row that counts for nothing."""
        answers, chosen = self.answers["train"], units.flatten()
        return reward_batch(
            [answers.completions[i] for i in chosen] or [answers.completions[0].without_targets()],
            self.reference["train"][chosen],
            torch.from_numpy(answers.right[chosen]),
            self.lm.special,
            passes,
            reference_point=zero,
            num_items=len(units),
        )

    def validate(self, track: Tracking) -> None:
        """How well it tells right from wrong on the validation answers; keeps the best by its share of pairs."""
        answers = self.answers["valid"]
        self.world.set_activity(f"in the validation after update {self.step}")
        with self.engine.full_module() as lm:
            scale = 1.0 if self.loss.is_value_model else self.config.beta
            rewards = scale * (self._whole(lm, answers.completions) - self.reference["valid"]).numpy()
        self.validated = {
            **preference(rewards, answers),
            "reward_right": float(rewards[answers.right].mean()) if answers.right.any() else 0.0,
            "reward_wrong": float(rewards[~answers.right].mean()) if not answers.right.all() else 0.0,
        }
        if not self.best or self.validated["pairs"] > self.best["pairs"]:
            self.best = {"step": self.step, "pairs": self.validated["pairs"]}
        track.log("valid", self.step, **self.validated)

    def save(self) -> None:
        self.world.set_activity(f"saving update {self.step}")
        self.training_state.save(self.step, self.engine, self.lm.reasoning, {"best": self.best})

    def _tracking(self) -> Tracking:
        about = {"config": asdict(self.config)}
        return open_tracking(self.config.tracking, self.folder, self.step, about, writes=self.world.is_main)

    def _report(self, seconds: float, first: int) -> None:
        found, left = self.validated, seconds / (self.step - first) * (self.total - self.step)
        log(
            f"  update {self.step:>6,} of {self.total:,}  right above wrong in {100 * found['pairs']:5.1f} % of pairs  "
            f"best of n {100 * found['best_of_n']:5.1f} % (any answer {100 * found['mean']:.1f} %)  "
            f"{duration(seconds)} so far, about {duration(left)} left"
        )


def run(config: RewardModelConfig) -> int:
    """Train one reward model, or go on with it, on as many processes as asked for."""
    return launch_training(config, "batch_size", "coconut.reward", lambda world: run_rank(config, world))


def run_rank(config: RewardModelConfig, world: World) -> int:
    """What each process of a run does."""
    check_divisible(config.batch_size, world.size)
    with open_run_folder(config, world) as (folder, files):
        training = RewardTrainer(config, folder, files, world)
        if training.step == training.total:
            log(f"This run is complete: {training.step:,} updates.")
            return 0
        count = {split: len(answers.completions) for split, answers in training.answers.items()}
        told = f"{count['train']:,} training and {count['valid']:,} validation answers"
        log(
            f"{config.loss}: {told}" if training.loss.is_value_model else f"{config.loss}, beta {config.beta:g}: {told}"
        )
        log(f"{training.num_parameters / 1e6:.1f}M parameters, {training.total:,} updates on {training.engine.device}")
        training.dry_run()
        training.training_state.resume(training.engine)
        world.on_main_process(lambda: describe_run(config, folder, training))
        world.on_main_process(training.keep_reference)
        if training.step:
            log(f"Going on from update {training.step:,}")
        return training.run()


def describe_run(config: RewardModelConfig, folder: Path, training: RewardTrainer) -> None:
    """What exactly is trained, on what, with which code, where: config.json and run.json."""
    about = {
        "name": config.name,
        "trained": "reward model",
        "updates": training.total,
        "parameters": training.num_parameters,
        "data": {
            split: used_file(training.files[split], len(its.completions)) for split, its in training.answers.items()
        },
        "model_type": training.lm.base.config.model_type,
        "init": str(training.init),
    }
    write_description(folder, config, about, {**runtime_info(config, training.world), "from_update": training.step})
