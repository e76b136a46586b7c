"""Convert published evaluation sets, from the Hugging Face hub or from released files. The sets are a table of
`data_builders.evaluation_sets`; run `coconut data svamp --help`, or with another name of it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from coconut.tasks import TASKS
from coconut.utils.files import sha256
from coconut.utils.hydra_app import application
from coconut.utils.overrides import Place
from data_builders.builder_app import Builder, run
from data_builders.dataset_writer import Row
from data_builders.evaluation_sets import EVALUATION_SETS, EvaluationSet, Subset
from data_builders.hub import load_hub
from data_builders.release_formats import Kind, Released, SourceKeys, detected, parsed, rows_of
from data_builders.statistics import Measures
from data_builders.tables import read_table

Dataset = StrEnum("Dataset", list(EVALUATION_SETS))
NOT_RECORDS = (Kind.prontoqa, Kind.gsm8k_aug, Kind.binary, Kind.pointer, Kind.page, Kind.empty)
TEST_ONLY = ("source", "train", "valid", "num_train", "num_valid", "num_test")  # keys that a set to test on lacks


@dataclass
class EvaluationBuild(SourceKeys):
    """`hub`: another set of the hub in place of the table's, or a folder; `test`: a released file."""

    dataset: Dataset = Dataset.svamp  # pyright: ignore
    name: str = ""
    subset: str | None = None
    hub: Place | None = None
    hub_config: str | None = None

    def __post_init__(self) -> None:
        for key in TEST_ONLY:
            if (value := getattr(self, key)) is not None:
                raise ValueError(
                    f"{key}={value} is given, but {self.dataset} is a set to test on, which is taken whole. Leave it "
                    "out; a file is given as test=FILE."
                )
        subset, _ = self.entry.subset(self.subset)
        if not self.name:
            default = next(iter(self.entry.subsets))
            self.name = self.dataset if subset == default else f"{self.dataset}_{subset}"
        super().__post_init__()
        if self.test and (self.hub or self.hub_config):
            given = f"hub={self.hub}" if self.hub else f"hub_config={self.hub_config}"
            raise ValueError(f"{given} and test={self.test} are given: data come from one place. Keep one of them.")

    @property
    def entry(self) -> EvaluationSet:
        return EVALUATION_SETS[self.dataset]


