"""Reinforcement learning: for each batch: sample, reward, learn, log, validate if due, save if due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coconut.completions.completion import longest_completions, needs, shard_by_length
from coconut.completions.rollouts import CorrectnessReward, Cost, Group, Reward, rewarded, sample_groups, with_room
from coconut.completions.scoring import SamplingDistribution
from coconut.config import TooLong
from coconut.data.examples import Example, read_examples
from coconut.data.tokenization import encode_questions
from coconut.engine.base import Engine, NonFiniteUpdate, peak_memory
from coconut.engine.factory import make_engine
from coconut.engine.world import World
from coconut.evaluation.evaluator import EvaluationInterrupted, Prediction
from coconut.evaluation.gold_answers import read_back, warn_of_limit
from coconut.models.latent_lm import LatentLM
from coconut.rl.config import RLConfig
from coconut.rl.loss import PolicyBatch, PolicyLoss, broadcast_to_tokens, policy_batch, totals_of
from coconut.rl.mode_routing import by_steps, gathered, in_each_mode, of_modes
from coconut.rl.objectives import advantages, has_zero_variance
from coconut.rl.process_reward import OnlineProcessReward
from coconut.runs.description import DESCRIPTION
from coconut.runs.folder import open_run_folder, used_file, write_description
from coconut.runs.loading import match_dtypes, resolve_weights, to_float32
from coconut.runs.state import TrainingState, stopped
from coconut.runs.tracking import Tracking, open_tracking
from coconut.tasks import TASKS
from coconut.training.launch import check_divisible, launch_training, runtime_info
from coconut.training.loop import NonFiniteLossError
from coconut.training.model_setup import apply_engine_options
from coconut.training.signals import StopRequest, handle_stop_signals
from coconut.utils.console import duration, log, progress_bar
from coconut.utils.files import read_json, write_json
from coconut.utils.hydra_app import application

REFERENCE = "reference"  # in the run's folder: what it started from


class PolicyTrainer:
    """One run, as one of its processes sees it: policy, reference, dense rewards, questions, engine and folder.

    `init`: the weights that it began with. `reward`: by default that of the configuration,
    coconut.completions.rollouts.Correctness.
    """

    def __init__(
        self, config: RLConfig, folder: Path, files: dict[str, str], world: World, reward: Reward | None = None
    ):
        self.config, self.folder, self.files, self.world = config, folder, files, world
        self.task = TASKS[config.data.required_task()]
        self.objective = config.objective.built()
        self.training_state = TrainingState(config, folder, world, {"updates": 0, "pending": True})

        torch.manual_seed(config.seed + world.rank)
        self.init = world.on_main_process(self._init)
        self.lm = self._policy()
        self.policy = SamplingDistribution.of(self.lm.special, config.temperature)
        self.judge = CorrectnessReward(self.task, self.lm.reasoning.format, **asdict(config.reward))
        self.reward = reward or self.judge
        self.limit = config.max_new_tokens or self.lm.reasoning.max_new_tokens
        self.train = self._read("train")
        self.valid = self._read("valid")[: config.valid_limit]
        self.num_parameters = sum(weight.numel() for weight in self.lm.parameters())
        self.training_state.restore(self.lm)
        self.loss = PolicyLoss(self.policy, self.objective, config.objective.kl_coef)
        apply_engine_options(self.lm, config.engine)
        self.engine: Engine = make_engine(self.lm, self.loss, config.engine, config.optimizer, world)
        self.reference = self._reference()
        self.process_reward = self._process_reward()

        state = self.training_state.state
        self.step, self.updates, self.best = state["step"], state["updates"], state["best"]
        self.pending = state["pending"]  # a validation that is due; the first one is so from the beginning

    def _init(self) -> Path:
        if self.training_state.resume_from:
            return Path(read_json(self.folder / DESCRIPTION)["init"])
        return resolve_weights(str(self.config.init))

    def _policy(self) -> LatentLM:
        lm = LatentLM.from_pretrained(self.training_state.resume_from or self.init)
        if not self.training_state.resume_from:
            to_float32(lm)
        modes, reward = lm.reasoning.modes, self.config.reward
        there = f"its modes are {', '.join(modes)}" if modes else "it has none"
        for key, named in (("mode_costs", reward.mode_costs), ("max_mode_tokens", reward.max_mode_tokens)):
            for mode in named:
                if mode not in modes:
                    raise ValueError(f"reward.{key}.{mode} is of a mode that the model does not have: {there}.")
        return lm.eval()  # without dropout: answers are as likely in an update as they were when they were sampled

    @property
    def held(self) -> bool:
        """Whether the policy is held to what it started from."""
        return self.config.objective.kl_coef > 0

    def _reference(self) -> LatentLM | None:
        """What the run started from, if the policy is held to it, or dense rewards are measured from there."""
        process_reward = self.config.process_reward
        if not self.held and (process_reward.init or not process_reward.weight):
            return None
        place = self.folder / REFERENCE if self.training_state.resume_from else self.init
        reference = match_dtypes(LatentLM.from_pretrained(place), self.lm, self.engine.device)
        return apply_engine_options(reference, self.config.engine)

    def _process_reward(self) -> OnlineProcessReward | None:
        if not self.config.process_reward.weight:
            return None

        start = None if self.config.process_reward.init else self.reference
        return OnlineProcessReward(
            self.config, self.folder, self.training_state, self.judge, self.lm, self.init, start, self.engine.device,
            self.micro_batch_size,
        )  # fmt: skip

    def _read(self, split: str) -> list[Example]:
        """The examples whose questions leave room for the longest answer, and whose own answers are judged right."""
        file, config = self.files[split], self.config
        kept = with_room(
            self.lm, read_examples(file), self.limit, config.data.too_long is TooLong.skip, file,
            "Lower max_new_tokens, or leave them out with data.too_long=skip.",
        )  # fmt: skip
        with self.world.main_process_first():
            gold, right = read_back(
                self.lm, kept, self.task, file=file, unreadable=config.data.unreadable, cache_dir=config.data.cache_dir
            )
        own = self.lm.reasoning
        for mode, form in zip(own.modes or [""], own.forms(), strict=True):
            limited = config.reward.max_mode_tokens.get(mode, self.limit)
            key = "max_new_tokens" if limited >= self.limit else f"reward.max_mode_tokens.{mode}"
            warn_of_limit(gold, [form], min(limited, self.limit), file, key)
        return [kept[i] for i in right]

    def _asked(self, examples: Sequence[Example]) -> list[list[int]]:
        return encode_questions(self.lm.tokenizer, [e.question for e in examples], self.lm.reasoning.format)

    @property
    def micro_batch_size(self) -> int:
        config = self.config
        share = -(-config.prompts_per_step // config.num_minibatches) * config.group_size // self.world.size
        return min(config.micro_batch_size or share, share)

    def dry_run(self) -> None:
        """Run a micro-batch of the longest answers that there can be."""
        longest = longest_completions(self.lm, max(self._asked(self.train), key=len), self.limit)
        widest = max(longest, key=lambda sample: (len(sample.layout.ids), sample.passes))
        samples = [widest] * self.micro_batch_size
        totals = totals_of(samples, self.limit)
        on_policy = self.config.on_policy
        gains = broadcast_to_tokens(torch.zeros(len(samples)), samples)
        batch = policy_batch(samples, gains, self.objective, totals, self.lm.special, on_policy=on_policy)
        self.engine.dry_run(self._compared(batch))
        self.loss.divergences.clear()
        if self.process_reward:
            self.process_reward.dry_run(samples)

    def resume(self) -> None:
        """Go on where the checkpoint was written. After a rehearsal."""
        self.training_state.resume(self.engine)
        if self.process_reward:
            self.process_reward.resume()

    def keep_references(self) -> None:
        """Copies in the run's folder, since what the run started from may go."""
        if self.reference:
            self.training_state.snapshot_model(self.folder / REFERENCE, self.reference)
        if self.process_reward:
            self.process_reward.keep()

    def run(self) -> int:
        """Train from where the run stands to its end, or until asked to stop. Gives the exit status."""
        config = self.config
        started, first = time.monotonic(), self.step
        with (
            handle_stop_signals(self.world) as asked,
            self._tracking() as track,
            progress_bar("training", config.num_steps, self.step) as bar,
        ):
            if self.pending:
                self.validate(track, asked)
                self.save()
            for step in range(self.step, config.num_steps):
                if number := asked.anywhere():
                    return stopped(number, f"batch {self.step}")
                begin = time.perf_counter()
                groups = self.sample(step)
                row = {**self.described(groups), **self.learn(groups)}
                track.log("train", step + 1, **row, seconds=time.perf_counter() - begin)
                bar(step + 1, f"reward {row['reward']:.3f}")
                self.step = step + 1

                due = self.pending = self.step % config.validate_every == 0 or self.step == config.num_steps
                if due and not asked.anywhere():
                    self.validate(track, asked)
                    self._report(time.monotonic() - started, first)
                number = asked.anywhere()
                if due or number or any(n and self.step % n == 0 for n in (config.save_every, config.keep_every)):
                    self.save()
            if number := asked.anywhere():
                return stopped(number, f"batch {self.step}")
        log(f"Done: {config.num_steps:,} batches in {self.folder}")
        log(f"Best checkpoint: batch {self.best['step']}, reward {self.best['reward']:.3f} on validation data")
        log(f"Next: python -m coconut.evaluate run={self.folder}")
        return 0

    def sample(self, step: int) -> list[Group]:
        """The groups of a batch, of all processes. A reward that is none ends the run, saved as it was before."""
        config, world = self.config, self.world
        world.set_activity(f"sampling for batch {step + 1}")
        examples = [self.train[i] for i in self._questions(step)[world.rank :: world.size]]
        with self._saved_without_reward(), self.engine.full_module() as lm, self.engine.autocast():
            groups = sample_groups(
                lm, examples, self.reward, samples=config.group_size, seed=(config.seed, step, world.rank),
                temperature=config.temperature, max_new_tokens=self.limit, batch_size=config.rollout_batch_size,
            )  # fmt: skip
        return [group for part in world.all_gather_object(groups) for group in part]

    @contextmanager
    def _saved_without_reward(self) -> Iterator[None]:
        """Save the run, and say so, if in any process something has no reward."""
        problem = ""
        try:
            yield
        except ValueError as error:
            problem = str(error)
        if problems := [told for told in self.world.all_gather_object(problem) if told]:
            self.save()
            raise ValueError(f"{problems[0]} The run is saved at batch {self.step}, and goes on with another reward.")

    def _questions(self, step: int) -> np.ndarray:
        """Which examples a batch asks: in each epoch every one once, in an order that seed and epoch give."""
        count, asked = len(self.train), self.config.prompts_per_step
        places = [divmod(place, count) for place in range(step * asked, (step + 1) * asked)]
        orders = {e: np.random.default_rng((self.config.seed, e)).permutation(count) for e in dict(places)}
        return np.array([orders[epoch][place] for epoch, place in places])

    def _compared(self, batch: PolicyBatch) -> PolicyBatch:
        """With how likely the reference is to say the same.

        On the same rows as the policy's update, and with gradients as there, on which kernels and their rounding
        depend: the divergence of a policy that has not moved is exactly 0.
        """
        if not (self.held and self.reference):
            return batch
        self.world.heartbeat()
        with self.engine.autocast():
            likely_M = self.policy.log_probs(self.reference, batch.to(self.engine.device))
        return replace(batch, reference=likely_M.detach().cpu())

    def learn(self, groups: Sequence[Group]) -> dict[str, float]:
        """Update the policy with a batch, and what rewards its tokens."""
        config = self.config
        places = [place for place, group in enumerate(groups) if self._teaches(group)]
        teaching = [groups[place] for place in places]
        told, gains = self._gains(groups, places)
        if config.process_reward.accuracy_range:
            told["learned_from"] = len(places) / len(groups)
        lr = config.optimizer.learning_rate(self.updates)
        parts = [part for part in np.array_split(np.arange(len(teaching)), config.num_minibatches) if len(part)]
        batches = [
            self._batches([teaching[i] for i in part], [gain for i in part for gain in gains[i]]) for part in parts
        ]
        done = [self.update(batch) for _ in range(config.num_iterations) for batch in batches]
        means = {key: float(np.mean([row[key] for row in done])) for key in (done[0] if done else ())}
        return {**told, **means, "updates": len(done), "lr": lr, "memory": peak_memory(self.engine.device)}

    def _teaches(self, group: Group) -> bool:
        config = self.config
        if config.drop_zero_variance_groups and has_zero_variance(group.rewards[None]).all():
            return False
        low, high = config.process_reward.accuracy_range or (-math.inf, math.inf)
        right = [self.judge.right(group.example, sample.text) for sample in group.completions]
        return low < float(np.mean(right)) < high

    def _gains(self, groups: Sequence[Group], places: Sequence[int]) -> tuple[dict[str, float], list[list[Tensor]]]:
        """For each answer of the groups in these places the advantages of its tokens; first, what to log.

        A reward model learns from these groups, after it has rewarded them all.
        """
        if not self.process_reward:
            chosen, scaled = [groups[place] for place in places], self.objective.normalize_advantages
            return {}, [
                broadcast_to_tokens(advantages(group.rewards[None], scaled)[0], group.completions) for group in chosen
            ]
        with self.engine.autocast():
            judged = self.process_reward.rewards(groups)
        chosen = [judged[place] for place in places]
        told = {**self.process_reward.described(judged), **(self.process_reward.update(chosen) if chosen else {})}
        return told, [its.advantages(self.config.process_reward.weight) for its in chosen]

    def _batches(self, groups: Sequence[Group], gains: Sequence[Tensor]) -> list[PolicyBatch]:
        """What this process does of an update with all answers of these groups, of which `gains` has the advantages of
        their tokens.
        """
        config, world = self.config, self.world
        world.set_activity(f"preparing update {self.updates + 1}")
        samples = [sample for group in groups for sample in group.completions]
        totals = totals_of(samples, self.limit)
        needed = [needs([sample]) for sample in samples]
        rows, gains = [*samples, samples[0].without_targets()], [*gains, torch.zeros(0)]  # place -1 is the muted one
        parts = [
            policy_batch(
                [rows[i] for i in places], [gains[i] for i in places], self.objective, totals, self.lm.special,
                on_policy=config.on_policy, passes=passes,
            )
            for places, passes in shard_by_length(needed, self.micro_batch_size, world.rank, world.size)
        ]  # fmt: skip
        return [self._compared(part) for part in parts]

    def update(self, batches: Sequence[PolicyBatch]) -> dict[str, float]:
        """One update. Gives its loss, the norm of its gradient and, of a policy that is held, the mean of its tokens'
        divergence before it.
        """
        self.world.set_activity(f"in update {self.updates + 1}")
        lr = self.config.optimizer.learning_rate(self.updates)
        try:
            done = self.engine.update(batches, lr)
        except NonFiniteUpdate as error:
            raise NonFiniteLossError(self._diagnosis(error, lr)) from error
        self.updates += 1
        kl = self.world.all_reduce_sum(self.loss.divergence()) / done.num_targets
        return {"loss": done.loss, "grad_norm": done.grad_norm, **({"kl": kl} if self.held else {})}

    def described(self, groups: Sequence[Group]) -> dict[str, float]:
        """What the answers of a batch are like. `without_variance`: the share of groups that teach nothing."""
        pairs = [(group.example, sample) for group in groups for sample in group.completions]
        samples = [sample for _, sample in pairs]
        rewards = torch.stack([group.rewards for group in groups])
        right = np.array([self.judge.right(example, sample.text) for example, sample in pairs])
        found = {
            "reward": float(rewards.mean()),
            "accuracy": float(right.mean()),
            "zero_variance_groups": float(has_zero_variance(rewards).float().mean()),
            "new_tokens": float(np.mean([sample.new_tokens for sample in samples])),
            "passes": float(np.mean([sample.cost.passes for sample in samples])),
            "truncated": float(np.mean([sample.truncated for sample in samples])),
        }
        for mode in self.lm.reasoning.modes:
            of_mode = np.array([sample.mode == mode for sample in samples])
            found[f"share_{mode}"] = float(of_mode.mean())
            if of_mode.any():
                found[f"accuracy_{mode}"] = float(right[of_mode].mean())
        return found

    def validate(self, track: Tracking, asked: StopRequest) -> None:
        """Every validation question in every mode, greedily; keeps the best by the reward of the modes it chooses.

        When asked to stop it is left, and stays pending.
        """
        world = self.world
        world.set_activity(f"in the validation after batch {self.step}")
        try:
            with self.engine.full_module() as lm, self.engine.autocast():
                forced = in_each_mode(
                    lm, self.task, self.valid, max_new_tokens=self.limit, batch_size=self.config.eval_batch_size,
                    world=world, asked=asked,
                )  # fmt: skip
                known = gathered(lm, self.valid, forced)
        except EvaluationInterrupted:
            return
        rows, answers = np.arange(len(known.chosen)), list(forced.values())
        taken = [answers[mode][row] for row, mode in enumerate(known.chosen)]
        with self._saved_without_reward():
            rewards = [self._reward_of(*pair) for pair in zip(self.valid, taken, strict=True)]
        self.validated = {
            "reward": float(np.mean(rewards)),
            "accuracy": float(known.correct[rows, known.chosen].mean()),
            "new_tokens": float(known.tokens[rows, known.chosen].mean()),
            "passes": float(known.passes[rows, known.chosen].mean()),
            **of_modes(known, rows),
        }
        if not self.best or self.validated["reward"] > self.best["reward"]:
            self.best = {"step": self.step, **{key: self.validated[key] for key in ("reward", "accuracy")}}
        track.samples(self.step, [asdict(prediction) for prediction in taken[:5]])
        track.log("valid", self.step, **self.validated, by_steps=by_steps(known, self.valid))
        self.pending = False

    def _reward_of(self, example: Example, said: Prediction) -> float:
        cost = Cost(said.passes, said.num_thoughts, said.new_tokens)
        return rewarded(self.reward, example, said.text, said.mode, cost)

    def save(self) -> None:
        self.world.set_activity(f"saving batch {self.step}")
        state = {"best": self.best, "pending": self.pending, "updates": self.updates}
        if self.process_reward:
            state["dense_updates"] = self.process_reward.updates
        beside = self.process_reward.extra_models if self.process_reward else {}
        self.training_state.save(self.step, self.engine, self.lm.reasoning, state, beside)

    def _tracking(self) -> Tracking:
        described = read_json(self.folder / DESCRIPTION) if self.world.is_main else {}
        about = {"config": asdict(self.config), **described}
        # what a killed run said before its first checkpoint is said again
        step = self.step if self.training_state.resume_from else -1
        return open_tracking(self.config.tracking, self.folder, step, about, writes=self.world.is_main)

    def _report(self, seconds: float, first: int) -> None:
        if self.pending:
            return
        found, left = self.validated, seconds / (self.step - first) * (self.config.num_steps - self.step)
        modes = "".join(f"  {mode} {100 * found[f'share_{mode}']:5.1f} %" for mode in self.lm.reasoning.modes)
        log(
            f"  batch {self.step:>5,} of {self.config.num_steps:,}  reward {found['reward']:6.3f}  "
            f"accuracy {100 * found['accuracy']:5.1f} %{modes}  "
            f"{duration(seconds)} so far, about {duration(left)} left"
        )

    def _diagnosis(self, error: NonFiniteUpdate, lr: float) -> str:
        told = {"batch": self.step + 1, "update": self.updates + 1, "lr": lr, "loss": str(error.loss),
                "grad_norm": str(error.grad_norm), "not_finite": error.non_finite_names}  # fmt: skip
        if self.world.is_main:
            write_json(self.folder / "diverged.json", told)
        saved = self.training_state.checkpoints.steps()[-1]
        return (
            f"The loss of update {self.updates + 1} (batch {self.step + 1}) is {error.loss}, its gradient norm "
            f"{error.grad_norm}. It was not applied, and the checkpoint of batch {saved} is whole. Lower "
            "optimizer.lr, or set optimizer.max_grad_norm=1; metrics.jsonl has the batches before."
        )


