"""Record which questions a run has seen in training and validation, to detect them in a test set.

A run's folder keeps a hash of each question of its data and of the runs it was initialized from, so a test set can be
compared even if those files are gone. Questions are equal if their texts are, up to white space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coconut.utils.files import atomic_file

QUESTIONS = "questions.npz"
SEEN_PHRASES = {"train": "in the training data", "valid": "in the validation data"}


def keep_questions(folder: Path, questions: Mapping[str, Sequence[str]], initialized_from: Path | None) -> None:
    """Save hashes of the questions of each split, and of those seen by the run that this one was initialized from."""
    found = {split: _question_hashes(texts) for split, texts in questions.items()}
    if initialized_from and (earlier := _read_hashes(initialized_from)):
        found = {split: np.union1d(numbers, earlier[split]) for split, numbers in found.items()}
    with atomic_file(folder / QUESTIONS) as part, open(part, "wb") as file:
        np.savez(file, train=np.unique(found["train"]), valid=np.unique(found["valid"]))


def seen_by(folder: Path | str, questions: Sequence[str]) -> dict[str, int] | None:
    """Count the questions that a run has seen, by split; None if the run has no record of its questions."""
    kept = _read_hashes(folder)
    if kept is None:
        return None
    hashes = _question_hashes(questions)
    trained = np.isin(hashes, kept["train"])
    return {"train": int(trained.sum()), "valid": int((np.isin(hashes, kept["valid"]) & ~trained).sum())}


def describe_questions(count: int, seen: Mapping[str, int] | None, file: str = "") -> str:
    """A phrase with the number of questions and how many of them were seen, such as "500 unseen questions"."""
    questions = f"questions of {file}" if file else "questions"
    if seen is None:
        return f"{count:,} {questions}"
    where = [f"{number:,} of them {SEEN_PHRASES[split]}" for split, number in seen.items() if number]
    return f"{count:,} {questions}, {' and '.join(where)}" if where else f"{count:,} unseen {questions}"


def all_seen(evaluation: Mapping[str, Any]) -> str | None:
    """If a run has seen all questions of an evaluation, the split with most of them; else None."""
    seen = evaluation.get("seen") or {}
    return max(seen, key=lambda split: seen[split]) if sum(seen.values()) == evaluation["count"] else None


def most_seen(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """The `seen` counts of the run that has seen most of the same questions; None if a run has no record."""
    each = [found.get("seen") for found in evaluations]
    known = [seen for seen in each if seen is not None]
    return max(known, key=lambda seen: sum(seen.values())) if len(known) == len(each) else None


def _read_hashes(folder: Path | str) -> dict[str, np.ndarray] | None:
    file = Path(folder) / QUESTIONS
    if not file.is_file():
        return None
    with np.load(file) as kept:
        return {split: kept[split] for split in SEEN_PHRASES}


def _question_hashes(questions: Sequence[str]) -> np.ndarray:
    texts = (" ".join(question.split()) for question in questions)
    digests = b"".join(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, np.uint64)
