"""The command that looks into a run: what it measures, keeps and shows, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import graph_files, small_run

from coconut import analyze
from coconut.analysis.config import AnalyzeConfig, MethodsConfig, Part
from coconut.analysis.verdict import FINDINGS
from coconut.config import DataConfig, DataFiles, EngineConfig, PromptFormat, TaskName
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Curriculum, Unit
from coconut.runs.record import read_run
from coconut.runs.study import NotApplicable
from coconut.training.trainer import run as train
from coconut.utils.files import read_json, write_json

pytestmark = pytest.mark.slow

CPU = EngineConfig(device="cpu", threads=1)
MIXED = Curriculum(
    max_stage=2, length_unit=Unit.updates, stage0_length=4, stage_length=3, total_length=12, mixing_probability=0.3
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 32, 8, 12)


@pytest.fixture(scope="module")
def trained(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(small_run(folder, data, curriculum=MIXED)) == 0
    assert run_evaluate(EvaluateConfig(run=str(folder), engine=CPU)) == 0
    assert analyze.run(AnalyzeConfig(run=str(folder), engine=CPU)) == 0
    return folder


def test_every_part_writes_data_and_a_section_of_the_page(trained: Path) -> None:
    kept = {path.name for path in (trained / "analysis").iterdir()}
    for name in ("k_forcing", "prefix_values", "values", "parallelism", "heights", "inner_products", "decoded",
                 "geometry", "layers", "rollouts", "audit_thoughts", "influence", "noise", "shortcuts",
                 "stopping"):  # fmt: skip
        assert {f"{name}.json", f"{name}.csv"} <= kept
        study = read_run(trained).studies[name]
        assert study.facts["step"] == read_run(trained).evaluations["test"]["step"]
        with (trained / "analysis" / f"{name}.csv").open() as file:
            assert [list(row) for row in csv.DictReader(file)] == [list(row) for row in study.rows]
    assert {"k_forcing.png", "prefix_values.png", "audit_thoughts.png", "inner_products.png"} <= kept
    page = (trained / "report.html").read_text()
    for title in (
        "What it means",
        "How many thoughts",
        "What each thought adds",
        "What the thoughts hold",
        "Are the thoughts used?",
        "What acts on what",
        "Does it rely on shortcuts?",
        "When to stop",
    ):
        assert title in page
    assert "http" not in page.split("<body", 1)[1].replace("http-equiv", "")


def test_the_trained_number_of_thoughts_gives_the_accuracy_of_the_evaluation(trained: Path) -> None:
    study, found = read_run(trained).studies["k_forcing"], read_json(trained / "evaluation" / "test.json")
    (own,) = [row for row in study.rows if row["thoughts"] == study.facts["trained_thoughts"]]
    assert own["accuracy"] == found["accuracy"]
    assert own["questions"] == found["count"]


def kept(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "analysis").glob("*.json")}


def test_named_parts_keep_earlier_studies_of_the_same_questions(tmp_path: Path, data: DataConfig) -> None:
    folder = tmp_path / "run"
    train(small_run(folder, data, curriculum=MIXED))

    def measure(*parts: Part, **options: Any) -> None:
        assert analyze.run(AnalyzeConfig(run=str(folder), parts=list(parts), engine=CPU, **options)) == 0

    measure(Part.decoded, limit=5)
    measure(Part.k_forcing, limit=5)
    assert kept(folder) == {"asked", "decoded", "k_forcing"}
    assert read_json(folder / "analysis" / "decoded.json")["facts"]["questions"] == 5
    measure(Part.k_forcing, limit=4)
    assert kept(folder) == {"asked", "k_forcing"}, "of other questions"
    measure(Part.decoded, limit=4, checkpoint="last")
    measure(Part.decoded, limit=4, checkpoint=str(read_run(folder).step))
    assert kept(folder) >= {"asked", "decoded"}


def test_missing_data_files_are_named(
    trained: Path, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, away, moved = tmp_path / "run", tmp_path / "away", tmp_path / "moved.json"
    shutil.copytree(trained, run_folder)
    shutil.copy(data.test, moved)
    config = read_json(run_folder / "config.json")
    for named, expected in [
        ({"test": f"{away}.json"}, f"is missing: {away}.json"),
        ({"train": "", "valid": "", "test": "", "prefix": str(away)}, f"is missing: {away}_test.json"),
        ({"test": ""}, "was never named, and none was made"),
    ]:
        write_json(run_folder / "config.json", {**config, "data": {**config["data"], **named}})
        told = rf"The run's test file {re.escape(expected)}.*Name one with data\.test=FILE"
        with pytest.raises(FileNotFoundError, match=told):
            run_evaluate(EvaluateConfig(run=str(run_folder), engine=CPU))
        with pytest.raises(FileNotFoundError, match=told):
            analyze.run(AnalyzeConfig(run=str(run_folder), engine=CPU))
    capsys.readouterr()
    files = DataFiles(test=str(moved))
    asked = AnalyzeConfig(run=str(run_folder), data=files, parts=[Part.decoded], limit=2, engine=CPU)
    assert analyze.run(asked) == 0
    assert f"with 2 questions of {moved}" in capsys.readouterr().out


def test_the_page_without_parts_needs_no_model(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert analyze.run(AnalyzeConfig(run=str(trained), parts=[], output=str(page))) == 0
    assert page.is_file()
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def without_thoughts(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "run"
    assert train(small_run(folder, data, method="cot")) == 0
    return folder


def test_parts_that_do_not_apply_are_left_out(
    without_thoughts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(without_thoughts, tmp_path / "run")
    assert analyze.run(AnalyzeConfig(run=str(folder), engine=CPU)) == 0
    said = capsys.readouterr().out
    for part in ("k_forcing", "prefix_values", "values", "audit_thoughts", "stopping"):
        assert f"Left out {part}: cot" in said
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("part", [Part.k_forcing, Part.values, Part.audit_thoughts, Part.stopping])
def test_a_named_part_that_does_not_apply_is_refused(without_thoughts: Path, part: Part) -> None:
    with pytest.raises(NotApplicable, match="cot"):
        analyze.run(AnalyzeConfig(run=str(without_thoughts), parts=[part], engine=CPU))
    assert not (without_thoughts / "analysis").exists()
    assert not (without_thoughts / "report.html").exists()


def test_stopping_needs_training_with_mixing(data: DataConfig, tmp_path: Path) -> None:
    train(small_run(tmp_path / "run", data))
    with pytest.raises(NotApplicable, match="cannot answer after fewer"):
        analyze.run(AnalyzeConfig(run=str(tmp_path / "run"), parts=[Part.stopping], engine=CPU))


def sums(folder: Path) -> DataConfig:
    """Questions without graphs."""
    files: Any = {}
    for split, numbers in (("train", range(40)), ("valid", range(2, 10)), ("test", range(10, 22))):
        asked = "{} and 1 ?" if split == "train" else "1 and {} ?"
        rows = [{"question": asked.format(n), "steps": [f"{n} + 1"], "answer": str(n + 1)} for n in numbers]
        write_json(folder / f"{split}.json", rows)
        files[split] = str(folder / f"{split}.json")
    return DataConfig(TaskName.gsm8k, **files, format=PromptFormat("{}", "{} ; ", "### {}"))


def test_a_task_without_graphs_has_no_graph_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    curriculum = replace(MIXED, max_stage=1)
    train(small_run(folder, sums(tmp_path), curriculum=curriculum))
    assert run_evaluate(EvaluateConfig(run=str(folder), engine=CPU)) == 0
    assert analyze.run(AnalyzeConfig(run=str(folder), engine=CPU)) == 0
    said = capsys.readouterr().out
    for part in ("values", "inner_products", "audit_edges"):
        assert f"Left out {part}: The questions of gsm8k describe no graph" in said
    assert {"audit_thoughts.json", "decoded.json", "k_forcing.json"} <= {
        p.name for p in (folder / "analysis").iterdir()
    }
    with pytest.raises(NotApplicable, match="describe no graph"):
        analyze.run(AnalyzeConfig(run=str(folder), parts=[Part.values], engine=CPU))


def test_questions_are_numbered_as_in_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where one before them is too long to be asked."""
    folder = tmp_path / "run"
    config = small_run(folder, sums(tmp_path), curriculum=replace(MIXED, max_stage=1))
    train(config)
    rows = read_json(tmp_path / "test.json")
    rows[1]["question"] = "1 and " * 60
    write_json(tmp_path / "test.json", rows)
    analyze.run(AnalyzeConfig(run=str(folder), parts=[Part.decoded], limit=4, engine=CPU))
    assert "Left out 1 questions" in capsys.readouterr().out
    found = json.loads((folder / "analysis" / "decoded.json").read_text())
    assert sorted({row["question"] for row in found["rows"]}) == [0, 2, 3]
    assert found["facts"]["questions"] == 3


