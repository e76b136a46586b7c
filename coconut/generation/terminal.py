"""Questions and answers on the terminal: answers on standard output, everything about them on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from coconut.data.tokenization import unknown_in
from coconut.generation.generate import Generated, answer, logit_lens

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def note(text: str) -> None:
    """Print on standard error, so that standard output holds the answers alone."""
    print(text, file=sys.stderr)


def typed_questions() -> Iterator[str]:
    """Questions as they are typed, up to an empty line."""
    note("Type one question a line; an empty line ends the program.")
    with contextlib.suppress(EOFError):
        while question := _next_line():
            yield question


def _next_line() -> str:
    while True:
        try:
            return input("? ").strip()
        except UnicodeDecodeError as error:
            note(f"error: what was typed is not {error.encoding} text: {error.reason}")


def converse(lm: LatentLM, show_thoughts: bool, options: dict[str, Any]) -> None:
    """Answer typed questions, each by itself, token by token."""
    from transformers import TextStreamer

    as_text = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    for question in typed_questions():
        warn_of_unknown(lm, question)
        streamer = TextStreamer(lm.tokenizer, skip_prompt=True, **as_text)  # pyright: ignore
        try:
            result = answer(lm, [question], streamer=streamer, **options)
            describe_answer(lm, result, show_thoughts)
            warn_of_truncation(bool(result.truncated[0]))
        except ValueError as error:
            note(f"error: {error}")


def print_answer(lm: LatentLM, question: str, show_thoughts: bool, options: dict[str, Any]) -> None:
    """Answer one question."""
    warn_of_unknown(lm, question)
    result = answer(lm, [question], **options)
    describe_answer(lm, result, show_thoughts)
    print(result.texts[0].strip())
    warn_of_truncation(bool(result.truncated[0]))


def describe_answer(lm: LatentLM, result: Generated, show_thoughts: bool) -> None:
    """The number of thoughts and tokens, and the tokens that are closest to each thought."""
    count = int(result.num_thoughts[0])
    mode = f"{result.modes[0]}, " if result.modes[0] else ""
    note(f"[{mode}{count} thought{'s' * (count != 1)}, {int(result.lengths[0])} tokens]")
    if show_thoughts:
        for number, tokens in enumerate(logit_lens(lm, result.thoughts[0]), 1):
            nearest = ", ".join(f"{text.strip() or repr(text)} {probability:.2f}" for text, probability in tokens)
            note(f"[thought {number} is close to: {nearest}]")


def warn_of_truncation(truncated: bool) -> None:
    if truncated:
        note("warning: the answer was cut at the limit; raise max_new_tokens.")


def warn_of_unknown(lm: LatentLM, question: str) -> None:
    if unknown := unknown_in(lm.tokenizer, question):
        note(f"warning: the model has no word for {', '.join(unknown)}.")
