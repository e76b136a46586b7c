"""The sections of a run's page about its studies, with their charts.

A section is a function from a RunRecord to a Section, or to None if the run has no studies for it. Every conclusion in
words is chosen by the numbers and their intervals.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from coconut.analysis.verdict import of_all_questions
from coconut.methods import Source
from coconut.reporting import charts
from coconut.reporting.measurements import geometry, influence, noise, readout, rollouts, shortcuts
from coconut.reporting.page import (
    Aside,
    Code,
    Drawings,
    Heading,
    Lead,
    Legend,
    Part,
    Ranked,
    Section,
    Table,
    Text,
    figures,
)
from coconut.reporting.phrases import between, counted, percent, signed, whole_percent
from coconut.reporting.plots import GRAPH_LEGEND
from coconut.runs.record import DASH, RunRecord
from coconut.runs.study import Study
from coconut.tasks import prosqa
from coconut.utils.console import listed

MIN_NODE_SHARE = 0.05  # a warning is given if all nodes together have a smaller mean probability
PATHS = ("correct_path", "longer_path", "wrong_target", "hallucination")
OF_STUDY = {"prefix_values": charts.prefix_values, "parallelism": charts.parallelism,
            "inner_products": charts.inner_products, "audit_edges": charts.edges,
            "shortcuts": shortcuts.chart}  # fmt: skip
Row = dict[str, Any]


def how_many(run: RunRecord) -> Section | None:
    """Accuracy with other numbers of thoughts, what each thought adds, and a classifier that decides when to stop."""
    source = run.reasoning.slot.source
    noun = source.value
    title = f"How many {noun}s"
    if not run.studies and run.best and source is Source.thought:
        text = Text("The thoughts have not been analyzed yet. This command analyzes them:")
        return Section("how-many", title, [text, Code(f"coconut analyze run={shlex.quote(str(run.folder))}")])
    parts = _texts(run.study_note, run.decided_note)
    if study := run.studies.get("k_forcing"):
        parts += _texts(" ".join(describe_k_forcing(study, noun, run.chance_accuracy)), study.facts["warning"])
        caption = (
            f"Accuracy on the same questions with each number of {noun}s. The wide bars are 95 % confidence "
            "intervals; “clearly” means that two of them do not overlap."
        )
        if any(row["correct_path"] is not None for row in study.rows):
            caption += (
                f" Below: the outcomes. A path written after {noun}s may begin at any node that the root reaches; it "
                "is completed by a shortest path from the root. A correct path is a shortest path to the right answer, "
                "a longer path leads there with more edges, one with the wrong target ends elsewhere. A hallucination "
                "has an edge that is not in the graph, or a gap. Answers without a path have a correct or an incorrect "
                "label."
            )
        rows = [
            [str(row["thoughts"]), percent(row["accuracy"]), between(row["low"], row["high"]),
             f"{row['new_tokens']:.1f}"] for row in study.rows
        ]  # fmt: skip
        table = Table([f"{noun}s", "accuracy", "95 % interval", "text tokens"], rows, 3)
        alt = f"Accuracy for each number of {noun}s; the numbers are in the table below."
        parts += [*figures(drawings(run), "k_forcing", alt, caption), Aside("The numbers", [table])]
    if study := run.studies.get("prefix_values"):
        parts += [Heading("What each thought adds"), *_prefix_values(run, study)]
    if study := run.studies.get("stopping"):
        parts += [Heading("When to stop"), *_stopping(study)]
    return Section("how-many", title, parts) if parts else None


def describe_k_forcing(study: Study, noun: str = "thought", chance_accuracy: float | None = None) -> list[str]:
    """Describe in sentences how the accuracy depends on the number of thoughts."""
    trained = next(row for row in study.rows if row["thoughts"] == study.facts["trained_thoughts"])
    others = [row for row in study.rows if row is not trained]

    def with_numbers(rows: list[Row]) -> str:
        return listed(f"{_count(row['thoughts'], noun)} ({percent(row['accuracy'])})" for row in rows)

    sentences = [
        f"With {counted(trained['thoughts'], noun)}, as trained, the model is right on "
        f"{percent(trained['accuracy'])} of {trained['questions']:,} questions."
    ]
    better = [row for row in others if row["low"] > trained["high"]]
    worse = [row for row in others if row["high"] < trained["low"]]
    similar = [row for row in others if row not in better and row not in worse]
    if chance_accuracy is not None and trained["low"] <= chance_accuracy:
        sentences.append(f"That is not clearly above chance ({percent(chance_accuracy)}), so the rest means little.")
    elif others and not any(row["accuracy"] > trained["accuracy"] for row in others):
        sentences.append("No other number does better.")
    for rows, words in ((better, "Clearly better"), (worse, "Clearly worse"), (similar, "No clear difference")):
        if rows:
            sentences.append(f"{words}: {with_numbers(rows)}.")
    paths = [(row, sum(row[name] or 0 for name in PATHS)) for row in study.rows]
    written = [(row, count) for row, count in paths if count and row["thoughts"] < trained["thoughts"]]
    if written:
        shown = written if len(written) <= 4 else [written[0], written[-1]]
        shares = listed(f"{percent(row['hallucination'] / n)} with {_count(row['thoughts'], noun)}" for row, n in shown)
        sentences.append(f"Hallucinations among the paths written with fewer {noun}s: {shares}.")
    return sentences


def _prefix_values(run: RunRecord, study: Study) -> list[Part]:
    caption = (
        "The mean natural logarithm of the probability that the right answer follows directly after each number of "
        "thoughts. With fewer thoughts than trained the model may be about to write steps instead. A second line has "
        "the probability of the answer given the answer mark. The wide bars are 95 % confidence intervals over the "
        "questions."
    )
    rows = [
        [label, str(row["thoughts"]), signed(row["value"]), _range(row["low"], row["high"]),
         *([DASH, DASH] if row["gain"] is None else [signed(row["gain"]), _range(row["gain_low"], row["gain_high"])])]
        for of, (_, label) in charts.PREFIXES.items() for row in of_all_questions(study, of)
    ]  # fmt: skip
    table = Table(["the right answer", "thoughts", "prefix value", "95 % interval", "added", "95 % interval"], rows, 4)
    alt = "Log-probability of the right answer for each number of thoughts; the numbers are in the table below."
    figure = figures(drawings(run), "prefix_values", alt, caption)
    texts = _texts(" ".join(describe_prefix_values(study)), study.facts["warning"])
    return [*texts, *figure, Aside("The numbers", [table])]


def describe_prefix_values(study: Study) -> list[str]:
    """Describe in sentences what each thought adds to the log-probability of the right answer."""
    whole, after_mark = of_all_questions(study, "answer"), of_all_questions(study, "after_mark")
    sentences = [
        "The prefix value is the log-probability of the right answer after the first thoughts. On average it is "
        f"{signed(whole[0]['value'])} without thoughts and {signed(whole[-1]['value'])} with "
        f"{counted(whole[-1]['thoughts'], 'thought')}; {signed(after_mark[0]['value'])} and "
        f"{signed(after_mark[-1]['value'])} given the answer mark."
    ]
    for rows, words in ((whole, "The whole answer"), (after_mark, "The text after the answer mark")):
        kinds: dict[str, list[str]] = {"made likelier": [], "made less likely": [], "not clearly changed": []}
        for row in rows[1:]:
            kind = "made likelier" if row["gain_low"] > 0 else "made less likely"
            if row["gain_low"] <= 0 <= row["gain_high"]:
                kind = "not clearly changed"
            kinds[kind].append(f"thought {row['thoughts']} ({signed(row['gain'])})")
        changes = "; ".join(f"{kind} by {listed(thoughts)}" for kind, thoughts in kinds.items() if thoughts)
        sentences.append(f"{words} is {changes}.")
    sentences.append(
        "This is not an implicit reward: a deterministic thought has no probability, and there is no reference model. "
        "It measures the model's confidence in an answer that must be known."
    )
    return sentences


def _stopping(study: Study) -> list[Part]:
    facts = study.facts
    if facts.get("reason"):
        return [Text(f"A stop classifier was not measured: {facts['reason']}")]
    by_rule = {row["rule"]: row for row in study.rows}
    constant, chosen = by_rule["constant"], by_rule["classifier"]
    text = (
        f"A small classifier, trained on the thoughts of {facts['trained_on']:,} questions, decides after each "
        f"thought whether to stop. It stops after {chosen['thoughts']:.2f} thoughts on average, and then "
        f"{percent(chosen['accuracy'])} of the answers are right. With {counted(constant['thoughts'], 'thought')} for "
        f"every question {percent(constant['accuracy'])} are right. On validation data "
        f"{percent(facts['classifier_accuracy'])} of its decisions are right; a rule that sees only the position "
        f"of the thought reaches {percent(facts['by_place_alone'])}."
    )
    names = {"constant": "constant number", "classifier": "stop classifier"}
    rows = [
        [names[row["rule"]], f"{row['thoughts']:.2f}", percent(row["accuracy"]), between(row["low"], row["high"])]
        for row in study.rows
    ]
    return [Text(text), Table(["rule", "thoughts", "accuracy", "95 % interval"], rows, 3)]


# Content of the thoughts.


@dataclass(frozen=True)
class ShownQuestion:
    """A question with its index in the test file, and its rows of the study `values`; chosen out of `count`."""

    index: int
    count: int
    question: str
    answer: str
    values: Study


def sample(run: RunRecord) -> ShownQuestion | None:
    """Choose the question for the search tree; None if no question is suitable.

    It is answered correctly, its path has two edges or more, and its graph can be drawn. Among these it has the most
    forks, and is the first of them. A fork is a number of thoughts after which one node ahead leads to the target and
    another does not. Questions whose thoughts were decoded are preferred.
    """
    study, questions = run.studies.get("values"), _questions(run)
    if not study:
        return None
    rows_of: dict[int, list[Row]] = defaultdict(list)
    for row in study.rows:
        rows_of[row["question"]].append(row)
    decoded = {row["question"] for row in run.studies["decoded"].rows} if "decoded" in run.studies else set()
    for pool in (decoded & rows_of.keys(), rows_of.keys()):
        if suitable := [i for i in sorted(pool) if i in questions and _may_be_shown(questions[i], rows_of[i])]:
            index = max(suitable, key=lambda i: _forks(rows_of[i]))
            question, values = questions[index], Study("values", rows_of[index], study.facts)
            return ShownQuestion(index, len(pool), question["text"], question["gold"], values)
    return None


def _questions(run: RunRecord) -> dict[int, Row]:
    """The questions of the studies, and the model's answers, by their index in the data file."""
    study = run.studies.get("asked")
    return {row["question"]: row for row in study.rows} if study else {}


