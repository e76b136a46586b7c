"""The command that asks a trained model: one question, those of a file, or those that are typed in."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coconut.data.examples import BadRow, existing, json_rows
from coconut.data.tokenization import encode_questions, unknown_in
from coconut.evaluation.evaluator import room_for_question
from coconut.generation.config import GenerateConfig, StopRule
from coconut.generation.generate import Generated, answer, generate, logit_lens, longest_first, pad_rows
from coconut.utils.files import decode_utf8, read_utf8, write_text
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

JSON_NAMES = (".json", ".jsonl", ".ndjson")
TEXT_NAMES = (".txt", ".text", "")


def run(config: GenerateConfig) -> int:
    """Answer one question with a trained run, or those of a file, or those that are typed in."""
    from coconut.engine.base import autocast
    from coconut.engine.launcher_env import read_launcher_env
    from coconut.runs.loading import classifier_of, load_model, load_run
    from coconut.utils.console import silence_libraries

    if read_launcher_env().rank:
        return 0  # of several processes one is enough
    silence_libraries()
    typed = not config.question and not config.file
    if typed and not sys.stdin.isatty():
        raise ValueError('There is no question. Ask one with question="...", question=- (standard input) or file=FILE.')
    question = config.question
    if question == "-":
        question = decode_utf8(sys.stdin.buffer.read(), "Standard input").strip()
    if config.question and not question:
        raise ValueError("Standard input held no question.")
    questions = read_questions(config.file) if config.file else []
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {"num_thoughts": config.num_thoughts, "max_new_tokens": config.max_new_tokens}
    if config.mode:
        options["mode"] = config.mode
    if config.stop is StopRule.classifier:
        trained = load_run(config.run, config.checkpoint, config.engine)
        lm, options["stop"] = trained.lm, classifier_of(config.run, trained).stop
    else:
        lm = load_model(config.run, config.checkpoint, config.engine)
    if config.policy:
        return _by_policy(lm, [question] if question else questions, config)
    if config.temperature > 0:
        options |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    with autocast(lm.device, config.engine.precision):
        if question:
            _warn_of_unknown(lm, question)
            _print_answer(lm, answer(lm, [question], **options), config.show_thoughts)
        elif questions:
            _answer_file(lm, questions, config, options)
        else:
            _converse(lm, config.show_thoughts, options)
    return 0


def _print_answer(lm: LatentLM, result: Generated, show_thoughts: bool, spoken: bool = False) -> None:
    count = int(result.num_thoughts[0])
    mode = f"{result.modes[0]}, " if result.modes[0] else ""
    print(f"[{mode}{count} thought{'s' * (count != 1)}, {int(result.lengths[0])} tokens]", file=sys.stderr)
    if show_thoughts:
        for number, tokens in enumerate(logit_lens(lm, result.thoughts[0]), 1):
            said = ", ".join(f"{text.strip() or repr(text)} {probability:.2f}" for text, probability in tokens)
            print(f"[thought {number} is close to: {said}]", file=sys.stderr)
    if not spoken:
        print(result.texts[0].strip())
    _warn_of_cut(bool(result.truncated[0]))


def _warn_of_cut(cut: bool) -> None:
    if cut:
        print("warning: the answer was cut at the limit; raise max_new_tokens.", file=sys.stderr)


def _warn_of_unknown(lm: LatentLM, question: str) -> None:
    if unknown := unknown_in(lm.tokenizer, question):
        print(f"warning: the model has no word for {', '.join(unknown)}.", file=sys.stderr)


def read_questions(path: str) -> list[str]:
    """One a line, or the `question` of each row of a JSON list or of one JSON object a line.

    What the text begins with says which of them it is, if the name does not. Raises FileNotFoundError, or ValueError
    if there are none, or if the file may be a table of another kind, whose lines are no questions.
    """
    file = existing(path, "Name a text file with a question a line, or JSON rows with a question each.")
    suffix, text = file.suffix.lower(), read_utf8(file)
    if suffix in JSON_NAMES or re.match(r'\s*(\[\s*)?\{\s*"', text):
        found = []
        for where, row in json_rows(file):
            question = row.get("question") if isinstance(row, dict) else None
            if not isinstance(question, str) or not question.strip():
                reason = row if isinstance(row, BadRow) else "there is no question in it."
                raise ValueError(f"{path}, {where}: {reason}")
            found.append(question)
    elif suffix in TEXT_NAMES:
        found = [line.strip() for line in text.split("\n") if line.strip()]
    else:
        raise ValueError(
            f"{path}: its name says neither text ({', '.join(filter(None, TEXT_NAMES))}), a question a line, nor JSON "
            f"({', '.join(JSON_NAMES)}). Write it as one of them."
        )
    if not found:
        raise ValueError(f"{path} holds no question.")
    return found


def _by_policy(lm: LatentLM, questions: list[str], config: GenerateConfig) -> int:
    """Each question in the way that a policy of coconut.adaptive chooses for it."""
    from coconut.adaptive.backends import LatentBackend
    from coconut.adaptive.chooser import Chooser
    from coconut.engine.base import autocast

    chooser = Chooser(config.policy, lm, config.batch_size)
    limit = config.max_new_tokens or chooser.about["max_new_tokens"]
    backend = LatentBackend(lm, config.run, config.batch_size, limit)
    for asked in [questions] if questions else ([question] for question in _typed()):
        if not config.file:
            _warn_of_unknown(lm, asked[0])
        try:
            with autocast(lm.device, config.engine.precision):
                found = chooser.answer(backend, asked, config.seed)
        except ValueError as error:
            if questions:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        if config.file:
            rows = [
                {"question": question, "text": one.text, "truncated": one.reply.truncated, "passes": one.reply.passes,
                 "num_thoughts": one.reply.num_thoughts[one.taken], "chosen": one.settings}
                for question, one in zip(asked, found, strict=True)
            ]  # fmt: skip
            _write(lm, rows, config)
        else:
            print(f"[{found[0].label}: {found[0].reply.passes:g} forward passes]", file=sys.stderr)
            print(found[0].text)
            _warn_of_cut(found[0].reply.truncated)
    return 0


def _typed() -> Iterator[str]:
    """Questions as they are typed, up to an empty line."""
    print("Each question by itself; an empty line ends it.", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while question := _next():
            yield question


def _next() -> str:
    while True:
        try:
            return input("? ").strip()
        except UnicodeDecodeError as error:
            print(f"error: what was typed is not {error.encoding} text: {error.reason}", file=sys.stderr)


def _answer_file(lm: LatentLM, questions: list[str], config: GenerateConfig, options: dict[str, Any]) -> None:
    """A JSON object a line, in the order of the questions."""
    encoded = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    if len(encoded[longest]) > room_for_question(lm, config.num_thoughts, config.mode):
        raise ValueError(
            f"{config.file}, question {longest + 1}: it has {len(encoded[longest])} tokens, which leaves no room for "
            f"an answer in the model's context of {lm.max_sequence_length} tokens."
        )
    found: dict[int, dict[str, Any]] = {}
    for places in longest_first(encoded, config.batch_size):
        out = generate(lm, *pad_rows([encoded[i] for i in places], lm.special.pad), **options)
        for row, i in enumerate(places):
            found[i] = {"question": questions[i], "text": out.texts[row].strip(), "truncated": bool(out.truncated[row]),
                        "num_thoughts": int(out.num_thoughts[row])}  # fmt: skip
            if out.modes[row]:
                found[i]["mode"] = out.modes[row]
            if config.show_thoughts:
                found[i]["thoughts"] = logit_lens(lm, out.thoughts[row][: int(out.num_thoughts[row])])
    _write(lm, [found[i] for i in range(len(questions))], config)


def _write(lm: LatentLM, rows: list[dict[str, Any]], config: GenerateConfig) -> None:
    """The answers, with the words of a question that the model does not know, where there are any."""
    words = [unknown_in(lm.tokenizer, row["question"]) for row in rows]
    rows = [{**row, **({"unknown": unknown} if unknown else {})} for row, unknown in zip(rows, words, strict=True)]
    if without := [number for number, unknown in enumerate(words) if unknown]:
        print(
            f"warning: the model does not know all words of {len(without)} of {len(rows)} questions. The first is "
            f"question {without[0] + 1}: {', '.join(words[without[0]])}.",
            file=sys.stderr,
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if config.output:
        write_text(Path(config.output), lines)
        print(f"{len(rows)} answers are in {config.output}", file=sys.stderr)
    else:
        print(lines, end="")


def _converse(lm: LatentLM, show_thoughts: bool, options: dict[str, Any]) -> None:
    """Questions as they are typed, answers as they come. No question knows of another."""
    from transformers import TextStreamer

    as_text = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    for question in _typed():
        _warn_of_unknown(lm, question)
        streamer = TextStreamer(lm.tokenizer, skip_prompt=True, **as_text)  # pyright: ignore
        try:
            _print_answer(lm, answer(lm, [question], streamer=streamer, **options), show_thoughts, spoken=True)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


main = application("generate", GenerateConfig, run)

if __name__ == "__main__":
    main()
