"""The model card (README.md) of an exported model: what it is, how to use it, its training and its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.seen_questions import describe_questions
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import around_questions
from coconut.methods import Projector, PromptFormat, Reasoning, Source
from coconut.models.feedback import WEIGHTS_FILE
from coconut.runs.description import DESCRIPTION, read_config, read_results
from coconut.utils.files import read_json

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def card(lm: LatentLM, run: Path | str | None = None, step: int | None = None, name: str = "") -> str:
    """The model card in Markdown. With a run, it includes the training and results of the checkpoint at `step`.

    `name`: OWNER/NAME on the hub if the model is uploaded.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    reasoning, special = lm.reasoning, lm.special
    kinds = {Source.thought: "continuous thoughts", Source.pause: "pauses"}
    kind = kinds.get(reasoning.slot.source)
    between = f"{reasoning.num_thoughts} {kind}" if kind else "nothing"
    if reasoning.slot.merges:
        between = f"at most {between}, which the model ends itself"
    if reasoning.modes:
        between = f"what its mode needs, which it chooses with its first token: {', '.join(reasoning.modes)}"
    start, after = around_questions(lm.tokenizer, reasoning.format)

    def slot(form: Reasoning) -> list[int]:  # up to the first thought
        if form.slot.thinks:
            return [special.bot]
        return slot_with_markers(form, special, form.num_thoughts).tolist()

    forms = {special.control[mode]: reasoning.in_mode(mode) for mode in reasoning.modes}
    return environment.get_template("card.md.j2").render(
        reasoning=reasoning, place=name or "THIS FOLDER", model_type=lm.base.config.model_type, between=between,
        correction=lm.adapter is not None, thinks=reasoning.slot.thinks, in_parallel=reasoning.slot.in_parallel,
        merges=reasoning.slot.merges,
        modes={control: (slot(form), form.num_thoughts) for control, form in forms.items()},
        projected=_sizes(lm), feedback_file=WEIGHTS_FILE, start=start,
        before_slot=[*after, *slot(reasoning)], special=special,
        content=_content(lm),
        question=repr(PromptFormat.fill(reasoning.format.question, "a question")),
        run=None if run is None else _run_facts(run, step),
    )  # fmt: skip


def _content(lm: LatentLM) -> str:
    """What its thoughts are made of, in words; empty if it is the last hidden state, or if it has no thoughts."""
    slot = lm.feedback.slot
    if slot.read_by_head or slot.merges or not any(form.slot.thinks for form in lm.reasoning.forms()):
        return ""
    return slot.describe()


def _sizes(lm: LatentLM) -> tuple[int, int] | None:
    """The width of a thought and of the projector of its thoughts; None if it has none of them."""
    slot = lm.feedback.slot
    if slot.projector is Projector.none or not any(form.slot.thinks for form in lm.reasoning.forms()):
        return None
    return lm.thought_size, slot.width or lm.thought_size


def _run_facts(run: Path | str, step: int | None) -> dict[str, Any]:
    record = read_json(Path(run) / DESCRIPTION)
    results = {name: result for name, result in read_results(run).items() if result["step"] == step}
    for result in results.values():
        was_seen = any((result.get("seen") or {}).values())
        result["seen_note"] = describe_questions(result["count"], result["seen"]) if was_seen else ""
    files = [{**file, "name": Path(file["file"]).name} for file in record["data"].values()]
    return {**record, "step": step, "config": read_config(run), "files": files, "results": results,
            "session": record["sessions"][-1]}  # fmt: skip
