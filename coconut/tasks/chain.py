"""The text a model writes: one step a line, then the mark and the answer."""

from __future__ import annotations

import re


def read_answer(text: str, mark: str = "###") -> str | None:
    """What follows the first mark, up to the end of its line; None if there is no mark.

    Without a mark to look for (`mark=""`) the answer is the last line that is not empty.
    """
    found = _find(text, mark)
    return None if found is None else text[found[1] :].split("\n")[0].strip()


def read_steps(text: str, mark: str = "###", end: str = "\n") -> list[str]:
    """What stands before the first mark, cut where steps end: at lines, or whatever else `end` is."""
    found = _find(text, mark)
    before = text if found is None else text[: found[0]]
    return [step.strip() for step in before.split(end) if step.strip()]


def tidy(text: str) -> str:
    """One space between words, none before punctuation: word-level tokenizers put spaces of their own."""
    return re.sub(r"\s+(?=[.,?!:;])", "", " ".join(text.split()))


def _find(text: str, mark: str) -> tuple[int, int] | None:
    if not mark:
        start = text.rstrip().rfind("\n") + 1
        return (start, start) if text.strip() else None
    found = re.search(r"[ \t]*".join(map(re.escape, mark)), text)
    return found.span() if found else None
