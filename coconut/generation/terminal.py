"""Answer questions on the terminal: answers go to standard output, everything else to standard error."""

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
    """Print to standard error, so that standard output has the answers only."""
    print(text, file=sys.stderr)


def typed_questions() -> Iterator[str]:
    """Yield questions as they are typed, until an empty line."""
    note("Type one question per line; an empty line ends the program.")
    with contextlib.suppress(EOFError):
        while question := _next_line():
            yield question


def _next_line() -> str:
    """Read a line; ask again if it is not valid text."""
    while True:
        try:
            return input("? ").strip()
        except UnicodeDecodeError as error:
            note(f"error: the input is not {error.encoding} text: {error.reason}")


def converse(lm: LatentLM, show_thoughts: bool, options: dict[str, Any]) -> None:
    """Answer typed questions one by one, and print each token as it is generated."""
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
    """Answer one question and print the answer."""
    warn_of_unknown(lm, question)
    result = answer(lm, [question], **options)
    describe_answer(lm, result, show_thoughts)
    print(result.texts[0].strip())
    warn_of_truncation(bool(result.truncated[0]))


def describe_answer(lm: LatentLM, result: Generated, show_thoughts: bool) -> None:
    """Print the numbers of thoughts and tokens, and with `show_thoughts` the likeliest tokens of each thought."""
    count = int(result.num_thoughts[0])
    mode = f"{result.modes[0]}, " if result.modes[0] else ""
    note(f"[{mode}{count} thought{'s' * (count != 1)}, {int(result.lengths[0])} tokens]")
    if show_thoughts:
        for number, tokens in enumerate(logit_lens(lm, result.thoughts[0]), 1):
            likeliest = ", ".join(f"{text.strip() or repr(text)} {probability:.2f}" for text, probability in tokens)
            note(f"[thought {number}, likeliest tokens: {likeliest}]")


def warn_of_truncation(truncated: bool) -> None:
    """Print a warning if the answer was truncated."""
    if truncated:
        note("warning: the answer was truncated at the limit; raise max_new_tokens.")


def warn_of_unknown(lm: LatentLM, question: str) -> None:
    """Print a warning if words of the question are outside the vocabulary."""
    if unknown := unknown_in(lm.tokenizer, question):
        note(f"warning: not in the model's vocabulary: {', '.join(unknown)}.")
