"""Each notebook runs as it is, holds nothing of the machine that made it, and leads to files that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|Users|private|var)/")


def opened(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
def test_the_idea_runs_and_its_thoughts_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = opened(ROOT / "examples" / "notebooks" / "idea.ipynb")
    NotebookClient(notebook, timeout=300).execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    share = re.search(r"stage 1: thought +([\d.]+)% of", printed)
    assert share, printed
    assert float(share[1]) > 50, printed  # guessing: 16.7 %
    assert "the same loss: " in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_ends_with_links_that_exist(path: Path) -> None:
    markdown = [cell.source for cell in opened(path).cells if cell.cell_type == "markdown"]
    assert markdown[-1].startswith("## Where to go next")
    assert LINK.findall(markdown[-1])
    for target in LINK.findall("\n".join(markdown)):
        assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_places_of_a_machine(path: Path) -> None:
    assert not any(cell.outputs for cell in opened(path).cells if cell.cell_type == "code")
    assert not ABSOLUTE.search(path.read_text(encoding="utf-8"))
