"""The report of a run: true, complete, one file, and safe to open."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.html import Loads, words
from helpers.runs import graph_files, rewrite, small_run

from coconut import analyze, evaluate
from coconut.analysis.config import AnalyzeConfig
from coconut.config import EngineConfig
from coconut.evaluation.config import EvaluateConfig
from coconut.methods import Curriculum, Unit
from coconut.reporting.plots import DARK, LIGHT, Band, as_svg, graph_picture, learning_curves
from coconut.reporting.run_page import answers, command, headline, report
from coconut.runs.record import RunRecord, read_run
from coconut.training.trainer import run as train
from coconut.utils.files import read_json, write_json


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight updates, not evaluated."""
    folder = tmp_path_factory.mktemp("report")
    curriculum = Curriculum(max_stage=2, length_unit=Unit.updates, stage0_length=2, stage_length=2, total_length=8)
    data = graph_files(folder, 32, 8, 20)
    assert train(small_run(folder / "run", data, name="small & quick", curriculum=curriculum, batch_size=8)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> Path:
    run = trained.parent / "evaluated"
    shutil.copytree(trained, run)
    for split in ("test", "valid"):
        assert evaluate.run(EvaluateConfig(run=str(run), split=split, engine=EngineConfig(device="cpu"))) == 0
    return run


@pytest.fixture
def copy(evaluated: Path, tmp_path: Path) -> Path:
    """The evaluated run, to be changed."""
    return shutil.copytree(evaluated, tmp_path / "run")


def page_of(run: Path | RunRecord) -> str:
    return analyze.page_of(run if isinstance(run, RunRecord) else read_run(run))


def test_the_page_shows_the_test_result(evaluated: Path):
    found = read_json(evaluated / "evaluation" / "test.json")
    text = words(page_of(evaluated))
    assert f"{100 * found['accuracy']:.1f} % on 20 unseen questions" in text
    low, high = found["interval"]
    assert f"95 % confidence interval {100 * low:.1f} % to {100 * high:.1f} %" in text
    assert "chance 50.0 %" in text
    assert "small &amp; quick" in text
    assert "the first k steps become k*c thoughts" in text


def test_the_page_shows_every_stage_and_what_was_trained(evaluated: Path):
    html, run = page_of(evaluated), read_json(evaluated / "run.json")
    text = words(html)
    for stage in ("whole chain", "1 thought, without the first", "2 thoughts, without the first 2 steps"):
        assert stage in text
    for name in ("stage 0", "stage 1", "stage 2"):
        assert f">{name}<" in html  # in the figure
    for split in ("train", "valid"):
        assert run["data"][split]["sha256"][:12] in text
    assert f"{run['parameters']:,}" in text
    assert "8 examples an update" in text
    assert run["sessions"][0]["versions"]["torch"] in text
    assert "&#34;intermediate_size&#34;: 32" in html  # config.json, whole


def test_the_page_names_every_term_of_the_loss(trained: Path):
    run = read_run(trained)
    assert "Terms" not in page_of(run)
    plan = run.description["plan"] | {"terms": {"tokens": 1.0, "states": 20.0}}
    rows = [row | {"term_tokens": 2.0, "term_states": 0.0 if row["stage"] == 0 else 0.1} for row in run.train]
    html = page_of(replace(run, train=rows, description=run.description | {"plan": plan}))
    assert all(html.count(f">{name}<") == 2 for name in ("Terms", "tokens", "states")), "in the wide and narrow figure"
    assert "It is tokens + 20 · states" in words(html)


def test_the_page_loads_no_other_file(evaluated: Path):
    html, loads = page_of(evaluated), Loads()
    loads.feed(html)
    assert all(name.startswith("#") for name in loads.names)
    assert not loads.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert len(loads.ids) == len(set(loads.ids)), "an id that two figures share would mix them up"


def test_questions_are_escaped(copy: Path):
    file = copy / "evaluation" / "test.predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    evil = "<script>alert('1')</script>"
    rows[0] |= {"question": evil, "text": evil, "predicted": evil, "gold": evil, "correct": True}
    rows[1] |= {"question": "<b> $x | $x </svg> ? <b> or </svg> from $x", "gold": "</svg>", "correct": False}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html, loads = page_of(copy), Loads()
    loads.feed(html)
    assert "script" not in loads.tags
    assert html.count("&lt;script&gt;") >= 3
    assert html.count("<svg") == html.count("</svg>")


def test_a_run_without_evaluation_shows_the_command(trained: Path):
    text = words(page_of(trained))
    assert "no test result yet" in text
    assert f"coconut evaluate run={trained}" in text
    assert "unseen questions" not in text
    assert "The first questions of the validation data, as answered after update 8." in text


def test_validation_accuracy_is_never_a_test_result(copy: Path):
    text = words(page_of(copy))
    assert "the file that chose the checkpoint, so no test result" in text
    (copy / "evaluation" / "test.json").unlink()
    assert "no test result yet" in words(page_of(copy))

    shutil.copy(copy / "evaluation" / "valid.json", copy / "evaluation" / "test.json")
    rewrite(copy / "evaluation" / "test.json", split="test")
    text = words(page_of(copy))
    assert "questions that it was trained or validated on, so it is no test result" in text
    assert "unseen questions" not in text


def test_questions_that_were_seen_are_not_called_unseen(copy: Path):
    file = copy / "evaluation" / "test.json"
    rewrite(file, seen={"train": 3, "valid": 1})
    text = words(page_of(copy))
    assert "on 20 questions, 3 of them in the training data and 1 of them in the validation data" in text
    assert "unseen questions" not in text
    rewrite(file, seen={"train": 20, "valid": 0})
    assert "questions in the training data, so no test result" in words(page_of(copy))


@pytest.mark.slow
def test_an_evaluation_of_another_file_counts_with_the_usual_settings(copy: Path):
    for end in ("json", "predictions.jsonl"):
        (copy / "evaluation" / f"test.{end}").rename(copy / "evaluation" / f"other.{end}")
    rewrite(copy / "evaluation" / "other.json", file="/data/other.json")
    assert "on 20 unseen questions" in words(page_of(copy))
    rewrite(copy / "evaluation" / "other.json", default_settings=False)
    assert "no test result yet" in words(page_of(copy))


def test_an_evaluation_of_an_earlier_checkpoint_is_marked(copy: Path):
    rewrite(copy / "evaluation" / "test.json", step=1)
    assert "not the best on validation data" in words(page_of(copy))


def test_a_run_that_is_not_complete(evaluated: Path):
    record = read_run(evaluated)
    begun = replace(record, train=record.train[:3], valid=record.valid[:1], test=None, evaluations={}, answers=[])
    text = words(page_of(begun))
    for said in ("Not complete: update 3 of 8.", "training has not reached its last stage", "1 of 2", "0 of 4",
                 "None yet"):  # fmt: skip
        assert said in text
    assert "Not complete: update 0 of 8." in words(page_of(replace(begun, train=[], valid=[])))


RIGHT = {"question": "Who?", "gold": "Tom", "text": "a b ### Tom", "predicted": "Tom", "correct": True,
         "truncated": False}  # fmt: skip


def test_right_and_wrong_answers_are_shown_apart(evaluated: Path):
    record = read_run(evaluated)
    wrong = {**RIGHT, "text": "a b c", "predicted": None, "correct": False, "truncated": True}
    text = words(page_of(replace(record, answers=[RIGHT] * 9 + [wrong] * 2)))
    assert "Right, the first 4 of 9" in text
    assert "Wrong, all 2" in text
    assert "a b c ✗ answered – right answer Tom truncated at the limit of new tokens" in text
    assert "None of them is wrong." in words(page_of(replace(record, answers=[RIGHT])))


def test_answer_format_may_contain_other_braces(evaluated: Path):
    record = read_run(evaluated)
    data = record.config["data"]
    config = {**record.config, "data": {**data, "format": {**data["format"], "answer": "{x} {}"}}}
    for text, is_shown in (("{x} Tom", False), ("a b {x} Tom", True)):
        page = words(page_of(replace(record, config=config, answers=[{**RIGHT, "text": text}])))
        assert "Who?" in page
        assert ("{x} Tom" in page) == is_shown, "an answer is shown as written where it has more than its format"


def test_a_section_is_a_function_of_the_record(evaluated: Path):
    record = read_run(evaluated)
    html = report(record, [answers, headline])
    assert html.index('id="answers"') < html.index('id="headline"')
    assert 'id="learning"' not in html


@pytest.mark.slow
def test_the_command_names_its_file(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert analyze.run(AnalyzeConfig(run=str(copy))) == 0
    assert f"Report: {copy / 'report.html'}" in capsys.readouterr().out
    file = tmp_path / "elsewhere" / "mine.html"
    assert analyze.run(AnalyzeConfig(run=str(copy), output=str(file))) == 0
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in file.parent.iterdir()] == ["mine.html"]


def test_a_report_that_fails_leaves_the_old_one(copy: Path, monkeypatch: pytest.MonkeyPatch):
    (copy / "report.html").write_text("old")

    def fail(*_: object):
        raise OSError("disk full")

    monkeypatch.setattr("coconut.utils.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        analyze.run(AnalyzeConfig(run=str(copy)))
    assert (copy / "report.html").read_text() == "old"
    assert not list(copy.glob(".report*"))


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is not a run: it has no config\.json"):
        analyze.run(AnalyzeConfig(run=str(tmp_path)))
    with pytest.raises(ValueError, match="there is no such folder"):
        read_run(tmp_path / "nowhere")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ValueError, match=r"no run\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Every a is a b. Tom is a a. Is Tom a b or c?", "Tom is a b."),  # in sentences
        ("0 1 ? 1 or 2 from 0", "5"),  # the answer is no option
        ("How many?", "5"),
        (" | ".join(f"{i} {i + 1}" for i in range(40)) + " ? 1 or 40 from 0", "1"),  # too large
    ],
)
def test_only_small_symbolic_graphs_are_drawn(question: str, answer: str):
    assert graph_picture(question, answer, "g") is None


def test_figures_are_in_the_colours_of_the_page():
    bands = [Band(f"stage {i}", f"{i} thoughts", 10 * i, 10 * i + 10) for i in range(9)]
    accuracy = [(5, 0.2), (80, 0.9)]
    for width in (350, 720):
        svg = as_svg(learning_curves(width, bands, accuracy, [(1, 3.0), (90, 0.1)], [(5, 2.0)], 0.5, accuracy[1]), "f")
        assert "chance, 50.0 %" in svg
        assert not re.search("#[0-9a-f]{6}", svg)
    assert LIGHT.keys() == DARK.keys()


def test_commands_are_shown_as_typed():
    assert command("/x/coconut/train.py seed=1") == "coconut train seed=1"
