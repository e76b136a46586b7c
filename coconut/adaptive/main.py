"""coconut adaptive: make the table of outcomes, learn policies from it, and say what they are worth."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coconut.adaptive import encoders
from coconut.adaptive.backends import (
    Backend,
    CausalModelBackend,
    FunctionBackend,
    LatentBackend,
    collect_answers,
    fit_all,
    refuse_unknown,
)
from coconut.adaptive.chooser import policy_metadata
from coconut.adaptive.config import AdaptiveConfig, JudgeKind
from coconut.adaptive.encoders import Encoder
from coconut.adaptive.experiments import check_num_train_questions, run_experiments, studies
from coconut.adaptive.judges import ExactJudge, ImplicitJudge, Judge, PretrainedJudge, Vote, judge_scores
from coconut.adaptive.outcome_table import OutcomeTable
from coconut.adaptive.report import adaptive_page, on_screen
from coconut.adaptive.space import Space
from coconut.data.datasets import file_of_split
from coconut.data.examples import Example, read_examples
from coconut.data.tokenization import unknown_words
from coconut.engine.base import autocast, set_up_device
from coconut.evaluation.gold_answers import read_back, readable, warn_of_limit
from coconut.methods import REASONING_FILE
from coconut.models.latent_lm import LatentLM
from coconut.rewards.implicit import ImplicitReward, reference_of
from coconut.runs.description import CONFIG, read_config
from coconut.runs.loading import load_model, match_dtypes
from coconut.tasks import TASKS
from coconut.utils.console import log, silence_libraries
from coconut.utils.files import exclusive_lock, sha256, write_text

TABLE, LOG, POLICY, PAGE = "outcomes.npz", "answers.jsonl", "policy.safetensors", "adaptive.html"


def run(config: AdaptiveConfig) -> int:
    """The table of outcomes, unless it is given; then policies, and what they are worth against other choices."""
    silence_libraries()
    given = OutcomeTable.read(config.table) if config.table else _asking(config)
    check_num_train_questions(config.num_train_questions, len(given.questions))
    with exclusive_lock(config.folder):
        learn_and_tell(config, given if isinstance(given, OutcomeTable) else make_table(config, given))
    return 0


def only_table(config: AdaptiveConfig) -> int:
    """Ask every question in every configuration, judge the answers, and write what came of it."""
    silence_libraries()
    if config.table:
        raise ValueError(f"table={config.table} is made already. Leave out the word table to learn from it.")
    asked = _asking(config)
    with exclusive_lock(config.folder):
        make_table(config, asked)
    return 0


def learn_and_tell(config: AdaptiveConfig, table: OutcomeTable) -> None:
    """Policies from a table, what they are worth, and the first of them."""
    folder, space = config.folder, table.space
    default = space.find(config.default or table.about.get("default", {}))
    found = run_experiments(
        table,
        config.policy,
        cost=config.cost,
        default=default,
        num_train_questions=config.num_train_questions,
        seeds=config.seeds,
        seed=config.seed,
    )
    made = studies(found)
    for study in made:
        study.write(folder)
    found.learned.policy.save(folder / POLICY, {**policy_metadata(table), "cost": config.cost})
    log(on_screen(made))
    write_text(folder / PAGE, adaptive_page(made, config.name, folder))
    log(f"Policy: {folder / POLICY}\nPage: {folder / PAGE}\nData: {folder}")


class Asking(NamedTuple):
    """Who is asked what, and who judges."""

    backend: Backend
    encode: Encoder
    judge: Judge
    vote: Vote
    examples: list[Example]
    file: str
    device: torch.device

    @property
    def questions(self) -> list[str]:
        return [example.question for example in self.examples]


def make_table(config: AdaptiveConfig, asked: Asking) -> OutcomeTable:
    """Written to the command's folder. What was asked before is not asked again."""
    space, questions = Space.of(config.space), asked.questions
    log(f"{len(questions):,} questions of {asked.file} in {len(space)} configurations")
    with autocast(asked.device, config.engine.precision):
        replies = collect_answers(asked.backend, questions, space, config.folder / LOG, seed=config.seed)
        embeddings = asked.encode(questions).numpy()
        exact = ExactJudge(asked.vote)
        columns = [[row[c] for row in replies] for c in range(len(space))]

        def judged_by(judge: Judge) -> np.ndarray:
            told = [judge_scores(judge, asked.examples, column, space.settings(c)) for c, column in enumerate(columns)]
            return np.array(told, np.float32).T

        score = judged_by(asked.judge)
        correct = score if isinstance(asked.judge, ExactJudge) else judged_by(exact)
    table = OutcomeTable(
        space=space,
        questions=questions,
        steps=np.array([len(example.steps) for example in asked.examples]),
        score=score,
        correct=correct,
        passes=np.array([[reply.passes for reply in row] for row in replies], np.float32),
        embeddings=embeddings,
        about={"backend": asked.backend.name, "task": asked.vote.task.name, "embedding": config.embedding,
               "file": asked.file, "sha256": sha256(asked.file), "judge": config.judge.kind.value, "seed": config.seed,
               "default": config.default, "max_new_tokens": config.max_new_tokens, "checkpoint": config.checkpoint},
    )  # fmt: skip
    table.write(config.folder / TABLE)
    log(f"Table: {config.folder / TABLE}")
    return table


