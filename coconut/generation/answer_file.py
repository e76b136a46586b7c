"""Answer the questions of a file. The answers are JSON lines, printed or written to another file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.data.tokenization import encode_questions, unknown_in
from coconut.generation.config import GenerateConfig
from coconut.generation.generate import generate, logit_lens, longest_first, pad_rows
from coconut.generation.room import room_for_question
from coconut.generation.terminal import note
from coconut.utils.files import write_text

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def answer_file(lm: LatentLM, questions: Sequence[str], config: GenerateConfig, options: dict[str, Any]) -> None:
    """Answer the questions and write one JSON object per line, in the order of the questions.

    Raises ValueError if a question leaves no room for an answer in the context.
    """
    encoded = encode_questions(lm.tokenizer, questions, lm.reasoning.format)
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    if len(encoded[longest]) > room_for_question(lm, config.num_thoughts, config.mode, options.get("soft_thinking")):
        raise ValueError(
            f"{config.file}, question {longest + 1}: it has {len(encoded[longest])} tokens, which leaves no room for "
            f"an answer in the model's context of {lm.max_sequence_length} tokens."
        )
    answers: dict[int, dict[str, Any]] = {}
    for indices in longest_first(encoded, config.batch_size):
        out = generate(lm, *pad_rows([encoded[i] for i in indices], lm.special.pad), **options)
        for row, i in enumerate(indices):
            answers[i] = {
                "question": questions[i],
                "text": out.texts[row].strip(),
                "truncated": bool(out.truncated[row]),
                "num_thoughts": int(out.num_thoughts[row]),
            }
            if out.modes[row]:
                answers[i]["mode"] = out.modes[row]
            if config.show_thoughts:
                answers[i]["thoughts"] = logit_lens(lm, out.thoughts[row][: int(out.num_thoughts[row])])
    write_answers(lm, [answers[i] for i in range(len(questions))], config.output)


def write_answers(lm: LatentLM, rows: Sequence[dict[str, Any]], output: str) -> None:
    """Write the answers to a file, or print them. Words of a question outside the vocabulary are added as `unknown`."""
    words = [unknown_in(lm.tokenizer, row["question"]) for row in rows]
    rows = [{**row, **({"unknown": unknown} if unknown else {})} for row, unknown in zip(rows, words, strict=True)]
    if affected := [number for number, unknown in enumerate(words) if unknown]:
        note(
            f"warning: {len(affected)} of {len(rows)} questions have words outside the model's vocabulary. The first "
            f"is question {affected[0] + 1}: {', '.join(words[affected[0]])}."
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output:
        write_text(Path(output), lines)
        note(f"{len(rows)} answers are in {output}")
    else:
        print(lines, end="")
