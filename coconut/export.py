"""coconut export: write a model with a model card to a folder, and optionally upload it to the Hugging Face hub."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from coconut.hub.config import ExportConfig
from coconut.utils.hydra_app import application

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM


def run(config: ExportConfig) -> int:
    """Write the folder, and upload it with config.push. Gives the exit status."""
    from coconut.hub.folder import write_folder
    from coconut.hub.push import check_name
    from coconut.utils.console import log, silence_libraries
    from coconut.utils.files import atomic_folder

    silence_libraries()
    if config.push:
        check_name(config.push)
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output={folder} is {'not empty' if folder.is_dir() else 'a file'}. Name a new folder.")
    lm, card = _released(config) if config.released else _trained(config)
    with atomic_folder(folder) as part:
        write_folder(lm, part, card, config.max_shard_size)
    log(f"{folder} holds the model, its tokenizer, coconut.json, generation for transformers and a card (README.md).")
    if config.push:
        _push(folder, config)
    return 0


def _released(config: ExportConfig) -> tuple[LatentLM, str]:
    """Convert a checkpoint of released code. Gives the model and its card."""
    from coconut.hub.model_card import card
    from coconut.hub.released_checkpoints import from_released

    lm = from_released(config.released, config.base, config.reasoning(), config.tokenizer, lora_alpha=config.lora_alpha)
    return lm, card(lm, name=config.push)


def _trained(config: ExportConfig) -> tuple[LatentLM, str]:
    """Load the model of a run. Gives it with a card that has the run's results."""
    from coconut.hub.model_card import card
    from coconut.runs.loading import load_run
    from coconut.utils.console import log

    trained = load_run(config.run, config.checkpoint, config.engine)
    lm = trained.lm
    if lm.adapter and config.merge:
        lm = lm.merged()
    if lm.adapter and config.base:
        lm.adapter = replace(lm.adapter, base=config.base)
    elif lm.adapter and Path(lm.adapter.base).is_absolute():
        log(
            f"warning: the adapter belongs to the base model {lm.adapter.base}, a folder of this machine. Set "
            "base=NAME to record a name under which others can find the same model."
        )
    return lm, card(lm, config.run, trained.step, name=config.push)


def _push(folder: Path, config: ExportConfig) -> None:
    """Upload the folder. Raises ValueError with a command to try again if this fails."""
    from coconut.hub.push import push
    from coconut.utils.console import log

    try:
        push(folder, config.push, config.private)
    except ValueError as error:
        again = f"from coconut.hub.push import push; push({str(folder)!r}, {config.push!r}, private={config.private})"
        raise ValueError(
            f"{error}\nThe model is complete in {folder}. This uploads it: {shlex.join(['python', '-c', again])}"
        ) from error
    log(f"Uploaded to https://huggingface.co/{config.push}")


main = application("export", ExportConfig, run)

if __name__ == "__main__":
    main()
