"""The model card (README.md) of an exported model: what it is, how to use it, its training and its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.seen_questions import describe_questions
from coconut.data.tokenization import around_questions, encode_questions
from coconut.methods import PromptFormat, Source
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
    reasoning = lm.reasoning
    kinds = {Source.thought: "continuous thoughts", Source.pause: "pauses"}
    kind = kinds.get(reasoning.slot.source)
    between = f"{reasoning.num_thoughts} {kind}" if kind else "nothing"
    if reasoning.slot.merges:
        between = f"at most {between}, which the model ends itself"
    if reasoning.modes:
        between = f"what its mode needs, which it chooses with its first token: {', '.join(reasoning.modes)}"
    return environment.get_template("card.md.j2").render(
        reasoning=reasoning, place=name or "THIS FOLDER", model_type=lm.base.config.model_type, between=between,
        correction=lm.adapter is not None, modes=reasoning.modes, inputs=_inputs(lm),
        run=None if run is None else _run_facts(run, step),
    )  # fmt: skip


def _inputs(lm: LatentLM) -> str:
    """Python code that makes the inputs of a question from its text, with `tokenizer`."""
    question = PromptFormat.fill(lm.reasoning.format.question, "a question")
    tokenizer: Any = lm.tokenizer
    if lm.reasoning.format.chat:
        messages = [{"role": "user", "content": question}]
        options = "add_generation_prompt=True, return_dict=True"
        code = f'tokenizer.apply_chat_template({messages}, {options}, return_tensors="pt")'
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        code, made = f'tokenizer({question!r}, return_tensors="pt")', tokenizer(question)["input_ids"]
    if [made] == encode_questions(tokenizer, ["a question"], lm.reasoning.format):
        return code
    start, after = around_questions(tokenizer, lm.reasoning.format)
    ids = f'tokenizer({question!r}, add_special_tokens=False)["input_ids"]'
    return f'{{"input_ids": torch.tensor([{start} + {ids} + {after}])}}'


def _run_facts(run: Path | str, step: int | None) -> dict[str, Any]:
    record = read_json(Path(run) / DESCRIPTION)
    results = {name: result for name, result in read_results(run).items() if result["step"] == step}
    for result in results.values():
        was_seen = any((result.get("seen") or {}).values())
        result["seen_note"] = describe_questions(result["count"], result["seen"]) if was_seen else ""
    files = [{**file, "name": Path(file["file"]).name} for file in record["data"].values()]
    return {**record, "step": step, "config": read_config(run), "files": files, "results": results,
            "session": record["sessions"][-1]}  # fmt: skip
