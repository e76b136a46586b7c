"""What a run's folder holds, and the sections of a page that are made from it.

A section is a function from a RunRecord to a Section, a title and parts, or to None.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coconut.data.seen_questions import SEEN_PHRASES, all_seen, describe_questions
from coconut.methods import Slot, Stage, get_method
from coconut.reporting.page import (
    Answer,
    Answers,
    Code,
    Facts,
    Figure,
    Folded,
    Legend,
    Part,
    Score,
    Section,
    Table,
    Text,
    page,
    percent,
)
from coconut.reporting.plots import Band, Curves, graph_picture, learning_curves
from coconut.runs.description import CONFIG
from coconut.runs.record import DASH, RunRecord, _in_stage
from coconut.utils.console import duration

BINS = 200  # points of the smoothed training loss, over a whole run
SHOWN_RIGHT, SHOWN_WRONG, DRAWN = 4, 5, 2  # sample answers, and graphs drawn of each


# What is read.


# The sections.


def headline(run: RunRecord) -> Section:
    """How good it is: the test result, or how to get one."""
    parts: list[Part] = []
    if run.step < run.description["updates"]:
        parts.append(Text(f"Not complete: update {run.step:,} of {run.description['updates']:,}."))
    if run.test:
        found = run.evaluations[run.test]
        thoughts = _thoughts(run, found)
        takes = f"{thoughts} and " if thoughts else ""
        what = f"on {describe_questions(found['count'], found.get('seen'))}"
        text = (
            f"{found['correct']:,} of {found['count']:,} right in {Path(found['file']).name}, "
            f"each asked once, with the checkpoint of update {found['step']:,}{_choice(run, found)}. "
            f"An answer takes {takes}{found['mean_new_tokens']:.1f} tokens of language; "
            f"{percent(found['truncated'])} were cut off."
        )
        if found["left_out"]:
            text += f" {found['left_out']:,} questions were left out, too long for the model's context."
        parts += [Score(found["accuracy"], what, found["interval"], found["chance_accuracy"]), Text(text)]
    else:
        parts += _how_to_test(run)
    others = [_other(run, name) for name in run.evaluations if name != run.test]
    if others:
        columns = ["evaluation", "what", "questions", "accuracy"]
        parts += [Text("Evaluated besides:"), Table(columns, others, 2)]
    return Section("headline", None, parts)


def _how_to_test(run: RunRecord) -> list[Part]:
    if not run.best:
        why = "It has no test result yet: training has not reached its last stage. This goes on with it:"
        return [Text(why), Code(command(run.description["sessions"][0]["command"]))]
    why = "It has no test result yet."
    if "test" in run.evaluations:
        why = "Its evaluation was on questions that it was trained or validated on, which is no test."
    data = run.config["data"]
    ready = (data["test"] or data["prefix"] or data["build"]) and "test" not in run.evaluations
    file = "" if ready else " data.test=FILE"
    return [
        Text(f"{why} This measures it on questions that it has never seen:"),
        Code(f"coconut evaluate run={shlex.quote(str(run.folder))}{file}"),
    ]


def _choice(run: RunRecord, found: dict[str, Any]) -> str:
    if found["checkpoint"] != "best":
        return f" (checkpoint={found['checkpoint']})"
    if run.best and found["step"] != run.best["step"]:
        return f" (no longer the best on validation data: that is update {run.best['step']:,})"
    return ", the best on validation data"


def _other(run: RunRecord, name: str) -> list[str]:
    found = run.evaluations[name]
    seen = {row["sha256"]: split for split, row in run.description["data"].items()}
    thoughts = _thoughts(run, found)
    what = f"{Path(found['file']).name}, update {found['step']:,}" + (f", {thoughts}" if thoughts else "")
    if split := seen.get(found["sha256"]):
        reason = {"valid": "the file that chose the checkpoint", "train": "the file it was trained on"}[split]
        what += f"; {reason}, so no test result"
    elif split := all_seen(found):
        what += f"; questions {SEEN_PHRASES[split]}, so no test result"
    elif found.get("seen") and any(found["seen"].values()):
        what += f"; {describe_questions(found['count'], found['seen'])}"
    return [name, what, f"{found['count']:,}", percent(found["accuracy"])]


def _thoughts(run: RunRecord, found: dict[str, Any]) -> str:
    """How many thoughts or pauses an answer took, in words; empty if the method has none."""
    last = run.stages[-1]
    if last.slot is Slot.none:
        return ""
    return counted(found["num_thoughts"] if last.slot is Slot.thought else last.num_thoughts, last.slot.value)


def learning(run: RunRecord) -> Section:
    """How it learned: accuracy and losses over updates, stage by stage."""
    every = max(1, -(-run.description["updates"] // BINS))
    smooth = {stage.index: smoothed(_in_stage(run.train, stage), every) for stage in run.stages}
    curves = Curves(
        bands=_bands(run),
        accuracy=[(row["step"], row["accuracy"]) for row in run.valid],
        train_loss=[point for points in smooth.values() for point in points],
        valid_loss=[(row["step"], row["loss"]) for row in run.valid],
        guess=run.chance_accuracy,
        best=(run.best["step"], run.best["accuracy"]) if run.best else None,
    )
    mean = f"the mean of each {every} updates" if every > 1 else "of each update"
    caption = (
        "Validation asks each question as the stage has it: what the stage does not replace, the model "
        f"writes. Losses of different stages are over different targets. Training loss: {mean}."
    )
    if run.best:
        caption += f" The ring is the best checkpoint, update {run.best['step']:,}."
    figure = Figure(
        learning_curves(curves, 720, "wide"),
        learning_curves(curves, 350, "narrow"),
        "Accuracy on validation data and losses over updates; the stages' numbers are in the table below.",
        caption,
    )
    rows = [_stage_row(run, stage, smooth[stage.index]) for stage in run.stages]
    columns = ["stage", "an example in it", "updates", "best accuracy", "last accuracy", "training loss",
               "validation loss", "training time"]  # fmt: skip
    note = "Accuracies are on validation data; losses are the stage's last; times are of the updates alone."
    return Section("learning", "How it learned", [figure, Table(columns, rows, 6), Text(note)])


def _bands(run: RunRecord) -> list[Band]:
    bands, begin = [], 0
    for stage in run.stages:
        detail = "" if stage.slot is Slot.none else counted(stage.num_thoughts, stage.slot.value)
        bands.append(Band(f"stage {stage.index}", detail, begin, begin + run.updates(stage)))
        begin += run.updates(stage)
    return bands


def _stage_row(run: RunRecord, stage: Stage, smooth: list[tuple[float, float]]) -> list[str]:
    train, valid = _in_stage(run.train, stage), _in_stage(run.valid, stage)
    of = "" if len(train) == run.updates(stage) else f" of {run.updates(stage):,}"
    return [
        str(stage.index),
        stage.describe(),
        f"{len(train):,}{of}",
        percent(max(row["accuracy"] for row in valid)) if valid else DASH,
        percent(valid[-1]["accuracy"]) if valid else DASH,
        f"{smooth[-1][1]:.3f}" if smooth else DASH,
        f"{valid[-1]['loss']:.3f}" if valid else DASH,
        duration(sum(row["seconds"] for row in train)) if train else DASH,
    ]


def smoothed(rows: Sequence[dict[str, Any]], every: int) -> list[tuple[float, float]]:
    """The mean loss a target over each `every` updates, at the middle of them."""
    parts = [rows[i : i + every] for i in range(0, len(rows), every)]
    return [
        (
            (part[0]["step"] + part[-1]["step"]) / 2,
            sum(row["loss"] * row["targets"] for row in part) / max(sum(row["targets"] for row in part), 1),
        )
        for part in parts
    ]


def answers(run: RunRecord) -> Section:
    """Some of its answers, right and wrong ones."""
    if not run.answers:
        none = Text("None yet: the first ones come with the first validation.")
        return Section("answers", "Sample answers", [none])
    parts: list[Part] = [Text(run.answers_of)]
    drawn = False
    for correct, most, name in [(True, SHOWN_RIGHT, "right"), (False, SHOWN_WRONG, "wrong")]:
        found = [row for row in run.answers if row["correct"] is correct]
        shown = [_answer(run, row, f"{name}{i}" if i < DRAWN else None) for i, row in enumerate(found[:most])]
        drawn = drawn or any(answer.picture for answer in shown)
        count = f"all {len(found)}" if len(found) <= most else f"the first {most} of {len(found):,}"
        if shown:
            parts.append(Answers(f"{name.capitalize()}, {count}", shown))
        else:
            parts.append(Text(f"None of them is {name}."))
    if drawn:
        colours = [
            ("blue", "where the question starts"),
            ("green", "right answer and the shortest way to it"),
            ("red", "wrong option"),
        ]
        parts.insert(1, Legend(colours))
    return Section("answers", "Sample answers", parts)


def _answer(run: RunRecord, row: dict[str, Any], picture: str | None) -> Answer:
    draws = picture and run.config["data"]["task"] == "prosqa"
    bare = run.config["data"]["format"]["answer"].format(row["predicted"])
    return Answer(
        question=row["question"].strip(),
        given=DASH if row["predicted"] is None else row["predicted"],
        gold=row["gold"],
        correct=row["correct"],
        written="" if "".join(row["text"].split()) == "".join(bare.split()) else row["text"].strip(),
        remark="cut off at the limit of new tokens" if row["truncated"] else "",
        picture=graph_picture(row["question"], row["gold"], picture) if draws and picture else None,
    )


def provenance(run: RunRecord) -> Section:
    """What exactly was trained: all that is needed to do it again."""
    config, description = run.config, run.description
    optimizer = config["optimizer"]
    micro = f", {config['micro_batch_size']} a pass" if config["micro_batch_size"] else ""
    warmup = f", after {optimizer['warmup_steps']:,} updates of warm-up" if optimizer["warmup_steps"] else ""
    facts = [
        ("method", f"{config['method']}: {get_method(config['method']).summary}"),
        ("task", config["data"]["task"]),
        ("model", _model(description, config["model"])),
        ("parameters", f"{description['parameters']:,}"),
        ("updates", f"{run.step:,} of {description['updates']:,}"),
        ("an epoch", f"{description['updates_per_epoch']:,} updates"),
        ("batch size", f"{config['batch_size']} examples an update{micro}"),
        ("learning rate", f"{optimizer['lr']:g}{warmup}"),
        ("optimizer", settings_of_adamw(optimizer)),
    ]
    return what_was_trained(run, facts, "updates")


def what_was_trained(run: RunRecord, facts: list[tuple[str, str]], units: str) -> Section:
    """These facts, and those that every run has: where, with which code and data, by which command."""
    config, description = run.config, run.description
    first, *again = description["sessions"]
    last = description["sessions"][-1]
    machine = last["machine"]
    facts = [
        *facts,
        ("seed", str(config["seed"])),
        ("precision", config["engine"]["precision"]),
        ("machine", f"{machine['gpu'] or 'CPU'}, {machine['cpus']} cores, {machine['threads']} threads"),
        ("system", machine["system"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in last["versions"].items() if number)),
        ("code", _code(last["git"])),
        ("began", _date(first["started"])),
        ("time in all", f"{duration(sum(row['seconds'] for row in run.train))} of {units}"),
    ]
    if again:
        resumed = ", ".join(f"after {row['from_step']:,} {units} ({_date(row['started'])})" for row in again)
        facts.append(("resumed", resumed))
    data = [[split, row["file"], f"{row['used']:,}", row["sha256"][:12]] for split, row in description["data"].items()]
    if run.test:
        found = run.evaluations[run.test]
        data.append(["test", found["file"], f"{found['count']:,}", found["sha256"][:12]])
    return Section(
        "provenance",
        "What exactly was trained",
        [
            Facts(facts),
            Table(["data", "file", "questions", "SHA-256 begins"], data, 2),
            Text("The command:"),
            Code(command(first["command"])),
            Folded(f"Everything in {CONFIG}", json.dumps(config, indent=2, ensure_ascii=False)),
        ],
    )


def command(argv: str) -> str:
    """A command as it is typed: the path of the module that ran becomes its name."""
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
    return _made_new(model["architecture"]) + "; weights drawn at random"


def _made_new(architecture: dict[str, Any]) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in architecture.items() if key != "model_type")
    return f"a new {architecture['model_type']}: {sizes}"


def settings_of_adamw(optimizer: dict[str, Any]) -> str:
    clip = f"clipping at {optimizer['max_grad_norm']:g}" if optimizer["max_grad_norm"] else "no clipping"
    reset = optimizer.get("reset_every", "never")
    made = "" if reset == "never" else f", made anew each {reset}"
    betas = f"betas {optimizer['beta1']:g} and {optimizer['beta2']:g}"
    return f"AdamW, {betas}, weight decay {optimizer['weight_decay']:g}, {clip}{made}"


def _code(git: dict[str, Any] | None) -> str:
    if not git:
        return "git revision not known"
    return f"git {git['revision'][:12]}" + (", changed since" if git["changed"] else "")


def _date(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def counted(count: float, noun: str) -> str:
    return f"{count:.3g} {noun}{'s' * (count != 1)}"


def report(run: RunRecord, sections: Iterable[Callable[[RunRecord], Section | None]]) -> str:
    """The page with these sections, in their order; one that is None has nothing to say of this run."""
    method = run.config["method"]
    made = [made for section in sections if (made := section(run))]
    return page(run.description["name"], method, get_method(method).summary, run.folder, made)
