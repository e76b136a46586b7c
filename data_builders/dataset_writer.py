"""Write a data set: the splits, a manifest that records how they were made, and a data card."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from coconut.utils.files import clear_abandoned, read_json, sha256, write_json, write_text
from coconut.utils.hydra_app import package_version
from data_builders.statistics import Measures, compact, summary

Row = dict[str, Any]
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Card:
    """The texts of a data card. `fields`: a description of each field of a row."""

    task: str
    title: str
    about: str
    fields: dict[str, str]


class WrittenRow(NamedTuple):
    """A row as it is written: its text as JSON, its key (see `Recipe`) and its statistics."""

    line: str
    key: int
    measures: Measures

    @classmethod
    def of(cls, row: Row, key: int, measures: Measures) -> WrittenRow:
        return cls(json.dumps(row, ensure_ascii=False), key, compact(measures))


def write_splits(
    out_dir: str, name: str, splits: dict[str, list[WrittenRow]], made: dict[str, Any], shared: dict[str, int],
    card: Card, command: str,
) -> None:  # fmt: skip
    """Write the splits, the card and, last, the manifest.

    Files of the same name are replaced: all are first written to a temporary folder beside them, and then moved.
    `shared` counts the questions that two splits have in common. `command` makes the same data set again.

    Raises ValueError or OSError as `check_place`.
    """
    splits = {split: splits[split] for split in SPLITS if splits.get(split)}
    folder = check_place(out_dir, name, list(splits), card.task)
    for pair, count in shared.items():
        print(f"warning: {count} questions are in two splits, {pair}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    clear_abandoned(folder, f".{name}.*.part")
    part = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder))
    try:
        version = package_version("coconut-latent") or "not installed"
        manifest = {"task": card.task, **made, "version": version, "shared_questions": shared, "splits": {}}
        for split, rows in splits.items():
            path = part / f"{name}_{split}.json"
            write_text(path, "[\n" + ",\n".join(row.line for row in rows) + "\n]\n")
            manifest["splits"][split] = {"file": path.name, "rows": len(rows), "sha256": sha256(path)}
        manifest["statistics"] = {split: summary([row.measures for row in rows]) for split, rows in splits.items()}
        write_text(part / f"{name}_card.md", _card_text(name, card, command, manifest))
        write_json(part / f"{name}_manifest.json", manifest)
        (folder / f"{name}_manifest.json").unlink(missing_ok=True)
        names = [f"{name}_{which}" for which in (*(f"{split}.json" for split in splits), "card.md", "manifest.json")]
        for file in names:
            os.replace(part / file, folder / file)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for split, rows in splits.items():
        print(f"{folder / f'{name}_{split}.json'}  {len(rows):,} rows")
    print(f"{folder / f'{name}_manifest.json'}, {name}_card.md beside it")


def check_place(out_dir: str, name: str, splits: Sequence[str], task: str | None = None) -> Path:
    """The folder, after checking that a data set with these splits can be written there.

    Raises ValueError if there is no split, if the folder has another task's data set of this name, or a split that this
    set lacks, which would look like a part of it; OSError if the folder cannot be written to.
    """
    if not splits:
        raise ValueError("There is not a single row to write. Raise num_train, num_valid or num_test.")
    folder = Path(out_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise OSError(f"{there} {what}, so out_dir={out_dir} cannot be made. Name another with out_dir=FOLDER.")
    manifest = folder / f"{name}_manifest.json"
    if task and manifest.exists() and (other := read_json(manifest).get("task")) != task:
        raise ValueError(f"{manifest} is of a {other} set. Give this one another name than name={name}.")
    for split in SPLITS:
        path = folder / f"{name}_{split}.json"
        if split not in splits and path.exists():
            raise ValueError(
                f"{path} is from an earlier build, and this one has no {split} rows. Make all splits of a "
                f"set in one command, give another name than name={name}, or remove the file."
            )
    return folder


def shared_questions(splits: dict[str, list[WrittenRow]], alike: Callable[[Row, Row], bool]) -> dict[str, int]:
    """For each pair of splits, the number of questions of the first that equal one of the second, if not zero.

    Only rows with equal keys are compared, by `alike`.
    """
    rows_by_key: dict[str, dict[int, list[str]]] = {}
    for split, rows in splits.items():
        by_key = rows_by_key.setdefault(split, {})
        for row in rows:
            by_key.setdefault(row.key, []).append(row.line)
    counts = {}
    for a, b in combinations(rows_by_key, 2):
        common = rows_by_key[a].keys() & rows_by_key[b].keys()
        counts[f"{a} and {b}"] = sum(
            any(alike(json.loads(row), json.loads(other)) for other in rows_by_key[b][key])
            for key in common
            for row in rows_by_key[a][key]
        )
    return {pair: count for pair, count in counts.items() if count}


def divide(rows: list[Row], counts: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Shuffle rows by the seed and divide them: validation, test, and then training rows, by default all others.

    Rows with the same question stay together, unless the end of a split falls among them.
    """
    if sum(counts.values()) > len(rows):
        asked = ", ".join(f"num_{split}={count}" for split, count in counts.items())
        total = sum(counts.values())
        raise ValueError(f"{asked} ask for {total} rows, and the source has {len(rows)}. Lower them.")
    rows = list(rows)
    random.Random(f"divide {seed}").shuffle(rows)
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(row)
    rows = [row for same in by_question.values() for row in same]
    valid, rows = rows[: counts["valid"]], rows[counts["valid"] :]
    test, rows = rows[: counts["test"]], rows[counts["test"] :]
    return {"train": rows[: counts.get("train")], "valid": valid, "test": test}


def _card_text(name: str, card: Card, command: str, manifest: dict[str, Any]) -> str:
    splits, statistics = manifest["splits"], manifest["statistics"]
    lines = [f"# {name}: {card.title}", "", card.about, "", "Made with", "", f"    {command}", ""]
    lines += ["| split | file | rows | SHA-256 |", "| --- | --- | --- | --- |"]
    lines += [f"| {s} | {d['file']} | {d['rows']:,} | {d['sha256'][:16]}… |" for s, d in splits.items()]
    lines += ["", "Each file is a JSON list with one row a line. A row holds:", ""]
    lines += [f"- `{field}`: {text}" for field, text in card.fields.items()]
    if manifest["shared_questions"]:
        said = ", ".join(f"{count} of {pair}" for pair, count in manifest["shared_questions"].items())
        lines += ["", f"**Questions in two splits:** {said}."]
    lines += ["", f"| statistic | {' | '.join(splits)} |", f"| --- |{' --- |' * len(splits)}"]
    names = {name: None for split in splits for name in statistics[split]}
    for statistic in names:
        said = " | ".join(_in_words(statistics[split].get(statistic)) for split in splits)
        lines.append(f"| {statistic} | {said} |")
    return "\n".join([*lines, ""])


def _in_words(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    if {"mean", "sd", "min", "max"} == value.keys():
        return f"{value['mean']:.4g} ± {value['sd']:.2g} ({value['min']:g} to {value['max']:g})"
    if len(value) > 12:
        return f"{len(value)} values"
    return ", ".join(f"{name} {share:.1%}" for name, share in value.items())