def test_a_run_in_progress_has_a_page_without_figures(data: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small_run(folder, data, curriculum=replace(MIXED, max_stage=0, total_length=5)))
    config = read_json(folder / "run.json")
    config["updates"] = 500
    write_json(folder / "run.json", config)
    assert analyze.run(AnalyzeConfig(run=str(folder), parts=[], engine=CPU)) == 0
    assert "update 5 of 500" in (folder / "report.html").read_text()


def test_methods_are_compared_by_their_measurements(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / name for name in ("one", "other")]
    for run in runs:
        shutil.copytree(trained, run)
    assert analyze.compare_methods(MethodsConfig(runs=[str(tmp_path / "*")])) == 0
    assert "one: " in capsys.readouterr().out
    study = read_json(tmp_path / "methods.json")
    assert [row["run"] for row in study["rows"]] == ["one", "other"]
    with (tmp_path / "methods.csv").open() as file:
        assert [row["kind"] for row in csv.DictReader(file)] == [row["kind"] for row in study["rows"]]
    row, page = study["rows"][0], (tmp_path / "methods.html").read_text()
    assert page.count(row["headline"]) == 2
    assert all(name in page for name in FINDINGS if row[name] is not None)
    assert row["headline"] in (trained / "report.html").read_text(), "the same verdict at the head of the run's page"

    facts = runs[1] / "analysis" / "influence.json"
    write_json(facts, read_json(facts) | {"facts": read_json(facts)["facts"] | {"questions": 5}})
    for study_file in (runs[1] / "analysis").glob("*.json"):
        if study_file != facts:
            study_file.unlink()
    with pytest.raises(ValueError, match="were analyzed on different questions"):
        analyze.compare_methods(MethodsConfig(runs=list(map(str, runs))))
    facts.unlink()
    with pytest.raises(ValueError, match=r"was not analyzed\. Run coconut analyze run="):
        analyze.compare_methods(MethodsConfig(runs=list(map(str, runs))))
