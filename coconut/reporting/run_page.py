"""The sections of a run's page that need no analysis: result, learning curves, sample answers, settings.

A section is a function from a RunRecord to a Section, or to None if the run has nothing for it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from coconut.data.seen_questions import SEEN_PHRASES, all_seen, describe_questions
from coconut.evaluation.sampling import METRICS, describe_sampling, metrics_in
from coconut.methods import PromptFormat, Stage, get_method
from coconut.reporting import thought_curves
from coconut.reporting.charts import metrics_at_k
from coconut.reporting.page import (
    Answer,
    Answers,
    Aside,
    Code,
    Facts,
    Legend,
    Part,
    Score,
    Section,
    Table,
    Text,
    figure_of,
    page,
)
from coconut.reporting.phrases import between, counted, percent, utc
from coconut.reporting.plots import GRAPH_LEGEND, Band, graph_picture, learning_curves
from coconut.runs.description import CONFIG
from coconut.runs.record import DASH, RunRecord, rows_of_stage
from coconut.utils.console import duration

BINS = 200  # how many points the smoothed training loss has over a whole run
SHOWN_RIGHT, SHOWN_WRONG = 4, 5  # sample answers
TOTALS = ("total_passes", "total_thoughts", "total_new_tokens", "scoring_passes")  # of sampled answers
DRAWN = 2  # graphs drawn of right and of wrong answers


# The sections.


def headline(run: RunRecord) -> Section:
    """The test result, or the command to get one."""
    parts: list[Part] = []
    if run.step < run.description["updates"]:
        parts.append(Text(f"Not complete: update {run.step:,} of {run.description['updates']:,}."))
    if run.test:
        evaluation = run.evaluations[run.test]
        thoughts = _thoughts(run, evaluation)
        what = f"on {describe_questions(evaluation['count'], evaluation.get('seen'))}"
        text = (
            f"{evaluation['correct']:,} of {evaluation['count']:,} right in {Path(evaluation['file']).name}, "
            f"each asked once, with the checkpoint of update {evaluation['step']:,}"
            f"{_checkpoint_note(run, evaluation)}. "
            f"An answer takes {thoughts and f'{thoughts} and '}{evaluation['mean_new_tokens']:.1f} text tokens; "
            f"{percent(evaluation['truncated'])} of the answers were truncated."
        )
        if evaluation["left_out"]:
            text += f" {evaluation['left_out']:,} questions were left out: too long for the model's context."
        score = Score(evaluation["accuracy"], what, evaluation["interval"], evaluation["chance_accuracy"])
        parts += [score, Text(text)]
    else:
        parts += _how_to_test(run)
    other_rows = [_other_evaluation(run, name) for name in run.evaluations if name != run.test]
    if other_rows:
        columns = ["evaluation", "what", "questions", "accuracy"]
        parts += [Text("Other evaluations:"), Table(columns, other_rows, 2)]
    return Section("headline", None, parts)


def _how_to_test(run: RunRecord) -> list[Part]:
    if not run.best:
        why = "It has no test result yet: training has not reached its last stage. This command resumes it:"
        return [Text(why), Code(command(run.description["sessions"][0]["command"]))]
    why = "It has no test result yet."
    if "test" in run.evaluations:
        why = "Its evaluation was on questions that it was trained or validated on, so it is no test result."
    data = run.config["data"]
    has_file = (data["test"] or data["prefix"] or data["build"]) and "test" not in run.evaluations
    file = "" if has_file else " data.test=FILE"
    return [
        Text(f"{why} This command evaluates it on questions that it has never seen:"),
        Code(f"coconut evaluate run={shlex.quote(str(run.folder))}{file}"),
    ]


def _checkpoint_note(run: RunRecord, evaluation: dict[str, Any]) -> str:
    if evaluation["checkpoint"] != "best":
        return f" (checkpoint={evaluation['checkpoint']})"
    if run.best and evaluation["step"] != run.best["step"]:
        return f" (not the best on validation data, which is update {run.best['step']:,})"
    return ", the best on validation data"


def _other_evaluation(run: RunRecord, name: str) -> list[str]:
    evaluation = run.evaluations[name]
    split_of_file = {row["sha256"]: split for split, row in run.description["data"].items()}
    thoughts = _thoughts(run, evaluation)
    what = f"{Path(evaluation['file']).name}, update {evaluation['step']:,}" + (f", {thoughts}" if thoughts else "")
    if split := split_of_file.get(evaluation["sha256"]):
        reason = {"valid": "the file that chose the checkpoint", "train": "the file it was trained on"}[split]
        what += f"; {reason}, so no test result"
    elif split := all_seen(evaluation):
        what += f"; questions {SEEN_PHRASES[split]}, so no test result"
    elif evaluation.get("seen") and any(evaluation["seen"].values()):
        what += f"; {describe_questions(evaluation['count'], evaluation['seen'])}"
    return [name, what, f"{evaluation['count']:,}", percent(evaluation["accuracy"])]


def _thoughts(run: RunRecord, evaluation: dict[str, Any]) -> str:
    """A phrase with the mean number of thoughts or pause tokens of an answer; empty if the method has none."""
    last = run.stages[-1].form
    if last.slot.is_empty:
        return ""
    return counted(evaluation["num_thoughts"] if last.slot.thinks else last.slot_length, last.slot.noun)


def sampled(run: RunRecord) -> Section | None:
    """pass@k, maj@k and best@k of the evaluations that sampled several answers to each question."""
    found = {name: row for name, row in run.evaluations.items() if "sampling" in row}
    if not found:
        return None
    curves = [
        (f"{row['split']}: {describe_sampling(row['sampling'])}", row["sampling"]["at_k"])
        for row in found.values()
        if row["sampling"]["samples"] > 1
    ]
    caption = (
        "pass@k: one or more of k answers is right. maj@k: the most frequent of k answers is right; answers that "
        "cannot be read have no vote, and tied ones are equally likely to be taken. best@k: the one of k answers with "
        "the largest reward is right. All are expectations over all draws of k of the sampled answers. The wide bars "
        "are 95 % bootstrap intervals over questions."
    )
    alt = "pass@k, maj@k and best@k over k; the numbers are in the table below."
    figure = [figure_of(partial(metrics_at_k, curves), "metrics_at_k", alt, caption)] if curves else []
    rows = [
        [name, str(row["k"]), *chain(*(_at_k(row, metric) for metric in METRICS))]
        for name, one in found.items() for row in one["sampling"]["at_k"]
    ]  # fmt: skip
    costs = [
        [name, describe_sampling(one["sampling"]), f"{one['count'] * one['sampling']['samples']:,}",
         percent(one["sampling"]["unreadable"]), *(f"{one['sampling'].get(key, 0):,}" for key in TOTALS)]
        for name, one in found.items()
    ]  # fmt: skip
    table = Table(["evaluation", "k", *chain(*((f"{name}@k", "95 % interval") for name in METRICS))], rows, 7)
    cost = Table(
        ["evaluation", "sampling", "answers", "unreadable", "forward passes", "thoughts", "text tokens",
         "passes of the reward"], costs, 6,
    )  # fmt: skip
    parts: list[Part] = [*figure, Aside("The numbers", [table]), cost]
    if len(curves) > 1:
        told = Text("This command compares them at equal forward passes:")
        parts += [told, Code(f"coconut analyze table runs={shlex.quote(str(run.folder))} sampled='*'")]
    return Section("sampled", "Several answers to a question", parts)


def _at_k(row: dict[str, Any], metric: str) -> list[str]:
    """A metric and its interval in the words of the table; dashes if the evaluation does not have it."""
    if metric not in metrics_in(row):
        return [DASH, DASH]
    return [percent(row[f"{metric}_at_k"]), between(*row[f"{metric}_interval"])]


def learning(run: RunRecord) -> Section:
    """Accuracy and losses over updates, as curves and for each stage."""
    bin_size = max(1, -(-run.description["updates"] // BINS))
    weights = run.description["plan"]["terms"]
    terms = [f"term_{name}" for name in weights] if run.train and len(weights) > 1 else []
    curves = {key: [smoothed(rows_of_stage(run.train, stage), bin_size, key) for stage in run.stages]
              for key in ("loss", *terms)}  # fmt: skip
    draw = partial(
        learning_curves,
        bands=_bands(run),
        accuracy=[(row["step"], row["accuracy"]) for row in run.valid],
        train_loss=[*chain(*curves["loss"])],
        valid_loss=[(row["step"], row["loss"]) for row in run.valid],
        chance_accuracy=run.chance_accuracy,
        best=(run.best["step"], run.best["accuracy"]) if run.best else None,
        terms={key.removeprefix("term_"): [*chain(*curves[key])] for key in terms},
    )
    mean = f"the mean of each {bin_size} updates" if bin_size > 1 else "of each update"
    caption = (
        "Validation uses the layout of the current stage: the model writes the steps that thoughts do not replace. "
        f"Losses of different stages are over different targets. Training loss: {mean}."
    )
    if terms:
        total = " + ".join(name if weight == 1 else f"{weight:g} · {name}" for name, weight in weights.items())
        caption += f" It is {total}; terms are drawn without their weights. Validation loss: written tokens alone."
    if run.best:
        caption += f" The ring marks the best checkpoint, update {run.best['step']:,}."
    alt = "Accuracy on validation data and losses over updates; the stages' numbers are in the table below."
    rows = [_stage_row(run, stage, points) for stage, points in zip(run.stages, curves["loss"], strict=True)]
    columns = ["stage", "layout of an example", "updates", "best accuracy", "last accuracy", "training loss",
               "validation loss", "training time"]  # fmt: skip
    note = "Accuracies are on validation data. Losses are the last of the stage. Times include updates only."
    figure = figure_of(draw, "learning", alt, caption)
    return Section("learning", "How it learned",
                   [figure, Table(columns, rows, 6), Text(note), *thought_curves.parts(run, _bands(run))])  # fmt: skip


def _bands(run: RunRecord) -> list[Band]:
    bands, begin = [], 0
    for stage in run.stages:
        slot = stage.form.slot
        detail = "" if slot.is_empty or slot.merges else counted(stage.form.slot_length, slot.noun)
        bands.append(Band(f"stage {stage.index}", detail, begin, begin := begin + run.updates(stage)))
    return bands


def _stage_row(run: RunRecord, stage: Stage, binned: list[tuple[float, float]]) -> list[str]:
    train, valid = rows_of_stage(run.train, stage), rows_of_stage(run.valid, stage)
    of = "" if len(train) == run.updates(stage) else f" of {run.updates(stage):,}"
    return [
        str(stage.index),
        stage.describe(),
        f"{len(train):,}{of}",
        percent(max(row["accuracy"] for row in valid)) if valid else DASH,
        percent(valid[-1]["accuracy"]) if valid else DASH,
        f"{binned[-1][1]:.3f}" if binned else DASH,
        f"{valid[-1]['loss']:.3f}" if valid else DASH,
        duration(sum(row["seconds"] for row in train)) if train else DASH,
    ]


def smoothed(rows: Sequence[dict[str, Any]], bin_size: int, key: str = "loss") -> list[tuple[float, float]]:
    """The mean loss, or one term of it, per target over each `bin_size` updates, as (middle update, value)."""
    points = []
    for part in (rows[i : i + bin_size] for i in range(0, len(rows), bin_size)):
        loss, targets = sum(row[key] * row["targets"] for row in part), sum(row["targets"] for row in part)
        points.append(((part[0]["step"] + part[-1]["step"]) / 2, loss / max(targets, 1)))
    return points


def answers(run: RunRecord) -> Section:
    """Sample answers, right and wrong."""
    title = "Sample answers"
    parts: list[Part] = [Text(run.answers_of)]
    if not run.answers:
        return Section("answers", title, [Text("None yet. The first ones are written in the first validation.")])
    drawn = False
    for correct, limit, name in [(True, SHOWN_RIGHT, "right"), (False, SHOWN_WRONG, "wrong")]:
        rows = [row for row in run.answers if row["correct"] is correct]
        shown = [_answer(run, row, f"{name}{i}" if i < DRAWN else None) for i, row in enumerate(rows[:limit])]
        drawn = drawn or any(answer.picture for answer in shown)
        count = f"all {len(rows)}" if len(rows) <= limit else f"the first {limit} of {len(rows):,}"
        if shown:
            parts.append(Answers(f"{name.capitalize()}, {count}", shown))
        else:
            parts.append(Text(f"None of them is {name}."))
    if drawn:
        parts.insert(1, Legend(GRAPH_LEGEND))
    return Section("answers", title, parts)


def _answer(run: RunRecord, row: dict[str, Any], picture: str | None) -> Answer:
    draws = run.config["data"]["task"] == "prosqa"
    bare = PromptFormat.fill(run.config["data"]["format"]["answer"], row["predicted"] or "")
    return Answer(
        question=row["question"].strip(),
        predicted=DASH if row["predicted"] is None else row["predicted"],
        gold=row["gold"],
        correct=row["correct"],
        written="" if "".join(row["text"].split()) == "".join(bare.split()) else row["text"].strip(),
        remark="truncated at the limit of new tokens" if row["truncated"] else "",
        picture=graph_picture(row["question"], row["gold"], picture) if draws and picture else None,
    )


def provenance(run: RunRecord) -> Section:
    """The settings of the run, and all that is needed to reproduce it."""
    config, description = run.config, run.description
    optimizer = config["optimizer"]
    micro = f", {config['micro_batch_size']} in a micro-batch" if config["micro_batch_size"] else ""
    warmup = f", after {optimizer['warmup_steps']:,} updates of warm-up" if optimizer["warmup_steps"] else ""
    training_only = description.get("training_only_parameters", 0)
    and_training_only = f", and {training_only:,} that only training needs" if training_only else ""
    facts = [
        ("method", f"{config['method']}: {get_method(config['method']).summary}"),
        ("task", config["data"]["task"]),
        ("model", _model(description, config["model"])),
        ("parameters", f"{description['parameters']:,}{and_training_only}"),
        ("updates", f"{run.step:,} of {description['updates']:,}"),
        ("an epoch", f"{description['updates_per_epoch']:,} updates"),
        ("batch size", f"{config['batch_size']} examples an update{micro}"),
        ("learning rate", f"{optimizer['lr']:g}{warmup}"),
        ("optimizer", settings_of_adamw(optimizer)),
    ]
    return what_was_trained(run, facts, "updates")


def what_was_trained(run: RunRecord, facts: list[tuple[str, str]], unit: str) -> Section:
    """A section with these facts and those of every run: machine, versions, code, data and command.

    `unit`: the noun for what the run counts, such as "updates".
    """
    config, description = run.config, run.description
    first, *resumed_sessions = description["sessions"]
    last = description["sessions"][-1]
    machine = last["machine"]
    facts = [
        *facts,
        ("seed", str(config["seed"])),
        ("precision", config["engine"]["precision"]),
        ("machine", f"{machine['gpu'] or 'CPU'}, {machine['cpus']} cores, {machine['threads']} threads"),
        ("system", machine["system"]),
        ("versions", describe_versions(last)),
        ("code", describe_revision(last)),
        ("began", utc(first["started"])),
        ("total time", f"{duration(sum(row['seconds'] for row in run.train))} of {unit}"),
    ]
    if resumed_sessions:
        resumed = ", ".join(f"after {row['from_step']:,} {unit} ({utc(row['started'])})" for row in resumed_sessions)
        facts.append(("resumed", resumed))
    data = data_table(description["data"].items(), run.evaluations[run.test] if run.test else None)
    everything = Aside(f"Everything in {CONFIG}", [Code(json.dumps(config, indent=2, ensure_ascii=False))])
    parts = [Facts(facts), data, Text("The command:"), Code(command(first["command"])), everything]
    return Section("provenance", "What exactly was trained", parts)


def data_table(trained: Iterable[tuple[str, dict[str, Any]]], test: dict[str, Any] | None) -> Table:
    """The files of training, by split, and that of the test result."""
    rows = [(split, row, row["used"]) for split, row in trained]
    rows += [("test", test, test["count"])] if test else []
    cells = [[split, row["file"], f"{used:,}", row["sha256"][:12]] for split, row, used in rows]
    return Table(["data", "file", "questions", "SHA-256 begins"], cells, 2)


def command(argv: str) -> str:
    """The command as it is typed, with the path of the module replaced by `coconut COMMAND`."""
    program, space, rest = argv.partition(" ")
    path = Path(program)
    if path.suffix == ".py" and path.parent.name == "coconut":
        program = f"coconut {path.stem}"
    elif path.name == "__main__.py":
        program = f"coconut {path.parent.name}"
    return program + space + rest


def _model(description: dict[str, Any], model: dict[str, Any]) -> str:
    if description["init"]:
        return f"{description['model_type']}, weights and tokenizer of {description['init']}"
    if model["base"]:
        return f"{model['base']}, pretrained"
    sizes = ", ".join(f"{key} {value}" for key, value in model["architecture"].items() if key != "model_type")
    return f"a new {model['architecture']['model_type']}: {sizes}, randomly initialized"


def settings_of_adamw(optimizer: dict[str, Any]) -> str:
    clip = f"clipping at {optimizer['max_grad_norm']:g}" if optimizer["max_grad_norm"] else "no clipping"
    reset = optimizer.get("reset_every", "never")
    reset_phrase = "" if reset == "never" else f", reset every {reset}"
    betas = f"betas {optimizer['beta1']:g} and {optimizer['beta2']:g}"
    return f"AdamW, {betas}, weight decay {optimizer['weight_decay']:g}, {clip}{reset_phrase}"


def describe_versions(session: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in session["versions"].items() if number)


def describe_revision(session: dict[str, Any]) -> str:
    if not (git := session["git"]):
        return "git revision unknown"
    return f"git {git['revision'][:12]}" + (", with uncommitted changes" if git["changed"] else "")


def report(run: RunRecord, sections: Iterable[Callable[[RunRecord], Section | None]]) -> str:
    """Render the page with these sections, in this order. A section that is None is left out."""
    method = run.config["method"]
    shown = [shown for section in sections if (shown := section(run))]
    return page(run.description["name"], method, get_method(method).summary, run.folder, shown)
