"""Prepare training and validation data: read, tokenize, and check against the model and the task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coconut.config import TooLong, TrainConfig
from coconut.data.examples import Example, read_examples
from coconut.data.sequences import EpochView, fit_context, stage_variants, written_lengths
from coconut.data.tokenization import TokenizedData, tokenize, unknown_words, written_otherwise
from coconut.evaluation.gold_answers import readable
from coconut.methods import TEACHER, WRITTEN, At, Plan, Stage
from coconut.models.latent_lm import LatentLM
from coconut.tasks import TASKS
from coconut.utils.console import list_lengths, log

TEXTS_READ = 100  # examples whose tokens are compared with those of running text
SPANS_READ = 1000  # examples in which the thoughts without a part of the chain are counted


def read_splits(config: TrainConfig, files: dict[str, str]) -> dict[str, list[Example]]:
    """The examples of train and valid. Warns of questions that both have."""
    examples = {split: read_examples(files[split]) for split in ("train", "valid")}
    if shared := len({e.question for e in examples["train"]} & {e.question for e in examples["valid"]}):
        log(f"warning: {shared:,} questions of the validation data are in the training data too.")
    return examples | {"valid": examples["valid"][: config.valid_limit]}


def prepare_data(
    config: TrainConfig, plan: Plan, lm: LatentLM, split: str, examples: list[Example], file: str
) -> tuple[TokenizedData, list[Example]]:
    """The tokens and the text of the examples that training uses.

    Raises ValueError for examples that are too long for the model or whose gold answer the task would judge wrong,
    unless the configuration leaves them out. Raises ValueError for training examples without steps if the method needs
    steps.
    """
    data = tokenize(examples, lm.tokenizer, config.data.format, config.data.cache_dir)
    if unknown := unknown_words(data, lm.tokenizer):
        log(f"warning: {unknown:,} words of {file} are not in the tokenizer's vocabulary.")
    skip = config.data.too_long is TooLong.skip
    tokens, kept = fit_context(lambda whole: views_of_forms(whole, plan, lm), data, lm.max_sequence_length, skip, file)
    if len(kept) < len(data):
        log(f"Left out {len(data) - len(kept)} of {len(data)} {split} examples, longer than the model's context.")
    rows = [examples[i] for i in kept]
    right = readable(
        rows, tokens, lm.tokenizer, TASKS[config.data.required_task()], config.data.format,
        file=file, unreadable=config.data.unreadable,
    )  # fmt: skip
    if len(right) < len(kept):
        tokens, rows = tokens.select(right), [rows[i] for i in right]
    if split == "train" and (config.model.base or config.init):
        _warn_of_other_tokens(rows, lm, config, file)
    if split == "train" and any(stage.in_turn for stage in plan.stages):
        _refuse_without_steps(tokens, config.method, file)
    if split == "train" and any(term.at is At.answer_prompt for term in plan.terms):
        _refuse_without_answer_mark(tokens, config, file)
    if split == "train" and plan.stages[-1].form.slot.merges:
        _refuse_without_chains(tokens, config.method, file)
    elif split == "train" and any(term.spans for term in plan.terms):
        _refuse_without_spans(tokens, plan, lm, file)
    if split == "train" and any(term.objective == "steps" for term in plan.terms):
        short = _with_short_steps(tokens, plan, lm, skip, file)
        if len(short) < len(tokens):
            tokens, rows = tokens.select(short), [rows[i] for i in short]
    if split == "train" and any(form.name == TEACHER for form in plan.stages[0].together):
        _warn_of_empty_teachers(tokens, config, file)
    return tokens, rows


def _warn_of_other_tokens(examples: list[Example], lm: LatentLM, config: TrainConfig, file: str) -> None:
    """Say that a pretrained model reads tokens at the ends of segments that it does not know from running text."""
    read = examples[:TEXTS_READ]
    if places := written_otherwise(read, lm.tokenizer, config.data.format):
        ours, theirs = (" ".join(map(repr, tokens)) for tokens in places[0])
        log(
            f"warning: {file}: question, steps and answer are encoded each by itself, and in {len(places)} of the "
            f"first {len(read)} rows the tokens at their ends are others than in running text: {ours} in place of "
            f"{theirs}. A pretrained model knows the latter. Choose a data.format whose parts end in a newline, as by "
            "default."
        )


def plain_view(data: TokenizedData, plan: Plan, stage: Stage, lm: LatentLM) -> EpochView:
    """The data in one stage, with no other stages mixed in."""
    return EpochView(data, replace(plan, mixing_probability=0.0), stage, lm.special, seed=0, epoch=0)


def answers_view(data: TokenizedData, plan: Plan, stage: Stage, lm: LatentLM) -> EpochView:
    """The data in the form that inference is like, for the loss of what is written there."""
    return plain_view(data, replace(plan, terms=(WRITTEN,)), replace(stage, together=stage.together[:1]), lm)


def views_of_forms(data: TokenizedData, plan: Plan, lm: LatentLM) -> list[EpochView]:
    """The data in each set of sequences that training may make of it."""
    return [plain_view(data, plan, stage, lm) for stage in stage_variants(plan)]


def largest_examples(data: TokenizedData, plan: Plan, lm: LatentLM, count: int) -> list[tuple[EpochView, np.ndarray]]:
    """The `count` longest examples, in the form with the longest rows and in the one with the most passes.

    If thoughts are held to the chain, the examples with the longest chains as well, in the latter form.
    """
    views = views_of_forms(data, plan, lm)
    widest = max(range(len(views)), key=lambda k: views[k].longest.max())
    deepest = max(range(len(views)), key=lambda k: (views[k].passes.max(), k))
    chosen = [(views[k], views[k].longest) for k in {widest, deepest}]
    if any(term.spans for term in plan.terms):
        chosen.append((views[deepest], written_lengths(data, 0, 0)))
    return [(view, np.argsort(-lengths, kind="stable")[:count]) for view, lengths in chosen]


def _refuse_without_steps(data: TokenizedData, method: str, file: str) -> None:
    if without := np.flatnonzero(data.num_steps == 0).tolist():
        raise ValueError(
            f"{file}: {len(without)} of {len(data)} examples have no steps, the first of them example "
            f"{without[0] + 1}. {method} shows each example with a short answer and a long one, so that it needs a "
            "chain for each. Leave these examples out."
        )


def _refuse_without_chains(data: TokenizedData, method: str, file: str) -> None:
    if not (without := int((data.num_steps == 0).sum())):
        return
    if without == len(data):
        raise ValueError(f"{file}: no example has a chain, and {method} makes its thoughts of chains. Take other data.")
    log(f"note: {without:,} of {len(data):,} training examples have no chain: {method} learns not to think there.")


def _refuse_without_answer_mark(data: TokenizedData, config: TrainConfig, file: str) -> None:
    if without := np.flatnonzero(data.answer_marks == 0).tolist():
        raise ValueError(
            f"{file}: {config.method} compares hidden states at the last token before the answer, but in "
            f"{len(without)} of {len(data)} examples nothing precedes it, the first of them example {without[0] + 1}. "
            f"An answer is written as {config.data.format.answer!r}: put a text before {{}}, such as '### {{}}' "
            "(data.format.answer)."
        )


def _refuse_without_spans(data: TokenizedData, plan: Plan, lm: LatentLM, file: str) -> None:
    """Raise ValueError if no thought of the last stage stands for a part of a chain.

    Say how many thoughts do not, and how many words no thought stands for.
    """
    view = plain_view(data, plan, plan.stages[-1], lm)
    lengths = [[len(span) for span in view.layouts(i)[0].spans] for i in range(min(len(data), SPANS_READ))]
    empty = sum(not length for spans in lengths for length in spans)
    count = sum(map(len, lengths))
    names = ", ".join(term.name for term in plan.terms if term.spans)
    if not count:
        raise ValueError(
            f"Thoughts are held to the steps of the chain ({names}), but there are no thoughts in the last stage. Set "
            "curriculum.thoughts_per_step and curriculum.max_stage to at least 1."
        )
    if empty == count:
        raise ValueError(
            f"{file}: thoughts are held to the steps of the chain ({names}), but the first {len(lengths)} examples "
            f"have no steps that thoughts stand for. Take data with chains, or leave the term out: terms.{names}=0."
        )
    if empty:
        log(f"note: in the first {len(lengths):,} training examples {empty / count:.0%} of the thoughts stand for no "
            f"part of a chain, since it is too short: they learn nothing from {names}.")  # fmt: skip
    words = int((written_lengths(data, 0, 0) - written_lengths(data, view.form(0).steps_cut, 0))[: len(lengths)].sum())
    if left := words - sum(map(sum, lengths)):
        log(f"note: {left / words:.0%} of the words of the steps that are not written have no thought of their own, "
            "and are no targets. More thoughts take more of them.")  # fmt: skip


def _with_short_steps(data: TokenizedData, plan: Plan, lm: LatentLM, skip: bool, file: str) -> np.ndarray:
    """Indices of the examples whose steps, with their thoughts, fit into the context of the step decoder, that of `lm`.

    Unless `skip`, raises ValueError with the first examples that do not fit.
    """
    context, whole_chains = lm.max_sequence_length, written_lengths(data, 0, 0)
    longest = np.zeros(len(data), np.int64)
    for view in views_of_forms(data, plan, lm):
        thoughts = view.form(0).thoughts_per_step or 1
        for i in np.flatnonzero(whole_chains + thoughts > context).tolist():  # no other example can have such a step
            steps = [len(step) for item in view.layouts(i) for step in item.spans]
            longest[i] = max(longest[i], thoughts + max(steps, default=0))
    short = np.flatnonzero(longest <= context)
    count = len(data) - len(short)
    if count and not (skip and len(short)):
        shown = list_lengths("example", np.flatnonzero(longest > context).tolist(), longest.tolist())
        raise ValueError(
            f"{file}: in {count} of {len(data)} examples, a step and the thoughts that stand for it are longer "
            f"than the step decoder's context of {context} tokens: {shown}. The last thoughts stand for all further "
            "steps, so that with more thoughts these are shorter. Leave the examples out with data.too_long=skip, or "
            "train without the decoder (terms.steps=0)."
        )
    if count:
        log(f"Left out {count} of {len(data)} examples of {file}, with steps longer than the step decoder's context.")
    return short


def _warn_of_empty_teachers(data: TokenizedData, config: TrainConfig, file: str) -> None:
    cut = config.curriculum.teacher_steps_cut
    if not (empty := int((data.num_steps <= cut).sum())):
        return
    if empty == len(data):
        raise ValueError(
            f"{file}: no chain has more than {cut} steps, and the teacher does not write the last {cut}, so it would "
            "teach nothing. Set curriculum.teacher_steps_cut=0."
        )
    log(f"note: {empty:,} of {len(data):,} training examples have no more than {cut} steps: their teacher writes the "
        "answer alone.")  # fmt: skip
