"""Figures as inline SVG, with the colours and the font of the page.

Matplotlib draws with the colours of LIGHT. In the SVG each colour is replaced by the CSS variable of its name, so that
the page can be light or dark.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import networkx

from coconut.analysis.graph_layout import Point, place_nodes
from coconut.tasks import prosqa

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = {
    "paper": "#fdfdfc",
    "card": "#f5f5f2",
    "ink": "#1d1f22",
    "muted": "#676c73",
    "line": "#dcddd8",
    "band": "#f0f1ed",
    "blue": "#2458b3",
    "green": "#19754a",
    "red": "#b8401f",
    "node": "#e6e8e4",
    "light": "#ffffff",
    "amber": "#f2b632",
    "mint": "#8fc5a8",
    "sky": "#9fbce8",
    "peach": "#ebb8a4",
    "plum": "#76547f",
}
DARK = {
    "paper": "#15171a",
    "card": "#1d2024",
    "ink": "#e7e8ea",
    "muted": "#9aa0a8",
    "line": "#34383e",
    "band": "#1d2125",
    "blue": "#7ba7f0",
    "green": "#5fc795",
    "red": "#f08a67",
    "node": "#363b42",
    "light": "#15171a",
    "amber": "#946a12",
    "mint": "#2f7050",
    "sky": "#3f639f",
    "peach": "#8a4c38",
    "plum": "#b796c2",
}
STYLE: dict[Any, dict[str, Any]] = {
    "svg": {"fonttype": "none", "hashsalt": "coconut"},
    "font": {"size": 10},
    "text": {"color": LIGHT["ink"]},
    "axes": {"edgecolor": LIGHT["line"], "labelcolor": LIGHT["muted"], "titlesize": 11, "titleweight": "bold"},
    "axes.spines": {"top": False, "right": False, "left": False},
    "grid": {"color": LIGHT["line"], "linewidth": 0.6},
    "xtick": {"color": LIGHT["line"], "labelcolor": LIGHT["muted"]},
    "ytick": {"color": LIGHT["line"], "labelcolor": LIGHT["muted"], "major.size": 0},
    "legend": {"frameon": False, "fontsize": "small", "borderpad": 0},
}
SMALL: dict[str, Any] = {"fontsize": "small", "color": LIGHT["muted"]}  # words
DASHED: dict[str, Any] = {"color": LIGHT["muted"], "linewidth": 1, "linestyle": (0, (4, 3))}  # a line
GRAPH_LEGEND = [("blue", "root, where the question starts"), ("green", "right answer and a shortest path to it"),
                ("red", "wrong option")]  # fmt: skip
CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline"}  # words
TERM_COLOURS = ("blue", "green", "plum", "amber", "red", "muted")
MAX_DOTS = 60  # on a line; a line with more points is drawn without dots
MAX_NODES = 24  # in a drawn graph


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Use the settings of STYLE in matplotlib, and ignore the user's configuration."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for group, settings in STYLE.items():
            matplotlib.rc(group, **settings)
        yield


@dataclass(frozen=True)
class Band:
    """A stage, drawn as a band on the axis of updates."""

    name: str
    detail: str
    begin: int
    end: int


@styled()
def learning_curves(
    width: float, bands: Sequence[Band], accuracy: Sequence[Point], train_loss: Sequence[Point],
    valid_loss: Sequence[Point], chance_accuracy: float | None = None, best: Point | None = None,
    terms: Mapping[str, Sequence[Point]] | None = None,
) -> Figure:  # fmt: skip
    """Accuracy, and losses below it, as (update, value), with the stages as bands. Accuracies are shares.

    `best`: the update and the accuracy of the best checkpoint. `terms`: those of the training loss, by name, which get
    a panel of their own.
    """
    figure, panels = panels_over_updates(width, 350 + 150 * bool(terms), bands, (3, 2, 2)[: 2 + bool(terms)])
    upper, lower, *others = panels

    chance_line(upper, chance_accuracy)
    dots = len(accuracy) <= MAX_DOTS
    draw_line(upper, accuracy, "blue", 1.8, "accuracy", dots)
    if best:
        upper.plot(*best, "o", markersize=9, fillstyle="none", color=LIGHT["blue"], clip_on=False)
    upper.set_ylim(0, 1)
    upper.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    upper.set_title("Accuracy on validation data", loc="left", pad=32)

    draw_line(lower, train_loss, "muted", 1.2, "training", dots=False)
    draw_line(lower, valid_loss, "red", 1.8, "validation", dots)
    if train_loss or valid_loss:
        lower.legend(loc="upper right", ncols=2)
        lower.set_ylim(0, None)
    lower.set_title("Loss", loc="left")
    if terms:
        _draw_terms(others[0], terms)
    return figure


def panels_over_updates(
    width: float, height: float, bands: Sequence[Band], ratios: Sequence[float], below: float = 36
) -> tuple[Figure, list[Axes]]:
    """A figure with panels under each other, of these relative heights, over one axis of updates.

    The stages are bands, with their names above the first panel, whose title needs pad=32. `below`: points below the
    last panel.
    """
    left, right = 40, 14
    figure = new_figure(width, height)
    panels = [*figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]]
    figure.subplots_adjust(left / width, below / height, 1 - right / width, 1 - 54 / height, hspace=0.3)
    last = max([band.end for band in bands], default=1)
    for axes in panels:
        for number, band in enumerate(bands):
            if number % 2 == 0:
                axes.axvspan(band.begin, band.end, color=LIGHT["band"], linewidth=0)
        axes.set_xlim(0, last)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    _name_bands(panels[0], bands, (width - left - right) / last)
    panels[-1].set_xlabel("updates", loc="right")
    panels[-1].xaxis.set_major_locator(whole_ticks(5 if width < 400 else 8))
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure, panels


def _draw_terms(axes: Axes, terms: Mapping[str, Sequence[Point]]) -> None:
    """A line for each term, on a logarithmic axis: their sizes differ widely. Zeros are left out."""
    for (name, points), colour in zip(terms.items(), cycle(TERM_COLOURS), strict=False):
        draw_line(axes, [point for point in points if point[1] > 0], colour, 1.4, name, dots=False)
    decades(axes)
    axes.set_title("Terms", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(terms), handlelength=1.2, columnspacing=1.2,
                handletextpad=0.4)  # fmt: skip


def decades(axes: Axes) -> None:
    """A logarithmic axis from one power of ten to another around what is drawn."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.yaxis.set_minor_formatter("")


