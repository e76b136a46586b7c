"""The model card (README.md) of an exported model: what it is, how to use it, its training and its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.seen_questions import describe_questions
from coconut.data.sequences import slot_with_markers
from coconut.data.tokenization import around_questions
from coconut.methods import PromptFormat, Source
from coconut.runs.description import DESCRIPTION, read_config, read_results
from coconut.utils.files import read_json

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

TEMPLATE = "card.md.j2"


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
    between = f"{reasoning.num_thoughts} {kinds[reasoning.slot.source]}" if reasoning.slot.source in kinds else "nothing"
    if reasoning.modes:
        between = f"what its mode needs, which it chooses with its first token: {', '.join(reasoning.modes)}"
    start, after = around_questions(lm.tokenizer, reasoning.format)
    modes = {}  # by control token: the tokens that follow it, and the number of thoughts
    for name_of_mode in reasoning.modes:
        form = reasoning.in_mode(name_of_mode)
        follows = (
            [special.bot] if form.slot.source is Source.thought else slot_with_markers(form, special, form.num_thoughts).tolist()
        )
        modes[special.control[name_of_mode]] = follows, form.num_thoughts
    thinks = reasoning.slot.source is Source.thought
    slot = [special.bot] if thinks else slot_with_markers(reasoning, special, reasoning.num_thoughts).tolist()
    return environment.get_template(TEMPLATE).render(
        reasoning=reasoning,
        place=name or "THIS FOLDER",
        model_type=lm.base.config.model_type,
        between=between,
        correction=lm.adapter is not None,
        thinks=thinks,
        modes=modes,
        start=start,
        before_slot=[*after, *slot],
        question=repr(PromptFormat.fill(reasoning.format.question, "a question")),
        special=special,
        run=None if run is None else _run_facts(run, step),
    )


def _run_facts(run: Path | str, step: int | None) -> dict[str, Any]:
    record = read_json(Path(run) / DESCRIPTION)
    results = {name: found for name, found in read_results(run).items() if found["step"] == step}
    for found in results.values():
        was_checked = any((found.get("seen") or {}).values())
        found["seen_note"] = describe_questions(found["count"], found["seen"]) if was_checked else ""
    files = [{**file, "name": Path(file["file"]).name} for file in record["data"].values()]
    return {**record, "step": step, "config": read_config(run), "files": files, "results": results,
            "session": record["sessions"][-1]}  # fmt: skip
