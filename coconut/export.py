"""The command that hands a model on: out of a run with a card, onto the hub; or in from the released code."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from coconut.hub.config import ExportConfig
from coconut.hub.model_card import card
from coconut.hub.push import check_name, push
from coconut.methods import Curriculum, Reasoning, plan
from coconut.utils.files import atomic_folder, write_text
from coconut.utils.hydra_app import application


def run(config: ExportConfig) -> int:
    """Write a folder that others can open; from there to the hub if asked."""
    from coconut.hub.released_checkpoints import from_released
    from coconut.runs.loading import load_run
    from coconut.utils.console import log, silence_libraries

    silence_libraries()
    if config.push:
        check_name(config.push)
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={folder} is {'not empty' if folder.is_dir() else 'a file'}. Name a new folder.")
    if config.released:
        stages = Curriculum(max_stage=config.stage or 0, thoughts_per_step=config.thoughts_per_step, total_length=10**6)
        made = plan(config.method, stages)
        asked = Reasoning.at(made, made.stages[-1])
        lm = from_released(config.released, config.base, asked, config.tokenizer)
        text = card(lm, name=config.push)
    else:
        trained = load_run(config.run, config.checkpoint, config.engine)
        lm = trained.lm
        if lm.adapter and config.merge:
            lm = lm.merged()
        if lm.adapter and config.base:
            lm.adapter = replace(lm.adapter, base=config.base)
        elif lm.adapter and Path(lm.adapter.base).is_absolute():
            log(
                f"warning: the correction is to {lm.adapter.base}, a folder of this machine. base=NAME records another "
                "name of the same model, under which readers will find it."
            )
        text = card(lm, config.run, trained.step, name=config.push)
    with atomic_folder(folder) as part:
        lm.save_pretrained(part, max_shard_size=config.max_shard_size)
        write_text(part / "README.md", text)
    log(f"{folder} holds the model, its tokenizer, coconut.json and a card (README.md).")
    if config.push:
        try:
            push(folder, config.push, config.private)
        except ValueError as error:
            again = (
                f"from coconut.hub.push import push; push({str(folder)!r}, {config.push!r}, private={config.private})"
            )
            raise ValueError(
                f"{error}\nThe model is whole in {folder}. This sends it: {shlex.join(['python', '-c', again])}"
            ) from error
        log(f"It is at https://huggingface.co/{config.push}")
    return 0


main = application("export", ExportConfig, run)

if __name__ == "__main__":
    main()