def _asking(config: AdaptiveConfig) -> Asking:
    """Raises ValueError if anything of it cannot be had, or if no question can be asked."""
    asked = _of_run(config) if config.run else _of_others(config)
    space = Space.of(config.space)
    refuse_unknown(space, asked.backend)
    different = list({example.question: example for example in asked.examples}.values())
    fits = fit_all(asked.backend, asked._replace(examples=different).questions, space)
    kept_ones = [example for example, one in zip(different, fits, strict=True) if one]
    for count, why in ((len(asked.examples) - len(different), "asked before"),
                       (len(different) - len(kept_ones), "too long in one of the configurations")):  # fmt: skip
        if count:
            log(f"{count:,} questions are left out: {why}.")
    if not kept_ones:
        raise ValueError(f"No question of {asked.file} leaves room for an answer in every configuration.")
    return asked._replace(examples=kept_ones)


def _limits(config: AdaptiveConfig) -> str:
    """What decides about answers besides the settings of the space, for the name under which they are kept."""
    return f"max_new_tokens={config.max_new_tokens} {config.engine.precision}"


def _of_others(config: AdaptiveConfig) -> Asking:
    """A model of Hugging Face, or a function."""
    assert config.task
    device, file = set_up_device(config.engine), getattr(config.data, config.split)
    examples = read_examples(file)[: config.limit]
    vote = Vote(TASKS[config.task], config.format)
    right = readable(examples, None, None, vote.task, vote.form, file=file, unreadable=config.unreadable)
    examples = [examples[i] for i in right]
    if config.base:
        backend = CausalModelBackend(config.base, config.prompt, device, config.batch_size, config.max_new_tokens)
        fingerprint = _fingerprint(backend.model, backend.tokenizer, str(backend.tokenizer.chat_template))
        backend.name = f"{backend.name} {fingerprint} {_limits(config)}"
        own = partial(encoders.model_encoder, backend.model.base_model, backend.tokenizer)
        encode = _encoder(config, own, device)
    else:
        known = frozenset(Space.of(config.space).keys)
        backend = FunctionBackend(_function(config.function), config.function, config.calls, known)
        encode = encoders.load_encoder(config.embedding, device, config.batch_size)
    return Asking(backend, encode, _judge(config, vote, device), vote, examples, file, device)


def _of_run(config: AdaptiveConfig) -> Asking:
    """A run's model, or one that was saved."""
    if not Path(config.run).exists() and not config.output:
        raise ValueError(
            f"{config.run} is no folder here. Name a trained run, or, for a model of the hub, output=FOLDER besides."
        )
    is_run = Path(config.run, CONFIG).is_file() and not Path(config.run, REASONING_FILE).is_file()
    lm = load_model(config.run, config.checkpoint, config.engine)
    data = read_config(config.run)["data"] if is_run else {}
    task, file = config.task or data.get("task"), getattr(config.data, config.split)
    if not task or not (is_run or file):
        raise ValueError(f"{config.run} is a model and no run: name task=... and data.{config.split}=FILE, too.")
    file = file_of_split(data, config.split, file)
    vote = Vote(TASKS[task], lm.reasoning.format)
    fingerprint = _fingerprint(lm, lm.tokenizer, json.dumps(lm.reasoning.as_dict()))
    name = f"{Path(config.run).name} {fingerprint} {_limits(config)}"
    backend = LatentBackend(lm, name, config.batch_size, config.max_new_tokens)
    implicit = config.judge.kind is JudgeKind.implicit
    judge = ImplicitJudge(backend, _implicit(config, lm), vote) if implicit else _judge(config, vote, lm.device)
    encode = _encoder(config, partial(encoders.latent_encoder, lm), lm.device)
    examples = read_examples(file)[: config.limit]
    gold, right = read_back(
        lm, examples, vote.task, file=file, unreadable=config.unreadable, keep_unknown=True,
        cache_dir=data.get("cache_dir"),
    )  # fmt: skip
    warn_of_limit(gold, lm.reasoning.forms(), config.max_new_tokens or lm.reasoning.max_new_tokens, file)
    if unknown := unknown_words(gold, lm.tokenizer):
        log(f"warning: {unknown:,} words of {file} are not in the model's vocabulary.")
    return Asking(backend, encode, judge, vote, [examples[i] for i in right], file, lm.device)


def _judge(config: AdaptiveConfig, vote: Vote, device: torch.device) -> Judge:
    return (
        ExactJudge(vote) if config.judge.kind is JudgeKind.exact else PretrainedJudge(config.judge.model, vote, device)
    )


def _encoder(config: AdaptiveConfig, own: Callable[[str, int], Encoder], device: torch.device) -> Encoder:
    if config.embedding in encoders.POOLINGS:
        return own(config.embedding, config.batch_size)
    return encoders.load_encoder(config.embedding, device, config.batch_size)


def _fingerprint(model: torch.nn.Module, tokenizer: Any, *asked: str) -> str:
    """Of who answers: weights, from whatever files they were read, vocabulary, and what else decides about answers."""
    digest = hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), *asked]).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _implicit(config: AdaptiveConfig, lm: LatentLM) -> ImplicitReward:
    """The reward of a run of coconut reward. Raises ValueError if it speaks another model's tokens."""
    run = config.judge.model
    rewarding = load_model(run, "best", config.engine)
    if rewarding.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise ValueError(f"judge.model={run} scores the tokens of another model than {config.run}.")
    reference = match_dtypes(LatentLM.from_pretrained(reference_of(run)), rewarding, lm.device)
    return ImplicitReward(rewarding, reference, read_config(run)["beta"])


def _function(name: str) -> Callable[..., Any]:
    """Raises ValueError if there is no such function."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # where the command is given, as for python -m
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"function={name} is no MODULE:NAME that can be imported here: {error}") from None
    if not callable(found):
        raise ValueError(f"function={name} is {found!r}, which cannot be called.")
    return found
