"""Runs side by side: intervals, tests, what may be compared, and the table in all its forms."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.html import Loads, words
from helpers.processes import forked_command, python
from helpers.runs import graph_files, small_run
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from omegaconf import OmegaConf
from scipy.stats import binomtest

from coconut import evaluate
from coconut.analysis.config import TableConfig
from coconut.analysis.run_comparison import compare
from coconut.analysis.statistics import accuracy_interval, difference_interval, exact_test, holm
from coconut.config import DataConfig, DataFiles, EngineConfig
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Curriculum, Unit
from coconut.reporting.run_table import SCREEN, on_screen
from coconut.reporting.run_table import run as table
from coconut.training import trainer as train
from coconut.utils.files import read_json, write_json
from coconut.utils.hydra_app import CONF_DIR
from coconut.utils.overrides import as_override

ConfigStore.instance().store(name="run_table_schema", node=TableConfig)
CPU = EngineConfig(device="cpu", threads=1)
FILES = {"table.html", "table.md", "table.csv", "table.json"}
Answers = tuple[np.ndarray, np.ndarray]


def answers(seeds: int = 4, questions: int = 40) -> st.SearchStrategy[Answers]:
    """Right or wrong, of two methods: at most so many seeds by so many questions."""
    shapes = st.tuples(st.integers(1, seeds), st.integers(1, questions))
    return shapes.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))


@given(answers(seeds=1))
def test_with_one_seed_the_test_is_mcnemars(pair: Answers) -> None:
    a, b = pair
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert exact_test(a, b) == pytest.approx(expected, rel=1e-9)


@given(answers(seeds=3, questions=6))
def test_the_test_counts_every_flip_of_signs(pair: Answers) -> None:
    a, b = pair
    differences = (a.astype(int) - b).sum(0)
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(differences))).reshape(len(differences), -1)
    extreme = np.abs(differences @ signs) >= abs(differences.sum())
    assert exact_test(a, b) == pytest.approx(extreme.mean(), rel=1e-9)


@given(answers())
def test_the_test_does_not_mind_the_order(pair: Answers) -> None:
    a, b = pair
    assert exact_test(a, b) == exact_test(b, a) <= 1
    shuffled = np.random.default_rng(0).permutation(a.shape[1])
    assert exact_test(a[:, shuffled], b[:, shuffled]) == exact_test(a, b)
    assert exact_test(a[::-1], b[::-1]) == exact_test(a, b)


@given(answers())
def test_intervals_hold_what_was_measured(pair: Answers) -> None:
    a, b = pair
    low, high = accuracy_interval(a)
    assert 0 <= low <= a.mean() <= high <= 1
    low, high = difference_interval(a, b)
    assert -1 <= low <= a.mean() - b.mean() + 1e-12
    assert a.mean() - b.mean() - 1e-12 <= high <= 1
    assert exact_test(a, a) == 1
    low, high = difference_interval(a, a)
    assert low == -high
    assert low < 0 < high, "that no question told them apart does not say that none would"


def test_intervals_are_as_wide_as_theory_has_it() -> None:
    random = np.random.default_rng(1)
    a, b = random.random((1, 2000)) < 0.8, random.random((1, 2000)) < 0.5
    for value, (low, high), spread in [
        (a.mean(), accuracy_interval(a), a.std()),
        (a.mean() - b.mean(), difference_interval(a, b), (a.astype(int) - b).std()),
    ]:
        half = 1.96 * spread / 2000**0.5
        assert low == pytest.approx(value - half, abs=0.003)
        assert high == pytest.approx(value + half, abs=0.003)


def test_seeds_that_differ_widen_the_interval() -> None:
    question = np.arange(500)
    same = np.stack([question < 250] * 3)
    apart = np.stack([question < 100, question < 250, question < 400])
    width = [high - low for low, high in map(accuracy_interval, (same, apart))]
    assert width[1] > 3 * width[0]


def test_questions_are_drawn_for_all_seeds_at_once() -> None:
    one = np.random.default_rng(2).random((1, 400)) < 0.7
    assert accuracy_interval(np.repeat(one, 3, axis=0)) == pytest.approx(accuracy_interval(one), abs=0.005)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holms_correction(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert sorted(corrected) == [corrected[i] for i in order]
    if p_values:
        assert min(corrected) == min(1, len(p_values) * min(p_values))
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds each of Coconut and CoT, and one run that goes on from Coconut's first stage; evaluated."""
    folder = tmp_path_factory.mktemp("table")
    data = graph_files(folder, 32, 8, 30)
    for method, seed in product(("coconut", "cot"), (0, 1)):
        make(folder, data, f"{method}-seed{seed}", method=method, seed=seed, keep_every=2)
    started = str(folder / "runs" / "coconut-seed0" / "checkpoints" / "step-0000002")
    later = Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=2, stage_length=2, total_length=4,
                       start_stage=1)  # fmt: skip
    make(folder, data, "pause_as_thought-seed0", method="pause_as_thought", init=started, curriculum=later)
    return folder / "runs"


