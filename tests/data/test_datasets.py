"""Data files: named ones, and data sets that are built once in the cache."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.processes import alive, forked_command

import data_builders
from coconut.config import (
    ColumnNames,
    DataConfig,
    DataFiles,
    EngineConfig,
    ModelConfig,
    RowRule,
    StepRule,
    TaskName,
    TrainConfig,
    identity,
)
from coconut.data.datasets import builders_code, cache_folder, data_files, default_cache_dir, file_of_split
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Curriculum, PromptFormat, Unit
from coconut.runs.description import read_results
from coconut.training.trainer import run
from coconut.utils.files import read_json

BUILD = {"preset": "graphs", "seed": 3, "num_train": 24, "num_valid": 8, "num_test": 8, "nodes": None}


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"task": TaskName.prosqa, "build": BUILD, **changes})


def test_named_files_are_used(tmp_path: Path) -> None:
    own = DataConfig(train="a.json", valid="b.json", build=BUILD)
    assert data_files(asdict(own)) == {"train": "a.json", "valid": "b.json", "test": ""}
    assert own.build == {}, "what is not built is no part of the run's configuration"
    (tmp_path / "mine_test.json").touch()
    common = data_files(asdict(config(prefix=str(tmp_path / "mine"))))
    assert common == {split: str(tmp_path / f"mine_{split}.json") for split in ("train", "valid", "test")}
    assert data_files(asdict(config(prefix=str(tmp_path / "other"))))["test"] == "", "a set need not have one"
    other = data_files(asdict(config(prefix=str(tmp_path / "mine"), test="mine.json")))
    assert other == common | {"test": "mine.json"}


@pytest.mark.slow
def test_data_is_built_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = config(cache_dir=str(tmp_path))
    files = data_files(asdict(data))
    assert "Building the data, once: coconut data prosqa preset=graphs seed=3" in capfd.readouterr().out
    counts = {split: len(json.loads(Path(file).read_text())) for split, file in files.items()}
    assert counts == {"train": 24, "valid": 8, "test": 8}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert data_files(asdict(data)) == files
    assert capfd.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    with_test = replace(data, test="mine.json")
    assert data_files(asdict(with_test)) == files | {"test": "mine.json"}
    assert with_test.build == data.build, "the run stays what it is"
    other = data_files(asdict(replace(data, build=BUILD | {"seed": 4})))
    assert Path(other["train"]).read_text() != Path(files["train"]).read_text()
    assert len(list((tmp_path / "data").iterdir())) == 2, "nothing half-made is left beside"


@pytest.mark.slow
def test_changed_builder_rebuilds_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builders' code is part of a data set's key in the cache."""
    builders = tmp_path / "data_builders"
    shutil.copytree(Path(data_builders.__file__).parent, builders, ignore=shutil.ignore_patterns("__pycache__"))
    found = SimpleNamespace(submodule_search_locations=[builders])
    monkeypatch.setattr("coconut.data.datasets.find_spec", lambda name: found)
    before = builders_code()
    assert before == builders_code()
    with (builders / "graphs.py").open("a") as code:
        code.write("# another\n")
    assert builders_code() != before
    cache = asdict(config(cache_dir=str(tmp_path / "cache")))
    first = data_files(cache)["train"]
    with (builders / "graphs.py").open("a") as code:
        code.write("# and another\n")
    assert data_files(cache)["train"] != first


RENAMED = {"columns": ColumnNames("problem", "result", "why"), "steps": StepRule(separator="\n")}


def as_table(rows: list[dict[str, Any]], path: Path) -> Path:
    """Rows as a CSV with other columns, written by the csv module."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "why", "result"])
        writer.writerows([row["question"], "\n".join(row["steps"]), row["answer"]] for row in rows)
    return path


@pytest.mark.slow
def test_a_table_is_converted_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"Q {n}?", "steps": ["a", "it's; ${b}"][: n % 3], "answer": str(n)} for n in range(4)]
    table = as_table(rows, tmp_path / "my rows.csv")
    own = tmp_path / "own.json"
    own.write_text(json.dumps(rows))
    data: dict[str, Any] = {
        "train": str(table),
        "valid": str(table),
        "test": "gone.csv",
        "cache_dir": str(tmp_path / "c"),
    }
    run_data = asdict(DataConfig(**data, **RENAMED))
    files = data_files(run_data)
    assert [read_json(files[split]) for split in ("train", "valid")] == [rows, rows]
    assert files["test"] == "gone.csv", "left to who reads it"
    assert capfd.readouterr().out.count("Converting") == 2
    assert data_files(run_data) == files
    assert file_of_split(run_data, "train", DataFiles(train=str(table))) == files["train"], "by the run's rule"
    assert file_of_split({}, "train", DataFiles(train=files["train"])) == files["train"], "it is in our format"
    assert capfd.readouterr().out == ""
    assert data_files(asdict(DataConfig(train=str(own), valid=str(own)))) == {
        "train": str(own), "valid": str(own), "test": ""
    }  # fmt: skip
    as_table(rows[:2], table)
    assert read_json(data_files(run_data, ["train"])["train"]) == rows[:2], "its content is part of the key"
    named = DataFiles(test=str(table), columns=ColumnNames("problem", "total"))
    with pytest.raises(ValueError, match=r"my rows\.csv could not be converted.*data\.columns\.question=NAME"):
        file_of_split(run_data, "test", named)
    assert "has no column 'total'. Its columns are problem, why, result." in capfd.readouterr().err


def test_a_rule_for_rows_is_part_of_a_run_that_has_one() -> None:
    """Of others it changes neither the folder's name nor the identity, also of runs that were made without it."""
    own: dict[str, Any] = {"task": TaskName.prosqa, "train": "a.csv", "valid": "b.csv"}
    tiny = ModelConfig(architecture={"model_type": "gpt2"}, tokenizer="words")
    plain, renamed = (TrainConfig(data=DataConfig(**own, **rule), model=tiny) for rule in ({}, RENAMED))
    assert plain.folder() != renamed.folder()
    before = asdict(plain)
    for key in ("columns", "steps", "keep", "bad_rows"):
        del before["data"][key]
    assert identity(before) == plain.identity()
    assert str(plain.folder()) == "runs/custom-coconut-seed0-76aa840e", "as before there were such rules"
    assert RowRule.from_dict(asdict(renamed)["data"]).rule() == renamed.data.rule()


