"""Training: for each stage, for each update: update, log, validate if due, save if due."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coconut.build import make_model, starting_point
from coconut.checkpoint import Checkpoints, load_state, load_trainer
from coconut.cli import application
from coconut.collapse import look_at
from coconut.config import Resume, TooLong, TrainConfig, identity
from coconut.data import Example, TokenizedData, existing, read_examples, tokenize, unknown_words
from coconut.engine.base import Engine, NonFinite
from coconut.engine.local import LocalEngine
from coconut.evaluate import evaluate
from coconut.files import read_json, release, sha256, sole_owner, write_json
from coconut.layout import Batch, EpochView, epoch_batches, fit_context, micro_batches
from coconut.methods import Reasoning, Stage, plan
from coconut.model import LatentLM
from coconut.schedule import Place, Schedule, updates_since_reset
from coconut.screen import duration, only_our_words, say, working
from coconut.sources import data_files
from coconut.tasks import TASKS
from coconut.tracking import CONFIG, DESCRIPTION, Metrics, read_config, surroundings


class Diverged(ValueError):
    """Training stopped on a loss that is not finite; the message is the diagnosis."""


def summed_loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    return module(batch.input_ids, batch.attention_mask, labels=batch.labels).loss_sum


class Training:
    """One run: its model, data, engine and folder."""

    def __init__(self, config: TrainConfig, folder: Path, files: dict[str, str]):
        self.config, self.folder, self.files = config, folder, files
        self.task = TASKS[config.data.task]
        self.plan = plan(config.method, config.curriculum)
        self.checkpoints = Checkpoints(folder, config.keep_checkpoints, config.keep_every)

        torch.manual_seed(config.seed)
        examples = {split: read_examples(self.files[split]) for split in ("train", "valid")}
        if shared := len({e.question for e in examples["train"]} & {e.question for e in examples["valid"]}):
            say(f"warning: {shared:,} questions of the validation data are in the training data too.")
        found = self._found()
        self.lm = (
            LatentLM.from_pretrained(found, config.model.attention) if found else make_model(config, examples["train"])
        )
        self.lm.train()
        self.engine: Engine = LocalEngine(self.lm, summed_loss, config.engine, config.optimizer)
        self.train, _ = self._prepare("train", examples["train"])
        self.valid, kept = self._prepare("valid", examples["valid"][: config.valid_limit])
        self.valid_examples = [examples["valid"][i] for i in kept]
        self.schedule = Schedule(self.plan, -(-len(self.train) // config.batch_size))

        self.step, self.best = 0, None
        if found:
            state = load_state(found)
            self.step, self.best = state["step"], state["best"]
            self.engine.load_state_dict(load_trainer(found))
            self.checkpoints.set_aside_after(self.step)
        self.recent: deque[dict[str, float]] = deque(maxlen=5)
        self.collapse: list[str] = []  # what was last found wrong with the thoughts

    def _found(self) -> Path | None:
        """The checkpoint to go on from, if the run has any."""
        found = self.checkpoints.last()
        if not found and self.checkpoints.steps():
            raise ValueError(
                f"Every checkpoint in {self.checkpoints.folder} is damaged, so this run cannot go on. Restore one, or "
                f"remove {self.folder} to start it anew."
            )
        return found

    def _prepare(self, split: str, examples: list[Example]) -> tuple[TokenizedData, np.ndarray]:
        config = self.config.data
        data = tokenize(examples, self.lm.tokenizer, config.format, config.cache_dir)
        if unknown := unknown_words(data, self.lm.tokenizer):
            say(f"warning: {unknown:,} words of {self.files[split]} are not in the tokenizer's vocabulary.")
        skip = config.too_long is TooLong.skip
        fitting, kept = fit_context(self._all_views, data, self.lm.context, skip, self.files[split])
        if len(kept) < len(data):
            say(f"Left out {len(data) - len(kept)} of {len(data)} {split} examples, longer than the model's context.")
        return fitting, kept

    def _all_views(self, data: TokenizedData) -> list[EpochView]:
        mixed = self.plan.depths if self.plan.mixing_probability else ()
        return [self._plain_view(data, stage) for stage in (*mixed, *self.plan.stages)]

    def _plain_view(self, data: TokenizedData, stage: Stage) -> EpochView:
        """The data as the stage has it, nothing mixed in."""
        return EpochView(data, replace(self.plan, mixing_probability=0.0), stage, self.lm.special, seed=0, epoch=0)

    def rehearse(self) -> None:
        """Run the largest micro-batch of the deepest stage, and of the one with the longest rows."""
        size = self.config.micro_batch_size or self.config.batch_size
        views = self._all_views(self.train)
        widest = max(range(len(views)), key=lambda k: views[k].lengths.max())
        for k in {widest, len(views) - 1}:
            longest = np.argsort(-views[k].lengths, kind="stable")[:size]
            for batch in micro_batches(views[k], longest, size):
                try:
                    self.engine.rehearse(batch)
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
            Metrics(self.folder, self.step) as metrics,
            asked_to_stop() as asked,
            working("training", schedule.total, self.step) as bar,
        ):
            for step in range(self.step, schedule.total):
                place = schedule.at(step)
                if updates_since_reset(place, config.optimizer.reset) == 0:
                    self.engine.reset_optimizer()
                if place.stage_step == 0 or step == first:
                    self.lm.reasoning = self._reasoning(place.stage)
                    say(f"Stage {place.stage.index}: {place.stage.describe()}")
                if place.batch == 0 or view is None:
                    view = EpochView(self.train, self.plan, place.stage, self.lm.special, config.seed, place.epoch)
                    batches = epoch_batches(view, config.batch_size, config.seed, place.epoch)

                row = self.update(place, view, batches[place.batch])
                metrics.log("train", step + 1, stage=place.stage.index, epoch=place.epoch, **row)
                bar(step + 1, f"stage {place.stage.index}, loss {row['loss']:.3f}")
                self.step = step + 1

                if due := self._validation_due(place):
                    result = self.validate(place)
                    metrics.log("valid", self.step, stage=place.stage.index, epoch=place.epoch, **result)
                    self._report(place, row, result, time.monotonic() - started, first)
                if due or asked or any(n and self.step % n == 0 for n in (config.save_every, config.keep_every)):
                    self.save()
                if asked:
                    say(f"Stopped by {asked[0].name}; saved at update {self.step}. The same command goes on from here.")
                    return 128 + asked[0]
        say(f"Done: {schedule.total:,} updates in {self.folder}")
        if self.best:
            say(f"Best checkpoint: update {self.best['step']}, {100 * self.best['accuracy']:.1f} % on validation data")
        say(f"Next: python -m coconut.evaluate run={self.folder}")
        return 0

    def update(self, place: Place, view: EpochView, batch: np.ndarray) -> dict[str, float]:
        config = self.config
        begin = time.perf_counter()
        parts = list(micro_batches(view, batch, config.micro_batch_size or config.batch_size))
        lr = config.optimizer.learning_rate(updates_since_reset(place, config.optimizer.reset))
        try:
            done = self.engine.update(parts, lr)
        except NonFinite as error:
            raise Diverged(self._diagnosis(place, error, batch, lr)) from error
        row = {"loss": done.loss, "grad_norm": done.grad_norm, "lr": lr, "targets": done.num_targets}
        self.recent.append({"step": place.step + 1, **row})
        return {**row, "seconds": time.perf_counter() - begin}

    def _validation_due(self, place: Place) -> bool:
        every = self.config.validate_every
        return place.ends_stage or (self.step % every == 0 if every else place.ends_epoch)

    def validate(self, place: Place) -> dict[str, Any]:
        """Loss and accuracy by generation on validation data, as the stage has it; keeps the best."""
        loss_sum, targets = 0.0, 0
        view = self._plain_view(self.valid, place.stage)
        self.lm.eval()
        with torch.no_grad(), self.engine.autocast():
            for batch in micro_batches(view, np.argsort(view.lengths, kind="stable"), self.config.eval_batch_size):
                loss_sum += summed_loss(self.lm, batch.to(self.engine.device)).item()
                targets += batch.num_targets
            result, predictions, thoughts = evaluate(
                self.lm, self.task, self.valid_examples, batch_size=self.config.eval_batch_size
            )
        self.lm.train()
        loss = loss_sum / max(targets, 1)
        if place.in_last_stage:
            rank = (result.accuracy, -loss)
            if not self.best or rank > (self.best["accuracy"], -self.best["loss"]):
                self.best = {"step": self.step, "accuracy": result.accuracy, "loss": loss}
        watched = self._watch(thoughts) if thoughts.shape[1] else {}
        samples = [asdict(prediction) for prediction in predictions[:5]]
        write_json(self.folder / "samples" / f"step-{self.step:07d}.json", samples)
        return {
            "loss": loss,
            "accuracy": result.accuracy,
            "chain_match": result.chain_match,
            "new_tokens": result.mean_new_tokens,
            "cut": result.cut,
            **watched,
        }

    def _watch(self, thoughts: torch.Tensor) -> dict[str, Any]:
        """What the thoughts of the validation questions look like; warns when they collapse, once in a row."""
        table: Any = self.lm.base.get_input_embeddings()
        found = look_at(thoughts, table.weight)
        collapse = found.collapse()
        for problem in collapse:
            if problem not in self.collapse:
                say(f"warning: the thoughts of the validation questions {problem} ({found.told()})")
        self.collapse = collapse
        return {f"thought_{name}": value for name, value in found.as_dict().items()}

    def save(self) -> None:
        self.checkpoints.save(self.step, self.lm, self.engine.state_dict(), {"best": self.best})

    def _reasoning(self, stage: Stage) -> Reasoning:
        limit = self.config.max_new_tokens or self.task.max_new_tokens
        return replace(Reasoning.at(self.plan, stage, limit), format=self.config.data.format)

    def _report(self, place: Place, row: dict[str, float], result: dict[str, Any], seconds: float, first: int) -> None:
        left = seconds / (self.step - first) * (self.schedule.total - self.step)
        say(
            f"  update {self.step:>6,} of {self.schedule.total:,}  stage {place.stage.index}  loss {row['loss']:.3f}  "
            f"valid loss {result['loss']:.3f}  accuracy {100 * result['accuracy']:5.1f} %  "
            f"{duration(seconds)} so far, about {duration(left)} left"
        )

    def _diagnosis(self, place: Place, error: NonFinite, batch: np.ndarray, lr: float) -> str:
        found = {
            "step": place.step + 1, "stage": place.stage.index, "epoch": place.epoch, "lr": lr,
            "loss": str(error.loss), "grad_norm": str(error.grad_norm), "not_finite": error.culprits,
            "examples": [int(i) for i in batch], "before": list(self.recent),
        }  # fmt: skip
        write_json(self.folder / "diverged.json", found)
        saved = self.checkpoints.steps()
        before = "; ".join(f"{r['loss']:.3g} ({r['grad_norm']:.3g})" for r in self.recent) or "none"
        first = error.culprits[0] if error.culprits else "the loss alone"
        return (
            f"The loss of update {place.step + 1} (stage {place.stage.index}) is {error.loss}, its gradient norm "
            f"{error.grad_norm}. It was not applied"
            + (f", and the checkpoint of update {saved[-1]} is whole.\n" if saved else ".\n")
            + f"  not finite in: {first} ({len(error.culprits)} in all)\n"
            f"  losses before, with gradient norms: {before}\n"
            f"  learning rate {lr:g}, clipping {self.config.optimizer.clip or 'off'}, "
            f"{self.config.engine.precision.value}\n"
            "A norm that grew before points to the learning rate: lower optimizer.lr, or set optimizer.clip=1 and "
            "optimizer.warmup=100. One that did not points to the data: the examples of this update are listed in "
            f"{self.folder / 'diverged.json'}."
        )


@contextmanager
def asked_to_stop() -> Iterator[list[signal.Signals]]:
    """A list that SIGTERM or SIGINT (once) writes into; a second SIGINT interrupts as usual."""
    asked: list[signal.Signals] = []

    def note(number: int, frame: Any) -> None:
        asked.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two configurations differ, as "key: VALUE there, VALUE asked for"."""
    found = []
    for key in sorted(there.keys() | asked.keys()):
        a, b = there.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} there, {b} asked for")
    return found


