"""Gold answers are judged right, and there is room for them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers.models import build, byte_level_tokenizer
from helpers.runs import small_run

from coconut.config import DataConfig, TaskName, Unreadable
from coconut.data.examples import Example
from coconut.data.tokenization import build_word_tokenizer, tokenize
from coconut.evaluation.gold_answers import limit_for, read_back, readable, target_lengths, warn_of_limit
from coconut.methods import NOTHING, Curriculum, PromptFormat, Reasoning, Unit, plan
from coconut.models.latent_lm import LatentLM
from coconut.runs.checkpoints import Checkpoints
from coconut.tasks import TASKS
from coconut.training.trainer import run
from coconut.utils.files import read_json, write_json

FORMS = [
    PromptFormat(),
    PromptFormat("{}", "{} ", "### {}"),
    PromptFormat("{}", "{} ; ", "so ({})."),
    PromptFormat(answer="{}"),
]
HARD = ["2.5", "-3.5", "1,234.50", "$5.00", "O'Neil", "x-y", "C++", "a-1", "#3", "(x)", "10:30"]
EXAMPLES = [Example("q", ("### one : 2+3=5", f"{answer}|"), answer) for answer in HARD]


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize("words", [True, False])
def test_gold_answers_are_judged_right(form: PromptFormat, words: bool) -> None:
    tokenizer = build_word_tokenizer(EXAMPLES, form) if words else byte_level_tokenizer()
    data = tokenize(EXAMPLES, tokenizer, form)
    kept = readable(EXAMPLES, data, tokenizer, TASKS["prosqa"], form, file="f", unreadable=Unreadable.error)
    assert kept.tolist() == list(range(len(EXAMPLES)))


def test_readable_names_answers_that_the_task_cannot_judge(capsys: pytest.CaptureFixture[str]) -> None:
    answers = enumerate(["True", "No", "False", "Yes"], 3)
    examples = [Example("q", (), answer, where=f"line {number}") for number, answer in answers]
    tokenizer, form, task = build_word_tokenizer(examples), PromptFormat(), TASKS["prontoqa"]
    data = tokenize(examples, tokenizer)
    message = (
        "(?s)my.json: of 4 gold answers 2 would be judged wrong:\n  line 4, answer 'No': 'No' is read\n  line 6.*"
        "the task prontoqa.*unreadable=skip"
    )
    with pytest.raises(ValueError, match=message):
        readable(examples, data, tokenizer, task, form, file="my.json", unreadable=Unreadable.error)
    kept = readable(examples, data, tokenizer, task, form, file="my.json", unreadable=Unreadable.skip)
    assert kept.tolist() == [0, 2]
    assert "Left out 2 of 4 rows of my.json" in capsys.readouterr().out
    alone = readable(examples, None, None, task, form, file="my.json", unreadable=Unreadable.skip)
    assert alone.tolist() == [0, 2], "without a tokenizer, too"
    with pytest.raises(ValueError, match="no gold answer is judged right"):
        readable(examples[1:2], None, None, task, form, file="my.json", unreadable=Unreadable.skip)


def test_an_answer_with_unknown_words_is_refused_in_training_and_kept_in_a_test(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm, task, error = build("gpt2"), TASKS["prosqa"], Unreadable.error
    examples = [Example("1", ("2",), "3"), Example("1", ("2",), "the zebra")]
    with pytest.raises(ValueError, match=r"example 2, answer 'the zebra': the tokenizer has no word for .*the, zebra"):
        read_back(lm, examples, task, file="f", unreadable=error)
    data, kept = read_back(lm, examples, task, file="f", unreadable=error, keep_unknown=True)
    assert (len(data), kept.tolist()) == (2, [0, 1])
    assert "no words for 1 of 2 answers of f, which are counted as wrong" in capsys.readouterr().out


def test_readable_warns_of_steps_that_are_read_back_differently(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [Example("q", ("a", "b"), "c"), Example("q", ("a\nb", "c"), "c")]
    readable(examples, None, None, TASKS["prosqa"], PromptFormat(), file="f", unreadable=Unreadable.error)
    message = "f: in 1 rows the number of steps that is read back differs from the number in the row; the first is"
    assert f"{message} example 2, read as 3, with 2 in the row" in capsys.readouterr().out


def test_limit_for_leaves_room_for_every_gold_text(capsys: pytest.CaptureFixture[str]) -> None:
    examples = [Example("q", ("2 3",) * count, "5") for count in (1, 30)]
    data = tokenize(examples, build_word_tokenizer(examples))
    stages = [stage.form for stage in plan("coconut", Curriculum(max_stage=2)).stages]
    long = 30 * 3 + 3  # two words and the end of a line; the mark, the answer and the end of the sequence
    assert target_lengths(data, stages[:1]).tolist() == [1 * 3 + 3, long]
    assert target_lengths(data, stages[2:]).tolist() == [3, long - 2 * 3]
    assert limit_for([data, data.select([0])], stages[:1], least=16) == math.ceil(1.25 * long)
    assert limit_for([data.select([0])], stages, least=16) == 16
    modes = plan("hybrid_warmup", Curriculum()).stages[0].forms_at_inference
    assert target_lengths(data, modes).tolist() == target_lengths(data, stages[:1]).tolist(), "the longest of the modes"
    reasoning = Reasoning(slot=NOTHING, markers=False, modes=("short", "think"))
    assert [target_lengths(data, [form])[1] for form in reasoning.forms()] == [3, long]
    assert [form.steps_cut for form in reasoning.forms("short")] == [None]
    warn_of_limit(data, stages, 64, "f")
    assert "1 of 2 gold texts of f have more tokens than max_new_tokens=64 allows" in capsys.readouterr().out
    warn_of_limit(data, stages, long, "f")
    assert not capsys.readouterr().out


def test_training_checks_gold_answers_first(tmp_path: Path) -> None:
    rows = [{"question": "1 ?", "steps": ["1"] * 130, "answer": answer} for answer in ("True", "No")]
    files = {}
    for split, part in (("train", rows[:1] * 4), ("valid", rows)):
        write_json(tmp_path / f"{split}.json", part)
        files[split] = str(tmp_path / f"{split}.json")
    config = small_run(
        tmp_path / "run", DataConfig(TaskName.prontoqa, **files), method="cot", max_new_tokens=None, batch_size=4,
        curriculum=Curriculum(length_unit=Unit.updates, total_length=1),
    )  # fmt: skip
    config.model.architecture["max_position_embeddings"] = 512
    with pytest.raises(ValueError, match=r"valid.json: of 2 gold answers 1 would .*\n  row 2, answer 'No'"):
        run(config)
    config.data.unreadable = Unreadable.skip
    assert run(config) == 0
    assert read_json(tmp_path / "run" / "run.json")["data"]["valid"]["used"] == 1
    saved = LatentLM.from_pretrained(Checkpoints(tmp_path / "run").find("last")).reasoning
    assert saved.max_new_tokens == math.ceil(1.25 * (130 * 2 + 3))