def _may_be_shown(asked: Row, rows: list[Row]) -> bool:
    if not asked["correct"] or not charts.drawable(asked["text"]):
        return False
    target = prosqa.read_target(asked["gold"])
    return any(row["node"] == target and (row["distance"] or 0) >= 2 for row in rows)


def _forks(rows: list[Row]) -> int:
    moments = {(row["after"], row["leads"]) for row in rows if row["ahead"]}
    return sum(leads and (after, False) in moments for after, leads in moments)


def what_they_hold(run: RunRecord) -> Section | None:
    """The search tree, the logit lens, and other probes of the thoughts."""
    drawn, chosen = drawings(run), sample(run)
    parts: list[Part] = []
    if chosen:
        parts += _tree(drawn, chosen)
    parts += _decoded(run, chosen)
    if "parallelism" in drawn:
        parts += [Heading("How many paths at once"), *_parallelism(run, drawn)]
    if "heights_shortest" in drawn:
        parts += [Heading("Which nodes it prefers"), *_heights(run, drawn)]
    if drawn.keys() & {"search_tree", "parallelism", "heights_shortest"}:
        intro = (
            "A thought is a vector and not text. But after any thought the model can be made to write the next step. "
            "The probabilities of the nodes that this step would name show which paths it considers, and which of them "
            "it prefers."
        )
        parts = [Text(intro), *_node_warnings(run.studies["values"]), *parts]
    if "inner_products" in drawn:
        parts += [Heading("Where the thoughts point"), *_inner_products(run, drawn)]
    slot = run.reasoning.slot
    noun = "thought" if slot.is_empty else slot.noun
    if study := run.studies.get("rollouts"):
        parts += [Heading("How varied the sampled answers are"), *rollouts.parts(study, drawn, noun)]
    if study := run.studies.get("readout"):
        parts += [Heading("What can be read out"), *readout.parts(study, drawn, noun)]
    if study := run.studies.get("geometry"):
        parts += [Heading(f"Where the {noun}s lie"), *geometry.parts(study, drawn, noun)]
    title = "Sampled answers" if slot.is_empty else "What the thoughts hold"
    return Section("what-they-hold", title, parts) if parts else None


