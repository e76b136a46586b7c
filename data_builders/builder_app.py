"""The command that all builders share: generate or read rows, then write the data set, or compare it with a file.

A builder's module describes its task in one `Builder`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from coconut.utils.overrides import as_arguments
from coconut.utils.pretrained import explain_load_errors, load_pretrained
from data_builders.dataset_writer import Card, Row, WrittenRow, check_place, shared_questions, write_splits
from data_builders.parallel_generation import Recipe, make_splits
from data_builders.release_formats import SourceKeys
from data_builders.statistics import Measures, compare, table


def text_key(row: Row) -> int:
    """The key of a question for tasks in which two questions are equal only if their texts are."""
    return int.from_bytes(blake2b(row["question"].encode(), digest_size=8).digest())


@dataclass(frozen=True)
class Builder(Card):
    """What a task defines. Functions take the build's configuration.

    read: the rows of a released file.
    read_splits: the rows of all splits, and their entries of the manifest, if reading a file is not enough.
    key: as in `Recipe`. alike: whether two rows with equal keys ask the same.
    command: the NAME of `coconut data NAME`, if it is not the task's.
    recipe, counts, made: for tasks whose rows can be generated, how, how many of each split by default, and the
        entries of the manifest.
    """

    read: Callable[[Any, str], list[Row]]
    measure: Callable[[Row], Measures]
    key: Callable[[Row], int] = text_key
    alike: Callable[[Row, Row], bool] = lambda row, other: row["question"] == other["question"]
    read_splits: Callable[[Any], tuple[dict[str, list[Row]], dict[str, Any]]] | None = None
    command: str = ""
    recipe: Callable[[Any], Recipe] | None = None
    counts: Callable[[Any], dict[str, int]] = lambda config: {}
    made: Callable[[Any], dict[str, Any]] = lambda config: {}


def run(config: SourceKeys, builder: Builder) -> None:
    """Run a build. Raises ValueError for what the user can correct."""
    if config.compare:
        _compare(config, builder)
        return
    if config.files or not builder.recipe:
        read, made = _read(config, builder)
        splits = {
            split: [WrittenRow.of(row, builder.key(row), builder.measure(row)) for row in rows]
            for split, rows in read.items()
        }
    else:
        counts = builder.counts(config) | {split: n for split, n in config.counts.items() if n is not None}
        check_place(config.out_dir, config.name, [split for split, count in counts.items() if count], builder.task)
        made = builder.made(config)
        print(f"Making {sum(counts.values()):,} rows, {_in_words(made)}", flush=True)
        splits = make_splits(builder.recipe(config), counts, config.seed, config.num_workers)
    shared = shared_questions(splits, builder.alike)
    made = {"seed": config.seed, **made}
    write_splits(config.out_dir, config.name, splits, made, shared, builder, command(config, builder))


def command(config: SourceKeys, builder: Builder) -> str:
    """The command line that makes the same data set again."""
    arguments = as_arguments(config, (*config.change_no_row, "dataset"))
    return shlex.join(["coconut", "data", builder.command or builder.task, *arguments])


def _in_words(made: dict[str, Any]) -> str:
    """The dials as text: "preset=released, nodes=28, ..."."""
    values = {"preset": made.get("preset"), **made["dials"]}
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def _read(config: SourceKeys, builder: Builder) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    if builder.read_splits:
        return builder.read_splits(config)
    return config.read(lambda path: builder.read(config, path)), {"sources": config.described()}


def _compare(config: SourceKeys, builder: Builder) -> None:
    assert config.compare
    there = builder.read(config, config.compare)
    if config.files or not builder.recipe:
        rows = [row for split in _read(config, builder)[0].values() for row in split]
        here = [builder.measure(row) for row in rows]
    else:
        made = make_splits(builder.recipe(config), {"train": config.compare_rows}, config.seed, config.num_workers)
        rows, here = [json.loads(one.line) for one in made["train"]], [one.measures for one in made["train"]]
    others = [builder.measure(row) for row in there]
    if config.tokenizer:
        lengths = [token_lengths(part, config.tokenizer) for part in (rows, there)]
        here = [a | b for a, b in zip(here, lengths[0], strict=True)]
        others = [a | b for a, b in zip(others, lengths[1], strict=True)]
    print(table(compare(here, others), f"{len(rows):,} rows here", f"{len(there):,} rows of the file"))
    if alone := sorted({name for m in here for name in m} ^ {name for m in others for name in m}):
        print(f"Only one of the two has: {', '.join(alone)}.")


def token_lengths(rows: Sequence[Row], tokenizer: str) -> list[dict[str, float]]:
    """Lengths in tokens of the default prompt format: the question, the steps and the answer of each row.

    As in training: each step is encoded by itself, the tokenizer's start tokens stand before the question alone, and
    the end of the sequence is not counted.
    """
    from transformers import AutoTokenizer

    with explain_load_errors(tokenizer, "tokenizer"):
        encode = load_pretrained(AutoTokenizer, tokenizer)

    whole, alone = (encode("Q", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = len(whole) - len(alone) - (whole[-1] == encode.eos_token_id)
    texts = [text for row in rows for text in (f"{row['question']}\n", f"### {row['answer']}")]
    texts += [f"{step}\n" for row in rows for step in row["steps"]]
    lengths = map(len, encode(texts, add_special_tokens=False)["input_ids"])
    others = [(next(lengths), next(lengths)) for _ in rows]
    return [
        {
            "tokens of the question": float(start + question),
            "tokens of the steps": float(sum(next(lengths) for _ in row["steps"])),
            "tokens of the answer": float(answer),
        }
        for row, (question, answer) in zip(rows, others, strict=True)
    ]
