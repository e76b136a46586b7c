"""Reading and judging answers."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from itertools import product

import pytest
from helpers import DATA, ROOT, SHARED
from helpers.processes import python
from hypothesis import given
from hypothesis import strategies as st

from coconut.methods import PromptFormat
from coconut.tasks import TASKS, expressions, gsm8k, pointers, prontoqa, prosqa
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
    for file in (file for folder in (DATA, SHARED) for file in sorted((folder / "suites").glob("*.jsonl"))):
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
    "letters": [["A", "(a)", "A)", "The answer is A.", "A: bank"], ["B", "b."], ["A or B"], ["A river bank"]],
    "yes_no": [["yes", "True.", "Yes, it is."], ["no", "false"], ["yes or no"], ["maybe"]],
    "math": [
        ["\\frac12", "0.5", "$\\frac{1}{2}$", "The answer is 1/2."],
        ["x+1", "1 + x"],
        ["\\text{Evelyn}", "Evelyn"],
    ],
}
EQUIVALENT["numbers"] = EQUIVALENT["gsm8k"]


@pytest.mark.parametrize("name", TASKS)
def test_answers_have_equal_keys_iff_judged_equal(name: str) -> None:
    task, kinds = TASKS[name], EQUIVALENT[name]
    for one, other in product(range(len(kinds)), repeat=2):
        for a, b in product(kinds[one], kinds[other]):
            assert (task.key(a) == task.key(b)) == (one == other)
            if task.judge(kinds[other][0], kinds[other][0]):
                assert task.judge(a, b) == (one == other)


JUDGED = {
    ("letters", "A"): (
        ["A", "a", "(A)", "A)", "A.", "[A]", "**A**", "The answer is A.", "the answer is (A)", "Answer: A", "option A",
         "A: bank", "A. bank", "A) bank", "(A) bank", "A and A", "So it is A."],
        ["B", "(B)", "bank", "A or B", "A: bank, B: river", "The answer is B.", "A river bank", "F", "AB", "A-frame",
         "", "Answer", "The answer is a bank."],
    ),
    ("letters", "(E)"): (["E", "E: e-mail", "the answer is E"], ["e-mail", "D", "A"]),
    ("yes_no", "yes"): (
        ["yes", "Yes.", "YES", "true", "True", "Yes, it is true.", "The answer is yes."],
        ["no", "No.", "false", "yes and no", "yes or false", "maybe", "", "not true", "It isn't true.", "untrue",
         "yesterday", "nothing", "Yes, no doubt."],
    ),
    ("yes_no", "False"): (["no", "No.", "false", "no, that is false"], ["yes", "true", "not false", "none", "not"]),
    ("math", "\\frac{14}{3}"): (
        ["\\frac{14}{3}", "\\frac{28}{6}", "14/3", "$\\frac{14}3$", "$14/3$", "\\boxed{\\frac{14}{3}}",
         "\\(\\dfrac{14}{3}\\)", "\\[ \\frac{14}{3} \\]", "The answer is \\boxed{\\frac{14}{3}}.",
         "The answer is $\\frac{14}{3}$.", "4\\frac{2}{3}", "The answer is 14/3.", "x = \\frac{14}{3}"],
        ["\\frac{3}{14}", "14", "4.6", "14/3 or 3", "$14/3$ or $3$", "\\boxed{3} and \\boxed{14/3}", "", "$",
         "\\frac", "none", "\\frac{14}{3}x", "x"],
    ),
    ("math", "p - q"): (["p-q", "-q+p", "$p - q$", "\\boxed{-(q-p)}"], ["q-p", "p", "p+q", "pq"]),
    ("math", "(a+5)(b+2)"): (["ab+2a+5b+10", "(b+2)(a+5)"], ["(a+5)(b-2)", "5"]),
    ("math", "3\\sqrt{13}"): (["3\\sqrt{13}", "\\sqrt{117}", "3*sqrt(13)"], ["\\sqrt{13}", "13", "10.8"]),
    ("math", "1,-2"): (["1, -2", "-2,1", "$-2, 1$"], ["1", "-2", "1,2", "1,-2,3"]),
    ("math", "(3,4]"): (["(3,4]", "$(3, 4]$", "\\left(3,4\\right]"], ["(3,4)", "[3,4]", "(4,3]"]),
    ("math", "\\text{Evelyn}"): (["Evelyn", "evelyn.", "\\boxed{\\text{Evelyn}}", "The answer is Evelyn."], ["Ann"]),
    ("math", "\\text{(C)}"): (["C", "(C)", "\\text{(C)}", "$\\text{(C)}$"], ["B", "(D)", "C or D"]),
    ("math", "864 \\mbox{ inches}^2"): (["864", "864 square inches", "$864$"], ["86", "864 or 865"]),
    ("math", "\\$32,\\!348"): (["32348", "32,348", "\\$32,348", "$32348$"], ["32", "348", "32.348"]),
    ("math", "50"): (["50", "50\\%", "50%", "50^\\circ", "50.0", "x=50", "50 apples"], ["0.5", "5", "50x", "-50"]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "gold"), JUDGED)
def test_forms_that_are_accepted_and_refused(name: str, gold: str) -> None:
    accepted, refused = JUDGED[name, gold]
    judge = TASKS[name].judge
    assert judge(gold, gold)
    assert [text for text in accepted if not judge(text, gold)] == []
    assert [text for text in refused if judge(text, gold)] == []


def test_options_are_candidates() -> None:
    question = "Where is money kept?\nA. bank\nB. river\nE. the A. team"
    assert TASKS["letters"].candidates(question) == ["A", "B", "E"]
    assert TASKS["letters"].candidates("Where is A. Smith?") is None
    assert TASKS["yes_no"].candidates("Is it?") == ["yes", "no"]
    assert TASKS["math"].candidates("What is it?") is None


def test_math_is_judged_in_any_thread_and_after_a_fork() -> None:
    pairs = [(f"\\frac{{{n}}}{{{2 * n}}}", "0.5" if n % 2 else "0.25") for n in range(1, 21)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda pair: expressions.judge(*pair), pairs))
    assert verdicts == [n % 2 == 1 for n in range(1, 21)]
    fork = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that had threads
        child = fork.Process(target=lambda: sys.exit(0 if expressions.judge("\\frac{7}{21}", "\\frac13") else 3))
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert expressions.judge("\\frac{9}{21}", "\\frac37")


def test_a_comparison_without_end_is_wrong_and_the_next_one_right() -> None:
    assert not expressions.judge("9^{9^{9^9}}", "6")
    assert expressions.judge("\\frac{12}{2}", "6")


def test_math_without_its_library_names_the_command() -> None:
    code = (
        "import sys; sys.modules['math_verify'] = None\n"
        "from coconut.tasks import TASKS\n"
        "assert TASKS['math'].judge('a', 'a')\n"
        "TASKS['math'].judge('1', '2')"
    )
    done = python("-c", code)
    assert done.returncode != 0
    assert done.stderr.strip().endswith("judged by math-verify. Install it: pip install math-verify")


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
