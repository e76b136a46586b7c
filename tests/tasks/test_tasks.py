"""Reading and judging answers."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from itertools import product

import pytest
from helpers import DATA, ROOT, SHARED
from hypothesis import given
from hypothesis import strategies as st

from coconut.methods import PromptFormat
from coconut.tasks import TASKS, gsm8k, pointers, prontoqa, prosqa
from coconut.tasks.chain import read_answer, read_steps

SENTENCES = "Tom is a terpus. Every terpus is a brimpus. Every brimpus is a lempus. Alex is a scrompus."
QUESTION = f"{SENTENCES} Is Tom a lempus or scrompus?"
NUMBERS = [line for line in (ROOT / "docs" / "data.md").read_text().splitlines() if line.count("|") == 4]
SYMBOLS = "0 3 | 3 4 | 7 6 | 4 5 ? 5 or 6 from 0"


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("a b\nc\n### 72", ["a b", "c"], "72"), ("### 72\n", [], "72"), ("\n a \n\n###72\nand more", ["a"], "72"),
        ("### step one : 2 + 3 = 5\n### 5", ["### step one : 2 + 3 = 5"], "5"),
        ("a\n#### 4\n#### 3", ["a", "#### 4"], "3"), ("a ### b\n### 5", ["a ### b"], "5"),
        ("a\n  ### a ### b", ["a"], "a ### b"), ("a\n### #5", ["a"], "#5"), ("# ### True", ["#"], "True"),
        ("a ### 5", ["a"], "5"), ("a\nb", ["a", "b"], None), ("a\n###", ["a"], ""), ("", [], None),
    ],
)  # fmt: skip
def test_read_steps_and_answer(text: str, steps: list[str], answer: str | None) -> None:
    assert read_steps(text, PromptFormat()) == steps
    assert read_answer(text, PromptFormat()) == answer


FORMS = [
    PromptFormat(), PromptFormat(step="{} "), PromptFormat(step="{} ; ", answer="#### {}"),
    PromptFormat(step="{}|", answer="###{}."), PromptFormat(step="<{}>", answer="so ({})"),
    PromptFormat(step="{}\n\n", answer="The answer is: {} ."), PromptFormat(answer="Answer:\n{}"),
    PromptFormat(answer="{}"), PromptFormat(step="{};", answer="{}"), PromptFormat(step="{} .\n", answer="{} ."),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=repr)
@given(
    st.lists(st.sampled_from(["a", "2+3=5", "#", "### 4", "#### 4", "Answer:", "The answer is: 3", "so (2)"])),
    st.sampled_from(["5", "-2.5", "1,234", "#5", "b", "3 # 4"]),
)
def test_written_text_is_read_back(form: PromptFormat, steps: list[str], answer: str) -> None:
    if form.step_end == " ":
        steps = [step.replace(" ", "") for step in steps]
    if answer[0] == "#" and form.answer.startswith("###{"):
        answer = answer[1:]
    text = form.written(steps, answer)
    assert (read_steps(text, form), read_answer(text, form)) == (steps, answer)


def test_empty_lines_are_no_answer() -> None:
    assert read_answer("", PromptFormat(answer="{}")) is None
    assert read_answer("a\nb\n", PromptFormat(answer="{}")) == "b"


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("72", "72"), ("72.", "72"), ("72 clips", "72"), ("$72", "72"), ("$ 1,234.50", "1234.5"), ("-$3", "-3"),
        ("$-3", "-3"), ("−3", "-3"), ("- 3", "-3"), ("+3", "3"), ("5.0", "5"), (".5", "0.50"), ("5 . 0", "5"),
        ("1 , 234", "1234"), ("50%", "50"), ("1234", "1,234"), ("**72**", "72"), ("-0", "0"), ("72 (72 clips)", "72"),
        ("10000000000000000000000000000000001", "10,000,000,000,000,000,000,000,000,000,000,001"), ("3/4", "3 / 4"),
        ("0.75", "3/4"), ("18.00", "18"), ("3 : 4", "3:4"), ("None.", "none"),
    ],
)  # fmt: skip
def test_equal_numbers(predicted: str, gold: str) -> None:
    assert gsm8k.judge(predicted, gold)


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        (None, "72"), ("", "72"), ("-72", "72"), ("7", "72"), ("72 or 73", "72"), ("72/1", "72"), ("72-72", "72"),
        ("72 * 72", "72"), ("72–80", "72"), ("72.5", "72"), ("1,234", "1"), ("3/4", "3"), ("0.75", "3 / 8"),
        ("15", "1,5"), ("12", "(1,2)"), ("3", "3½"), ("2", "2 million"), ("seventy-two", "72"),
        ("10000000000000000000000000000000001", "10000000000000000000000000000000000"), ("__import__('os')", "0"),
    ],
)  # fmt: skip
def test_different_numbers(predicted: str | None, gold: str) -> None:
    assert not gsm8k.judge(predicted, gold)


@given(
    st.decimals(-(10**20), 10**20, places=3),
    st.sampled_from(["{}", "${}", "{} clips", "{}.", " {} ", "{}%", "€ {}"]),
    st.booleans(),
)
def test_numbers_are_read_in_any_format(value: Decimal, template: str, grouped: bool) -> None:
    text = template.format(f"{value:,f}" if grouped else f"{value:f}")
    assert gsm8k.number(text) == Fraction(value)
    assert gsm8k.judge(text, f"{value:f}")
    assert not gsm8k.judge(text, gsm8k.written(Fraction(value) + Fraction("0.001")))


@given(st.fractions(), st.integers(0, 20))
def test_formatted_numbers_are_read_back(value: Fraction, places: int) -> None:
    for exact in (value, value.limit_denominator(7) / 10**places):
        text = gsm8k.written(exact)
        assert gsm8k.number(text) == Fraction(text) == exact


def documented_examples() -> tuple[list[tuple[str, str]], list[str]]:
    """The examples in the table of docs/data.md: (text, number) pairs, and texts that are not read as numbers."""
    read: list[tuple[str, str]] = []
    unread: list[str] = []
    for row in NUMBERS[NUMBERS.index("| | number | no number |") + 2 :]:
        _, _, numbers, others, _ = row.split("|")
        pairs = re.findall(r"`([^`]+)` → (\S+?)(?:,|$)", numbers.strip())
        assert numbers.count("`") == 2 * len(pairs), row
        read += pairs
        unread += re.findall(r"`([^`]+)`", others)
    return read, unread


def test_number_matches_the_table_in_the_docs() -> None:
    read, unread = documented_examples()
    assert len(read) > 60
    assert len(unread) > 50
    assert {text: gsm8k.number(text) for text, _ in read} == {text: Fraction(value) for text, value in read}
    assert [text for text in unread if gsm8k.number(text) is not None] == []
    for text, value in read:
        assert gsm8k.judge(text, value)
        assert gsm8k.judge(value, text)
    for text in unread:
        assert gsm8k.judge(text, text)
        assert not any(gsm8k.judge(run, text) or gsm8k.judge(text, run) for run in re.findall("[0-9]+", text))


def gold_answers() -> list[str]:
    """The answers of the GSM8K excerpts, and of the complete sets if they are available in shared/."""
    folders = [DATA, SHARED / "gsm8k"]
    files = [file for folder in folders for file in sorted(folder.glob("*")) if file.suffix in (".jsonl", ".txt")]
    found = [line.rsplit("####", 1)[1].strip(' "}') for file in files for line in file.read_text().splitlines()]
    for file in sorted((SHARED / "suites").glob("*.jsonl")):
        found += [str(json.loads(line)["target"]) for line in file.read_text().splitlines()]
    return found


def test_real_gold_answers_are_judged_correct() -> None:
    for gold in set(gold_answers()):
        value = Fraction(gold.replace(",", ""))
        assert gsm8k.number(gold) == value
        assert gsm8k.judge(gold, gold)
        assert gsm8k.judge(f"The answer is ${gsm8k.written(value)}.", gold)
        assert not gsm8k.judge(gsm8k.written(value + 1), gold)


@given(st.text(), st.text())
def test_judges_never_raise_and_reject_missing_answers(predicted: str, gold: str) -> None:
    for task in TASKS.values():
        assert isinstance(task.judge(predicted, gold), bool)
        assert not task.judge(None, gold)


EQUIVALENT = {
    "gsm8k": [["$18", "18", "18.00", " 18 clips"], ["-18"], ["1,8"], ["eighteen"]],
    "prontoqa": [["True", "true.", " TRUE , since Max is dull"], ["False", "false"], ["True or False"], ["maybe"]],
    "prosqa": [["Tom is a lempus.", "Tom  is a lempus"], ["Tom is a scrompus."], ["5", " 5 ."]],
    "pointers": [["b", " b ."], ["h"]],
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_have_equal_keys_iff_judged_equal(name: str) -> None:
    task, kinds = TASKS[name], EQUIVALENT[name]
    for one, other in product(range(len(kinds)), repeat=2):
        for a, b in product(kinds[one], kinds[other]):
            assert (task.key(a) == task.key(b)) == (one == other)
            if task.judge(kinds[other][0], kinds[other][0]):
                assert task.judge(a, b) == (one == other)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("True", "True"), ("false", "False"), (" true .", "True"), ("FALSE, since Max is dull", "False"),
        ("True or False", None), ("True or false: Max is dull.", None), ("Max is true", None), ("untrue", None),
        ("", None),
    ],
)  # fmt: skip
def test_verdict(text: str, verdict: str | None) -> None:
    assert prontoqa.verdict(text) == verdict
    assert prontoqa.judge(text, "True") == (verdict == "True")
    assert prontoqa.judge(text, "False.") == (verdict == "False")


def test_prosqa_judge() -> None:
    for same in ["Tom is a lempus.", "Tom is a lempus", " Tom  is a lempus . "]:
        assert prosqa.judge(same, "Tom is a lempus.")
    for other in ["Tom is a scrompus.", "Tom is a lempus or scrompus.", "lempus", "Bob is a lempus.", "", None]:
        assert not prosqa.judge(other, "Tom is a lempus.")
    assert prosqa.judge("5", "5")
    assert prosqa.judge("5 .", "5")
    assert not prosqa.judge("15", "5")


def test_candidates() -> None:
    assert prosqa.candidates(QUESTION) == ["Tom is a lempus.", "Tom is a scrompus."]
    assert prosqa.candidates(QUESTION.replace("or scrompus", "or a scrompus")) == prosqa.candidates(QUESTION)
    assert prosqa.candidates(SYMBOLS) == ["5", "6"]
    assert prontoqa.candidates("any") == ["True", "False"]
    assert gsm8k.candidates("any") is None


@pytest.mark.parametrize("question", [QUESTION, QUESTION.replace(".", " .").replace("?", " ?")])
def test_graph_of_sentences(question: str) -> None:
    graph = prosqa.graph(question)
    assert list(graph.edges) == [
        ("Tom", "terpus"), ("terpus", "brimpus"), ("brimpus", "lempus"), ("Alex", "scrompus"),
    ]  # fmt: skip
    assert graph.graph == {"root": "Tom", "options": ("lempus", "scrompus")}


@pytest.mark.parametrize("question", [SYMBOLS, SYMBOLS + "\n", "0 3|3 4|7 6|4 5 ? 5 or 6 from 0"])
def test_graph_of_symbols(question: str) -> None:
    graph = prosqa.graph(question)
    assert list(graph.edges) == [("0", "3"), ("3", "4"), ("4", "5"), ("7", "6")]
    assert graph.graph == {"root": "0", "options": ("5", "6")}


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        ("How many?", "ends neither"),
        (SYMBOLS.replace("3 4", "3 4 5"), "'3 4 5' is not an edge"),
        (QUESTION.replace("Every terpus is a", "All terpuses are"), "Not every sentence"),
    ],
)
def test_malformed_prosqa_questions_are_refused(question: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prosqa.graph(question)


def test_parse_path() -> None:
    edges = [("Tom", "terpus"), ("terpus", "brimpus")]
    assert prosqa.parse_path(["Tom is a terpus.", "Every terpus is a brimpus ."]) == edges
    assert prosqa.parse_path(["Tom is a terpus. Every terpus is a brimpus."]) == edges
    assert prosqa.parse_path(["Tom is a terpus.", "Every terpus"]) is None
    assert prosqa.parse_path(["3", "4", "5"]) == [("3", "4"), ("4", "5")]
    assert prosqa.parse_path(["3", "4"], root="0") == [("0", "3"), ("3", "4")]
    assert prosqa.parse_path(["3 4"], root="0") is None
    assert prosqa.parse_path([]) == []


def test_read_target() -> None:
    assert prosqa.read_target("Tom is a lempus .") == "lempus"
    assert prosqa.read_target("5") == "5"
    assert prosqa.read_target("Tom is") is None


# --- pointers ---------------------------------------------------------------------------------------


def test_pointers_task() -> None:
    question = pointers.parse_question("3 7 | 7 1 | 1 3 ? from 3 go 2")
    assert question == ({"3": "7", "7": "1", "1": "3"}, 2, "3")
    assert pointers.walk(question) == ["7", "1"]
    assert pointers.candidates("3 7 | 7 1 | 1 3 ? from 3 go 2") == ["7", "1", "3"]
    assert pointers.candidates("anything else") is None
    for steps, wrong in ((["7", "1"], None), (["7"], None), (["1", "1"], 0), (["7", "3"], 1), (["7", "1", "3"], 2)):
        assert pointers.first_wrong("3 7 | 7 1 | 1 3 ? from 3 go 2", steps) == wrong
    assert pointers.judge(" 1 .", "1")
    assert not pointers.judge("7", "1")
    assert not pointers.judge(None, "1")


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("3 7 | 7 1", "not of the form"), ("3 7 | 7 ? from 3 go 1", "'7' is not a pointer"),
        ("3 7 | 3 1 ? from 3 go 1", "points to two"), ("3 7 ? from 3 go 2", "7 points nowhere"),
    ],
)  # fmt: skip
def test_malformed_pointer_questions_are_refused(question: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pointers.walk(pointers.parse_question(question))
