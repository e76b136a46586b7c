"""Reinforcement learning: in each step sample completions, reward them, and update the policy with them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import Cost, largest_completion, passes_and_length, shard_by_length
from coconut.completions.noisy_thoughts import NoisyThoughts, dispersion, refuse_noise
from coconut.completions.rollouts import (
    CorrectnessReward,
    Group,
    Reward,
    checked_reward,
    examples_that_fit,
    sample_groups,
)
from coconut.completions.scoring import SamplingDistribution
from coconut.config import TooLong
from coconut.data.examples import Example, read_examples
from coconut.data.tokenization import encode_questions
from coconut.engine.base import Engine, Loss, peak_memory
from coconut.engine.factory import make_engine
from coconut.engine.world import World
from coconut.evaluation.gold_answers import read_back, warn_of_limit
from coconut.methods import GatedWords
from coconut.models.latent_lm import LatentLM
from coconut.rl.config import GatesConfig, RLConfig
from coconut.rl.gate_statistics import gate_statistics
from coconut.rl.loss import PolicyBatch, PolicyLoss, broadcast_to_tokens, policy_batch, totals_of
from coconut.rl.mode_routing import collect_outcomes, metrics_by_steps, mode_metrics, predict_in_each_mode
from coconut.rl.objectives import advantages, has_zero_variance
from coconut.rl.process_reward import OnlineProcessReward
from coconut.runs.folder import used_file, write_description
from coconut.runs.loading import match_dtypes, to_float32
from coconut.runs.state import TrainingState
from coconut.runs.tracking import Tracking
from coconut.tasks import TASKS
from coconut.training.divergence import explain_non_finite_loss
from coconut.training.launch import launch_training
from coconut.training.model_setup import apply_engine_options
from coconut.training.signals import StopRequest
from coconut.utils.console import log
from coconut.utils.torch_utils import seeded

REFERENCE = "reference"  # in the run's folder: the model that the run started from


class PolicyTrainer:
    """One process's part of a run. See `coconut.training.loop` for the loop.

    A step samples completions to `prompts_per_step` prompts and updates the policy with them, in one or more updates.
    `reward` is by default coconut.completions.rollouts.CorrectnessReward.
    """

    unit = "step"

    def __init__(
        self, config: RLConfig, folder: Path, files: dict[str, str], world: World, reward: Reward | None = None
    ):
        self.config, self.folder, self.files, self.world = config, folder, files, world
        self.task = TASKS[config.data.required_task()]
        self.objective = config.objective.build()
        self.num_steps = config.num_steps
        # a new run validates before its first step
        self.training_state = TrainingState(config, folder, world, updates=0, pending=True)
        keys = ("step", "updates", "best", "pending")
        self.step, self.updates, self.best, self.pending = (self.training_state.state[key] for key in keys)

        torch.manual_seed(config.seed + world.rank)
        self.init = self.training_state.initial_weights(str(config.init))
        self.lm = self._policy()
        self.distribution = SamplingDistribution.of(self.lm.special, config.temperature, config.thought_noise)
        self.judge = CorrectnessReward(self.task, self.lm.reasoning.format, **asdict(config.reward))
        self.reward = reward or self.judge
        self.max_new_tokens = config.max_new_tokens or self.lm.reasoning.max_new_tokens
        self.train = self._read("train")
        self.valid = self._read("valid")[: config.valid_limit]
        self.num_parameters = sum(weight.numel() for weight in self.lm.parameters())
        self.loss = PolicyLoss(self.distribution, self.objective, config.objective.kl_coef)
        apply_engine_options(self.lm, config.engine)
        loss = Loss(self.loss, may_skip_modules=self.lm.feedback.has_weights or self.lm.gates is not None)
        lr_factors = config.gates.lr_factors(config.optimizer.lr) if self.lm.gates else None
        self.engine: Engine = make_engine(self.lm, loss, config.engine, config.optimizer, world, lr_factors)
        self.reference = self._reference()
        self.process_reward = self._process_reward()

    def _policy(self) -> LatentLM:
        resumed = self.training_state.resume_from
        lm = self.training_state.load_model() if resumed else to_float32(LatentLM.from_pretrained(self.init))
        if self.config.thought_noise:
            refuse_noise(lm.reasoning, self.config.thought_noise)
        modes, reward = lm.reasoning.modes, self.config.reward
        there = f"its modes are {', '.join(modes)}" if modes else "it has none"
        for key, named in (("mode_costs", reward.mode_costs), ("max_mode_tokens", reward.max_mode_tokens)):
            for mode in named:
                if mode not in modes:
                    raise ValueError(f"reward.{key}.{mode} is of a mode that the model does not have: {there}.")
        self._set_gates(lm)
        return lm.eval()  # without dropout, an update sees the probabilities that completions were sampled with

    def _set_gates(self, lm: LatentLM) -> None:
        """Give the policy gates, unless it has them, if the configuration says so. Those it has are trained further."""
        gates, temperature = self.config.gates, self.config.temperature
        if lm.gates and not gates.enabled:
            raise ValueError(f"init={self.config.init} mixes what it expects into its words. Set gates.enabled=true.")
        if not gates.enabled:
            return
        starts_elsewhere = (gates.min, gates.max) != (GatesConfig.min, GatesConfig.max)
        if lm.gates and starts_elsewhere and not self.training_state.resume_from:
            raise ValueError(
                f"gates.min={gates.min:g} and gates.max={gates.max:g} say where new gates start, and init="
                f"{self.config.init} has gates, which are trained further. Leave them out."
            )
        if not lm.gates:
            with seeded(self.config.seed):
                lm.add_gates(gates.min, gates.max)
        lm.reasoning = replace(lm.reasoning, gated=GatedWords(temperature))

    @property
    def budget(self) -> int:
        """The most sampled tokens and noisy thoughts of a completion, without the control token."""
        return self.max_new_tokens + (self.lm.reasoning.num_thoughts if self.config.thought_noise else 0)

    @property
    def has_kl_penalty(self) -> bool:
        return self.config.objective.kl_coef > 0

    def _reference(self) -> LatentLM | None:
        """The model that the run started from, if the KL penalty or the process reward needs it."""
        process_reward = self.config.process_reward
        if not self.has_kl_penalty and (process_reward.init or not process_reward.weight):
            return None
        path = self.folder / REFERENCE if self.training_state.resume_from else self.init
        reference = LatentLM.from_pretrained(path)
        if self.lm.gates and not reference.gates:  # it begins with the policy's
            reference.gates, reference.reasoning = deepcopy(self.lm.gates), self.lm.reasoning
        reference = match_dtypes(reference, self.lm, self.engine.device)
        return apply_engine_options(reference, self.config.engine)

    def _process_reward(self) -> OnlineProcessReward | None:
        if not self.config.process_reward.weight:
            return None
        reference = None if self.config.process_reward.init else self.reference
        return OnlineProcessReward(
            self.config, self.training_state, self.judge, self.lm, self.init, reference, self.engine.device,
            self.micro_batch_size,
        )  # fmt: skip

    def _read(self, split: str) -> list[Example]:
        """The examples whose prompts leave room for the longest completion and whose gold answers are judged right."""
        file, config = self.files[split], self.config
        kept = examples_that_fit(
            self.lm, read_examples(file), self.max_new_tokens, config.data.too_long is TooLong.skip, file,
            "Lower max_new_tokens, or leave them out with data.too_long=skip.",
        )  # fmt: skip
        with self.world.main_process_first():
            gold, right = read_back(
                self.lm, kept, self.task, file=file, unreadable=config.data.unreadable, cache_dir=config.data.cache_dir
            )
        reasoning = self.lm.reasoning
        for mode, form in zip(reasoning.modes or [""], reasoning.forms(), strict=True):
            limit = config.reward.max_mode_tokens.get(mode, self.max_new_tokens)
            key = "max_new_tokens" if limit >= self.max_new_tokens else f"reward.max_mode_tokens.{mode}"
            warn_of_limit(gold, [form], min(limit, self.max_new_tokens), file, key)
        return [kept[i] for i in right]

    @property
    def next_command(self) -> str:
        return f"coconut evaluate run={self.folder}"

    @property
    def micro_batch_size(self) -> int:
        config = self.config
        share = -(-config.prompts_per_step // config.num_minibatches) * config.group_size // self.world.size
        return min(config.micro_batch_size or share, share)

    def log_summary(self) -> None:
        config, reasoning = self.config, self.lm.reasoning
        updates = config.num_minibatches * config.num_iterations
        modes = f"choosing from {', '.join(reasoning.modes)}" if reasoning.modes else reasoning.method
        log(
            f"{config.objective.name}, {modes}: {config.num_steps:,} steps of {config.prompts_per_step} prompts, "
            f"{config.group_size} completions each, "
            f"{'on-policy' if config.on_policy else f'learned from in {updates} updates'}"
            + (f", thoughts drawn with noise {config.thought_noise:g}" if config.thought_noise else "")
            + (", words mixed with what was expected (gates)" if config.gates.enabled else "")
        )
        log(
            f"{len(self.train):,} training and {len(self.valid):,} validation questions, "
            f"{self.num_parameters / 1e6:.1f}M parameters, on {self.engine.device}"
        )

    def dry_run(self) -> None:
        """Run a micro-batch of the longest completions that there can be."""
        questions = [example.question for example in self.train]
        longest = max(encode_questions(self.lm.tokenizer, questions, self.lm.reasoning.format), key=len)
        largest = largest_completion(self.lm, longest, self.max_new_tokens)
        if self.config.thought_noise:
            zeros_KD = torch.zeros(largest.num_thoughts, self.lm.thought_size)
            largest = largest.with_noisy_thoughts(NoisyThoughts(zeros_KD, zeros_KD))
        completions = [largest] * self.micro_batch_size
        totals = totals_of(completions, self.budget)
        token_advantages = broadcast_to_tokens(torch.zeros(len(completions)), completions)
        batch = policy_batch(
            completions, token_advantages, self.objective, totals, self.lm.special, on_policy=self.config.on_policy
        )
        self.engine.dry_run(self._with_reference(batch))
        self.loss.divergences.clear()
        self.loss.ratios.parts.clear()
        if self.process_reward:
            self.process_reward.dry_run(completions)

    def train_step(self) -> dict[str, Any]:
        """Sample, reward and learn."""
        begin = time.perf_counter()
        groups = self.sample(self.step)
        row = {**self.completion_statistics(groups), **self.learn(groups)}
        return {**row, "seconds": time.perf_counter() - begin}

    def sample(self, step: int) -> list[Group]:
        """The completions of a step, from all processes, with their rewards, in the order of its prompts."""
        config, world = self.config, self.world
        world.set_activity(f"sampling for step {step + 1}")
        places = range(world.rank, config.prompts_per_step, world.size)
        examples = [self.train[i] for i in self._prompts(step)[list(places)]]
        with self._save_if_reward_fails(), self.engine.full_module() as lm, self.engine.autocast():
            groups = sample_groups(
                lm, examples, self.reward, samples=config.group_size,
                keys=[(config.seed, step, place) for place in places], temperature=config.temperature,
                thought_noise=config.thought_noise, max_new_tokens=self.max_new_tokens,
                batch_size=config.rollout_batch_size,
            )  # fmt: skip
        parts = world.all_gather_object(groups)
        return [parts[place % world.size][place // world.size] for place in range(config.prompts_per_step)]

    @contextmanager
    def _save_if_reward_fails(self) -> Iterator[None]:
        """In all processes, save the run and raise ValueError if the reward function raises ValueError in one."""
        problem = ""
        try:
            yield
        except ValueError as error:
            problem = str(error)
        if problems := [text for text in self.world.all_gather_object(problem) if text]:
            self.save()
            raise ValueError(
                f"{problems[0]} The run is saved at step {self.step}. Correct the reward and run it again."
            )

    def _prompts(self, step: int) -> np.ndarray:
        """The indices of a step's examples: in each epoch every one once, in an order keyed by seed and epoch."""
        count, per_step = len(self.train), self.config.prompts_per_step
        places = [divmod(i, count) for i in range(step * per_step, (step + 1) * per_step)]
        orders = {e: np.random.default_rng((self.config.seed, e)).permutation(count) for e in dict(places)}
        return np.array([orders[epoch][i] for epoch, i in places])

    def completion_statistics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Means over a step's completions. `zero_variance_groups`: the share of groups with equal rewards.

        Of noisy thoughts, `thought_norm`: the mean norm of what the noise is added to; `thought_dispersion`: its
        standard deviation in a coordinate, around the mean of its place.
        """
        pairs = [(group.example, completion) for group in groups for completion in group.completions]
        completions = [completion for _, completion in pairs]
        rewards = torch.stack([group.rewards for group in groups])
        right = np.array([self.judge.is_correct(example, completion.text) for example, completion in pairs])
        row = {
            "reward": float(rewards.mean()),
            "accuracy": float(right.mean()),
            "zero_variance_groups": float(has_zero_variance(rewards).float().mean()),
            "new_tokens": float(np.mean([completion.new_tokens for completion in completions])),
            "passes": float(np.mean([completion.cost.passes for completion in completions])),
            "truncated": float(np.mean([completion.truncated for completion in completions])),
        }
        if drawn := [completion.noisy.means for completion in completions if completion.noisy]:
            means_NKD = torch.stack(drawn)
            row["thought_norm"] = float(means_NKD.norm(dim=-1).mean())
            row["thought_dispersion"] = dispersion(means_NKD)
        if self.lm.gates:
            row |= gate_statistics(self.lm, completions)
        for mode in self.lm.reasoning.modes:
            in_mode = np.array([completion.mode == mode for completion in completions])
            row[f"share_{mode}"] = float(in_mode.mean())
            if in_mode.any():
                row[f"accuracy_{mode}"] = float(right[in_mode].mean())
        return row

    def learn(self, groups: Sequence[Group]) -> dict[str, float]:
        """Update the policy, and the model of the process reward, with the groups of a step."""
        config = self.config
        chosen = [i for i, group in enumerate(groups) if self._teaches(group)]
        row, token_advantages = self._advantages(groups, chosen)
        if config.process_reward.accuracy_range:
            row["learned_from"] = len(chosen) / len(groups)
        lr = config.optimizer.learning_rate(self.updates)
        parts = [part for part in np.array_split(np.arange(len(chosen)), config.num_minibatches) if len(part)]
        minibatches = [
            self._micro_batches([groups[chosen[i]] for i in part], [a_M for i in part for a_M in token_advantages[i]])
            for part in parts
        ]
        updates = [self._update(minibatch) for _ in range(config.num_iterations) for minibatch in minibatches]
        means = {key: float(np.mean([update[key] for update in updates])) for key in (updates[0] if updates else ())}
        return {**row, **means, "updates": len(updates), "lr": lr, "memory": peak_memory(self.engine.device)}

    def _teaches(self, group: Group) -> bool:
        """Whether the policy learns from a group."""
        config = self.config
        if config.drop_zero_variance_groups and has_zero_variance(group.rewards[None]).all():
            return False
        low, high = config.process_reward.accuracy_range or (-math.inf, math.inf)
        right = [self.judge.is_correct(group.example, completion.text) for completion in group.completions]
        return low < float(np.mean(right)) < high

    def _advantages(
        self, groups: Sequence[Group], chosen: Sequence[int]
    ) -> tuple[dict[str, float], list[list[Tensor]]]:
        """What to log of the process reward, and the advantages of each token of each completion of the chosen groups.

        The process reward's model rewards all groups first, and then learns from the chosen ones.
        """
        if not self.process_reward:
            normalize = self.objective.normalize_advantages
            return {}, [
                broadcast_to_tokens(advantages(groups[i].rewards[None], normalize)[0], groups[i].completions)
                for i in chosen
            ]
        with self.engine.autocast():
            rewards = self.process_reward.rewards(groups)
        row, learned = self.process_reward.statistics(rewards), [rewards[i] for i in chosen]
        if learned:
            updates, key = self.process_reward.updates + 1, "process_reward.optimizer"
            where = f"step {self.step + 1} (update {updates} of the reward model)"
            details = {"reward_model_update": updates, "examples": self._prompts(self.step).tolist()}
            with explain_non_finite_loss(self, where, self.process_reward.lr, details, key):
                row |= self.process_reward.update(learned)
        return row, [group.advantages(self.config.process_reward.weight) for group in learned]

    def _micro_batches(self, groups: Sequence[Group], token_advantages: Sequence[Tensor]) -> list[PolicyBatch]:
        """This process's micro-batches of an update with these groups; (M,) advantages for each completion."""
        config, world = self.config, self.world
        world.set_activity(f"preparing update {self.updates + 1}")
        completions = [completion for group in groups for completion in group.completions]
        totals = totals_of(completions, self.budget)
        needed = [passes_and_length([completion]) for completion in completions]
        # index -1: a row without targets, for a process that has none left
        rows, rows_advantages = [*completions, completions[0].without_targets()], [*token_advantages, torch.zeros(0)]
        parts = [
            policy_batch(
                [rows[i] for i in places], [rows_advantages[i] for i in places], self.objective, totals,
                self.lm.special, on_policy=config.on_policy, passes=passes,
            )
            for places, passes in shard_by_length(needed, self.micro_batch_size, world.rank, world.size)
        ]  # fmt: skip
        return [self._with_reference(part) for part in parts]

    def _with_reference(self, batch: PolicyBatch) -> PolicyBatch:
        """The batch with the reference's log-probabilities, if there is a KL penalty.

        They are computed on the policy's own rows, and with gradients as there, since kernels and their rounding depend
        on both: the divergence of a policy that equals its reference is exactly 0.
        """
        if not (self.has_kl_penalty and self.reference):
            return batch
        self.world.heartbeat()
        with self.engine.autocast():
            log_probs_M = self.distribution.log_probs(self.reference, batch.to(self.engine.device))
        return replace(batch, reference=log_probs_M.detach().cpu())

    def _update(self, batches: Sequence[PolicyBatch]) -> dict[str, float]:
        """One update. `kl`: the mean over its tokens of the divergence from the reference, before the update.

        `thought_log_ratio`, `word_log_ratio`, `thought_clipped`, `word_clipped`: means over its noisy thoughts and over
        its words of the log-ratio to sampling, and of whether it is clipped; only if the update is not on-policy.
        """
        self.world.set_activity(f"in update {self.updates + 1}")
        lr = self.config.optimizer.learning_rate(self.updates)
        where = f"step {self.step + 1} (update {self.updates + 1})"
        details = {"update": self.updates + 1, "examples": self._prompts(self.step).tolist()}
        with explain_non_finite_loss(self, where, lr, details):
            result = self.engine.update(batches, lr)
        self.updates += 1
        row = {"loss": result.loss, "grad_norm": result.grad_norm}
        if self.has_kl_penalty:
            row["kl"] = self.world.all_reduce_sum(self.loss.divergence()) / result.denominators[0]
        if self.config.thought_noise and not self.config.on_policy:
            row |= self.loss.ratios.means(self.world.all_reduce_sums)
        return row

    def progress(self, row: dict[str, Any]) -> str:
        return f"reward {row['reward']:.3f}"

    def validation_due(self) -> bool:
        return self.step % self.config.validate_every == 0 or self.step == self.num_steps

    def validate(self, track: Tracking, stop: StopRequest) -> str:
        """Answer every validation question in every mode, greedily. The best checkpoint has the best reward."""
        world = self.world
        world.set_activity(f"in the validation after step {self.step}")
        with self.engine.full_module() as lm, self.engine.autocast():
            predictions = predict_in_each_mode(
                lm, self.task, self.valid, max_new_tokens=self.max_new_tokens, batch_size=self.config.eval_batch_size,
                world=world, stop_requested=stop,
            )  # fmt: skip
            outcomes = collect_outcomes(lm, self.valid, predictions)
        rows, by_mode = np.arange(len(outcomes.chosen)), list(predictions.values())
        chosen = [by_mode[mode][i] for i, mode in enumerate(outcomes.chosen)]
        with self._save_if_reward_fails():
            rewards = [
                checked_reward(self.reward, example, p.text, p.mode, Cost(p.passes, p.num_thoughts, p.new_tokens))
                for example, p in zip(self.valid, chosen, strict=True)
            ]
        tables = {"accuracy": outcomes.correct, "new_tokens": outcomes.tokens, "passes": outcomes.passes}
        means = {name: float(table_QM[rows, outcomes.chosen].mean()) for name, table_QM in tables.items()}
        row = {"reward": float(np.mean(rewards)), **means, **mode_metrics(outcomes, rows)}
        if not self.best or row["reward"] > self.best["reward"]:
            self.best = {"step": self.step, **{key: row[key] for key in ("reward", "accuracy")}}
        track.samples(self.step, [asdict(prediction) for prediction in chosen[:5]])
        track.log("valid", self.step, **row, by_steps=metrics_by_steps(outcomes, self.valid))
        modes = "".join(f"  {mode} {100 * row[f'share_{mode}']:5.1f} %" for mode in self.lm.reasoning.modes)
        return f"valid reward {row['reward']:6.3f}  accuracy {100 * row['accuracy']:5.1f} %{modes}"

    @property
    def extra_models(self) -> dict[str, Engine]:
        return self.process_reward.extra_models if self.process_reward else {}

    def resume(self) -> None:
        self.training_state.resume(self.engine, self.extra_models)

    def save(self) -> None:
        self.world.set_activity(f"saving step {self.step}")
        state = {"best": self.best, "pending": self.pending, "updates": self.updates}
        if self.process_reward:
            state["process_reward_updates"] = self.process_reward.updates
        self.training_state.save(self.step, self.engine, self.lm.reasoning, state, self.extra_models)

    def finish(self, track: Tracking) -> str:
        return f"step {self.best['step']}, reward {self.best['reward']:.3f}"

    def describe(self, session: dict[str, Any]) -> None:
        splits = {"train": self.train, "valid": self.valid}
        about = {
            "name": self.config.name, "trained": "policy",
            "objective": asdict(self.objective) | {"denominator": self.objective.denominator.__name__},
            "reasoning": self.lm.reasoning.as_dict(), "num_steps": self.num_steps, "parameters": self.num_parameters,
            "new_tokens": self.lm.new_tokens,
            "data": {split: used_file(self.files[split], len(used)) for split, used in splits.items()},
            "model_type": self.lm.base.config.model_type, "init": str(self.init),
        }  # fmt: skip
        questions = {split: [example.question for example in used] for split, used in splits.items()}
        write_description(self.folder, self.config, about, session, questions)
        self.snapshot_models()

    def snapshot_models(self) -> None:
        """Copy the models that stay as they are to the run's folder: where they came from may be removed."""
        if self.reference:
            self.training_state.snapshot_model(self.folder / REFERENCE, self.reference)
        if self.process_reward:
            self.process_reward.snapshot_models()


def run(config: RLConfig, reward: Reward | None = None, world: World | None = None) -> int:
    """Train a run, or resume it, on the configured processes or as one of `world`. Returns the exit status.

    With a `reward` function, on one process only.
    """
    return launch_training(config, partial(PolicyTrainer, reward=reward), "coconut.rl", world, "prompts_per_step")
