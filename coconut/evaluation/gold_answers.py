"""Check gold answers: encoded, decoded and read again they must be judged right and fit the limit of new tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.config import Unreadable
from coconut.data.examples import SHOWN_PROBLEMS, Example
from coconut.data.sequences import written_lengths
from coconut.data.tokenization import TokenizedData, tokenize, unknown_id, unknown_in
from coconut.methods import Form, PromptFormat, Reasoning
from coconut.tasks import Task
from coconut.tasks.chain import read_answer, read_steps
from coconut.utils.console import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from coconut.models.latent_lm import LatentLM

ROOM = 1.25  # the default limit of new tokens, as a multiple of the longest gold text
BATCH = 4096  # rows decoded at once


def readable(
    examples: Sequence[Example], data: TokenizedData | None, tokenizer: PreTrainedTokenizerFast | None, task: Task,
    form: PromptFormat, *, file: str, unreadable: Unreadable, keep_unknown: bool = False,
) -> np.ndarray:  # fmt: skip
    """Indices of the examples whose gold text, encoded and decoded, is read and judged right.

    data: the tokenized examples; without them, the gold texts themselves are read.
    unreadable: with `error`, the other rows raise a ValueError that names them; with `skip` they are left out.
    keep_unknown: keep rows whose answer has words that the tokenizer lacks, for a test that counts them as wrong.
    """
    texts = (
        (form.written(example.steps, example.answer) for example in examples)
        if data is None or tokenizer is None
        else _decoded(data, tokenizer)
    )
    wrong, other_steps = _misread(examples, texts, task, form)
    if other_steps:
        row, count = next(iter(other_steps.items()))
        log(
            f"warning: {file}: in {len(other_steps):,} rows the number of steps that is read back differs from the "
            f"number in the row; the first is {_location(examples, row)}, read as {count}, with "
            f"{len(examples[row].steps)} in the row. Measurements by steps use the number that is read. Choose a "
            f"data.format.step whose end does not occur within a step; it is {form.step_end!r}."
        )
    unknown = _without_words(examples, wrong, data, tokenizer, form)
    if unknown and keep_unknown:
        first_row, words = next(iter(unknown.items()))
        log(
            f"warning: the tokenizer has no words for {len(unknown):,} of {len(examples):,} answers of {file}, which "
            f"are counted as wrong. The first is {_location(examples, first_row)}: {', '.join(words)}."
        )
        wrong = {row: read for row, read in wrong.items() if row not in unknown}
    if wrong and unreadable is Unreadable.error:
        problems = [
            _describe_misread(examples, row, wrong[row], unknown.get(row)) for row in list(wrong)[:SHOWN_PROBLEMS]
        ]
        more = f"\n  and {len(wrong) - len(problems)} more" if len(wrong) > len(problems) else ""
        raise ValueError(
            f"{file}: of {len(examples):,} gold answers {len(wrong):,} would be judged wrong:\n"
            + "\n".join(problems) + more
            + f"\nAn answer is written as {form.answer!r}, a step as {form.step!r} (data.format), and answers are "
            f"judged by the task {task.name}. Change the rows, the format or the task, or leave such rows out with "
            "unreadable=skip (data.unreadable=skip in a training)."
        )  # fmt: skip
    kept = np.array([row for row in range(len(examples)) if row not in wrong], np.int64)
    if wrong and not len(kept):
        raise ValueError(f"{file}: no gold answer is judged right; is it data of the task {task.name}?")
    if wrong:
        log(f"Left out {len(wrong):,} of {len(examples):,} rows of {file}, whose gold answer would be judged wrong.")
    return kept


def read_back(
    lm: LatentLM, examples: Sequence[Example], task: Task, *, file: str, unreadable: Unreadable,
    keep_unknown: bool = False, cache_dir: str | None = None,
) -> tuple[TokenizedData, np.ndarray]:  # fmt: skip
    """The examples that are `readable` with a model's tokenizer and format: their tokens, and their indices."""
    form = lm.reasoning.format
    data = tokenize(examples, lm.tokenizer, form, cache_dir)
    kept = readable(
        examples, data, lm.tokenizer, task, form, file=file, unreadable=unreadable, keep_unknown=keep_unknown
    )
    return data if len(kept) == len(data) else data.select(kept), kept


