"""Suites: several sets with one model, in one table; what is finished is kept, what is missing is named."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.html import Loads, words
from helpers.models import build, shift_weights
from helpers.runs import composed, graph_files, graph_rows, score, small_run
from scipy.stats import binomtest

from coconut import evaluate
from coconut.analysis.config import TableConfig
from coconut.analysis.suite_comparison import compare_suite
from coconut.config import DataFiles, EngineConfig, Precision, TaskName
from coconut.data.datasets import file_of_set
from coconut.evaluation.config import EvaluateConfig, SuiteConfig, SuiteSet
from coconut.evaluation.suite import weights_digest
from coconut.reporting import run_table
from coconut.rl.policy_table import write_table
from coconut.runs.checkpoints import Checkpoints
from coconut.runs.record import read_run
from coconut.training.trainer import run as run_train
from coconut.utils.files import read_json, write_json
from coconut.utils.hydra_app import CONF_DIR
from data_builders.evaluation_sets import EVALUATION_SETS

CPU = EngineConfig(device="cpu", threads=1)
TIMES = {"seconds_per_item", "seconds_at_batch_1"}
OWN = {"set", "key", "timed", "seconds_at_batch_1"}  # entries that only a set of a suite has


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of one seed, and the sets `near` (8 rows) and `far` (10 rows)."""
    folder = tmp_path_factory.mktemp("suite")
    data = graph_files(folder, 32, 8, 20)
    for method in ("coconut", "cot"):
        assert run_train(small_run(folder / method, data, method=method)) == 0
    write_json(folder / "near_test.json", graph_rows(seed=1, count=8))
    write_json(folder / "far_test.json", graph_rows(seed=2, count=10))
    return folder


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """A copy of the runs and the sets, to be changed."""
    return shutil.copytree(runs, tmp_path / "copy")


def graphs(folder: Path, judge: TaskName = TaskName.prosqa) -> SuiteConfig:
    sets = {"near": SuiteSet(TaskName.prosqa), "far": SuiteSet(judge)}
    return SuiteConfig("graphs", sets, [str(folder)], timed=3)


def asked(folder: Path, run: str = "coconut", judge: TaskName = TaskName.prosqa, **values: Any) -> EvaluateConfig:
    config = EvaluateConfig(run=str(folder / run), suite=graphs(folder, judge), engine=CPU, batch_size=4)
    return replace(config, **values)


def table_of(folder: Path, run: str = "coconut") -> dict[str, Any]:
    return read_json(folder / run / "evaluation" / "suites" / "graphs.json")


def written(folder: Path) -> dict[str, int]:
    """When the results of the sets were written."""
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "coconut" / "evaluation").glob("*.json")}