def chance_line(axes: Axes, chance_accuracy: float | None) -> None:
    """A dashed line at the chance accuracy, with its name; nothing if there is none."""
    if chance_accuracy is not None:
        axes.axhline(chance_accuracy, **DASHED)
        axes.annotate(f"chance, {100 * chance_accuracy:.1f} %", (1, chance_accuracy), (-4, -4), ha="right", va="top",
                      xycoords=("axes fraction", "data"), textcoords="offset points", **SMALL)  # fmt: skip


def _name_bands(axes: Axes, bands: Sequence[Band], points_per_update: float) -> None:
    """Label the bands with the longest form of their names that fits into every band."""
    numbers = [band.name.split()[-1] for band in bands]
    choices = [[f"{band.name}\n{band.detail}" for band in bands], [band.name for band in bands], numbers]
    widths = [(band.end - band.begin) * points_per_update - 4 for band in bands]

    def fits(name: str, width: float) -> bool:
        return max(map(len, name.split("\n"))) * 4.6 <= width

    names = next((names for names in choices if all(map(fits, names, widths))), numbers)
    places = [(band.begin + band.end) / 2 for band in bands]
    style = SMALL | {"textcoords": "offset points", "va": "bottom", "linespacing": 1.25}
    for name, place, width in zip(names, places, widths, strict=True):
        if fits(name, width):
            axes.annotate(name, (place, 1), (0, 5), xycoords=("data", "axes fraction"), ha="center", **style)
    if names is numbers:
        axes.annotate("stage", (0, 1), (-5, 5), xycoords="axes fraction", ha="right", **style)


def draw_line(axes: Axes, points: Sequence[Point], colour: str, width: float, label: str, dots: bool) -> None:
    """Draw a line in a named colour; nothing if there are no points."""
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=LIGHT[colour], linewidth=width, marker="o" if dots else "", markersize=3.5,
                  label=label, clip_on=False, solid_joinstyle="round")  # fmt: skip


@styled()
def graph_picture(question: str, answer: str, name: str) -> str | None:
    """The graph of a symbolic ProsQA question as SVG, from left to right by distance from the root.

    Nodes that the root does not reach are placed below. None if the text is not a symbolic ProsQA question, or its
    graph is too large to draw.
    """
    try:
        parsed = prosqa.parse_question(question)
    except ValueError:
        return None
    target, graph = prosqa.read_target(answer), prosqa.graph(question)
    if not parsed.symbolic or target not in parsed.options or len(graph) > MAX_NODES:
        return None
    colours, path = marked(graph, target)
    places = place_nodes(graph, parsed.root)
    columns = 1 + max(x for x, _ in places.values())
    rows = 1 + max(-y for _, y in places.values())
    figure = new_figure(300, 26 + 34 * rows)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-0.5, max(columns, 3) - 0.5)
    axes.set_ylim(-rows + 0.25, 0.75)
    for a, b in graph.edges:
        colour = LIGHT["green" if (a, b) in path else "muted"]
        (ax, ay), (bx, by) = places[a], places[b]
        bend = 0.0 if bx == ax + 1 or (ax == bx and abs(ay - by) <= 1) else 0.28
        axes.annotate("", (bx, by), (ax, ay), zorder=1, arrowprops={
            "arrowstyle": "-|>", "mutation_scale": 9, "color": colour, "shrinkA": 11, "shrinkB": 11,
            "linewidth": 2.2 if (a, b) in path else 1, "connectionstyle": f"arc3,rad={bend}",
        })  # fmt: skip
    for node, (x, y) in places.items():
        fill = colours.get(node, "node")
        axes.plot([x], [y], "o", markersize=21, color=LIGHT[fill], markeredgewidth=0, zorder=2)
        axes.text(x, y, node, parse_math=False, zorder=3, color=LIGHT["light" if node in colours else "ink"],
                  fontweight="bold" if node in colours else "normal", **CENTRED)  # fmt: skip
    return as_svg(figure, name)


def marked(graph: networkx.DiGraph, target: str | None) -> tuple[dict[str | None, str], set[tuple[str, str]]]:
    """The colours of the nodes that a question names, and the edges of a shortest path to the target, if there is one.

    GRAPH_LEGEND explains the colours.
    """
    root, path = graph.graph["root"], []
    if target in graph and networkx.has_path(graph, root, target):
        path = networkx.shortest_path(graph, root, target)
    colours = dict.fromkeys(graph.graph["options"], "red") | {target: "green", root: "blue"}
    return colours, set(networkx.utils.pairwise(path))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in points, not registered with pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def whole_ticks(count: int) -> Any:
    """A tick locator with up to `count` ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 5, 10], integer=True)


@styled()
def as_svg(figure: Figure, name: str) -> str:
    """The figure as an inline SVG element without URLs. All its ids begin with `name`."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' width="[^"]*pt" height="[^"]*pt"| version="[^"]*"', "", text, count=2)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, value in LIGHT.items():
        text = text.replace(value, f"var(--{colour})")
    return text.strip()
