"""Read released files: detect their kind, and convert their records to rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from coconut.utils.files import decode_utf8, lone_surrogate, sha256
from coconut.utils.overrides import PathName, Place
from data_builders.dataset_writer import SPLITS, Row, divide

SHOWN = 10  # bad rows that an error message shows, of all that it counts

UTF16 = (b"\xff\xfe", b"\xfe\xff")
MAGIC = (b"PAR1", b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # Parquet; compressed files
PROSQA_KEYS = {"question", "edges", "idx_to_symbol"}


class Kind(StrEnum):
    prosqa = "ProsQA as released (a JSON list of question, steps, answer, idx_to_symbol, edges, ...)"
    prontoqa = "the output of ProntoQA's generator (a JSON object example1, example2, ...)"
    gsm8k = "GSM8K as released (a JSON object with question and answer on each line)"
    gsm8k_aug = "GSM8K-Aug as released (question||<<a=b>> <<c=d>> #### answer on each line)"
    rows = "a JSON list of question, steps and answer"
    binary = "a binary file (compressed, or Parquet)"
    pointer = "a Git LFS pointer, not the file that it stands for"
    page = "a web page"
    empty = "an empty file"
    unknown = "none of the known forms"


@dataclass
class Released:
    """A file, its kind, and its numbered records: as JSON, or as lines of text."""

    path: Path
    kind: Kind
    records: list[tuple[int | str, Any]]


@dataclass
class SourceKeys:
    """The configuration keys that all builders share: a file to divide, or a file for each split."""

    out_dir: PathName = "data"
    name: str = "data"
    seed: int = 0
    source: PathName | None = None
    train: PathName | None = None
    valid: PathName | None = None
    test: PathName | None = None
    num_train: int | None = None
    num_valid: int | None = None
    num_test: int | None = None
    num_workers: int | None = None  # processes; by default one for each core
    compare: PathName | None = None  # a file to compare statistics with; nothing is written then
    compare_rows: int = 10000  # rows generated for the comparison
    tokenizer: Place | None = None  # compare lengths in its tokens, too

    def __post_init__(self) -> None:
        if not self.name or self.name != Path(self.name).name:
            raise ValueError(
                f"name is {self.name!r}; it begins the names of the files and cannot be empty or hold a '/'."
            )
        for split, count in self.counts.items():
            if count is not None and count < 0:
                raise ValueError(f"num_{split} is {count}; it must be 0 or more.")
        if not self.out_dir:
            raise ValueError("out_dir is empty; it names the folder to write into.")
        if self.tokenizer and not self.uses_tokenizer:
            raise ValueError(f"tokenizer={self.tokenizer} is for compare=FILE: give both, or leave it out.")
        for key in ("num_workers", "compare_rows"):
            count = getattr(self, key)
            if count is not None and count < 1:
                raise ValueError(f"{key} is {count}; it must be 1 or more.")
        if self.source and self.train:
            raise ValueError(
                f"source={self.source} and train={self.train} are both given: the file to be divided "
                "gives the training rows too. Keep one of them."
            )
        for split, count in self.counts.items():
            if count is not None and getattr(self, split):
                raise ValueError(
                    f"num_{split}={count} and {split}={getattr(self, split)} are both given: a file of its "
                    "own is taken whole. Keep one of them."
                )

    def given(self, *names: str) -> dict[str, Any]:
        """The values of these keys, without those that are null."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def refuse_dials(self, given: dict[str, Any]) -> None:
        """Raise ValueError if a file is read and a dial for generating rows is given."""
        for key, path in self.files.items():
            for dial, value in given.items():
                raise ValueError(
                    f"{dial}={value} says how rows are made, but {key}={path} is read. Leave one of them out."
                )

    @property
    def uses_tokenizer(self) -> bool:
        return bool(self.compare)

    @property
    def change_no_row(self) -> tuple[str, ...]:
        """The keys that do not change the rows."""
        return ("num_workers", "out_dir", "preview", "tokenizer", "format")

    @property
    def counts(self) -> dict[str, int | None]:
        return {split: getattr(self, f"num_{split}") for split in SPLITS}

    @property
    def files(self) -> dict[str, str]:
        return {key: getattr(self, key) for key in ("source", *SPLITS) if getattr(self, key)}

    def read(self, convert: Callable[[str], list[Row]]) -> dict[str, list[Row]]:
        """The rows of every split."""
        splits = {split: convert(path) for split, path in self.files.items() if split != "source"}
        if self.source:
            return self.divided(convert(self.source), splits)
        if unused := [f"num_{split}={count}" for split, count in self.counts.items() if count]:
            raise ValueError(
                f"{unused[0]} has no file to divide: train, valid and test are taken whole. Leave it out, or "
                "give the file as source=FILE."
            )
        return splits

    def divided(self, rows: list[Row], splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """The rows shuffled and divided into the splits that are not there yet."""
        share = min(500, len(rows) // 10)
        counts = {split: 0 if split in splits else share for split in ("valid", "test")}
        counts |= {split: count for split, count in self.counts.items() if count is not None}
        return divide(rows, counts, self.seed) | splits

    def refuse_counts(self, name: str, rows: dict[str, int]) -> None:
        """Raise ValueError if rows are asked for that cannot be taken from the train split of a set.

        `rows`: how many the set called `name` has of each of its splits.
        """
        for split, count in self.counts.items():
            if count is not None and split != "train" and split in rows:
                raise ValueError(
                    f"num_{split}={count} is given, and {name} has {rows[split]} {split} rows of its own, which "
                    "are taken whole. Leave it out."
                )
        if any(count is not None for count in self.counts.values()) and "train" not in rows:
            raise ValueError(
                f"{name} has no train split from which rows could be taken. Leave out num_train and the like."
            )

    def described(self) -> dict[str, Any]:
        """The manifest's entry on the files."""
        return {key: {"file": Path(path).name, "sha256": sha256(path)} for key, path in self.files.items()}


def open_released(path: str, *wanted: Kind) -> Released:
    """Open a file. Raises ValueError if it does not exist or is of none of the kinds `wanted`."""
    released = detected(Path(path))
    if released.kind not in wanted:
        raise ValueError(f"{released.path} looks like {released.kind}. Wanted is {', or '.join(wanted)}.")
    return released


def detected(path: Path) -> Released:
    """Open a file of any kind. Raises ValueError if it does not exist, or is text but not UTF-8."""
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r} in {Path.cwd()}.")
    kind, text = decoded(path.read_bytes(), str(path))
    if kind:
        return Released(path, kind, [])
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        value = json.loads(text)
    except ValueError:
        return _open_lines(path, lines)
    if isinstance(value, list):
        first = value[0] if value and isinstance(value[0], dict) else {}
        kinds = [(Kind.prosqa, PROSQA_KEYS), (Kind.rows, {"question", "steps", "answer"})]
        kind = next((kind for kind, keys in kinds if keys <= first.keys()), Kind.unknown)
        return Released(path, kind, list(enumerate(value, start=1)))
    if isinstance(value, dict) and "example1" in value:
        return Released(path, Kind.prontoqa, list(value.items()))
    return _open_lines(path, lines)


def decoded(raw: bytes, name: str) -> tuple[Kind | None, str]:
    """The kind of a file that holds no rows of text, None for others, and the text of those.

    Raises ValueError if it is not UTF-8.
    """
    if raw.startswith(MAGIC) or (b"\0" in raw and not raw.startswith(UTF16)):
        return Kind.binary, ""
    text = decode_utf8(raw, name)
    if not text.strip():
        return Kind.empty, ""
    if text.startswith("version https://git-lfs"):
        return Kind.pointer, ""
    if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")):
        return Kind.page, ""
    return None, text


def rows_of(released: Released, convert: Callable[[Any], Row]) -> list[Row]:
    """Convert all records. ValueErrors of `convert` are collected into one that counts all bad rows."""
    rows, wrong = converted([(f"row {number}", record) for number, record in released.records], convert)
    if wrong:
        raise ValueError(bad_rows(str(released.path), wrong, len(released.records), "Mend or remove them:"))
    return rows


def converted(records: Sequence[tuple[str, Any]], convert: Callable[[Any], Row]) -> tuple[list[Row], list[str]]:
    """The rows of the records that can be converted, and a line on each of the others. A record has its place."""
    rows: list[Row] = []
    wrong: list[str] = []
    for where, record in records:
        try:
            row = convert(record)
            if (broken := lone_surrogate(row)) is not None:
                raise ValueError(f"it holds half of a surrogate pair, which is no text: {broken!a}.")
            rows.append(row)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    return rows, wrong


def bad_rows(name: str, wrong: Sequence[str], total: int, advice: str) -> str:
    """A message with the lines on the first bad rows."""
    more = [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    head = f"{name} has {len(wrong)} bad of {total} rows. {advice}"
    return "\n".join([head, *(f"  {line}" for line in wrong[:SHOWN]), *more])


def parsed(line: str) -> Any:
    """The JSON value of a line; a line that is not JSON is returned as text, which its converter refuses."""
    try:
        return json.loads(line)
    except ValueError:
        return line


def _open_lines(path: Path, lines: list[tuple[int, str]]) -> Released:
    try:
        first = json.loads(lines[0][1])
    except ValueError:
        aug = any("||" in line and "####" in line for _, line in lines[:20])
        return Released(path, Kind.gsm8k_aug if aug else Kind.unknown, list(lines))
    if not isinstance(first, dict) or not {"question", "answer"} <= first.keys():
        return Released(path, Kind.unknown, list(lines))
    if first.keys() >= PROSQA_KEYS:
        return Released(path, Kind.prosqa, [(number, parsed(line)) for number, line in lines])
    return Released(path, Kind.gsm8k, list(lines))
