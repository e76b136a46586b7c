"""coconut analyze: measure a trained run and write a page; table, compare-methods: compare several runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.analysis.config import AnalyzeConfig, MethodsConfig, TableConfig
from coconut.utils.hydra_app import application, subcommands

if TYPE_CHECKING:
    from coconut.runs.record import RunRecord
    from coconut.runs.study import Study


def run(config: AnalyzeConfig) -> int:
    """Measure a run's model, if it has a checkpoint, and write the page. Gives the exit status."""
    from coconut.analysis.examine import examine
    from coconut.data.seen_questions import describe_questions
    from coconut.engine.launcher_env import read_launcher_env
    from coconut.reporting.phrases import percent
    from coconut.rl import report as policies
    from coconut.rl.examine import examine_choices
    from coconut.runs.record import read_run
    from coconut.runs.study import FOLDER
    from coconut.utils.console import log, silence_libraries
    from coconut.utils.files import write_text

    if read_launcher_env().rank:
        return 0  # under a launcher only the main process works
    silence_libraries()
    record = read_run(config.run)
    path = Path(config.output) if config.output else record.folder / "report.html"
    measures = bool(config.parts) or (config.parts is None and record.best is not None)
    studies = examine(config, record) if measures else {}
    if config.parts is None and policies.chooses(record) and (choices := examine_choices(config, record)):
        studies |= {study.name: study for study in choices}
        log(policies.on_screen(choices[0]))
    if studies:
        write_studies(record, studies)
        log(f"Data and pictures: {record.folder / FOLDER}")
    record = read_run(config.run)
    write_text(path, page_of(record))
    if record.test:
        result = record.evaluations[record.test]
        log(f"accuracy {percent(result['accuracy'])} on {describe_questions(result['count'], result.get('seen'))}")
    log(f"Report: {path}")
    return 0


def write_studies(record: RunRecord, studies: dict[str, Study]) -> None:
    """Write studies with their figures to RUN/analysis."""
    from coconut.reporting.charts import save_png
    from coconut.reporting.page import WIDE
    from coconut.reporting.sections import drawings
    from coconut.runs.study import FOLDER
    from coconut.utils.files import atomic_folder

    with atomic_folder(record.folder / FOLDER) as folder:
        for study in studies.values():
            study.write(folder)
        for name, draw in drawings(replace(record, studies=studies)).items():
            save_png(draw(WIDE), folder / f"{name}.png")


def page_of(record: RunRecord) -> str:
    """The HTML of a run's report."""
    from coconut.reporting.run_page import answers, headline, learning, provenance, report, sampled
    from coconut.reporting.sections import are_they_used, how_many, relies_on_shortcuts, what_they_hold
    from coconut.reporting.verdict import what_it_means
    from coconut.rl import report as policies

    if record.is_policy:
        return policies.report(record)
    used = (are_they_used, relies_on_shortcuts, learning, answers, provenance)
    return report(record, (headline, what_it_means, sampled, policies.choices, how_many, what_they_hold, *used))


def table(config: TableConfig) -> int:
    """Write the table of runs: of supervised runs, or of policies. Gives the exit status."""
    from coconut.rl.policy_table import write_table

    return write_table(config)


def compare_methods(config: MethodsConfig) -> int:
    """Write the table of runs by measurements. Gives the exit status."""
    from coconut.reporting import verdict

    return verdict.compare_methods(config)


main = subcommands(
    application("analyze", AnalyzeConfig, run), table=application("run_table", TableConfig, table),
    **{"compare-methods": application("compare_methods", MethodsConfig, compare_methods)},
)  # fmt: skip

if __name__ == "__main__":
    main()
