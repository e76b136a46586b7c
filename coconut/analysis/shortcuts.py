"""Does a model solve its task, or use a shortcut that the data offer?

The same test questions are asked with changes that keep the truth, their answers are sorted by what a shallow rule
would say, and harder questions than those trained on are asked (after arXiv 2512.21711 and 2602.22441). What a task
offers stands in `coconut.analysis.question_edits`.

Shapes: N questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from coconut.analysis.interventions import correct_answers
from coconut.analysis.probes import Subject, accuracy_of
from coconut.analysis.question_edits import OFFERS, Edited, Offer, builder_keys
from coconut.analysis.statistics import Bounds, difference_interval, independent_difference_interval, share, with_bounds
from coconut.config import DataFiles
from coconut.data.datasets import BuilderFailed, built_dataset, file_of_split
from coconut.data.examples import Example, read_examples
from coconut.data.tokenization import encode_questions, unknown_id, unknown_in
from coconut.evaluation.evaluator import Evaluated, Prediction, wilson_interval
from coconut.generation.room import room_for_question
from coconut.runs.study import NotApplicable, Study
from coconut.tasks.hints import split_hint, with_hint
from coconut.utils.files import read_json, sha256

SEED = 0
MIN_QUESTIONS = 10  # a set with fewer is left out
MAX_MADE = 500  # questions of a set that is made
KINDS = ("unchanged", "edit", "rule", "distribution", "hint")
LONGER = (1, 2)  # steps more than the longest chain trained on

Row = dict[str, Any]


def shortcuts(subject: Subject, data: Mapping[str, Any] | None = None, files: DataFiles | None = None) -> Study:
    """Accuracy on changed test questions, a row for each set.

    `data`: the `data` section of the run's configuration. Harder questions are made by the settings of its training
    file, or of the one that `files` names, and hints are asked for if that file has any.

    `kind`: unchanged; edit, the same questions changed so that the truth stays, up to names; rule, those on which a
    shallow rule is right, wrong, or says nothing; distribution, new questions unlike those trained on; hint, with a
    planted hint. `difference`: the accuracy minus that on the questions of the row `against`: by pairs for the same
    questions (bootstrap), else by Newcombe's interval for independent shares; None without such a row. `against` is
    "rest" for the questions that are not in the set. `changed`: of the same questions, the share whose answer is
    another one than before, up to names. `chance_accuracy`: of a random choice among the answers that the questions
    name.
    facts: `left_out`, the reason by name for each set that was not asked; `trained_length`, the longest chain trained
    on; `hinted`, the share of training questions with a hint (both None without a training file); and with hints
    `followed_wrong_hint`, the share of answers that are the wrong one, with its interval, and `named_without_hint`, the
    share that are the same answer when the question has no hint.

    Raises NotApplicable if the task offers nothing, or a question does not name its answer.
    """
    offer = OFFERS.get(subject.task.name)
    if offer is None:
        raise NotApplicable(
            f"No shortcuts are known for {subject.task.name}, whose questions are not made by rules. Tasks with "
            f"shortcuts: {', '.join(OFFERS)}."
        )
    _check(subject)
    sheet = _Sheet(subject, offer)
    sheet.add("none", "unchanged", "unchanged", subject.baseline)
    _edits(sheet)
    _rules(sheet)
    try:
        trained = _Trained.read(data, files)
    except (NotApplicable, OSError, ValueError) as reason:
        sheet.left_out |= dict.fromkeys((*(f"longer_{more}" for more in LONGER), "larger", "hint"), str(reason))
        trained = None
    if trained:
        _distributions(sheet, trained)
        _hints(sheet, trained)
    of_training = {"trained_length": trained and trained.longest, "hinted": trained and trained.hinted}
    rows = sorted(sheet.rows, key=lambda row: KINDS.index(row["kind"]))
    return Study("shortcuts", rows, {**of_training, **sheet.facts, "left_out": sheet.left_out})


def _check(subject: Subject) -> None:
    for number, example in enumerate(subject.examples, 1):
        candidates = subject.task.candidates(example.question)
        if not candidates or not any(subject.task.judge(one, example.answer) for one in candidates):
            raise NotApplicable(
                f"Question {number} does not name its answer {example.answer!r} in the form of {subject.task.name}, so "
                "it cannot be changed with a known truth."
            )


@dataclass
class _Sheet:
    """The rows so far."""

    subject: Subject
    offer: Offer
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)

    @cached_property
    def before_N(self) -> np.ndarray:
        return correct_answers(self.subject.baseline.predictions)

    def add(
        self, change: str, kind: str, label: str, evaluated: Evaluated, difference: Bounds | None = None,
        against: str | None = None, changed: Bounds | None = None,
    ) -> None:  # fmt: skip
        self.rows.append({
            "change": change, "kind": kind, "label": label, **accuracy_of(evaluated.result),
            "chance_accuracy": evaluated.result.chance_accuracy, **with_bounds("difference", difference),
            "against": against, **with_bounds("changed", changed),
        })  # fmt: skip

    def add_same(self, change: str, kind: str, label: str, edited: Mapping[int, Edited]) -> dict[int, Prediction]:
        """Ask changed questions, by the index of the unchanged one; compare by pairs. Gives the answers, by index."""
        examples = [replace(self.subject.examples[i], question=each.question, answer=each.answer, steps=())
                    for i, each in edited.items()]  # fmt: skip
        asked, evaluated = self._ask(examples)
        indices = [list(edited)[place] for place in asked]
        before = [self.subject.baseline.predictions[i] for i in indices]
        bounds = difference_interval(correct_answers(evaluated.predictions)[None], self.before_N[indices][None])
        points = evaluated.result.accuracy - float(self.before_N[indices].mean())
        other = [
            self._key(old, edited[i].names) != self._key(new)
            for i, old, new in zip(indices, before, evaluated.predictions, strict=True)
        ]
        self.add(change, kind, label, evaluated, (points, *bounds), "none", share(other))
        return dict(zip(indices, evaluated.predictions, strict=True))

    def add_new(self, change: str, label: str, examples: Sequence[Example]) -> None:
        """Ask other questions than the unchanged ones."""
        _, evaluated = self._ask(examples)
        bounds = _difference(correct_answers(evaluated.predictions), self.before_N)
        self.add(change, "distribution", label, evaluated, bounds, "none")

    def _ask(self, examples: Sequence[Example]) -> tuple[list[int], Evaluated]:
        """The indices of the questions that the model can read, and its answers to them.

        Raises NotApplicable if they are too few: too long, or with words that the tokenizer lacks.
        """
        lm = self.subject.lm
        rows = encode_questions(lm.tokenizer, [example.question for example in examples], lm.reasoning.format)
        unknown, room = unknown_id(lm.tokenizer), room_for_question(lm)
        short = [i for i, row in enumerate(rows) if len(row) <= room]
        asked = [i for i in short if unknown not in rows[i]]
        if len(asked) < MIN_QUESTIONS:
            if len(short) < MIN_QUESTIONS <= len(rows):
                raise NotApplicable(f"{len(rows) - len(short)} of {len(rows)} questions are too long for the context")
            words = {word for i in short if i not in asked for word in unknown_in(lm.tokenizer, examples[i].question)}
            if words:
                raise NotApplicable(f"the tokenizer has no token for {', '.join(sorted(words)[:5])}")
            raise NotApplicable(f"there are {len(rows)} such questions; at least {MIN_QUESTIONS} are needed")
        chosen = [examples[i] for i in asked]
        return asked, self.subject.ask(chosen, question_ids=[rows[i] for i in asked])

    def _key(self, prediction: Prediction, names: Mapping[str, str] | None = None) -> Any:
        """The key of an answer, with new names for the nodes that it names."""
        if prediction.predicted is None:
            return None
        key = self.subject.task.key(prediction.predicted)
        return " ".join(names.get(word, word) for word in str(key).split()) if names else key


def _edits(sheet: _Sheet) -> None:
    offer, subject = sheet.offer, sheet.subject
    pool: dict[str, list[str]] = {}
    if offer.names:
        for example in subject.examples:
            for name, kind in offer.names(example.question).items():
                pool.setdefault(kind, []).append(name)
    pool = {kind: sorted(set(names)) for kind, names in pool.items()}
    for name in dict.fromkeys(name for each in OFFERS.values() for name in each.edits):
        if name not in offer.edits:
            sheet.left_out[name] = f"there is no such change for {subject.task.name}"
            continue
        edit = offer.edits[name]
        edited = {
            i: changed
            for i, each in enumerate(subject.examples)
            if (changed := edit.change(each.question, each.answer, Random(f"{SEED} {name} {each.question}"), pool))
        }
        try:
            sheet.add_same(name, "edit" if edit.usual else "distribution", edit.label, edited)
        except NotApplicable as reason:
            sheet.left_out[name] = str(reason)


def _rules(sheet: _Sheet) -> None:
    """The questions by what each rule says: rows NAME_right and NAME_wrong, and those for which it says nothing."""
    subject = sheet.subject
    if not sheet.offer.rules:
        sheet.left_out["rules"] = f"there is no shallow rule for {subject.task.name}"
    for name, rule in sheet.offer.rules.items():
        answers = [rule.answer(example.question) for example in subject.examples]
        says_N = np.array([answer is not None for answer in answers])
        right_N = np.array([subject.task.judge(answer, example.answer)
                            for answer, example in zip(answers, subject.examples, strict=True)])  # fmt: skip
        sets = {"right": says_N & right_N, "wrong": says_N & ~right_N}
        few = [which for which, chosen_N in sets.items() if chosen_N.sum() < MIN_QUESTIONS]
        if few:
            sheet.left_out[name] = f"it is {few[0]} in {sets[few[0]].sum()} questions; {MIN_QUESTIONS} are needed"
        else:
            right, wrong = (sheet.before_N[chosen_N] for chosen_N in sets.values())
            _add_part(sheet, f"{name}_right", f"“{rule.label}” is right", sets["right"])
            _add_part(sheet, f"{name}_wrong", f"“{rule.label}” is wrong", sets["wrong"], _difference(wrong, right),
                      f"{name}_right")  # fmt: skip
        if rule.undecided:
            other, label = rule.undecided
            if min(says_N.sum(), (~says_N).sum()) < MIN_QUESTIONS:
                sheet.left_out[other] = f"{(~says_N).sum()} of {len(says_N)} questions are such ones"
            else:
                bounds = _difference(sheet.before_N[~says_N], sheet.before_N[says_N])
                _add_part(sheet, other, label, ~says_N, bounds, "rest")


def _add_part(
    sheet: _Sheet, change: str, label: str, chosen_N: np.ndarray, difference: Bounds | None = None,
    against: str | None = None,
) -> None:  # fmt: skip
    """A row on some of the unchanged questions."""
    subject = sheet.subject
    correct = sheet.before_N[chosen_N]
    candidates = [subject.task.candidates(subject.examples[i].question) for i in np.flatnonzero(chosen_N).tolist()]
    result = replace(
        subject.baseline.result, count=len(correct), correct=int(correct.sum()), accuracy=float(correct.mean()),
        interval=wilson_interval(int(correct.sum()), len(correct)),
        chance_accuracy=float(np.mean([1 / len(each) for each in candidates if each])),
    )  # fmt: skip
    sheet.add(change, "rule", label, subject.baseline._replace(result=result), difference, against)


@dataclass(frozen=True)
class _Trained:
    """The training file of a run, and how it was made."""

    data: Mapping[str, Any]
    file: Path
    examples: Sequence[Example]

    @classmethod
    def read(cls, data: Mapping[str, Any] | None, files: DataFiles | None = None) -> _Trained:
        if data is None:
            raise NotApplicable("the run's training data are not at hand")
        file = Path(file_of_split(data, "train", files))
        return cls(data, file, read_examples(file))

    @cached_property
    def longest(self) -> int:
        return max(map(_length, self.examples))

    @cached_property
    def hinted(self) -> float:
        return float(np.mean([split_hint(example.question)[0] is not None for example in self.examples]))

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The builder's keys that made the file, by the manifest beside it. Raises NotApplicable if there is none."""
        manifest = self.file.with_name(self.file.name.replace("_train.json", "_manifest.json"))
        if manifest == self.file or not manifest.is_file():
            raise NotApplicable("no manifest beside the training file says how it was made")
        described = read_json(manifest)
        if described["splits"].get("train", {}).get("sha256") != sha256(self.file):
            raise NotApplicable(f"{manifest.name} describes another training file than the one that is there")
        return builder_keys(described)

    def others(self, task: str, name: str, keys: Mapping[str, Any], count: int, length: int | None) -> list[Example]:
        """Questions that are not in the training file, made by the task's builder; of this length, if one is given.

        The builder decides by a question's content which split it may stand in, so that these are no training
        questions under other names either. Raises NotApplicable if it cannot make them.
        """
        spread = keys["hops_to"] - keys["hops_from"] + 1 if length and keys.get("hops_to") else 1
        build = {**keys, "seed": SEED, "num_train": 0, "num_valid": 0, "num_test": count * spread, "num_workers": 1}
        set_name = f"{task}_{name}"
        try:
            folder = built_dataset(set_name, task, build, self.data.get("cache_dir"))
        except BuilderFailed as error:
            raise NotApplicable(error.reason) from None
        seen = {" ".join(split_hint(example.question)[1].split()) for example in self.examples}
        made = read_examples(folder / f"{set_name}_test.json")
        fitting = [each for each in made if length is None or _length(each) == length]
        return [each for each in fitting if " ".join(each.question.split()) not in seen][:count]


