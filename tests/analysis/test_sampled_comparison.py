"""Sampled evaluations at equal passes: interpolation, differences, sentences, and the command from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.html import words
from helpers.runs import rewrite, trained
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut.analysis.config import TableConfig
from coconut.analysis.sampled_comparison import Curve, SampledComparison, compare_sampled, difference
from coconut.analyze import page_of, table
from coconut.completions.config import RolloutConfig
from coconut.config import AdamWConfig, DataConfig, EngineConfig
from coconut.evaluate import run as evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.intervals import mean_interval
from coconut.evaluation.metrics_at_k import best_at, pass_at
from coconut.evaluation.sampling import sizes_of
from coconut.generate import run as generate
from coconut.generation.config import GenerateConfig
from coconut.methods import Curriculum, Unit
from coconut.reporting.charts import metrics_over_passes
from coconut.reporting.sampled_table import describe
from coconut.reward import run as train_reward
from coconut.rewards.config import RewardModelConfig
from coconut.rollout import run as roll
from coconut.runs.record import read_run
from coconut.utils.files import read_json

CPU = EngineConfig(device="cpu", threads=1)


def curve(label: str, means: list[float], passes: float, questions: int = 60, seed: int = 0) -> Curve:
    """k = 1, 2, 4, ... answers of so many passes each."""
    rng = np.random.default_rng(seed)
    values_QS = (rng.random((questions, 1)) < np.array(means)).astype(float)
    sizes = [2**power for power in range(len(means))]
    return Curve("pass", label, sizes, passes * np.array(sizes, float), values_QS)


@settings(deadline=None)
@given(st.floats(1, 60), st.floats(1, 60), st.integers(1, 5), st.integers(1, 5))
def test_values_are_interpolated_between_measured_points_only(a: float, b: float, n: int, m: int) -> None:
    ours, theirs = curve("a", [0.2, 0.3, 0.4, 0.5, 0.6][:n], a), curve("b", [0.3, 0.4, 0.4, 0.5, 0.7][:m], b, seed=1)
    for place, passes in enumerate(ours.passes_S):
        assert ours.at(passes) == pytest.approx(ours.values_QS[:, place], abs=1e-12)
    for outside in (0.99 * ours.passes_S[0], 1.01 * ours.passes_S[-1]):
        with pytest.raises(ValueError, match="outside of what was measured"):
            ours.at(outside)
    found = difference(ours, theirs)
    most = min(ours.passes_S[-1], theirs.passes_S[-1])
    if max(ours.passes_S[0], theirs.passes_S[0]) > most:
        assert found is None
        return
    assert found
    assert found.passes == most
    for of, value in ((ours, found.of_a), (theirs, found.of_b)):
        by_hand = np.interp(np.log(most), np.log(of.passes_S), of.values_QS.mean(0))
        assert value == pytest.approx(by_hand, abs=1e-9)
    assert found.difference == pytest.approx(found.of_a - found.of_b)
    assert found.low <= found.difference <= found.high


def test_places_are_named() -> None:
    ours = curve("a", [0.2, 0.4, 0.6], 10)
    assert [ours.place_of(passes) for passes in (10, 15, 20, 40)] == [
        "k = 1", "between k = 1 and 2", "k = 2", "k = 4",
    ]  # fmt: skip


def compared(*curves: Curve) -> SampledComparison:
    sampling = {"temperature": 0.7, "thought_noise": 0.0}
    runs: Any = [SimpleNamespace(evaluation={"sampling": sampling}) for _ in curves]
    return SampledComparison(runs, [each.label for each in curves], {"pass": list(curves)}, "")


def test_sentences_follow_the_intervals() -> None:
    base = curve("base", [0.4, 0.5, 0.5], 10, questions=300)
    is_half_Q1 = np.arange(300)[:, None] < 150
    better = Curve("pass", "better", base.sizes, base.passes_S, np.maximum(base.values_QS, is_half_Q1))
    worse = Curve("pass", "worse", base.sizes, base.passes_S, base.values_QS * is_half_Q1)
    alike = curve("alike", [0.4, 0.5, 0.5], 10, questions=300, seed=1)
    dear = curve("dear", [0.4, 0.5], 41, questions=300)
    found = compared(base, better, worse, alike, dear)
    sentences = describe(found)
    for sentence, verdict in zip(sentences, ("clearly higher", "clearly lower", "not clearly different"), strict=False):
        assert f"is {verdict}:" in sentence
        assert "At 40.0 passes" in sentence
    assert "no number of passes in common" in sentences[3]
    by_label = {each.a: each for each in found.differences}
    gap_Q = better.values_QS[:, -1] - base.values_QS[:, -1]
    assert (by_label["better"].low, by_label["better"].high) == mean_interval(gap_Q[None], lower_limit=-1.0)
    assert by_label["worse"].high < 0 < by_label["better"].low
    assert by_label["alike"].low <= 0 <= by_label["alike"].high
    assert describe(compared(base)) == ["There is only one evaluation. Nothing is compared."]


@pytest.mark.parametrize("width", [720, 350])
def test_legend_and_panels_stay_inside(width: float) -> None:
    names = [f"a run with a long name: temperature 0.{n}" for n in range(5)]
    rows = [
        {"metric": metric, "label": name, "passes": 7.0 * k * (1 + n), "value": 0.5, "low": 0.4, "high": 0.6}
        for metric in ("pass", "maj", "best") for n, name in enumerate(names) for k in (1, 2, 4)
    ]  # fmt: skip
    figure = metrics_over_passes(rows, width)
    figure.canvas.draw()
    boxes = [figure.legends[0].get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    for box in boxes:
        assert box
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1
    tops = [axes.title.get_window_extent().y1 for axes in figure.axes]
    assert boxes[0]
    assert boxes[0].y0 >= max(tops) - 1, "the legend is above the panels"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["pass@k", "maj@k", "best@k"]
    assert [len(axes.lines) for axes in figure.axes[1:]] == [5, 5]


Made = tuple[Path, Path]  # a run, and a reward model of it


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("sampled")
    curriculum = Curriculum(max_stage=1, length_unit=Unit.updates, stage0_length=30, stage_length=30, total_length=60)
    run, _ = trained(folder, method="coconut", curriculum=curriculum)
    answers = folder / "answers.jsonl"
    settings: Any = {"samples": 4, "seed": 3, "engine": CPU, "output": str(answers)}
    assert roll(RolloutConfig(run=str(run), split="test", **settings)) == 0
    files = DataConfig(train=str(answers), valid=str(answers))
    config = RewardModelConfig(
        run=str(folder / "ce"), init=str(run), loss="ce", data=files, batch_size=8, engine=CPU,
        optimizer=AdamWConfig(lr=1e-3),
    )  # fmt: skip
    assert train_reward(config) == 0
    for changes in ({"temperature": 1.0}, {"thought_noise": 0.5}, {"thought_dropout": 0.3}):
        more: Any = {"reward": str(folder / "ce"), **changes}
        assert evaluate(EvaluateConfig(run=str(run), samples=4, engine=CPU, **more)) == 0
    return run, folder / "ce"


def test_the_command_compares_every_answer_that_was_written(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ce = made
    config = TableConfig(runs=[str(run)], sampled="test-samples-4-*", output=str(tmp_path))
    assert table(config) == 0
    said = capsys.readouterr().out
    study = read_json(tmp_path / "sampled.json")
    assert study["facts"]["baseline"] == "temperature 1"
    assert len(study["rows"]) == 3 * 3 * 3
    name = "test-samples-4-thought_noise-0.5-reward-ce"
    record = read_json(run / "evaluation" / f"{name}.json")
    lines = (run / "evaluation" / f"{name}.predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answers"] for line in lines]
    right, rewards = (np.array([[float(one[key]) for one in of] for of in answers]) for key in ("correct", "reward"))
    passes = np.mean([one["passes"] for of in answers for one in of])
    assert record["reward"] == str(ce)
    assert record["passes"] == pytest.approx(passes)
    assert record["sampling"]["scoring_passes"] == 2 * right.size
    for row in study["rows"]:
        if row["evaluation"] != name or row["metric"] == "maj":
            continue
        values = pass_at(right, row["k"]) if row["metric"] == "pass" else best_at(rewards, right, row["k"])
        assert row["value"] == pytest.approx(values.mean())
        scoring = 2 if row["metric"] == "best" and row["k"] > 1 else 0
        assert row["passes"] == pytest.approx(row["k"] * (passes + scoring))
        [stored] = [each for each in record["sampling"]["at_k"] if each["k"] == row["k"]]
        assert stored[f"{row['metric']}_at_k"] == pytest.approx(row["value"])
        assert stored[f"{row['metric']}_interval"] == pytest.approx([row["low"], row["high"]])
    assert sizes_of(4) == sorted({row["k"] for row in study["rows"]})
    assert "passes a question pass@k of noise 0.5 is" in " ".join(said.split())
    shown = words((tmp_path / "sampled.html").read_text())
    assert "sampled=" in shown
    assert "Differences to temperature 1" in shown
    page = words(page_of(read_run(run)))
    assert "best@k" in page
    assert "coconut analyze table runs=" in page


def test_what_cannot_be_compared_is_refused(made: Made, tmp_path: Path) -> None:
    run, ce = made
    with pytest.raises(ValueError, match=r"no evaluation with several answers whose name matches other\*.*samples=8"):
        compare_sampled(TableConfig(runs=[str(run)], sampled="other*"))
    with pytest.raises(ValueError, match=r"sampled=x and split=valid are both given"):
        TableConfig(runs=["r"], sampled="x", split="valid")
    copy = shutil.copytree(run, tmp_path / "run")
    config = EvaluateConfig(run=str(copy), samples=4, temperature=1.0, limit=3, engine=CPU)
    assert evaluate(config) == 0
    with pytest.raises(ValueError, match="answered different questions"):
        compare_sampled(TableConfig(runs=[str(copy)], sampled="*"))
    for path in (copy / "evaluation").glob("*limit*.json"):
        rewrite(path, chose_the_checkpoint=True)
    with pytest.raises(ValueError, match="chose its checkpoint"):
        compare_sampled(TableConfig(runs=[str(copy)], sampled="*limit*"))
    with pytest.raises(ValueError, match="is neither a run of coconut reward nor a checkpoint of one"):
        evaluate(EvaluateConfig(run=str(run), samples=4, temperature=1.0, reward=str(run), engine=CPU))
    cot, _ = trained(tmp_path / "cot", curriculum=Curriculum(length_unit=Unit.updates, total_length=2))
    with pytest.raises(ValueError, match="cot has no latent thoughts"):
        generate(GenerateConfig(run=str(cot), question="1 2 | 2 3", thought_dropout=0.1, engine=CPU))
    with pytest.raises(ValueError, match=r"have different vocabularies|have different slots before an answer"):
        evaluate(EvaluateConfig(run=str(cot), samples=4, temperature=1.0, reward=str(ce), engine=CPU))
