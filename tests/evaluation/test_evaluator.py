"""Evaluation: every question once, counted as said, and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import build
from helpers.runs import copy_until, graph_files, graph_rows, small_run
from scipy.stats import norm

from coconut import LatentLM
from coconut.config import DataFiles, TooLong, Unreadable
from coconut.data.examples import Example
from coconut.data.questions import read_questions
from coconut.evaluate import run as run_evaluate
from coconut.evaluation.config import EvaluateConfig
from coconut.evaluation.evaluator import evaluate, task_of
from coconut.generate import run as run_generate
from coconut.generation.config import GenerateConfig
from coconut.generation.generate import Generated
from coconut.methods import NOTHING, PromptFormat
from coconut.runs.description import read_results
from coconut.runs.loading import starting_point
from coconut.tasks import TASKS
from coconut.training.trainer import run as run_train
from coconut.utils.files import read_json, sha256, write_json


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run_train(small_run(folder / "run", graph_files(folder, 32, 8, 20))) == 0
    return folder / "run"


def evaluated(trained: Path, file: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Write these rows to a file, and give the result of their evaluation."""
    write_json(file, rows)
    assert run_evaluate(EvaluateConfig(run=str(trained), data=DataFiles(test=str(file)), **settings)) == 0
    return read_results(trained)[f"{file.stem}-{sha256(file)[:8]}"]


def saying(*texts: str) -> Any:
    """A model's answers, given in the order in which it is asked: longest question first."""
    queue = list(texts)

    class Scripted(LatentLM):
        def generate(
            self, input_ids: Any, attention_mask: Any = None, max_new_tokens: Any = None, **options: Any
        ) -> Any:
            said = [queue.pop(0) for _ in range(len(input_ids))]
            lengths = [len(text.split()) for text in said]
            tensor = input_ids.new_tensor
            cut, fed = tensor([n > 8 for n in lengths]), torch.zeros(len(said), 3, 4)
            thoughts = tensor([3] * len(said))
            passes = tensor([n + 4 + (n <= 8) for n in lengths])
            return Generated(input_ids, tensor(lengths), cut, thoughts, passes, said, fed, [""] * len(said), [])

    lm = build("gpt2", num_thoughts=3, steps_cut=1, format=PromptFormat())
    return Scripted(lm.base, lm.tokenizer, lm.special, lm.reasoning)


def test_evaluate_counts_correct_answers_tokens_and_passes() -> None:
    examples = [
        Example("1 2 3 4 5 6", ("s1", "s2"), "7"),
        Example("1 2 3 4 5", ("s1", "s2"), "7"),
        Example("1 2 3 4", (), "7"),
        Example("1 2 3", ("s1",), "7"),
    ]
    endless = "and on and on and on and on and on"
    lm = saying("s2\n### 7", "s1\ns2\n### 7", "### 8", endless, endless)  # asked again, with the whole limit
    result, predictions, _ = evaluate(lm, TASKS["gsm8k"], examples, batch_size=2)
    assert [p.correct for p in predictions] == [True, True, False, False]
    assert [p.chain_match for p in predictions] == [True, False, None, None]
    assert [p.predicted for p in predictions] == ["7", "7", "8", None]
    assert [p.question for p in predictions] == [e.question for e in examples], "in the order of the file"
    assert (result.count, result.correct, result.accuracy) == (4, 2, 0.5)
    assert result.mean_new_tokens == (3 + 4 + 2 + 10) / 4
    assert result.num_thoughts == 3
    assert result.truncated == 0.25
    assert result.chance_accuracy is None