def read_splits(config: EvaluationBuild) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The rows of the test split, and the manifest's entries on them.

    Raises ValueError for other columns, rows without an answer, or another number of rows than the table's.
    """
    entry = config.entry
    name, subset = entry.subset(config.subset)
    if config.test:
        released, source = _open_file(config.test), {"test": _described_file(config.test, entry)}
    else:
        released, source = _open_hub(config, subset)
    rows = _rows(released, entry)
    if len(rows) != subset.rows:
        others = [f"subset={key} has {value.rows:,}. " for key, value in entry.subsets.items() if key != name]
        raise ValueError(
            f"{released.path} has {len(rows):,} rows, and the published {config.dataset} ({name}) has {subset.rows:,}. "
            f"{''.join(others)}Give the whole file, unchanged. Rows of your own: data=own."
        )
    return {"test": rows}, {
        "dataset": str(config.dataset), "subset": name, "sources": source,
        "licence": entry.licence,
    }  # fmt: skip


def released_rows(config: EvaluationBuild, path: str) -> list[Row]:
    """The rows of a file in any form of the set."""
    return _rows(_open_file(path), config.entry)


def _rows(released: Released, entry: EvaluationSet) -> list[Row]:
    """The rows of records. Raises ValueError that counts and names the bad ones."""
    return rows_of(released, partial(_converted, entry=entry))


def _converted(record: Any, entry: EvaluationSet) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, and this is {type(record).__name__}.")
    form = next((form for form in entry.forms if record.keys() >= set(form.columns)), None)
    if form is None:
        wanted = ", or ".join(" ".join(form.columns) for form in entry.forms)
        raise ValueError(f"its columns are {' '.join(record)}; wanted are {wanted}.")
    question, answer = form.convert(record)
    return {"question": question, "steps": [], "answer": answer}


def _open_file(path: str) -> Released:
    """A JSON list, an object a line, or Parquet. Raises ValueError for a file of another kind."""
    if Path(path).suffix == ".parquet" and Path(path).is_file():
        return _numbered(Path(path), [record for _, record in read_table(path).records])
    released = detected(Path(path))
    if released.kind in NOT_RECORDS:
        raise ValueError(f"{path} looks like {released.kind}. Wanted is a JSON list, or a JSON object on each line.")
    records = [(number, parsed(one) if isinstance(one, str) else one) for number, one in released.records]
    return replace(released, records=records)


def _numbered(path: Path, records: list[Any]) -> Released:
    return Released(path, Kind.unknown, list(enumerate(records, start=1)))


def _described_file(path: str, entry: EvaluationSet) -> dict[str, Any]:
    digest = sha256(path)
    known = next((source for source, known in entry.released.items() if known == digest), None)
    return {"file": Path(path).name, "sha256": digest, "known_as": known}


def _open_hub(config: EvaluationBuild, subset: Subset) -> tuple[Released, dict[str, Any]]:
    entry = config.entry
    name = config.hub or entry.hub
    loaded, described = load_hub(name, config.hub_config or (None if config.hub else entry.hub_config))
    if missing := [split for split in subset.hub_splits if split not in loaded]:
        raise ValueError(
            f"{name} has no {' and no '.join(missing)} split, only {', '.join(loaded)}; {config.dataset} is made of "
            f"{', '.join(subset.hub_splits)}. Give the rows as test=FILE."
        )
    records = [record for split in subset.hub_splits for record in loaded[split]]
    described["splits"] = list(subset.hub_splits)
    return _numbered(Path(f"{name} ({', '.join(subset.hub_splits)})"), records), described


def measure(row: Row, judge: str) -> Measures:
    """Statistics of a row. Answers from a short list are counted one by one."""
    task = TASKS[judge]
    counted: Measures = {"answer": str(task.key(row["answer"]))} if task.candidates(row["question"]) else {}
    return {
        "words of the question": float(len(row["question"].split())),
        "characters of the answer": float(len(row["answer"])),
        **counted,
    }


def builder_of(config: EvaluationBuild) -> Builder:
    entry = config.entry
    return Builder(
        task=entry.judge,
        command=str(config.dataset),
        title=entry.title,
        about=f"{entry.paper}. Licence: {entry.licence}. Beware: {entry.beware}",
        fields={
            "question": "the problem",
            "steps": "empty: the set has no chains",
            "answer": f"judged by the task {entry.judge}",
        },
        read=released_rows,
        read_splits=read_splits,
        measure=partial(measure, judge=entry.judge),
    )


def build(config: EvaluationBuild) -> None:
    run(config, builder_of(config))


def told(dataset: str, what: str) -> str:
    """What the help says of a set: its `line`, or its `facts`: source, subsets, what to beware of."""
    entry = EVALUATION_SETS[dataset]
    if what == "line":
        return entry.line
    subsets = ", ".join(f"{name} ({subset.rows:,} rows)" for name, subset in entry.subsets.items())
    lines = {
        "from": f"{entry.hub} on the Hugging Face hub; {entry.paper}", "licence": entry.licence, "judge": entry.judge,
        "subsets": subsets, "columns": " or ".join(", ".join(form.columns) for form in entry.forms),
        "beware": entry.beware,
    }  # fmt: skip
    return "\n".join(_indented(lines.items()))


def _indented(lines: Iterable[tuple[str, str]]) -> Iterable[str]:
    for key, text in lines:
        first, *rest = textwrap.wrap(text, 88)
        yield from (f"  {key:<12} {first}", *(f"{'':15}{line}" for line in rest))


def main() -> None:
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("told", told, replace=True)
    application("build_evaluation_set", EvaluationBuild, build)()


if __name__ == "__main__":
    main()