def test_a_set_has_the_numbers_of_a_single_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.run(asked(folder)) == 0
    screen = capsys.readouterr().out
    found = table_of(folder)
    assert [row["set"] for row in found["rows"]] == ["near", "far"]
    results = folder / "coconut" / "evaluation"
    for row in found["rows"]:
        name, files = row["set"], DataFiles(test=row["file"])
        assert evaluate.run(EvaluateConfig(run=str(folder / "coconut"), data=files, engine=CPU, batch_size=4)) == 0
        of_suite = read_json(results / f"{name}.json")
        single = read_json(results / f"{name}_test-{row['sha256'][:8]}.json")
        assert of_suite.keys() - single.keys() == OWN
        assert {key for key in single if single[key] != of_suite[key]} <= TIMES
        predictions = [results / f"{stem}.predictions.jsonl" for stem in (name, f"{name}_test-{row['sha256'][:8]}")]
        assert predictions[0].read_text() == predictions[1].read_text()
        rows = [json.loads(line) for line in predictions[0].read_text().splitlines()]
        right = sum(each["correct"] for each in rows)
        interval = binomtest(right, len(rows)).proportion_ci(method="wilson")
        assert (row["rows"], row["correct"], row["accuracy"]) == (len(rows), right, right / len(rows))
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
        for key, column in (("new_tokens", "new_tokens"), ("num_thoughts", "thoughts"), ("truncated", "truncated")):
            assert row[column] == pytest.approx(sum(each[key] for each in rows) / len(rows))
        assert row["timed"] == 3
        assert 0 < row["seconds_at_batch_1"] < 60
    near, far = found["rows"]
    assert found["facts"]["macro_average"] == pytest.approx((near["accuracy"] + far["accuracy"]) / 2)
    assert "Macro average over the 2 sets, each with the same weight" in screen
    with open(results / "suites" / "graphs.csv", encoding="utf-8") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [near["accuracy"], far["accuracy"]]
    page = (results / "suites" / "graphs.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert loads.names == []
    assert f"{100 * near['accuracy']:.1f} %" in words(page).replace("\N{NO-BREAK SPACE}", " ")
    assert read_run(folder / "coconut").test != "near", "a set of a suite is not the run's own test"


def test_a_sampled_suite_says_what_its_accuracy_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = asked(folder, samples=2, temperature=1.0)
    config.suite = replace(config.suite, sets={"near": config.suite.sets["near"]}, timed=0)
    assert evaluate.run(config) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert "Accuracy: pass@1 of 2 sampled answers to each question, with a bootstrap interval" in screen
    assert "Seconds a question, with all its answers: in batches of 4" in screen
    assert "greedy" not in screen
    assert "Macro average" not in screen, "of one set"
    results = folder / "coconut" / "evaluation"
    (row,) = read_json(results / "suites" / "graphs-samples-2-temperature-1.0.json")["rows"]
    lines = (results / "near-samples-2-temperature-1.0.predictions.jsonl").read_text().splitlines()
    right = [answer["correct"] for line in lines for answer in json.loads(line)["answers"]]
    assert (row["rows"], row["accuracy"]) == (len(lines), pytest.approx(sum(right) / len(right)))


def test_finished_sets_are_kept_and_others_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = (folder / "far_test.json").rename(folder / "hidden.json")
    assert evaluate.run(asked(folder)) == evaluate.SET_MISSING
    first = written(folder)
    assert set(first) == {"near"}
    hidden.rename(folder / "far_test.json")
    assert evaluate.run(asked(folder)) == 0
    assert "near: evaluated before with the same settings" in capsys.readouterr().out
    second = written(folder)
    assert second["near"] == first["near"]
    (folder / "coconut" / "evaluation" / "far.json").unlink()  # as if it was killed before the result was written
    assert evaluate.run(asked(folder)) == 0
    third = written(folder)
    assert (third["near"], third["far"] > second["far"]) == (first["near"], True)
    assert evaluate.run(asked(folder, batch_size=5)) == 0
    fourth = written(folder)
    assert all(fourth[name] > third[name] for name in ("near", "far")), "other settings"
    write_json(folder / "near_test.json", graph_rows(seed=3, count=8))
    assert evaluate.run(asked(folder, batch_size=5)) == 0
    fifth = written(folder)
    assert (fifth["near"] > fourth["near"], fifth["far"]) == (True, fourth["far"]), "another file"
    assert evaluate.run(asked(folder, num_thoughts=0)) == 0
    assert {"near-num_thoughts-0", "far-num_thoughts-0", "near", "far"} == set(written(folder))
    assert (folder / "coconut" / "evaluation" / "suites" / "graphs-num_thoughts-0.html").is_file()


def test_other_weights_have_another_digest() -> None:
    lm = build("gpt2", num_thoughts=2)
    before = weights_digest(lm)
    assert before == weights_digest(lm)
    assert before != weights_digest(build("gpt2", num_thoughts=3)), "the same weights, asked with more thoughts"
    assert before != weights_digest(shift_weights(lm, 1e-6))


def no_file(folder: Path) -> str:
    (folder / "far_test.json").unlink()
    return f"{folder} holds no far_test.json, far.jsonl, far.json or folder far"


def broken_release(folder: Path) -> str:
    (folder / "far_test.json").unlink()
    (folder / "far.jsonl").write_text('{"question": "How many?", "answer": "none"}\n')
    return "far.jsonl has 1 bad of 1 rows"


def fewer_rows(folder: Path) -> str:
    write_json(folder / "far_test.json", graph_rows(seed=2, count=9))
    return "has 9 rows, and the set has 10"


def another_judge(folder: Path) -> str:
    return "of 10 gold answers 10 would be judged wrong"


@pytest.mark.parametrize("spoil", [no_file, broken_release, fewer_rows, another_judge])
def test_a_missing_set_is_named_and_the_others_are_evaluated(
    spoil: Callable[[Path], str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reason = spoil(folder)
    config = asked(folder, judge=TaskName.prontoqa if spoil is another_judge else TaskName.prosqa)
    config.suite.sets["far"] = replace(config.suite.sets["far"], rows=10, builder="gsm8k")
    assert evaluate.run(config) == evaluate.SET_MISSING
    near, far = table_of(folder)["rows"]
    assert (near["missing"], near["rows"]) == ("", 8)
    assert far["accuracy"] is None
    assert reason in far["missing"]
    assert table_of(folder)["facts"]["macro_average"] is None
    assert reason.split(",")[0] in " ".join(capfd.readouterr().out.split())
    page = words((folder / "coconut" / "evaluation" / "suites" / "graphs.html").read_text())
    assert "far is missing" in page
    assert "Macro average" not in page


def test_a_judge_that_cannot_judge_the_gold_answers_is_refused(folder: Path) -> None:
    config = EvaluateConfig(run=str(folder / "coconut"), engine=CPU)
    with pytest.raises(ValueError, match=r"of 20 gold answers 20 would be judged wrong:\n  row 1, answer"):
        evaluate.run(replace(config, judge=TaskName.prontoqa))
    assert evaluate.run(replace(config, judge=TaskName.pointers, limit=3)) == 0
    found = read_json(folder / "coconut" / "evaluation" / "test-judge-pointers-limit-3.json")
    assert (found["judge"], found["default_settings"]) == ("pointers", False)
    assert evaluate.run(replace(config, judge=TaskName.prosqa)) == 0
    found = read_json(folder / "coconut" / "evaluation" / "test.json")
    assert (found["judge"], found["default_settings"]) == ("prosqa", True)


def test_questions_of_training_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid, near = (read_json(folder / f"{name}.json") for name in ("train", "valid", "near_test"))
    write_json(folder / "near_test.json", [*train[:3], *valid[:1], *near[:4]])
    assert evaluate.run(asked(folder)) == 0
    near, far = table_of(folder)["rows"]
    assert (near["seen_train"], near["seen_valid"], near["rows"]) == (3, 1, 8)
    assert (far["seen_train"], far["seen_valid"]) == (0, 0)
    assert (
        "near: 8 questions, 3 of them in the training data and 1 of them in the validation" in capsys.readouterr().out
    )


def test_a_saved_model_is_evaluated_like_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    saved = Checkpoints(folder / "coconut").find("best")
    assert evaluate.run(asked(folder)) == 0
    assert evaluate.run(replace(asked(folder), run=str(saved), output="saved")) == 0
    ours, theirs = table_of(folder)["rows"], read_json(folder / "saved" / "suites" / "graphs.json")["rows"]
    unequal = {key for one, other in zip(ours, theirs, strict=True) for key in one if one[key] != other[key]}
    assert unequal <= TIMES | {"seen_train", "seen_valid"}
    assert theirs[0]["seen_train"] is None


def test_files_of_a_set_are_found_or_converted_once(tmp_path: Path) -> None:
    def find(*folders: str) -> Path:
        return Path(file_of_set("sums", "gsm8k", {}, {"hub": "nowhere/at-all"}, [tmp_path / f for f in folders], None))

    (tmp_path / "a" / "sums").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    line = '{"question": "1 and 2?", "answer": "It is <<1+2=3>>3.\\n#### 3"}\n'
    (tmp_path / "a" / "sums" / "test.jsonl").write_text(line)
    made = find("b", "a")
    assert read_json(made) == [{"question": "1 and 2?", "steps": ["<<1+2=3>>"], "answer": "3"}]
    assert find("a") == made
    (tmp_path / "a" / "sums" / "test.jsonl").write_text(line * 2)
    assert len(read_json(find("a"))) == 2, "the file has changed"
    write_json(tmp_path / "b" / "sums_test.json", [])
    assert find("b", "a") == tmp_path / "b" / "sums_test.json"
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*none"):
        find("a", "none")


def test_a_test_file_beside_a_train_file_is_no_whole_set(tmp_path: Path) -> None:
    """In the hub's layout the files may be train.json and test.json. MultiArith has the rows of both."""
    folder = tmp_path / "sums"
    folder.mkdir()
    counts = {"train": 420, "test": 180}
    for split, count in counts.items():
        rows = [{"question": f"{split} {i} and 1?", "final_ans": f"{i + 1}"} for i in range(count)]
        (folder / f"{split}.json").write_text(json.dumps(rows))
    whole = file_of_set("sums", "multiarith", {"subset": "all"}, {}, [tmp_path], None)
    expected = [f"{split} {i} and 1?" for split, count in counts.items() for i in range(count)]
    assert [row["question"] for row in read_json(Path(whole))] == expected
    part = file_of_set("sums", "multiarith", {"subset": "test180"}, {}, [tmp_path], None)
    assert [row["question"] for row in read_json(Path(part))] == expected[420:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": DataFiles(test="a.json")}, r"data\.test=a\.json and suite=graphs are both given"),
        ({"split": "valid"}, "split=valid and suite=graphs are both given"),
    ],
)
def test_a_suite_has_its_own_files(values: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        asked(folder, **values)


def test_bad_suites_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suite\.folder=a is given without a suite\. Add suite=NAME"):
        SuiteConfig(folder=["a"])
    with pytest.raises(ValueError, match=r"suite\.sets\.test has the name of a split"):
        SuiteConfig("x", {"test": SuiteSet(TaskName.prosqa)})
    empty = asked(folder)
    empty.suite.folder = [str(tmp_path / "nothing"), str(tmp_path / "none")]
    for name in empty.suite.folder:
        Path(name).mkdir()
    with pytest.raises(
        ValueError, match=r"No set of suite=graphs can be had:\n  near: .*nothing, .*none hold no near_"
    ):
        evaluate.run(empty)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "suite").glob("*.yaml")))
