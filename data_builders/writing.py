"""How built data lies on the disk, and how a source is divided into splits."""

from __future__ import annotations

import json
import random
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

from coconut.files import sha256, write_json, write_text

Row = dict[str, Any]
SPLITS = ("train", "valid", "test")


def write_splits(out_dir: str, name: str, splits: dict[str, list[Row]], made: dict[str, Any]) -> None:
    """Write the splits, then the manifest. Files of the same name are replaced.

    Raises ValueError if a split lies there that this set does not have: it would look like part of it.
    """
    splits = {split: splits[split] for split in SPLITS if splits.get(split)}
    if not splits:
        raise ValueError("There is not a single row to write. Raise num_train, num_valid or num_test.")
    folder = Path(out_dir)
    for split in SPLITS:
        path = folder / f"{name}_{split}.json"
        if split not in splits and path.exists():
            raise ValueError(
                f"{path} is from an earlier build, and this one has no {split} rows. Make all splits of a "
                f"set in one command, give another name than name={name}, or remove the file."
            )
    manifest = folder / f"{name}_manifest.json"
    manifest.unlink(missing_ok=True)
    shared = shared_questions(splits)
    for pair, count in shared.items():
        print(f"warning: {count} questions are in two splits, {pair}", file=sys.stderr)
    files = {}
    for split, rows in splits.items():
        path = folder / f"{name}_{split}.json"
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
        files[split] = {"file": path.name, "rows": len(rows), "sha256": sha256(path)}
        print(f"{path}  {len(rows)} rows")
    write_json(manifest, {**made, "version": _version(), "shared_questions": shared, "splits": files})
    print(manifest)


def shared_questions(splits: dict[str, list[Row]]) -> dict[str, int]:
    questions = {split: {row["question"] for row in rows} for split, rows in splits.items()}
    counts = {f"{a} and {b}": len(questions[a] & questions[b]) for a, b in combinations(questions, 2)}
    return {pair: count for pair, count in counts.items() if count}


def divide(rows: list[Row], counts: dict[str, int], seed: int) -> dict[str, list[Row]]:
    """Shuffled with the seed: validation, test, then training rows, all that are left if not counted."""
    if sum(counts.values()) > len(rows):
        asked = ", ".join(f"num_{split}={count}" for split, count in counts.items())
        total = sum(counts.values())
        raise ValueError(f"{asked} ask for {total} rows, and the source has {len(rows)}. Lower them.")
    rows = list(rows)
    random.Random(f"divide {seed}").shuffle(rows)
    valid, rows = rows[: counts["valid"]], rows[counts["valid"] :]
    test, rows = rows[: counts["test"]], rows[counts["test"] :]
    return {"train": rows[: counts.get("train")], "valid": valid, "test": test}


def _version() -> str:
    try:
        return version("coconut-latent")
    except PackageNotFoundError:
        return "not installed"
