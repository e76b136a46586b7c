"""Import data of one's own: files with any columns, or any set of the Hugging Face hub.

Run `coconut data import --help`.
`coconut.data.datasets` runs it too, for a training or an evaluation that names a table or its columns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coconut.config import WORDS, Division, RowRule
from coconut.data.examples import Example
from coconut.methods import PromptFormat
from coconut.tasks import TASKS
from coconut.utils.files import sha256
from coconut.utils.hydra_app import application
from coconut.utils.pretrained import explain_load_errors, load_pretrained
from data_builders.builder_app import Builder, run
from data_builders.columns import Report, rows_of_table
from data_builders.dataset_writer import SPLITS, Row
from data_builders.hub import SPLIT_NAMES, load_hub
from data_builders.release_formats import SourceKeys
from data_builders.statistics import Measures
from data_builders.tables import DELIMITERS, FORMATS, JSON, Table, files_of_folder, read_table

FIELDS = {
    "question": "the question",
    "steps": "the steps to the answer, may be empty",
    "answer": "the answer",
}
FILES = (*DELIMITERS, *JSON, ".parquet", ".gz", ".txt")  # what ends so is no name of a hub set


@dataclass
class HubSplits:
    """The names of a hub set's splits, if they are not the usual ones."""

    train: str | None = None
    valid: str | None = None
    test: str | None = None

    def names(self) -> dict[str, str]:
        """For each name there, the split here."""
        given = {split: getattr(self, split) for split in SPLITS if getattr(self, split)}
        usual = {theirs: ours for theirs, ours in SPLIT_NAMES.items() if ours not in given}
        return usual | {theirs: ours for ours, theirs in given.items()}


@dataclass
class ImportBuild(RowRule, SourceKeys):
    name: str = "own"
    hub_config: str | None = None
    splits: HubSplits = field(default_factory=HubSplits)
    task: str | None = None
    preview: int = 3
    format: PromptFormat = field(default_factory=PromptFormat)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise ValueError(
                f"No data are named. Give source=FILE ({FORMATS}) or source=OWNER/NAME on the Hugging Face hub, to be "
                "divided into splits, or a file for each: train=FILE valid=FILE test=FILE."
            )
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"There is no task {self.task}. The tasks are {', '.join(TASKS)}.")
        if self.preview < 0:
            raise ValueError(f"preview is {self.preview}; it must be 0 or more rows.")
        if own := [name for name in self.keep if name in FIELDS]:
            raise ValueError(f"keep names {own[0]}, which is a field of each row anyway. Leave it out.")
        if not self.is_set and (self.hub_config or self.splits != HubSplits()):
            key = f"hub_config={self.hub_config}" if self.hub_config else "splits"
            raise ValueError(f"{key} is for source=OWNER/NAME, a set of the Hugging Face hub. Leave it out.")
        if self.format.chat and self.preview and not self.tokenizer:
            raise ValueError("format.chat=true needs tokenizer=NAME_OR_FOLDER, whose chat template the preview shows.")

    @property
    def uses_tokenizer(self) -> bool:
        return bool(self.compare or self.preview)

    @property
    def is_set(self) -> bool:
        """Whether the source is the name of a set of the hub."""
        source = self.source or ""
        is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not source.lower().endswith(FILES)
        return bool(is_name) and not Path(source).exists()


def read_splits(config: ImportBuild) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The rows of every split, and the entries of the manifest on their sources and the rule."""
    reports: dict[str, Report] = {}

    def take(table: Table) -> list[Row]:
        rows, reports[table.name] = rows_of_table(table, config, config.task)
        return rows

    if config.source and (config.is_set or Path(config.source).is_dir()):
        tables, described = _open_set(config)
        config.refuse_counts(config.source, {split: len(table.records) for split, table in tables.items()})
        rest = {split: take(read_table(path)) for split, path in config.files.items() if split != "source"}
        whole = {split: take(table) for split, table in tables.items()} | rest
        asked = any(count is not None for count in config.counts.values())
        splits = whole
        if "train" in whole and (asked or len(whole) < len(SPLITS)):
            splits = config.divided(whole.pop("train"), whole)
        sources: dict[str, Any] = {"source": described} | {
            split: {"file": Path(path).name, "sha256": sha256(path)}
            for split, path in config.files.items()
            if split != "source"
        }
    else:
        splits, sources = config.read(lambda path: take(read_table(path))), config.described()
    _warn(reports, config)
    if config.preview and not config.compare:
        print("\n".join(preview(config, splits)), flush=True)
    columns = {"question": "question", "answer": "answer"} | config.rule().get("columns", {})
    read = {Path(name).name: report.described() for name, report in reports.items()}
    made = {"rule": config.rule() | {"columns": columns}, "judged_as": config.task, "sources": sources, "read": read}
    return splits, made


def read_rows(config: ImportBuild, path: str) -> list[Row]:
    """The rows of a file, to compare others with."""
    return rows_of_table(read_table(path), config, config.task)[0]


def measure(row: Row) -> Measures:
    """Statistics of one row: numbers to be averaged over the rows, lists to be pooled."""
    return {
        "steps": float(len(row["steps"])),
        "rows without steps": float(not row["steps"]),
        "words of the question": float(len(row["question"].split())),
        "characters of a step": [float(len(step)) for step in row["steps"]],
        "characters of the answer": float(len(row["answer"])),
    }


def _open_set(config: ImportBuild) -> tuple[dict[str, Table], dict[str, Any]]:
    """The tables of a hub set or a folder, by split, and the manifest's entry on their source."""
    name = config.source or ""
    if not Path(name).is_dir():
        loaded, described = load_hub(name, config.hub_config, config.splits.names(), "source")
        return {
            split: Table(f"{name} ({split})", [(f"row {n}", record) for n, record in enumerate(records, 1)])
            for split, records in loaded.items()
        }, described | {"splits": config.splits.names()}
    files = files_of_folder(name)
    tables = {
        split: Table(
            f"{name} ({split})",
            [(f"{path.name}, {where}", record) for path in paths for where, record in read_table(path).records],
        )
        for split, paths in files.items()
    }
    hashes = {split: [{"file": path.name, "sha256": sha256(path)} for path in paths] for split, paths in files.items()}
    return tables, {"folder": Path(name).resolve().name, "files": hashes}


