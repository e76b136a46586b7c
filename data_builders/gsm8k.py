"""Convert GSM8K (Cobbe et al., arXiv 2110.14168) and GSM8K-Aug (Deng et al., arXiv 2311.01460).

From the released files, or by name from the Hugging Face hub. Every calculator annotation is checked, and wrong ones
are listed in the manifest. Run `coconut data gsm8k --help`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from coconut.tasks import gsm8k
from coconut.utils.hydra_app import application
from coconut.utils.overrides import Place
from data_builders.arithmetic import Outcome, check, shown
from data_builders.builder_app import Builder, run, token_lengths
from data_builders.dataset_writer import Row, divide
from data_builders.fields import text_field
from data_builders.hub import load_hub
from data_builders.release_formats import SHOWN, Kind, Released, SourceKeys, open_released, rows_of
from data_builders.statistics import Measures

ANNOTATION = re.compile(r"<<([^<>\n]*)>>")
SOLUTIONS = {
    "steps": r"\n",
    "cot": r"\n|(?<=[.!?])\s+",
    "answer": r"\n",
}  # fields with the solution, and the separators of its sentences
ON_SCREEN = 3  # faulty equations that the summary shows; the manifest has them all


class Preset(StrEnum):
    gsm8k = "gsm8k"
    gsm8k_aug = "gsm8k_aug"


HUB_NAMES = {Preset.gsm8k: "openai/gsm8k", Preset.gsm8k_aug: "whynlp/gsm8k-aug"}
HUB_CONFIGS = {"openai/gsm8k": "main"}


class Steps(StrEnum):
    equations = "equations"  # <<48/2=24>>
    sentences = "sentences"


class Faulty(StrEnum):
    """What is done with rows that have a fault."""

    keep = "keep"
    drop = "drop"
    error = "error"


FAULTS = {
    "arithmetic": "an equation does not hold or cannot be read",
    "last_value": "the last equation has another value than the answer",
}


@dataclass
class Gsm8kBuild(SourceKeys):
    name: str = "gsm8k"
    preset: Preset | None = None
    hub: Place | None = None
    hub_config: str | None = None
    steps: Steps = Steps.equations
    arithmetic: Faulty = Faulty.keep
    last_value: Faulty = Faulty.keep
    max_tokens: int | None = None  # of the tokenizer; longer training and validation rows are left out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and (self.max_tokens < 1 or not self.tokenizer):
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves out rows with more tokens. It must be at least 1, and needs a "
                "tokenizer: tokenizer=NAME, FOLDER or FILE.gguf."
            )
        given = {"preset": self.preset, "hub": self.hub, **self.files}
        given = [f"{key}={value}" for key, value in given.items() if value]
        if not given and self.compare:
            raise ValueError(f"compare={self.compare} needs rows to compare with: give source=FILE, hub or preset.")
        if not given:
            presets = ", or ".join(f"preset={preset} ({name})" for preset, name in HUB_NAMES.items())
            raise ValueError(
                f"No file is given. From the Hugging Face hub come {presets}, or another set with hub=NAME, or "
                "a folder with hub=FOLDER. The released files are at https://github.com/openai/grade-school-math "
                "(GSM8K: train.jsonl, test.jsonl) and https://github.com/da03/Internalize_CoT_Step_by_Step "
                "(GSM8K-Aug: train.txt, valid.txt, test.txt). Give them as train=FILE valid=FILE test=FILE, or one "
                "as source=FILE."
            )
        if self.hub_name and len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: data come from one place. Keep one of them.")
        if self.hub_config and not self.hub_name:
            raise ValueError(f"hub_config={self.hub_config} is given without hub=NAME. Leave it out.")

    @property
    def uses_tokenizer(self) -> bool:
        return bool(self.compare) or self.max_tokens is not None

    @property
    def change_no_row(self) -> tuple[str, ...]:
        return tuple(key for key in super().change_no_row if key != "tokenizer" or not self.max_tokens)

    @property
    def hub_name(self) -> str | None:
        return HUB_NAMES[self.preset] if self.preset else self.hub


@dataclass
class Audit:
    """The check of one file's annotations. Faults name the row by its number in the file."""

    rows: int
    dropped: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    faults: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {fault: [] for fault in FAULTS})

    def faulty_rows(self, fault: str) -> int:
        return len({found["row"] for found in self.faults[fault]})

    def told(self, fault: str) -> str:
        return f"in {self.faulty_rows(fault)} of {self.rows} rows {FAULTS[fault]}"

    def described(self) -> dict[str, Any]:
        """The entry of the manifest."""
        return {
            "rows": self.rows,
            "dropped_rows": self.dropped,
            "equations": self.outcomes.total(),
            **{outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "faults": {fault: {"rows": self.faulty_rows(fault), "list": found} for fault, found in self.faults.items()},
        }


def read_splits(config: Gsm8kBuild) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The rows of every split, and the entries of the manifest on their sources and faults."""
    audits: dict[str, Audit] = {}

    def take(released: Released) -> list[Row]:
        rows, audits[str(released.path)] = audited(released, config)
        return rows

    if config.hub_name:
        released, sources = _open_hub(config, config.hub_name)
        splits = _divided({split: take(part) for split, part in released.items()}, config)
        origins = {split: str(part.path) for split, part in released.items()}
    else:
        splits, sources = config.read(lambda path: take(_open_file(path, config.steps))), config.described()
        origins = {key: str(Path(path)) for key, path in config.files.items()}
    summarise(audits, config)
    short = {split: rows if split == "test" else _short_rows(rows, split, config) for split, rows in splits.items()}
    return short, {
        "dials": {key: getattr(config, key).value for key in ("steps", *FAULTS)},
        "max_tokens": config.max_tokens,
        "longer_rows": {split: len(rows) - len(short[split]) for split, rows in splits.items()},
        "sources": sources,
        "arithmetic": {key: audits[origin].described() for key, origin in origins.items()},
    }


def _short_rows(rows: list[Row], split: str, config: Gsm8kBuild) -> list[Row]:
    """The rows with at most `max_tokens` tokens in the default prompt format, the end of the sequence not counted."""
    if not config.max_tokens or not rows:
        return rows
    lengths = token_lengths(rows, str(config.tokenizer))
    kept = [row for row, each in zip(rows, lengths, strict=True) if sum(each.values()) <= config.max_tokens]
    print(f"{split}: {len(kept):,} of {len(rows):,} rows have at most {config.max_tokens} tokens, and are kept")
    if not kept:
        raise ValueError(f"No row of {split} has at most max_tokens={config.max_tokens} tokens. Raise it.")
    return kept


def released_rows(path: str, kind: Steps = Steps.equations) -> list[Row]:
    """The rows of a file in either released form, which is detected by its content."""
    rows = rows_of(_open_file(path, kind), partial(_converted, kind=kind))
    return [{key: row[key] for key in ("question", "steps", "answer")} for row in rows]


def audited(released: Released, config: Gsm8kBuild) -> tuple[list[Row], Audit]:
    """The rows that are kept, and the faults of all rows.

    Raises ValueError for a fault that the configuration sets to `error`.
    """
    rows = rows_of(released, partial(_converted, kind=config.steps))
    audit, kept = Audit(len(rows)), []
    for (number, _), row in zip(released.records, rows, strict=True):
        drop = False
        for fault, told in _faults(row.pop("equations"), row["answer"], audit.outcomes):
            audit.faults[fault].append({"row": number, **told})
            drop |= getattr(config, fault) is Faulty.drop
        if not drop:
            kept.append(row)
    audit.dropped = len(rows) - len(kept)
    for fault, found in audit.faults.items():
        if found and getattr(config, fault) is Faulty.error:
            more = [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            head = f"{released.path}: {audit.told(fault)}, and {fault}=error. Mend them, or give {fault}=keep or drop:"
            raise ValueError("\n".join([head, *map(_line, found[:SHOWN]), *more]))
    return kept, audit


def summarise(audits: dict[str, Audit], config: Gsm8kBuild) -> None:
    """Print the faults of all files to stderr, in at most ten lines for three files."""
    left = ON_SCREEN
    for origin, audit in audits.items():
        for fault in FAULTS:
            if not (found := audit.faults[fault]):
                continue
            fate = "dropped" if getattr(config, fault) is Faulty.drop else "kept"
            print(f"{origin}: {audit.told(fault)} ({fate})", file=sys.stderr)
            if fault == "arithmetic":
                for told in found[:left]:
                    print(_line(told), file=sys.stderr)
                left -= len(found[:left])
    if any(audit.faults[fault] for audit in audits.values() for fault in FAULTS):
        print(f"All of them are listed in {config.name}_manifest.json.", file=sys.stderr)


def measure(row: Row) -> Measures:
    """Statistics of one row: numbers to be averaged over the rows, lists to be pooled."""
    answer = gsm8k.number(row["answer"])
    verdicts = [check(found[1]) for step in row["steps"] for found in ANNOTATION.finditer(step)]
    last = verdicts[-1].written if verdicts else None
    return {
        "steps": float(len(row["steps"])),
        "rows without steps": float(not row["steps"]),
        "words of the question": float(len(row["question"].split())),
        "characters of a step": [float(len(step)) for step in row["steps"]],
        "equations": [verdict.outcome.value for verdict in verdicts],
        "operators": [sign for verdict in verdicts for sign in verdict.operators],
        "last value is not the answer": float(last is not None and answer is not None and last != answer),
        "digits of the answer": float(sum(sign.isdigit() for sign in row["answer"])),
        "negative answers": float(answer is not None and answer < 0),
        "answers with decimals": float(answer is not None and answer % 1 != 0),
    }


def _open_file(path: str, kind: Steps) -> Released:
    released = open_released(path, Kind.gsm8k, Kind.gsm8k_aug)
    if released.kind is Kind.gsm8k:
        return released
    if kind is Steps.sentences:
        raise ValueError(f"{path} is GSM8K-Aug, which has no sentences. Leave out steps=sentences.")
    return replace(released, records=[(number, {"text": line}) for number, line in released.records])


def _open_hub(config: Gsm8kBuild, name: str) -> tuple[dict[str, Released], dict[str, Any]]:
    loaded, described = load_hub(name, config.hub_config or HUB_CONFIGS.get(name))
    config.refuse_counts(name, {split: len(records) for split, records in loaded.items()})
    parts = {
        split: Released(Path(f"{name} ({split})"), Kind.gsm8k, list(enumerate(records, start=1)))
        for split, records in loaded.items()
    }
    return parts, described


def _divided(splits: dict[str, list[Row]], config: Gsm8kBuild) -> dict[str, list[Row]]:
    """Whole, if no numbers of rows are asked for; else the training rows are divided as a source is."""
    asked = {split: count for split, count in config.counts.items() if count is not None}
    if not asked:
        return splits
    own = {split: rows for split, rows in splits.items() if split != "train"}
    return divide(splits["train"], {"valid": 0, "test": 0} | asked, config.seed) | own


def _converted(record: Any, kind: Steps) -> Row:
    """A row, and with it its "equations", whatever its steps are.

    The record is a JSON object, or its text, with a question and an answer. Its solution is "steps" (a
    list), or "cot" (a text), or what stands in "answer" before `####`, a line a sentence. An object with
    nothing but "text" is a line of GSM8K-Aug: `question||<<a=b>> <<c=d>> #### answer`.
    """
    if isinstance(record, str):
        record = _json(record)
    if isinstance(record, dict) and "text" in record and "question" not in record:
        record = _from_line(text_field(record, "text"))
    question, answer = text_field(record, "question"), _answer(record)
    told = next(name for name in SOLUTIONS if name in record)
    if told == "answer":
        solution, answer = _at_mark(answer)
        pieces = [solution]
    else:
        pieces, answer = _texts(record[told], told), answer.rpartition("####")[2]
    value = gsm8k.number(answer)
    if value is None:
        raise ValueError(f"the answer {answer.strip()!r} is not a number.")
    equations = _equations("\n".join(pieces))
    parts = [part.strip() for piece in pieces for part in re.split(SOLUTIONS[told], ANNOTATION.sub("", piece))]
    bare = [part for part in parts if part]
    if kind is Steps.equations:
        steps = [f"<<{equation}>>" for equation in equations]
        if bare and told != "answer":
            raise ValueError(f"between question and answer stands more than <<...>>: {bare[0][:80]!r}.")
    else:
        steps = bare
        if equations and not steps:
            raise ValueError("it has no sentences, only equations. Leave out steps=sentences.")
    return {"question": question, "steps": steps, "answer": gsm8k.written(value), "equations": equations}


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}).") from None


def _from_line(line: str) -> dict[str, str]:
    question, mark, rest = line.rpartition("||")
    if not mark or not question.strip():
        raise ValueError(f"it has no question before a '||': {line[:80]!r}.")
    chain, answer = _at_mark(rest)
    return {"question": question, "cot": chain, "answer": answer}


def _at_mark(text: str) -> tuple[str, str]:
    solution, mark, answer = text.rpartition("####")
    if not mark:
        raise ValueError(f"it has no '####' before the answer: {text[-80:]!r}.")
    return solution, answer


def _answer(record: dict[str, Any]) -> str:
    """The field of that name, which some sets have as a number."""
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    return text_field(record, "answer")


def _texts(told: Any, name: str) -> list[str]:
    texts = [told] if isinstance(told, str) else told or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name!r} is {told!r}; it must be text, or a list of texts.")
    return texts


def _equations(text: str) -> list[str]:
    equations = [found[1] for found in ANNOTATION.finditer(text)]
    if text.count("<<") != len(equations) or text.count(">>") != len(equations):
        raise ValueError(f"a '<<' and a '>>' do not match: {text.strip()[:80]!r}.")
    return equations


def _faults(equations: list[str], answer: str, outcomes: Counter[Outcome]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each fault of a row and what the manifest says of it; the outcomes are counted on the way."""
    written = None
    for equation in equations:
        verdict = check(equation)
        outcomes[verdict.outcome] += 1
        written = verdict.written
        if verdict.value is None:
            yield "arithmetic", {"equation": equation, "unreadable": verdict.why}
        elif not verdict.holds:
            yield "arithmetic", {"equation": equation, "exact": shown(verdict.value)}
    if written is not None and written != Fraction(answer):
        yield "last_value", {"equation": equations[-1], "answer": answer}


def _line(told: dict[str, Any]) -> str:
    row, equation, (meaning, value) = told["row"], told["equation"], list(told.items())[-1]
    return f"  row {row}: {equation} ({meaning}: {value})"


BUILDER = Builder(
    task="gsm8k",
    title="grade-school arithmetic",
    about=(
        "GSM8K (Cobbe et al., arXiv 2110.14168; MIT licence) or GSM8K-Aug (Deng et al., arXiv 2311.01460), converted. "
        "What was found wrong in its equations stands in the manifest under `arithmetic`."
    ),
    fields={
        "question": "the problem",
        "steps": "its solution: the equations as <<48/2=24>>, or the sentences; may be empty",
        "answer": "a number, without thousands separators",
    },
    read=lambda config, path: released_rows(path, config.steps),
    read_splits=read_splits,
    measure=measure,
)

build = partial(run, builder=BUILDER)
main = application("build_gsm8k", Gsm8kBuild, build)

if __name__ == "__main__":
    main()