def _misread(
    examples: Sequence[Example], texts: Iterable[str], task: Task, form: PromptFormat
) -> tuple[dict[int, str | None], dict[int, int]]:
    """Two mappings by row index: the answer that is read, where it is judged wrong; the steps read, where they differ.

    An answer is None if none is found.
    """
    judged: dict[tuple[str | None, str], bool] = {}
    wrong: dict[int, str | None] = {}
    other_steps: dict[int, int] = {}
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        pair = read_answer(text, form), example.answer
        if pair not in judged:
            judged[pair] = task.judge(*pair)
        if not judged[pair]:
            wrong[row] = pair[0]
        if (count := len(read_steps(text, form))) != len(example.steps):
            other_steps[row] = count
    return wrong, other_steps


def _decoded(data: TokenizedData, tokenizer: PreTrainedTokenizerFast) -> Iterable[str]:
    """The text of chain and answer of each row, decoded from its tokens."""
    begins, ends = data.bounds[data.first[:-1]], data.starts[1:] - 1
    for first in range(0, len(data), BATCH):
        part = range(first, min(first + BATCH, len(data)))
        rows = [data.tokens[begins[i] : ends[i]].tolist() for i in part]
        yield from tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)


def _without_words(
    examples: Sequence[Example], rows: Iterable[int], data: TokenizedData | None, tokenizer: Any, form: PromptFormat
) -> dict[int, list[str]]:
    """Those of `rows` whose answer has words that the tokenizer lacks, with these words."""
    unknown = None if data is None else unknown_id(tokenizer)
    if data is None or unknown is None:
        return {}
    begins = data.bounds[data.first[1:] - 2]
    found = [row for row in rows if (data.tokens[begins[row] : data.starts[row + 1]] == unknown).any()]
    return {row: unknown_in(tokenizer, form.fill(form.answer, examples[row].answer)) for row in found}


def _location(examples: Sequence[Example], row: int) -> str:
    return examples[row].where or f"example {row + 1}"


def _describe_misread(examples: Sequence[Example], row: int, read: str | None, unknown: list[str] | None) -> str:
    what = "no answer is found" if read is None else f"{_brief(read)} is read"
    why = f"the tokenizer has no word for {', '.join(unknown)}" if unknown else what
    return f"  {_location(examples, row)}, answer {_brief(examples[row].answer)}: {why}"


def _brief(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def target_lengths(data: TokenizedData, forms: Iterable[Form | Reasoning]) -> np.ndarray:
    """(N,) tokens of the gold text with the end of the sequence, in that of `forms` in which it is longest."""
    return np.max([written_lengths(data, form.steps_cut, form.tokens_cut) for form in forms], axis=0)


def limit_for(data: Iterable[TokenizedData], forms: Sequence[Form | Reasoning], least: int) -> int:
    """The default limit of new tokens: ROOM times the longest gold text, at least `least`."""
    return max(least, *(math.ceil(ROOM * int(target_lengths(part, forms).max())) for part in data))


def warn_of_limit(
    data: TokenizedData, forms: Sequence[Form | Reasoning], limit: int, file: str, key: str = "max_new_tokens"
) -> None:
    """Log a warning if gold texts of a file exceed the limit of new tokens that the option `key` sets."""
    long = target_lengths(data, forms)
    if over := int((long > limit).sum()):
        log(
            f"warning: {over:,} of {len(data):,} gold texts of {file} have more tokens than {key}={limit} allows, so "
            f"that no model can write them. The longest has {long.max():,}. Raise {key}."
        )
