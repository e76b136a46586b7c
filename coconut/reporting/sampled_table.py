"""Write the comparison of sampled evaluations at equal forward passes: on the screen, as a page, as CSV and JSON."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from coconut.analysis.config import TableConfig
from coconut.analysis.sampled_comparison import Difference, SampledComparison, compare_sampled
from coconut.data.seen_questions import describe_questions, most_seen
from coconut.reporting.charts import metrics_over_passes
from coconut.reporting.page import Aside, Code, Lead, Section, Table, Text, figure_of, page
from coconut.reporting.phrases import between, counted, percent, signed
from coconut.reporting.run_table import aligned, common_folder, output_folder, wrapped
from coconut.runs.study import Study
from coconut.utils.console import log
from coconut.utils.files import write_text

COLUMNS = ["evaluation", "metric", "k", "passes", "value", "95 % interval"]
OF_DIFFERENCES = ["metric", "evaluation", "passes", "its value", "baseline", "difference", "95 % interval"]
NOTE = (
    "Passes: sequential forward passes for k answers to a question, k times the mean of an answer. Those of best@k "
    "include the passes of the reward model. An answer counts as if it were generated alone. Between two measured k a "
    "value is interpolated, linearly in the logarithm of the passes; outside of what was measured nothing is compared. "
    "Intervals: 95 % bootstrap intervals over questions, which are paired in differences; passes count as known. The "
    "intervals are not corrected for the number of differences, and say nothing about other seeds of training."
)


def run(config: TableConfig) -> int:
    """Compare sampled evaluations and write the table in all forms. Gives the exit status."""
    compared = compare_sampled(config)
    of_runs = common_folder(list(dict.fromkeys(run.folder for run in compared.runs)))
    folder = output_folder(config, of_runs)
    Study("sampled", compared.rows, compared.facts()).write(folder)
    write_text(folder / "sampled.html", html(compared, of_runs))
    log(on_screen(compared))
    log(f"Table: {folder / 'sampled.html'}, and the same as .csv and .json")
    return 0


def questions(compared: SampledComparison) -> str:
    """A phrase with the questions, and how many of them a run has seen."""
    evaluations = [run.evaluation for run in compared.runs]
    return describe_questions(evaluations[0]["count"], most_seen(evaluations))


def describe(compared: SampledComparison) -> list[str]:
    """Say in a sentence for each difference to the baseline what its interval allows to say."""
    if len(compared.runs) == 1:
        return ["There is only one evaluation. Nothing is compared."]
    return [
        _describe(found) if found
        else f"{a.metric}@k of {a.label} and of {b.label} have no number of passes in common, so they are not compared."
        for a, b, found in compared.pairs
    ]  # fmt: skip


def _describe(one: Difference) -> str:
    verdict = "clearly higher" if one.low > 0 else "clearly lower" if one.high < 0 else "not clearly different"
    return (
        f"At {one.passes:,.1f} passes a question {one.metric}@k of {one.a} is {verdict}: {percent(one.of_a)} "
        f"({one.k_of_a}) against {percent(one.of_b)} of {one.b} ({one.k_of_b}), a difference of "
        f"{_points(one.difference)} points (95 % interval {_points(one.low)} to {_points(one.high)})."
    )


def _points(share: float) -> str:
    return signed(100 * share, 1)


def point_rows(compared: SampledComparison) -> list[list[str]]:
    """The texts of all measured points, in the order of COLUMNS."""
    return [
        [row["label"], f"{row['metric']}@k", str(row["k"]), f"{row['passes']:,.1f}", percent(row["value"]),
         between(row["low"], row["high"])] for row in compared.rows
    ]  # fmt: skip


def difference_rows(compared: SampledComparison) -> list[list[str]]:
    """The texts of the differences to the baseline, in the order of OF_DIFFERENCES."""
    return [
        [f"{one.metric}@k", one.a, f"{one.passes:,.1f}", percent(one.of_a), percent(one.of_b),
         _points(one.difference), f"{_points(one.low)} to {_points(one.high)}"] for one in compared.differences
    ]  # fmt: skip


def on_screen(compared: SampledComparison) -> str:
    """The measured points and the sentences for a terminal."""
    sentences = [wrapped(sentence) for sentence in describe(compared)]
    return "\n".join([
        f"Sampled answers to {questions(compared)}", "", *aligned([COLUMNS, *point_rows(compared)]), "", *sentences, "",
        wrapped(NOTE),
    ])  # fmt: skip


def html(compared: SampledComparison, folder: Path) -> str:
    """The comparison as an HTML page that loads no other file. `folder`: the folder of the runs."""
    draw = partial(metrics_over_passes, compared.rows)
    alt = "Each metric at k over the forward passes of the k answers; the numbers are in the table below."
    caption = "Each point is a value of k: 1, 2, 4, ... answers. The wide bars are 95 % intervals over questions."
    points = Aside("The numbers", [Table(COLUMNS, point_rows(compared), 4)])
    parts = [Lead(describe(compared)), figure_of(draw, "metrics_over_passes", alt, caption), points]
    if compared.differences:
        parts += [Text(f"Differences to {compared.baseline}, in percentage points:")]
        parts += [Table(OF_DIFFERENCES, difference_rows(compared), 5)]
    what = [
        [label, f"{run.folder.name}: {run.name}", f"{run.evaluation['step']:,}",
         f"{run.evaluation['count'] * run.evaluation['sampling']['samples']:,}", f"{run.evaluation['passes']:.1f}",
         percent(run.evaluation["sampling"]["unreadable"]), percent(run.evaluation["truncated"])]
        for label, run in zip(compared.labels, compared.runs, strict=True)
    ]  # fmt: skip
    columns = ["label", "run and evaluation", "update", "answers", "passes an answer", "unreadable", "truncated"]
    provenance = [Table(columns, what, 5), Text("The command for this page:"), Code(compared.command)]
    sections = [
        Section("table", None, [*parts, Text(NOTE)]),
        Section("provenance", "What exactly was compared", provenance),
    ]
    subject = counted(len(compared.runs), "evaluation")
    return page("sampled answers", subject, f"on {questions(compared)}", folder, sections, kicker="comparison")