def _node_warnings(values: Study) -> list[Part]:
    """Warnings that stand before the probabilities of nodes."""
    warnings = [values.facts["warning"]] if values.facts["warning"] else []
    questions_ahead: dict[int, set[int]] = defaultdict(set)  # by the number of thoughts
    for row in values.rows:
        if row["ahead"]:
            questions_ahead[row["after"]].add(row["question"])
    low = []
    for after, questions in sorted(questions_ahead.items()):
        rows = [row for row in values.rows if row["after"] == after and row["question"] in questions]
        mean = sum(row["value"] for row in rows) / len(questions)
        if mean < MIN_NODE_SHARE:
            low.append(f"{whole_percent(mean)} {_moment(after)}")
    if low:
        shares = listed(low)
        warnings.append(
            f"The model rarely names a node as the next step: all nodes together have {shares}. There the "
            "probabilities of single nodes mean little."
        )
    return _texts(" ".join(warnings))


def _tree(drawn: Drawings, chosen: ShownQuestion) -> list[Part]:
    parsed, rows = prosqa.parse_question(chosen.question), chosen.values.rows
    target = prosqa.read_target(chosen.answer)
    text = (
        f"From {parsed.root}, is {parsed.options[0]} or {parsed.options[1]} reachable? The model answered correctly: "
        f"{target}. This is question {chosen.index + 1} of the test file, chosen from {chosen.count:,}. Of those "
        "answered correctly whose path has two edges or more it has the most forks. A fork is a step at which one "
        "possible node leads to the target and another does not."
    )
    shares = []
    for after in sorted({row["after"] for row in rows if row["ahead"]}):
        leading = [row["value"] for row in rows if row["after"] == after and row["ahead"] and row["leads"]]
        shares.append(f"{whole_percent(sum(leading))} {_moment(after)}")
    caption = (
        "Each column is one edge farther from the root. Its head shows after how many thoughts the model was made to "
        "name the next node. The more amber, the likelier the node. “Elsewhere” is the probability of nodes in other "
        f"columns. Here the nodes from which {target} can be reached have {listed(shares)}."
    )
    legend = Legend([*GRAPH_LEGEND, ("amber", "probability as the next step")])
    figure = figures(drawn, "search_tree", "The graph of the question, each node with its probability.", caption)
    return [Heading("One question, thought by thought"), Text(text), legend, *figure]