def open_folder(config: TrainConfig, files: dict[str, str]) -> Path:
    """The run's folder, made or found to hold this very run on these files.

    Raises ValueError if it holds another one, or the data changed, or there is one and resume=never.
    """
    folder = config.folder()
    used = {split: existing(files[split]) for split in ("train", "valid")}
    if (folder / CONFIG).is_file():
        if config.resume is Resume.never:
            raise ValueError(f"{folder} already holds a run, and resume=never. Name another folder with run=DIR.")
        if differing := differences(identity(read_config(folder)), identity(asdict(config))):
            raise ValueError(
                f"{folder} holds a run with another configuration:\n  " + "\n  ".join(differing)
                + "\nName another folder with run=DIR, give the same configuration to go on, or remove the folder."
            )  # fmt: skip
        before = read_json(folder / DESCRIPTION)["data"]
        for split, file in used.items():
            if before[split]["sha256"] != sha256(file):
                raise ValueError(
                    f"{before[split]['file']} has changed since the run in {folder} began. Restore the file, or start "
                    "another run with run=DIR."
                )
    elif folder.exists() and any(path.name != DESCRIPTION and path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run. Name another folder with run=DIR.")
    return folder


def describe_run(config: TrainConfig, folder: Path, training: Training) -> None:
    """Write config.json and run.json: what exactly is trained, on what, with which code, where."""
    data = {
        split: {"file": training.files[split], "sha256": sha256(training.files[split]), "used": len(used)}
        for split, used in [("train", training.train), ("valid", training.valid)]
    }
    here = surroundings()
    earlier = read_json(folder / DESCRIPTION) if training.step else {}
    began_from = str(starting_point(config.init).resolve()) if config.init and not earlier else None
    write_json(
        folder / DESCRIPTION,
        {
            "name": config.name,
            "plan": training.plan.as_dict(),
            "updates": training.schedule.total,
            "updates_per_epoch": training.schedule.updates_per_epoch,
            "parameters": sum(p.numel() for p in training.lm.parameters()),
            "new_tokens": training.lm.new_tokens,
            "data": data,
            "model_type": training.lm.base.config.model_type,
            "init": earlier.get("init", began_from),
            "sessions": [*earlier.get("sessions", []), {**here, "from_update": training.step}],
        },
    )
    write_json(folder / CONFIG, asdict(config))


def run(config: TrainConfig) -> int:
    """Train one run, or go on with it."""
    only_our_words()
    config.data = config.data.absolute()
    files = data_files(asdict(config.data))
    folder = open_folder(config, files)
    say(f"Run folder: {folder}")
    with sole_owner(folder):
        try:
            return train(config, folder, files)
        finally:
            if not (folder / DESCRIPTION).exists():
                release(folder)


def train(config: TrainConfig, folder: Path, files: dict[str, str]) -> int:
    """The run of this configuration on these files, in a folder that is its own."""
    training = Training(config, folder, files)
    if training.step == training.schedule.total:
        say(f"This run is complete: {training.step:,} updates. Next: python -m coconut.evaluate run={folder}")
        return 0
    parameters = sum(p.numel() for p in training.lm.parameters())
    say(
        f"{config.method}: {len(training.train):,} training and {len(training.valid):,} validation examples, "
        f"{parameters / 1e6:.1f}M parameters, {training.schedule.total:,} updates on {training.engine.device}"
    )
    unit = training.plan.unit.value
    if config.curriculum.mixing_probability and not training.plan.mixing_probability:
        say(f"note: {config.method} has no slot that tells stages apart, so curriculum.mixing_probability is not used")
    for stage in training.plan.stages:
        say(f"  stage {stage.index}: {stage.length} {unit}, {stage.describe()}")
    training.rehearse()
    describe_run(config, folder, training)
    if training.step:
        say(f"Going on from update {training.step:,}")
    return training.run()


main = application("train", TrainConfig, run)

if __name__ == "__main__":
    main()
