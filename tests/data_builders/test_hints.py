"""Hints planted in the training questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coconut.tasks.hints import split_hint
from coconut.utils.files import read_json
from data_builders.pointers import PointersBuild
from data_builders.pointers import build as build_pointers
from data_builders.prosqa import Form, Preset, ProsqaBuild
from data_builders.prosqa import build as build_prosqa


@pytest.mark.parametrize("task", ["pointers", "symbols", "sentences"])
def test_a_share_of_the_training_questions_is_hinted_and_nothing_else_changes(task: str, tmp_path: Path) -> None:
    def rows(hint: float, split: str) -> list[dict[str, Any]]:
        folder = tmp_path / str(hint)
        counts = {"num_train": 200, "num_valid": 0, "num_test": 20, "num_workers": 1, "name": "set"}
        if not folder.exists():
            if task == "pointers":
                build_pointers(PointersBuild(out_dir=str(folder), hint=hint, **counts))
            else:
                preset = Preset.graphs if task == "symbols" else Preset.released
                form = Form(task)
                build_prosqa(ProsqaBuild(out_dir=str(folder), preset=preset, form=form, hint=hint, **counts))
        assert read_json(folder / "set_manifest.json")["hint"] == hint
        return read_json(folder / f"set_{split}.json")

    assert rows(0.5, "test") == rows(0.0, "test")
    hinted = rows(0.5, "train")
    names = [split_hint(row["question"]) for row in hinted]
    assert [{**row, "question": asked} for row, (_, asked) in zip(hinted, names, strict=True)] == rows(0.0, "train")
    share = sum(name is not None for name, _ in names) / len(names)
    assert share == pytest.approx(0.5, abs=0.12)
    for row, (name, _) in zip(hinted, names, strict=True):
        assert name is None or row["answer"].rstrip(".").split()[-1] == name


def test_a_share_that_is_none_is_refused() -> None:
    for build in (PointersBuild, ProsqaBuild):
        with pytest.raises(ValueError, match=r"hint is 1\.5; it is a share"):
            build(hint=1.5)
        with pytest.raises(ValueError, match=r"hint=0\.5 says how rows are made, but train=a\.json is read"):
            build(hint=0.5, train="a.json")
