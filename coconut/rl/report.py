"""The page about what a policy learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.analysis.graph_layout import Point
from coconut.data.seen_questions import describe_questions
from coconut.methods import parse_mode
from coconut.reporting.charts import panel, share_axis
from coconut.reporting.page import Figure, Legend, Part, Score, Section, Table, Text, figure_of, page
from coconut.reporting.phrases import counted, percent
from coconut.reporting.plots import LIGHT, draw_line, new_figure, styled, whole_ticks
from coconut.reporting.run_page import answers, sampled, settings_of_adamw, what_was_trained
from coconut.reporting.run_table import aligned
from coconut.reporting.sections import are_they_used, how_many, relies_on_shortcuts, what_they_hold
from coconut.reporting.verdict import what_it_means
from coconut.runs.record import RunRecord
from coconut.runs.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLOURS = ("green", "blue", "plum", "red", "peach", "sky")  # of modes, in their order
POINTS = 60  # of a smoothed curve


def modes_of(run: RunRecord) -> list[str]:
    """The modes of the run's model; none if it is not hybrid."""
    if run.is_policy:
        return run.description["reasoning"]["modes"]
    return run.config["curriculum"].get("modes", []) if run.stages[-1].in_turn else []


def chooses(run: RunRecord) -> bool:
    """Whether the run has modes and a validation, so that its choices can be examined."""
    return bool(modes_of(run) and run.valid)


# Figures.


@styled()
def choice_curves(runs: Sequence[RunRecord], width: float) -> Drawing:
    """Share and accuracy of each mode over training, and its probability by steps: one line for each run and mode."""
    modes = modes_of(runs[0])
    left, right, top, bottom, high, gap = 40.0, 14.0, 26.0, 40.0, 130.0, 46.0
    beside = width > 500
    wide = (width - left - right - 2 * gap) / 3 if beside else width - left - right
    figure = new_figure(width, top + high + bottom if beside else 3 * (top + high + bottom))
    positions = [
        (left + n * (wide + gap), top) if beside else (left, top + n * (top + high + bottom)) for n in range(3)
    ]
    shares, accuracies, probabilities = (panel(figure, *position, wide, high) for position in positions)
    for number, mode in enumerate(modes):
        colour = COLOURS[number % len(COLOURS)]
        for run in runs:
            draw_line(shares, smooth(run.train, f"share_{mode}"), colour, 1.5, mode, dots=False)
            draw_line(accuracies, points(run.valid, f"accuracy_{mode}"), colour, 1.5, mode, dots=False)
            if run.valid:
                draw_line(probabilities, by_steps(run.valid[-1], mode), colour, 1.5, mode, dots=True)
                faint = by_steps(run.valid[0], mode)
                probabilities.plot(*zip(*faint, strict=True), color=LIGHT[colour], linewidth=1, linestyle=(0, (2, 2)))
    last = max(run.config["num_steps"] for run in runs)
    for axes, title in ((shares, "Share of completions"), (accuracies, "Accuracy when forced")):
        axes.set_xlim(0, last)
        axes.set_xlabel("steps", loc="right")
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_locator(whole_ticks(4))
    probabilities.set_title("Probability by steps", loc="left")
    probabilities.set_xlabel("steps of the question", loc="right")
    probabilities.xaxis.set_major_locator(whole_ticks(8))
    for axes in (shares, accuracies, probabilities):
        share_axis(axes.yaxis, 5)
    return figure


def points(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if key in row]


