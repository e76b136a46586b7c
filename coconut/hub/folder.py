"""The folder of an exported model: what LatentLM saves, generation for transformers, and the model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.utils.files import write_text

if TYPE_CHECKING:
    from coconut.models.latent_lm import LatentLM

GENERATE_FILE = Path("custom_generate") / "generate.py"


def write_folder(lm: LatentLM, folder: Path | str, card: str, max_shard_size: str = "5GB") -> None:
    """Write the model with its card and, unless it is LoRA weights alone, with its generation for transformers.

    `generation_config.json` then says how the model answers by default: as LatentLM.generate does.
    """
    folder = Path(folder)
    lm.save_pretrained(folder, max_shard_size=max_shard_size)
    write_text(folder / "README.md", card)
    if lm.adapter:
        return
    from transformers import GenerationConfig

    ids: dict[str, Any] = {"eos_token_id": lm.special.eos, "pad_token_id": lm.special.pad}
    if (bos := lm.base.config.get_text_config(decoder=True).bos_token_id) is not None:
        ids["bos_token_id"] = bos
    GenerationConfig(
        do_sample=False, max_new_tokens=lm.reasoning.max_new_tokens, suppress_tokens=lm.special.added, **ids
    ).save_pretrained(folder)
    (folder / GENERATE_FILE).parent.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("custom_generate.py"), folder / GENERATE_FILE)
