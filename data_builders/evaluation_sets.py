"""The table of evaluation sets: where each comes from, how many rows it has, how its answers are judged.

`coconut data NAME` builds one by `data_builders.evaluation_builder`. This module imports little, so that commands can
list the sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_builders.fields import field_of, flag_field, number_field, text_field

Pair = tuple[str, str]  # question and answer


@dataclass(frozen=True)
class Form:
    """One form in which a set is published: its columns, and how a record gives question and answer."""

    columns: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Pair]


@dataclass(frozen=True)
class Subset:
    """A part of a set with its number of rows, and the splits of the hub that it consists of, in this order."""

    rows: int
    hub_splits: tuple[str, ...]  # by the names of this project: a split called validation is "valid"


@dataclass(frozen=True)
class EvaluationSet:
    """A set to test on.

    judge: the name of the task (`coconut.tasks.TASKS`) that judges its answers; the manifest's `task`.
    subsets: by name; the first one is the default. forms: how rows are published.
    released: SHA-256 of files whose every row was read and judged, by where they come from.
    beware: what a reader of an accuracy must know.
    """

    title: str
    judge: str
    hub: str
    subsets: dict[str, Subset]
    forms: tuple[Form, ...]
    paper: str
    licence: str
    beware: str
    hub_config: str | None = None
    released: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The set in a line of at most 100 characters."""
        rows = " or ".join(f"{subset.rows:,}" for subset in self.subsets.values())
        return f"{self.title}; {rows} test rows, judge: {self.judge}."

    def subset(self, name: str | None) -> tuple[str, Subset]:
        """The subset of this name, by default the first. Raises ValueError if there is none."""
        name = name or next(iter(self.subsets))
        if name not in self.subsets:
            known = ", ".join(f"{key} ({value.rows:,} rows)" for key, value in self.subsets.items())
            raise ValueError(f"There is no subset={name}. The subsets are: {known}.")
        return name, self.subsets[name]


def _joined(body: str, question: str) -> str:
    """A story and the question about it. Some stories have no full stop at their end."""
    return f"{body} {question}" if body.endswith((".", "?", "!", ",")) else f"{body}. {question}"


def _asdiv(record: dict[str, Any]) -> Pair:
    """The units stand in parentheses after the numbers: "9 (apples)"."""
    answer = re.sub(r"\s*\([^()]*\)", "", text_field(record, "answer")).strip()
    if not answer:
        raise ValueError(f"'answer' is {record['answer']!r}; nothing is left of it without its unit.")
    return _joined(text_field(record, "body"), text_field(record, "question")), answer


def _commonsenseqa(record: dict[str, Any]) -> Pair:
    """The question with its options, each on a line, as "A. bank"; the answer is the letter."""
    choices = field_of(record, "choices")
    labels, texts = field_of(choices, "label"), field_of(choices, "text")
    answer = text_field(record, "answerKey")
    if not labels or len(labels) != len(texts) or answer not in labels:
        raise ValueError(f"'answerKey' is {answer!r}, and 'choices' is {choices!r}.")
    options = (f"{label}. {text.strip()}" for label, text in zip(labels, texts, strict=True))
    return "\n".join([text_field(record, "question"), *options]), answer


def _commonsenseqa_released(record: dict[str, Any]) -> Pair:
    """A line of the authors' file, whose question is an object with the options in it."""
    question = field_of(record, "question")
    choices = field_of(question, "choices")
    columns = {key: [text_field(choice, key) for choice in choices] for key in ("label", "text")}
    return _commonsenseqa(
        {"question": text_field(question, "stem"), "choices": columns, "answerKey": record["answerKey"]}
    )


PAL = Form(("input", "target"), lambda row: (text_field(row, "input"), number_field(row, "target")))