def test_suites_compose(name: str) -> None:
    """Each set has the judge and the rows of the published one."""
    config = composed("evaluate", EvaluateConfig, ["run=x", f"suite={name}", "suite.folder=[a,b]"])
    assert config.suite.name == name
    assert config.suite.sets
    assert config.suite.folder == ["a", "b"]
    for set_name, its in config.suite.sets.items():
        if set_name in EVALUATION_SETS:
            published = EVALUATION_SETS[set_name]
            assert (its.judge, its.rows) == (published.judge, published.subset(its.build.get("subset"))[1].rows)
    *others, last = config.suite.sets
    table = composed("run_table", TableConfig, ["runs=[x]", f"suite={name}", f"~suite.sets.{last}"])
    assert list(table.suite.sets) == others
    assert composed("evaluate", EvaluateConfig, ["run=x"]).suite == SuiteConfig()


def mcnemar(a: list[int], b: list[int]) -> float:
    only_a, only_b = len(set(a) - set(b)), len(set(b) - set(a))
    return float(binomtest(only_a, only_a + only_b).pvalue)


def test_runs_are_compared_on_every_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ("coconut", "cot"):
        assert evaluate.run(asked(folder, run)) == 0
    right = {("coconut", "near"): [*range(8)], ("cot", "near"): [7],
             ("coconut", "far"): [0, 1, 2, 3], ("cot", "far"): [2, 3, 4, 5, 6, 7, 8]}  # fmt: skip
    for (run, name), answers in right.items():
        score(folder / run, name, answers)
    config = TableConfig(
        runs=[str(folder / "coconut"), str(folder / "cot")], suite=graphs(folder), output=str(folder / "out")
    )
    found = dict(compare_suite(config).pairs)
    p = {name: mcnemar(right["coconut", name], right["cot", name]) for name in ("near", "far")}
    assert p["near"] < p["far"]
    assert {name: pair.p for name, pair in found.items()} == pytest.approx(p)
    assert found["near"].p_holm == pytest.approx(2 * p["near"]), "two tests: two sets of one pair"
    assert found["far"].p_holm == pytest.approx(max(2 * p["near"], p["far"]))
    assert found["near"].difference == pytest.approx(7 / 8)
    assert (found["far"].a, found["far"].difference) == ("cot", pytest.approx(0.3))
    capsys.readouterr()
    assert write_table(config) == 0
    screen = capsys.readouterr().out
    assert max(len(line) for line in screen.splitlines() if not line.startswith("Table: ")) <= run_table.SCREEN
    assert "near" in screen.splitlines()[2]
    table = read_json(folder / "out" / "table-graphs.json")
    assert [(row["set"], row["method"]) for row in table["rows"]] == [
        (name, method) for name in ("near", "far") for method in ("coconut", "cot")
    ]
    assert [row["accuracy"] for row in table["rows"]] == pytest.approx([1, 1 / 8, 0.4, 0.7])
    assert "| coconut | 0 | 100.0 (" in (folder / "out" / "table-graphs.md").read_text()
    page = words((folder / "out" / "table-graphs.html").read_text())
    assert "coconut to cot" in page
    assert "cot to coconut" in page
    assert "8 of 8 4 of 10" in page, "the right answers of the run coconut on each set"
    with open(folder / "out" / "table-graphs.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_runs_that_were_evaluated_in_bfloat16_are_compared(folder: Path) -> None:
    runs = [str(folder / run) for run in ("coconut", "cot")]
    for run in ("coconut", "cot"):
        assert evaluate.run(asked(folder, run, engine=replace(CPU, precision=Precision.bfloat16))) == 0
        score(folder / run, "near-bfloat16", [0] if run == "cot" else [])
    config = TableConfig(runs=runs, suite=graphs(folder), precision=Precision.bfloat16)
    compared = compare_suite(config)
    assert list(compared.sets) == ["near", "far"]
    assert compared.command.endswith(" suite=graphs precision=bfloat16")
    assert dict(compared.pairs)["near"].difference == pytest.approx(1 / 8)
    with pytest.raises(ValueError, match="split=test-bfloat16"):
        TableConfig(runs=runs, precision=Precision.bfloat16)


def test_tables_of_suites_refuse_what_cannot_be_compared(folder: Path) -> None:
    both = [str(folder / "coconut"), str(folder / "cot")]
    config = TableConfig(runs=both, suite=graphs(folder))
    assert evaluate.run(asked(folder)) == 0
    with pytest.raises(ValueError, match=r"near is left out, .* on it: .*cot\.(?s:.*)Evaluate first:\ncoconut"):
        compare_suite(config)
    hidden = (folder / "near_test.json").rename(folder / "hidden.json")
    assert evaluate.run(asked(folder, "cot")) == evaluate.SET_MISSING
    compared = compare_suite(config)
    assert list(compared.sets) == ["far"]
    assert compared.warnings[0].startswith("near is left out, since these runs were not evaluated on it: ")
    hidden.rename(folder / "near_test.json")
    others = asked(folder, "cot")
    others.suite.sets["near"] = SuiteSet(TaskName.prosqa, max_new_tokens=5)
    assert evaluate.run(others) == 0
    with pytest.raises(ValueError, match=r"evaluated on near with different values of max_new_tokens: .*cot 5\."):
        compare_suite(config)
    with pytest.raises(ValueError, match="suite=graphs and split=valid are both given"):
        replace(config, split="valid")
