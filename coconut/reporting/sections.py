"""The sections of a run's page about what was measured, with their charts.

A section is a function from a RunRecord to a Section; it is None where the run has nothing of the kind.
Every sentence that judges is chosen by numbers, and says no more than they do.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from coconut.methods import Slot
from coconut.reporting import charts
from coconut.reporting.page import (
    Aside,
    Code,
    Figure,
    Heading,
    Lead,
    Legend,
    Part,
    Ranked,
    Section,
    Table,
    Text,
    percent,
)
from coconut.reporting.plots import as_svg
from coconut.reporting.run_page import counted
from coconut.runs.record import DASH, RunRecord
from coconut.runs.study import Study
from coconut.tasks import prosqa
from coconut.utils.console import listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

WIDE, NARROW = 720, 350  # points
SILENT = 0.05  # mean probability of all nodes together, below which their shares say little
PATHS = ("correct_path", "longer_path", "wrong_target", "hallucination")
Row = dict[str, Any]
Drawings = dict[str, "Callable[[float], Drawing]"]  # each a function of its width in points


def how_many(run: RunRecord) -> Section | None:
    """How it answers with other numbers of thoughts than its own, and whether it knows when to stop."""
    noun, seen = run.stages[-1].slot.value, run.study_note
    title = f"How many {noun}s"
    if not run.studies and run.best and run.stages[-1].slot is Slot.thought:
        hint = f"coconut analyze run={shlex.quote(str(run.folder))}"
        return Section("how-many", title, [Text("Its thoughts were not looked into yet. This does it:"), Code(hint)])
    parts: list[Part] = [Text(seen)] if seen else []
    if study := run.studies.get("k_forcing"):
        parts.append(Text(" ".join(describe_k_forcing(study, noun, run.chance_accuracy))))
        if study.facts["warning"]:
            parts.append(Text(study.facts["warning"]))
        caption = (
            f"The same questions, asked with every number of {noun}s from none on. The wide bars are 95 % intervals; "
            "“clearly” means that two of them do not overlap."
        )
        if any(row["correct_path"] is not None for row in study.rows):
            caption += (
                f" Below: what the model wrote. A path that begins after the {noun}s counts as right if what is "
                "missing before it can be filled in."
            )
        rows = [
            [str(row["thoughts"]), percent(row["accuracy"]), _between(row["low"], row["high"]),
             f"{row['new_tokens']:.1f}"] for row in study.rows
        ]  # fmt: skip
        table = Table([f"{noun}s", "accuracy", "95 % interval", "tokens of language"], rows, 3)
        alt = f"Accuracy for each number of {noun}s; the numbers are in the table below."
        parts += [*_figure(drawings(run), "k_forcing", alt, caption), Aside("The numbers", [table])]
    if study := run.studies.get("prefix_values"):
        parts += [Heading("What each thought adds"), *_prefix_values(run, study)]
    if study := run.studies.get("stopping"):
        parts += [Heading("When to stop"), *_stopping(study)]
    return Section("how-many", title, parts) if parts else None


def describe_k_forcing(study: Study, noun: str = "thought", guess: float | None = None) -> list[str]:
    """In sentences, how the accuracy depends on the number of thoughts."""
    trained = next(row for row in study.rows if row["thoughts"] == study.facts["trained_thoughts"])
    others = [row for row in study.rows if row is not trained]

    def with_numbers(rows: list[Row]) -> str:
        return listed(f"{_count(row['thoughts'], noun)} ({percent(row['accuracy'])})" for row in rows)

    sentences = [
        f"With its own {counted(trained['thoughts'], noun)} the model is right on {percent(trained['accuracy'])} of "
        f"{trained['questions']:,} questions."
    ]
    better = [row for row in others if row["low"] > trained["high"]]
    worse = [row for row in others if row["high"] < trained["low"]]
    even = [row for row in others if row not in better and row not in worse]
    if guess is not None and trained["low"] <= guess:
        sentences.append(f"That is not surely better than guessing ({percent(guess)}), so the rest says little.")
    elif others and not any(row["accuracy"] > trained["accuracy"] for row in others):
        sentences.append("No other number does better.")
    for rows, words in ((better, "Clearly better"), (worse, "Clearly worse"), (even, "No clear difference")):
        if rows:
            sentences.append(f"{words}: {with_numbers(rows)}.")
    written = [
        (row, sum(row[name] or 0 for name in PATHS)) for row in study.rows if row["thoughts"] < trained["thoughts"]
    ]
    written = [(row, count) for row, count in written if count]
    if written:
        if len(written) > 4:
            written = [written[0], written[-1]]
        shares = listed(
            f"{percent(row['hallucination'] / n)} with {_count(row['thoughts'], noun)}" for row, n in written
        )
        sentences.append(f"Of the paths that it then writes itself, so many are no way through the graph: {shares}.")
    return sentences


def _prefix_values(run: RunRecord, study: Study) -> list[Part]:
    kinds = {of: [row for row in study.rows if row["of"] == of and row["steps"] is None] for of in charts.PREFIXES}
    parts: list[Part] = [Text(" ".join(describe_prefix_values(study)))]
    if study.facts["warning"]:
        parts.append(Text(study.facts["warning"]))
    caption = (
        "The mean natural logarithm of the probability that the right answer follows at once after so many thoughts. "
        "With fewer thoughts than its own a model may be about to write steps instead, so one line takes as given what "
        "an answer begins with. The wide bars are 95 % intervals over the questions."
    )
    rows = [
        [charts.PREFIXES[of][1], str(row["thoughts"]), _signed(row["value"]), _range(row["low"], row["high"]),
         DASH if row["gain"] is None else _signed(row["gain"]),
         DASH if row["gain"] is None else _range(row["gain_low"], row["gain_high"])]
        for of, found in kinds.items() for row in found
    ]  # fmt: skip
    table = Table(["the right answer", "thoughts", "prefix value", "95 % interval", "added", "95 % interval"], rows, 4)
    alt = "Log-probability of the right answer for each number of thoughts; the numbers are in the table below."
    return [*parts, *_figure(drawings(run), "prefix_values", alt, caption), Aside("The numbers", [table])]


def describe_prefix_values(study: Study) -> list[str]:
    """In sentences, what each thought adds to the log-probability of the right answer."""
    rows = [row for row in study.rows if row["of"] == "answer" and row["steps"] is None]
    after = [row for row in study.rows if row["of"] == "after_mark" and row["steps"] is None]
    sentences = [
        "How sure of the right answer is the model after each thought? The logarithm of its probability is the prefix "
        f"value: on average {_signed(rows[0]['value'])} without thoughts and {_signed(rows[-1]['value'])} with "
        f"{counted(rows[-1]['thoughts'], 'thought')}; {_signed(after[0]['value'])} and {_signed(after[-1]['value'])} "
        "once it has begun to answer."
    ]
    for found, words in ((rows, "The whole answer"), (after, "What it says once it has begun")):
        kinds: dict[str, list[str]] = {"likelier": [], "less likely": [], "not surely either": []}
        for row in found[1:]:
            kind = "likelier" if row["gain_low"] > 0 else "less likely" if row["gain_high"] < 0 else "not surely either"
            kinds[kind].append(f"thought {row['thoughts']} ({_signed(row['gain'])})")
        sentences.append(
            f"{words} is made " + "; ".join(f"{kind} by {listed(by)}" for kind, by in kinds.items() if by) + "."
        )
    sentences.append(
        "This is no implicit reward: a thought without noise has no probability, and no reference model is asked. It "
        "is what the model believes, right or wrong, when the answer is known."
    )
    return sentences


def _stopping(study: Study) -> list[Part]:
    facts = study.facts
    if facts.get("reason"):
        return [Text(f"Whether it knows when to stop was not measured: {facts['reason']}")]
    by_rule = {row["rule"]: row for row in study.rows}
    constant, chosen = by_rule["constant"], by_rule["classifier"]
    text = (
        f"A small classifier, trained on the thoughts of {facts['trained_on']:,} questions, can decide after each "
        f"thought whether it was the last. It stops after {chosen['thoughts']:.2f} on average; "
        f"{percent(chosen['accuracy'])} of the answers are right then, and {percent(constant['accuracy'])} with always "
        f"{counted(constant['thoughts'], 'thought')}. Of its decisions on validation data "
        f"{percent(facts['classifier_accuracy'])} are right; who decides by the thought's place alone "
        f"gets {percent(facts['by_place_alone'])}."
    )
    names = {"constant": "always as many", "classifier": "the classifier decides"}
    rows = [
        [names[row["rule"]], f"{row['thoughts']:.2f}", percent(row["accuracy"]), _between(row["low"], row["high"])]
        for row in study.rows
    ]
    return [Text(text), Table(["rule", "thoughts", "accuracy", "95 % interval"], rows, 3)]


# What the thoughts hold.


@dataclass(frozen=True)
class ShownQuestion:
    """A question with its index in the test file, and its rows of the study `values`; chosen out of `count`."""

    index: int
    count: int
    question: str
    answer: str
    values: Study


def sample(run: RunRecord) -> ShownQuestion | None:
    """A question answered rightly whose path has two edges or more: the one with most forks, and then the first.

    A fork is a moment when one node ahead leads to the target and another does not. It is chosen from the
    questions whose thoughts were decoded, if one of them is such a question.
    """
    study, questions = run.studies.get("values"), _asked(run)
    if not study:
        return None
    rows_of: dict[int, list[Row]] = {}
    for row in study.rows:
        rows_of.setdefault(row["question"], []).append(row)
    decoded = {row["question"] for row in run.studies["decoded"].rows} if "decoded" in run.studies else set()
    for pool in (decoded & rows_of.keys(), rows_of.keys()):
        found: list[tuple[int, ShownQuestion]] = []
        for index in sorted(pool):
            if index in questions and _may_be_shown(questions[index], rows_of[index]):
                asked, rows = questions[index], Study("values", rows_of[index], study.facts)
                found.append((_forks(rows), ShownQuestion(index, len(pool), asked["text"], asked["gold"], rows)))
        if found:
            return max(found, key=lambda pair: pair[0])[1]
    return None


def _asked(run: RunRecord) -> dict[int, Row]:
    """The questions that the studies asked, and what the model answered, by their place in the file."""
    study = run.studies.get("asked")
    return {row["question"]: row for row in study.rows} if study else {}


def _may_be_shown(asked: Row, rows: list[Row]) -> bool:
    if not asked["correct"] or not charts.drawable(asked["text"]):
        return False
    target = prosqa.read_target(asked["gold"])
    return any(row["node"] == target and (row["distance"] or 0) >= 2 for row in rows)


def _forks(values: Study) -> int:
    moments = {(row["after"], row["leads"]) for row in values.rows if row["ahead"]}
    return sum(leads and (after, False) in moments for after, leads in moments)


def what_they_hold(run: RunRecord) -> Section | None:
    """What can be read out of the thoughts."""
    drawn, chosen = drawings(run), sample(run)
    parts: list[Part] = []
    if chosen:
        parts += _tree(drawn, chosen)
    parts += _decoded(run, chosen)
    if "parallelism" in drawn:
        parts += [Heading("How many ways at once"), *_parallelism(run, drawn)]
    if "heights_shortest" in drawn:
        parts += [Heading("Which nodes it prefers"), *_heights(run, drawn)]
    if drawn.keys() & {"search_tree", "parallelism", "heights_shortest"}:
        intro = (
            "A thought is a vector and has no words. But after any thought the model can be made to speak: then the "
            "probabilities of what it would name next show which ways it sees, and which it prefers."
        )
        parts = [Text(intro), *_beware(run.studies["values"]), *parts]
    if "inner_products" in drawn:
        parts += [Heading("Where the thoughts point"), *_inner_products(run, drawn)]
    return Section("what-they-hold", "What the thoughts hold", parts) if parts else None


def _beware(values: Study) -> list[Part]:
    """What to know before the probabilities of nodes are read."""
    warnings = [values.facts["warning"]] if values.facts["warning"] else []
    go_on = {(row["question"], row["after"]) for row in values.rows if row["ahead"]}
    named: dict[int, dict[int, float]] = {}
    for row in values.rows:
        if (row["question"], row["after"]) not in go_on:
            continue
        of = named.setdefault(row["after"], {})
        of[row["question"]] = of.get(row["question"], 0.0) + row["value"]
    means = {after: sum(shares.values()) / len(shares) for after, shares in named.items()}
    silent = [after for after, mean in sorted(means.items()) if mean < SILENT]
    if silent:
        shares = listed(f"{charts.percent_of(means[after])} {_moment(after)}" for after in silent)
        warnings.append(
            f"It hardly speaks in steps there: all nodes together get {shares}, so their shares say little."
        )
    return [Text(" ".join(warnings))] if warnings else []


def _tree(drawn: Drawings, chosen: ShownQuestion) -> list[Part]:
    asked, rows = prosqa.parse_question(chosen.question), chosen.values.rows
    target = prosqa.read_target(chosen.answer)
    text = (
        f"From {asked.root}, can {asked.options[0]} be reached or {asked.options[1]}? The model answered rightly: "
        f"{target}. This is question {chosen.index + 1} of the test file. It was chosen from {chosen.count:,} as the "
        "one with most forks, of those answered rightly whose way has two edges or more."
    )
    shares = []
    for after in sorted({row["after"] for row in rows if row["ahead"]}):
        leading = [row["value"] for row in rows if row["after"] == after and row["ahead"] and row["leads"]]
        shares.append(f"{charts.percent_of(sum(leading))} {_moment(after)}")
    caption = (
        "Each column is one edge farther from the start; above it stands how many thoughts the model had when it was "
        "made to name the next node. The more amber, the likelier the name; “elsewhere” is what nodes of other columns "
        f"got. Here the nodes from which {target} can still be reached get {listed(shares)}."
    )
    legend = Legend(
        [
            ("blue", "where the question starts"),
            ("green", "right answer and a shortest way to it"),
            ("red", "wrong option"),
            ("amber", "probability of being named next"),
        ]
    )
    figure = _figure(drawn, "search_tree", "The graph of the question, each node with its probability.", caption)
    return [Heading("One question, thought by thought"), Text(text), legend, *figure]


def _decoded(run: RunRecord, chosen: ShownQuestion | None) -> list[Part]:
    study, questions = run.studies.get("decoded"), _asked(run)
    if not study or not study.rows:
        return []
    index = chosen.index if chosen else study.rows[0]["question"]
    rows = [row for row in study.rows if row["question"] == index]
    if not rows or index not in questions:
        return []
    thoughts = sorted({row["thought"] for row in rows})
    words = [
        (
            f"thought {thought}",
            [
                (row["token"], row["probability"])
                for row in sorted(rows, key=lambda row: row["rank"])
                if row["thought"] == thought and (row["rank"] == 1 or row["probability"] >= 0.0005)
            ],
        )
        for thought in thoughts
    ]
    of = "this question" if chosen else f"the question “{questions[index]['text'].strip()}”"
    text = (
        f"The thoughts of {of}, read as if each were about to be spoken: the likeliest words of the model's output "
        "layer. Nothing in training asks for this, so take it as a hint."
    )
    if chosen and chosen.values.facts["form"] == "symbols":
        text += _names_at_distance(words, chosen)
    return [Heading("The thoughts read as words"), Text(text), Ranked(words)]


def _names_at_distance(words: list[tuple[str, list[tuple[str, float]]]], chosen: ShownQuestion) -> str:
    """How many thoughts are likeliest read as a node as far from the root as they have come."""
    c = chosen.values.facts["thoughts_per_step"]
    distance = {row["node"]: row["distance"] for row in chosen.values.rows}
    reach = max(found for found in distance.values() if found is not None)
    asked = [(number, read[0][0].strip()) for number, (_, read) in enumerate(words, 1) if -(-number // c) <= reach]
    hits = sum(distance.get(word) == -(-number // c) for number, word in asked)
    return f" Here {hits} of {counted(len(asked), 'thought')} would name a node at the distance that they stand for."


def _parallelism(run: RunRecord, drawn: Drawings) -> list[Part]:
    rows = run.studies["parallelism"].rows
    numbers = charts.moments(run.studies["parallelism"])
    halves = []
    for after in numbers:
        middle = min((row for row in rows if row["after"] == after), key=lambda row: abs(row["percentile"] - 50))
        halves.append(f"{charts.percent_of(middle['top1'])} {_moment(after)}")
    caption = (
        "Questions from the least to the most decided one. The dark area is the probability of the likeliest node "
        "ahead, the lighter ones add the second and the third: where they are wide, the model holds several ways open. "
        f"In half of the questions with a step still to go, the likeliest node gets at least {listed(halves)}."
    )
    if single := _single(run, numbers):
        caption += f" Only one node is ahead, and there is nothing to choose, in {listed(single)}."
    return _figure(drawn, "parallelism", "Cumulated probabilities of the likeliest nodes over the questions.", caption)


def _single(run: RunRecord, numbers: list[int]) -> list[str]:
    """In which share of the questions there is one node ahead, for each number of thoughts."""
    if "values" not in run.studies:
        return []
    ahead: dict[int, dict[int, int]] = {after: {} for after in numbers}
    for row in run.studies["values"].rows:
        if row["ahead"] and row["after"] in ahead:
            counts = ahead[row["after"]]
            counts[row["question"]] = counts.get(row["question"], 0) + 1
    return [
        f"{percent(sum(count == 1 for count in counts.values()) / len(counts))} {_moment(after)}"
        for after, counts in ahead.items()
        if counts
    ]


def _heights(run: RunRecord, drawn: Drawings) -> list[Part]:
    rows = [row for row in run.studies["heights"].rows if row["kind"] == "shortest"]
    against = []
    for after in sorted({row["after"] for row in rows}):
        means = []
        for leads in (True, False):
            group = [row for row in rows if row["after"] == after and row["leads"] is leads]
            if count := sum(row["count"] for row in group):
                means.append(charts.percent_of(sum(row["mean"] * row["count"] for row in group) / count))
        if len(means) == 2:
            against.append(f"{means[0]} against {means[1]} {_moment(after)}")
    caption = (
        "The height of a node is the number of edges to the nearest leaf: at height 0 nothing follows, and the higher "
        "a node, the farther one must look to judge it. Points are mean probabilities of nodes ahead with their "
        f"standard errors, hollow if there are fewer than {charts.FEW} nodes. "
    )
    if against:
        caption += f"Here a node that leads to the target gets {listed(against)} for one that does not."
    alt = "Mean probability of nodes by their height."
    other = "The same, but height is the number of edges to the farthest leaf."
    farthest = Aside("By the farthest leaf", _figure(drawn, "heights_longest", alt, other))
    return [*_figure(drawn, "heights_shortest", alt, caption), farthest]


def _inner_products(run: RunRecord, drawn: Drawings) -> list[Part]:
    rows = run.studies["inner_products"].rows
    thoughts = sorted({row["thought"] for row in rows})
    mean = {(row["thought"], row["group"]): row["mean"] for row in rows}
    first = [
        t for t in thoughts if all(mean.get((t, "optimal"), -1e9) >= mean.get((t, g), -1e9) for g in charts.GROUPS)
    ]
    number = thoughts[-1]
    groups = [(group, mean[number, group]) for group in charts.GROUPS if (number, group) in mean]
    values = listed(f"{value:z.1f} for nodes {charts.GROUPS[group][2]}" for group, value in groups)
    caption = (
        "The inner product of a thought with the vectors of the nodes' names, at the distance that the thought stands "
        "for: the farther right, the more of these nodes it holds. The bars reach one standard deviation to each side. "
        f"Here nodes on a shortest way come first in {len(first)} of {counted(len(thoughts), 'thought')}; "
        f"thought {number} has {values} on average."
    )
    return _figure(drawn, "inner_products", "Inner products of thoughts with four groups of nodes.", caption)


# Are the thoughts used?


def are_they_used(run: RunRecord) -> Section | None:
    """What happens to the answers when the thoughts, or the graph, are other ones."""
    drawn = drawings(run)
    thoughts, graph = run.studies.get("audit_thoughts"), run.studies.get("audit_edges")
    parts: list[Part] = []
    numbers = "The numbers, with 95 % intervals"
    if thoughts:
        caption = (
            "Each row changes the thoughts in one way before the model answers, and leaves the question as it is. The "
            "blue line is the accuracy as trained; bars are 95 % intervals. If neither moves, the answer does not "
            "hang on what was changed; later thoughts keep what they took from one that is replaced."
        )
        figure = _figure(drawn, "audit_thoughts", "Accuracy and changed answers, as in the table below.", caption)
        columns = ["the thoughts", "accuracy", "difference", "answers changed"]
        table = Table(columns, [_changed_thoughts(row) for row in thoughts.rows], 3)
        parts += [Lead(thoughts.facts["verdict"]), *figure, Aside(numbers, [table])]
    if graph:
        caption = (
            "Each row changes one edge in questions that were answered rightly, or the thoughts that go with it. Left: "
            "the answers that become the one which the changed graph makes right. Right: those that change at all."
        )
        figure = _figure(drawn, "audit_edges", "Answers that follow or change, as in the table below.", caption)
        if thoughts:
            parts.append(Heading("Where the answer comes from"))
        parts += [Lead(graph.facts["verdict"]), *figure]
        if graph.rows:
            columns = ["the change", "questions", "answers that follow", "answers changed"]
            parts.append(Aside(numbers, [Table(columns, [_changed_edges(row) for row in graph.rows], 3)]))
    title = "Are the thoughts used?" if thoughts else "Where the answer comes from"
    return Section("are-they-used", title, parts) if parts else None


def _changed_thoughts(row: Row) -> list[str]:
    accuracy = f"{percent(row['accuracy'])} ({_between(row['low'], row['high'])})"
    if row["change"] == "none":
        return [row["label"], accuracy, DASH, DASH]
    low, high = _points(row["difference_low"]), _points(row["difference_high"])
    return [row["label"], accuracy, f"{_points(row['difference'])} ({low} to {high})", _share(row, "changed")]


def _changed_edges(row: Row) -> list[str]:
    return [row["label"], f"{row['questions']:,}", _share(row, "followed"), _share(row, "changed")]


# The charts.


def drawings(run: RunRecord) -> Drawings:
    """The charts of a run by name."""
    found: Drawings = {}
    studies = {name: study for name, study in run.studies.items() if study.rows}
    if study := studies.get("k_forcing"):
        found["k_forcing"] = partial(charts.k_forcing, study, guess=run.chance_accuracy, noun=run.stages[-1].slot.value)
    if study := studies.get("prefix_values"):
        found["prefix_values"] = partial(charts.prefix_values, study)
    if chosen := sample(run):
        found["search_tree"] = partial(charts.search_tree, chosen.question, chosen.answer, chosen.values)
    if study := studies.get("parallelism"):
        found["parallelism"] = partial(charts.parallelism, study)
    if study := studies.get("heights"):
        for kind in ("shortest", "longest"):
            found[f"heights_{kind}"] = partial(charts.heights, study, kind=kind)
    if study := studies.get("inner_products"):
        found["inner_products"] = partial(charts.inner_products, study)
    if study := studies.get("audit_thoughts"):
        rows = [row for row in study.rows if not row["change"].startswith("count_") or "k_forcing" not in studies]
        found["audit_thoughts"] = partial(charts.audit, Study(study.name, rows, study.facts))
    if study := studies.get("audit_edges"):
        found["audit_edges"] = partial(charts.edges, study)
    return found


def _figure(drawn: Drawings, name: str, alt: str, caption: str) -> list[Part]:
    if name not in drawn:
        return []
    return [figure_of(drawn[name], name, alt, caption)]


def figure_of(draw: Callable[[float], Drawing], name: str, alt: str, caption: str) -> Figure:
    """A picture that is a function of its width, for wide pages and for narrow ones."""
    wide, narrow = (as_svg(draw(width), f"{name}-{word}") for width, word in ((WIDE, "wide"), (NARROW, "narrow")))
    return Figure(wide, narrow, alt, caption)


# Words.


def _count(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"


def _moment(after: int) -> str:
    return f"after {counted(after, 'thought')}" if after else "before any thought"


def _between(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _range(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _share(row: Row, name: str) -> str:
    if row[name] is None:
        return DASH
    return f"{percent(row[name])} ({_between(row[f'{name}_low'], row[f'{name}_high'])})"
