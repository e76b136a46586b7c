"""Runs whose thoughts are merged from the chain: trained, resumed, evaluated at another rate, analyzed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import copy_until, graph_files, read_metrics, same_end, small_run

from coconut.analysis.config import AnalyzeConfig, Part
from coconut.analyze import run as run_analyze
from coconut.config import DataConfig, EngineConfig
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.hub.model_card import card
from coconut.methods import Curriculum, Unit
from coconut.models.latent_lm import LatentLM
from coconut.runs.checkpoints import Checkpoints
from coconut.runs.record import read_run
from coconut.runs.study import NotApplicable
from coconut.training.trainer import run as run_training
from coconut.utils.files import read_json, write_json

pytestmark = pytest.mark.slow

CPU = EngineConfig(device="cpu", threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return graph_files(tmp_path_factory.mktemp("data"), 24, 6, 6)


def settings(data: DataConfig, folder: Path, method: str, **changes: Any) -> Any:
    curriculum = Curriculum(length_unit=Unit.updates, total_length=6)
    return small_run(folder, data, method=method, curriculum=curriculum, save_every=1, keep_checkpoints=9, **changes)


@pytest.mark.parametrize("method", ["colar", "c_mtp"])
def test_a_run_resumes_and_knows_how_many_thoughts_it_takes(method: str, data: DataConfig, tmp_path: Path) -> None:
    assert run_training(settings(data, tmp_path / "run", method)) == 0
    last = LatentLM.from_pretrained(Checkpoints(tmp_path / "run").newest_valid() or "")
    longest = max(
        len(row) for row in last.tokenizer([" ".join(r["steps"]) for r in read_json(data.train)])["input_ids"]
    )
    assert -(-longest // 2) <= last.reasoning.num_thoughts <= longest, "the longest chain at two tokens a thought"
    assert all(row["loss"] > 0 for row in read_metrics(tmp_path / "run"))
    half = copy_until(3, tmp_path / "run", tmp_path / "half")
    assert run_training(settings(data, half, method)) == 0
    same_end(half, tmp_path / "run")
    assert "which the model ends itself" in card(last)


def test_evaluated_at_a_rate_and_analyzed(data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_training(settings(data, run, "colar", seed=1)) == 0
    for rate in (None, 5):
        assert run_evaluate(EvaluateConfig(run=str(run), rate=rate, engine=CPU)) == 0
    assert (run / "evaluation" / "test-rate-5.json").is_file()
    capsys.readouterr()
    assert run_analyze(AnalyzeConfig(run=str(run), engine=CPU)) == 0
    told, studies = capsys.readouterr().out, read_run(run).studies
    assert "Left out values: The thoughts of colar stand for no steps in particular" in told
    alike = studies["k_forcing"].facts["alike"]
    assert {row["questions"] for row in studies["k_forcing"].rows} == {alike["questions"]}
    assert f"on the {alike['questions']} of {alike['of']} questions for which it takes so many" in told
    assert studies.keys() >= {"noise", "prefix_values", "decoded", "geometry", "rollouts", "audit_thoughts",
                              "influence"}  # fmt: skip
    assert "alike" not in studies["shortcuts"].facts
    assert studies["shortcuts"].facts["questions"] == studies["noise"].facts["questions"] == alike["of"]
    taken = [row["num_thoughts"] for row in read_run(run).answers]
    asked = [row["question"] for row in studies["decoded"].rows if (row["thought"], row["rank"]) == (1, 1)]
    assert asked == [i for i, count in enumerate(taken) if count == alike["thoughts"]]
    page = (run / "report.html").read_text()
    assert f"on the {alike['questions']} of {alike['of']} questions for which it takes {alike['thoughts']}" in page
    assert "What the model says in the place of each thought" in page
    with pytest.raises(NotApplicable, match="ends its thoughts itself, and needs no classifier"):
        run_analyze(AnalyzeConfig(run=str(run), engine=CPU, parts=[Part.stopping]))


def test_data_without_chains_is_refused(data: DataConfig, tmp_path: Path) -> None:
    rows = [row | {"steps": []} for row in read_json(data.train)]
    write_json(tmp_path / "train.json", rows)
    bare = DataConfig(data.task, train=str(tmp_path / "train.json"), valid=data.valid, format=data.format)
    with pytest.raises(ValueError, match="no example has a chain, and c_mtp makes its thoughts of chains"):
        run_training(settings(bare, tmp_path / "run", "c_mtp"))