@pytest.mark.parametrize("limit", [1, 3, 12])
def test_answers_that_are_generated_again_are_those_of_one_round(
    trained: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch long answers are generated once more with the whole limit, alone at once."""
    lm = LatentLM.from_pretrained(starting_point(str(trained)))
    examples = [Example(row["question"], tuple(row["steps"]), row["answer"]) for row in graph_rows(5, 12)]
    asked: list[tuple[int, int]] = []

    def generate(ids: Any, mask: Any, *, max_new_tokens: int, **options: Any) -> Generated:
        asked.append((len(ids), max_new_tokens))
        return LatentLM.generate(lm, ids, mask, max_new_tokens=max_new_tokens, **options)

    alone = evaluate(lm, TASKS["prosqa"], examples, max_new_tokens=limit, batch_size=1)
    monkeypatch.setattr(lm, "generate", generate)
    together = evaluate(lm, TASKS["prosqa"], examples, max_new_tokens=limit, batch_size=5)
    assert together.predictions == alone.predictions
    torch.testing.assert_close(together.thoughts, alone.thoughts)
    first, again = asked[:3], asked[3:]
    assert first[0] == (5, max(limit // 4, 1))
    assert all(most == limit for _, most in again)
    assert bool(again) == (limit > 1)


def test_interval_is_that_of_wilson() -> None:
    lm = saying(*["### 7"] * 9, "### 8")
    result, *_ = evaluate(lm, TASKS["gsm8k"], [Example("1 2", (), "7")] * 10)
    z, p, n = norm.ppf(0.975), 0.9, 10
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert result.interval == pytest.approx((centre - half, centre + half))


def test_evaluation_writes_result_and_predictions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for batch_size in (20, 7):
        assert run_evaluate(EvaluateConfig(run=str(trained), batch_size=batch_size)) == 0
        assert read_results(trained)["test"]["batch_size"] == batch_size
        results.append(read_results(trained)["test"] | {"batch_size": 0, "seconds_per_item": 0})
    assert results[0] == results[1], "the size of a batch changes nothing else"
    said = capsys.readouterr().out
    result = read_results(trained)["test"]
    assert result["count"] == 20
    assert result["chance_accuracy"] == 0.5
    assert (result["method"], result["stage"], result["num_thoughts"]) == ("coconut", 2, 2)
    assert f"accuracy     {100 * result['accuracy']:.1f} % ({result['correct']} of 20)" in said
    rows = [json.loads(line) for line in (trained / "evaluation" / "test.predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert sum(row["correct"] for row in rows) == result["correct"]


def test_non_default_settings_are_part_of_the_name(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluate(EvaluateConfig(run=str(trained), num_thoughts=0, limit=5))
    result = read_results(trained)["test-num_thoughts-0-limit-5"]
    assert (result["num_thoughts"], result["count"]) == (0, 5)
    run_evaluate(EvaluateConfig(run=str(trained), split="valid"))
    assert read_results(trained)["valid"]["chose_the_checkpoint"]
    assert "no test result" in capsys.readouterr().out
    own = [{"question": "0 zebra ?", "steps": [], "answer": "zebra"}]
    assert evaluated(trained, trained.parent / "own.json", own)["chance_accuracy"] is None
    assert "1 words of the questions are not in the model's vocabulary" in capsys.readouterr().out


def test_another_file_named_test_does_not_overwrite_the_test_result(trained: Path, tmp_path: Path) -> None:
    run_evaluate(EvaluateConfig(run=str(trained)))
    before = read_results(trained)["test"]
    evaluated(trained, tmp_path / "test.json", read_json(trained.parent / "test.json")[:3])
    assert read_results(trained)["test"] == before
    with pytest.raises(ValueError, match=r"split=test is evaluated\. Add split=valid"):
        EvaluateConfig(run=str(trained), data=DataFiles(valid="other.json"))


def test_seen_questions_are_counted(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_results(trained)["test"]["seen"] == {"train": 0, "valid": 0}
    seen, own = (read_json(trained.parent / f"{split}.json") for split in ("train", "test"))
    for name, rows, what in (
        ("copy", seen[:3], "so its accuracy is no test result"),
        ("some", seen[:3] + own[:5], "which may make its accuracy too high"),
    ):
        evaluated(trained, tmp_path / f"{name}.json", rows)
        assert f"questions, 3 of them in the training data, {what}" in capsys.readouterr().out
    for path in (trained / "evaluation").glob("[cs]o*"):
        path.unlink()


def test_questions_without_room_for_an_answer_are_refused_or_skipped(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, rows = tmp_path / "long.json", read_json(trained.parent / "test.json")[:2]
    rows[0]["question"] = "0 " * 100
    with pytest.raises(ValueError, match=r"1 of 2 questions leave no room .* question 1 \(100 tokens\)"):
        evaluated(trained, file, rows)
    evaluated(trained, file, rows, too_long=TooLong.skip)
    assert "1 questions, too long or with a gold answer that would be judged wrong" in capsys.readouterr().out


def test_chain_match_is_none_if_thoughts_replace_a_part_of_a_step() -> None:
    lm = saying("### 7")
    lm.reasoning = replace(lm.reasoning, slot=NOTHING, steps_cut=0, tokens_cut=8)
    result, *_ = evaluate(lm, TASKS["gsm8k"], [Example("1 2", ("s",), "7")])
    assert result.chain_match is None


def test_answers_are_read_without_their_format() -> None:
    lm = saying("\\boxed{7}")
    lm.reasoning = replace(lm.reasoning, format=PromptFormat(answer="\\boxed{{}}"))
    _, (prediction,), _ = evaluate(lm, TASKS["prosqa"], [Example("1 2", (), "7")])
    assert (prediction.predicted, prediction.correct) == ("7", True)


def test_generate_answers_one_question(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    question = graph_rows(seed=0, count=60)[45]["question"]
    assert run_generate(GenerateConfig(run=str(trained), question=question)) == 0
    first = capsys.readouterr()
    assert "[2 thoughts, " in first.err
    config = GenerateConfig(run=str(trained), question="-")
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(f"{question}\n".encode())))
    run_generate(config)
    assert capsys.readouterr().out == first.out
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"1 2\n\xe9")))
    with pytest.raises(ValueError, match=r"Standard input is not UTF-8 text .*line 2 holds 0xE9, byte 5 of all.*iconv"):
        run_generate(config)
    run_generate(GenerateConfig(run=str(trained), question=question, num_thoughts=1, temperature=1.0))
    assert "[1 thought, " in capsys.readouterr().err


def test_generate_answers_the_questions_of_a_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [row["question"] for row in graph_rows(seed=0, count=8)]
    (tmp_path / "some.txt").write_text("\n\n".join(questions))
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    run_generate(GenerateConfig(run=str(trained), file=str(tmp_path / "some.txt"), batch_size=3))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in printed] == questions
    output = tmp_path / "answers.jsonl"
    asked = GenerateConfig(run=str(trained), file=str(tmp_path / "some.jsonl"))
    run_generate(replace(asked, output=str(output), show_thoughts=True))
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in written] == [row["text"] for row in printed]
    assert [len(row["thoughts"]) for row in written] == [2] * 8
    (tmp_path / "some.txt").write_text(questions[0], encoding="utf-8-sig")
    run_generate(GenerateConfig(run=str(trained), file=str(tmp_path / "some.txt")))
    assert json.loads(capsys.readouterr().out)["question"] == questions[0]
    for name, content, message in (
        ("bad.jsonl", b"", "holds no question"),
        ("bad.jsonl", b'{"q": "a"}', "line 1: there is no question"),
        ("bad.jsonl", b'{"question": null}', "line 1: there is no question"),
        ("bad.jsonl", b'{"question": ["a"]}', "line 1: there is no question"),
        ("bad.txt", b"1\n\xe9", r"bad\.txt is not UTF-8 text .*line 2 holds 0xE9.*iconv"),
        ("bad.jsonl", b'{"question": "\\ud800"}', "line 1: holds half of a surrogate pair"),
        ("bad.JSONL", b'{"question": ', "line 1: not JSON"),
        ("bad.csv", b"question,answer\n1 2,3\n", r"says neither text \(\.txt, \.text\).*nor JSON \(\.json"),
        ("bad.txt", b"1\n2\n" + b"1 " * 200, r"bad\.txt, question 3: it has 200 tokens"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run_generate(GenerateConfig(run=str(trained), file=str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"top_p=0\.5 is for sampling"):
        GenerateConfig(run="r", question="q", top_p=0.5)


@pytest.mark.parametrize("name", ["a.txt", "a.ndjson", "a.JSONL", "a.data", "a"])
def test_question_files_are_read_without_their_answers(tmp_path: Path, name: str) -> None:
    rows = [{"question": "1 2", "steps": [], "answer": "3"}, {"question": "4", "steps": [], "answer": "5"}]
    file = tmp_path / name
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\r\n".join(map(json.dumps, rows))):
        file.write_text(text)
        assert read_questions(str(file)) == ["1 2", "4"]


def test_question_lines_end_only_at_line_feeds(tmp_path: Path) -> None:
    questions = ["a\x0cb", "c\u2028d", "e\x85f", "[1, 2] {x}", "g\rh", "i"]
    file = tmp_path / "questions.TXT"
    for end in ("\n", "\r\n"):
        file.write_bytes(end.join(questions).encode())
        assert read_questions(str(file)) == questions


def test_generate_names_words_outside_the_vocabulary(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    asked = "Which animal barks?"
    told = "warning: not in the model's vocabulary: Which, animal, barks."
    run_generate(GenerateConfig(run=str(trained), question=asked))
    assert told in capsys.readouterr().err
    typed = iter([asked, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    run_generate(GenerateConfig(run=str(trained)))
    assert told in capsys.readouterr().err
    (tmp_path / "some.txt").write_text(f"{graph_rows(seed=0, count=1)[0]['question']}\n{asked}\n")
    run_generate(GenerateConfig(run=str(trained), file=str(tmp_path / "some.txt")))
    shown = capsys.readouterr()
    told = "1 of 2 questions have words outside the model's vocabulary. The first is question 2: Which, animal, barks."
    assert told in shown.err
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row.get("unknown") for row in rows] == [None, ["Which", "animal", "barks"]]


def test_evaluation_warns_of_gold_answers_that_cannot_be_generated(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_json(trained.parent / "test.json")[:3]
    result = evaluated(trained, tmp_path / "unknown.json", [*rows, {**rows[0], "answer": "zebra"}])
    assert "no words for 1 of 4 answers" in capsys.readouterr().out
    assert (result["count"], result["left_out"]) == (4, 0)
    file, wrong = tmp_path / "wrong.json", [*rows, {**rows[0], "answer": "0 ### 1"}]
    with pytest.raises(ValueError, match="row 4, answer '0 ### 1': '1' is read"):
        evaluated(trained, file, wrong)
    result = evaluated(trained, file, wrong, unreadable=Unreadable.skip)
    assert (result["count"], result["left_out"]) == (3, 1)
    run_evaluate(EvaluateConfig(run=str(trained), limit=3, max_new_tokens=1))
    assert "3 of 3 gold texts" in capsys.readouterr().out


def test_evaluation_of_a_run_without_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match="no task, as that of a reward model"):
        task_of({"task": None})


def test_generate_answers_typed_questions(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    questions = [row["question"] for row in graph_rows(seed=0, count=2)]
    run_generate(GenerateConfig(run=str(trained), question=questions[0]))
    said = capsys.readouterr().out.split()
    typed = iter([*questions, "1 " * 200, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert run_generate(GenerateConfig(run=str(trained), show_thoughts=True)) == 0
    shown = capsys.readouterr()
    assert shown.out.split()[: len(said)] == said
    assert shown.err.count("[thought 2, likeliest tokens: ") == 2
    assert "leaves no room" in shown.err, "and the conversation goes on"
    monkeypatch.setattr("sys.stdin", StringIO())
    with pytest.raises(ValueError, match="There is no question"):
        run_generate(GenerateConfig(run=str(trained)))


def test_a_run_before_its_last_stage_has_no_best_checkpoint(trained: Path, tmp_path: Path) -> None:
    early = str(copy_until(4, trained, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"no best checkpoint yet.*Use checkpoint=last"):
        run_evaluate(EvaluateConfig(run=early))
    assert run_evaluate(EvaluateConfig(run=early, checkpoint="last")) == 0


def test_a_missing_split_is_named(trained: Path) -> None:
    with pytest.raises(ValueError, match="split is 'dev'; it is one of train, valid, test"):
        EvaluateConfig(run="r", split="dev")
    with pytest.raises(FileNotFoundError, match=r"away\.json does not exist"):
        run_evaluate(EvaluateConfig(run=str(trained), data=DataFiles(test="away.json")))