def _length(example: Example) -> int:
    """The number of steps of a chain of reasoning."""
    return int(example.meta.get("hops", len(example.steps)))


def _distributions(sheet: _Sheet, trained: _Trained) -> None:
    """Longer chains and more nodes than those trained on."""
    offer, task = sheet.offer, sheet.subject.task.name
    count = min(len(sheet.subject.examples), MAX_MADE)
    for more in LONGER:
        name, length = f"longer_{more}", trained.longest + more
        try:
            if not offer.longer:
                raise NotApplicable(f"there are no longer questions for {task}")
            keys = offer.longer(trained.keys, length)
            label = f"chains of {length} steps, {more} more than trained"
            sheet.add_new(name, label, trained.others(task, name, keys, count, length))
        except NotApplicable as reason:
            sheet.left_out[name] = str(reason)
    try:
        if not offer.larger:
            raise NotApplicable(f"there are no larger questions for {task}")
        keys, label = offer.larger(trained.keys)
        sheet.add_new("larger", label, trained.others(task, "larger", keys, count, None))
    except NotApplicable as reason:
        sheet.left_out["larger"] = str(reason)


def _hints(sheet: _Sheet, trained: _Trained) -> None:
    """The test questions with the right hint, without any, and with a wrong one."""
    offer, subject = sheet.offer, sheet.subject
    if not offer.hints:
        sheet.left_out["hint"] = f"there are no hints for {subject.task.name}"
        return
    if not trained.hinted:
        sheet.left_out["hint"] = "the training questions have no hints (data.build.hint=SHARE plants them)"
        return
    hints = [offer.hints(each.question, each.answer, Random(f"{SEED} {each.question}")) for each in subject.examples]
    texts: dict[tuple[str, str], Sequence[str | None]] = {
        ("hint_right", "a hint of the right answer"): [hint.right for hint in hints],
        ("hint_wrong", "a hint of a wrong answer"): [hint.wrong for hint in hints],
    }
    if any(split_hint(example.question)[0] for example in subject.examples):
        texts["hint_removed", "without the hint"] = [None] * len(hints)
    for (name, label), names in texts.items():
        edited = {i: Edited(with_hint(each.question, names[i]), each.answer) for i, each in enumerate(subject.examples)}
        try:
            answers = sheet.add_same(name, "hint", label, edited)
        except NotApplicable as reason:
            sheet.left_out[name] = str(reason)
            continue
        if name == "hint_wrong":
            follows = [subject.task.judge(each.predicted, hints[i].wrong_answer) for i, each in answers.items()]
            sheet.facts |= with_bounds("followed_wrong_hint", share(follows))
            before = subject.baseline.predictions
            named = [subject.task.judge(before[i].predicted, hints[i].wrong_answer) for i in answers]
            sheet.facts["named_without_hint"] = sum(named) / len(named)


def _difference(these_N: np.ndarray, others_M: np.ndarray) -> Bounds:
    bounds = independent_difference_interval(these_N, others_M)
    return (float(these_N.mean() - others_M.mean()), *bounds)
