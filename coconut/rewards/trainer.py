"""Train a reward model on labelled answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import Completion, passes_and_length, shard_by_length
from coconut.completions.scoring import CompletionBatch, SamplingDistribution, score_tokens
from coconut.config import TooLong
from coconut.engine.base import Engine, Loss, LossFunction, peak_memory
from coconut.engine.factory import make_engine
from coconut.engine.world import World
from coconut.evaluation.evaluator import EvaluationInterrupted
from coconut.models.latent_lm import LatentLM
from coconut.rewards.batches import (
    AnswerSet,
    RewardBatch,
    reward_batch,
    reward_loss,
    score_across_processes,
    value_loss,
)
from coconut.rewards.config import RewardModelConfig
from coconut.rewards.implicit import REFERENCE, WEIGHTS, digest_of
from coconut.rewards.labelled_answers import read_answers
from coconut.rewards.losses import get_loss
from coconut.rewards.value_model import token_values
from coconut.runs.folder import used_file, write_description
from coconut.runs.loading import match_dtypes, to_float32
from coconut.runs.state import TrainingState
from coconut.runs.tracking import Tracking
from coconut.training.divergence import explain_non_finite_loss
from coconut.training.launch import launch_training
from coconut.training.model_setup import apply_engine_options
from coconut.training.signals import StopRequest
from coconut.utils.console import log
from coconut.utils.files import atomic_file


class RewardTrainer:
    """One process's part of a run. A step is one update of the reward model. See `coconut.training.loop` for the loop.

    `training_items` (U, 1 or 2): the answers, or the pairs of a right and a wrong one, that the loss is a mean over.
    """

    unit = "update"

    def __init__(self, config: RewardModelConfig, folder: Path, files: dict[str, str], world: World):
        self.config, self.folder, self.files, self.world = config, folder, files, world
        self.loss = get_loss(config.loss)
        self.training_state = TrainingState(config, folder, world, pending=False)
        self.step, self.best, self.pending = (self.training_state.state[key] for key in ("step", "best", "pending"))

        torch.manual_seed(config.seed + world.rank)
        resumed = self.training_state.resume_from
        self.init = self.training_state.initial_weights(str(config.init))
        self.lm = self.training_state.load_model() if resumed else to_float32(LatentLM.from_pretrained(self.init))
        if self.lm.gates:
            raise ValueError(
                f"init={config.init} mixes what it expected into the words that it writes, which answers in a file do "
                "not hold. Start from a model without gates."
            )
        apply_engine_options(self.lm.eval(), config.engine)
        self.distribution = SamplingDistribution.of(self.lm.special)
        self.num_parameters = sum(weight.numel() for weight in self.lm.parameters())
        skip = config.data.too_long is TooLong.skip
        self.answers = {split: AnswerSet.of(read_answers(files[split], self.lm, skip)) for split in ("train", "valid")}
        self.training_items = self._training_items()
        self.items_per_update = max(1, config.batch_size // self.training_items.shape[1])
        self.updates_per_epoch = -(-len(self.training_items) // self.items_per_update)
        self.num_steps = config.epochs * self.updates_per_epoch
        loss = Loss(self._loss_function(), may_skip_modules=self.lm.feedback.has_weights)
        self.engine: Engine = make_engine(self.lm, loss, config.engine, config.optimizer, world)
        self.reference = self._reference()

    def _loss_function(self) -> LossFunction:
        if self.loss.is_value_model:
            return value_loss(self.loss, self.lm.special.latent)
        right = self.answers["train"].right
        wrong_per_right = float((~right).sum() / max(right.sum(), 1))
        return reward_loss(self.loss, self.distribution, self.config.beta, wrong_per_right)

    def _training_items(self) -> np.ndarray:
        answers = self.answers["train"]
        right, counts = np.bincount(answers.question, answers.right), np.bincount(answers.question)
        if one_class := int(((right == 0) | (right == counts)).sum()):
            used = "they are left out" if self.loss.pairs else "they are used all the same"
            log(f"note: to {one_class:,} of {len(counts):,} questions all answers are right, or all wrong; {used}")
        items = answers.pairs(self.config.seed) if self.loss.pairs else np.arange(len(answers.completions))[:, None]
        if not len(items):
            raise ValueError(
                f"{self.files['train']}: no question has both a right and a wrong answer, which "
                f"loss={self.config.loss} compares. Sample more answers, or take loss=ce."
            )
        return items

    def _reference(self) -> dict[str, Any]:
        """The reference's log-probability of each answer, (N,) for each split, and the digest of its weights.

        It is computed once for a run. Zeros for a value model, which has no reference.
        """
        if self.training_state.resume_from:
            return torch.load(self.folder / REFERENCE, weights_only=True)
        digest = {WEIGHTS: self.world.on_main_process(lambda: digest_of(self.init))}
        if self.loss.is_value_model:
            return digest | {split: torch.zeros(len(answers.completions)) for split, answers in self.answers.items()}
        lm = match_dtypes(LatentLM.from_pretrained(self.init), self.lm, self.engine.device)
        return digest | {split: self._score(lm, answers.completions) for split, answers in self.answers.items()}

    @torch.no_grad()
    def _score(self, lm: LatentLM, completions: Sequence[Completion], stop: StopRequest | None = None) -> Tensor:
        """(N,) the log-probability of each answer; of a value model, the logit of the value at its end.

        The processes share the work. Raises EvaluationInterrupted in all of them if `stop` is set in one.
        """

        def score_batch(batch: CompletionBatch) -> Tensor:
            self.world.heartbeat()
            if stop:
                return torch.zeros(len(batch.is_control))
            if self.loss.is_value_model:
                return token_values(lm, batch, lm.special.latent)
            return self.distribution.log_probs(lm, batch)

        def score_share(share: Sequence[Completion]) -> list[float]:
            of_answers = score_tokens(lm, share, self.micro_batch_size, score_batch)
            return [float(tokens_M[-1] if self.loss.is_value_model else tokens_M.sum()) for tokens_M in of_answers]

        with self.engine.autocast():
            scores_N = torch.tensor(score_across_processes(score_share, completions, self.world))
        if stop is not None and self.world.any_process(bool(stop)):
            raise EvaluationInterrupted
        return scores_N

    @property
    def next_command(self) -> str:
        return f"coconut reward compare runs={self.folder} answers=FILE"

    @property
    def micro_batch_size(self) -> int:
        share = -(-self.config.batch_size // self.world.size)
        return max(2, min(self.config.micro_batch_size or share, share))

    def log_summary(self) -> None:
        config = self.config
        count = {split: len(answers.completions) for split, answers in self.answers.items()}
        loss = config.loss if self.loss.is_value_model else f"{config.loss}, beta {config.beta:g}"
        log(f"{loss}: {count['train']:,} training and {count['valid']:,} validation answers")
        log(f"{self.num_parameters / 1e6:.1f}M parameters, {self.num_steps:,} updates on {self.engine.device}")

    def dry_run(self) -> None:
        """Run a micro-batch of the longest answers."""
        completions, width = self.answers["train"].completions, self.training_items.shape[1]
        by_length = sorted(range(len(completions)), key=lambda i: -len(completions[i].layout.ids))
        longest = by_length[: min(self.micro_batch_size, len(by_length)) // width * width]
        passes, _ = passes_and_length(completions)
        self.engine.dry_run(self._micro_batch(np.array(longest).reshape(-1, width), passes, torch.zeros(())))

    def train_step(self) -> dict[str, Any]:
        """One update."""
        world, config, step = self.world, self.config, self.step
        world.set_activity(f"in update {step + 1}")
        begin = time.perf_counter()
        epoch, index = divmod(step, self.updates_per_epoch)
        order = np.random.default_rng((config.seed, epoch)).permutation(len(self.training_items))
        items = self.training_items[order[index * self.items_per_update : (index + 1) * self.items_per_update]]
        completions = self.answers["train"].completions
        needed = [passes_and_length([completions[i] for i in item]) for item in items]
        size = max(1, self.micro_batch_size // items.shape[1])
        reference_point = self._reference_point(items)
        parts = [
            self._micro_batch(items[places] if places != [-1] else items[:0], passes, reference_point)
            for places, passes in shard_by_length(needed, size, world.rank, world.size)
        ]
        lr = config.optimizer.learning_rate(step)
        with explain_non_finite_loss(self, f"update {step + 1}", lr, {"examples": items.flatten().tolist()}):
            result = self.engine.update(parts, lr)
        return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "items": len(items),
                "seconds": time.perf_counter() - begin, "memory": peak_memory(self.engine.device)}  # fmt: skip

    def _reference_point(self, items: np.ndarray) -> Tensor:
        """For a loss that needs it: the mean reward of the update's answers before it, at least 0."""
        if not self.loss.uses_reference_point:
            return torch.zeros(())
        chosen = items.flatten()
        completions = [self.answers["train"].completions[i] for i in chosen]
        with self.engine.full_module() as lm:
            scores_N = self._score(lm, completions)
        return self.config.beta * (scores_N - self.reference["train"][chosen]).mean().clamp(min=0)

    def _micro_batch(self, items: np.ndarray, passes: int, reference_point: Tensor) -> RewardBatch:
        """A micro-batch of these items; of none, a row without targets."""
        answers, chosen = self.answers["train"], items.flatten()
        return reward_batch(
            [answers.completions[i] for i in chosen] or [answers.completions[0].without_targets()],
            self.reference["train"][chosen],
            torch.from_numpy(answers.right[chosen]),
            self.lm.special, passes, reference_point=reference_point, num_items=len(items),
        )  # fmt: skip

    def progress(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.3f}"

    def validation_due(self) -> bool:
        every = self.config.validate_every or self.updates_per_epoch
        return self.step % every == 0 or self.step == self.num_steps

    def validate(self, track: Tracking, stop: StopRequest) -> str:
        """How well rewards tell right from wrong validation answers. The best checkpoint orders most pairs rightly."""
        answers = self.answers["valid"]
        self.world.set_activity(f"in the validation after update {self.step}")
        with self.engine.full_module() as lm:
            scores_N = self._score(lm, answers.completions, stop)
        scale = 1.0 if self.loss.is_value_model else self.config.beta
        rewards_N = scale * (scores_N - self.reference["valid"]).numpy()
        row = answers.preference_metrics(rewards_N)
        for name, chosen_N in (("right", answers.right), ("wrong", ~answers.right)):
            row[f"reward_{name}"] = float(rewards_N[chosen_N].mean()) if chosen_N.any() else 0.0
        if not self.best or row["pairs"] > self.best["pairs"]:
            self.best = {"step": self.step, "pairs": row["pairs"]}
        track.log("valid", self.step, **row)
        return (
            f"right above wrong in {100 * row['pairs']:5.1f} % of pairs  best of n {100 * row['best_of_n']:5.1f} % "
            f"(any answer {100 * row['mean']:.1f} %)"
        )

    def resume(self) -> None:
        self.training_state.resume(self.engine)

    def save(self) -> None:
        self.world.set_activity(f"saving update {self.step}")
        state = {"best": self.best, "pending": self.pending}
        self.training_state.save(self.step, self.engine, self.lm.reasoning, state)

    def finish(self, track: Tracking) -> str:
        return f"update {self.best['step']}, {100 * self.best['pairs']:.1f} % of pairs"

    def describe(self, session: dict[str, Any]) -> None:
        about = {
            "name": self.config.name, "trained": "reward model", "updates": self.num_steps,
            "parameters": self.num_parameters,
            "data": {split: used_file(self.files[split], len(its.completions)) for split, its in self.answers.items()},
            "model_type": self.lm.base.config.model_type, "init": str(self.init),
        }  # fmt: skip
        write_description(self.folder, self.config, about, session)
        with atomic_file(self.folder / REFERENCE) as part, part.open("wb") as file:
            torch.save(self.reference, file)


def run(config: RewardModelConfig, world: World | None = None) -> int:
    """Train a reward model, or resume its run. See coconut.training.trainer.run."""
    return launch_training(config, RewardTrainer, "coconut.reward", world)