def make(folder: Path, data: DataConfig, name: str, **values: Any) -> None:
    config = small_run(folder / "runs" / name, data, **values)
    assert train.run(config) == 0
    assert evaluate.run(EvaluateConfig(run=str(config.run), batch_size=15, engine=CPU)) == 0


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The runs without their weights, to be changed."""
    copied = shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints", "*-*.json*"))
    for file in copied.glob("*/evaluation/test.json"):
        change(file, truncated=0.0)
    return copied


def change(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


def edit_answers(run: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    file = run / "evaluation" / "test.predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    edit(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(run: Path, right: int) -> None:
    """Let a run have this many of its 30 answers right, the first ones."""
    edit_answers(run, lambda rows: [row.update(correct=number < right) for number, row in enumerate(rows)])
    change(run / "evaluation" / "test.json", correct=right, accuracy=right / 30)


def named(folder: Path, pattern: str = "*") -> TableConfig:
    return TableConfig(runs=[f"{folder}/{pattern}"])


def labels(folder: Path) -> list[str]:
    return [group.label for group in compare(named(folder)).groups]


@pytest.mark.slow
def test_the_command_compares_what_a_pattern_matches(copy: Path) -> None:
    (copy / "cot-seed0.log").write_text("no run")
    (copy / "notes").mkdir()
    with forked_command("analyze", "table", "runs=runs/*", cwd=copy.parent) as done:
        assert done.wait(60) == 0, done.printed
        shown = done.output
    assert max(map(len, shown.splitlines())) <= SCREEN
    lines = [line.split() for line in shown.splitlines()]
    assert [line[0] for line in lines[3:6]] == ["coconut", "cot", "pause_as_thought"], "in the order of METHODS"
    assert "Accuracy on 30 unseen questions of test.json" in shown
    assert "ms: for a question, in batches of 15." in " ".join(shown.split())
    assert {path.name for path in copy.iterdir() if path.name.startswith(("table", "."))} == FILES
    assert "`coconut analyze table runs='runs/*'`" in (copy / "table.md").read_text()


def test_a_row_holds_the_means_of_its_runs(copy: Path) -> None:
    score(copy / "coconut-seed0", 20)
    score(copy / "coconut-seed1", 26)
    assert table(named(copy)) == 0
    found = read_json(copy / "table.json")
    coconut, cot, pause = found["rows"]
    one, other = (read_json(copy / f"coconut-seed{seed}" / "evaluation" / "test.json") for seed in (0, 1))
    assert (coconut["seeds"], coconut["thoughts"]) == ("0, 1", 2)
    assert (coconut["accuracy"], coconut["sd"]) == pytest.approx((23 / 30, 0.2 / 2**0.5))
    for key in ("passes", "seconds_per_item"):
        assert coconut[key] == pytest.approx((one[key] + other[key]) / 2)
    assert coconut["new_tokens"] == pytest.approx(2 + (one["mean_new_tokens"] + other["mean_new_tokens"]) / 2)
    assert cot["thoughts"] == pause["thoughts"] == 0
    assert pause["sd"] is None
    assert [row["updates"] for row in (coconut, cot, pause)] == [6, 6, 6], "those of the first stage too"
    with open(copy / "table.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in found["rows"]]
    text = (copy / "table.md").read_text()
    assert "| coconut | 0, 1 | 76.7 % |" in text
    assert found["facts"]["sha256"][:12] in text
    session = read_json(copy / "cot-seed0" / "run.json")["sessions"][0]
    assert session["machine"]["system"] in text
    assert session["started"][:10] in text


def test_pairs_are_compared_on_the_seeds_that_both_have(copy: Path) -> None:
    score(copy / "coconut-seed0", 30)
    score(copy / "coconut-seed1", 28)
    score(copy / "cot-seed0", 5)
    score(copy / "cot-seed1", 6)
    score(copy / "pause_as_thought-seed0", 28)
    compared = compare(named(copy))
    pairs = {(pair.a, pair.b): pair for pair in compared.pairs}
    assert set(pairs) == {("coconut", "pause_as_thought"), ("coconut", "cot"), ("pause_as_thought", "cot")}
    pair = pairs["coconut", "cot"]
    assert pair.seeds == [0, 1]
    assert pair.difference == pytest.approx(58 / 60 - 11 / 60)
    assert pair.distinguishable
    pair = pairs["coconut", "pause_as_thought"]
    assert pair.seeds == [0]
    assert (pair.difference, pair.p, pair.p_holm) == pytest.approx((2 / 30, 0.5, 0.5))
    beginnings = [
        "coconut and pause_as_thought cannot be distinguished on these questions: difference +6.7",
        "Only one seed of pause_as_thought:",
        "Not all methods have the same seeds.",
    ]
    assert all(map(str.startswith, compared.warnings, beginnings))
    assert len(compared.warnings) == 3
    assert "coconut to pause_as_thought" in on_screen(compared)


def test_indistinguishable_methods_are_listed_once(copy: Path) -> None:
    for run in copy.iterdir():
        score(run, 15)
    first, *others = compare(named(copy)).warnings
    assert first.startswith("coconut, cot and pause_as_thought cannot be distinguished on these questions: the largest")
    assert not any("distinguished" in warning for warning in others)


def test_a_difference_within_the_spread_of_seeds_is_not_distinguishable(copy: Path) -> None:
    for method, right in [("coconut", (30, 10)), ("cot", (8, 10))]:
        for seed, count in enumerate(right):
            score(copy / f"{method}-seed{seed}", count)
    compared = compare(named(copy, "co*"))
    (pair,) = compared.pairs
    assert pair.p_holm < 0.05
    assert pair.low <= 0
    assert not pair.distinguishable
    assert compared.warnings[0].endswith("These runs differ, but runs with other seeds may not.")


def test_runs_without_a_common_seed_and_single_runs_are_not_compared(copy: Path) -> None:
    chosen = TableConfig(runs=[str(copy / "coconut-seed0"), str(copy / "cot-seed1")])
    compared = compare(chosen)
    assert compared.pairs == []
    assert sorted(" ".join(compared.warnings).split("compared: ")[1].split(".")[0].split(" and ")) == ["coconut", "cot"]
    assert table(chosen) == 0
    assert "Nothing is compared" in words((copy / "table.html").read_text())
    assert table(named(copy, "cot-seed1")) == 0
    found = read_json(copy / "table.json")
    assert [row["method"] for row in found["rows"]] == ["cot"]
    assert found["facts"]["pairs"] == found["facts"]["warnings"] == []


def test_other_settings_make_another_row_with_their_name(copy: Path) -> None:
    config = copy / "cot-seed1" / "config.json"
    before = read_json(config)
    change(config, optimizer={**before["optimizer"], "lr": 0.5}, name="other", keep_checkpoints=9)
    assert labels(copy) == ["coconut", "cot (optimizer.lr=0.01)", "cot (optimizer.lr=0.5)", "pause_as_thought"]
    change(config, optimizer=before["optimizer"], batch_size=1, validate_every=1, valid_limit=1, max_new_tokens=1)
    assert "cot (batch_size=1, ...)" in labels(copy)


def began(run: Path, origin: Path, step: int, total: int) -> None:
    """Say that a run began in stage 1 with the weights of another."""
    curriculum = read_json(run / "config.json")["curriculum"]
    init = str(origin / "checkpoints" / f"step-{step:07d}")
    change(run / "config.json", curriculum={**curriculum, "start_stage": 1, "total_length": total}, init=init)
    change(run / "run.json", init=init)


def test_a_run_that_continues_the_curriculum_of_its_method_has_equal_settings(copy: Path) -> None:
    run, origin = copy / "coconut-seed1", copy / "coconut-seed0"
    began(run, origin, step=2, total=4)
    assert labels(copy) == ["coconut", "cot", "pause_as_thought"]
    began(run, origin, step=2, total=5)
    assert "coconut (curriculum.total_length=7)" in labels(copy)


def test_initial_weights_distinguish_groups(copy: Path) -> None:
    run = copy / "coconut-seed1"
    for origin, step in ((copy / "coconut-seed0", 1), (copy / "cot-seed0", 2), (copy / "elsewhere", 2)):
        began(run, origin, step=step, total=4)
        assert len(labels(copy)) == 4, origin
    change(run / "config.json", init=None)
    change(run / "run.json", init=None)
    assert any("init=nothing" in label for label in labels(copy)), "the stages before were never trained"


def test_initial_weights_of_equal_settings_are_equal(copy: Path) -> None:
    shutil.copytree(copy / "pause_as_thought-seed0", copy / "pause_as_thought-seed1")
    run = copy / "pause_as_thought-seed1"
    change(run / "config.json", seed=1)
    change(run / "run.json", init=str(copy / "coconut-seed1" / "checkpoints" / "step-0000002"))
    assert labels(copy) == ["coconut", "cot", "pause_as_thought"]
    change(run / "run.json", init=str(copy / "cot-seed1" / "checkpoints" / "step-0000002"))
    assert len(labels(copy)) == 4


def test_warnings_name_batch_sizes_truncation_and_updates(copy: Path) -> None:
    change(copy / "cot-seed0" / "evaluation" / "test.json", batch_size=64, truncated=0.3)
    change(copy / "cot-seed1" / "run.json", init="/elsewhere/run/checkpoints/step-0000100")
    told = "\n".join(compare(named(copy)).warnings)
    assert "different batch sizes (15, 64)" in told
    assert re.search(r"truncated at the limit of new tokens: .*cot .* 30\.0 %", told)
    assert "The runs have different numbers of updates: 6 to 106." in told


def not_complete(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if '"step": 6' not in line))


def initialized_from_a_run_trained_on_it(run: Path) -> None:
    earlier = run.parent.parent / "earlier"
    shutil.copytree(run, earlier)
    digest, data = read_json(run / "evaluation" / "test.json")["sha256"], read_json(run / "run.json")["data"]
    change(earlier / "run.json", data={**data, "train": {**data["train"], "sha256": digest}})
    change(run / "run.json", init=str(earlier / "checkpoints" / "step-0000002"))


def evaluation(**values: Any) -> Callable[[Path], None]:
    return lambda run: change(run / "evaluation" / "test.json", **values)


def answers_with(edit: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    return lambda run: edit_answers(run, edit)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: (run / "evaluation" / "test.json").unlink(),
         r"One run is without the evaluation 'test'.*coconut evaluate run=\S+cot-seed1\nEvaluate"),
        (not_complete, r"One run is not complete.*cot-seed1: update 5 of 6"),
        (lambda run: (run / "run.json").unlink(), r"cot-seed1 is not a complete run"),
        (evaluation(sha256="f" * 64, file="/data/other.json"),
         r"different questions.*test\.json, SHA-256 .*other\.json, SHA-256 ffffffff.*cot-seed1"),
        (answers_with(lambda rows: rows[3].update(question="Who?")),
         r"different questions.*cot-seed1\nEvaluate them again"),
        (answers_with(lambda rows: rows.pop()),
         r"cot-seed1\S+jsonl does not hold the 30 answers.*Evaluate again: coconut evaluate"),
        (answers_with(lambda rows: rows[0].update(correct=not rows[0]["correct"])),
         r"cot-seed1\S+jsonl does not hold the 30 answers"),
        (initialized_from_a_run_trained_on_it, r"cot-seed1: it was trained on \S+test\.json"),
        (evaluation(default_settings=False), r"cot-seed1: non-default settings.*Evaluate again"),
        (evaluation(step=1), r"cot-seed1: update 1 was evaluated, and the best is \d"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused(copy: Path, spoil: Callable[[Path], None], told: str) -> None:
    spoil(copy / "cot-seed1")
    with pytest.raises(ValueError, match=f"(?s){told}"):
        table(named(copy))
    assert not list(copy.glob("*table*")), "nothing is written"


def test_all_runs_without_an_evaluation_are_named(copy: Path) -> None:
    for file in copy.glob("*/evaluation/test.json"):
        file.unlink()
    with pytest.raises(ValueError, match="5 runs are without the evaluation 'test'") as found:
        table(named(copy))
    assert str(found.value).count("coconut evaluate run=") == 5


def test_runs_are_named_once_and_exist(copy: Path, tmp_path: Path) -> None:
    one = str(copy / "cot-seed0")
    (tmp_path / "link").symlink_to(one)
    for names, told in [
        ([one, one], "cot-seed0 is named twice"),
        ([f"{copy}/*", one], "cot-seed0 is named twice"),
        ([one, str(tmp_path / "link")], "cot-seed0 and .*link are the same folder"),
        ([f"{copy}/nothing*"], r"No run matches .*nothing\*"),
        ([str(copy / "nothing")], "nothing is not a run: there is no such folder"),
    ]:
        with pytest.raises(ValueError, match=told):
            table(TableConfig(runs=names))
    shutil.copytree(one, copy / "again")
    with pytest.raises(ValueError, match=r"again and .*cot-seed0 have the same method \(cot\), settings and seed=0"):
        table(TableConfig(runs=[str(copy / "again"), one]))
    with pytest.raises(ValueError, match="Name the runs: runs="):
        TableConfig()


def test_data_that_chose_the_checkpoint_ranks_nothing(runs: Path) -> None:
    one = runs / "cot-seed0"
    for split, told in [("valid", "valid.json chose its checkpoint"), ("train", "it was trained on .*train.json")]:
        assert evaluate.run(EvaluateConfig(run=str(one), split=split, engine=CPU)) == 0
        with pytest.raises(ValueError, match=f"(?s){told}.*Use questions that no run has seen"):
            compare(TableConfig(runs=[str(one)], split=split))


def test_questions_are_unseen_if_no_run_saw_them_in_whatever_file(runs: Path, tmp_path: Path) -> None:
    """Four of twelve stand in the training file, and two in the validation file, with other white space around them."""
    data = read_json(runs / "cot-seed0" / "config.json")["data"]
    train, valid, test = (read_json(data[split]) for split in ("train", "valid", "test"))
    spaced = [{**row, "question": f" {row['question']}\n".replace(" ", "  ")} for row in train[:4] + valid[:2]]
    write_json(tmp_path / "mixed.json", [*spaced, *test[:6]])
    write_json(tmp_path / "known.json", train[:8])
    names = ("cot-seed0", "pause_as_thought-seed0")  # the second saw them through the run that it began with, too
    for file in ("mixed", "known"):
        for name in names:
            files = DataFiles(test=str(tmp_path / f"{file}.json"))
            assert evaluate.run(EvaluateConfig(run=str(runs / name), data=files, engine=CPU)) == 0
    mixed, known = (next(runs.glob(f"cot-seed0/evaluation/{file}-*.json")) for file in ("mixed", "known"))
    assert read_json(mixed)["seen"] == {"train": 4, "valid": 2}
    both = TableConfig(runs=[str(runs / name) for name in names], split=mixed.stem)
    compared = compare(both)
    told = "12 questions of mixed.json, 4 of them in the training data and 2 of them in the validation data"
    assert told in on_screen(compared)
    assert [row["questions"] for row in compared.rows] == [12, 12]
    assert compared.command.endswith(f"split={mixed.stem}")
    with pytest.raises(ValueError, match=r"coconut evaluate run=\S+ data\.test=FILE"):
        compare(replace(both, runs=[f"{runs}/co*"]))
    assert any("The run that saw the most: 12 questions, 4 of them" in warning for warning in compared.warnings)
    with pytest.raises(ValueError, match=r"the questions of \S+known\.json are in the training data"):
        compare(replace(both, split=known.stem))
    for path in runs.glob("*/evaluation/[mk]*"):
        path.unlink()


def test_the_page_loads_no_other_file_escapes_names_and_shows_what_was_compared(copy: Path) -> None:
    for number, name in enumerate(["icot", "no_cot", "pause"]):
        shutil.copytree(copy / "cot-seed0", copy / f"{name}-seed0")
        change(copy / f"{name}-seed0" / "config.json", method=name)
        score(copy / f"{name}-seed0", 5 + number)
    config = copy / "cot-seed1" / "config.json"
    change(config, model={**read_json(config)["model"], "attention": "<script>alert(1)</script> $x$"})
    assert table(named(copy)) == 0
    html, loads = (copy / "table.html").read_text(), Loads()
    loads.feed(html)
    assert all(name.startswith("#") for name in loads.names)
    assert not loads.tags & {"script", "link", "iframe", "img"}
    assert html.count("&lt;script&gt;") >= 3
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert len(loads.ids) == len(set(loads.ids))
    text = words(html)
    for run in copy.glob("*-seed*"):
        assert str(run) in text
    assert "2 of coconut-seed0 + 4" in text
    assert "chance 50.0 %" in text
    assert "Every pair, with interval and p" in text
    for split in ("train", "valid"):
        assert read_json(copy / "cot-seed0" / "run.json")["data"][split]["sha256"][:12] in text
    assert "in brackets if the two cannot be distinguished" in text


def test_files_appear_whole(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "else" / "where"
    assert table(TableConfig(runs=[f"{copy}/*"], output=str(out))) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert {path.name for path in before} == FILES
    assert not list(copy.glob("table.*"))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("coconut.utils.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        table(TableConfig(runs=[f"{copy}/co*"], output=str(out)))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("runs=runs/table1/*-seed*", ["runs/table1/*-seed*"]),
        ("runs=a,b", ["a", "b"]),
        ("runs=a b,  c", ["a", "b", "c"]),
        ("runs=[a,b*]", ["a", "b*"]),
        ("runs=['my runs/a','b,c']", ["my runs/a", "b,c"]),
        ("runs='my runs/a'", ["my runs/a"]),
        ("runs=it's/(1)/#2,runs/[ab]?", ["it's/(1)/#2", "runs/[ab]?"]),
    ],
)
def test_runs_can_be_named_in_several_ways(argument: str, expected: list[str]) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = OmegaConf.to_object(compose("run_table", [as_override(argument, TableConfig)]))
    assert isinstance(config, TableConfig)
    assert config == TableConfig(runs=expected)


@pytest.mark.slow
def test_help_and_errors_read_well(tmp_path: Path) -> None:
    done = python("-m", "coconut.analyze", "table", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "coconut analyze table runs=DIR,DIR,..." in done.stdout
    assert "Powered by Hydra" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
    with forked_command("analyze", "table", "runs=no*", cwd=tmp_path) as done:
        told = done.wait(60), done.printed
    assert told == (2, "error: No run matches no*. Name folders that coconut train wrote.\n")
    assert not list(tmp_path.iterdir())