def smooth(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """The curve of a metric over steps, averaged over neighbouring steps to at most POINTS points."""
    values = points(rows, key)
    every = max(1, -(-len(values) // POINTS))
    parts = [values[first : first + every] for first in range(0, len(values), every)]
    return [(float(np.mean([x for x, _ in part])), float(np.mean([y for _, y in part]))) for part in parts]


def by_steps(row: dict[str, Any], mode: str) -> list[Point]:
    return [(part["steps"], part[f"chance_{mode}"]) for part in row["by_steps"]]


@styled()
def reward_curve(run: RunRecord, width: float) -> Drawing:
    """Mean rewards of the sampled completions, and on validation questions."""
    figure = new_figure(width, 196)
    axes = panel(figure, 40, 30, width - 54, 126)
    draw_line(axes, smooth(run.train, "reward"), "muted", 1.2, "sampled", dots=False)
    draw_line(axes, points(run.valid, "reward"), "blue", 1.8, "validation, greedy", dots=True)
    axes.set_xlim(0, run.config["num_steps"])
    axes.set_xlabel("steps", loc="right")
    axes.xaxis.set_major_locator(whole_ticks(8))
    axes.set_title("Reward", loc="left")
    axes.legend(loc="lower right", ncols=2)
    return figure


def curves_figure(runs: Sequence[RunRecord], name: str) -> Figure:
    return figure_of(
        lambda width: choice_curves(runs, width),
        name,
        "Share of each mode among the completions, accuracy of each mode, and its probability by number of steps.",
        "Left: completions sampled in training. Middle: validation questions, each answered in every mode. Right: "
        "the probability of the mode's control token, before the first step (dashed) and after the last.",
    )


def mode_legend(modes: Sequence[str]) -> Legend:
    entries = []
    for number, mode in enumerate(map(parse_mode, modes)):
        described = {"short": "the answer at once", "think": "the whole chain in words"}.get(mode.name)
        words = described or f"{counted(mode.num_thoughts, 'thought')} and the answer"
        entries.append((COLOURS[number % len(COLOURS)], f"{mode.token}: {words}"))
    return Legend(entries)


# One run.


def report(run: RunRecord) -> str:
    """The HTML page of one run."""
    objective = run.config["objective"]["name"]
    measured = (how_many, what_they_hold, are_they_used, relies_on_shortcuts)
    makers = (headline, what_it_means, sampled, *measured, learning, answers, provenance)
    sections = [section for make in makers if (section := make(run))]
    modes = ", ".join(modes_of(run))
    what = f"reinforcement learning of the choice between {modes}" if modes else "reinforcement learning"
    return page(run.description["name"], objective, what, run.folder, sections)


def headline(run: RunRecord) -> Section:
    parts: list[Part] = []
    if run.step < run.config["num_steps"]:
        parts.append(Text(f"Not complete: step {run.step:,} of {run.config['num_steps']:,}."))
    if routers := run.studies.get("routers"):
        parts += router_parts(routers)
    elif run.test:
        test = run.evaluations[run.test]
        what = f"on {describe_questions(test['count'], test.get('seen'))}"
        parts.append(Score(test["accuracy"], what, test["interval"], test["chance_accuracy"]))
        parts.append(Text(f"With the checkpoint of step {test['step']:,}."))
    elif run.valid:
        last = run.valid[-1]
        parts.append(Text(f"After step {last['step']:,}: {percent(last['accuracy'])} of the validation questions, "
                          f"reward {last['reward']:.3f}. To evaluate unseen questions, name a test file."))  # fmt: skip
    return Section("headline", None, parts)


def choices(run: RunRecord) -> Section | None:
    """The section of a warmed-up hybrid model's page on its choice of modes."""
    study = run.studies.get("routers")
    return Section("choices", "How it chooses", router_parts(study)) if study else None


def on_screen(study: Study) -> str:
    """The table of routers as text for a terminal."""
    modes = study.facts["modes"]
    names = ["who chooses", "accuracy", "interval", "tokens", "passes", *modes]
    return "\n".join(aligned([names, *(router_cells(row, modes) for row in study.rows)]))


def router_parts(study: Study) -> list[Part]:
    """The model's choice of modes against routers, on test questions: score, sentences and table."""
    model_row, facts, modes = study.rows[0], study.facts, study.facts["modes"]
    questions = describe_questions(facts["questions"], facts.get("seen"))
    shares = ", ".join(f"{mode} for {percent(model_row[f'share_{mode}'])}" for mode in modes)
    names = ["who chooses", "accuracy", "95 % interval", "new tokens", "passes", *(f"share of {m}" for m in modes)]
    return [
        Score(model_row["accuracy"], f"on {questions}", (model_row["low"], model_row["high"]), None),
        Text(
            f"With checkpoint {facts['step']:,} it chooses {shares} of the questions, and takes "
            f"{model_row['new_tokens']:.1f} new tokens and {model_row['passes']:.1f} forward passes an answer. "
            "Compared with routers that choose for it:"
        ),
        Table(names, [router_cells(row, modes) for row in study.rows], len(names) - 1),
        Text(
            "Expected values, on the same questions. At random: each mode as often as the model takes it, independent "
            "of the question. Classifier: a small network on the model's hidden state after the question, fitted on "
            f"{facts['fitted_on']:,} training questions to predict the cheapest mode that is right. Oracle: that mode, "
            "an upper bound."
        ),
    ]


def router_cells(row: dict[str, Any], modes: Sequence[str]) -> list[str]:
    interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
    numbers = [percent(row["accuracy"]), interval, f"{row['new_tokens']:.1f}", f"{row['passes']:.1f}"]
    return [row["router"], *numbers, *(percent(row[f"share_{mode}"]) for mode in modes)]


def learning(run: RunRecord) -> Section:
    modes = modes_of(run)
    parts: list[Part] = [mode_legend(modes), curves_figure([run], "choice")] if modes and run.train else []
    if run.train:
        caption = "Completions sampled in training, and greedy answers to the validation questions."
        parts.append(figure_of(lambda width: reward_curve(run, width), "reward", "Reward over steps.", caption))
    interval = run.config["validate_every"]
    interval *= max(1, -(-run.config["num_steps"] // (10 * interval)))  # about ten rows
    shown = [row for row in run.valid if row["step"] % interval == 0 or row is run.valid[-1]]
    rows = [
        [f"{row['step']:,}", f"{row['reward']:.3f}", percent(row["accuracy"]), f"{row['new_tokens']:.1f}",
         *(percent(row[f"share_{mode}"]) for mode in modes)]
        for row in shown
    ]  # fmt: skip
    columns = ["step", "reward", "accuracy", "new tokens", *(f"share of {mode}" for mode in modes)]
    parts.append(Table(columns, rows, len(columns)))
    if run.train:
        zero_variance = percent(float(np.mean([row["zero_variance_groups"] for row in run.train])))
        has_process_reward = describe_process_reward(run.config.get("process_reward")) != "none"
        effect = "and only the process rewards give a gradient" if has_process_reward else "and give no gradient"
        parts.append(Text(f"In {zero_variance} of the groups all rewards are equal, {effect}."))
        if run.config.get("thought_noise"):
            parts.append(Text(describe_noisy_thoughts(run.train, run.config["thought_noise"])))
    if words_gated := [row for row in run.train if "gate" in row]:
        (gate, share), (first_gate, first_share) = (
            (f"{row['gate']:.3f}", percent(row["latent_share"])) for row in (words_gated[-1], words_gated[0])
        )
        parts.append(
            Text(
                f"The gates keep {gate} of the words of the chain (in the first step {first_gate}); {share} of what is "
                f"fed comes from what was expected ({first_share})."
            )
        )
    return Section("learning", "How it learned", parts)


def provenance(run: RunRecord) -> Section:
    """What exactly was trained: all that is needed to do it again."""
    config, objective = run.config, run.description["objective"]
    reward, noise = config["reward"], config.get("thought_noise", 0.0)
    sampled = f"{config['prompts_per_step']} prompts with {config['group_size']} completions each"
    costs = ", ".join(f"{mode} {cost:g}" for mode, cost in reward["mode_costs"].items()) or "none"
    limits = ", ".join(f"{mode} {limit} tokens" for mode, limit in reward["max_mode_tokens"].items()) or "none"
    scaled = "divided by the deviation of their group" if objective["normalize_advantages"] else "not divided"
    averaged, weight = objective["denominator"].replace("_", " "), objective["control_token_weight"]
    control = "a token like the others" if weight is None else f"a term of its own, of weight {weight}"
    if objective["control_token_scale"] != 1:
        control += f", slowed to {objective['control_token_scale']:g}"
    facts = [
        ("objective", f"{config['objective']['name']}: {averaged}; advantages {scaled}"),
        ("control token", control),
        ("clipping", f"ratios from {1 - objective['clip_low']:g} to {1 + objective['clip_high']:g}"),
        ("divergence", f"weight {config['objective']['kl_coef']:g}, from where it started"),
        ("reward", f"1 when right, less the cost of the mode; otherwise {reward['incorrect_reward']:g}"),
        ("thoughts", f"drawn with noise {noise:g}, and trained like words" if noise else "not drawn"),
        ("process rewards", describe_process_reward(config.get("process_reward"))),
        ("gates", describe_gates(config.get("gates"))),
        ("costs", costs),
        ("limits", limits),
        ("started from", str(run.description["init"])),
        ("parameters", f"{run.description['parameters']:,}"),
        ("steps", f"{run.step:,} of {config['num_steps']:,}, of {sampled}, at temperature {config['temperature']:g}"),
        ("updates a step", str(config["num_minibatches"] * config["num_iterations"])),
        ("optimizer", f"learning rate {config['optimizer']['lr']:g}; {settings_of_adamw(config['optimizer'])}"),
    ]
    return what_was_trained(run, facts, "steps")


def describe_noisy_thoughts(rows: Sequence[dict[str, Any]], noise: float) -> str:
    """The noise beside the thoughts' own dispersion, their norm and how often ratios are clipped, in words."""
    first, last = (f"{noise:g} on a dispersion of {row['thought_dispersion']:.3g}" for row in (rows[0], rows[-1]))
    told = (
        f"Noise of the thoughts: {first} of their own in the first step, {last} in the last; "
        f"their mean norm goes from {rows[0]['thought_norm']:.3g} to {rows[-1]['thought_norm']:.3g}."
    )
    off_policy = [row for row in rows if "thought_clipped" in row]
    if not off_policy:
        return told
    clipped, words = (np.mean([row[f"{name}_clipped"] for row in off_policy]) for name in ("thought", "word"))
    ratio, of_words = (np.mean([row[f"{name}_log_ratio"] for row in off_policy]) for name in ("thought", "word"))
    return (
        f"{told} Clipping takes the gradient of {percent(float(clipped))} of the thoughts and {percent(float(words))} "
        f"of the words; mean log-ratios to sampling: {ratio:.2g} and {of_words:.2g}."
    )


def describe_process_reward(settings: dict[str, Any] | None) -> str:
    """The process reward of a run's configuration in words."""
    if not (settings and settings["weight"]):
        return "none"
    learns = "is updated in each step" if settings["online"] else "is frozen"
    return f"weight {settings['weight']:g}, beta {settings['beta']:g}; the reward model {learns}"


def describe_gates(settings: dict[str, Any] | None) -> str:
    """The gates of a run's configuration in words."""
    if not (settings and settings["enabled"]):
        return "none"
    rates = f"learning rates {settings['lr']:g} and, of Lambda, {settings['lambda_lr']:g}"
    return f"new ones keep {settings['min']:g} to {settings['max']:g} of a word at first; {rates}"
