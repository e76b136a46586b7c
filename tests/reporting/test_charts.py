"""Charts of studies, and the sections that describe them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx
import pytest
from helpers.runs import graph_rows
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from coconut.methods import Curriculum, plan
from coconut.reporting import charts
from coconut.reporting.page import Aside, Code, Lead, Ranked, Section, Table, Text
from coconut.reporting.page import Figure as Shown
from coconut.reporting.phrases import typeset, whole_percent
from coconut.reporting.plots import as_svg, graph_picture
from coconut.reporting.run_page import report
from coconut.reporting.sections import are_they_used, describe_k_forcing, drawings, how_many, sample, what_they_hold
from coconut.runs.record import RunRecord, read_run
from coconut.runs.study import Study
from coconut.tasks import prosqa
from coconut.utils.files import write_json
from data_builders.prosqa import Form, Preset, ProsqaBuild, draw_row

OWN = 3
WIDTHS = (720, 350)


@cache
def sentences(nodes: int) -> dict[str, Any]:
    """A question in sentences whose graph has this many nodes."""
    dials = ProsqaBuild(preset=Preset.released).graph_dials()
    for number in range(1000):
        found = draw_row(random.Random(number), lambda key: True, dials, Form.sentences)
        if found and len(prosqa.graph(found[0]["question"])) == nodes:
            return found[0]
    raise AssertionError(f"no graph of {nodes} nodes among the first 1,000")


def values_of(rows: list[dict[str, Any]], offset: int = 1) -> Study:
    """Invented values, larger for what leads to the target."""
    draw, found = random.Random(0), []
    for number, row in enumerate(rows):
        told, target = prosqa.graph(row["question"]), prosqa.read_target(row["answer"])
        distance = networkx.single_source_shortest_path_length(told, told.graph["root"])
        leading = networkx.ancestors(told, target) | {target}
        for after in range(1 - offset, OWN + 1):
            ahead = [n for n in told if distance.get(n) == after + offset and after < distance[target]]
            weight = {n: (3 if n in leading else 1) * draw.random() if n in ahead else 0.01 for n in told}
            total = 1.05 * sum(weight.values())
            for node in told:
                found.append({
                    "question": number, "after": after, "node": node, "distance": distance.get(node),
                    "ahead": node in ahead, "height_shortest": draw.randrange(3), "height_longest": draw.randrange(4),
                    "leads": node in leading, "value": weight[node] / total,
                })  # fmt: skip
    return Study(
        "values", found, FACTS | {"form": "symbols", "offset": offset, "thoughts_per_step": 1, "warning": None}
    )


FACTS = {"step": 8, "sha256": "0123", "questions": 8, "file": "data/test.json"}  # of every study


def changed(change: str, label: str, accuracy: float, share: float) -> dict[str, Any]:
    return {"change": change, "label": label, "questions": 40, "accuracy": accuracy, "low": accuracy - 0.05,
            "high": accuracy + 0.02, "difference": accuracy - 0.9, "difference_low": accuracy - 0.95,
            "difference_high": accuracy - 0.85, "changed": share, "changed_low": share / 2,
            "changed_high": share + 0.1}  # fmt: skip


def forced(thoughts: int, right: int, **counts: int) -> dict[str, Any]:
    none = dict.fromkeys(charts.OUTCOMES, 0 if counts else None)
    return {"thoughts": thoughts, "questions": 100, "accuracy": right / 100, "low": right / 100 - 0.03,
            "high": right / 100 + 0.02, "new_tokens": 5.0 - thoughts, **none, **counts}  # fmt: skip


K_FORCING = Study(
    "k_forcing",
    [
        forced(0, 70, correct_path=70, wrong_target=10, hallucination=20),
        forced(1, 80, correct_path=40, longer_path=5, correct_label=35, hallucination=5, incorrect_label=15),
        forced(2, 94, correct_label=94, incorrect_label=6),
        forced(3, 95, correct_label=95, incorrect_label=5),
        forced(4, 96, correct_label=96, incorrect_label=4),
    ],
    {"trained_thoughts": OWN, "warning": None} | FACTS,
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return graph_rows(seed=0, count=8, nodes=10)


@pytest.fixture(scope="module")
def run(rows: list[dict[str, Any]]) -> RunRecord:
    """A run with every study."""
    draw = random.Random(1)
    decoded = [
        {"question": q, "thought": t, "rank": rank, "token": str(draw.randrange(10)), "probability": 0.6 / rank**2}
        for q in range(6) for t in range(1, OWN + 1) for rank in range(1, 6)
    ]  # fmt: skip
    heights = [
        {"after": a, "kind": kind, "height": h, "leads": leads, "mean": 0.8 if leads else 0.1,
         "se": 0.3 if h else None, "count": 20 - 8 * h}
        for a in range(OWN) for kind in ("shortest", "longest") for h in range(3) for leads in (True, False)
    ]  # fmt: skip
    products = [
        {"thought": t, "group": group, "mean": 8.0 - 3 * i, "sd": 2.0, "count": 30}
        for t in range(1, OWN + 1) for i, group in enumerate(charts.GROUPS)
    ]  # fmt: skip
    parallel = [
        {"after": a, "percentile": p, "top1": 0.5 + p / 250, "top2": 0.6 + p / 300, "top3": 0.7 + p / 350}
        for a in range(OWN) for p in range(101)
    ]  # fmt: skip
    prefixes = [
        {"of": of, "steps": steps, "thoughts": k, "questions": 20, "value": 2.0 * (k - OWN) - 0.1,
         "low": 2.0 * (k - OWN) - 0.5, "high": 2.0 * (k - OWN) - 0.02, "gain": 2.0 if k else None,
         "gain_low": (1.5 if k == 1 else -0.5) if k else None, "gain_high": 2.5 if k else None}
        for of in charts.PREFIXES for steps in (None, *range(1, 8)) for k in range(OWN + 1)
    ]  # fmt: skip
    edges = [
        {"change": "redirected", "label": "an edge turned towards the other option", "questions": 30, "followed": 0.9,
         "followed_low": 0.8, "followed_high": 0.95, "changed": 0.9, "changed_low": 0.8, "changed_high": 0.95},
        {"change": "removed", "label": "an edge removed that every way to the answer takes", "questions": 30,
         "followed": None, "followed_low": None, "followed_high": None, "changed": 0.5, "changed_low": 0.4,
         "changed_high": 0.6},
    ]  # fmt: skip
    thoughts = [
        changed("none", "as trained", 0.9, 0.0),
        changed("zeros", "thoughts replaced by zeros", 0.5, 0.5),
        changed("noise", "thoughts replaced by noise of the same length", 0.52, 0.48),
        changed("count_0", "no thoughts", 0.7, 0.2),
    ]
    stopping = [
        {"rule": rule, "thoughts": mean, "questions": 40, "accuracy": share, "low": share - 0.1, "high": share + 0.05}
        for rule, mean, share in (("constant", 3.0, 0.9), ("classifier", 2.25, 0.875))
    ]
    asked = [
        {"question": number, "text": row["question"], "gold": row["answer"], "predicted": row["answer"],
         "correct": number != 1}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    studies = [
        Study("asked", asked),
        K_FORCING,
        Study("prefix_values", prefixes, {"trained_thoughts": OWN, "warning": None}),
        values_of(rows),
        Study("parallelism", parallel),
        Study("heights", heights),
        Study("inner_products", products),
        Study("decoded", decoded),
        Study(
            "audit_thoughts", thoughts, {"chance_accuracy": 0.5, "verdict": ["The thoughts are used.", "A second one."]}
        ),
        Study("audit_edges", edges, {"chance_accuracy": 0.5, "verdict": ["The answer follows the graph."]}),
        Study("stopping", stopping, {"classifier_accuracy": 0.93, "by_place_alone": 0.75, "trained_on": 1000}),
    ]
    stage = asdict(plan("coconut", Curriculum(thoughts_per_step=1, max_stage=OWN)).stages[OWN]) | {"index": 3}
    return RunRecord(
        folder=Path("runs/mine"),
        config={"method": "coconut"},
        description={"name": "mine", "plan": {"unit": "updates", "stages": [stage]}},
        train=[],
        valid=[{"stage": 3, "accuracy": 0.9, "loss": 0.1, "step": 8}],
        evaluations={"test": {"chance_accuracy": 0.5, "step": 8, "sha256": "0123", "count": 8}},
        test="test",
        studies={study.name: replace(study, facts=study.facts | FACTS) for study in studies},
    )


def tree_of(row: dict[str, Any], width: float, offset: int = 1) -> Figure:
    return charts.search_tree(row["question"], row["answer"], values_of([row], offset), width)


def texts(figure: Figure) -> list[str]:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return found + [text.get_text() for text in figure.texts]


CHARTS = ("k_forcing", "prefix_values", "search_tree", "parallelism", "heights_shortest", "heights_longest",
          "inner_products", "audit_thoughts", "audit_edges")  # fmt: skip


def test_every_study_has_a_chart(run: RunRecord):
    assert drawings(run).keys() == set(CHARTS)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_stays_within_its_width_and_the_colours_of_the_page(run: RunRecord, name: str, width: float):
    figure = drawings(run)[name](width)
    box = figure.get_tightbbox()
    high = 72 * figure.get_figheight()
    assert 72 * figure.get_figwidth() == pytest.approx(width)
    assert 72 * min(box.x0, box.y0) > -3
    assert 72 * box.x1 < width + 3
    assert 72 * box.y1 < high + 3
    svg = as_svg(figure, "f")
    ElementTree.fromstring(svg)
    assert not re.search("#[0-9a-f]{6}", svg)
    assert "var(--" in svg


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("nodes", [24, 27])
def test_the_boxes_of_a_search_tree_hold_their_words_and_keep_apart(nodes: int, width: float):
    row = sentences(nodes)
    assert charts.drawable(row["question"])
    figure = tree_of(row, width, offset=0)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [
        patch.get_bbox() for patch in axes.patches if isinstance(patch, FancyBboxPatch) and patch.get_zorder() == 2
    ]
    shown = charts.shown_graph(row["question"])
    assert len(boxes) == len(shown)
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    by_name = {text.get_text(): text for text in axes.texts}
    for name in shown:
        extent = by_name[name].get_window_extent().transformed(axes.transData.inverted())
        assert any(b.x0 <= extent.x0 and extent.x1 <= b.x1 for b in boxes if b.contains(extent.x0, b.y0 + 1)), name


def test_search_tree_shows_numbers_of_thoughts_and_probabilities():
    question = "0 1 | 0 2 | 1 3 | 2 4 | 7 5 | 3 9 ? 3 or 5 from 0"
    ahead = {(0, "1"): 0.7, (0, "2"): 0.2, (1, "3"): 0.996, (1, "4"): 0.001}
    distance = {"0": 0, "1": 1, "2": 1, "3": 2, "4": 2, "9": 3}
    found = [
        {"after": after, "node": node, "distance": distance.get(node), "ahead": (after, node) in ahead,
         "leads": node in "013", "value": ahead.get((after, node), 0.01 if (after, node) == (0, "5") else 0.0)}
        for after in range(3) for node in "01234579"
    ]  # fmt: skip
    values = Study("values", found, {"form": "symbols", "offset": 1, "thoughts_per_step": 1})
    said = texts(charts.search_tree(question, "3", values, 720))
    assert [text for text in said if "%" in text and text[0] in "<>0123456789"] == ["70 %", "20 %", ">99 %", "<1 %"]
    assert said[:6] == ["start", "no thought yet", "elsewhere 1 %", "no node 9 %", "1 thought", "elsewhere 0 %"]
    assert "2 thoughts" not in said, "the target is reached by then"
    assert "not reachable from 0" in said
    twice = Study("values", [row | {"after": 2 * row["after"]} for row in found],
                  {"form": "symbols", "offset": 1, "thoughts_per_step": 2})  # fmt: skip
    assert "2 thoughts" in texts(charts.search_tree(question, "3", twice, 720))


@pytest.mark.parametrize(
    "question",
    [
        "0 1 | 1 2 | 3 4 | 4 5 ? 2 or 5 from 0",
        "0 1 | 1 0 | 3 4 | 4 3 ? 1 or 4 from 0",  # cycles on both sides
        "0 1 | 2 3 ? 3 or 1 from 0",  # an answer out of reach
        "0 0 | 0 1 ? 1 or 9 from 0",
    ],
)
def test_any_graph_is_drawn_as_a_picture_and_as_a_tree(question: str):
    answer = question.split("? ")[1][0]
    none = Study("values", [], {"form": "symbols", "offset": 1, "thoughts_per_step": 1})
    assert set(prosqa.graph(question)) <= set(texts(charts.search_tree(question, answer, none, 350)))
    svg = graph_picture(question, answer, "g")
    assert svg
    assert all(f"var(--{colour})" in svg for colour in ("blue", "green", "red"))


def test_too_large_graphs_are_not_drawn():
    wide = " | ".join(f"0 {i}" for i in range(1, 40)) + " ? 1 or 2 from 0"
    long = " | ".join(f"{i} {i + 1}" for i in range(12)) + " ? 1 or 2 from 0"
    for question in (wide, long, "How many?"):
        assert not charts.drawable(question)
    out_of_reach = wide.replace("0 ", "50 ") + " ? 1 or 2 from 50"
    far = "0 1 | " + " | ".join(f"60 {i}" for i in range(2, 40)) + " ? 1 or 5 from 0"
    assert not charts.drawable(out_of_reach)
    assert set(charts.shown_graph(far)) == {"0", "1", "5"}


def test_the_bars_of_k_forcing_add_up_to_all_answers():
    upper, lower = charts.k_forcing(K_FORCING, 720, chance_accuracy=0.5).axes
    tops: dict[float, float] = {}
    for bar in lower.patches[:-1]:  # the last is the band
        assert bar.get_y() == pytest.approx(tops.get(bar.get_x(), 0.0))  # pyright: ignore
        tops[bar.get_x()] = bar.get_y() + bar.get_height()  # pyright: ignore
    assert list(tops.values()) == pytest.approx([1.0] * 5)
    assert [text.get_text() for text in upper.texts if text.get_text()[0].isdigit()] == [
        "70.0",
        "80.0",
        "94.0",
        "95.0",
        "96.0",
    ]
    assert "chance, 50.0 %" in [text.get_text() for text in upper.texts]
    without = Study("k_forcing", [forced(0, 50), forced(1, 90)], {"trained_thoughts": 1})
    assert len(charts.k_forcing(without, 350).axes) == 1


def test_a_png_is_on_white_and_sharp(run: RunRecord, tmp_path: Path):
    from matplotlib.image import imread

    charts.save_png(drawings(run)["audit_edges"](720), tmp_path / "figures" / "edges.png")
    image = imread(tmp_path / "figures" / "edges.png")
    assert image.shape[1] == 2000
    assert image[0, 0, :3].tolist() == [1, 1, 1]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["edges.png"]


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "0 %"), (0.001, "<1 %"), (0.006, "1 %"), (0.5, "50 %"), (0.996, ">99 %"), (1.0, "100 %"), (-1e-9, "0 %")],
)
def test_a_probability_is_never_rounded_to_nothing_or_all(share: float, said: str):
    assert whole_percent(share) == said


def test_k_forcing_sentences_agree_with_the_intervals():
    told = " ".join(describe_k_forcing(K_FORCING))
    assert "With 3 thoughts, as trained, the model is right on 95.0 % of 100 questions." in told
    assert "No other number does better" not in told
    assert "Clearly better" not in told
    assert "Clearly worse: no thoughts (70.0 %) and 1 thought (80.0 %)." in told
    assert "No clear difference: 2 thoughts (94.0 %) and 4 thoughts (96.0 %)." in told
    assert told.endswith("written with fewer thoughts: 20.0 % with no thoughts and 10.0 % with 1 thought.")
    reverse = Study("k_forcing", K_FORCING.rows, {"trained_thoughts": 0})
    assert "Clearly better: 1 thought (80.0 %), 2 thoughts (94.0 %)" in " ".join(describe_k_forcing(reverse))
    plain = Study("k_forcing", [forced(0, 60), forced(1, 90)], {"trained_thoughts": 1})
    assert describe_k_forcing(plain, "pause")[1:] == [
        "No other number does better.",
        "Clearly worse: no pauses (60.0 %).",
    ]


def section(maker: Callable[[RunRecord], Section | None], run: RunRecord) -> Section:
    found = maker(run)
    assert found
    return found


def parts_of(found: Section, kind: type) -> list[Any]:
    inner = [part for outer in found.parts if isinstance(outer, Aside) for part in outer.parts]
    return [part for part in [*found.parts, *inner] if isinstance(part, kind)]


def test_the_sample_has_most_forks_of_the_questions_that_were_answered_rightly(run: RunRecord):
    def forks(number: int) -> int:
        rows = [row for row in run.studies["values"].rows if row["question"] == number and row["ahead"]]
        return sum(
            len({row["leads"] for row in rows if row["after"] == after}) == 2
            for after in {row["after"] for row in rows}
        )

    chosen = sample(run)
    assert chosen
    answers = run.studies["asked"].rows
    possible = [number for number in range(6) if answers[number]["correct"]]  # those decoded
    assert chosen.index == max(possible, key=forks)
    assert forks(chosen.index) > 0
    assert chosen.count == 6
    assert {row["question"] for row in chosen.values.rows} == {chosen.index}
    wrong = Study("asked", [answer | {"correct": answer["question"] != chosen.index} for answer in answers], FACTS)
    other = sample(replace(run, studies=run.studies | {"asked": wrong}))
    assert other
    assert other.index != chosen.index
    assert sample(replace(run, studies={})) is None


@pytest.mark.slow
def test_another_checkpoint_or_other_questions_are_said(run: RunRecord):
    assert run.study_note == ""
    for other in ({"step": 7}, {"sha256": "4567"}, {"count": 500}):
        found = replace(run, evaluations={"test": run.evaluations["test"] | other})
        first = section(how_many, found).parts[0]
        assert first == Text("The following was measured on update 8, with 8 questions of test.json.")
    assert section(how_many, replace(run, test=None)).parts[0] == first


def test_small_probabilities_of_all_nodes_give_a_warning(run: RunRecord):
    rows = [row | {"value": row["value"] / 100} for row in run.studies["values"].rows]
    facts = run.studies["values"].facts | {"warning": "Never trained so."}
    silent = replace(run, studies=run.studies | {"values": Study("values", rows, facts)})
    told = parts_of(section(what_they_hold, silent), Text)[1].text
    assert told.startswith(
        "Never trained so. The model rarely names a node as the next step: all nodes together have 1 % before"
    )


def test_accuracy_not_above_chance_is_named(run: RunRecord):
    rows = [row | {"accuracy": 0.52, "low": 0.48, "high": 0.56} for row in K_FORCING.rows]
    not_above_chance = replace(run, studies=run.studies | {"k_forcing": Study("k_forcing", rows, K_FORCING.facts)})
    told = parts_of(section(how_many, not_above_chance), Text)[0].text
    assert "That is not clearly above chance (50.0 %), so the rest means little." in told


def test_how_many_has_numbers_stopping_and_a_warning(run: RunRecord):
    found = section(how_many, run)
    told = " ".join(part.text for part in parts_of(found, Text))
    assert "Clearly worse" in told
    assert "It stops after 2.25 thoughts on average, and then 87.5 % of the answers are right." in told
    assert "93.0 % of its decisions are right; a rule that sees only the position of the thought reaches 75.0 %" in told
    _, forcing, prefixes = parts_of(found, Table)
    assert forcing.rows[2] == ["2", "94.0 %", "91.0 to 96.0", "3.0"]
    assert "On average it is −6.10 without thoughts and −0.10 with 3 thoughts" in told
    assert (
        "is made likelier by thought 1 (+2.00); not clearly changed by thought 2 (+2.00) and thought 3 (+2.00)." in told
    )
    assert "This is not an implicit reward" in told
    assert prefixes.rows[0] == ["whole answer", "0", "−6.10", "−6.50 to −6.02", "–", "–"]
    assert prefixes.rows[1][4:] == ["+2.00", "+1.50 to +2.50"]
    warned = Study("k_forcing", K_FORCING.rows, {**K_FORCING.facts, "warning": "Trained without mixing."})
    failed = Study("stopping", [], {"reason": "thinking always ends at the same thought."})
    found = section(how_many, replace(run, studies={"k_forcing": warned, "stopping": failed}))
    told = [part.text for part in parts_of(found, Text)]
    assert "Trained without mixing." in told
    assert told[-1].endswith("not measured: thinking always ends at the same thought.")


def test_a_section_without_studies_shows_the_command_or_is_left_out(run: RunRecord):
    bare = replace(run, studies={})
    assert parts_of(section(how_many, bare), Code)[0].text == "coconut analyze run=runs/mine"
    assert what_they_hold(bare) is None
    assert are_they_used(bare) is None
    assert how_many(replace(bare, valid=[])) is None, "not trained far enough"
    assert how_many(replace(run, studies={"decoded": run.studies["decoded"]})) is None
    html = report(bare, [how_many, what_they_hold, are_they_used])
    assert html.count("<section") == 1


@pytest.mark.slow
def test_what_they_hold_shows_the_tree_and_the_tokens_of_one_question(run: RunRecord):
    found, chosen = section(what_they_hold, run), sample(run)
    assert chosen
    assert len(parts_of(found, Shown)) == 5
    assert any(
        f"This is question {chosen.index + 1} of the test file, chosen from" in part.text
        for part in parts_of(found, Text)
    )
    (ranked,) = parts_of(found, Ranked)
    assert [name for name, _ in ranked.rows] == ["thought 1", "thought 2", "thought 3"]
    expected = [row for row in run.studies["decoded"].rows if (row["question"], row["thought"]) == (chosen.index, 2)]
    assert ranked.rows[1][1] == [(row["token"], row["probability"]) for row in expected]
    only = section(what_they_hold, replace(run, studies={name: run.studies[name] for name in ("decoded", "asked")}))
    assert run.studies["asked"].rows[0]["text"] in parts_of(only, Text)[0].text


def test_verdicts_precede_the_figures(run: RunRecord):
    found = section(are_they_used, run)
    assert found.title == "Are the thoughts used?"
    assert found.parts[0] == Lead(["The thoughts are used.", "A second one."])
    of_thoughts, of_edges = parts_of(found, Table)
    assert of_thoughts.rows[0] == ["as trained", "90.0 % (85.0 to 92.0)", "–", "–"]
    assert of_thoughts.rows[1][2:] == ["−40.0 (−45.0 to −35.0)", "50.0 % (25.0 to 60.0)"]
    assert [row[0] for row in of_thoughts.rows][-1] == "no thoughts"
    assert of_edges.rows[1][1:] == ["30", "–", "50.0 % (40.0 to 60.0)"]
    without = section(are_they_used, replace(run, studies={"audit_edges": run.studies["audit_edges"]}))
    assert without.title == "Where the answer comes from"
    none = Study("audit_edges", [], {"chance_accuracy": None, "verdict": ["It is not clear."]})
    assert section(are_they_used, replace(run, studies={"audit_edges": none})).parts == [Lead(["It is not clear."])]


@pytest.mark.slow
def test_the_page_has_every_section_and_escapes_text(run: RunRecord):
    decoded = [row | {"token": "<script>"} for row in run.studies["decoded"].rows]
    evil = replace(run, studies={**run.studies, "decoded": Study("decoded", decoded)})
    html = report(evil, [how_many, what_they_hold, are_they_used])
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert html.count("<svg") == html.count("</svg>") == 2 * len(CHARTS)
    assert html.count("<details>") == html.count("</details>") == 5
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_a_run_is_read_with_its_studies(run: RunRecord, tmp_path: Path):
    write_json(tmp_path / "config.json", run.config)
    write_json(tmp_path / "run.json", {**run.description, "data": {}})
    assert read_run(tmp_path).studies == {}
    for study in run.studies.values():
        study.write(tmp_path / "analysis")
    assert read_run(tmp_path).studies == run.studies


def test_typeset_uses_minus_signs_and_no_break_spaces():
    assert typeset("-3.5 points, -4.0 to -3.0, 20 % of them") == "−3.5 points, −4.0 to −3.0, 20\u00a0% of them"
    assert typeset("graphs-2.json, pre-trained") == "graphs-2.json, pre-trained"