@pytest.mark.parametrize("name", ["café", "it's (a, b)", "back\\slash", "a${b}"])
def test_cache_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    files = data_files(asdict(config(cache_dir=str(tmp_path / name))))
    assert all(Path(file).is_file() for file in files.values())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_sigterm_ends_the_builder(tmp_path: Path) -> None:
    keys = ["data=graphs", "data.build.num_train=900000", f"data.cache_dir={tmp_path}", f"run={tmp_path / 'run'}"]
    with forked_command("train", *keys) as process:
        process.wait_until(lambda: "Making 901,000 rows" in process.printed and process.children())
        builders = process.children()
        process.send(signal.SIGTERM)
        assert process.wait(60) == 143, process.printed
        assert "Traceback" not in process.printed
    assert not any(alive(pid) for pid in builders)
    assert not list((tmp_path / "data").iterdir())


def test_builder_errors_are_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = config(cache_dir=str(tmp_path), build=BUILD | {"nodes": 4})
    with pytest.raises(ValueError, match=r"could not make the data.*data\.train=FILE"):
        data_files(asdict(data))
    assert "error: nodes=4 is too few for two chains" in capfd.readouterr().err
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prefix": "a", "train": "b"}, "data.prefix=a and data.train=b are both given"),
        ({"build": {"source": "a"}}, "data.build.source=a is not allowed: data.build holds settings for making rows"),
        ({"build": {"out_dir": "a"}}, "data.build.out_dir=a"),
        ({"build": {"num_valid": 0}}, "data.build.num_valid is 0"),
        ({"build": {"hub": "."}}, "data.build.hub=. is a local folder"),
        ({"columns": ColumnNames(answer="x")}, "data.columns.answer=x says how the rows of a file are read, but no"),
    ],
)
def test_contradictory_data_keys_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"task": TaskName.prosqa, **keys})


@pytest.mark.slow
def test_run_on_built_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, resumes with another cache folder, and is evaluated on the test split built with its data."""
    tiny = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    trained = TrainConfig(
        run=str(tmp_path / "run"), data=config(format=PromptFormat("{}", "{} ", "### {}")),
        curriculum=Curriculum(max_stage=1, length_unit=Unit.updates, stage0_length=2, stage_length=1, total_length=4),
        batch_size=8,
        model=ModelConfig(architecture=tiny, tokenizer="words"), engine=EngineConfig(device="cpu"), max_new_tokens=4,
    )  # fmt: skip
    assert run(replace(trained)) == 0
    first = read_json(tmp_path / "run" / "run.json")["data"]["train"]
    assert first["file"].startswith(str(default_cache_dir()))
    monkeypatch.setenv("COCONUT_CACHE", str(tmp_path / "elsewhere"))
    assert run(replace(trained)) == 0, "the same bytes, so the same run"
    shutil.rmtree(tmp_path / "elsewhere")
    assert run_evaluate(EvaluateConfig(run=str(tmp_path / "run"))) == 0
    (result,) = read_results(tmp_path / "run").values()
    assert result["count"] == 8
    assert result["file"].startswith(str(tmp_path / "elsewhere"))


def test_unusable_cache_folder_error_names_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("no folder")
    monkeypatch.delenv("COCONUT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(OSError, match=r"cache folder for data cannot be used.*home/\.cache.*COCONUT_CACHE .*HF_HOME"):
        data_files(asdict(DataConfig(TaskName.prosqa)))
    monkeypatch.setenv("COCONUT_CACHE", str(tmp_path / "named"))
    assert cache_folder(None, "tokens") == tmp_path / "named" / "tokens"
    assert list((tmp_path / "named").rglob("*")) == [tmp_path / "named" / "tokens"]
