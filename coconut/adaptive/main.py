"""coconut adaptive: collect the table of outcomes, learn configuration policies from it, and evaluate them."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from coconut.adaptive import backends
from coconut.adaptive.chooser import policy_metadata
from coconut.adaptive.config import AdaptiveConfig, JudgeKind
from coconut.adaptive.encoders import Encoder, latent_encoder, load_encoder, model_encoder
from coconut.adaptive.experiments import run_experiments, studies
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


def run(config: AdaptiveConfig, only_table: bool = False) -> int:
    """Collect the table of outcomes, unless config.table names one; then learn and evaluate policies, if asked for."""
    silence_libraries()
    if only_table and config.table:
        raise ValueError(
            f"table={config.table} exists already. To learn from it, run coconut adaptive without the word table."
        )
    source = OutcomeTable.read(config.table) if config.table else _inputs(config)
    if not only_table and config.num_train_questions >= len(source.questions):
        raise ValueError(
            f"num_train_questions={config.num_train_questions} leaves none of {len(source.questions)} questions for "
            "the test. Lower it, or raise limit."
        )
    with exclusive_lock(config.folder):
        table = source if isinstance(source, OutcomeTable) else make_table(config, source)
        if not only_table:
            learn_and_report(config, table)
    return 0


def learn_and_report(config: AdaptiveConfig, table: OutcomeTable) -> None:
    """Learn and evaluate policies from a table; write the studies, the page, and the first policy."""
    folder, default = config.folder, table.space.find(config.default or table.about.get("default", {}))
    results = run_experiments(
        table, config.policy, cost=config.cost, default=default, num_train_questions=config.num_train_questions,
        seeds=config.seeds, seed=config.seed,
    )  # fmt: skip
    all_studies = studies(results)
    for study in all_studies.values():
        study.write(folder)
    results.learned.policy.save(folder / POLICY, {**policy_metadata(table), "cost": config.cost})
    log(on_screen(all_studies))
    write_text(folder / PAGE, adaptive_page(all_studies, config.name, folder))
    log(f"Policy: {folder / POLICY}\nPage: {folder / PAGE}\nData: {folder}")


class Inputs(NamedTuple):
    """What a table of outcomes is made from: a backend, an encoder of questions, a judge, and examples."""

    backend: backends.Backend
    encode: Encoder
    judge: Judge
    vote: Vote
    examples: list[Example]
    file: str
    device: torch.device

    @property
    def questions(self) -> list[str]:
        return [example.question for example in self.examples]


def make_table(config: AdaptiveConfig, inputs: Inputs) -> OutcomeTable:
    """Collect the table of outcomes and write it to the command's folder. Logged answers are reused."""
    space, questions = Space.of(config.space), inputs.questions
    log(f"{len(questions):,} questions of {inputs.file} in {len(space)} configurations")
    with autocast(inputs.device, config.engine.precision):
        replies = backends.collect_answers(inputs.backend, questions, space, config.folder / LOG, seed=config.seed)
        embeddings = inputs.encode(questions).numpy()

        def judged_by(judge: Judge) -> np.ndarray:
            columns = enumerate(zip(*replies, strict=True))
            scores = [judge_scores(judge, inputs.examples, column, space.settings(c)) for c, column in columns]
            return np.array(scores, np.float32).T

        score = judged_by(inputs.judge)
        correct = score if isinstance(inputs.judge, ExactJudge) else judged_by(ExactJudge(inputs.vote))
    steps = np.array([len(example.steps) for example in inputs.examples])
    passes = np.array([[reply.passes for reply in row] for row in replies], np.float32)
    about = {
        "backend": inputs.backend.name, "task": inputs.vote.task.name, "embedding": config.embedding,
        "file": inputs.file, "sha256": sha256(inputs.file), "judge": config.judge.kind.value, "seed": config.seed,
        "default": config.default, "max_new_tokens": config.max_new_tokens, "checkpoint": config.checkpoint,
    }  # fmt: skip
    table = OutcomeTable(space, questions, steps, score, correct, passes, embeddings, about)
    table.write(config.folder / TABLE)
    log(f"Table: {config.folder / TABLE}")
    return table


def _inputs(config: AdaptiveConfig) -> Inputs:
    """Load the inputs and drop duplicate and too long questions. Raises ValueError if no question is left."""
    inputs = _inputs_of_run(config) if config.run else _inputs_of_other_model(config)
    space = Space.of(config.space)
    backends.refuse_unknown(space, inputs.backend)
    distinct = {example.question: example for example in inputs.examples}
    fits = backends.fit_all(inputs.backend, list(distinct), space)
    fitting = [example for example, fits_all in zip(distinct.values(), fits, strict=True) if fits_all]
    for count, why in ((len(inputs.examples) - len(distinct), "duplicates"),
                       (len(distinct) - len(fitting), "too long in one of the configurations")):  # fmt: skip
        if count:
            log(f"{count:,} questions are left out: {why}.")
    if not fitting:
        raise ValueError(f"No question of {inputs.file} leaves room for an answer in every configuration.")
    return inputs._replace(examples=fitting)