EVALUATION_SETS: dict[str, EvaluationSet] = {
    "gsm_hard": EvaluationSet(
        title="GSM-Hard: GSM8K's test questions with larger numbers",
        judge="numbers",
        hub="reasoning-machines/gsm-hard",
        subsets={"all": Subset(1319, ("train",))},
        forms=(PAL,),
        paper="Gao et al., arXiv 2211.10435",
        licence="MIT",
        beware=(
            "The hub calls its only split train, but it is a test: the questions are those of GSM8K's test split. 146 "
            "answers are negative. 162 have more than two decimals, as floating point gave them, and are compared "
            "exactly: an answer that is rounded to cents is wrong there."
        ),
        released={"PAL, gsmhardv2.jsonl": "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef"},
    ),
    "svamp": EvaluationSet(
        title="SVAMP: simple sums, worded so that shortcuts fail",
        judge="numbers",
        hub="ChilleD/SVAMP",
        subsets={"all": Subset(1000, ("train", "test")), "test300": Subset(300, ("test",))},
        forms=(
            PAL,
            Form(
                ("Body", "Question", "Answer"),
                lambda row: (
                    _joined(text_field(row, "Body"), text_field(row, "Question")),
                    number_field(row, "Answer"),
                ),
            ),
        ),
        paper="Patel et al., arXiv 2103.07191",
        licence="MIT",
        beware=(
            "Papers report all 1,000 questions or the 300 of the hub's test split; the two accuracies cannot be "
            "compared. A thread on the hub reports wrong gold answers."
        ),
        released={"PAL, svamp.jsonl": "1c4375bc0f1ac84af8ec2b9ff4c894d057836fee6633c4e73179dd680cb47c4e"},
    ),
    "multiarith": EvaluationSet(
        title="MultiArith: sums of several steps",
        judge="numbers",
        hub="ChilleD/MultiArith",
        subsets={"all": Subset(600, ("train", "test")), "test180": Subset(180, ("test",))},
        forms=(
            PAL,
            Form(("question", "final_ans"), lambda row: (text_field(row, "question"), number_field(row, "final_ans"))),
        ),
        paper="Roy and Roth, arXiv 1608.01413",
        licence="not stated on the hub; the PAL project's copy is in a repository under Apache-2.0",
        beware=(
            "Papers say 600 or 500 questions, while their code often reads the 180 of the hub's test split. Name the "
            "rows beside an accuracy."
        ),
        released={"PAL, multiarith.jsonl": "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951"},
    ),
    "asdiv": EvaluationSet(
        title="ASDiv: word problems of grades 1 to 6, diverse in wording",
        judge="numbers",
        hub="EleutherAI/asdiv",
        hub_config="asdiv",
        subsets={"all": Subset(2305, ("valid",))},
        forms=(Form(("body", "question", "answer"), _asdiv),),
        paper="Miao et al., arXiv 2106.15772",
        licence="CC BY-NC 4.0: not for commercial use",
        beware=(
            "The hub calls its only split validation. Units are cut off the answers. Some answers are no single "
            "number, such as ratios, names and two numbers, and are compared as text."
        ),
    ),
    "commonsenseqa": EvaluationSet(
        title="CommonsenseQA: everyday knowledge, five options",
        judge="letters",
        hub="tau/commonsense_qa",
        subsets={"all": Subset(1221, ("valid",))},
        forms=(
            Form(("question", "choices", "answerKey"), _commonsenseqa),
            Form(("question", "answerKey"), _commonsenseqa_released),
        ),
        paper="Talmor et al., arXiv 1811.00937",
        licence="MIT",
        beware=(
            "This is the validation split: the test split has no answers. So nothing may be chosen by it, such as a "
            "checkpoint. Guessing gives 20 %."
        ),
    ),
    "strategyqa": EvaluationSet(
        title="StrategyQA: yes or no, by facts not named",
        judge="yes_no",
        hub="ChilleD/StrategyQA",
        subsets={"all": Subset(687, ("test",))},
        forms=(
            Form(
                ("question", "answer", "facts"),
                lambda row: (text_field(row, "question"), "yes" if flag_field(row, "answer") else "no"),
            ),
        ),
        paper="Geva et al., arXiv 2101.02235",
        licence="MIT",
        beware=(
            "The published test questions have no answers. These rows were split off the published training questions, "
            "so a model that was trained on all 2,290 of them has seen these. The more frequent answer is right in "
            "more than half of the rows."
        ),
    ),
    "math500": EvaluationSet(
        title="MATH-500: competition problems, answers in LaTeX",
        judge="math",
        hub="HuggingFaceH4/MATH-500",
        subsets={"all": Subset(500, ("test",))},
        forms=(Form(("problem", "answer"), lambda row: (text_field(row, "problem"), text_field(row, "answer"))),),
        paper="Hendrycks et al., arXiv 2103.03874; selected by Lightman et al., arXiv 2305.20050",
        licence="MIT",
        beware=(
            "The 500 are from MATH's test split; the other 4,500 of it are in some training sets. Answers are "
            "expressions, so the judge decides much: it needs the library math-verify."
        ),
        released={"math500.json": "02e232722dd1f9ab307124bfff40621d32193632b6b84aa9a246e701f0478141"},
    ),
}