def run(config: RLConfig, reward: Reward | None = None) -> int:
    """Train one run, or go on with it, on as many processes as asked for. Only on one of them with a `reward`."""
    return launch_training(config, "prompts_per_step", "coconut.rl", lambda world: run_rank(config, world, reward))


def run_rank(config: RLConfig, world: World, reward: Reward | None = None) -> int:
    """What each process of a run does."""
    check_divisible(config.prompts_per_step, world.size, "prompts_per_step")
    with open_run_folder(config, world) as (folder, files):
        training = PolicyTrainer(config, folder, files, world, reward)
        if training.step == config.num_steps and not training.pending:
            log(f"This run is complete: {training.step:,} batches. Next: python -m coconut.evaluate run={folder}")
            return 0
        lm, objective = training.lm, config.objective
        updates = config.num_minibatches * config.num_iterations
        modes = f"choosing from {', '.join(lm.reasoning.modes)}" if lm.reasoning.modes else lm.reasoning.method
        log(
            f"{objective.name}, {modes}: {config.num_steps:,} batches of {config.prompts_per_step} questions, "
            f"{config.group_size} "
            f"answers each, {'on-policy' if config.on_policy else f'learned from in {updates} updates'}"
        )
        log(f"{len(training.train):,} training and {len(training.valid):,} validation questions, "
            f"{training.num_parameters / 1e6:.1f}M parameters, on {training.engine.device}")  # fmt: skip
        training.dry_run()
        training.resume()
        world.on_main_process(lambda: describe_run(config, folder, training))
        world.on_main_process(training.keep_references)
        if training.step:
            log(f"Going on from batch {training.step:,}")
        return training.run()


def describe_run(config: RLConfig, folder: Path, training: PolicyTrainer) -> None:
    """What exactly is trained, on what, with which code, where: config.json and run.json."""
    lm = training.lm
    about = {
        "name": config.name,
        "trained": "policy",
        "objective": asdict(training.objective) | {"denominator": training.objective.denominator.__name__},
        "reasoning": lm.reasoning.as_dict(),
        "num_steps": config.num_steps,
        "parameters": training.num_parameters,
        "new_tokens": lm.new_tokens,
        "data": {
            split: used_file(training.files[split], len(used))
            for split, used in [("train", training.train), ("valid", training.valid)]
        },
        "model_type": lm.base.config.model_type,
        "init": str(training.init),
    }
    session = {**runtime_info(config, training.world), "from_update": training.step}
    splits = {"train": training.train, "valid": training.valid}
    write_description(
        folder, config, about, session, {split: [e.question for e in part] for split, part in splits.items()}
    )


main = application("rl", RLConfig, run)
