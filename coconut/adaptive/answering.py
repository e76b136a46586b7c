"""Answer questions with the configuration that a policy chooses: coconut generate policy=FILE."""

from __future__ import annotations

from collections.abc import Sequence

from coconut.adaptive.backends import LatentBackend
from coconut.adaptive.chooser import Answered, Chooser
from coconut.engine.base import autocast
from coconut.generation.answer_file import write_answers
from coconut.generation.config import GenerateConfig
from coconut.generation.terminal import note, typed_questions, warn_of_truncation, warn_of_unknown
from coconut.models.latent_lm import LatentLM


def answer_by_policy(lm: LatentLM, questions: Sequence[str], config: GenerateConfig) -> None:
    """Answer the questions, or typed questions if the list is empty."""
    chooser = Chooser(config.policy, lm, config.batch_size)
    limit = config.max_new_tokens or chooser.about["max_new_tokens"]
    backend = LatentBackend(lm, config.run, config.batch_size, limit)

    def answers(batch: Sequence[str]) -> list[Answered]:
        with autocast(lm.device, config.engine.precision):
            return chooser.answer(backend, batch, config.seed)

    if config.file:
        rows = [
            {"question": question, "text": one.text, "truncated": one.reply.truncated, "passes": one.reply.passes,
             "num_thoughts": one.reply.num_thoughts[one.taken], "chosen": one.settings}
            for question, one in zip(questions, answers(questions), strict=True)
        ]  # fmt: skip
        write_answers(lm, rows, config.output)
        return
    for question in questions or typed_questions():
        warn_of_unknown(lm, question)
        try:
            [answered] = answers([question])
        except ValueError as error:
            if questions:
                raise
            note(f"error: {error}")
            continue
        note(f"[{answered.label}: {answered.reply.passes:g} forward passes]")
        print(answered.text)
        warn_of_truncation(answered.reply.truncated)