def _decoded(run: RunRecord, chosen: ShownQuestion | None) -> list[Part]:
    study, questions = run.studies.get("decoded"), _questions(run)
    if not study or not study.rows:
        return []
    index = chosen.index if chosen else study.rows[0]["question"]
    rows = [row for row in study.rows if row["question"] == index]
    if not rows or index not in questions:
        return []
    words: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["thought"], row["rank"])):
        if row["rank"] == 1 or row["probability"] >= 0.0005:
            words[f"thought {row['thought']}"].append((row["token"], row["probability"]))
    of = "this question" if chosen else f"the question “{questions[index]['text'].strip()}”"
    text = (
        f"Logit lens: the output layer of the model applied to each thought of {of}, with the likeliest tokens. "
        "Training does not ask for readable thoughts, so this is only a hint."
    )
    if study.facts.get("read") == "states before":
        text = (
            f"What the model says in the place of each thought of {of}: the likeliest words of the group that the "
            "thought merges, read from the state before it. Training asks for these words."
        )
    if chosen and chosen.values.facts["form"] == "symbols":
        text += _names_at_distance([tokens[0][0].strip() for tokens in words.values()], chosen)
    return [Heading("The thoughts read with the output layer"), Text(text), Ranked(list(words.items()))]


def _names_at_distance(likeliest: list[str], chosen: ShownQuestion) -> str:
    """A sentence about how many thoughts read as a node at the distance that the thought corresponds to.

    `likeliest`: the likeliest token of each thought.
    """
    distance = {row["node"]: row["distance"] for row in chosen.values.rows}
    farthest, step = max(filter(None, distance.values())), chosen.values.facts["thoughts_per_step"]
    hits = [distance.get(word) == 1 + i // step for i, word in enumerate(likeliest[: farthest * step])]
    total = counted(len(hits), "thought")
    return f" Here the likeliest token is a node at the corresponding distance for {sum(hits)} of {total}."


def _parallelism(run: RunRecord, drawn: Drawings) -> list[Part]:
    rows = run.studies["parallelism"].rows
    numbers = charts.moments(run.studies["parallelism"])
    halves = []
    for after in numbers:
        middle = min((row for row in rows if row["after"] == after), key=lambda row: abs(row["percentile"] - 50))
        halves.append(f"{whole_percent(middle['top1'])} {_moment(after)}")
    caption = (
        "Percentiles over the questions. The dark area is the probability of the likeliest of the nodes that the next "
        "step can name; the lighter areas add the second and the third. Where they are wide, the model keeps several "
        "paths open. In half of the questions with a next step the likeliest node has at least "
        f"{listed(halves)}."
    )
    if single := _one_node_ahead(run, numbers):
        caption += f" Only one node is possible, so that there is no choice, in {listed(single)}."
    return figures(drawn, "parallelism", "Cumulated probabilities of the likeliest nodes over the questions.", caption)


def _one_node_ahead(run: RunRecord, numbers: list[int]) -> list[str]:
    """For each number of thoughts, a phrase with the share of questions that have only one node ahead."""
    if "values" not in run.studies:
        return []
    phrases, ahead = [], [row for row in run.studies["values"].rows if row["ahead"]]
    for after in numbers:
        if nodes := Counter(row["question"] for row in ahead if row["after"] == after):
            phrases.append(f"{percent(list(nodes.values()).count(1) / len(nodes))} {_moment(after)}")
    return phrases


def _heights(run: RunRecord, drawn: Drawings) -> list[Part]:
    rows = [row for row in run.studies["heights"].rows if row["kind"] == "shortest"]
    against = []
    for after in sorted({row["after"] for row in rows}):
        means = []
        for leads in (True, False):
            group = [row for row in rows if row["after"] == after and row["leads"] is leads]
            if count := sum(row["count"] for row in group):
                means.append(whole_percent(sum(row["mean"] * row["count"] for row in group) / count))
        if len(means) == 2:
            against.append(f"{means[0]} against {means[1]} {_moment(after)}")
    caption = (
        "The height of a node is the number of edges to the nearest leaf. A leaf has height 0; the higher a node, the "
        "more steps it takes to see whether it leads to the target. Points are mean probabilities of the nodes that "
        "the next step can name, with standard errors; they are hollow for fewer than "
        f"{charts.HOLLOW_BELOW} nodes. "
    )
    if against:
        caption += f"Here a node that leads to the target has {listed(against)} for one that does not."
    alt = "Mean probability of nodes by their height."
    other = "The same, with the number of edges to the farthest leaf as height."
    farthest = Aside("By the farthest leaf", figures(drawn, "heights_longest", alt, other))
    return [*figures(drawn, "heights_shortest", alt, caption), farthest]


def _inner_products(run: RunRecord, drawn: Drawings) -> list[Part]:
    rows = run.studies["inner_products"].rows
    means: dict[int, dict[str, float]] = defaultdict(dict)  # of the groups, by thought
    for row in rows:
        means[row["thought"]][row["group"]] = row["mean"]
    first = [mean for mean in means.values() if mean.get("optimal") == max(mean.values())]
    last = max(means)
    groups = [(phrase, means[last][group]) for group, (*_, phrase) in charts.GROUPS.items() if group in means[last]]
    values = listed(f"{mean:z.1f} for nodes {phrase}" for phrase, mean in groups)
    caption = (
        "Inner products of a thought with the input embeddings of the nodes' names. The groups are relative to the "
        "distance from the root that the thought corresponds to. The bars reach one standard deviation to each side. "
        f"Here nodes on a shortest path have the highest mean in {len(first)} of "
        f"{counted(len(means), 'thought')}; thought {last} has {values} on average."
    )
    return figures(drawn, "inner_products", "Inner products of thoughts with four groups of nodes.", caption)


# Interventions.


def are_they_used(run: RunRecord) -> Section | None:
    """How answers change under interventions on the thoughts and on the graph."""
    drawn = drawings(run)
    thoughts, graph = run.studies.get("audit_thoughts"), run.studies.get("audit_edges")
    parts: list[Part] = []
    numbers = "The numbers, with 95 % confidence intervals"
    if thoughts:
        caption = (
            "Each row is one intervention on the thoughts; the question stays the same. The blue line is the accuracy "
            "as trained; the bars are 95 % confidence intervals. If neither accuracy nor answers change, the answer "
            "does not depend on what was replaced. A single replaced thought keeps its effect on later thoughts."
        )
        figure = figures(drawn, "audit_thoughts", "Accuracy and changed answers, as in the table below.", caption)
        columns = ["the thoughts", "accuracy", "difference", "answers changed"]
        table = Table(columns, [_changed_thoughts(row) for row in thoughts.rows], 3)
        parts += [Lead(thoughts.facts["verdict"]), *figure, Aside(numbers, [table])]
    if study := run.studies.get("influence"):
        parts += [Heading("What acts on what"), *influence.parts(study, drawn)]
    if study := run.studies.get("noise"):
        parts += [Heading("How much noise they bear"), *noise.parts(study, drawn)]
    if graph:
        caption = (
            "Each row changes one edge in questions that were answered correctly, or the thoughts with it. Left: the "
            "share of answers that become the right answer of the changed graph. Right: the share that change at all."
        )
        figure = figures(drawn, "audit_edges", "Answers that follow or change, as in the table below.", caption)
        if thoughts:
            parts.append(Heading("Where the answer comes from"))
        parts += [Lead(graph.facts["verdict"]), *figure]
        if graph.rows:
            columns = ["the change", "questions", "answers that follow", "answers changed"]
            parts.append(Aside(numbers, [Table(columns, [_changed_edges(row) for row in graph.rows], 3)]))
    title = "Are the thoughts used?" if thoughts else "Where the answer comes from"
    return Section("are-they-used", title, parts) if parts else None


def _changed_thoughts(row: Row) -> list[str]:
    accuracy = f"{percent(row['accuracy'])} ({between(row['low'], row['high'])})"
    if row["change"] == "none":
        return [row["label"], accuracy, DASH, DASH]
    points, low, high = (signed(100 * row[f"difference{end}"], 1) for end in ("", "_low", "_high"))
    return [row["label"], accuracy, f"{points} ({low} to {high})", _share(row, "changed")]


def _changed_edges(row: Row) -> list[str]:
    return [row["label"], f"{row['questions']:,}", _share(row, "followed"), _share(row, "changed")]


# Shortcuts.


def relies_on_shortcuts(run: RunRecord) -> Section | None:
    """Accuracy on changed and on harder questions, and where shallow rules are wrong."""
    if study := run.studies.get("shortcuts"):
        return Section("shortcuts", "Does it rely on shortcuts?", shortcuts.parts(study, drawings(run)))
    return None


# The charts.


def drawings(run: RunRecord) -> Drawings:
    """The charts of a run, by name. Each is a function of the width in points."""
    studies = {name: study for name, study in run.studies.items() if study.rows}
    by_name: Drawings = {name: partial(draw, studies[name]) for name, draw in OF_STUDY.items() if name in studies}
    if study := studies.get("k_forcing"):
        noun = run.reasoning.slot.noun
        by_name["k_forcing"] = partial(charts.k_forcing, study, chance_accuracy=run.chance_accuracy, noun=noun)
    if study := studies.get("influence"):
        by_name |= {f"influence_{of}": partial(influence.chart, study, of=of) for of in study.facts["units"]}
    if study := studies.get("layers"):
        by_name["layers"] = partial(geometry.chart, study, noun=run.reasoning.slot.noun)
    if (study := studies.get("rollouts")) and study.facts["trained_thoughts"]:
        by_name["rollouts"] = partial(rollouts.chart, study, noun=run.reasoning.slot.noun)
    if study := studies.get("readout"):
        by_name["readout"] = partial(readout.chart, study, noun=run.reasoning.slot.noun)
    if study := studies.get("readout_layers"):
        by_name["readout_layers"] = partial(readout.layers_chart, study, noun=run.reasoning.slot.noun)
    if study := studies.get("noise"):
        by_name["noise"] = partial(noise.chart, study, chance_accuracy=run.chance_accuracy)
    if chosen := sample(run):
        by_name["search_tree"] = partial(charts.search_tree, chosen.question, chosen.answer, chosen.values)
    if study := studies.get("heights"):
        for kind in ("shortest", "longest"):
            by_name[f"heights_{kind}"] = partial(charts.heights, study, kind=kind)
    if study := studies.get("audit_thoughts"):
        rows = [row for row in study.rows if not row["change"].startswith("count_") or "k_forcing" not in studies]
        by_name["audit_thoughts"] = partial(charts.audit, replace(study, rows=rows))
    return by_name


# Phrases and numbers.


def _texts(*texts: str | None) -> list[Part]:
    return [Text(text) for text in texts if text]


def _count(count: int, noun: str) -> str:
    return counted(count, noun) if count else f"no {noun}s"


def _moment(after: int) -> str:
    return f"after {counted(after, 'thought')}" if after else "before any thought"


def _range(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"


def _share(row: Row, name: str) -> str:
    if row[name] is None:
        return DASH
    return f"{percent(row[name])} ({between(row[f'{name}_low'], row[f'{name}_high'])})"
