"""Charts of the studies of a run, one function for each study.

Widths and heights are in points. The colours are those of the light page; `as_svg` turns them into CSS variables, and
`save_png` writes a file.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx
import numpy as np

from coconut.analysis.graph_layout import place_nodes
from coconut.evaluation.sampling import metrics_in
from coconut.reporting.phrases import counted, whole_percent
from coconut.reporting.plots import (
    CENTRED,
    LIGHT,
    MAX_NODES,
    SMALL,
    chance_line,
    marked,
    new_figure,
    styled,
    whole_ticks,
)
from coconut.runs.study import Study
from coconut.tasks import prosqa
from coconut.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The outcome classes of answers (colour, label), from the bottom of a bar to its top.
OUTCOMES = {
    "correct_path": ("green", "correct path"),
    "longer_path": ("mint", "longer path"),
    "correct_label": ("sky", "correct label"),
    "incorrect_label": ("peach", "incorrect label"),
    "wrong_target": ("red", "wrong target"),
    "hallucination": ("plum", "hallucination"),
}
# Groups of nodes, for a thought that corresponds to a distance from the root: colour, label, phrase in a sentence.
GROUPS = {
    "optimal": ("green", "on a shortest path", "on a shortest path"),
    "frontier": ("blue", "same distance, not on it", "at the same distance but not on a shortest path"),
    "reachable": ("muted", "nearer", "nearer to the root"),
    "other": ("muted", "farther or not reachable", "farther away or not reachable"),
}
# The tokens that a prefix value counts: colour, label.
PREFIXES = {"answer": ("blue", "whole answer"), "after_mark": ("green", "after the answer mark")}
SHADES = ("sky", "green", "amber", "red", "plum")  # from few steps to many
METRIC_COLOURS = ("blue", "green", "plum")  # of pass@k, maj@k and best@k
EVALUATION_COLOURS = ("blue", "green", "plum", "amber", "red", "sky", "mint", "peach")
HOLLOW_BELOW = 10  # a point with fewer nodes is drawn hollow
MAX_COLUMNS = 8  # in a drawn search tree
NARROW = 500  # points; a narrower chart is laid out for a phone


def save_png(figure: Figure, path: Path | str) -> None:
    """Write a PNG with a white background and 200 dpi, atomically."""
    with styled(), atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=200, facecolor="white")


def _moment(count: int) -> str:
    return f"After {counted(count, 'thought')}" if count else "No thought yet"


# Accuracy and outcomes.


@styled()
def k_forcing(study: Study, width: float, chance_accuracy: float | None = None, noun: str = "thought") -> Figure:
    """Accuracy for each number of thoughts, and below it, for graph questions, the outcome classes.

    A band marks the trained number of thoughts. `noun`: "thought" or "pause". (Hao et al., arXiv 2412.06769, Fig. 3.)
    """
    rows = sorted(study.rows, key=lambda row: row["thoughts"])
    counts = [row["thoughts"] for row in rows]
    seen = [name for name in OUTCOMES if any(row[name] for row in rows)]
    columns = 2 if width < NARROW else 3
    left, right, top, bottom, above, gap, below = 40, 14, 46, 36, 130, 46 + 14 * -(-len(seen) // columns), 170
    wide = width - left - right
    figure = new_figure(width, top + above + bottom + (gap + below if seen else 0))
    upper = panel(figure, left, top, wide, above)
    panels = [upper]
    if seen:
        panels.append(panel(figure, left, top + above + gap, wide, below))
        _outcomes(panels[1], rows, seen, columns)
    trained = study.facts["trained_thoughts"]
    for axes in panels:
        axes.axvspan(trained - 0.5, trained + 0.5, color=LIGHT["band"], linewidth=0, zorder=0)
        axes.set_xlim(counts[0] - 0.5, counts[-1] + 0.5)
        axes.set_xticks(counts)
        axes.xaxis.set_tick_params(length=0)
        share_axis(axes.yaxis, 5)
    panels[-1].set_xlabel(f"{noun}s before the answer", loc="right")

    upper.set_title("Accuracy", loc="left", pad=24)
    chance_line(upper, chance_accuracy)
    line_with_intervals(upper, rows, "accuracy", "blue")
    above_point: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    if wide / len(rows) > 34:
        for row in rows:
            upper.annotate(f"{100 * row['accuracy']:.1f}", (row["thoughts"], row["high"]), (0, 4), fontsize="small",
                           annotation_clip=False, **above_point)  # fmt: skip
    upper.annotate("as trained", (trained, 1), (0, 16), xycoords=("data", "axes fraction"), **above_point, **SMALL)
    return figure


@styled()
def prefix_values(study: Study, width: float) -> Figure:
    """Mean log-probability of the right answer for each number of thoughts; a second panel by the question's steps.

    The second panel has at most len(SHADES) curves: the numbers of steps with the most questions.
    """
    of_all = [(label, colour, [row for row in study.rows if row["of"] == of and row["steps"] is None])
              for of, (colour, label) in PREFIXES.items()]  # fmt: skip
    counts = {row["steps"]: row["questions"] for row in study.rows if row["steps"] is not None}
    lengths = sorted(sorted(counts, key=lambda steps: -counts[steps])[: len(SHADES)])
    by_steps = [
        (str(steps), SHADES[i * (len(SHADES) - 1) // max(len(lengths) - 1, 1)],
         [row for row in study.rows if row["of"] == "answer" and row["steps"] == steps])
        for i, steps in enumerate(lengths)
    ]  # fmt: skip
    panels = [("Log-probability of the right answer", of_all)]
    if by_steps:
        panels.append(("Whole answer, by the steps of the question", by_steps))
    figure, axes_of_panels = _grid(len(panels), width, 1 if width < NARROW else 2, 140, top=46, bottom=34, margin=0)
    lowest = min(row["low"] for row in study.rows)
    for axes, (title, curves) in zip(axes_of_panels, panels, strict=True):
        for label, colour, rows in curves:
            line_with_intervals(axes, rows, "value", colour, label)
        axes.set_xlim(-0.3, study.facts["trained_thoughts"] + 0.3)
        axes.xaxis.set_major_locator(whole_ticks(8))
        axes.set_ylim(min(lowest * 1.05, -0.1), 0)
        axes.set_title(title, loc="left", pad=24)
        axes.legend(ncols=len(curves), loc="lower left", bbox_to_anchor=(0, 1.02), handlelength=1.2, columnspacing=1.2,
                    handletextpad=0.4, borderaxespad=0)  # fmt: skip
        axes.set_xlabel("thoughts before the answer", loc="right")
    return figure


@styled()
def metrics_at_k(evaluations: Sequence[tuple[str, list[dict[str, Any]]]], width: float) -> Figure:
    """pass@k, maj@k and best@k over k, a panel for each evaluation, given as its title and its `at_k`."""
    columns = 1 if width < NARROW else min(2, len(evaluations))
    figure, axes_of_panels = _grid(len(evaluations), width, columns, 140, top=46, bottom=34, margin=0)
    for axes, (title, at_k) in zip(axes_of_panels, evaluations, strict=True):
        names = metrics_in(at_k[0])
        for name, colour in zip(names, METRIC_COLOURS, strict=False):
            rows = [
                {"place": place, "value": row[f"{name}_at_k"], "low": row[f"{name}_interval"][0],
                 "high": row[f"{name}_interval"][1]} for place, row in enumerate(at_k)
            ]  # fmt: skip
            line_with_intervals(axes, rows, "value", colour, f"{name}@k", over="place")
        axes.set_xlim(-0.3, max(len(at_k) - 0.7, 0.3))
        axes.set_xticks(range(len(at_k)), [str(row["k"]) for row in at_k])
        share_axis(axes.yaxis, 5)
        axes.set_title(title, loc="left", pad=24)
        axes.legend(ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1.02), handlelength=1.2, columnspacing=1.2,
                    handletextpad=0.4, borderaxespad=0)  # fmt: skip
        axes.set_xlabel("k of the sampled answers", loc="right")
    return figure


@styled()
def metrics_over_passes(rows: Sequence[dict[str, Any]], width: float) -> Figure:
    """A panel for each metric at k over the forward passes of the k answers, with a line for each evaluation.

    rows: those of a comparison, with metric, label, passes, value, low and high. The passes are on a log scale.
    """
    metrics, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("metric", "label"))
    columns = 1 if width < NARROW else len(metrics)
    legend, in_line = _room_for_legend(labels, width)
    figure, axes_of_panels = _grid(
        len(metrics), width, columns, 170, top=24, bottom=34, gap=38, legend=legend, margin=0
    )
    lowest, highest = min(row["passes"] for row in rows), max(row["passes"] for row in rows)
    for axes, metric in zip(axes_of_panels, metrics, strict=True):
        for colour, label in zip(EVALUATION_COLOURS, labels, strict=False):
            of_label = [row for row in rows if (row["metric"], row["label"]) == (metric, label)]
            if of_label:
                line_with_intervals(axes, of_label, "value", colour, over="passes")
        axes.set_xscale("log", base=2)
        axes.set_xlim(lowest / 1.15, highest * 1.15)
        powers = range(math.ceil(math.log2(lowest)), math.floor(math.log2(highest)) + 1)
        shown = [2.0**power for power in powers][:: max(1, len(powers) // 5)]
        axes.set_xticks(shown, [f"{passes:,.0f}" for passes in shown])
        axes.minorticks_off()
        share_axis(axes.yaxis, 5)
        axes.set_title(f"{metric}@k", loc="left")
        axes.set_xlabel("forward passes a question", loc="right")
    handles = [axes_of_panels[0].plot([], [], color=LIGHT[colour], marker="o", markersize=4, linewidth=1.2)[0]
               for colour, _ in zip(EVALUATION_COLOURS, labels, strict=False)]  # fmt: skip
    _legend_of_runs(figure, handles, labels, in_line)
    return figure


@styled()
def curves_of_groups(groups: Mapping[str, Sequence[Sequence[tuple[float, float]]]], unit: str, width: float) -> Figure:
    """Curves on one scale over what `unit` names: a line for each curve, and a colour for each group."""
    legend, in_line = _room_for_legend(list(groups), width)
    figure = new_figure(width, legend + 196)
    axes, handles = panel(figure, 40, legend + 20, width - 54, 136), []
    for colour, curves in zip(cycle(EVALUATION_COLOURS), groups.values(), strict=False):
        lines = [axes.plot(*zip(*curve, strict=True), color=LIGHT[colour], marker="o", markersize=4, linewidth=1.2)[0]
                 for curve in curves]  # fmt: skip
        handles.append(lines[0])
    axes.set_xlim(0)
    axes.set_xlabel(unit, loc="right")
    axes.xaxis.set_major_locator(whole_ticks(8))
    _legend_of_runs(figure, handles, list(groups), in_line)
    return figure


def _room_for_legend(labels: Sequence[str], width: float) -> tuple[int, int]:
    """The height in points of a legend above all panels, and how many of its entries fit in a line."""
    in_line = max(1, int((width - 20) // (28 + 5.3 * max(map(len, labels)))))
    return 8 + 15 * -(-len(labels) // in_line), in_line


def _legend_of_runs(figure: Figure, handles: Sequence[Any], labels: Sequence[str], in_line: int) -> None:
    width, _ = figure.get_size_inches() * 72
    figure.legend(handles, labels, ncols=in_line, loc="upper left", bbox_to_anchor=(8 / width, 1), handlelength=1.2,
                  columnspacing=1.4, handletextpad=0.5, borderaxespad=0.4)  # fmt: skip


def line_with_intervals(
    axes: Axes, rows: list[dict[str, Any]], key: str, colour: str, label: str = "", over: str = "thoughts"
) -> None:
    """A value for each number of thoughts, or what `over` names, with its interval as a wide bar."""
    x, low, high, y = ([row[name] for row in rows] for name in (over, "low", "high", key))
    axes.vlines(x, low, high, color=LIGHT[colour], alpha=0.45, linewidth=4.5, clip_on=False)
    axes.plot(x, y, color=LIGHT[colour], linewidth=1.2, marker="o", markersize=4, label=label, clip_on=False)


def _outcomes(axes: Axes, rows: list[dict[str, Any]], shown: list[str], columns: int) -> None:
    floor = [0.0] * len(rows)
    for name in shown:
        colour, label = OUTCOMES[name]
        shares = [row[name] / row["questions"] for row in rows]
        axes.bar([row["thoughts"] for row in rows], shares, 0.58, floor, color=LIGHT[colour], label=label,
                 edgecolor=LIGHT["paper"], linewidth=0.8)  # fmt: skip
        floor = [sum(pair) for pair in zip(floor, shares, strict=True)]
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.05), handlelength=0.9, handleheight=0.9,
                columnspacing=1.4, handletextpad=0.5, borderaxespad=0)  # fmt: skip
    axes.set_title("Outcomes", loc="left", pad=14 + 14 * -(-len(shown) // columns))


# The search tree.


@dataclass(frozen=True)
class _Node:
    """A node in the picture: the centre, in points from the upper left corner, and the size."""

    name: str
    x: float
    y: float
    wide: float
    high: float
    share: float | None  # the probability as the next step, None if it was not measured


@styled()
def search_tree(question: str, answer: str, values: Study, width: float) -> Figure:
    """A question's graph from left to right, each node with the probability that the next step names it.

    `values`: the rows of this question. The probability of a node at distance d from the root is taken after the number
    of thoughts whose next step names a node at distance d. The head of each column has the probability of nodes of
    other columns, and of text that is no node. A graph of more than MAX_NODES nodes is drawn without the nodes that
    the root does not reach, except the two options. (Hao et al., arXiv 2412.06769, Figs. 5 and 6.)

    Raises ValueError if the question describes no graph. `drawable` checks whether it fits.
    """
    graph = shown_graph(question)
    root, target = graph.graph["root"], prosqa.read_target(answer)
    reached = networkx.single_source_shortest_path_length(graph, root)
    after = {
        d: (d - values.facts["offset"]) * values.facts["thoughts_per_step"] for d in range(1 + max(reached.values()))
    }
    shares = {(row["after"], row["node"]): row["value"] for row in values.rows if row["ahead"]}
    heads = _column_heads(values, after)

    margin, head, pitch, unreached_pitch = 8.0, 16 + 13 * max(map(len, heads.values()), default=0), 44.0, 30.0
    places = place_nodes(graph, root)
    unreached = [name for name in graph if name not in reached]
    column_widths = {
        part: (width - 2 * margin) / (1 + max(places[name][0] for name in names))
        for part, names in ((True, reached), (False, unreached))
        if names
    }
    size = min(10.0, (min(column_widths.values()) - 14) / (0.66 * max(4, *map(len, graph))))
    depth = 1 + max(-places[name][1] for name in reached)
    nodes: dict[str, _Node] = {}
    for name, (column, row) in places.items():
        share = shares.get((after[reached[name]], name)) if reached.get(name) else None
        y = head + pitch * (-row + 0.5)
        if name not in reached:
            y = head + pitch * depth + 22 + unreached_pitch * (-row - depth + 0.5)
        x = margin + column_widths[name in reached] * (column + 0.5)
        wide = max(24.0, 0.66 * size * max(len(name), 4 if share is not None else 1) + 12)
        nodes[name] = _Node(name, x, y, wide, 22.0 if share is None else 31.0, share)
    height = max(node.y for node in nodes.values()) + (unreached_pitch if unreached else pitch) / 2 + 4
    step = column_widths[True]

    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    bottom = head + pitch * depth
    for d in range(1 + max(reached.values())):
        if d % 2 == 0:
            axes.axvspan(margin + step * d, margin + step * (d + 1), 1 - bottom / height, 1,
                         color=LIGHT["band"], linewidth=0, zorder=0)  # fmt: skip
        for i, line in enumerate(["start"] if d == 0 else heads.get(d, [])):
            axes.text(margin + step * (d + 0.5), 14 + 13 * i, line, fontsize=min(8.3, step / 8.5),
                      color=LIGHT["muted" if i else "ink"], **CENTRED)  # fmt: skip
    if unreached:
        axes.text(margin, bottom + 12, f"not reachable from {root}", parse_math=False, va="center_baseline", **SMALL)

    colours, path = marked(graph, target)
    boxes = {name: _box(axes, node, colours.get(name), size) for name, node in nodes.items()}
    for a, b in graph.edges:
        _arrow(axes, nodes[a], nodes[b], boxes, column_widths[a in reached], (a, b) in path, a in reached)
    return figure


def drawable(question: str) -> bool:
    """Whether the text is a graph question whose graph is small enough for `search_tree`."""
    try:
        graph = shown_graph(question)
    except ValueError:
        return False
    columns = 1 + max(column for column, _ in place_nodes(graph, graph.graph["root"]).values())
    return len(graph) <= MAX_NODES and columns <= MAX_COLUMNS


def shown_graph(question: str) -> networkx.DiGraph:
    """The graph of a question; of a large graph only the options and the nodes that the root reaches."""
    graph = prosqa.graph(question)
    if len(graph) <= MAX_NODES:
        return graph
    root = graph.graph["root"]
    return networkx.DiGraph(graph.subgraph(networkx.descendants(graph, root) | {root, *graph.graph["options"]}))


def _column_heads(values: Study, after: dict[int, int]) -> dict[int, list[str]]:
    """The lines above each column, by distance: the number of thoughts, and the probability outside this column."""
    heads = {}
    for d, thoughts in after.items():
        rows = [row for row in values.rows if row["after"] == thoughts]
        if any(row["ahead"] for row in rows):
            ahead = sum(row["value"] for row in rows if row["ahead"])
            nodes = sum(row["value"] for row in rows)
            heads[d] = [counted(thoughts, "thought") if thoughts else "no thought yet"]
            heads[d].append(f"elsewhere {whole_percent(nodes - ahead)}")
            if nodes < 0.995:
                heads[d].append(f"no node {whole_percent(1 - nodes)}")
    return heads


def _box(axes: Axes, node: _Node, colour: str | None, size: float) -> Any:
    from matplotlib.patches import FancyBboxPatch

    def rounded(zorder: int, **style: Any) -> Any:
        corner, shape = (node.x - node.wide / 2, node.y - node.high / 2), "round,pad=0,rounding_size=9"
        return axes.add_patch(FancyBboxPatch(corner, node.wide, node.high, shape, zorder=zorder, **style))

    is_root = colour == "blue"
    ground = rounded(2, linewidth=0, facecolor=LIGHT["blue" if is_root else "node"])
    if node.share:
        rounded(3, linewidth=0, facecolor=LIGHT["amber"], alpha=min(node.share, 1.0))
    if colour and not is_root:
        rounded(4, linewidth=2.2, edgecolor=LIGHT[colour], fill=False)
    axes.text(node.x, node.y if node.share is None else node.y - 6, node.name, parse_math=False, zorder=5,
              fontsize=size, color=LIGHT["light" if is_root else "ink"], fontweight="bold" if colour else "normal",
              **CENTRED)  # fmt: skip
    if node.share is not None:
        axes.text(node.x, node.y + 7, whole_percent(node.share), zorder=5, fontsize=0.85 * size, **CENTRED)
    return ground


def _arrow(axes: Axes, a: _Node, b: _Node, boxes: dict[str, Any], step: float, on_path: bool, reached: bool) -> None:
    from matplotlib.patches import FancyArrowPatch

    adjacent = abs(b.x - a.x - step) < 1 or (abs(a.x - b.x) < 1 and abs(a.y - b.y) < 50)
    colour = "green" if on_path else "muted" if reached else "line"
    axes.add_patch(FancyArrowPatch(
        (a.x, a.y), (b.x, b.y), patchA=boxes[a.name], patchB=boxes[b.name], shrinkA=1, shrinkB=1.5, zorder=1,
        arrowstyle="-|>", mutation_scale=9, color=LIGHT[colour], linewidth=2.2 if on_path else 1,
        connectionstyle=f"arc3,rad={0.0 if adjacent else 0.28 if reached else 0.15}",
    ))  # fmt: skip


# Values of nodes.


def moments(study: Study) -> list[int]:
    """The numbers of thoughts with a panel in `parallelism`: 0, if it was measured, and the next two."""
    numbers = sorted({row["after"] for row in study.rows})
    return numbers[: 3 if 0 in numbers else 2]


@styled()
def parallelism(study: Study, width: float) -> Figure:
    """Cumulated probability of the 1, 2 and 3 likeliest nodes ahead against the percentile of questions.

    The panels are before any thought, if that was measured, after the thoughts of the first step, and after those of
    the second step. (arXiv 2412.06769, section 5.)
    """
    numbers = moments(study)
    figure, panels = _grid(len(numbers), width, 1 if width < NARROW else max(2, len(numbers)), 130, legend=16)
    for axes, after in zip(panels, numbers, strict=True):
        rows = sorted((row for row in study.rows if row["after"] == after), key=lambda row: row["percentile"])
        x = [row["percentile"] for row in rows]
        floor = [0.0] * len(x)
        for most, alpha in ((1, 0.5), (2, 0.28), (3, 0.14)):
            y = [row[f"top{most}"] for row in rows]
            axes.fill_between(x, floor, y, color=LIGHT["blue"], alpha=alpha, linewidth=0,
                              label="the likeliest" if most == 1 else f"{most} likeliest")  # fmt: skip
            axes.plot(x, y, color=LIGHT["blue"], linewidth=1.4, clip_on=False)
            floor = y
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100])
        share_axis(axes.yaxis, 5)
        axes.set_title(_moment(after), loc="left")
        axes.set_xlabel("percentile of questions", loc="right")
    _legend(figure, panels[0], 0.9)
    return figure


@styled()
def heights(study: Study, width: float, kind: str = "shortest") -> Figure:
    """Mean value of nodes ahead against their height, with standard errors, for nodes that lead to the target or not.

    `kind` of height: "shortest", edges to the nearest leaf, or "longest", edges to the farthest leaf. One panel for
    each number of thoughts. (arXiv 2412.06769, section 5.)
    """
    chosen = [row for row in study.rows if row["kind"] == kind]
    numbers = sorted({row["after"] for row in chosen})
    columns = 2 if width < NARROW else max(2, min(3, len(numbers)))
    figure, panels = _grid(len(numbers), width, columns, 120, legend=16)
    highest = max(row["height"] for row in chosen)
    for axes, after in zip(panels, numbers, strict=True):
        for leads, colour, marker, label in (
            (True, "green", "o", "leads to the target"),
            (False, "red", "D", "does not"),
        ):
            rows = sorted((row for row in chosen if row["after"] == after and row["leads"] is leads),
                          key=lambda row: row["height"])  # fmt: skip
            x, y = [row["height"] for row in rows], [row["mean"] for row in rows]
            axes.plot(x, y, color=LIGHT[colour], linewidth=1.6, marker=marker, markersize=4.5, label=label,
                      clip_on=False)  # fmt: skip
            low, high = ([row["mean"] + sign * (row["se"] or 0) for row in rows] for sign in (-1, 1))
            axes.vlines(x, np.maximum(low, 0), np.minimum(high, 1), color=LIGHT[colour], linewidth=1.2, clip_on=False)
            few = [(row["height"], row["mean"]) for row in rows if row["count"] < HOLLOW_BELOW]
            axes.plot([h for h, _ in few], [mean for _, mean in few], marker, markersize=2.6, color=LIGHT["paper"],
                      zorder=4, clip_on=False)  # fmt: skip
        axes.set_xlim(-0.3, highest + 0.3)
        axes.xaxis.set_major_locator(whole_ticks(6))
        share_axis(axes.yaxis, 5)
        axes.set_title(_moment(after), loc="left")
    panels[-1].set_xlabel(f"edges to the {'nearest' if kind == 'shortest' else 'farthest'} leaf", loc="right")
    _legend(figure, panels[0], 1.4)
    return figure


@styled()
def inner_products(study: Study, width: float) -> Figure:
    """Inner products of each thought with the embeddings of nodes: mean and standard deviation of four groups.

    One panel for each thought. (Zhu et al., arXiv 2505.12514.)
    """
    thoughts = sorted({row["thought"] for row in study.rows})
    columns = 1 if width < NARROW else max(2, min(3, len(thoughts)))
    low = min(0.0, *(row["mean"] - (row["sd"] or 0.0) for row in study.rows))
    high = max(0.0, *(row["mean"] + (row["sd"] or 0.0) for row in study.rows))
    margin = 0.04 * (high - low)
    figure, panels = _grid(len(thoughts), width, columns, 84, left=128, gap=16)
    for i, (axes, thought) in enumerate(zip(panels, thoughts, strict=True)):
        found = {row["group"]: row for row in study.rows if row["thought"] == thought}
        for place, (group, (colour, *_)) in enumerate(GROUPS.items()):
            if row := found.get(group):
                mean, spread = row["mean"], row["sd"] or 0.0
                _dot(axes, place, mean, mean - spread, mean + spread, colour)
        axes.set_ylim(len(GROUPS) - 0.5, -0.5)
        axes.set_yticks(range(len(GROUPS)), [label for _, label, _ in GROUPS.values()] if i % columns == 0 else [])
        axes.tick_params("y", labelcolor=LIGHT["ink"])
        axes.axvline(0, color=LIGHT["line"], linewidth=1, zorder=0)
        axes.xaxis.set_major_locator(whole_ticks(5))
        axes.set_title(f"Thought {thought}", loc="left")
        axes.set_xlim(low - margin, high + margin)
    panels[-1].set_xlabel("inner product", loc="right")
    return figure


# Interventions.


@dataclass(frozen=True)
class Dots:
    """A panel of shares with intervals, one for each row of the chart; None leaves a row empty."""

    title: str
    colour: str
    shares: Sequence[tuple[float, float, float] | None]  # share, low, high
    trained: float | None = None
    chance_accuracy: float | None = None


@styled()
def audit(study: Study, width: float) -> Figure:
    """Accuracy and share of changed answers under each intervention on the thoughts."""
    rows = study.rows
    trained = next((row["accuracy"] for row in rows if row["change"] == "none"), None)
    accuracy = [(row["accuracy"], row["low"], row["high"]) for row in rows]
    changed = [None if row["change"] == "none" else _interval(row, "changed") for row in rows]
    panels = [
        Dots("Accuracy", "blue", accuracy, trained, study.facts.get("chance_accuracy")),
        Dots("Answers changed", "red", changed),
    ]
    return dot_chart([row["label"] for row in rows], panels, width)


@styled()
def edges(study: Study, width: float) -> Figure:
    """Shares of answers that follow an intervention on the graph, and of answers that change at all."""
    panels = [
        Dots("Answers that follow", "green", [_interval(row, "followed") for row in study.rows]),
        Dots("Answers changed", "red", [_interval(row, "changed") for row in study.rows]),
    ]
    return dot_chart([row["label"] for row in study.rows], panels, width)


def _interval(row: dict[str, Any], name: str) -> tuple[float, float, float] | None:
    return None if row[name] is None else (row[name], row[f"{name}_low"], row[f"{name}_high"])


def dot_chart(names: list[str], panels: list[Dots], width: float) -> Figure:
    """Rows of dots with intervals. The labels are on the left, in a narrow chart above each row."""
    narrow = width < NARROW
    left, right, gap, bottom = (14.0, 20.0, 40.0, 26.0) if narrow else (0.34 * width, 22.0, 40.0, 26.0)
    top = 40.0 if any(dots.chance_accuracy is not None for dots in panels) else 26.0
    most = int((width - left if narrow else left - 14) / 5.6)
    wrapped_names = [_wrapped(name, most) for name in names]
    highs = [22 + 13 * len(lines) if narrow else max(28, 12 + 13 * len(lines)) for lines in wrapped_names]
    begins = [sum(highs[:i]) for i in range(len(highs))]
    high, wide = sum(highs), (width - left - right - gap * (len(panels) - 1)) / len(panels)
    places = [begin + (h - 11 if narrow else h / 2) for begin, h in zip(begins, highs, strict=True)]
    figure = new_figure(width, top + high + bottom)
    for number, dots in enumerate(panels):
        axes = panel(figure, left + number * (wide + gap), top, wide, high)
        axes.set_ylim(high, 0)
        axes.set_yticks([])
        axes.grid(visible=not narrow, axis="x")
        for place, share in zip(places, dots.shares, strict=True):
            if share is None:
                continue
            axes.hlines(place, 0, 1, color=LIGHT["line"], linewidth=0.8, zorder=0)
            _dot(axes, place, *share, dots.colour)
        begin, end = ([y - 6 for y in places], [y + 6 for y in places]) if narrow else ([0], [high])
        if dots.trained is not None:
            axes.vlines([dots.trained] * len(begin), begin, end, color=LIGHT["blue"], linewidth=1, zorder=1)
        if dots.chance_accuracy is not None:
            axes.vlines([dots.chance_accuracy] * len(begin), begin, end, color=LIGHT["muted"], linewidth=1,
                        linestyle=(0, (4, 3)), zorder=1)  # fmt: skip
            axes.annotate("chance", (dots.chance_accuracy, 1), (0, 3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", ha="center", va="bottom", **SMALL)  # fmt: skip
        share_axis(axes.xaxis, 3 if narrow else 5)
        axes.set_title(dots.title, loc="left", pad=top - 18)
    width, height = figure.get_size_inches() * 72
    for lines, begin, h in zip(wrapped_names, begins, highs, strict=True):
        x, y = (left, begin + h - 21) if narrow else (left - 14, begin + h / 2)
        figure.text(x / width, 1 - (top + y) / height, "\n".join(lines), ha="left" if narrow else "right",
                    va="bottom" if narrow else "center", fontsize=10 if narrow else 9.5)  # fmt: skip
    return figure


def _wrapped(text: str, max_width: int) -> list[str]:
    """Wrap to as few lines as the width in characters allows, of about the same length."""
    lines = textwrap.wrap(text, max_width)
    for width in range(max(map(len, text.split())), max_width):
        if len(narrower := textwrap.wrap(text, width)) == len(lines):
            return narrower
    return lines


# Helpers.


def panel(figure: Figure, left: float, top: float, wide: float, high: float) -> Axes:
    """Axes at a position in points from the upper left corner."""
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return axes


def _grid(
    count: int, width: float, columns: int, high: float, left: float = 40, gap: float = 44, legend: float = 0,
    top: float = 24, bottom: float = 30, margin: float = 8,
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """Panels in rows of `columns`. `legend` and `margin`: the heights in points to keep free above and below all."""
    wide, pitch = (width - left - 14 - gap * (columns - 1)) / columns, top + high + bottom
    figure = new_figure(width, legend + -(-count // columns) * pitch + margin)
    places = (divmod(i, columns) for i in range(count))
    return figure, [
        panel(figure, left + column * (wide + gap), legend + top + line * pitch, wide, high) for line, column in places
    ]


def _legend(figure: Figure, axes: Axes, handle: float) -> None:
    """Put the legend of `axes` above all panels."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, ncols=len(names), loc="upper left", bbox_to_anchor=(axes.get_position().x0, 1),
                  handlelength=handle, handleheight=0.9, columnspacing=1.4, handletextpad=0.5,
                  borderaxespad=0.6)  # fmt: skip


def _dot(axes: Axes, place: float, mean: float, low: float, high: float, colour: str) -> None:
    axes.hlines(place, low, high, color=LIGHT[colour], alpha=0.45, linewidth=5, clip_on=False)
    axes.plot([mean], [place], "o", color=LIGHT[colour], markersize=5, clip_on=False)


def share_axis(axis: Any, count: int) -> None:
    """Scale an axis from 0 to 100 % with `count` ticks."""
    shares = [i / (count - 1) for i in range(count)]
    axis.axes.set(**{f"{axis.axis_name}lim": (0, 1)})
    axis.set_ticks(shares, [f"{100 * share:.0f} %" for share in shares])
