"""coconut generate: answer one question, the questions of a file, or typed questions with a trained model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from coconut.data.questions import read_questions
from coconut.generation.config import GenerateConfig, StopRule
from coconut.utils.files import decode_utf8
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def run(config: GenerateConfig) -> int:
    """Answer the questions. Gives the exit status."""
    import torch

    from coconut.engine.base import autocast
    from coconut.engine.launcher_env import read_launcher_env
    from coconut.generation.answer_file import answer_file
    from coconut.generation.generate import refuse_logit_lens
    from coconut.generation.terminal import converse, print_answer
    from coconut.utils.console import silence_libraries

    if read_launcher_env().rank:
        return 0  # under a launcher only the main process works
    silence_libraries()
    questions = _questions(config)
    torch.manual_seed(config.seed)
    lm, options = _model(config)
    if config.show_thoughts:
        refuse_logit_lens(lm)
    if config.policy:
        from coconut.adaptive.answering import answer_by_policy

        answer_by_policy(lm, questions, config)
        return 0
    with autocast(lm.device, config.engine.precision):
        if config.file:
            answer_file(lm, questions, config, options)
        elif questions:
            print_answer(lm, questions[0], config.show_thoughts, options)
        else:
            converse(lm, config.show_thoughts, options)
    return 0


def _questions(config: GenerateConfig) -> list[str]:
    """The questions from the command line, standard input or a file; none if they will be typed."""
    if config.file:
        return read_questions(config.file)
    if config.question == "-":
        question = decode_utf8(sys.stdin.buffer.read(), "Standard input").strip()
        if not question:
            raise ValueError("Standard input has no question.")
        return [question]
    if not config.question and not sys.stdin.isatty():
        raise ValueError('There is no question. Ask one with question="...", question=- (standard input) or file=FILE.')
    return [config.question] if config.question else []


def _model(config: GenerateConfig) -> tuple[LatentLM, dict[str, Any]]:
    """Load the model. Gives it with the options of generation."""
    from coconut.runs.loading import classifier_of, load_model, load_run

    options: dict[str, Any] = {"num_thoughts": config.num_thoughts, "max_new_tokens": config.max_new_tokens}
    if config.soft_thinking.max_thoughts:
        options["soft_thinking"] = config.soft_thinking
    if config.mode:
        options["mode"] = config.mode
    if config.temperature > 0:
        options |= {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    if config.thought_noise or config.thought_dropout:
        options |= {"thought_noise": config.thought_noise, "thought_dropout": config.thought_dropout}
    if config.stop is StopRule.classifier:
        trained = load_run(config.run, config.checkpoint, config.engine)
        return trained.lm, options | {"stop": classifier_of(config.run, trained).stop}
    lm = load_model(config.run, config.checkpoint, config.engine)
    if config.rate is not None:
        lm.reasoning = lm.reasoning.at_rate(config.rate)
    return lm, options


main = application("generate", GenerateConfig, run)

if __name__ == "__main__":
    main()
