"""The classifier that ends the thoughts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import build
from helpers.runs import graph_files, graph_rows, small_run

from coconut.config import EngineConfig
from coconut.data.examples import Example
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.generation.config import StopRule
from coconut.generation.stop_classifier import fit, fit_classifier, refuse_untrained
from coconut.methods import PAUSES, Curriculum, PromptFormat, Unit, plan
from coconut.runs.description import read_results
from coconut.runs.loading import classifier_of, load_run
from coconut.training.trainer import run as train
from coconut.utils.files import read_json


def separable(N: int = 2000, K: int = 3, D: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Thoughts whose last one needed shows in a product of two coordinates: no line divides them."""
    random = torch.Generator().manual_seed(0)
    thoughts = torch.randn(N, K, D, generator=random)
    return thoughts, thoughts[..., 0] * thoughts[..., 1] > 0


def test_it_learns_what_the_thoughts_show_and_keeps_it(tmp_path: Path) -> None:
    thoughts, last = separable()
    before = torch.get_rng_state()
    classifier = fit(thoughts[:1500], last[:1500])
    assert torch.equal(torch.get_rng_state(), before), "the global random stream is not touched"
    assert (classifier.stop(thoughts[1500:]) == last[1500:]).double().mean() > 0.9
    again = fit(thoughts[:1500], last[:1500])
    assert torch.equal(again(thoughts), classifier(thoughts)), "the same classifier each time"


def examples(count: int) -> list[Example]:
    return [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(seed=0, count=count)]


def test_a_classifier_is_measured_on_other_examples_than_it_was_fitted_to() -> None:
    lm = build("llama", dtype=torch.float32, num_thoughts=3, format=PromptFormat("{}", "{} ", "### {}"))
    rows = examples(60)
    classifier = fit_classifier(lm, rows[:40], rows[40:], batch_size=7)
    found = classifier.measured
    assert found
    assert found.trained_on == 40
    steps = torch.tensor([len(row.steps) for row in rows[40:]])
    assert found.positives == pytest.approx([(steps <= k).double().mean().item() for k in (1, 2, 3)])
    assert found.accuracy == pytest.approx(sum(found.by_place) / 3)


def test_where_all_chains_are_alike_there_is_nothing_to_learn() -> None:
    lm = build("llama", dtype=torch.float32, num_thoughts=2)
    rows = [Example("1 2 3", ("1",), "2"), Example("3 2 1", ("2",), "1")]
    with pytest.raises(ValueError, match="nothing to learn"):
        fit_classifier(lm, rows, rows, batch_size=2)


@pytest.mark.parametrize(
    ("reasoning", "mixing", "message"),
    [
        ({"num_thoughts": 6, "method": "coconut"}, 0.0, "cannot answer after fewer"),
        ({"num_thoughts": 6, "method": "without_curriculum"}, 0.1, "cannot answer after fewer"),
        ({"num_thoughts": 6, "method": "pause", "slot": PAUSES}, 0.1, "no latent"),
        ({"num_thoughts": 0, "method": "coconut"}, 0.1, "no latent"),
    ],
)
def test_a_model_that_never_learned_to_speak_early_is_refused(
    reasoning: dict[str, Any], mixing: float, message: str
) -> None:
    trained = plan(reasoning["method"], Curriculum(mixing_probability=mixing))
    with pytest.raises(ValueError, match=message):
        refuse_untrained(build("gpt2", **reasoning), trained)


def test_a_model_that_learned_to_speak_early_is_not() -> None:
    lm = build("gpt2", num_thoughts=6, method="coconut")
    refuse_untrained(lm, plan("coconut", Curriculum(mixing_probability=0.1)))
    refuse_untrained(lm, plan("without_curriculum", Curriculum(pad_thoughts=False)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    curriculum = Curriculum(
        max_stage=3, length_unit=Unit.updates, stage0_length=1, stage_length=1, total_length=4, mixing_probability=0.3
    )
    assert train(small_run(folder / "run", graph_files(folder, 40, 10, 10), curriculum=curriculum)) == 0
    return folder / "run"


def test_an_evaluation_with_it_fits_it_once_and_counts_the_thoughts(trained: Path, capsys: Any) -> None:
    config = EvaluateConfig(run=str(trained), checkpoint="last", stop=StopRule.classifier)
    assert run_evaluate(config) == 0
    assert "Fitting the stop classifier" in capsys.readouterr().out
    (name,) = read_results(trained)
    found = read_results(trained)[name]
    assert name == "test-checkpoint-last-stop-classifier"
    lines = (trained / "evaluation" / f"{name}.predictions.jsonl").read_text().splitlines()
    counts = [json.loads(line)["num_thoughts"] for line in lines]
    assert all(1 <= count <= 3 for count in counts)
    assert found["num_thoughts"] == pytest.approx(sum(counts) / len(counts))
    assert not found["default_settings"]

    assert run_evaluate(config) == 0
    assert "Fitting" not in capsys.readouterr().out
    saved = classifier_of(trained, load_run(trained, "last", EngineConfig(device="cpu")))
    assert saved.measured
    assert saved.measured.trained_on == 40
    assert read_json(trained / "run.json")["updates"] == 4
