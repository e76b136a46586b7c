"""Read tables: the records of a file of JSON, JSON lines, CSV, TSV or Parquet, every value as the file has it.

Text of a CSV stays text, so that 007 and 1.0 are what was written. The text formats may be compressed with gzip.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.data.examples import BadRow, json_rows
from data_builders.hub import SPLIT_NAMES, label_names
from data_builders.release_formats import Kind, decoded

DELIMITERS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t"}  # the first that a header has
JSON = (".json", ".jsonl", ".ndjson")
FORMATS = "JSON, JSON lines, CSV, TSV (these also as .gz) or Parquet"
Records = list[tuple[str, Any]]  # where each stands, "line 3" or "row 2", and the record: a dict, or a BadRow


@dataclass(frozen=True)
class Table:
    """The records of a file or of a split of a data set. `name`: for messages."""

    name: str
    records: Records


def read_table(path: Path | str) -> Table:
    """Read a file; its name says of which format it is, or its content if the name does not.

    Raises ValueError if it does not exist, is of none of the formats, is broken, or has no record.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else f"does not exist in {Path.cwd()}"
        raise ValueError(f"The file {str(path)!r} {what}. Name a file of {FORMATS}.")
    raw, name = path.read_bytes(), path.name.lower()
    if raw.startswith(b"\x1f\x8b"):
        raw, name = _unpacked(raw, path), name.removesuffix(".gz")
    if raw.startswith(b"PAR1"):
        records = _parquet_records(raw, path)
    else:
        records = list(_text_records(raw, path, Path(name).suffix))
    if not records:
        raise ValueError(f"{path} holds no row.")
    return Table(str(path), records)


def files_of_folder(folder: Path | str) -> dict[str, list[Path]]:
    """The files of each split in a folder, or below it: those whose name begins with the name of a split.

    Raises ValueError if there is none.
    """
    found: dict[str, list[Path]] = {}
    suffixes = (*DELIMITERS, *JSON, ".parquet")
    for path in sorted(Path(folder).rglob("*")):
        begin = path.name.replace("-", ".").replace("_", ".").partition(".")[0].lower()
        if begin in SPLIT_NAMES and path.name.lower().removesuffix(".gz").endswith(suffixes):
            found.setdefault(SPLIT_NAMES[begin], []).append(path)
    if not found:
        raise ValueError(
            f"The folder {folder} has no file of {FORMATS} whose name begins with {', '.join(SPLIT_NAMES)}. Name its "
            "files: train=FILE valid=FILE test=FILE."
        )
    return found


def _unpacked(raw: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a broken gzip file ({error}). Get it anew.") from None


def _parquet_records(raw: bytes, path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(raw))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is a broken Parquet file ({str(error).splitlines()[0]}). Get it anew.") from None
    records = table.to_pylist()
    if b"huggingface" in (table.schema.metadata or {}):
        from datasets import Features

        records = label_names(records, Features.from_arrow_schema(table.schema))
    return [(f"row {number}", record) for number, record in enumerate(records, 1)]


def _text_records(raw: bytes, path: Path, suffix: str) -> Iterator[tuple[str, Any]]:
    kind, text = decoded(raw, str(path))
    if kind:
        raise ValueError(f"{path} looks like {kind}. Wanted is a file of {FORMATS}.")
    if suffix in DELIMITERS:
        return _delimited_records(path, text, DELIMITERS[suffix])
    if suffix in JSON or text.lstrip()[0] in "[{":
        return json_rows(path, text)
    raise ValueError(f"{path} looks like {Kind.unknown}. Wanted is a file of {FORMATS}, with a name that ends so.")


def _delimited_records(path: Path, text: str, delimiters: str) -> Iterator[tuple[str, Any]]:
    """Each row as a dict of texts; one that has more or fewer fields than the header is a BadRow."""
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in delimiters if mark in first), delimiters[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    begin = 1
    try:
        for fields in reader:
            where, begin = f"line {begin}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise ValueError(f"{path} has several columns of the name {twice[0]!r}. Rename all but one.")
            elif len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            else:
                yield where, BadRow(f"it has {len(fields)} fields, and the header {len(header)}: {header}.")
    except csv.Error as error:
        raise ValueError(
            f"{path} breaks in the row that begins in line {begin}: {error}. A quote inside of quotes is written twice."
        ) from None