def _warn(reports: dict[str, Report], config: ImportBuild) -> None:
    """Print to stderr what was skipped, and chains of text in which there is nowhere to divide."""
    for name, report in reports.items():
        if report.skipped:
            print(f"{name}: {len(report.skipped)} of {report.rows} rows are skipped, the first: {report.skipped[0]}",
                  file=sys.stderr)  # fmt: skip
        if report.texts and not report.divided:
            print(f"warning: {name}: {_place(config)} occurs in none of {report.texts} chains, so each is one step. "
                  "steps.separator=TEXT, steps.pattern=REGEX or steps.into=sentences divides them.",
                  file=sys.stderr)  # fmt: skip


def _place(config: ImportBuild) -> str:
    """Where a text is divided, in words."""
    if config.steps.separator:
        return f"the separator {config.steps.separator!r}"
    if config.steps.pattern:
        return f"the pattern {config.steps.pattern}"
    return "the end of a sentence" if config.steps.into is Division.sentences else "a line break"


# --- preview ----------------------------------------------------------------------------------------


def preview(config: ImportBuild, splits: dict[str, list[Row]]) -> Iterator[str]:
    """Yield lines with the first rows as a model reads and writes them; white space other than " " as an escape."""
    split, rows = next((split, splits[split]) for split in SPLITS if splits.get(split))
    examples = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in rows]
    form, tokens = config.format, _tokens_of(config, examples) if config.tokenizer else None
    shown = examples[: config.preview]
    yield f"The first {len(shown)} of {len(rows):,} rows of {split}, as a model reads and writes them:"
    for number, example in enumerate(shown, 1):
        labels = ["question", *(f"step {n}" for n in range(1, len(example.steps) + 1)), "answer"]
        texts = [form.fill(form.question, example.question), *(form.fill(form.step, step) for step in example.steps)]
        texts.append(form.fill(form.answer, example.answer))
        yield f"  row {number}"
        for label, text, found in zip(labels, texts, tokens(example) if tokens else [None] * len(texts), strict=True):
            yield f"    {label:<9} {text!r}"
            if found is not None:
                shown_tokens = (token if token.isprintable() and " " not in token else repr(token) for token in found)
                yield f"    {len(found):>4} tokens {' '.join(shown_tokens)}"


def _tokens_of(config: ImportBuild, examples: list[Example]) -> Callable[[Example], list[list[str]]]:
    """A function that gives the tokens of each segment of an example as training has them."""
    from transformers import AutoTokenizer

    from coconut.data.tokenization import (
        add_special_tokens,
        build_word_tokenizer,
        encode_answers,
        encode_questions,
        encode_texts,
    )

    name = config.tokenizer or ""
    if name == WORDS:
        tokenizer = build_word_tokenizer(examples, config.format)
    else:
        with explain_load_errors(name, "tokenizer"):
            tokenizer: Any = load_pretrained(AutoTokenizer, name)
    add_special_tokens(tokenizer)

    def tokens(example: Example) -> list[list[str]]:
        segments = [
            *encode_questions(tokenizer, [example.question], config.format),
            *encode_texts(tokenizer, [config.format.fill(config.format.step, step) for step in example.steps]),
            *encode_answers(tokenizer, [example.answer], config.format)[0],
        ]
        return [tokenizer.convert_ids_to_tokens(ids) for ids in segments]

    return tokens


BUILDER = Builder(
    task="import",
    title="imported data",
    about="Converted by the rule that stands in the manifest, under `rule`. White space around texts is left out.",
    fields=FIELDS,
    read=read_rows,
    read_splits=read_splits,
    measure=measure,
)


def build(config: ImportBuild) -> None:
    """Import the data, and say how to train on them."""
    fields = FIELDS | {name: f"the column {name} of the source" for name in config.keep}
    run(config, replace(BUILDER, fields=fields))
    if config.preview and not config.compare:
        print(f"Next: coconut train model=tiny data=own data.task={config.task or 'TASK'} "
              f"data.prefix={Path(config.out_dir, config.name)} run=runs/{config.name}")  # fmt: skip


main = application("build_import", ImportBuild, build)

if __name__ == "__main__":
    main()