def _inputs_of_other_model(config: AdaptiveConfig) -> Inputs:
    """The inputs for a Hugging Face model or a Python function."""
    assert config.task
    device, file = set_up_device(config.engine), file_of_split({}, config.split, config.data)
    examples = read_examples(file)[: config.limit]
    vote = Vote(TASKS[config.task], config.format)
    right = readable(examples, None, None, vote.task, vote.form, file=file, unreadable=config.unreadable)
    examples = [examples[i] for i in right]
    own_encoder = None
    if config.base:
        limits = config.batch_size, config.max_new_tokens
        backend = backends.CausalModelBackend(config.base, config.prompt, device, *limits)
        backend.name += f" {_fingerprint(config, backend.model, backend.tokenizer, backend.tokenizer.chat_template)}"
        own_encoder = partial(model_encoder, backend.model.base_model, backend.tokenizer)
    else:
        keys = frozenset(Space.of(config.space).keys)
        backend = backends.FunctionBackend(_function(config.function), config.function, config.calls, keys)
    encode = load_encoder(config.embedding, device, config.batch_size, own_encoder)
    return Inputs(backend, encode, _judge(config, vote, device), vote, examples, file, device)


def _inputs_of_run(config: AdaptiveConfig) -> Inputs:
    """The inputs for a run or a saved model."""
    if not Path(config.run).exists() and not config.output:
        raise ValueError(
            f"There is no folder {config.run}. Name a trained run. For a model of the hub add output=FOLDER."
        )
    is_run = Path(config.run, CONFIG).is_file() and not Path(config.run, REASONING_FILE).is_file()
    lm = load_model(config.run, config.checkpoint, config.engine)
    data = read_config(config.run)["data"] if is_run else {}
    task, file = config.task or data.get("task"), getattr(config.data, config.split)
    if not task or not (is_run or file):
        raise ValueError(f"{config.run} is a saved model and not a run. Add task=TASK and data.{config.split}=FILE.")
    file = file_of_split(data, config.split, config.data)
    vote = Vote(TASKS[task], lm.reasoning.format)
    name = f"{Path(config.run).name} {_fingerprint(config, lm, lm.tokenizer, json.dumps(lm.reasoning.as_dict()))}"
    backend = backends.LatentBackend(lm, name, config.batch_size, config.max_new_tokens)
    implicit = config.judge.kind is JudgeKind.implicit
    judge = ImplicitJudge(backend, _implicit_reward(config, lm), vote) if implicit else _judge(config, vote, lm.device)
    encode = load_encoder(config.embedding, lm.device, config.batch_size, partial(latent_encoder, lm))
    examples = read_examples(file)[: config.limit]
    gold, readable_indices = read_back(
        lm, examples, vote.task, file=file, unreadable=config.unreadable, keep_unknown=True,
        cache_dir=data.get("cache_dir"),
    )  # fmt: skip
    warn_of_limit(gold, lm.reasoning.forms(), config.max_new_tokens or lm.reasoning.max_new_tokens, file)
    if unknown := unknown_words(gold, lm.tokenizer):
        log(f"warning: {unknown:,} words of {file} are not in the model's vocabulary.")
    return Inputs(backend, encode, judge, vote, [examples[i] for i in readable_indices], file, lm.device)


def _judge(config: AdaptiveConfig, vote: Vote, device: torch.device) -> Judge:
    exact = config.judge.kind is JudgeKind.exact
    return ExactJudge(vote) if exact else PretrainedJudge(config.judge.model, vote, device)


def _fingerprint(config: AdaptiveConfig, model: torch.nn.Module, tokenizer: Any, format_of_prompt: str | None) -> str:
    """What affects answers besides the space: a hash of weights, vocabulary and format; the limit; the precision."""
    digest = hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), str(format_of_prompt)]).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{digest.hexdigest()[:12]} max_new_tokens={config.max_new_tokens} {config.engine.precision}"


def _implicit_reward(config: AdaptiveConfig, lm: LatentLM) -> ImplicitReward:
    """The implicit reward of a run of coconut reward. Raises ValueError if its vocabulary is not that of the model."""
    run = config.judge.model
    reward_model = load_model(run, "best", config.engine)
    if reward_model.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise ValueError(f"judge.model={run} and {config.run} have different vocabularies.")
    reference = match_dtypes(LatentLM.from_pretrained(reference_of(run)), reward_model, lm.device)
    return ImplicitReward(reward_model, reference, read_config(run)["beta"])


def _function(name: str) -> Any:
    """Import MODULE:NAME. Raises ValueError if there is no such function."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # search the current folder first, as python -m does
    try:
        function_object = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"function={name} is no MODULE:NAME that can be imported: {error}") from None
    if not callable(function_object):
        raise ValueError(f"function={name} is {function_object!r}, which cannot be called.")
    return function_object
